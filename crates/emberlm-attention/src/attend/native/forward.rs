//! The forward pass: online softmax over the key blocks of each query block.
//!
//! Milakov and Gimelshein 2018, <https://arxiv.org/abs/1805.02867>, as arranged by Dao et al. 2022,
//! <https://arxiv.org/abs/2205.14135>: of each query the largest score `m`, the total `l = sum e^(s - m)` and the sum
//! `o = sum e^(s - m) v` so far are kept; a larger `m` multiplies both by `e^(m_old - m_new)`. At the end the output is
//! `o / l` and the log-sum-exp `m + ln l`. All scores of a pair of blocks live in private memory and are gone afterwards.

use emberlm_core::{Layout, Part};
use emberlm_kernels::{
    Real, Shared, Stored, lanes,
    tile::{self, Left, Rows},
};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    BLOCK,
    blocks::{Block, blocks},
    problem::{Problem, Sizes, pack_columns, pack_rows, padded, positions},
    scores::{Head, Row},
};

/// Key blocks whose scores are held at once: enough to spread the work a row of scores costs besides its elements.
const CHUNK: usize = 4;

/// The result of the forward pass.
pub(super) struct Forward<E: Stored> {
    /// `[batch_size, query_length, n_heads, d_value]`; one column more, the log-sum-exp, if the problem asks for it.
    pub(super) output: Vec<E>,
    /// `[batch_size, n_heads, query_length]`; negative infinity for a query that sees no key.
    pub(super) log_sum_exp: Vec<E::Real>,
}

/// Runs the forward pass. Every query block is one task, so the result does not depend on the number of threads.
pub(super) fn forward<E: Stored>(problem: &Problem<'_, E>) -> Forward<E> {
    let sizes = problem.sizes();
    let n_rows = sizes.batch_size * sizes.n_heads * sizes.query_length;
    let mut output = vec![E::from_real(E::Real::default()); n_rows * problem.d_output()];
    let mut log_sum_exp = vec![E::Real::NEG_INFINITY; n_rows];
    let result = Result {
        d_output: problem.d_output(),
        output: Shared::new(&mut output),
        log_sum_exp: Shared::new(&mut log_sum_exp),
    };
    let parts = problem.schedule.parts();
    if let [part] = parts
        && part.query_order().is_none()
    {
        // The usual case: what a tile holds goes straight to the output.
        run_part(problem, part, None, |tile, task| {
            for i in 0..task.rows.len() {
                result.finish(&sizes, task.head_row(&sizes, i), tile.row(i));
            }
        });
    } else {
        // What is known of each query goes from part to part; each query stands in one tile of a part at most.
        let width = padded(sizes.d_value);
        let mut state = Sums::new(n_rows, width);
        for (row, (maximum, total)) in state.maxima.iter_mut().zip(&mut state.totals).enumerate() {
            if let Some(sinks) = &problem.sinks {
                *maximum = sinks[row / sizes.query_length % sizes.n_heads];
                *total = E::Real::from_f64(1.0);
            }
        }
        for part in parts {
            let shared = state.share();
            run_part(problem, part, Some(&shared), |tile, task| {
                for i in 0..task.rows.len() {
                    let row = task.head_row(&sizes, i);
                    // Safety: the row is in this task alone.
                    unsafe { shared.row(row) }.copy_from(tile.row(i));
                }
            });
        }
        (0..n_rows).for_each(|row| result.finish(&sizes, row, state.row(row)));
    }
    Forward {
        output,
        log_sum_exp,
    }
}

/// Of some queries, the largest score, the total of the weights and the weighted sum of the values.
struct Sums<R> {
    width: usize,
    maxima: Vec<R>,
    totals: Vec<R>,
    values: Vec<R>,
}

/// The same of one query.
struct RowSums<'a, R> {
    maximum: R,
    total: R,
    values: &'a [R],
}

struct RowSumsMut<'a, R> {
    maximum: &'a mut R,
    total: &'a mut R,
    values: &'a mut [R],
}

struct SharedSums<'a, R> {
    width: usize,
    maxima: Shared<'a, R>,
    totals: Shared<'a, R>,
    values: Shared<'a, R>,
}

impl<R: Real> Sums<R> {
    fn new(n_rows: usize, width: usize) -> Self {
        Self {
            width,
            maxima: vec![R::NEG_INFINITY; n_rows],
            totals: vec![R::default(); n_rows],
            values: vec![R::default(); n_rows * width],
        }
    }

