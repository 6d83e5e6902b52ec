//! Windows of a stream of tokens for a language model, each a function of its number alone.

use std::ops::Range;

use emberlm_core::RandomKey;
use emberlm_text::{TextError, TokenStream};

/// Windows at random offsets, for training.
///
/// Window `index` of step `step` is a function of the seed and these two numbers: no generator is
/// carried along, so a resumed run, and one that loads its windows on several threads, sees the
/// same text. Offsets are independent, not a permutation: in one pass' worth of windows some tokens
/// come twice and some not at all. All offsets at which a window fits are equally likely, so tokens
/// near the two ends of the stream are in fewer windows.
///
/// A window may hold the end of one document and the start of the next: see
/// [`documents`](Self::documents).
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("ember.txt");
/// use emberlm_training::{Corpus, TrainingWindows};
///
/// std::fs::write(&path, "a glowing coal in the ash of a fire")?;
/// let windows = TrainingWindows::new(Corpus::open(&[path])?.training(), 8, 42)?;
///
/// let mut window = Vec::new();
/// windows.sample(3, 0, &mut window);
/// let (inputs, targets) = (&window[..8], &window[1..]);
/// assert_eq!(inputs.len(), targets.len());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct TrainingWindows {
    stream: TokenStream,
    seq_length: usize,
    key: RandomKey,
}

impl TrainingWindows {
    /// Windows of `seq_length` inputs each, over tokens or, given a
    /// [`TextStream`](emberlm_text::TextStream), over bytes.
    ///
    /// # Errors
    /// [`TextError::EmptySequence`], and [`TextError::SequenceTooLong`] if the stream has no more
    /// than `seq_length` tokens.
    pub fn new(
        stream: impl Into<TokenStream>,
        seq_length: usize,
        seed: u64,
    ) -> Result<Self, TextError> {
        let stream = stream.into();
        check(&stream, seq_length)?;
        Ok(Self {
            stream,
            seq_length,
            // A name of its own: dropout draws from the same seed.
            key: RandomKey::new(seed).fold_str("windows"),
        })
    }

    /// How many tokens a window predicts, and from how many: one fewer than it has.
    pub fn seq_length(&self) -> usize {
        self.seq_length
    }

    /// The stream that the windows are of.
    pub fn stream(&self) -> &TokenStream {
        &self.stream
    }

    /// Makes `window` the `seq_length + 1` tokens of a window: all but the last are inputs, all but
    /// the first are targets. What the buffer held is lost; its memory is used again.
    pub fn sample(&self, step: u64, index: u64, window: &mut Vec<u32>) {
        window.resize(self.seq_length + 1, 0);
        self.stream.copy(self.offset(step, index), window);
    }

    /// The document of each of the `seq_length` inputs of a window, numbered as in
    /// [`Corpus::documents`](emberlm_text::Corpus::documents): what
    /// [`BatchData::with_documents`](emberlm_core::BatchData::with_documents) asks for, so that
    /// attention stays within documents.
    pub fn documents(&self, step: u64, index: u64) -> Vec<u32> {
        let start = self.offset(step, index);
        self.stream.documents(start..start + self.seq_length)
    }

    /// Where in the stream a window begins.
    pub fn offset(&self, step: u64, index: u64) -> usize {
        let offsets = self.stream.len() - self.seq_length;
        self.key.fold(step).below(index, offsets as u64) as usize
    }
}

/// Windows side by side, for evaluation: together they predict every token but the first once.
///
/// Window `w` has the inputs `v[w * seq_length ..][.. seq_length]` of a stream `v`, and as targets
/// the tokens one further. The last window is shorter unless the lengths divide.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("ember.txt");
/// use emberlm_training::{Corpus, EvaluationWindows};
///
/// std::fs::write(&path, "ember ".repeat(15))?; // its last tenth: "ember ember "[3..]
/// let windows = EvaluationWindows::new(Corpus::open(&[path])?.held_out(), 5)?;
/// assert_eq!(windows.len(), 2);
/// let tokens = |text: &str| text.bytes().map(u32::from).collect::<Vec<u32>>();
/// assert_eq!(windows.get(0), (tokens("er em"), tokens("r emb")));
/// assert_eq!(windows.get(1), (tokens("ber"), tokens("er ")));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct EvaluationWindows {
    stream: TokenStream,
    seq_length: usize,
}

