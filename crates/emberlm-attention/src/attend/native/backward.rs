//! The backward pass: weights are computed again from the saved log-sum-exp.
//!
//! Dao et al. 2022, appendix B, <https://arxiv.org/abs/2205.14135>. With `p = e^(s - lse)`, `delta = sum(do * o)` and
//! `dlse` the gradient of the log-sum-exp:
//!
//! ```text
//! dv = p^T do        dp = do v^T        ds = p (dp - delta + dlse)
//! dq = scale ds k    dk = scale ds^T q
//! ```
//!
//! Each pair of blocks is computed once, for all three gradients.

use std::ops::Range;

use emberlm_core::{Layout, Part};
use emberlm_kernels::{
    Buffer, Real, Scratch, Shared, Stored, View, each_vector, kernel, lanes,
    tile::{self, Left, Rows},
};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    BLOCK,
    blocks::{Block, blocks},
    problem::{
        Problem, Sizes, pack_columns, pack_rows, packed_columns, packed_rows, padded, positions,
    },
    scores::{Head, Row},
};

/// What the backward pass gets from the forward pass and from behind it.
pub(super) struct Saved<'a, E: Stored> {
    /// `[batch_size, n_heads, query_length, d_output]`
    pub(super) output: View<'a, E>,
    /// `[batch_size, n_heads, query_length]`
    pub(super) log_sum_exp: &'a [E::Real],
    /// Gradient of the output, of the same shape.
    pub(super) d_output: View<'a, E>,
}

/// Gradients, each in the order of rows by heads: `[batch_size, length, heads, width]`.
pub(super) struct Gradients<E: Stored> {
    pub(super) query: Vec<E>,
    pub(super) key: Vec<E>,
    pub(super) value: Vec<E>,
    /// In the bias' own shape; empty if it is not asked for.
    pub(super) bias: Vec<E::Real>,
    /// `[n_heads]`; empty without sinks.
    pub(super) sinks: Vec<E::Real>,
}

/// Runs the backward pass. Heads are the tasks; what several heads add to is summed in a fixed order, so the result
/// does not depend on the number of threads.
pub(super) fn backward<E: Stored>(
    problem: &Problem<'_, E>,
    saved: &Saved<'_, E>,
    with_bias: bool,
) -> Gradients<E> {
    let sizes = problem.sizes();
    let n_queries = sizes.batch_size * sizes.query_length * sizes.n_heads;
    let n_keys = sizes.batch_size * sizes.key_length * sizes.n_kv_heads;
    let mut query = Buffer::new(n_queries * sizes.d_head);
    let mut key = Buffer::new(n_keys * sizes.d_head);
    let mut value = Buffer::new(n_keys * sizes.d_value);
    let bias_dims = problem.bias.map(|bias| bias.dims()).filter(|_| with_bias);
    let mut bias = vec![E::Real::default(); bias_dims.map_or(0, |dims| dims.iter().product())];
    let n_heads = sizes.batch_size * sizes.n_heads;
    let mut sinks_by_head = vec![E::Real::default(); n_heads];

    let shared = Outputs {
        query: query.shared(),
        key: key.shared(),
        value: value.shared(),
        bias: Shared::new(&mut bias),
        with_bias,
        sinks: Shared::new(&mut sinks_by_head),
    };
    // Heads of one key/value head, and heads that see the same bias, add to the same gradients: one task each.
    let tasks = tasks(&sizes, bias_dims);
    let parts: Vec<PartPositions<'_, E::Real>> = problem
        .schedule
        .parts()
        .iter()
        .map(|part| PartPositions {
            part,
            keys: positions(part.key_length(), part.key_order()),
        })
        .collect();
    let scratch = Scratch::new(tasks.len(), || Memory::with_room(problem));
    tasks.into_par_iter().with_max_len(1).for_each(|heads| {
        scratch.lend(|memory| run_heads(problem, saved, &parts, &heads, &shared, memory));
    });
    let sinks = match problem.sinks {
        None => Vec::new(),
        Some(_) => (0..sizes.n_heads)
            .map(|head| {
                let mut sum = E::Real::default();
                for batch in 0..sizes.batch_size {
                    sum += sinks_by_head[batch * sizes.n_heads + head];
                }
                sum
            })
            .collect(),
    };
    // Safety: each head of the query, and each key/value head, is in one task, which writes all its rows.
    let (query, key, value) = unsafe { (query.finish(), key.finish(), value.finish()) };
    Gradients {
        query,
        key,
        value,
        bias,
        sinks,
    }
}

