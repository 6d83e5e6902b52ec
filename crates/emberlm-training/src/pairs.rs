//! Pairs of token sequences as batches of like length.

use std::{ops::Range, sync::Arc};

use burn::{
    data::dataloader::{DataLoader, DataLoaderIterator},
    tensor::{Device, Int, Tensor, TensorData},
};
use emberlm_core::{IGNORED_TARGET, RandomKey, Source};

use crate::{TokenBatch, TrainingConfig, loader::Numbered};

/// A source and its target as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenPair {
    /// What an encoder reads.
    pub source: Vec<u32>,
    /// What a decoder reads, all but the last, and predicts, all but the first: it begins with a start token and ends
    /// with an end token.
    pub target: Vec<u32>,
}

impl TokenPair {
    /// How many tokens the decoder predicts.
    pub fn n_predicted(&self) -> usize {
        self.target.len() - 1
    }
}

/// Pairs as one batch, padded at the end: sources with tokens that no query sees, targets with
/// [`IGNORED_TARGET`], behind which nothing that counts looks under a causal pattern.
///
/// ```
/// use burn::tensor::Device;
/// use emberlm_training::{TokenPair, pair_batch};
///
/// let short = TokenPair { source: vec![5, 2], target: vec![1, 7, 2] };
/// let long = TokenPair { source: vec![5, 6, 2], target: vec![1, 7, 8, 9, 2] };
/// let batch = pair_batch(&[&short, &long], &Device::flex());
/// let targets: Vec<i64> = batch.targets.into_data().iter::<i64>().collect();
/// assert_eq!(targets, [7, 2, -100, -100, 7, 8, 9, 2]);
/// assert_eq!(batch.source.expect("what the encoder reads").tokens.dims(), [2, 3]);
/// ```
///
/// # Panics
///
/// If there are no pairs, or one has an empty source or fewer than two tokens of target.
pub fn pair_batch(pairs: &[&TokenPair], device: &Device) -> TokenBatch {
    let seq_length = pairs.iter().map(|pair| pair.n_predicted()).max();
    let seq_length = seq_length.expect("a batch has a pair");
    let rows = |part: fn(&TokenPair) -> &[u32], filling: i32| -> Tensor<2, Int> {
        let mut tokens = Vec::with_capacity(pairs.len() * seq_length);
        for pair in pairs {
            let part = part(pair);
            assert!(!part.is_empty(), "target: it has a start token and another");
            tokens.extend(part.iter().map(|token| *token as i32));
            tokens.resize(tokens.len() + seq_length - part.len(), filling);
        }
        Tensor::from_data(TensorData::new(tokens, [pairs.len(), seq_length]), device)
    };
    let inputs = rows(|pair| &pair.target[..pair.target.len() - 1], 0);
    let targets = rows(|pair| &pair.target[1..], IGNORED_TARGET as i32);
    let sources: Vec<&[u32]> = pairs.iter().map(|pair| &pair.source[..]).collect();
    TokenBatch {
        source: Some(Source::padded(&sources, device)),
        ..TokenBatch::new(inputs, targets)
    }
}

// Pairs that are sorted by length together: many batches, so that there is little padding, and few against the pairs of
// a corpus, so that batches differ between epochs.
const POOL: usize = 2000;

/// The batches of all epochs, each a function of seed and number alone.
///
/// In each epoch the pairs are shuffled, sorted by the length of target and source in pools of 2,000, cut into batches
/// of at most `max_tokens` predicted tokens, padding included (a longer pair is a batch by itself), and the batches are
/// shuffled. So every pair comes once in an epoch, and a batch has little padding.
#[derive(Clone, Debug)]
pub struct PairBatches {
    pairs: Arc<[TokenPair]>,
    max_tokens: usize,
    key: RandomKey,
}

impl PairBatches {
    /// Batches of these pairs.
    ///
    /// # Panics
    ///
    /// If there are no pairs.
    pub fn new(pairs: Arc<[TokenPair]>, max_tokens: usize, seed: u64) -> Self {
        assert!(!pairs.is_empty(), "pairs: an epoch needs at least one");
        Self {
            pairs,
            max_tokens,
            // A name of its own: dropout draws from the same seed.
            key: RandomKey::new(seed).fold_str("pairs"),
        }
    }

    /// The batches of an epoch, counted from 0, as numbers of pairs.
    pub fn epoch(&self, epoch: u64) -> Vec<Vec<usize>> {
        let key = self.key.fold(epoch);
        let mut order: Vec<usize> = (0..self.pairs.len()).collect();
        shuffle(&mut order, &key.fold(0));
        let mut batches: Vec<_> = order
            .chunks_mut(POOL)
            .flat_map(|pool| by_length(&self.pairs, pool, self.max_tokens))
            .collect();
        shuffle(&mut batches, &key.fold(1));
        batches
    }

