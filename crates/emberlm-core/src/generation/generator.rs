//! Token-by-token generation of one text, without an end.

use burn::tensor::Device;

use super::{
    LogitProcessors,
    rows::{Rows, Scores},
    text::Text,
};
use crate::{CachedModel, GenerationError, Sampler, SamplingConfig};

/// An iterator over the tokens that a model writes after a prompt.
///
/// The cache is allocated once. A model with a longest sequence (learned positions) slides its window when that is
/// full: the last half of the text is encoded again from position 0, and [`n_slides`](Self::n_slides) counts it.
/// The iterator ends after `max_new_tokens`, or after an error.
pub struct Generator<'a, M: CachedModel> {
    rows: Rows<'a, M>,
    capacity: usize,
    /// Tokens at the end of the text that the cache does not hold yet.
    n_pending: usize,
    text: Text,
    processors: LogitProcessors<'a>,
    n_remaining: usize,
    n_slides: usize,
}

impl<'a, M: CachedModel> Generator<'a, M> {
    /// Prepares to continue `prompt`.
    ///
    /// # Errors
    ///
    /// An empty prompt, or invalid sampling options.
    pub fn new(
        model: &'a M,
        prompt: &[u32],
        max_new_tokens: usize,
        sampling: SamplingConfig,
        device: &Device,
    ) -> Result<Self, GenerationError> {
        let cache = model.new_cache(Self::capacity(model, prompt, max_new_tokens));
        Self::from_cache(model, cache, prompt, max_new_tokens, sampling, device)
    }

    /// As [`new`](Self::new), with a cache that holds no token, but perhaps a source. It has room for the prompt and
    /// the new tokens, or for all positions that the model has.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_cache(
        model: &'a M,
        cache: M::Cache,
        prompt: &[u32],
        max_new_tokens: usize,
        sampling: SamplingConfig,
        device: &Device,
    ) -> Result<Self, GenerationError> {
        if prompt.is_empty() {
            return Err(GenerationError::EmptyPrompt);
        }
        Ok(Self {
            rows: Rows::new(model, cache, device),
            capacity: Self::capacity(model, prompt, max_new_tokens),
            n_pending: prompt.len(),
            text: Text::new(prompt, Sampler::new(sampling)?),
            processors: LogitProcessors::new(),
            n_remaining: max_new_tokens,
            n_slides: 0,
        })
    }

    /// Changes the scores before each draw.
    pub fn with_processors(mut self, processors: LogitProcessors<'a>) -> Self {
        self.processors = processors;
        self
    }

    /// How often the window slid so far.
    pub fn n_slides(&self) -> usize {
        self.n_slides
    }

    /// The prompt and all tokens so far.
    pub fn text(&self) -> &[u32] {
        &self.text.tokens
    }

    /// The natural logarithm of the probability of each new token so far, as the model has it: before processors,
    /// temperature and filters.
    pub fn log_probabilities(&self) -> &[f64] {
        &self.text.log_probabilities
    }

    fn capacity(model: &M, prompt: &[u32], max_new_tokens: usize) -> usize {
        let whole = prompt.len().saturating_add(max_new_tokens);
        let longest = model.max_seq_length();
        longest.map_or(whole, |longest| whole.min(longest))
    }

    /// Scores of the token after the text so far.
    fn scores(&mut self) -> Scores {
        if self.rows.len() + self.n_pending > self.capacity {
            self.rows.clear();
            self.n_pending = (self.capacity / 2).max(1);
            self.n_slides += 1;
        }
        let tokens = &self.text.tokens;
        let new = &tokens[tokens.len() - self.n_pending..];
        self.n_pending = 0;
        self.rows.begin(&[new])
    }

    fn draw(&mut self) -> Result<u32, GenerationError> {
        let scores = self.scores();
        let token = self.text.draw(scores.row(0)?, &mut self.processors)?;
        self.n_pending = 1;
        Ok(token)
    }
}

impl<M: CachedModel> Iterator for Generator<'_, M> {
    type Item = Result<u32, GenerationError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.n_remaining = self.n_remaining.checked_sub(1)?;
        let token = self.draw();
        if token.is_err() {
            self.n_remaining = 0;
        }
        Some(token)
    }
}
