//! One pass over all rows of a batch: tokens in, scores of the next token out.

use burn::tensor::{Device, Int, Tensor, TensorData, s};

use crate::{CachedModel, DecodingCache, GenerationError, SampleError};

/// A batch of texts that grows in a model's cache.
pub(super) struct Rows<'a, M: CachedModel> {
    model: &'a M,
    cache: M::Cache,
    device: Device,
}

impl<'a, M: CachedModel> Rows<'a, M> {
    pub(super) fn new(model: &'a M, cache: M::Cache, device: &Device) -> Self {
        Self {
            model,
            cache,
            device: device.clone(),
        }
    }

    /// Number of positions in the cache.
    pub(super) fn len(&self) -> usize {
        self.cache.len()
    }

    /// Forgets all tokens.
    pub(super) fn clear(&mut self) {
        self.cache.truncate(0);
    }

    /// Row `i` goes on from what row `rows[i]` was.
    pub(super) fn select(&mut self, rows: &[usize]) {
        if !rows
            .iter()
            .copied()
            .eq(0..self.cache.batch_size().unwrap_or(0))
        {
            self.cache.select(rows);
        }
    }

    /// Takes the first tokens of each row, padded on the left to one length.
    ///
    /// # Panics
    ///
    /// If the cache has another number of rows.
    pub(super) fn begin<P: AsRef<[u32]>>(&mut self, prompts: &[P]) -> Scores {
        let n_rows = self.cache.batch_size().unwrap_or(prompts.len());
        assert_eq!(
            prompts.len(),
            n_rows,
            "batch_size: prompts, and rows of the cache"
        );
        let lengths = || prompts.iter().map(|prompt| prompt.as_ref().len());
        let longest = lengths().max().unwrap_or(0);
        if lengths().any(|length| length < longest) {
            let padding: Vec<usize> = lengths().map(|length| longest - length).collect();
            self.cache.set_padding(&padding);
        }
        let tokens = prompts.iter().flat_map(|prompt| {
            let padding = longest - prompt.as_ref().len();
            // What stands at padding is seen by nobody; every vocabulary has a token 0.
            std::iter::repeat_n(&0, padding).chain(prompt.as_ref())
        });
        self.forward(tokens, [prompts.len(), longest])
    }

    /// Takes one more token of each row.
    pub(super) fn step(&mut self, tokens: &[u32]) -> Scores {
        self.forward(tokens.iter(), [tokens.len(), 1])
    }

    fn forward<'t>(
        &mut self,
        tokens: impl Iterator<Item = &'t u32>,
        [n_rows, length]: [usize; 2],
    ) -> Scores {
        let tokens: Vec<i64> = tokens.map(|token| i64::from(*token)).collect();
        let tokens = TensorData::new(tokens, [n_rows, length]);
        let tokens = Tensor::<2, Int>::from_data(tokens, &self.device);
        let scores = self.model.forward_cached(tokens, &mut self.cache);
        let [_, _, vocab_size] = scores.dims();
        let last = scores.slice(s![.., length - 1..length, ..]);
        Scores {
            values: last.into_data().iter::<f64>().collect(),
            vocab_size,
        }
    }
}

/// Scores of the next token of each row: `[n_rows, vocab_size]`, on the host.
pub(super) struct Scores {
    values: Vec<f64>,
    vocab_size: usize,
}

impl Scores {
    pub(super) fn n_rows(&self) -> usize {
        self.values.len() / self.vocab_size
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The scores of a row.
    ///
    /// # Errors
    ///
    /// As [`check`].
    pub(super) fn row(&self, row: usize) -> Result<&[f64], SampleError> {
        let scores = &self.values[row * self.vocab_size..][..self.vocab_size];
        check(scores)?;
        Ok(scores)
    }
}

/// # Errors
///
/// A score that is NaN or positive infinity.
pub(super) fn check(scores: &[f64]) -> Result<(), SampleError> {
    let unusable = |score: &f64| score.is_nan() || *score == f64::INFINITY;
    match scores.iter().position(unusable) {
        Some(token) => Err(SampleError::Logit {
            token,
            value: scores[token] as f32,
        }),
        None => Ok(()),
    }
}

/// `ln(sum_i exp(x_i))`, negative infinity where all are that.
pub(super) fn log_sum_exp(x: &[f64]) -> f64 {
    let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + x.iter().map(|x| (x - largest).exp()).sum::<f64>().ln()
}

/// Checks that a model has positions for `longest_prompt` tokens and all new ones but the last, which nothing follows,
/// and returns how many these are.
pub(super) fn positions_for<M: CachedModel>(
    model: &M,
    longest_prompt: usize,
    max_new_tokens: usize,
) -> Result<usize, GenerationError> {
    let needed = longest_prompt.saturating_add(max_new_tokens.saturating_sub(1));
    match model.max_seq_length() {
        Some(longest) if needed > longest => Err(GenerationError::TooLong { needed, longest }),
        _ => Ok(needed),
    }
}

/// The length of the longest prompt.
///
/// # Errors
///
/// A prompt without a token.
pub(super) fn longest<P: AsRef<[u32]>>(prompts: &[P]) -> Result<usize, GenerationError> {
    let lengths = || prompts.iter().map(|prompt| prompt.as_ref().len());
    match lengths().min() {
        Some(0) => Err(GenerationError::EmptyPrompt),
        _ => Ok(lengths().max().unwrap_or(0)),
    }
}
