//! How many hidden tokens a model finds, beside a table of counts.

use std::{
    collections::{BTreeMap, HashMap},
    hash::Hash,
};

use burn::{
    data::dataloader::DataLoader,
    tensor::{Int, Tensor, TensorData},
};
use emberlm::{
    core::{IGNORED_TARGET, TokenBatch},
    models::Encoder,
    text::TokenStream,
    training::TrainingError,
};

/// What stands most often between two tokens, in a text: what can be said of a hidden token without a model.
///
/// Where a pair of neighbours was not seen, what stands most often after the left one; else the most frequent token.
pub struct NeighbourTable {
    between: HashMap<(u32, u32), u32>,
    after: HashMap<u32, u32>,
    anywhere: Option<u32>,
}

/// The share of hidden tokens that are found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MaskedAccuracy {
    /// Number of tokens that stood behind the mask.
    pub n_hidden: usize,
    /// By the model.
    pub model: f64,
    /// By the table, from the neighbours as the model reads them.
    pub neighbours: f64,
}

// Of a longer text, parts that are evenly spaced are counted: the table holds every triple of tokens.
const MOST_TOKENS: usize = 1 << 23;
const PART: usize = 1 << 16;

impl NeighbourTable {
    /// Counts a text.
    pub fn count(stream: &TokenStream) -> Self {
        let mut between = HashMap::new();
        let mut after = HashMap::new();
        let mut anywhere = HashMap::new();
        let stride = stream.len().div_ceil(MOST_TOKENS).max(1);
        for start in (0..stream.len()).step_by(PART * stride) {
            // Two more, so that each token of the part is in the middle once.
            let tokens = stream.tokens(start..stream.len().min(start + PART + 2));
            for triple in tokens.windows(3) {
                let [left, middle, right] = [triple[0], triple[1], triple[2]];
                *between.entry(((left, right), middle)).or_insert(0) += 1;
                *after.entry((left, middle)).or_insert(0) += 1;
                *anywhere.entry(((), middle)).or_insert(0) += 1;
            }
        }
        Self {
            between: most_frequent(between),
            after: most_frequent(after),
            anywhere: most_frequent(anywhere).remove(&()),
        }
    }

    /// What probably stands between two tokens, of which one may be unknown.
    pub fn guess(&self, left: Option<u32>, right: Option<u32>) -> Option<u32> {
        let between = left.zip(right).and_then(|pair| self.between.get(&pair));
        let after = || self.after.get(&left?);
        between.or_else(after).copied().or(self.anywhere)
    }
}

/// The most frequent token of each key; the smaller one where two are as frequent.
fn most_frequent<K: Hash + Eq>(counts: HashMap<(K, u32), u32>) -> HashMap<K, u32> {
    let mut best: HashMap<K, (u32, u32)> = HashMap::new();
    for ((key, token), count) in counts {
        let (known, most) = best.entry(key).or_insert((token, count));
        if count > *most || count == *most && token < *known {
            (*known, *most) = (token, count);
        }
    }
    let best = best.into_iter();
    best.map(|(key, (token, _))| (key, token)).collect()
}

/// Hides the tokens of a loader's batches and counts what is found: only tokens behind the mask, as of those that stand
/// there unchanged nobody needs to guess. `watch` is told the number of rows of each batch.
///
/// # Errors
///
/// Those of the loader and of `watch`.
pub fn masked_accuracy(
    model: &Encoder,
    table: &NeighbourTable,
    loader: &dyn DataLoader<TokenBatch>,
    mask_token: u32,
    mut watch: impl FnMut(usize) -> Result<(), TrainingError>,
) -> Result<MaskedAccuracy, TrainingError> {
    let (mut n_hidden, mut by_model, mut by_table) = (0, 0, 0);
    for batch in loader.iter() {
        let batch = batch.map_err(|error| TrainingError::Data(error.to_string()))?;
        let [n_rows, _] = batch.inputs.dims();
        let hidden = Hidden::of(&batch, mask_token);
        n_hidden += hidden.answers.len();
        by_model += hidden.found(hidden.by_model(model, batch));
        by_table += hidden.found(hidden.by_table(table));
        watch(n_rows)?;
    }
    let share = |found: usize| found as f64 / n_hidden as f64;
    Ok(MaskedAccuracy {
        n_hidden,
        model: share(by_model),
        neighbours: share(by_table),
    })
}