impl EvaluationWindows {
    /// Windows of `seq_length` inputs each, the last one excepted, over tokens or, given a
    /// [`TextStream`](emberlm_text::TextStream), over bytes.
    ///
    /// # Errors
    /// [`TextError::EmptySequence`], and [`TextError::SequenceTooLong`] if the stream has no more
    /// than `seq_length` tokens: there is always a full window.
    pub fn new(stream: impl Into<TokenStream>, seq_length: usize) -> Result<Self, TextError> {
        let stream = stream.into();
        check(&stream, seq_length)?;
        Ok(Self { stream, seq_length })
    }

    /// How many tokens each window but the last predicts, and from how many.
    pub fn seq_length(&self) -> usize {
        self.seq_length
    }

    /// The stream that the windows are of.
    pub fn stream(&self) -> &TokenStream {
        &self.stream
    }

    /// How many windows there are: at least one.
    #[expect(
        clippy::len_without_is_empty,
        reason = "there is a window, or `new` fails"
    )]
    pub fn len(&self) -> usize {
        self.targets().div_ceil(self.seq_length)
    }

    /// The inputs and the targets of a window, of equal length.
    ///
    /// # Panics
    /// If there is no such window.
    pub fn get(&self, window: usize) -> (Vec<u32>, Vec<u32>) {
        let Range { start, end } = self.inputs(window);
        (
            self.stream.tokens(start..end),
            self.stream.tokens(start + 1..end + 1),
        )
    }

    /// The document of each input of a window: see [`TrainingWindows::documents`].
    ///
    /// # Panics
    /// If there is no such window.
    pub fn documents(&self, window: usize) -> Vec<u32> {
        self.stream.documents(self.inputs(window))
    }

    /// Where in the stream the inputs of a window are.
    ///
    /// # Panics
    /// If there is no such window.
    pub fn inputs(&self, window: usize) -> Range<usize> {
        let windows = self.len();
        assert!(window < windows, "there is no window {window} of {windows}");
        let start = window * self.seq_length;
        start..start + self.seq_length.min(self.targets() - start)
    }

    /// The numbers of `n` full windows, evenly spaced from the first on; of all if there are no
    /// more. They depend on the stream's length and `n` alone, so a loss measured on them during
    /// training is always over the same tokens.
    pub fn fixed(&self, n: usize) -> Vec<usize> {
        evenly_spaced(self.targets() / self.seq_length, n)
    }

    /// Every token but the first is one.
    fn targets(&self) -> usize {
        self.stream.len() - 1
    }
}

/// `n` of the numbers below `total`, evenly spaced from 0 on; all if there are no more.
pub fn evenly_spaced(total: usize, n: usize) -> Vec<usize> {
    let n = n.min(total);
    let spaced = |at: usize| (at as u128 * total as u128 / n as u128) as usize;
    (0..n).map(spaced).collect()
}

