//! From products to scores, one row of one block after another: cap, distance, bias, hidden keys.

use emberlm_core::{Part, RandomKey};
use emberlm_kernels::{Real, Stored, View, lanes};
use pulp::Simd;

use super::{
    BLOCK,
    problem::{Dropout, Problem},
};

/// What one row of a block needs besides its products.
pub(super) struct Row<'a, E: Stored> {
    /// Where the query stands among the queries, and where in the sequence.
    pub(super) query: usize,
    pub(super) position: E::Real,
    /// Where the block's keys stand, as numbers and as indices; nothing where they stand one after another.
    pub(super) key_positions: &'a [E::Real],
    pub(super) first_key: usize,
    pub(super) key_order: Option<&'a [u32]>,
    /// The keys that are visible, a bit each; nothing where all are.
    pub(super) visible: Option<u64>,
}

impl<'a, E: Stored> Row<'a, E> {
    /// Row `row` of a part against one key block.
    #[inline(always)]
    pub(super) fn new(
        problem: &Problem<'_, E>,
        part: &'a Part,
        key_positions: &'a [E::Real],
        row: usize,
        key_block: usize,
        visible: Option<u64>,
    ) -> Self {
        let query = part.query_order().map_or(row, |order| order[row] as usize);
        let first_key = key_block * BLOCK;
        Self {
            query,
            position: E::Real::from_f64((problem.first_position() + query) as f64),
            key_positions: &key_positions[first_key..first_key + BLOCK],
            first_key,
            key_order: part.key_order(),
            visible,
        }
    }
}

/// What one head of one batch row adds to its scores.
pub(super) struct Head<'a, E: Stored> {
    pub(super) cap: Option<E::Real>,
    pub(super) slope: Option<E::Real>,
    pub(super) bias: Option<(View<'a, E>, [usize; 2])>,
    pub(super) dropout: Option<(Dropout, u64)>,
    pub(super) key_length: usize,
}

impl<'a, E: Stored> Head<'a, E> {
    pub(super) fn new(problem: &'a Problem<'_, E>, batch: usize, head: usize) -> Self {
        let sizes = problem.sizes();
        let row = ((batch * sizes.n_heads + head) * sizes.query_length) as u64;
        Self {
            cap: problem.scores.cap,
            slope: problem.scores.slopes.as_ref().map(|slopes| slopes[head]),
            bias: problem.bias_at(batch, head),
            dropout: problem.scores.dropout.map(|dropout| (dropout, row)),
            key_length: sizes.key_length,
        }
    }

    /// Whether products of visible keys are the scores.
    pub(super) fn is_plain(&self) -> bool {
        self.cap.is_none() && self.slope.is_none() && self.bias.is_none()
    }

    /// The index of key `j` of a block among all keys.
    #[inline(always)]
    pub(super) fn key(&self, row: &Row<'_, E>, j: usize) -> usize {
        match row.key_order {
            None => row.first_key + j,
            Some(order) => order[row.first_key + j] as usize,
        }
    }

    /// Number of keys of the block that exist.
    #[inline(always)]
    pub(super) fn n_keys(&self, row: &Row<'_, E>) -> usize {
        let n_keys = row.key_order.map_or(self.key_length, <[u32]>::len);
        BLOCK.min(n_keys - row.first_key)
    }

    /// Turns the `BLOCK` products at `scores` into scores; hidden ones become negative infinity.
    ///
    /// Where there is a cap, its derivatives go to `cap_slopes`, if given.
    ///
    /// # Safety
    ///
    /// `BLOCK` elements at `scores` are this caller's alone; with a cap, so are those at `cap_slopes`.
    #[inline(always)]
    pub(super) unsafe fn apply<S: Simd>(
        &self,
        simd: S,
        row: &Row<'_, E>,
        scores: *mut E::Real,
        cap_slopes: Option<*mut E::Real>,
    ) {
        let lanes = lanes::<E::Real, S>();
        // Safety: all offsets are below BLOCK, a multiple of the lanes.
        unsafe {
            if let Some(cap) = self.cap {
                let limit = E::Real::splat(simd, cap);
                let zero = E::Real::splat(simd, E::Real::default());
                let one = E::Real::splat(simd, E::Real::from_f64(1.0));
                let inverse = E::Real::splat(simd, E::Real::from_f64(1.0) / cap);
                for j in (0..BLOCK).step_by(lanes) {
                    let x = E::Real::load(simd, scores.add(j));
                    let x = E::Real::vtanh(simd, E::Real::vmul(simd, x, inverse));
                    if let Some(slopes) = cap_slopes {
                        let negative = E::Real::vsub(simd, zero, x);
                        let slope = E::Real::vmul_add(simd, negative, x, one);
                        E::Real::store(simd, slopes.add(j), slope);
                    }
                    E::Real::store(simd, scores.add(j), E::Real::vmul(simd, x, limit));
                }
            }
            if let Some(slope) = self.slope {
                let slope = E::Real::splat(simd, -slope);
                let position = E::Real::splat(simd, row.position);
                for j in (0..BLOCK).step_by(lanes) {
                    let keys = E::Real::load(simd, row.key_positions.as_ptr().add(j));
                    let distance = E::Real::vabs(simd, E::Real::vsub(simd, position, keys));
                    let x = E::Real::load(simd, scores.add(j));
                    let x = E::Real::vmul_add(simd, slope, distance, x);
                    E::Real::store(simd, scores.add(j), x);
                }
            }
            if let Some((bias, [batch, head])) = &self.bias {
                for j in 0..self.n_keys(row) {
                    let bias = bias.at([*batch, *head, row.query, self.key(row, j)]);
                    *scores.add(j) += bias.to_real();
                }
            }
            if let Some(visible) = row.visible {
                // Of a row that sees nothing, 64 zeros before the first key.
                let first = visible.trailing_zeros() as usize;
                let end = BLOCK - visible.leading_zeros() as usize;
                let scores = std::slice::from_raw_parts_mut(scores, BLOCK);
                scores[..first].fill(E::Real::NEG_INFINITY);
                scores[end..].fill(E::Real::NEG_INFINITY);
                let mut hidden = !visible;
                if first < end {
                    hidden &= (u64::MAX << first) & (u64::MAX >> (BLOCK - end));
                    while hidden != 0 {
                        scores[hidden.trailing_zeros() as usize] = E::Real::NEG_INFINITY;
                        hidden &= hidden - 1;
                    }
                }
            }
        }
    }

    /// The factors of dropout for the `BLOCK` weights of a row: zero or `1 / (1 - rate)`; nothing without dropout.
    #[inline(always)]
    pub(super) fn kept(&self, row: &Row<'_, E>) -> Option<[E::Real; BLOCK]> {
        let (Dropout { key, rate }, first) = self.dropout?;
        let mut factors = [E::Real::default(); BLOCK];
        let kept = E::Real::from_f64(1.0 / (1.0 - rate));
        let first = (first + row.query as u64) * self.key_length as u64;
        for (j, factor) in factors.iter_mut().enumerate().take(self.n_keys(row)) {
            if is_kept(key, first + self.key(row, j) as u64, rate) {
                *factor = kept;
            }
        }
        Some(factors)
    }
}

fn is_kept(key: RandomKey, element: u64, rate: f64) -> bool {
    key.uniform(element) >= rate
}