struct PartPositions<'a, R> {
    part: &'a Part,
    keys: Vec<R>,
}

struct Outputs<'a, E: Stored> {
    query: Shared<'a, E>,
    key: Shared<'a, E>,
    value: Shared<'a, E>,
    bias: Shared<'a, E::Real>,
    with_bias: bool,
    sinks: Shared<'a, E::Real>,
}

/// The heads, as `batch * n_heads + head`, of each task.
fn tasks(sizes: &Sizes, bias_dims: Option<[usize; 4]>) -> Vec<Vec<usize>> {
    let group = sizes.n_heads / sizes.n_kv_heads;
    let mut tasks: Vec<Vec<usize>> = (0..sizes.batch_size * sizes.n_kv_heads)
        .map(|i| (i * group..(i + 1) * group).collect())
        .collect();
    if let Some([n_batch, n_heads, ..]) = bias_dims {
        let share_batch = n_batch == 1 && sizes.batch_size > 1;
        let share_heads = n_heads == 1 && sizes.n_heads > 1;
        let bias_of = |heads: &[usize]| {
            let (batch, kv_head) = (heads[0] / sizes.n_heads, heads[0] % sizes.n_heads / group);
            [
                if share_batch { 0 } else { batch },
                if share_heads { 0 } else { kv_head },
            ]
        };
        tasks.sort_by_key(|heads| bias_of(heads));
        tasks = tasks
            .chunk_by(|a, b| bias_of(a) == bias_of(b))
            .map(<[Vec<usize>]>::concat)
            .collect();
    }
    tasks
}

/// Private memory of a task.
struct Memory<R> {
    sums: HeadSums<R>,
    rows: QueryRows<R>,
    /// Of each part.
    keys: Vec<PackedKeys<R>>,
    queries: PackedQueries<R>,
    /// Gradient of the queries, in the order of a part.
    d_query: Vec<R>,
    pair: PairMemory<R>,
}

/// What is summed over blocks, in the order of the sequence.
struct HeadSums<R> {
    query: Vec<R>,
    key: Vec<R>,
    value: Vec<R>,
}

impl<R: Real> Memory<R> {
    /// With room for what tasks put there.
    fn with_room<E: Stored<Real = R>>(problem: &Problem<'_, E>) -> Self {
        let sizes = problem.sizes();
        let (d_head, d_value) = (padded(sizes.d_head), padded(sizes.d_value));
        let parts = problem.schedule.parts();
        let (n_queries, n_keys) = (sizes.query_length, sizes.key_length);
        let of_parts = || parts.iter().map(Part::query_length);
        let n_ordered =
            (parts.iter().filter(|part| part.query_order().is_some())).map(Part::query_length);
        let room = Vec::with_capacity;
        let zeros = |n| vec![R::default(); n];
        Self {
            sums: HeadSums {
                query: room(n_queries * d_head),
                key: room(n_keys * d_head),
                value: room(n_keys * d_value),
            },
            rows: QueryRows {
                log_sum_exp: room(n_queries),
                delta: room(n_queries),
            },
            keys: (parts.iter().map(Part::key_length))
                .map(|n| PackedKeys {
                    keys: room(packed_rows(n, sizes.d_head)),
                    key_columns: room(packed_columns(n, sizes.d_head)),
                    value_columns: room(packed_columns(n, sizes.d_value)),
                })
                .collect(),
            queries: {
                let n = of_parts().max().unwrap_or(0);
                PackedQueries {
                    queries: room(packed_rows(n, sizes.d_head)),
                    d_outputs: room(packed_rows(n, sizes.d_value)),
                    rows: QueryRows {
                        log_sum_exp: room(n),
                        delta: room(n),
                    },
                }
            },
            d_query: room(n_ordered.max().unwrap_or(0) * d_head),
            pair: PairMemory {
                scores: zeros(BLOCK * BLOCK),
                weights: zeros(BLOCK * BLOCK),
                cap_slopes: zeros(BLOCK),
                key: zeros(BLOCK * d_head),
                value: zeros(BLOCK * d_value),
            },
        }
    }
}