    fn row(&self, i: usize) -> RowSums<'_, R> {
        RowSums {
            maximum: self.maxima[i],
            total: self.totals[i],
            values: &self.values[i * self.width..(i + 1) * self.width],
        }
    }

    fn row_mut(&mut self, i: usize) -> RowSumsMut<'_, R> {
        RowSumsMut {
            maximum: &mut self.maxima[i],
            total: &mut self.totals[i],
            values: &mut self.values[i * self.width..(i + 1) * self.width],
        }
    }

    fn share(&mut self) -> SharedSums<'_, R> {
        SharedSums {
            width: self.width,
            maxima: Shared::new(&mut self.maxima),
            totals: Shared::new(&mut self.totals),
            values: Shared::new(&mut self.values),
        }
    }
}

impl<'a, R: Real> SharedSums<'a, R> {
    /// # Safety
    ///
    /// Nobody else has this row.
    unsafe fn row(&self, i: usize) -> RowSumsMut<'a, R> {
        // Safety: the caller's.
        unsafe {
            RowSumsMut {
                maximum: &mut self.maxima.part(i, 1)[0],
                total: &mut self.totals.part(i, 1)[0],
                values: self.values.part(i * self.width, self.width),
            }
        }
    }
}

impl<R: Real> RowSumsMut<'_, R> {
    fn copy_from(self, from: RowSums<'_, R>) {
        *self.maximum = from.maximum;
        *self.total = from.total;
        self.values.copy_from_slice(from.values);
    }

    fn as_ref(&self) -> RowSums<'_, R> {
        RowSums {
            maximum: *self.maximum,
            total: *self.total,
            values: self.values,
        }
    }
}

struct Result<'a, E: Stored> {
    d_output: usize,
    output: Shared<'a, E>,
    log_sum_exp: Shared<'a, E::Real>,
}

impl<E: Stored> Result<'_, E> {
    /// Writes the output and the log-sum-exp of a row of `[batch_size, n_heads, query_length]`.
    fn finish(&self, sizes: &Sizes, row: usize, sums: RowSums<'_, E::Real>) {
        // A query without keys: zeros, and the negative infinity that is there.
        let empty = sums.total == E::Real::default();
        let log_sum_exp = match empty {
            true => E::Real::NEG_INFINITY,
            false => sums.maximum + sums.total.ln(),
        };
        let (head_row, query) = (row / sizes.query_length, row % sizes.query_length);
        let (batch, head) = (head_row / sizes.n_heads, head_row % sizes.n_heads);
        let at = (batch * sizes.query_length + query) * sizes.n_heads + head;
        // Safety: each row is finished once.
        unsafe {
            let output = self.output.part(at * self.d_output, self.d_output);
            let (output, more) = output.split_at_mut(sizes.d_value);
            if !empty {
                for (output, value) in output.iter_mut().zip(sums.values) {
                    *output = E::from_real(*value / sums.total);
                }
            }
            if let [column] = more {
                *column = E::from_real(log_sum_exp);
            }
            self.log_sum_exp.part(row, 1)[0] = log_sum_exp;
        }
    }
}

/// One query block of one head.
struct Task<'a> {
    batch: usize,
    head: usize,
    query_block: usize,
    /// The rows of the part in this block, and which queries they are.
    rows: std::ops::Range<usize>,
    query_order: Option<&'a [u32]>,
}

impl Task<'_> {
    fn query(&self, i: usize) -> usize {
        let row = self.rows.start + i;
        self.query_order.map_or(row, |order| order[row] as usize)
    }

    /// The row of `[batch_size, n_heads, query_length]`.
    fn head_row(&self, sizes: &Sizes, i: usize) -> usize {
        (self.batch * sizes.n_heads + self.head) * sizes.query_length + self.query(i)
    }
}

/// Keys and values of one head, packed for a part.
struct Packed<R> {
    keys: Vec<R>,
    values: Vec<R>,
}

/// Private memory of a thread.
struct Scratch<R> {
    query: Vec<R>,
    scores: Vec<R>,
    sums: Sums<R>,
}

