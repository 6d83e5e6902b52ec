//! What is computed: the inputs of one attention, where they lie, and how scores become weights.

use std::sync::Arc;

use emberlm_core::{RandomKey, Schedule};
use emberlm_kernels::{Real, Stored, View, kernel};

use super::BLOCK;

/// Inputs and options of one attention.
pub(super) struct Problem<'a, E: Stored> {
    /// `[batch_size, n_heads, query_length, d_head]`
    pub(super) query: View<'a, E>,
    /// `[batch_size, n_kv_heads, key_length, d_head]`
    pub(super) key: View<'a, E>,
    /// `[batch_size, n_kv_heads, key_length, d_value]`
    pub(super) value: View<'a, E>,
    /// `[batch_size or 1, n_heads or 1, query_length, key_length]`
    pub(super) bias: Option<View<'a, E>>,
    /// A logit a head that takes part in the softmax and has no value.
    pub(super) sinks: Option<Vec<E::Real>>,
    pub(super) schedule: &'a Schedule,
    /// Whether the log-sum-exp is the last column of the output.
    pub(super) with_log_sum_exp: bool,
    pub(super) scores: Scores<E::Real>,
}

/// How products of queries and keys become weights.
#[derive(Debug, Clone)]
pub(super) struct Scores<R> {
    pub(super) scale: R,
    /// `limit tanh(score / limit)`
    pub(super) cap: Option<R>,
    /// A slope a head: the score loses `slope |i - j|`.
    pub(super) slopes: Option<Arc<[R]>>,
    pub(super) dropout: Option<Dropout>,
}

/// Dropout on the weights.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dropout {
    pub(super) key: RandomKey,
    pub(super) rate: f64,
}

/// The sizes of a problem, by name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch_size: usize,
    pub(super) n_heads: usize,
    pub(super) n_kv_heads: usize,
    pub(super) query_length: usize,
    pub(super) key_length: usize,
    pub(super) d_head: usize,
    pub(super) d_value: usize,
}

impl<E: Stored> Problem<'_, E> {
    pub(super) fn first_position(&self) -> usize {
        self.schedule.lengths().first_position
    }

    pub(super) fn sizes(&self) -> Sizes {
        let [batch_size, n_heads, query_length, d_head] = self.query.dims();
        let [_, n_kv_heads, key_length, d_value] = self.value.dims();
        Sizes {
            batch_size,
            n_heads,
            n_kv_heads,
            query_length,
            key_length,
            d_head,
            d_value,
        }
    }

    /// Columns of the output.
    pub(super) fn d_output(&self) -> usize {
        let [.., d_value] = self.value.dims();
        d_value + usize::from(self.with_log_sum_exp)
    }

    /// The logit of a head's sink.
    pub(super) fn sink(&self, head: usize) -> Option<E::Real> {
        self.sinks.as_ref().map(|sinks| sinks[head])
    }

    /// The bias that this head of this batch row sees, as indices of the bias' first two axes.
    pub(super) fn bias_at(&self, batch: usize, head: usize) -> Option<(View<'_, E>, [usize; 2])> {
        self.bias.map(|bias| {
            let [n_batch, n_heads, ..] = bias.dims();
            (bias, [batch.min(n_batch - 1), head.min(n_heads - 1)])
        })
    }
}

impl Sizes {
    pub(super) fn kv_head(&self, head: usize) -> usize {
        head / (self.n_heads / self.n_kv_heads)
    }
}

/// Widths are padded to whole vectors of any machine, so that tiles have no ragged columns.
pub(super) fn padded(width: usize) -> usize {
    width.next_multiple_of(16)
}

/// Elements of `n_rows` packed rows.
pub(super) fn packed_rows(n_rows: usize, width: usize) -> usize {
    n_rows.next_multiple_of(BLOCK) * padded(width)
}

/// Elements of `n_rows` packed columns.
pub(super) fn packed_columns(n_rows: usize, width: usize) -> usize {
    n_rows.next_multiple_of(BLOCK) * width
}

