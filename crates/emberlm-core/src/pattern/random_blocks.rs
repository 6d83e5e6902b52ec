//! Random blocks of keys.

use serde::{Deserialize, Serialize};

use super::PatternError;
use crate::random::RandomKey;

/// Where random blocks are drawn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// All blocks of the keys. What a query block sees depends on the number of key blocks, as in BigBird.
    Everywhere,
    /// The query's own block and those before it. What a query block sees does not depend on any length, so that a
    /// row stays the same while a sequence grows: this is the one for causal models.
    Past,
}

/// Random blocks: each block of queries sees `n_blocks` distinct blocks of keys, whole.
///
/// From BigBird (<https://arxiv.org/abs/2007.14062>, section 2 and appendix D). The blocks are a uniform draw without
/// replacement, a function of the seed and the query block (and of the number of key blocks for
/// [`Reach::Everywhere`]). Where there are fewer blocks to draw from, all are visible.
///
/// Two differences from the published code, which plans the blocks with a generator of numpy: any length works, and the
/// draw does not avoid the blocks of the window and of the global tokens, so that a key block that two parts of a
/// pattern allow is seen once. Heads share the draw; give each head its own seed with
/// [`Pattern::per_head`](super::Pattern::per_head).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RandomBlocks {
    /// Positions of a block, at least 1.
    pub block: usize,
    /// Key blocks that each query block sees.
    pub n_blocks: usize,
    /// Seed of the draw.
    #[serde(default)]
    pub seed: u64,
    /// Where the blocks are drawn from.
    pub reach: Reach,
}

impl RandomBlocks {
    /// Blocks drawn from all keys, with seed 0.
    pub fn everywhere(block: usize, n_blocks: usize) -> Self {
        Self {
            block,
            n_blocks,
            seed: 0,
            reach: Reach::Everywhere,
        }
    }

    /// Blocks drawn from the query's own block and those before it, with seed 0.
    pub fn past(block: usize, n_blocks: usize) -> Self {
        Self {
            reach: Reach::Past,
            ..Self::everywhere(block, n_blocks)
        }
    }

    /// The same with another seed.
    pub fn with_seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// The key blocks that the queries of block `query_block` see, rising.
    pub fn key_blocks(&self, query_block: usize, key_length: usize) -> Vec<usize> {
        let n_candidates = match self.reach {
            Reach::Everywhere => key_length.div_ceil(self.block),
            Reach::Past => query_block + 1,
        };
        let key = RandomKey::new(self.seed).fold(query_block as u64);
        let n_drawn = self.n_blocks.min(n_candidates);
        // Floyd's draw without replacement (<https://doi.org/10.1145/30401.315746>): one number a block, and every
        // subset is equally likely.
        let mut drawn = Vec::with_capacity(n_drawn);
        for last in n_candidates - n_drawn..n_candidates {
            let block = key.below(last as u64, last as u64 + 1) as usize;
            match drawn.binary_search(&block) {
                // `last` is above everything drawn so far.
                Ok(_) => drawn.push(last),
                Err(place) => drawn.insert(place, block),
            }
        }
        drawn
    }

    pub(super) fn allows(&self, query: usize, key: usize, key_length: usize) -> bool {
        self.key_blocks(query / self.block, key_length)
            .binary_search(&(key / self.block))
            .is_ok()
    }

    pub(super) fn validate(&self) -> Result<(), PatternError> {
        PatternError::require_positive("random.block", self.block)
    }
}
