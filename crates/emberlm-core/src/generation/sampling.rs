//! Choosing the next token: logits become a filtered distribution, and one token is drawn from it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use serde::{Deserialize, Serialize};

use crate::random::RandomKey;

/// How the next token is chosen. The default draws from the unfiltered softmax with seed 0.
///
/// The steps and their order are those of Hugging Face transformers: repetition penalty,
/// temperature, top-k, top-p, min-p; the probabilities are renormalised after each filter. Two
/// things differ. Temperature 0 is greedy decoding. And ties are broken by the index, so top-k
/// keeps exactly `k` tokens where transformers keeps all that equal the last one.
///
/// A field that is missing in a serialised configuration takes its default; an unknown one is an
/// error, since a misspelt filter would otherwise be silently off.
///
/// ```
/// use emberlm_core::SamplingConfig;
///
/// let config = SamplingConfig::new().with_temperature(0.8).with_top_p(Some(0.95));
/// assert!(config.validate().is_ok());
/// assert_eq!(
///     config.with_top_k(Some(0)).validate().unwrap_err().to_string(),
///     "top_k is 0, but must be at least 1: leave it out to keep all tokens",
/// );
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingConfig {
    /// Divides the logits: below 1 sharpens the distribution, above 1 flattens it. At least 0;
    /// 0 always takes the token of the largest logit. Default: 1.
    pub temperature: f64,
    /// Keeps this many of the most probable tokens, at least 1. Default: all.
    pub top_k: Option<usize>,
    /// Keeps the fewest most probable tokens whose probabilities sum to at least this, in `(0, 1]`,
    /// and always one token (nucleus sampling, <https://arxiv.org/abs/1904.09751>). Default: all.
    pub top_p: Option<f64>,
    /// Keeps the tokens at least this fraction, in `[0, 1]`, as probable as the most probable one
    /// (<https://arxiv.org/abs/2407.01082>). Default: all.
    pub min_p: Option<f64>,
    /// Divides the logits of tokens in the context where they are positive and multiplies them
    /// where they are not, once a token (CTRL, <https://arxiv.org/abs/1909.05858>; the case of
    /// negative logits is from transformers). Above 0; over 1 discourages repetition. Default: 1,
    /// off.
    pub repetition_penalty: f64,
    /// The seed of the draws. Default: 0.
    pub seed: u64,
}

/// A field of a [`SamplingConfig`] that is out of its range.
///
/// ```
/// use emberlm_core::{InvalidSampling, SamplingConfig};
///
/// let error = SamplingConfig::new().with_temperature(-1.0).validate();
/// assert_eq!(error, Err(InvalidSampling::Temperature { value: -1.0 }));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidSampling {
    /// The temperature is negative, infinite or not a number.
    #[error(
        "temperature is {value}, but must be finite and at least 0: use 0 for greedy decoding, 1 for the distribution of the model"
    )]
    Temperature {
        /// The temperature found.
        value: f64,
    },
    /// Top-k keeps no token.
    #[error("top_k is {value}, but must be at least 1: leave it out to keep all tokens")]
    TopK {
        /// The number of tokens found.
        value: usize,
    },
    /// The mass of top-p is not in `(0, 1]`.
    #[error("top_p is {value}, but must be above 0 and at most 1: leave it out to keep all tokens")]
    TopP {
        /// The mass found.
        value: f64,
    },
    /// The fraction of min-p is not in `[0, 1]`.
    #[error("min_p is {value}, but must be from 0 to 1: leave it out to keep all tokens")]
    MinP {
        /// The fraction found.
        value: f64,
    },
    /// The repetition penalty is not positive, infinite or not a number.
    #[error("repetition_penalty is {value}, but must be finite and above 0: use 1 for no penalty")]
    RepetitionPenalty {
        /// The penalty found.
        value: f64,
    },
}

impl Default for SamplingConfig {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingConfig {
    /// The default configuration: the unfiltered softmax, seed 0.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets [`temperature`](Self::temperature).
    pub fn with_temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// Sets [`top_k`](Self::top_k).
    pub fn with_top_k(mut self, top_k: Option<usize>) -> Self {
        self.top_k = top_k;
        self
    }