/// The rows of one head in the order of a part, in private memory: `[n rows, to whole blocks][padded width]`.
///
/// Rows and columns beyond the ends are zero.
pub(super) fn pack_rows<E: Stored>(
    view: View<'_, E>,
    [batch, head]: [usize; 2],
    order: Option<&[u32]>,
    scale: E::Real,
    to: &mut Vec<E::Real>,
) {
    let [_, _, length, width] = view.dims();
    let n_rows = order.map_or(length, <[u32]>::len);
    to.resize(packed_rows(n_rows, width), E::Real::default());
    copy_rows(view, [batch, head], order, scale, to);
}

kernel! {
    fn copy_rows<'a, E: Stored>(
        _simd: S,
        view: View<'a, E>,
        at: [usize; 2],
        order: Option<&'a [u32]>,
        scale: E::Real,
        rows: &'a mut [E::Real],
    ) -> () {
        let [_, _, length, width] = view.dims();
        let n_rows = order.map_or(length, <[u32]>::len);
        let (rows, beyond) = rows.split_at_mut(n_rows * padded(width));
        for (i, row) in rows.chunks_exact_mut(padded(width)).enumerate() {
            let position = order.map_or(i, |order| order[i] as usize);
            view.copy_row([at[0], at[1], position], scale, row);
            row[width..].fill(E::Real::default());
        }
        beyond.fill(E::Real::default());
    }
}

/// The rows of one head in the order of a part, block by block transposed: `[n blocks][width][BLOCK]`.
///
/// Columns beyond the end are zero.
pub(super) fn pack_columns<E: Stored>(
    view: View<'_, E>,
    [batch, head]: [usize; 2],
    order: Option<&[u32]>,
    to: &mut Vec<E::Real>,
) {
    let [_, _, length, width] = view.dims();
    let n_rows = order.map_or(length, <[u32]>::len);
    to.resize(packed_columns(n_rows, width), E::Real::default());
    copy_columns(view, [batch, head], order, to);
}

/// Rows that are exchanged with columns at once: their elements stay in the first cache.
const STRIP: usize = 16;

kernel! {
    fn copy_columns<'a, E: Stored>(
        _simd: S,
        view: View<'a, E>,
        at: [usize; 2],
        order: Option<&'a [u32]>,
        columns: &'a mut [E::Real],
    ) -> () {
        let [_, _, length, width] = view.dims();
        let n_rows = order.map_or(length, <[u32]>::len);
        let mut strip = vec![E::Real::default(); STRIP * width];
        for (block, panel) in columns.chunks_exact_mut(width * BLOCK).enumerate() {
            let n_there = BLOCK.min(n_rows - block * BLOCK);
            for column in panel.chunks_exact_mut(BLOCK) {
                column[n_there..].fill(E::Real::default());
            }
            for first in (0..n_there).step_by(STRIP) {
                let n = STRIP.min(n_there - first);
                for (j, row) in strip.chunks_exact_mut(width).take(n).enumerate() {
                    let i = block * BLOCK + first + j;
                    let position = order.map_or(i, |order| order[i] as usize);
                    view.copy_row([at[0], at[1], position], E::Real::from_f64(1.0), row);
                }
                for (c, column) in panel.chunks_exact_mut(BLOCK).enumerate() {
                    for (j, element) in column[first..first + n].iter_mut().enumerate() {
                        *element = strip[j * width + c];
                    }
                }
            }
        }
    }
}

/// Where the rows of a part stand in the sequence.
pub(super) fn positions<R: Real>(length: usize, order: Option<&[u32]>) -> Vec<R> {
    let to_real = |position: usize| R::from_f64(position as f64);
    match order {
        None => (0..length.next_multiple_of(BLOCK)).map(to_real).collect(),
        Some(order) => {
            let mut positions: Vec<R> = order.iter().map(|p| to_real(*p as usize)).collect();
            positions.resize(order.len().next_multiple_of(BLOCK), R::default());
            positions
        }
    }
}
