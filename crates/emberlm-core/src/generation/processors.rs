//! Changing the scores of the next token before one is chosen.

use std::collections::BTreeSet;

use super::{rows::check, sampling::penalised};
use crate::{InvalidConfig, InvalidSampling, SampleError, Sampler};

/// Changes the scores of the next token before one is chosen. Sampling passes logits, beam search log-probabilities, as
/// Hugging Face transformers does. A token is ruled out by `-inf`.
///
/// Any closure over the tokens so far and the scores is one:
///
/// ```
/// use emberlm_core::{LogitProcessor, LogitProcessors, NoRepeatNGram};
///
/// let likes_seven = |_: &[u32], scores: &mut [f32]| scores[7] += 1.0;
/// let mut processors = LogitProcessors::new()
///     .with(likes_seven)
///     .with(NoRepeatNGram::new(2)?);
/// let mut scores = [0.0; 8];
/// processors.process(&[3, 5, 3], 1, &mut scores);
/// assert_eq!((scores[7], scores[5]), (1.0, f32::NEG_INFINITY));
/// # Ok::<(), emberlm_core::InvalidConfig>(())
/// ```
pub trait LogitProcessor {
    /// Changes `scores`, one for each token of the vocabulary. `text` is the prompt, `n_prompt` tokens, and all that
    /// follows it so far.
    fn process(&mut self, text: &[u32], n_prompt: usize, scores: &mut [f32]);
}

impl<F: FnMut(&[u32], &mut [f32])> LogitProcessor for F {
    fn process(&mut self, text: &[u32], _n_prompt: usize, scores: &mut [f32]) {
        self(text, scores);
    }
}

/// Processors that run one after the other.
#[derive(Default)]
pub struct LogitProcessors<'a>(Vec<Box<dyn LogitProcessor + 'a>>);

impl<'a> LogitProcessors<'a> {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one that runs after the others.
    pub fn with(mut self, processor: impl LogitProcessor + 'a) -> Self {
        self.0.push(Box::new(processor));
        self
    }

    /// Runs on scores in double precision, which stay as they are where there is no processor.
    pub(super) fn process_f64(
        &mut self,
        text: &[u32],
        n_prompt: usize,
        scores: &mut Vec<f64>,
    ) -> Result<(), SampleError> {
        if self.0.is_empty() {
            return Ok(());
        }
        let mut rounded: Vec<f32> = scores.iter().map(|score| *score as f32).collect();
        self.process(text, n_prompt, &mut rounded);
        *scores = rounded.into_iter().map(f64::from).collect();
        check(scores)
    }
}

impl LogitProcessor for LogitProcessors<'_> {
    fn process(&mut self, text: &[u32], n_prompt: usize, scores: &mut [f32]) {
        for processor in &mut self.0 {
            processor.process(text, n_prompt, scores);
        }
    }
}

/// Leaves the tokens that the sampler could draw, each with the logarithm of its probability there: all that a
/// [`SamplingConfig`](crate::SamplingConfig) says, as one processor. Nothing is drawn.
///
/// Scores that the sampler refuses stay as they are, for whoever chooses from them to refuse.
impl LogitProcessor for Sampler {
    fn process(&mut self, text: &[u32], _n_prompt: usize, scores: &mut [f32]) {
        if let Ok(distribution) = self.distribution(scores, text) {
            for (score, probability) in scores.iter_mut().zip(distribution) {
                *score = probability.ln() as f32;
            }
        }
    }
}

/// Rules out tokens that would repeat `n` tokens in a row (Paulus et al. 2017, <https://arxiv.org/abs/1705.04304>).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRepeatNGram {
    n: usize,
}

impl NoRepeatNGram {
    /// Runs of `n` tokens, prompt included, occur once. With 1 no token occurs twice.
    ///
    /// # Errors
    ///
    /// If `n` is 0.
    pub fn new(n: usize) -> Result<Self, InvalidConfig> {
        InvalidConfig::require_positive(&[("no_repeat_n_gram", n)])?;
        Ok(Self { n })
    }
}

impl LogitProcessor for NoRepeatNGram {
    fn process(&mut self, text: &[u32], _n_prompt: usize, scores: &mut [f32]) {
        let Some(begin) = (text.len() + 1).checked_sub(self.n) else {
            return;
        };
        let last = &text[begin..];
        for run in text.windows(self.n) {
            if let Some((token, before)) = run.split_last()
                && before == last
            {
                rule_out(*token, scores);
            }
        }
    }
}

/// Rules out the end tokens until there are `n` tokens after the prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MinimumNewTokens {
    /// The fewest tokens after the prompt, the end token not counted.
    pub n: usize,
    /// The tokens that end a text.
    pub end_tokens: Vec<u32>,
}

impl LogitProcessor for MinimumNewTokens {
    fn process(&mut self, text: &[u32], n_prompt: usize, scores: &mut [f32]) {
        if text.len() - n_prompt < self.n {
            self.end_tokens
                .iter()
                .for_each(|end| rule_out(*end, scores));
        }
    }
}

/// Rules out some tokens everywhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ForbiddenTokens(pub Vec<u32>);

impl LogitProcessor for ForbiddenTokens {
    fn process(&mut self, _text: &[u32], _n_prompt: usize, scores: &mut [f32]) {
        self.0.iter().for_each(|token| rule_out(*token, scores));
    }
}

/// Makes this the first token after the prompt, at no cost: its score is 0, all others are ruled out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForcedFirstToken(pub u32);