    /// Sets [`top_p`](Self::top_p).
    pub fn with_top_p(mut self, top_p: Option<f64>) -> Self {
        self.top_p = top_p;
        self
    }

    /// Sets [`min_p`](Self::min_p).
    pub fn with_min_p(mut self, min_p: Option<f64>) -> Self {
        self.min_p = min_p;
        self
    }

    /// Sets [`repetition_penalty`](Self::repetition_penalty).
    pub fn with_repetition_penalty(mut self, repetition_penalty: f64) -> Self {
        self.repetition_penalty = repetition_penalty;
        self
    }

    /// Sets [`seed`](Self::seed).
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Checks that every field is in its range.
    ///
    /// # Errors
    ///
    /// The first field, in the order of the struct, that is not.
    pub fn validate(&self) -> Result<(), InvalidSampling> {
        let value = self.temperature;
        if !(value.is_finite() && value >= 0.0) {
            return Err(InvalidSampling::Temperature { value });
        }
        if let Some(value @ 0) = self.top_k {
            return Err(InvalidSampling::TopK { value });
        }
        if let Some(value) = self.top_p
            && !(value > 0.0 && value <= 1.0)
        {
            return Err(InvalidSampling::TopP { value });
        }
        if let Some(value) = self.min_p
            && !(0.0..=1.0).contains(&value)
        {
            return Err(InvalidSampling::MinP { value });
        }
        let value = self.repetition_penalty;
        if !(value.is_finite() && value > 0.0) {
            return Err(InvalidSampling::RepetitionPenalty { value });
        }
        Ok(())
    }
}

/// Draws tokens as a [`SamplingConfig`] says, each call one draw.
///
/// Draw `n`, counted from 0, takes the first token at which the running sum of
/// [`distribution`](Self::distribution) exceeds `RandomKey::new(seed).uniform(n)` times the whole
/// sum. A seed therefore fixes the text, and a copy of the sampler continues as the original does.
///
/// ```
/// use emberlm_core::{Sampler, SamplingConfig};
///
/// let config = SamplingConfig::new().with_top_k(Some(2)).with_seed(7);
/// let mut sampler = Sampler::new(config)?;
/// let logits = [0.5, 3.0, -1.0, 2.0];
/// let mut context = vec![0];
/// for _ in 0..10 {
///     let token = sampler.sample(&logits, &context)?;
///     assert!(token == 1 || token == 3);
///     context.push(token);
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sampler {
    config: SamplingConfig,
    key: RandomKey,
    n_draws: u64,
}

/// Logits or a context from which no token can be drawn.
///
/// ```
/// use emberlm_core::{SampleError, Sampler, SamplingConfig};
///
/// let mut sampler = Sampler::new(SamplingConfig::new())?;
/// let error = sampler.sample(&[0.0, f32::NAN], &[]).unwrap_err();
/// assert!(matches!(error, SampleError::Logit { token: 1, .. }));
/// # Ok::<(), emberlm_core::InvalidSampling>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// A logit is not a number, or positive infinity.
    #[error(
        "the logit of token {token} is {value}, but must be finite or -inf: look for diverged weights or an overflow in the model"
    )]
    Logit {
        /// The index of the logit.
        token: usize,
        /// The logit.
        value: f32,
    },
    /// All logits are `-inf`, or there are none.
    #[error("none of the {vocab_size} logits is above -inf: leave at least one token unmasked")]
    NoCandidate {
        /// The number of logits.
        vocab_size: usize,
    },
    /// The context holds a token that has no logit.
    #[error(
        "the context holds token {token} at position {position}, but there are {vocab_size} logits: encode it with the tokenizer of the model"
    )]
    ContextToken {
        /// The index in the context.
        position: usize,
        /// The token.
        token: u32,
        /// The number of logits.
        vocab_size: usize,
    },
}

impl Sampler {
    /// A sampler before its first draw.
    ///
    /// # Errors
    ///
    /// If the configuration is invalid: what [`SamplingConfig::validate`] returns.
    pub fn new(config: SamplingConfig) -> Result<Self, InvalidSampling> {
        config.validate()?;
        let key = RandomKey::new(config.seed);
        Ok(Self {
            config,
            key,
            n_draws: 0,
        })
    }

