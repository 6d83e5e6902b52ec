//! Global tokens.

use serde::{Deserialize, Serialize};

use super::PatternError;

/// Tokens that see every key and that every query sees: `(i, j)` is visible if `i` or `j` is global.
///
/// From Longformer (<https://arxiv.org/abs/2004.05150>, section 3.1) and BigBird
/// (<https://arxiv.org/abs/2007.14062>, the internal construction). Longformer's own projections for global tokens
/// belong to its module, not to the pattern.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Global {
    /// The same absolute positions in every batch row, rising.
    Positions(Vec<usize>),
    /// The first positions, as many as there are: a longer count than the sequence is no error.
    First(usize),
    /// Each batch row's own, from the batch data.
    Batch,
}

impl Global {
    pub(super) fn validate(&self) -> Result<(), PatternError> {
        match self {
            Self::Positions(positions) => {
                PatternError::require_rising("global.positions", positions)
            }
            Self::First(_) | Self::Batch => Ok(()),
        }
    }
}
