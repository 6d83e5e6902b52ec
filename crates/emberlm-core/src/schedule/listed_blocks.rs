//! The key blocks of all query blocks, where these are a list.

use crate::pattern::{BlockPlan, Lengths, RandomBlocks};

/// For each block of queries the key blocks that it sees.
pub(super) struct ListedBlocks {
    block: i64,
    first_row: i64,
    offsets: Vec<usize>,
    key_blocks: Vec<u32>,
}

impl ListedBlocks {
    pub(super) fn random(random: &RandomBlocks, lengths: &Lengths) -> Self {
        Self::new(random.block, lengths, |row| {
            random.key_blocks(row, lengths.key_length)
        })
    }

    pub(super) fn planned(plan: &BlockPlan, lengths: &Lengths) -> Self {
        Self::new(plan.block, lengths, |row| plan.key_blocks(row).to_vec())
    }

    /// `key_blocks` of a row rise.
    fn new(block: usize, lengths: &Lengths, key_blocks: impl Fn(usize) -> Vec<usize>) -> Self {
        let first_row = lengths.first_position / block;
        let end_row = lengths.query_end().div_ceil(block);
        let n_key_blocks = lengths.key_length.div_ceil(block);
        let mut offsets = vec![0];
        let mut all = Vec::new();
        for row in first_row..end_row {
            // Some may lie beyond the keys.
            let there = key_blocks(row).into_iter().filter(|&b| b < n_key_blocks);
            all.extend(there.map(|block| block as u32));
            offsets.push(all.len());
        }
        Self {
            // A block beyond all positions acts like any other that is.
            block: block.min(Lengths::LIMIT) as i64,
            first_row: first_row as i64,
            offsets,
            key_blocks: all,
        }
    }

    pub(super) fn block(&self) -> i64 {
        self.block
    }

    /// The key blocks that the query at a position sees, rising.
    pub(super) fn of_query(&self, query: i64) -> &[u32] {
        self.of_row(query / self.block)
    }

    pub(super) fn of_row(&self, row: i64) -> &[u32] {
        let row = (row - self.first_row) as usize;
        &self.key_blocks[self.offsets[row]..self.offsets[row + 1]]
    }
}