/// Runs all tiles of a part, from the sums so far (`state`, else from the sinks), and hands each to `done`.
fn run_part<E: Stored>(
    problem: &Problem<'_, E>,
    part: &Part,
    state: Option<&SharedSums<'_, E::Real>>,
    done: impl Fn(&Sums<E::Real>, &Task<'_>) + Sync,
) {
    let sizes = problem.sizes();
    let (n_queries, n_keys) = (part.query_length(), part.key_length());
    let packed: Vec<Packed<E::Real>> = (0..sizes.batch_size * sizes.n_kv_heads)
        .into_par_iter()
        .map(|i| {
            let at = [i / sizes.n_kv_heads, i % sizes.n_kv_heads];
            let one = E::Real::from_f64(1.0);
            Packed {
                keys: pack_columns(problem.key, at, part.key_order()),
                values: pack_rows(problem.value, at, part.key_order(), one),
            }
        })
        .collect();
    let key_positions = positions(n_keys, part.key_order());
    let arch = Arch::new();
    let n_blocks = n_queries.div_ceil(BLOCK);
    (0..sizes.batch_size * sizes.n_heads * n_blocks)
        .into_par_iter()
        // The tiles of a causal pattern differ in length: single ones even that out.
        .with_max_len(1)
        .for_each_init(
            || Scratch {
                query: vec![E::Real::default(); BLOCK * padded(sizes.d_head)],
                scores: vec![E::Real::default(); BLOCK * CHUNK * BLOCK],
                sums: Sums::new(BLOCK, padded(sizes.d_value)),
            },
            |scratch, i| {
                let (head_row, query_block) = (i / n_blocks, n_blocks - 1 - i % n_blocks);
                let (batch, head) = (head_row / sizes.n_heads, head_row % sizes.n_heads);
                let first = query_block * BLOCK;
                let task = Task {
                    batch,
                    head,
                    query_block,
                    rows: first..n_queries.min(first + BLOCK),
                    query_order: part.query_order(),
                };
                begin(problem, &task, state, scratch);
                arch.dispatch(Tile {
                    problem,
                    layout: part.layout(batch, head),
                    key_order: part.key_order(),
                    key_positions: &key_positions,
                    packed: &packed[batch * sizes.n_kv_heads + sizes.kv_head(head)],
                    task: &task,
                    scratch,
                });
                done(&scratch.sums, &task);
            },
        );
}

/// Fetches the queries of a tile, and what is known of them.
fn begin<E: Stored>(
    problem: &Problem<'_, E>,
    task: &Task<'_>,
    state: Option<&SharedSums<'_, E::Real>>,
    scratch: &mut Scratch<E::Real>,
) {
    let sizes = problem.sizes();
    let width = padded(sizes.d_head);
    for i in 0..task.rows.len() {
        let at = [task.batch, task.head, task.query(i)];
        let row = &mut scratch.query[i * width..(i + 1) * width];
        problem.query.copy_row(at, problem.scores.scale, row);
        let sums = scratch.sums.row_mut(i);
        match (state, &problem.sinks) {
            (Some(state), _) => {
                // Safety: the row is in this task alone.
                sums.copy_from(unsafe { state.row(task.head_row(&sizes, i)) }.as_ref());
            }
            (None, sinks) => {
                let sink = sinks.as_ref().map(|sinks| sinks[task.head]);
                *sums.maximum = sink.unwrap_or(E::Real::NEG_INFINITY);
                *sums.total = E::Real::from_f64(if sink.is_some() { 1.0 } else { 0.0 });
                sums.values.fill(E::Real::default());
            }
        }
    }
}

/// One tile: everything that its queries see in one part.
struct Tile<'a, 'b, E: Stored> {
    problem: &'a Problem<'b, E>,
    layout: &'a Layout,
    key_order: Option<&'a [u32]>,
    key_positions: &'a [E::Real],
    packed: &'a Packed<E::Real>,
    task: &'a Task<'a>,
    scratch: &'a mut Scratch<E::Real>,
}

impl<E: Stored> WithSimd for Tile<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let spans = self.layout.rows().spans(self.task.query_block);
        let head = Head::new(self.problem, self.task.batch, self.task.head);
        let mut chunk = [Block {
            index: 0,
            mask: None,
        }; CHUNK];
        let mut n = 0;
        for block in blocks(self.problem.schedule.masks(), spans) {
            chunk[n] = block;
            n += 1;
            if n == CHUNK {
                self.chunk(simd, &head, &chunk);
                n = 0;
            }
        }
        if n > 0 {
            self.chunk(simd, &head, &chunk[..n]);
        }
    }
}