    /// Draws the next token: an index into `logits`.
    ///
    /// `logits` holds one number for each token of the vocabulary; a token at `-inf` is never
    /// drawn. `context` holds the tokens subject to the repetition penalty, usually the prompt and
    /// all tokens drawn so far; without a penalty it changes nothing. Greedy decoding takes the
    /// lowest of several equal indices.
    ///
    /// # Errors
    ///
    /// If a logit is NaN or `+inf`, none is above `-inf`, or a token of the context has no logit for the penalty.
    /// A failed call is not a draw: the next one takes its number.
    pub fn sample(&mut self, logits: &[f32], context: &[u32]) -> Result<u32, SampleError> {
        let distribution = self.distribution(logits, context)?;
        let uniform = self.key.uniform(self.n_draws);
        self.n_draws += 1;
        Ok(draw(&distribution, uniform) as u32)
    }

    /// The probabilities that [`sample`](Self::sample) draws from, one for each logit.
    ///
    /// They sum to 1 up to rounding; filtered tokens have exactly 0. Greedy decoding has a single 1.
    ///
    /// # Errors
    ///
    /// As [`sample`](Self::sample).
    pub fn distribution(&self, logits: &[f32], context: &[u32]) -> Result<Vec<f64>, SampleError> {
        let scores = self.penalised(logits, context)?;
        let best = most_probable(&scores);
        let mut probabilities = vec![0.0; scores.len()];
        let temperature = self.config.temperature;
        if temperature == 0.0 {
            probabilities[best] = 1.0;
            return Ok(probabilities);
        }

        // Below, `probabilities` are unnormalised, with 1 for the most probable token: subtracting
        // before dividing keeps a tiny temperature from overflowing.
        for (probability, score) in probabilities.iter_mut().zip(&scores) {
            *probability = ((score - scores[best]) / temperature).exp();
        }
        let mass_of = |tokens: &[usize]| tokens.iter().map(|&t| probabilities[t]).sum::<f64>();

        let mut kept: Vec<usize> = (0..scores.len()).collect();
        if let Some(top_k) = self.config.top_k {
            kept = ranked(&kept, &scores).take(top_k).collect();
        }
        // A mass of 1 is all tokens, also where rounding has the largest ones reach it alone.
        if let Some(top_p) = self.config.top_p
            && top_p < 1.0
        {
            let enough = top_p * mass_of(&kept);
            let mut mass = 0.0;
            kept = ranked(&kept, &scores)
                .take_while(|&token| {
                    let wanted = mass < enough;
                    mass += probabilities[token];
                    wanted
                })
                .collect();
        }
        if let Some(min_p) = self.config.min_p {
            kept.retain(|&token| probabilities[token] >= min_p);
        }

        let mass = mass_of(&kept);
        let mut filtered = vec![0.0; scores.len()];
        for token in kept {
            filtered[token] = probabilities[token] / mass;
        }
        Ok(filtered)
    }

    /// The logits after the repetition penalty, each finite or `-inf`, with at least one finite.
    fn penalised(&self, logits: &[f32], context: &[u32]) -> Result<Vec<f64>, SampleError> {
        let vocab_size = logits.len();
        let unusable = |logit: &f32| logit.is_nan() || *logit == f32::INFINITY;
        if let Some(token) = logits.iter().position(unusable) {
            let value = logits[token];
            return Err(SampleError::Logit { token, value });
        }
        if logits.iter().all(|&logit| logit == f32::NEG_INFINITY) {
            return Err(SampleError::NoCandidate { vocab_size });
        }

        let penalty = self.config.repetition_penalty;
        let mut scores: Vec<f64> = logits.iter().copied().map(f64::from).collect();
        if penalty == 1.0 {
            // A text without an end is not read again at every token.
            return Ok(scores);
        }
        for (position, &token) in context.iter().enumerate() {
            // From the logit, not the score: a repeated token is penalised once.
            let Some(&logit) = logits.get(token as usize) else {
                return Err(SampleError::ContextToken {
                    position,
                    token,
                    vocab_size,
                });
            };
            if logit > f32::NEG_INFINITY {
                let score = penalised(f64::from(logit), penalty);
                // An extreme penalty overflows, but infinity means masked.
                scores[token as usize] = score.clamp(f64::MIN, f64::MAX);
            }
        }
        Ok(scores)
    }
}