fn set_to_zeros<R: Real>(sums: &mut Vec<R>, n: usize) {
    sums.clear();
    sums.resize(n, R::default());
}

/// Some heads after another; those of one key/value head follow each other.
fn run_heads<E: Stored>(
    problem: &Problem<'_, E>,
    saved: &Saved<'_, E>,
    parts: &[PartPositions<'_, E::Real>],
    heads: &[usize],
    outputs: &Outputs<'_, E>,
    memory: &mut Memory<E::Real>,
) {
    let sizes = problem.sizes();
    let (d_head, d_value) = (padded(sizes.d_head), padded(sizes.d_value));
    let group = sizes.n_heads / sizes.n_kv_heads;
    let Memory {
        sums,
        rows,
        keys,
        queries,
        d_query,
        pair,
    } = memory;
    for (i, head_row) in heads.iter().copied().enumerate() {
        let (batch, head) = (head_row / sizes.n_heads, head_row % sizes.n_heads);
        set_to_zeros(&mut sums.query, sizes.query_length * d_head);
        if i % group == 0 {
            let at = [batch, sizes.kv_head(head)];
            for (keys, parts) in keys.iter_mut().zip(parts) {
                keys.pack(problem, parts.part, at);
            }
            set_to_zeros(&mut sums.key, sizes.key_length * d_head);
            set_to_zeros(&mut sums.value, sizes.key_length * d_value);
        }
        rows.fill(problem, saved, [batch, head]);
        for (PartPositions { part, keys }, packed) in parts.iter().zip(&*keys) {
            let order = part.query_order();
            queries.pack(problem, saved, [batch, head], order, rows);
            if let Some(order) = order {
                set_to_zeros(d_query, order.len() * d_head);
            }
            let pass = Pass {
                problem,
                part,
                layout: part.layout(batch, head),
                head: Head::new(problem, batch, head),
                bias_row: problem
                    .bias_at(batch, head)
                    .map_or(0, |(bias, [b, h])| b * bias.dims()[1] + h),
                key_positions: keys,
                queries,
                packed,
            };
            Arch::new().dispatch(Work {
                pass: &pass,
                outputs,
                d_query: match order {
                    None => &mut sums.query,
                    Some(_) => d_query,
                },
                d_key: &mut sums.key,
                d_value: &mut sums.value,
                memory: pair,
            });
            if order.is_some() {
                add_rows(&mut sums.query, d_query, d_head, 0, order);
            }
        }
        let one = E::Real::from_f64(1.0);
        // Safety: this task is the only one with these heads.
        unsafe {
            if let Some(sink) = problem.sink(head) {
                outputs.sinks.part(head_row, 1)[0] = rows.d_sink(sink);
            }
            let at = [batch, head, sizes.n_heads];
            write(
                &outputs.query,
                at,
                &sums.query,
                sizes.d_head,
                problem.scores.scale,
            );
            if (i + 1) % group == 0 {
                let at = [batch, sizes.kv_head(head), sizes.n_kv_heads];
                write(&outputs.key, at, &sums.key, sizes.d_head, one);
                write(&outputs.value, at, &sums.value, sizes.d_value, one);
            }
        }
    }
}

/// Writes the rows of one head, times `scale`, into `[batch_size, length, n_heads, width]`.
///
/// # Safety
///
/// Nobody else has the rows of this head.
unsafe fn write<E: Stored>(
    to: &Shared<'_, E>,
    at: [usize; 3],
    rows: &[E::Real],
    width: usize,
    scale: E::Real,
) {
    write_rows(to, at, rows, width, scale);
}

kernel! {
    fn write_rows<'a, E: Stored>(
        _simd: S,
        to: &'a Shared<'a, E>,
        at: [usize; 3],
        rows: &'a [E::Real],
        width: usize,
        scale: E::Real,
    ) -> () {
        let [batch, head, n_heads] = at;
        let length = rows.len() / padded(width);
        for (i, row) in rows.chunks_exact(padded(width)).enumerate() {
            let at = (batch * length + i) * n_heads + head;
            // Safety: that of `write`, which is the only caller.
            let to = unsafe { to.part(at * width, width) };
            for (to, x) in to.iter_mut().zip(row) {
                *to = E::from_real(*x * scale);
            }
        }
    }
}

