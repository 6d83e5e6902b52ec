//! Global tokens.

use serde::{Deserialize, Serialize};

use super::{At, BatchData, PatternError};

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
    /// The last positions of the keys, as many as there are. Which they are depends on the length.
    Last(usize),
    /// Each batch row's own, from the batch data.
    Batch,
}

impl Global {
    /// Whether no position of any sequence is global.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Positions(positions) => positions.is_empty(),
            Self::First(n) | Self::Last(n) => *n == 0,
            Self::Batch => false,
        }
    }

    /// Whether a position of a batch row is global.
    pub(super) fn holds(&self, position: usize, at: &At, data: &BatchData) -> bool {
        match self {
            Self::Positions(positions) => positions.binary_search(&position).is_ok(),
            Self::First(n) => position < *n,
            Self::Last(n) => position >= at.key_length.saturating_sub(*n),
            Self::Batch => data.globals(at.batch).binary_search(&position).is_ok(),
        }
    }

    /// Without given positions at `length` or beyond.
    pub(super) fn within(&self, length: usize) -> Self {
        match self {
            Self::Positions(positions) => {
                let there = positions.iter().filter(|position| **position < length);
                Self::Positions(there.copied().collect())
            }
            Self::First(_) | Self::Last(_) | Self::Batch => self.clone(),
        }
    }

    pub(super) fn validate(&self) -> Result<(), PatternError> {
        match self {
            Self::Positions(positions) => {
                PatternError::require_rising("global.positions", positions)
            }
            Self::First(_) | Self::Last(_) | Self::Batch => Ok(()),
        }
    }
}
