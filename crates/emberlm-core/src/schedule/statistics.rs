//! What a schedule costs.

/// What a schedule costs, over all heads and batch rows.
///
/// ```
/// use emberlm_core::{BatchData, BlockSizes, Lengths, Pattern, Schedule};
///
/// let lengths = Lengths::square(128).with_n_heads(2);
/// let schedule = Schedule::compile(&Pattern::causal(), &lengths, &BlockSizes::default(), &BatchData::new())?;
/// let statistics = schedule.statistics();
/// assert_eq!(statistics.n_visible, 2 * 128 * 129 / 2);
/// assert_eq!(statistics.n_visited, 2 * 3 * 64 * 64);
/// assert_eq!(statistics.forward_flops(64), 4 * 64 * statistics.n_visible);
/// # Ok::<(), emberlm_core::PatternError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Statistics {
    /// Visible pairs of a query and a key.
    pub n_visible: u64,
    /// Pairs in all blocks that are visited. Blocks at the end of a sequence count with the pairs that are there.
    pub n_visited: u64,
    /// Visible pairs as a fraction of all pairs; 0 where there are none.
    pub density: f64,
    /// Memory of the schedule in bytes: orders, spans and masks.
    pub bytes: usize,
}

impl Statistics {
    /// Floating-point operations of a forward pass over the visible pairs with heads of width `d_head`: `4 d_head` a
    /// pair, half of them for scores and half for values.
    pub fn forward_flops(&self, d_head: usize) -> u64 {
        self.n_visible.saturating_mul(4 * d_head as u64)
    }

    /// Floating-point operations of a backward pass over the visible pairs: `10 d_head` a pair, for the five products
    /// that recompute the scores and make the gradients of query, key, value and probabilities.
    pub fn backward_flops(&self, d_head: usize) -> u64 {
        self.n_visible.saturating_mul(10 * d_head as u64)
    }
}