/// What the queries of one head bring.
struct QueryRows<R> {
    /// `lse`; zero for a query without keys, whose scores are all hidden.
    log_sum_exp: Vec<R>,
    /// `delta - dlse`
    delta: Vec<R>,
}

impl<R: Real> QueryRows<R> {
    /// In the order of the sequence.
    fn fill<E: Stored<Real = R>>(
        &mut self,
        problem: &Problem<'_, E>,
        saved: &Saved<'_, E>,
        [batch, head]: [usize; 2],
    ) {
        let sizes = problem.sizes();
        let first = (batch * sizes.n_heads + head) * sizes.query_length;
        let log_sum_exp = &saved.log_sum_exp[first..][..sizes.query_length];
        self.delta.resize(sizes.query_length, R::default());
        dots(
            saved.output.first_columns(sizes.d_value),
            saved.d_output.first_columns(sizes.d_value),
            [batch, head],
            &mut self.delta,
        );
        self.log_sum_exp.clear();
        for (query, (lse, delta)) in log_sum_exp.iter().zip(&mut self.delta).enumerate() {
            if *lse == R::NEG_INFINITY {
                // A query without keys has no gradient, whatever comes from behind.
                *delta = R::default();
                self.log_sum_exp.push(R::default());
                continue;
            }
            self.log_sum_exp.push(*lse);
            if problem.with_log_sum_exp {
                let at = [batch, head, query, sizes.d_value];
                *delta = *delta - saved.d_output.at(at).to_real();
            }
        }
    }

    /// Those of `all` in the order of a part.
    fn pick(&mut self, all: &Self, order: Option<&[u32]>) {
        for (to, from) in [
            (&mut self.log_sum_exp, &all.log_sum_exp),
            (&mut self.delta, &all.delta),
        ] {
            to.clear();
            match order {
                None => to.extend_from_slice(from),
                Some(order) => to.extend(order.iter().map(|i| from[*i as usize])),
            }
        }
    }

    /// The gradient of a sink, which has no value: `sum -p delta`.
    fn d_sink(&self, sink: R) -> R {
        let mut sum = R::default();
        for (lse, delta) in self.log_sum_exp.iter().zip(&self.delta) {
            sum += -((sink - *lse).exp() * *delta);
        }
        sum
    }
}

/// Keys by rows and by columns, values by columns, in the order of a part: what the heads of a group share.
struct PackedKeys<R> {
    keys: Vec<R>,
    key_columns: Vec<R>,
    value_columns: Vec<R>,
}

impl<R: Real> PackedKeys<R> {
    fn pack<E: Stored<Real = R>>(&mut self, problem: &Problem<'_, E>, part: &Part, at: [usize; 2]) {
        let (order, one) = (part.key_order(), R::from_f64(1.0));
        pack_rows(problem.key, at, order, one, &mut self.keys);
        pack_columns(problem.key, at, order, &mut self.key_columns);
        pack_columns(problem.value, at, order, &mut self.value_columns);
    }
}