impl<E: Stored> Tile<'_, '_, E> {
    /// Takes some key blocks into the sums.
    #[inline(always)]
    fn chunk<S: Simd>(&mut self, simd: S, head: &Head<'_, E>, chunk: &[Block<'_>]) {
        let sizes = self.problem.sizes();
        let n_rows = self.task.rows.len();
        let scores = self.scratch.scores.as_mut_ptr();
        let score_stride = CHUNK * BLOCK;
        // Safety: the offsets are those of rows and blocks inside the buffers, which are made for them.
        unsafe {
            let query = Left::new(self.scratch.query.as_ptr(), padded(sizes.d_head), 1);
            for (b, block) in chunk.iter().enumerate() {
                let panel = sizes.d_head * BLOCK;
                let keys = Rows::new(
                    self.packed.keys[block.index * panel..][..panel].as_ptr(),
                    BLOCK,
                );
                let to = Rows::new(scores.add(b * BLOCK), score_stride);
                let shape = [n_rows, BLOCK, sizes.d_head];
                tile::product::<_, S, false>(simd, shape, query, keys, to);
            }
            let plain = head.is_plain();
            for i in 0..n_rows {
                let row = scores.add(i * score_stride);
                for (b, block) in chunk.iter().enumerate() {
                    let visible = block.mask.map(|mask| mask[i]);
                    if plain && visible.is_none() {
                        continue;
                    }
                    let place = self.place(i, block, visible);
                    head.apply(simd, &place, row.add(b * BLOCK), None);
                }
                self.take_row(simd, i, row, chunk.len() * BLOCK);
                if head.dropout.is_some() {
                    for (b, block) in chunk.iter().enumerate() {
                        let place = self.place(i, block, None);
                        for (j, kept) in head.kept(&place).into_iter().flatten().enumerate() {
                            let weight = row.add(b * BLOCK + j);
                            *weight = *weight * kept;
                        }
                    }
                }
            }
            self.add_values(simd, chunk);
        }
    }

    fn place(&self, i: usize, block: &Block<'_>, visible: Option<u64>) -> Row<'_, E> {
        let query = self.task.query(i);
        let first_key = block.index * BLOCK;
        Row {
            query,
            position: E::Real::from_f64((self.problem.first_position() + query) as f64),
            key_positions: &self.key_positions[first_key..first_key + BLOCK],
            first_key,
            key_order: self.key_order,
            visible,
        }
    }

    /// Turns the `n` scores of a row into weights, and brings its sums to the new maximum.
    #[inline(always)]
    unsafe fn take_row<S: Simd>(&mut self, simd: S, i: usize, scores: *mut E::Real, n: usize) {
        let lanes = lanes::<E::Real, S>();
        let sums = self.scratch.sums.row_mut(i);
        // Safety: `n` scores are there, and `n` and the width of the values are multiples of the lanes.
        unsafe {
            let mut largest = E::Real::splat(simd, E::Real::NEG_INFINITY);
            for j in (0..n).step_by(lanes) {
                largest = E::Real::vmax(simd, largest, E::Real::load(simd, scores.add(j)));
            }
            let largest = E::Real::reduce_max(simd, largest);
            let old = *sums.maximum;
            let new = if largest > old { largest } else { old };
            let mut shift = new;
            if new == E::Real::NEG_INFINITY {
                let scores = std::slice::from_raw_parts_mut(scores, n);
                if scores.iter().all(|score| *score == E::Real::NEG_INFINITY) {
                    // Nothing is visible so far.
                    scores.fill(E::Real::default());
                    return;
                }
                // A maximum may overlook NaN, the weights must not.
                shift = E::Real::default();
            }
            let shift = E::Real::splat(simd, shift);
            let mut total = E::Real::splat(simd, E::Real::default());
            for j in (0..n).step_by(lanes) {
                let x = E::Real::vsub(simd, E::Real::load(simd, scores.add(j)), shift);
                let weight = E::Real::vexp(simd, x);
                E::Real::store(simd, scores.add(j), weight);
                total = E::Real::vadd(simd, total, weight);
            }
            let total = E::Real::reduce_sum(simd, total);
            if new > old && *sums.total != E::Real::default() {
                let factor = (old - new).exp();
                *sums.total = *sums.total * factor;
                let vector = E::Real::splat(simd, factor);
                let values = sums.values.as_mut_ptr();
                for j in (0..sums.values.len()).step_by(lanes) {
                    let x = E::Real::load(simd, values.add(j));
                    E::Real::store(simd, values.add(j), E::Real::vmul(simd, x, vector));
                }
            }
            *sums.maximum = new;
            *sums.total += total;
        }
    }

    /// Adds the weighted values of some key blocks; blocks that follow each other are one product.
    #[inline(always)]
    unsafe fn add_values<S: Simd>(&mut self, simd: S, chunk: &[Block<'_>]) {
        let width = padded(self.problem.sizes().d_value);
        let mut b = 0;
        while b < chunk.len() {
            let mut n = 1;
            while b + n < chunk.len() && chunk[b + n].index == chunk[b].index + n {
                n += 1;
            }
            // Safety: as in `chunk`.
            unsafe {
                let weights = Left::new(
                    self.scratch.scores.as_ptr().add(b * BLOCK),
                    CHUNK * BLOCK,
                    1,
                );
                let first = chunk[b].index * BLOCK * width;
                let values = Rows::new(
                    self.packed.values[first..][..n * BLOCK * width].as_ptr(),
                    width,
                );
                let to = Rows::new(self.scratch.sums.values.as_mut_ptr(), width);
                let shape = [self.task.rows.len(), width, n * BLOCK];
                tile::product::<_, S, true>(simd, shape, weights, values, to);
            }
            b += n;
        }
    }
}
