//! Generation of many texts at once.

use burn::tensor::Device;

use super::{
    LogitProcessors,
    rows::{Rows, longest, positions_for},
    text::Text,
};
use crate::{CachedModel, GenerationError, Sampler, SamplingConfig};

/// Writes after many prompts, of any lengths, with one pass of the model a token.
///
/// Row `i` is what [`Generator`](crate::Generator) writes after its prompt with the seed `sampling.seed + i`, up to
/// rounding; but a text ends at an end token, and there is no sliding window. Shorter prompts are padded on the left,
/// so the model's pattern must not depend on absolute positions where lengths differ; rows that have ended leave the
/// batch.
pub struct BatchGenerator<'a, M: CachedModel> {
    rows: Rows<'a, M>,
    texts: Vec<Text>,
    max_new_tokens: usize,
    end_tokens: Vec<u32>,
    processors: LogitProcessors<'a>,
}

/// What was written after a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Generated {
    /// The tokens after the prompt, the end token included.
    pub tokens: Vec<u32>,
    /// The natural logarithm of the probability of each of them, as the model has it: before processors, temperature
    /// and filters.
    pub log_probabilities: Vec<f64>,
}

impl<'a, M: CachedModel> BatchGenerator<'a, M> {
    /// Prepares to continue `prompts`.
    ///
    /// # Errors
    ///
    /// An empty prompt, too few positions for the longest one and the new tokens, or invalid sampling options.
    pub fn new<P: AsRef<[u32]>>(
        model: &'a M,
        prompts: &[P],
        max_new_tokens: usize,
        sampling: SamplingConfig,
        device: &Device,
    ) -> Result<Self, GenerationError> {
        let capacity = positions_for(model, longest(prompts)?, max_new_tokens)?;
        let cache = model.new_cache(capacity);
        Self::from_cache(model, cache, prompts, max_new_tokens, sampling, device)
    }

    /// As [`new`](Self::new), with a cache that holds no token, but perhaps a source for each prompt. It has room for
    /// the longest prompt and all new tokens but the last.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn from_cache<P: AsRef<[u32]>>(
        model: &'a M,
        cache: M::Cache,
        prompts: &[P],
        max_new_tokens: usize,
        sampling: SamplingConfig,
        device: &Device,
    ) -> Result<Self, GenerationError> {
        positions_for(model, longest(prompts)?, max_new_tokens)?;
        let seed = sampling.seed;
        let texts = (0..).zip(prompts).map(|(i, prompt)| {
            let sampling = sampling.clone().with_seed(seed.wrapping_add(i));
            Ok(Text::new(prompt.as_ref(), Sampler::new(sampling)?))
        });
        Ok(Self {
            rows: Rows::new(model, cache, device),
            texts: texts.collect::<Result<_, GenerationError>>()?,
            max_new_tokens,
            end_tokens: Vec::new(),
            processors: LogitProcessors::new(),
        })
    }

    /// Ends a text at any of these tokens. Without them every text has `max_new_tokens`.
    pub fn with_end_tokens(mut self, end_tokens: Vec<u32>) -> Self {
        self.end_tokens = end_tokens;
        self
    }

    /// Changes the scores before each draw.
    pub fn with_processors(mut self, processors: LogitProcessors<'a>) -> Self {
        self.processors = processors;
        self
    }

    /// Writes the texts, in the order of the prompts.
    ///
    /// # Errors
    ///
    /// Scores that cannot be drawn from.
    ///
    /// # Panics
    ///
    /// If the cache has another number of rows than there are prompts, or prompts differ in length and the model's
    /// pattern depends on absolute positions.
    pub fn run(mut self) -> Result<Vec<Generated>, GenerationError> {
        if self.texts.is_empty() {
            return Ok(Vec::new());
        }
        let mut running: Vec<usize> = (0..self.texts.len()).collect();
        for n_new in 0..self.max_new_tokens {
            let scores = if n_new == 0 {
                let prompts: Vec<&[u32]> = self.texts.iter().map(|text| &text.tokens[..]).collect();
                self.rows.begin(&prompts)
            } else {
                let last = running.iter().map(|i| self.texts[*i].tokens.last());
                let last: Option<Vec<u32>> = last.map(Option::<&u32>::copied).collect();
                self.rows.step(&last.expect("a text has a prompt"))
            };
            let mut rows = Vec::new();
            for (row, i) in running.iter().enumerate() {
                let token = self.texts[*i].draw(scores.row(row)?, &mut self.processors)?;
                if !self.end_tokens.contains(&token) {
                    rows.push(row);
                }
            }
            if rows.is_empty() {
                break;
            }
            running = rows.iter().map(|row| running[*row]).collect();
            self.rows.select(&rows);
        }
        let generated = self.texts.into_iter().map(|mut text| Generated {
            tokens: text.tokens.split_off(text.n_prompt),
            log_probabilities: text.log_probabilities,
        });
        Ok(generated.collect())
    }
}
