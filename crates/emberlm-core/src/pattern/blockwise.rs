//! Blockwise local attention.

use serde::{Deserialize, Serialize};

use super::PatternError;

/// Attention within blocks: key `j` is visible to query `i` if
/// `-look_ahead <= floor(i / block) - floor(j / block) <= look_back`.
///
/// The local attention of Image Transformer (<https://arxiv.org/abs/1802.05751>, section 3.2) and of many later models.
/// A block sees itself whole, its own future included, as in an encoder; `& causal` makes it autoregressive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blockwise {
    /// Positions of a block, at least 1.
    pub block: usize,
    /// Earlier blocks that are visible as well.
    #[serde(default)]
    pub look_back: usize,
    /// Later blocks that are visible as well.
    #[serde(default)]
    pub look_ahead: usize,
}

impl Blockwise {
    /// Each block sees itself alone.
    pub fn new(block: usize) -> Self {
        Self {
            block,
            look_back: 0,
            look_ahead: 0,
        }
    }

    /// Each block also sees this many blocks before it.
    pub fn with_look_back(mut self, look_back: usize) -> Self {
        self.look_back = look_back;
        self
    }

    /// Each block also sees this many blocks after it.
    pub fn with_look_ahead(mut self, look_ahead: usize) -> Self {
        self.look_ahead = look_ahead;
        self
    }

    pub(super) fn allows(&self, query: usize, key: usize) -> bool {
        let [query, key] = [query, key].map(|position| position / self.block);
        if key <= query {
            query - key <= self.look_back
        } else {
            key - query <= self.look_ahead
        }
    }

    pub(super) fn validate(&self) -> Result<(), PatternError> {
        PatternError::require_positive("blockwise.block", self.block)
    }
}
