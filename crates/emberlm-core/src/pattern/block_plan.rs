//! Blocks of keys that are named one by one.

use serde::{Deserialize, Serialize};

use super::PatternError;

/// A plan of blocks: the queries of block `i` see the key blocks `rows[i]`, whole. Queries beyond the last row see
/// nothing.
///
/// For plans that somebody else has drawn, such as the random blocks of a trained BigBird
/// (<https://arxiv.org/abs/2007.14062>); [`RandomBlocks`](super::RandomBlocks) draws its own.
///
/// ```
/// use emberlm_core::{BlockPlan, Pattern};
///
/// let plan = BlockPlan::new(2, vec![vec![1], vec![], vec![0, 1]]);
/// let pattern = Pattern::blocks(plan);
/// assert_eq!(pattern.to_string(), "blocks:2:1//0,1");
/// let picture = [
///     "..##.", //
///     "..##.",
///     ".....",
///     ".....",
///     "####.",
/// ];
/// assert_eq!(pattern.to_text(5, 5), Ok(picture.join("\n") + "\n"));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockPlan {
    /// Positions of a block, at least 1.
    pub block: usize,
    /// For each block of queries the key blocks that it sees, rising; blocks beyond the keys show nothing.
    pub rows: Vec<Vec<usize>>,
}

impl BlockPlan {
    /// A plan, whose rows must rise. Empty rows at the end are left out.
    pub fn new(block: usize, mut rows: Vec<Vec<usize>>) -> Self {
        while rows.last().is_some_and(Vec::is_empty) {
            rows.pop();
        }
        Self { block, rows }
    }

    /// The key blocks that the queries of block `query_block` see, rising.
    pub(crate) fn key_blocks(&self, query_block: usize) -> &[usize] {
        self.rows.get(query_block).map_or(&[], Vec::as_slice)
    }

    pub(super) fn allows(&self, query: usize, key: usize) -> bool {
        self.key_blocks(query / self.block)
            .binary_search(&(key / self.block))
            .is_ok()
    }

    pub(super) fn validate(&self) -> Result<(), PatternError> {
        PatternError::require_positive("blocks.block", self.block)?;
        let mut rows = self.rows.iter();
        rows.try_for_each(|row| PatternError::require_rising("blocks.rows", row))
    }
}