/// The repetition penalty of one logit.
pub(super) fn penalised(logit: f64, penalty: f64) -> f64 {
    match logit > 0.0 {
        true => logit / penalty,
        false => logit * penalty,
    }
}

/// The first token at which the running sum exceeds `uniform`, in `[0, 1)`, times the whole sum.
fn draw(distribution: &[f64], uniform: f64) -> usize {
    // Summed in the order of the walk below: its last partial sum is then this very number, and a
    // multiple of 2^-53 below 1, times it and rounded, is still below it.
    let threshold = uniform * distribution.iter().sum::<f64>();
    let mut mass = 0.0;
    let token = distribution.iter().position(|probability| {
        mass += probability;
        mass > threshold
    });
    token.expect("the whole sum is above the threshold")
}

/// The lowest index among the largest scores.
fn most_probable(scores: &[f64]) -> usize {
    (1..scores.len()).fold(0, |best, token| {
        if scores[token] > scores[best] {
            token
        } else {
            best
        }
    })
}

/// `tokens` by falling score, lower indices first among equal ones.
///
/// Lazy, for a vocabulary is long and the filters stop early: `n` steps to begin, `log n` a token.
fn ranked(tokens: &[usize], scores: &[f64]) -> impl Iterator<Item = usize> {
    let mut heap: BinaryHeap<_> = tokens
        .iter()
        .map(|&token| (order(scores[token]), Reverse(token)))
        .collect();
    std::iter::from_fn(move || heap.pop().map(|(_, Reverse(token))| token))
}