/// The tokens of a batch that stand behind the mask, by their place in it.
struct Hidden {
    inputs: Vec<i64>,
    seq_length: usize,
    mask_token: i64,
    answers: BTreeMap<usize, i64>,
}

impl Hidden {
    fn of(batch: &TokenBatch, mask_token: u32) -> Self {
        let numbers = |tokens: &Tensor<2, Int>| tokens.to_data().iter::<i64>().collect::<Vec<_>>();
        let (inputs, targets) = (numbers(&batch.inputs), numbers(&batch.targets));
        let mask_token = i64::from(mask_token);
        let places = (0..).zip(inputs.iter().zip(&targets));
        let answers = places.filter_map(|(place, (input, target))| {
            (*input == mask_token && *target != IGNORED_TARGET).then_some((place, *target))
        });
        Self {
            answers: answers.collect(),
            seq_length: batch.inputs.dims()[1],
            inputs,
            mask_token,
        }
    }

    fn found(&self, guesses: Vec<Option<i64>>) -> usize {
        let pairs = self.answers.values().zip(guesses);
        pairs
            .filter(|(answer, guess)| Some(**answer) == *guess)
            .count()
    }

    fn by_model(&self, model: &Encoder, batch: TokenBatch) -> Vec<Option<i64>> {
        if self.answers.is_empty() {
            return Vec::new();
        }
        let device = batch.inputs.device();
        let states = model.hidden_states(batch.inputs, None, batch.data, None);
        let [n_rows, seq_length, d_model] = states.dims();
        let places: Vec<i64> = self.answers.keys().map(|place| *place as i64).collect();
        let shape = [places.len()];
        let places = Tensor::<1, Int>::from_data(TensorData::new(places, shape), &device);
        let states = states
            .reshape([n_rows * seq_length, d_model])
            .select(0, places);
        let guesses = model.masked_scores(states).argmax(1).into_data();
        guesses.iter::<i64>().map(Some).collect()
    }

    fn by_table(&self, table: &NeighbourTable) -> Vec<Option<i64>> {
        let known = |place: usize| {
            let token = self.inputs[place];
            (token != self.mask_token).then_some(token as u32)
        };
        let guess = |place: usize| {
            let column = place % self.seq_length;
            let left = (column > 0).then(|| known(place - 1)).flatten();
            let right = (column + 1 < self.seq_length)
                .then(|| known(place + 1))
                .flatten();
            table.guess(left, right).map(i64::from)
        };
        self.answers.keys().map(|place| guess(*place)).collect()
    }
}

#[cfg(test)]
mod tests {
    use emberlm::text::Corpus;

    use super::*;

    fn table(text: &str) -> NeighbourTable {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("text.txt");
        std::fs::write(&path, text).expect("writable");
        let corpus = Corpus::open(&[path]).expect("a text");
        NeighbourTable::count(&corpus.training().into())
    }

    fn token(letter: char) -> Option<u32> {
        Some(letter as u32)
    }

    #[test]
    fn the_table_knows_pairs_then_left_neighbours_then_letters() {
        // 18 bytes, so that the last is held out.
        let table = table("abcabcadcxbyxbyyyzz");
        assert_eq!(table.guess(token('a'), token('c')), token('b'));
        assert_eq!(table.guess(token('d'), token('x')), token('c'));
        // No x stands before an a: after x there is b.
        assert_eq!(table.guess(token('x'), token('a')), token('b'));
        assert_eq!(table.guess(token('x'), None), token('b'));
        // Nothing stands after a q; y is as frequent as b in the middle, and b the smaller.
        assert_eq!(table.guess(token('q'), token('a')), token('b'));
        assert_eq!(table.guess(None, token('c')), token('b'));
    }

    #[test]
    fn a_text_without_a_middle_gives_no_guess() {
        assert_eq!(table("ab").guess(token('a'), token('b')), None);
    }
}
