//! A text that is being written by sampling.

use super::{LogitProcessor, LogitProcessors, rows::log_sum_exp};
use crate::{SampleError, Sampler};

/// A prompt and what was drawn after it.
pub(super) struct Text {
    pub(super) tokens: Vec<u32>,
    pub(super) n_prompt: usize,
    /// Of each token after the prompt.
    pub(super) log_probabilities: Vec<f64>,
    sampler: Sampler,
}

impl Text {
    pub(super) fn new(prompt: &[u32], sampler: Sampler) -> Self {
        Self {
            tokens: prompt.to_vec(),
            n_prompt: prompt.len(),
            log_probabilities: Vec::new(),
            sampler,
        }
    }

    /// Draws a token from the model's scores, once the processors have changed them.
    pub(super) fn draw(
        &mut self,
        scores: &[f64],
        processors: &mut LogitProcessors<'_>,
    ) -> Result<u32, SampleError> {
        let mut logits: Vec<f32> = scores.iter().map(|score| *score as f32).collect();
        processors.process(&self.tokens, self.n_prompt, &mut logits);
        let token = self.sampler.sample(&logits, &self.tokens)?;
        self.tokens.push(token);
        self.log_probabilities
            .push(scores[token as usize] - log_sum_exp(scores));
        Ok(token)
    }
}