    /// All batches from number `first` on, without end: those of the first epoch, counted from 0, then those of the
    /// second, and so on. The epochs before it are only cut, which takes milliseconds each.
    pub fn from(&self, first: usize) -> impl Iterator<Item = Vec<usize>> + use<> {
        let batches = self.clone();
        let mut to_skip = first;
        let epochs = (0..).map(move |epoch| batches.epoch(epoch));
        epochs.flat_map(move |mut epoch| {
            let n_skipped = to_skip.min(epoch.len());
            to_skip -= n_skipped;
            epoch.drain(..n_skipped);
            epoch
        })
    }
}

/// Sorts a pool by length and cuts it into batches.
fn by_length(pairs: &[TokenPair], pool: &mut [usize], max_tokens: usize) -> Vec<Vec<usize>> {
    pool.sort_by_key(|&i| (pairs[i].n_predicted(), pairs[i].source.len()));
    let mut batches: Vec<Vec<usize>> = Vec::new();
    for &i in &*pool {
        // It is the longest so far.
        match batches.last_mut() {
            Some(batch) if (batch.len() + 1) * pairs[i].n_predicted() <= max_tokens => {
                batch.push(i);
            }
            _ => batches.push(vec![i]),
        }
    }
    batches
}

/// Fisher and Yates: all orders are equally likely.
fn shuffle<T>(items: &mut [T], key: &RandomKey) {
    for last in (1..items.len()).rev() {
        items.swap(last, key.below(last as u64, last as u64 + 1) as usize);
    }
}

/// The micro-batches of a run's steps on pairs, in order.
///
/// A micro-batch has at most `config.tokens_per_step() / config.accumulation` predicted tokens, padding included: see
/// [`PairBatches`].
#[derive(Clone)]
pub struct PairLoader {
    batches: PairBatches,
    device: Device,
    accumulation: usize,
    key: RandomKey,
    micro_batches: Range<usize>,
}

impl PairLoader {
    /// The micro-batches of steps `first_step ..= config.steps`, counted from 1.
    ///
    /// # Panics
    ///
    /// If there are no pairs.
    pub fn new(
        pairs: Arc<[TokenPair]>,
        config: &TrainingConfig,
        first_step: u64,
        device: &Device,
    ) -> Self {
        let accumulation = config.accumulation;
        let max_tokens = config.tokens_per_step() / accumulation;
        Self {
            batches: PairBatches::new(pairs, max_tokens, config.seed),
            device: device.clone(),
            accumulation,
            key: RandomKey::new(config.seed),
            micro_batches: (first_step as usize - 1) * accumulation
                ..config.steps as usize * accumulation,
        }
    }

    fn batch(&self, micro_batch: usize, rows: &[usize]) -> TokenBatch {
        let step = (micro_batch / self.accumulation) as u64 + 1;
        let index = (micro_batch % self.accumulation) as u64;
        let pairs: Vec<&TokenPair> = rows.iter().map(|i| &self.batches.pairs[*i]).collect();
        TokenBatch {
            dropout_key: Some(self.key.fold(step).fold(index)),
            ..pair_batch(&pairs, &self.device)
        }
    }
}

