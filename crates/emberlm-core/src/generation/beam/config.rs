//! The options of beam search.

use burn::config::Config;
use serde::{Deserialize, Serialize};

use crate::InvalidConfig;

/// What the log-probability of a hypothesis is divided by, so that long ones may compete with short ones. Lengths count
/// the tokens after the prompt, the end token included.
///
/// ```
/// use emberlm_core::LengthPenalty;
///
/// assert_eq!(LengthPenalty::HuggingFace(1.0).divisor(7), 7.0);
/// assert_eq!(LengthPenalty::Gnmt(1.0).divisor(7), 2.0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LengthPenalty {
    /// `n^p`, as Hugging Face transformers has it: 0 is the sum of log-probabilities, 1 their mean; above 0 favours
    /// long hypotheses.
    HuggingFace(f64),
    /// `((5 + n) / 6)^alpha`: Wu et al. 2016, equation 14, <https://arxiv.org/abs/1609.08144>.
    Gnmt(f64),
}

impl LengthPenalty {
    /// The divisor of a hypothesis of `n` tokens.
    pub fn divisor(&self, n: usize) -> f64 {
        match self {
            Self::HuggingFace(p) => (n as f64).powf(*p),
            Self::Gnmt(alpha) => ((5.0 + n as f64) / 6.0).powf(*alpha),
        }
    }

    pub(super) fn exponent(&self) -> f64 {
        match self {
            Self::HuggingFace(exponent) | Self::Gnmt(exponent) => *exponent,
        }
    }
}

/// When the search ends, once there are as many finished hypotheses as beams. They are those of Hugging Face
/// transformers, by the same names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EarlyStopping {
    /// At once.
    True,
    /// When the best running hypothesis, if it ended now, would not be better than the worst finished one. A heuristic:
    /// where the length penalty favours long hypotheses, a running one might still become better.
    False,
    /// When no running hypothesis can become better than the worst finished one, whatever follows. With a penalty that
    /// favours long hypotheses its log-probability is taken at the largest length, else at the present one.
    Never,
}

/// Configuration of [`BeamSearch`](crate::BeamSearch).
///
/// ```
/// use emberlm_core::{BeamConfig, EarlyStopping, LengthPenalty};
///
/// let config = BeamConfig::new(4, 100) // beams, most new tokens
///     .with_end_tokens(vec![2])
///     .with_length_penalty(LengthPenalty::Gnmt(0.6))
///     .with_early_stopping(EarlyStopping::Never);
/// assert!(config.validate().is_ok());
/// let error = config.with_n_best(5).validate().unwrap_err();
/// assert_eq!(error.to_string(), "n_best must be at most n_beams, got 5");
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct BeamConfig {
    /// Number of hypotheses that run side by side, and of finished ones that are kept.
    pub n_beams: usize,
    /// Most tokens after the prompt.
    pub max_new_tokens: usize,
    /// Tokens that end a hypothesis. Default: none, so that all have `max_new_tokens`.
    #[config(default = "Vec::new()")]
    pub end_tokens: Vec<u32>,
    /// Default: `HuggingFace(1.0)`, the mean log-probability.
    #[config(default = "LengthPenalty::HuggingFace(1.0)")]
    pub length_penalty: LengthPenalty,
    /// Default: `False`.
    #[config(default = "EarlyStopping::False")]
    pub early_stopping: EarlyStopping,
    /// Number of hypotheses returned, at most `n_beams`. Default: 1.
    #[config(default = 1)]
    pub n_best: usize,
    /// Number of groups that the beams are divided into; divides `n_beams`. Default: 1.
    #[config(default = 1)]
    pub n_groups: usize,
    /// What a token loses for each beam of an earlier group that chose it in this step. Default: 0.
    #[config(default = 0.0)]
    pub diversity_penalty: f64,
}

impl BeamConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, more hypotheses asked for than there are beams, groups that do not divide the beams, a length penalty
    /// that is not finite, or a diversity penalty that is negative or not finite.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[
            ("n_beams", self.n_beams),
            ("max_new_tokens", self.max_new_tokens),
            ("n_best", self.n_best),
            ("n_groups", self.n_groups),
        ])?;
        let range = |field, range, value, fits| match fits {
            true => Ok(()),
            false => Err(InvalidConfig::Range {
                field,
                range,
                value,
            }),
        };
        let Self {
            n_beams,
            n_best,
            n_groups,
            diversity_penalty,
            ..
        } = *self;
        let exponent = self.length_penalty.exponent();
        range(
            "n_best",
            "at most n_beams",
            n_best as f64,
            n_best <= n_beams,
        )?;
        range(
            "n_groups",
            "a divisor of n_beams",
            n_groups as f64,
            n_beams.is_multiple_of(n_groups),
        )?;
        range("length_penalty", "finite", exponent, exponent.is_finite())?;
        range(
            "diversity_penalty",
            "finite and at least 0",
            diversity_penalty,
            diversity_penalty.is_finite() && diversity_penalty >= 0.0,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validate_names_the_field() {
        let config = || BeamConfig::new(4, 10);
        let cases = [
            (BeamConfig::new(0, 10), "n_beams must be at least 1"),
            (BeamConfig::new(4, 0), "max_new_tokens must be at least 1"),
            (config().with_n_best(0), "n_best must be at least 1"),
            (
                config().with_n_best(5),
                "n_best must be at most n_beams, got 5",
            ),
            (config().with_n_groups(0), "n_groups must be at least 1"),
            (
                config().with_n_groups(3),
                "n_groups must be a divisor of n_beams, got 3",
            ),
            (
                config().with_length_penalty(LengthPenalty::Gnmt(f64::NAN)),
                "length_penalty must be finite",
            ),
            (
                config().with_diversity_penalty(-1.0),
                "diversity_penalty must be finite and at least 0, got -1",
            ),
        ];
        for (config, words) in cases {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(words), "{message}");
        }
        let whole = config()
            .with_n_best(4)
            .with_n_groups(4)
            .with_diversity_penalty(0.5);
        assert_eq!(whole.validate(), Ok(()));
    }
}