/// Of the queries of one head, in the order of a part.
struct PackedQueries<R> {
    /// Times the scale.
    queries: Vec<R>,
    /// Gradients of the output.
    d_outputs: Vec<R>,
    rows: QueryRows<R>,
}

impl<R: Real> PackedQueries<R> {
    fn pack<E: Stored<Real = R>>(
        &mut self,
        problem: &Problem<'_, E>,
        saved: &Saved<'_, E>,
        at: [usize; 2],
        order: Option<&[u32]>,
        rows: &QueryRows<R>,
    ) {
        let d_output = saved.d_output.first_columns(problem.sizes().d_value);
        let (scale, one) = (problem.scores.scale, R::from_f64(1.0));
        pack_rows(problem.query, at, order, scale, &mut self.queries);
        pack_rows(d_output, at, order, one, &mut self.d_outputs);
        self.rows.pick(rows, order);
    }
}

/// One part of one head.
struct Pass<'a, 'b, E: Stored> {
    problem: &'a Problem<'b, E>,
    part: &'a Part,
    layout: &'a Layout,
    head: Head<'a, E>,
    bias_row: usize,
    key_positions: &'a [E::Real],
    queries: &'a PackedQueries<E::Real>,
    packed: &'a PackedKeys<E::Real>,
}

impl<E: Stored> Pass<'_, '_, E> {
    fn n_queries(&self) -> usize {
        self.queries.rows.delta.len()
    }
}

kernel! {
    /// The products of the rows of one head.
    fn dots<'a, E: Stored>(
        simd: S,
        a: View<'a, E>,
        b: View<'a, E>,
        at: [usize; 2],
        to: &'a mut [E::Real],
    ) -> () {
        let [.., width] = a.dims();
        let one = E::Real::from_f64(1.0);
        let mut row_a = vec![E::Real::default(); width];
        let mut row_b = row_a.clone();
        for (i, to) in to.iter_mut().enumerate() {
            a.copy_row([at[0], at[1], i], one, &mut row_a);
            b.copy_row([at[0], at[1], i], one, &mut row_b);
            let mut sum = E::Real::splat(simd, E::Real::default());
            each_vector!(E::Real, S, width, |j, n| {
                // Safety: both rows have `n` elements from `j` on.
                unsafe {
                    let a = E::Real::load_some(simd, row_a.as_ptr().add(j), n);
                    let b = E::Real::load_some(simd, row_b.as_ptr().add(j), n);
                    sum = E::Real::vmul_add(simd, a, b, sum);
                }
            });
            *to = E::Real::reduce_sum(simd, sum);
        }
    }
}

/// Adds rows to those from `first` on, in the order of a part, of a whole sequence.
#[inline(always)]
fn add_rows<R: Real>(to: &mut [R], rows: &[R], width: usize, first: usize, order: Option<&[u32]>) {
    for (i, row) in rows.chunks_exact(width).enumerate() {
        let at = order.map_or(first + i, |order| order[first + i] as usize);
        for (to, x) in to[at * width..(at + 1) * width].iter_mut().zip(row) {
            *to += *x;
        }
    }
}

/// What is computed of one pair of blocks, and the sums of one key block.
struct PairMemory<R> {
    /// Scores, then their gradients: `[BLOCK queries][BLOCK keys]`.
    scores: Vec<R>,
    /// Gradients of the weights, then the weights.
    weights: Vec<R>,
    /// Derivatives of the cap, for one row.
    cap_slopes: Vec<R>,
    key: Vec<R>,
    value: Vec<R>,
}