impl DataLoader<TokenBatch> for PairLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<TokenBatch> + 'a> {
        let mut rows = self.batches.from(self.micro_batches.start);
        Box::new(Numbered {
            make: move |micro_batch| {
                let rows = rows.next().expect("epochs follow each other without end");
                self.batch(micro_batch, &rows)
            },
            next: self.micro_batches.clone(),
            total: self.micro_batches.len(),
        })
    }

    fn num_items(&self) -> usize {
        self.micro_batches.len()
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<TokenBatch>> {
        Arc::new(Self {
            device: device.clone(),
            ..self.clone()
        })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<TokenBatch>> {
        let Range {
            start: first,
            end: last,
        } = self.micro_batches;
        Arc::new(Self {
            micro_batches: (first + start).min(last)..(first + end).min(last),
            ..self.clone()
        })
    }
}

/// Chosen pairs of held-out ones, sorted by length.
#[derive(Clone)]
pub struct PairEvaluationLoader {
    pairs: Arc<[TokenPair]>,
    device: Device,
    max_tokens: usize,
    batches: Vec<Vec<usize>>,
}

impl PairEvaluationLoader {
    /// The given pairs, in batches of at most `max_tokens` predicted tokens, padding included.
    pub fn new(
        pairs: Arc<[TokenPair]>,
        chosen: &[usize],
        max_tokens: usize,
        device: &Device,
    ) -> Self {
        Self {
            batches: by_length(&pairs, &mut chosen.to_vec(), max_tokens),
            pairs,
            device: device.clone(),
            max_tokens,
        }
    }
}

impl DataLoader<TokenBatch> for PairEvaluationLoader {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<TokenBatch> + 'a> {
        Box::new(Numbered {
            make: |batch: usize| {
                let rows = self.batches[batch].iter();
                let pairs: Vec<&TokenPair> = rows.map(|i| &self.pairs[*i]).collect();
                pair_batch(&pairs, &self.device)
            },
            next: 0..self.batches.len(),
            total: self.batches.len(),
        })
    }

    fn num_items(&self) -> usize {
        self.batches.iter().map(Vec::len).sum()
    }

    fn to_device(&self, device: &Device) -> Arc<dyn DataLoader<TokenBatch>> {
        Arc::new(Self {
            device: device.clone(),
            ..self.clone()
        })
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<TokenBatch>> {
        let chosen = self.batches.concat();
        let chosen = &chosen[start.min(chosen.len())..end.min(chosen.len())];
        Arc::new(Self::new(
            self.pairs.clone(),
            chosen,
            self.max_tokens,
            &self.device,
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pairs(n: usize) -> Arc<[TokenPair]> {
        let key = RandomKey::new(7);
        let length = |draw| 2 + key.below(draw, 60) as usize;
        let pair = |i: usize| TokenPair {
            source: vec![i as u32; length(2 * i as u64)],
            target: vec![i as u32; length(2 * i as u64 + 1)],
        };
        (0..n).map(pair).collect()
    }

    #[test]
    fn an_epoch_has_every_pair_once_in_batches_within_the_limit() {
        let pairs = pairs(4500);
        let batches = PairBatches::new(pairs.clone(), 1500, 3);
        let epochs = [0, 1].map(|epoch| batches.epoch(epoch));
        for epoch in &epochs {
            let mut seen = epoch.concat();
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..4500));
            let (mut real, mut padded) = (0, 0);
            for batch in epoch {
                let lengths = || batch.iter().map(|i| pairs[*i].n_predicted());
                let of_batch = batch.len() * lengths().max().unwrap();
                assert!(of_batch <= 1500);
                real += lengths().sum::<usize>();
                padded += of_batch;
            }
            // A batch in the order of the pairs would be half padding.
            assert!(padded as f64 > real as f64 && real as f64 > 0.95 * padded as f64);
        }
        assert_ne!(epochs[0], epochs[1]);
        assert_ne!(epochs[0], PairBatches::new(pairs, 1500, 4).epoch(0));
    }

    #[test]
    fn the_batches_do_not_come_in_the_order_of_their_lengths() {
        let pairs = pairs(4000);
        let lengths: Vec<usize> = PairBatches::new(pairs.clone(), 500, 3)
            .epoch(0)
            .iter()
            .map(|batch| pairs[batch[0]].n_predicted())
            .collect();
        let rising = lengths.windows(2).filter(|two| two[0] <= two[1]).count();
        let share = rising as f64 / lengths.len() as f64;
        assert!((0.4..0.6).contains(&share), "{share}");
    }

    #[test]
    fn a_pair_beyond_the_limit_is_a_batch_by_itself() {
        let batches = PairBatches::new(pairs(40), 1, 3).epoch(0);
        assert!(batches.iter().all(|batch| batch.len() == 1));
        assert_eq!(batches.len(), 40);
    }

    #[test]
    fn shuffling_gives_every_order_alike() {
        let mut counts = std::collections::BTreeMap::<_, usize>::new();
        for seed in 0..6000 {
            let mut order = [0, 1, 2];
            shuffle(&mut order, &RandomKey::new(seed));
            *counts.entry(order).or_default() += 1;
        }
        // Each is binomial with mean 1000 and deviation 29.
        assert_eq!(counts.len(), 6);
        assert!(
            counts.values().all(|n| n.abs_diff(1000) < 4 * 29),
            "{counts:?}"
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        #[test]
        fn wherever_one_begins_the_batches_are_the_same(
            n in 1_usize..60, max_tokens in 1_usize..400, first in 0_usize..100,
        ) {
            let batches = PairBatches::new(pairs(n), max_tokens, 5);
            let whole: Vec<_> = batches.from(0).take(first + 3).collect();
            let epochs: Vec<_> = (0..).flat_map(|epoch| batches.epoch(epoch)).take(first + 3).collect();
            prop_assert_eq!(&whole, &epochs);
            let part: Vec<_> = batches.from(first).take(3).collect();
            prop_assert_eq!(&part[..], &whole[first..]);
        }
    }
}
