//! Objectives: what is hidden of a text, and what a model has to say there. Each is a function of a window's tokens and a
//! random key, so that a resumed run hides what it would have hidden.

mod batching;
mod masked;
mod spans;

use emberlm_core::InvalidConfig;
use serde::{Deserialize, Serialize};

pub use batching::Batching;
pub(crate) use batching::Window;
pub use masked::{Masked, MaskedConfig};
pub use spans::{Spans, SpansConfig};

/// What a model learns to say of a window of text.
///
/// ```
/// use emberlm_training::{MaskedConfig, Objective};
///
/// let objective = Objective::Masked(MaskedConfig::new(256, 256).with_rate(0.3));
/// assert!(objective.validate(128).is_ok());
/// assert_eq!(objective.name(), "masked");
/// ```
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub enum Objective {
    /// The next token, at every position.
    #[default]
    Causal,
    /// Tokens that are hidden from it, as BERT.
    Masked(MaskedConfig),
    /// Spans that are cut out, as T5.
    Spans(SpansConfig),
}

impl Objective {
    /// `causal`, `masked` or `spans`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Causal => "causal",
            Self::Masked(_) => "masked",
            Self::Spans(_) => "spans",
        }
    }

    /// Checks the fields for windows of `seq_length` tokens.
    ///
    /// # Errors
    ///
    /// Those of [`MaskedConfig::validate`] and [`SpansConfig::validate`].
    pub fn validate(&self, seq_length: usize) -> Result<(), InvalidConfig> {
        match self {
            Self::Causal => Ok(()),
            Self::Masked(masked) => masked.validate(),
            Self::Spans(spans) => spans.validate(seq_length),
        }
    }

    /// Fewest tokens that a window must have.
    pub(crate) fn least_length(&self) -> usize {
        match self {
            Self::Causal | Self::Masked(_) => 1,
            Self::Spans(_) => 2,
        }
    }
}