struct Work<'a, 'b, E: Stored> {
    pass: &'a Pass<'a, 'b, E>,
    outputs: &'a Outputs<'a, E>,
    /// In the order of the part.
    d_query: &'a mut [E::Real],
    /// In the order of the sequence.
    d_key: &'a mut [E::Real],
    d_value: &'a mut [E::Real],
    memory: &'a mut PairMemory<E::Real>,
}

impl<E: Stored> WithSimd for Work<'_, '_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let pass = self.pass;
        let sizes = pass.problem.sizes();
        let (d_head, d_value) = (padded(sizes.d_head), padded(sizes.d_value));
        let n_keys = pass.part.key_length();
        for key_block in 0..n_keys.div_ceil(BLOCK) {
            let column = pass.layout.columns().spans(key_block);
            if column.is_empty() {
                continue;
            }
            let first = key_block * BLOCK;
            let n = BLOCK.min(n_keys - first);
            self.memory.key.fill(E::Real::default());
            self.memory.value.fill(E::Real::default());
            for block in blocks(pass.problem.schedule.masks(), column) {
                // Safety: the blocks are the layout's, and the buffers are made for its part.
                unsafe { self.pair(simd, &block, key_block) };
            }
            let order = pass.part.key_order();
            add_rows(
                self.d_key,
                &self.memory.key[..n * d_head],
                d_head,
                first,
                order,
            );
            add_rows(
                self.d_value,
                &self.memory.value[..n * d_value],
                d_value,
                first,
                order,
            );
        }
    }
}

impl<E: Stored> Work<'_, '_, E> {
    /// One query block against one key block.
    #[inline(always)]
    unsafe fn pair<S: Simd>(&mut self, simd: S, block: &Block<'_>, key_block: usize) {
        let pass = self.pass;
        let sizes = pass.problem.sizes();
        let (d_head, d_value) = (padded(sizes.d_head), padded(sizes.d_value));
        let (first_query, first_key) = (block.index * BLOCK, key_block * BLOCK);
        let n_queries = BLOCK.min(pass.n_queries() - first_query);
        let n_keys = pass.part.key_length() - first_key;
        let n_keys = BLOCK.min(n_keys);
        let scores = self.memory.scores.as_mut_ptr();
        let weights = self.memory.weights.as_mut_ptr();
        // Safety: all pointers are to whole blocks of buffers that are padded to whole blocks and vectors.
        unsafe {
            let query = pass.queries.queries.as_ptr().add(first_query * d_head);
            let d_output = pass.queries.d_outputs.as_ptr().add(first_query * d_value);
            let key = pass.packed.keys.as_ptr().add(first_key * d_head);
            let key_columns = pass
                .packed
                .key_columns
                .as_ptr()
                .add(first_key * sizes.d_head);
            let value_columns = pass
                .packed
                .value_columns
                .as_ptr()
                .add(first_key * sizes.d_value);
            let d_query = self.d_query[first_query * d_head..][..n_queries * d_head].as_mut_ptr();

            let d_value_sums = self.memory.value.as_mut_ptr();
            let d_key_sums = self.memory.key.as_mut_ptr();

            for strip in block.strips(n_queries).iter() {
                let (row, first, n) = (strip.first_row, strip.first_key, strip.n_rows);
                let n_there = strip.n_keys.min(n_keys - first);
                let query = query.add(row * d_head);
                let d_output = d_output.add(row * d_value);
                let scores = scores.add(row * BLOCK + first);
                let weights = weights.add(row * BLOCK + first);
                tile::product::<_, S, false>(
                    simd,
                    [n, strip.n_keys, sizes.d_head],
                    Left::new(query, d_head, 1),
                    Rows::new(key_columns.add(first), BLOCK),
                    Rows::new(scores, BLOCK),
                );
                tile::product::<_, S, false>(
                    simd,
                    [n, strip.n_keys, sizes.d_value],
                    Left::new(d_output, d_value, 1),
                    Rows::new(value_columns.add(first), BLOCK),
                    Rows::new(weights, BLOCK),
                );
                for i in row..row + n {
                    self.row(simd, i, block, key_block, first..first + strip.n_keys);
                }
                tile::product::<_, S, true>(
                    simd,
                    [n_there, d_value, n],
                    Left::new(weights, 1, BLOCK),
                    Rows::new(d_output, d_value),
                    Rows::new(d_value_sums.add(first * d_value), d_value),
                );
                tile::product::<_, S, true>(
                    simd,
                    [n_there, d_head, n],
                    Left::new(scores, 1, BLOCK),
                    Rows::new(query, d_head),
                    Rows::new(d_key_sums.add(first * d_head), d_head),
                );
                tile::product::<_, S, true>(
                    simd,
                    [n, d_head, n_there],
                    Left::new(scores, BLOCK, 1),
                    Rows::new(key.add(first * d_head), d_head),
                    Rows::new(d_query.add(row * d_head), d_head),
                );
            }
        }
    }