/// Without `seq_length + 1`, which may overflow, and before a buffer of that size is asked for.
fn check(stream: &TokenStream, seq_length: usize) -> Result<(), TextError> {
    if seq_length == 0 {
        return Err(TextError::EmptySequence);
    }
    if seq_length >= stream.len() {
        return Err(TextError::SequenceTooLong {
            seq_length,
            length: stream.len(),
            unit: stream.unit(),
            part: stream.part(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::fs;

    use emberlm_text::{Corpus, TextPart, TokenUnit};
    use proptest::prelude::*;

    use super::*;

    /// A held-out stream of `length` bytes, at least 1, in documents of 73 or fewer, each byte unlike
    /// its neighbours.
    fn held_out(length: usize) -> TokenStream {
        let folder = tempfile::tempdir().unwrap();
        let bytes: Vec<u8> = (0..length).map(|at| (at * 31 % 127) as u8).collect();
        let mut paths = Vec::new();
        for (at, part) in bytes.chunks(73).enumerate() {
            let path = folder.path().join(at.to_string());
            fs::write(&path, [&vec![b'.'; 9 * part.len()], part].concat()).unwrap();
            paths.push(path);
        }
        let stream = TokenStream::from(Corpus::open(&paths).unwrap().held_out());
        let tokens: Vec<u32> = bytes.into_iter().map(u32::from).collect();
        assert_eq!(stream.tokens(0..stream.len()), tokens);
        stream
    }

    fn windows(length: usize, seq_length: usize, seed: u64) -> TrainingWindows {
        TrainingWindows::new(held_out(length), seq_length, seed).unwrap()
    }

    /// A run that was saved relies on these: if they change, its windows do.
    #[test]
    fn positions_keep_their_offsets() {
        let windows = windows(100_000, 100, 42);
        let offsets = [(1, 0), (1, 1), (2, 0), (1000, 31)].map(|(s, i)| windows.offset(s, i));
        assert_eq!(offsets, [74_993, 99_549, 3_962, 36_765]);
    }

    #[test]
    fn the_seed_matters() {
        let offsets = |seed| [0, 1, 2, 3].map(|index| windows(10_000, 100, seed).offset(1, index));
        assert_ne!(offsets(1), offsets(2));
    }

    #[test]
    fn offsets_are_uniform_over_steps_and_over_indices() {
        let windows = windows(100 + 15, 100, 7);
        let per_step: Vec<usize> = (0..16_000).map(|step| windows.offset(step, 3)).collect();
        let per_index: Vec<usize> = (0..16_000).map(|index| windows.offset(3, index)).collect();
        for offsets in [per_step, per_index] {
            let mut counts = [0_f64; 15];
            offsets.iter().for_each(|&offset| counts[offset] += 1.0);
            let expected = 16_000.0 / 15.0;
            let chi_squared: f64 = counts
                .iter()
                .map(|count| (count - expected).powi(2) / expected)
                .sum();
            // 14 degrees of freedom: above this once in a thousand seeds.
            assert!(chi_squared < 36.1, "{chi_squared}: {counts:?}");
            // A neighbour's offset says nothing: pairs fill the square.
            let pairs: HashSet<_> = offsets.windows(2).map(|pair| (pair[0], pair[1])).collect();
            assert_eq!(pairs.len(), 15 * 15);
        }
    }

    #[test]
    fn a_window_is_the_stream_at_its_offset() {
        let stream = held_out(300);
        let windows = TrainingWindows::new(stream.clone(), 100, 1).unwrap();
        let mut window = vec![0; 777];
        for step in 0..50 {
            windows.sample(step, 2, &mut window);
            let offset = windows.offset(step, 2);
            assert_eq!(window, stream.tokens(offset..offset + 101));
        }
    }

    #[test]
    fn the_documents_of_a_window_are_those_of_its_inputs() {
        // Documents of 73 bytes.
        let stream = held_out(300);
        let windows = TrainingWindows::new(stream.clone(), 100, 1).unwrap();
        for step in 0..50 {
            let start = windows.offset(step, 2);
            let expected: Vec<u32> = (start..start + 100).map(|at| at as u32 / 73).collect();
            assert_eq!(windows.documents(step, 2), expected);
        }
        let windows = EvaluationWindows::new(stream, 100).unwrap();
        let documents: Vec<u32> = (0..3)
            .flat_map(|window| windows.documents(window))
            .collect();
        let expected: Vec<u32> = (0..299).map(|at| at / 73).collect();
        assert_eq!(documents, expected);
    }

    #[test]
    fn the_longest_window_is_the_whole_stream() {
        let stream = held_out(200);
        let windows = TrainingWindows::new(stream.clone(), 199, 1).unwrap();
        let mut window = Vec::new();
        windows.sample(5, 6, &mut window);
        assert_eq!(window, stream.tokens(0..200));
    }

    #[test]
    fn sequences_that_do_not_fit_are_errors_without_an_allocation() {
        let stream = held_out(200);
        for length in [200, 100_000_000, usize::MAX] {
            for error in [
                TrainingWindows::new(stream.clone(), length, 0).unwrap_err(),
                EvaluationWindows::new(stream.clone(), length).unwrap_err(),
            ] {
                match error {
                    TextError::SequenceTooLong {
                        seq_length,
                        length: found,
                        unit,
                        part,
                    } => assert_eq!(
                        (seq_length, found, unit, part),
                        (length, 200, TokenUnit::Byte, TextPart::HeldOut)
                    ),
                    other => panic!("{other:?}"),
                }
            }
        }
        assert!(matches!(
            TrainingWindows::new(stream.clone(), 0, 0),
            Err(TextError::EmptySequence)
        ));
        assert!(matches!(
            EvaluationWindows::new(stream, 0),
            Err(TextError::EmptySequence)
        ));
    }

    #[test]
    fn an_empty_stream_has_no_window() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("short.txt");
        fs::write(&path, "ember").unwrap();
        let error = EvaluationWindows::new(Corpus::open(&[path]).unwrap().held_out(), 1);
        assert!(matches!(
            error,
            Err(TextError::SequenceTooLong { length: 0, .. })
        ));
    }

    #[test]
    fn fixed_windows_are_evenly_spaced_full_ones() {
        let windows = EvaluationWindows::new(held_out(10 * 12 + 5), 12).unwrap();
        assert_eq!(windows.len(), 11);
        assert_eq!(windows.fixed(0), [0; 0]);
        assert_eq!(windows.fixed(1), [0]);
        assert_eq!(windows.fixed(3), [0, 3, 6]);
        assert_eq!(windows.fixed(5), [0, 2, 4, 6, 8]);
        let all: Vec<usize> = (0..10).collect();
        assert_eq!(windows.fixed(10), all);
        assert_eq!(windows.fixed(usize::MAX), all);
    }

    #[test]
    #[should_panic(expected = "there is no window 3 of 3")]
    fn a_window_past_the_last_panics() {
        let windows = EvaluationWindows::new(held_out(31), 10).unwrap();
        windows.get(3);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn every_token_but_the_first_is_predicted_once(
            (length, seq_length) in (2_usize..400).prop_flat_map(|length| (Just(length), 1..length)),
        ) {
            let stream = held_out(length);
            let windows = EvaluationWindows::new(stream.clone(), seq_length).unwrap();
            let (mut all_inputs, mut all_targets) = (Vec::new(), Vec::new());
            for window in 0..windows.len() {
                let (inputs, targets) = windows.get(window);
                prop_assert_eq!(inputs.len(), targets.len());
                prop_assert!(!inputs.is_empty());
                if window + 1 < windows.len() {
                    prop_assert_eq!(inputs.len(), seq_length);
                }
                all_inputs.extend(inputs);
                all_targets.extend(targets);
            }
            prop_assert_eq!(all_inputs, stream.tokens(0..length - 1));
            prop_assert_eq!(all_targets, stream.tokens(1..length));
        }

        #[test]
        fn fixed_windows_are_full_ascending_and_as_many_as_there_are(
            (length, seq_length) in (2_usize..400).prop_flat_map(|length| (Just(length), 1..length)),
            n in 0_usize..100,
        ) {
            let windows = EvaluationWindows::new(held_out(length), seq_length).unwrap();
            let fixed = windows.fixed(n);
            prop_assert_eq!(fixed.len(), n.min((length - 1) / seq_length));
            prop_assert!(fixed.is_sorted_by(|a, b| a < b));
            for window in fixed {
                prop_assert_eq!(windows.get(window).0.len(), seq_length);
            }
        }

        #[test]
        fn windows_fit_whatever_the_position(
            (length, seq_length) in (2_usize..400).prop_flat_map(|length| (Just(length), 1..length)),
            seed: u64, step: u64, index: u64,
        ) {
            let windows = windows(length, seq_length, seed);
            let mut window = Vec::new();
            windows.sample(step, index, &mut window);
            prop_assert_eq!(window.len(), seq_length + 1);
            prop_assert!(windows.offset(step, index) <= length - (seq_length + 1));
        }
    }
}