/// An integer that orders as the number does, which must not be NaN; both zeros are equal.
pub(super) fn order(number: f64) -> u64 {
    let bits = (number + 0.0).to_bits(); // -0.0 + 0.0 is 0.0
    let sign = 1 << 63;
    // Numbers of one sign order as their bits; negative ones backwards, and below the others.
    if bits & sign == 0 { bits | sign } else { !bits }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const NEG_INF: f32 = f32::NEG_INFINITY;

    fn distribution(config: &SamplingConfig, logits: &[f32], context: &[u32]) -> Vec<f64> {
        Sampler::new(config.clone())
            .unwrap()
            .distribution(logits, context)
            .unwrap()
    }

    fn assert_close(got: &[f64], expected: &[f64]) {
        assert_eq!(got.len(), expected.len());
        for (token, (got, expected)) in got.iter().zip(expected).enumerate() {
            // Filtered in one must be filtered in the other, however small the probability.
            assert_eq!(
                *got == 0.0,
                *expected == 0.0,
                "token {token}: {got}, {expected}"
            );
            assert!(
                (got - expected).abs() < 1e-12,
                "token {token}: {got}, {expected}"
            );
        }
    }

    fn softmax(scores: &[f64]) -> Vec<f64> {
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter().map(|w| w / sum).collect()
    }

    /// The definition, one stage after the other, each a full softmax and quadratic where that is
    /// plainer. `None` where rounding decides which token is the last one kept.
    fn by_definition(config: &SamplingConfig, logits: &[f32], context: &[u32]) -> Option<Vec<f64>> {
        let mut scores: Vec<f64> = logits.iter().copied().map(f64::from).collect();
        for (token, score) in scores.iter_mut().enumerate() {
            if context.contains(&(token as u32)) {
                *score = if *score > 0.0 {
                    *score / config.repetition_penalty
                } else {
                    *score * config.repetition_penalty
                };
            }
        }
        // How many tokens come before this one.
        let rank = |token: usize, scores: &[f64]| {
            let before = |&other: &usize| {
                scores[other] > scores[token] || (scores[other] == scores[token] && other < token)
            };
            (0..scores.len()).filter(before).count()
        };
        if config.temperature == 0.0 {
            let one_hot = |token| f64::from(rank(token, &scores) == 0);
            return Some((0..scores.len()).map(one_hot).collect());
        }
        scores.iter_mut().for_each(|s| *s /= config.temperature);
        if let Some(top_k) = config.top_k {
            let before = scores.clone();
            for (token, score) in scores.iter_mut().enumerate() {
                if rank(token, &before) >= top_k {
                    *score = f64::NEG_INFINITY;
                }
            }
        }
        if let Some(top_p) = config.top_p {
            let (before, p) = (scores.clone(), softmax(&scores));
            for (token, score) in scores.iter_mut().enumerate() {
                // Kept while the tokens before it do not reach the mass.
                let rank_of_token = rank(token, &before);
                let mass: f64 = (0..p.len())
                    .filter(|&other| rank(other, &before) < rank_of_token)
                    .map(|other| p[other])
                    .sum();
                if top_p < 1.0 && (mass - top_p).abs() < 1e-9 {
                    return None;
                }
                if top_p < 1.0 && mass >= top_p {
                    *score = f64::NEG_INFINITY;
                }
            }
        }
        if let Some(min_p) = config.min_p {
            let p = softmax(&scores);
            let largest = p.iter().copied().fold(0.0, f64::max);
            for (score, p) in scores.iter_mut().zip(p) {
                if p < largest && (p - min_p * largest).abs() < 1e-9 * p {
                    return None;
                }
                if p < min_p * largest {
                    *score = f64::NEG_INFINITY;
                }
            }
        }
        Some(softmax(&scores))
    }

    prop_compose! {
        fn any_config()(
            temperature in prop_oneof![Just(0.0), Just(1.0), 0.1..4.0],
            top_k in prop::option::of(1_usize..12),
            top_p in prop::option::of(prop_oneof![Just(1.0), 0.001..1.0]),
            min_p in prop::option::of(prop_oneof![Just(0.0), Just(1.0), 0.001..1.0]),
            repetition_penalty in prop_oneof![Just(1.0), 0.5..2.0],
            seed in any::<u64>(),
        ) -> SamplingConfig {
            SamplingConfig { temperature, top_k, top_p, min_p, repetition_penalty, seed }
        }
    }

    /// Logits with many ties and some masks, a context with repeats.
    fn any_step() -> impl Strategy<Value = (Vec<f32>, Vec<u32>)> {
        let logit = prop_oneof![
            4 => -6.0_f32..6.0,
            4 => (-3_i8..=3).prop_map(f32::from),
            1 => Just(-0.0_f32),
            1 => Just(NEG_INF),
        ];
        prop::collection::vec(logit, 1..10)
            .prop_filter("no candidate", |logits| logits.iter().any(|&l| l > NEG_INF))
            .prop_flat_map(|logits| {
                let token = 0..logits.len() as u32;
                (Just(logits), prop::collection::vec(token, 0..6))
            })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn distribution_is_the_definition(config in any_config(), (logits, context) in any_step()) {
            let expected = by_definition(&config, &logits, &context);
            prop_assume!(expected.is_some());
            assert_close(&distribution(&config, &logits, &context), &expected.unwrap());
        }

        #[test]
        fn draw_n_inverts_the_distribution_at_uniform_n(
            config in any_config(),
            (logits, context) in any_step(),
        ) {
            let p = distribution(&config, &logits, &context);
            let mut sampler = Sampler::new(config.clone()).unwrap();
            for n in 0..20 {
                let token = sampler.sample(&logits, &context).unwrap() as usize;
                let uniform = RandomKey::new(config.seed).uniform(n);
                let below: f64 = p[..token].iter().sum();
                prop_assert!(p[token] > 0.0);
                prop_assert!(below - 1e-12 <= uniform && uniform <= below + p[token] + 1e-12);
            }
        }
    }

    #[test]
    fn default_is_the_softmax() {
        let got = distribution(&SamplingConfig::new(), &[0.0, 1.0, -1.0], &[1]);
        let e = 1.0_f64.exp();
        let sum = 1.0 + e + 1.0 / e;
        assert_close(&got, &[1.0 / sum, e / sum, 1.0 / e / sum]);
    }

    #[test]
    fn penalty_divides_positive_and_multiplies_negative_logits_once() {
        let config = SamplingConfig::new().with_repetition_penalty(2.0);
        let got = distribution(&config, &[4.0, -1.0, 3.0, 0.0], &[0, 1, 0, 3, 1]);
        assert_close(&got, &softmax(&[2.0, -2.0, 3.0, 0.0]));
    }

    #[test]
    fn filters_apply_in_order() {
        // Probabilities 0.4, 0.3, 0.2, 0.1. Three tokens are left by top-k, of which the first two
        // hold 7/9, so that top-p 0.75 keeps these two; before top-k it would keep three.
        let logits = [0.1_f32, 0.2, 0.3, 0.4].map(f32::ln);
        let config = SamplingConfig::new()
            .with_top_k(Some(3))
            .with_top_p(Some(0.75));
        let got = distribution(&config, &logits, &[]);
        assert!(
            (got[2] - 3.0 / 7.0).abs() < 1e-6 && got[1] == 0.0,
            "{got:?}"
        );
        // Temperature comes before top-p: squared, the first token has 16/30, the first two 25/30.
        let config = SamplingConfig::new()
            .with_temperature(0.5)
            .with_top_p(Some(0.75));
        let got = distribution(&config, &logits, &[]);
        assert!(
            (got[3] - 16.0 / 25.0).abs() < 1e-6 && got[1] == 0.0,
            "{got:?}"
        );
        // And before min-p: 1/16 is below 0.2 though 1/4 is not.
        let config = SamplingConfig::new().with_min_p(Some(0.2));
        assert!(distribution(&config, &logits, &[])[0] > 0.0);
        let got = distribution(&config.with_temperature(0.5), &logits, &[]);
        assert!(got[0] == 0.0 && got[1] > 0.0, "{got:?}");
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        let logits = [1.0, 2.0, -0.0, 2.0, 2.0];
        let top_k = SamplingConfig::new().with_top_k(Some(2));
        assert_eq!(
            distribution(&top_k, &logits, &[]),
            [0.0, 0.5, 0.0, 0.5, 0.0]
        );
        let top_p = SamplingConfig::new().with_top_p(Some(0.3));
        assert_eq!(
            distribution(&top_p, &logits, &[]),
            [0.0, 0.5, 0.0, 0.5, 0.0]
        );
        let greedy = SamplingConfig::new().with_temperature(0.0);
        assert_eq!(
            distribution(&greedy, &logits, &[]),
            [0.0, 1.0, 0.0, 0.0, 0.0]
        );
        // Zeros of both signs are equal.
        assert_eq!(distribution(&greedy, &[-0.0, 0.0], &[]), [1.0, 0.0]);
        let top_k = SamplingConfig::new().with_top_k(Some(1));
        assert_eq!(distribution(&top_k, &[-0.0, 0.0], &[]), [1.0, 0.0]);
    }

    #[test]
    fn rank_is_that_of_the_logits_where_probabilities_round_to_equal() {
        let config = SamplingConfig::new()
            .with_temperature(1e30)
            .with_top_k(Some(1));
        assert_eq!(
            distribution(&config, &[1.0, 2.0, 1.5], &[]),
            [0.0, 1.0, 0.0]
        );
    }

    #[test]
    fn filters_at_the_ends_of_their_ranges() {
        let logits = [0.0, 50.0, -50.0, 49.0];
        let plain = softmax(&logits.map(f64::from));
        for config in [
            SamplingConfig::new().with_top_k(Some(4)),
            SamplingConfig::new().with_top_k(Some(usize::MAX)),
            SamplingConfig::new().with_top_p(Some(1.0)),
            SamplingConfig::new().with_min_p(Some(0.0)),
        ] {
            assert_close(&distribution(&config, &logits, &[]), &plain);
        }
        for config in [
            SamplingConfig::new().with_top_k(Some(1)),
            SamplingConfig::new().with_top_p(Some(f64::from_bits(1))),
            SamplingConfig::new().with_min_p(Some(1.0)),
            SamplingConfig::new().with_temperature(0.0),
            SamplingConfig::new().with_temperature(f64::from_bits(1)),
        ] {
            assert_eq!(distribution(&config, &logits, &[]), [0.0, 1.0, 0.0, 0.0]);
        }
        // The tail vanishes beside 1 in double precision, and the mass of the first token is 1.
        let almost_one = SamplingConfig::new().with_top_p(Some(1.0 - f64::EPSILON));
        assert_eq!(distribution(&almost_one, &[0.0, 50.0], &[]), [0.0, 1.0]);
    }

    #[test]
    fn extreme_numbers_stay_finite() {
        let logits = [f32::MAX, f32::MIN, 1e-40, NEG_INF];
        for penalty in [f64::from_bits(1), f64::MAX] {
            for temperature in [f64::from_bits(1), 1.0, f64::MAX] {
                let config = SamplingConfig::new()
                    .with_temperature(temperature)
                    .with_repetition_penalty(penalty);
                let got = distribution(&config, &logits, &[0, 1, 2, 3]);
                assert!((got.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{got:?}");
                assert_eq!(got[3], 0.0);
            }
        }
    }

    #[test]
    fn masked_tokens_are_never_drawn() {
        let mut sampler = Sampler::new(SamplingConfig::new().with_temperature(100.0)).unwrap();
        let logits = [NEG_INF, NEG_INF, -1e30, NEG_INF];
        assert!((0..100).all(|_| sampler.sample(&logits, &[0, 2]) == Ok(2)));
    }

    #[test]
    fn vocabulary_of_one() {
        let configs = [
            SamplingConfig::new(),
            SamplingConfig::new().with_temperature(0.0),
            SamplingConfig::new()
                .with_top_k(Some(5))
                .with_top_p(Some(0.1)),
        ];
        for config in configs {
            assert_eq!(Sampler::new(config).unwrap().sample(&[-3.0], &[0]), Ok(0));
        }
    }

    #[test]
    fn greedy_respects_the_penalty() {
        let config = SamplingConfig::new()
            .with_temperature(0.0)
            .with_repetition_penalty(2.0);
        let mut sampler = Sampler::new(config).unwrap();
        assert_eq!(sampler.sample(&[1.0, 3.0, 2.0], &[]), Ok(1));
        assert_eq!(sampler.sample(&[1.0, 3.0, 2.0], &[1]), Ok(2));
    }

    #[test]
    fn frequencies_follow_the_distribution() {
        const N: u32 = 20_000;
        let config = SamplingConfig::new().with_top_k(Some(4)).with_seed(11);
        let logits = [0.0, 1.0, -1.0, 0.5, -2.0];
        let expected = distribution(&config, &logits, &[]);
        let mut sampler = Sampler::new(config).unwrap();
        let mut counts = [0_u32; 5];
        for _ in 0..N {
            counts[sampler.sample(&logits, &[]).unwrap() as usize] += 1;
        }
        for (count, p) in counts.into_iter().zip(expected) {
            let frequency = f64::from(count) / f64::from(N);
            let standard_error = (p * (1.0 - p) / f64::from(N)).sqrt();
            assert!(
                (frequency - p).abs() <= 4.0 * standard_error,
                "{frequency}, {p}"
            );
        }
    }

    #[test]
    fn extreme_uniform_numbers_draw_the_outermost_tokens_that_are_possible() {
        let largest = 1.0 - f64::EPSILON / 2.0;
        for sum in [1.0, 1.0 + 2.0 * f64::EPSILON, 1.0 - f64::EPSILON] {
            let distribution = [0.0, 0.5, 0.0, sum - 0.5, 0.0];
            assert_eq!(draw(&distribution, 0.0), 1);
            assert_eq!(draw(&distribution, largest), 3);
        }
        assert_eq!(draw(&[0.25, 0.75], 0.25), 1);
    }

    #[test]
    fn a_seed_fixes_the_draws() {
        let draws = |seed| {
            let mut sampler = Sampler::new(SamplingConfig::new().with_seed(seed)).unwrap();
            [(); 32].map(|()| sampler.sample(&[0.0; 100], &[]).unwrap())
        };
        assert_eq!(draws(1), draws(1));
        assert_ne!(draws(1), draws(2));
    }

    #[test]
    fn bad_logits_and_contexts_are_errors_and_no_draw() {
        let mut sampler = Sampler::new(SamplingConfig::new()).unwrap();
        let mut clean = sampler.clone();
        let error = sampler.sample(&[0.0, f32::NAN], &[]).unwrap_err();
        assert!(matches!(error, SampleError::Logit { token: 1, value } if value.is_nan()));
        assert_eq!(
            sampler.sample(&[f32::INFINITY, 0.0], &[]),
            Err(SampleError::Logit {
                token: 0,
                value: f32::INFINITY
            })
        );
        for logits in [&[][..], &[NEG_INF, NEG_INF]] {
            let vocab_size = logits.len();
            assert_eq!(
                sampler.sample(logits, &[]),
                Err(SampleError::NoCandidate { vocab_size })
            );
        }
        let penalty = SamplingConfig::new().with_repetition_penalty(2.0);
        assert_eq!(
            Sampler::new(penalty).unwrap().sample(&[0.0, 0.0], &[1, 2]),
            Err(SampleError::ContextToken {
                position: 1,
                token: 2,
                vocab_size: 2
            })
        );
        for _ in 0..8 {
            assert_eq!(
                sampler.sample(&[0.0; 50], &[]),
                clean.sample(&[0.0; 50], &[])
            );
        }
    }

    #[test]
    fn validate_names_the_field_and_the_value() {
        let config = SamplingConfig::new;
        let cases = [
            (config().with_temperature(-0.5), "temperature is -0.5"),
            (config().with_temperature(f64::NAN), "temperature is NaN"),
            (
                config().with_temperature(f64::INFINITY),
                "temperature is inf",
            ),
            (config().with_top_k(Some(0)), "top_k is 0"),
            (config().with_top_p(Some(0.0)), "top_p is 0"),
            (config().with_top_p(Some(1.5)), "top_p is 1.5"),
            (config().with_top_p(Some(f64::NAN)), "top_p is NaN"),
            (config().with_min_p(Some(-0.1)), "min_p is -0.1"),
            (config().with_min_p(Some(1.1)), "min_p is 1.1"),
            (config().with_min_p(Some(f64::NAN)), "min_p is NaN"),
            (
                config().with_repetition_penalty(0.0),
                "repetition_penalty is 0",
            ),
            (
                config().with_repetition_penalty(f64::NAN),
                "repetition_penalty is NaN",
            ),
            (
                config().with_repetition_penalty(f64::INFINITY),
                "repetition_penalty is inf",
            ),
        ];
        for (config, words) in cases {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(words), "{message}");
        }
        assert_eq!(config().validate(), Ok(()));
        let edges = config()
            .with_temperature(0.0)
            .with_top_k(Some(1))
            .with_top_p(Some(1.0))
            .with_min_p(Some(0.0));
        assert_eq!(edges.validate(), Ok(()));
    }

    #[test]
    fn an_invalid_config_makes_no_sampler() {
        let error = Sampler::new(SamplingConfig::new().with_top_p(Some(2.0))).unwrap_err();
        assert_eq!(error, InvalidSampling::TopP { value: 2.0 });
    }

    #[test]
    fn config_survives_json() {
        let config = SamplingConfig {
            temperature: 0.7,
            top_k: Some(40),
            top_p: None,
            min_p: Some(0.05),
            repetition_penalty: 1.1,
            seed: u64::MAX,
        };
        let json = serde_json::to_string(&config).unwrap();
        assert_eq!(
            serde_json::from_str::<SamplingConfig>(&json).unwrap(),
            config
        );
        let partial: SamplingConfig = serde_json::from_str(r#"{"top_k": 3}"#).unwrap();
        assert_eq!(partial, SamplingConfig::new().with_top_k(Some(3)));
        assert!(serde_json::from_str::<SamplingConfig>(r#"{"topk": 3}"#).is_err());
    }

    #[test]
    fn order_is_that_of_the_numbers() {
        let rising = [
            f64::NEG_INFINITY,
            f64::MIN,
            -1.0,
            -1e-320,
            0.0,
            1e-320,
            1.0,
            f64::MAX,
        ];
        assert!(
            rising
                .windows(2)
                .all(|pair| order(pair[0]) < order(pair[1]))
        );
        assert_eq!(order(-0.0), order(0.0));
    }
}
