//! Token-by-token generation with a cache.

use burn::tensor::{Device, Int, Tensor, TensorData, s};
use thiserror::Error;

use crate::{CachedModel, InvalidSampling, SampleError, Sampler, SamplingConfig};

/// Why nothing can be generated.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum GenerationError {
    /// There is nothing to continue.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// The sampling options are invalid.
    #[error(transparent)]
    Sampling(#[from] InvalidSampling),
    /// The model's scores cannot be drawn from.
    #[error(transparent)]
    Sample(#[from] SampleError),
}

/// An iterator over the tokens that a model writes after a prompt.
///
/// The cache is allocated once. A model with a longest sequence (learned positions) slides its window when that is
/// full: the last half of the text is encoded again from position 0, and [`n_slides`](Self::n_slides) counts it.
/// The iterator ends after `max_new_tokens`, or after an error.
pub struct Generator<'a, M: CachedModel> {
    model: &'a M,
    device: Device,
    cache: M::Cache,
    capacity: usize,
    /// Positions in the cache.
    n_cached: usize,
    /// Tokens at the end of the text that the cache does not hold yet.
    n_pending: usize,
    text: Vec<u32>,
    sampler: Sampler,
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
        if prompt.is_empty() {
            return Err(GenerationError::EmptyPrompt);
        }
        let whole = prompt.len().saturating_add(max_new_tokens);
        let capacity = model
            .max_seq_length()
            .map_or(whole, |longest| whole.min(longest));
        Ok(Self {
            model,
            device: device.clone(),
            cache: model.new_cache(capacity),
            capacity,
            n_cached: 0,
            n_pending: prompt.len(),
            text: prompt.to_vec(),
            sampler: Sampler::new(sampling)?,
            n_remaining: max_new_tokens,
            n_slides: 0,
        })
    }

    /// How often the window slid so far.
    pub fn n_slides(&self) -> usize {
        self.n_slides
    }

    /// The prompt and all tokens so far.
    pub fn text(&self) -> &[u32] {
        &self.text
    }

    /// Scores of the token after the text so far.
    fn logits(&mut self) -> Vec<f32> {
        if self.n_cached + self.n_pending > self.capacity {
            self.cache = self.model.new_cache(self.capacity);
            self.n_cached = 0;
            self.n_pending = (self.capacity / 2).max(1);
            self.n_slides += 1;
        }
        let new = &self.text[self.text.len() - self.n_pending..];
        let tokens: Vec<i64> = new.iter().map(|token| i64::from(*token)).collect();
        let tokens = TensorData::new(tokens, [1, self.n_pending]);
        let tokens = Tensor::<2, Int>::from_data(tokens, &self.device);
        let logits = self.model.forward_cached(tokens, &mut self.cache);
        self.n_cached += self.n_pending;
        self.n_pending = 0;
        let [_, length, _] = logits.dims();
        logits
            .slice(s![0..1, length - 1..length, ..])
            .into_data()
            .iter::<f32>()
            .collect()
    }
}

impl<M: CachedModel> Iterator for Generator<'_, M> {
    type Item = Result<u32, GenerationError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.n_remaining = self.n_remaining.checked_sub(1)?;
        let logits = self.logits();
        match self.sampler.sample(&logits, &self.text) {
            Ok(token) => {
                self.text.push(token);
                self.n_pending = 1;
                Some(Ok(token))
            }
            Err(error) => {
                self.n_remaining = 0;
                Some(Err(error.into()))
            }
        }
    }
}