    /// Turns the products of one query with some keys into gradients of scores, and the gradients of its weights into
    /// weights.
    #[inline(always)]
    unsafe fn row<S: Simd>(
        &mut self,
        simd: S,
        i: usize,
        block: &Block<'_>,
        key_block: usize,
        keys: Range<usize>,
    ) {
        let lanes = lanes::<E::Real, S>();
        let pass = self.pass;
        let row_in_part = block.index * BLOCK + i;
        let visible = block.mask.map(|mask| mask[i]);
        let place = Row::new(
            pass.problem,
            pass.part,
            pass.key_positions,
            row_in_part,
            key_block,
            visible,
        );
        // Safety: rows of BLOCK elements, a multiple of the lanes.
        unsafe {
            let scores = self.memory.scores.as_mut_ptr().add(i * BLOCK);
            let weights = self.memory.weights.as_mut_ptr().add(i * BLOCK);
            if !pass.head.is_plain() || place.visible.is_some() {
                let slopes = self.memory.cap_slopes.as_mut_ptr();
                pass.head.apply(simd, &place, scores, Some(slopes));
            }
            let kept = pass.head.kept(&place);
            let lse = E::Real::splat(simd, pass.queries.rows.log_sum_exp[row_in_part]);
            let delta = E::Real::splat(simd, pass.queries.rows.delta[row_in_part]);
            for j in keys.clone().step_by(lanes) {
                let score = E::Real::load(simd, scores.add(j));
                let mut weight = E::Real::vexp(simd, E::Real::vsub(simd, score, lse));
                let mut d_weight = E::Real::load(simd, weights.add(j));
                let undropped = weight;
                if let Some(kept) = &kept {
                    let kept = E::Real::load(simd, kept.as_ptr().add(j));
                    weight = E::Real::vmul(simd, weight, kept);
                    d_weight = E::Real::vmul(simd, d_weight, kept);
                }
                let d_score = E::Real::vmul(simd, undropped, E::Real::vsub(simd, d_weight, delta));
                E::Real::store(simd, weights.add(j), weight);
                E::Real::store(simd, scores.add(j), d_score);
            }
            if let (Some((bias, _)), true) = (&pass.head.bias, self.outputs.with_bias) {
                let [_, _, n_queries, n_keys] = bias.dims();
                let row = (pass.bias_row * n_queries + place.query) * n_keys;
                for j in keys.start..keys.end.min(pass.head.n_keys(&place)) {
                    let at = row + pass.head.key(&place, j);
                    // All heads that see this bias are in one task.
                    self.outputs.bias.part(at, 1)[0] += *scores.add(j);
                }
            }
            if pass.head.cap.is_some() {
                for j in keys.clone().step_by(lanes) {
                    let slope = E::Real::load(simd, self.memory.cap_slopes.as_ptr().add(j));
                    let d_score = E::Real::load(simd, scores.add(j));
                    E::Real::store(simd, scores.add(j), E::Real::vmul(simd, d_score, slope));
                }
            }
        }
    }
}
