//! The random key blocks of all query blocks.

use crate::pattern::{Lengths, RandomBlocks};

/// For each block of queries the key blocks that were drawn for it.
pub(super) struct RandomRows {
    block: i64,
    first_row: i64,
    offsets: Vec<usize>,
    key_blocks: Vec<u32>,
}

impl RandomRows {
    pub(super) fn new(random: &RandomBlocks, lengths: &Lengths) -> Self {
        let first_row = lengths.first_position / random.block;
        let end_row = lengths.query_end().div_ceil(random.block);
        let n_key_blocks = lengths.key_length.div_ceil(random.block);
        let mut offsets = vec![0];
        let mut key_blocks = Vec::new();
        for row in first_row..end_row {
            // Blocks drawn from the past may lie beyond the keys.
            let drawn = random.key_blocks(row, lengths.key_length);
            let there = drawn.into_iter().filter(|&block| block < n_key_blocks);
            key_blocks.extend(there.map(|block| block as u32));
            offsets.push(key_blocks.len());
        }
        Self {
            // A block beyond all positions acts like any other that is.
            block: random.block.min(Lengths::LIMIT) as i64,
            first_row: first_row as i64,
            offsets,
            key_blocks,
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