impl LogitProcessor for ForcedFirstToken {
    fn process(&mut self, text: &[u32], n_prompt: usize, scores: &mut [f32]) {
        if text.len() == n_prompt {
            scores.fill(f32::NEG_INFINITY);
            if let Some(score) = scores.get_mut(self.0 as usize) {
                *score = 0.0;
            }
        }
    }
}

/// Divides positive scores of the tokens so far by a penalty and multiplies the others by it, as
/// [`SamplingConfig::repetition_penalty`](crate::SamplingConfig::repetition_penalty).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RepetitionPenalty {
    penalty: f64,
}

impl RepetitionPenalty {
    /// Above 1 discourages repetition.
    ///
    /// # Errors
    ///
    /// A penalty that is not positive and finite.
    pub fn new(penalty: f64) -> Result<Self, InvalidSampling> {
        match penalty.is_finite() && penalty > 0.0 {
            true => Ok(Self { penalty }),
            false => Err(InvalidSampling::RepetitionPenalty { value: penalty }),
        }
    }
}

impl LogitProcessor for RepetitionPenalty {
    fn process(&mut self, text: &[u32], _n_prompt: usize, scores: &mut [f32]) {
        for token in text.iter().collect::<BTreeSet<_>>() {
            if let Some(score) = scores.get_mut(*token as usize)
                && *score > f32::NEG_INFINITY
            {
                let new = penalised(f64::from(*score), self.penalty) as f32;
                *score = new.clamp(f32::MIN, f32::MAX);
            }
        }
    }
}

/// Tokens beyond the vocabulary cannot be chosen anyway.
fn rule_out(token: u32, scores: &mut [f32]) {
    if let Some(score) = scores.get_mut(token as usize) {
        *score = f32::NEG_INFINITY;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SamplingConfig;

    const OUT: f32 = f32::NEG_INFINITY;

    fn processed(mut processor: impl LogitProcessor, text: &[u32], n_prompt: usize) -> [f32; 4] {
        let mut scores = [0.5, -1.0, 2.0, OUT];
        processor.process(text, n_prompt, &mut scores);
        scores
    }

    #[test]
    fn runs_that_were_there_are_ruled_out() {
        let of = |n, text: &[u32]| processed(NoRepeatNGram::new(n).unwrap(), text, 0);
        assert_eq!(of(1, &[]), [0.5, -1.0, 2.0, OUT]);
        assert_eq!(of(1, &[0, 2]), [OUT, -1.0, OUT, OUT]);
        assert_eq!(of(2, &[1, 2, 0, 1]), [0.5, -1.0, OUT, OUT]);
        assert_eq!(of(2, &[0]), [0.5, -1.0, 2.0, OUT]);
        assert_eq!(of(3, &[1, 2, 0, 1, 2]), [OUT, -1.0, 2.0, OUT]);
        assert_eq!(of(3, &[2, 0, 1, 2]), [0.5, -1.0, 2.0, OUT]);
        // Runs may overlap.
        assert_eq!(of(3, &[1, 1, 1]), [0.5, OUT, 2.0, OUT]);
        assert_eq!(of(4, &[1, 2]), [0.5, -1.0, 2.0, OUT]);
        NoRepeatNGram::new(0).unwrap_err();
    }

    #[test]
    fn the_end_has_to_wait() {
        let minimum = MinimumNewTokens {
            n: 2,
            end_tokens: vec![0, 2, 9],
        };
        assert_eq!(
            processed(minimum.clone(), &[1, 1, 1], 2),
            [OUT, -1.0, OUT, OUT]
        );
        assert_eq!(processed(minimum, &[1, 1, 1, 1], 2), [0.5, -1.0, 2.0, OUT]);
    }

    #[test]
    fn tokens_are_forbidden_everywhere_and_forced_at_first() {
        let forbidden = ForbiddenTokens(vec![1, 9]);
        assert_eq!(processed(forbidden, &[], 0), [0.5, OUT, 2.0, OUT]);
        assert_eq!(
            processed(ForcedFirstToken(3), &[1], 1),
            [OUT, OUT, OUT, 0.0]
        );
        assert_eq!(
            processed(ForcedFirstToken(3), &[1, 3], 1),
            [0.5, -1.0, 2.0, OUT]
        );
    }

    #[test]
    fn repeated_tokens_are_penalised_once() {
        let penalty = RepetitionPenalty::new(2.0).unwrap();
        assert_eq!(
            processed(penalty, &[1, 1, 2, 3, 9], 0),
            [0.5, -2.0, 1.0, OUT]
        );
        let largest = RepetitionPenalty::new(f64::MAX).unwrap();
        assert_eq!(processed(largest, &[1], 0)[1], f32::MIN);
        assert!(RepetitionPenalty::new(0.0).is_err() && RepetitionPenalty::new(f64::NAN).is_err());
    }

    #[test]
    fn a_sampler_leaves_what_it_could_draw() {
        let sampler = Sampler::new(SamplingConfig::new().with_top_k(Some(2))).unwrap();
        let scores = processed(sampler, &[], 0);
        assert_eq!([scores[1], scores[3]], [OUT, OUT]);
        // The softmax of 0.5 and 2.
        let p = 1.0 / (1.0 + 1.5_f32.exp());
        assert!((scores[0] - p.ln()).abs() < 1e-6 && (scores[2] - (1.0 - p).ln()).abs() < 1e-6);
    }

    #[test]
    fn processors_run_in_order() {
        let both = LogitProcessors::new()
            .with(|_: &[u32], scores: &mut [f32]| scores[0] += 1.0)
            .with(|text: &[u32], scores: &mut [f32]| scores[0] *= text.len() as f32);
        assert_eq!(processed(both, &[1, 1], 0)[0], 3.0);
    }
}
