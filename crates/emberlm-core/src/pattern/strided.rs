//! The strided attention of the Sparse Transformer.

use serde::{Deserialize, Serialize};

use super::PatternError;

/// Strided attention (Child et al. 2019, <https://arxiv.org/abs/1904.10509>, section 4.3) with stride `l`.
///
/// Query `i` sees the keys of
///
/// - the local head: `A1_i = {t, t + 1, ..., i}` with `t = max(0, i - l)`, which are `l + 1` keys;
/// - the column head: `A2_i = {j : (i - j) mod l = 0}`, `j <= i`. On an image whose rows hold `l` pixels this is the
///   column above the query.
///
/// Both are autoregressive, as in the paper: `& causal` changes nothing. A merged head sees the union. With `l` near
/// the square root of the length every query sees a number of keys near that root. The paper's code counts the local
/// context in blocks of its kernel; here it is the formula's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Strided {
    /// One head sees the union of both sets.
    Merged {
        /// The stride `l`, at least 1.
        stride: usize,
    },
    /// The head of the last `l` keys and the query's own.
    Local {
        /// The stride `l`, at least 1.
        stride: usize,
    },
    /// The head of every `l`-th key back from the query's own.
    Column {
        /// The stride `l`, at least 1.
        stride: usize,
    },
}

impl Strided {
    /// The union of both heads.
    pub fn merged(stride: usize) -> Self {
        Self::Merged { stride }
    }

    /// The local head.
    pub fn local(stride: usize) -> Self {
        Self::Local { stride }
    }

    /// The column head.
    pub fn column(stride: usize) -> Self {
        Self::Column { stride }
    }

    /// The stride `l`.
    pub fn stride(&self) -> usize {
        match *self {
            Self::Merged { stride } | Self::Local { stride } | Self::Column { stride } => stride,
        }
    }

    pub(super) fn allows(&self, query: usize, key: usize) -> bool {
        if key > query {
            return false;
        }
        let distance = query - key;
        let local = distance <= self.stride();
        let column = distance.is_multiple_of(self.stride());
        match self {
            Self::Merged { .. } => local || column,
            Self::Local { .. } => local,
            Self::Column { .. } => column,
        }
    }

    pub(super) fn validate(&self) -> Result<(), PatternError> {
        PatternError::require_positive("strided.stride", self.stride())
    }
}
