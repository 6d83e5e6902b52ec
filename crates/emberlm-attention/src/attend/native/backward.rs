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
    Buffer, Real, Scratch, Shared, Stored, View, kernel, lanes,
    tile::{self, Left, Rows},
};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    BLOCK,
    backward_memory::{Memory, PackedKeys, PackedQueries, PairMemory, adds_once, set_to_zeros},
    blocks::{Block, blocks},
    problem::{Problem, Sizes, padded, positions},
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
    // Safety: each head of the query, and each key/value head, is in one task, which writes all its rows: those of keys
    // from its sums, or block by block, where a part's order names each key once.
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
    let adds_once = adds_once(problem);
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
            if !adds_once {
                set_to_zeros(&mut sums.key, sizes.key_length * d_head);
                set_to_zeros(&mut sums.value, sizes.key_length * d_value);
            }
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
                sums: (!adds_once).then_some([&mut sums.key, &mut sums.value]),
                key_head: [batch, sizes.kv_head(head), sizes.n_kv_heads],
                memory: pair,
            });
            if order.is_some() {
                let all = Place::all(sizes.query_length);
                add_rows(&mut sums.query, d_query, d_head, Place { order, ..all });
            }
        }
        let one = E::Real::from_f64(1.0);
        // Safety: this task is the only one with these heads.
        unsafe {
            if let Some(sink) = problem.sink(head) {
                outputs.sinks.part(head_row, 1)[0] = rows.d_sink(sink);
            }
            let at = [batch, head, sizes.n_heads];
            let scale = problem.scores.scale;
            write(
                &outputs.query,
                at,
                &sums.query,
                sizes.d_head,
                scale,
                Place::all(sizes.query_length),
            );
            if (i + 1) % group == 0 && !adds_once {
                let at = [batch, sizes.kv_head(head), sizes.n_kv_heads];
                let place = Place::all(sizes.key_length);
                write(&outputs.key, at, &sums.key, sizes.d_head, one, place);
                write(&outputs.value, at, &sums.value, sizes.d_value, one, place);
            }
        }
    }
}

/// Where some rows stand in a sequence.
#[derive(Debug, Clone, Copy)]
struct Place<'a> {
    length: usize,
    /// The first of the rows, in the order of a part.
    first: usize,
    order: Option<&'a [u32]>,
}

impl Place<'_> {
    fn all(length: usize) -> Self {
        Self {
            length,
            first: 0,
            order: None,
        }
    }

    #[inline(always)]
    fn row(&self, i: usize) -> usize {
        let row = self.first + i;
        self.order.map_or(row, |order| order[row] as usize)
    }
}

/// Writes rows of one head, times `scale`, into `[batch_size, length, n_heads, width]`.
///
/// # Safety
///
/// Nobody else has these rows of this head.
unsafe fn write<E: Stored>(
    to: &Shared<'_, E>,
    at: [usize; 3],
    rows: &[E::Real],
    width: usize,
    scale: E::Real,
    place: Place<'_>,
) {
    write_rows(to, at, rows, width, scale, place);
}

kernel! {
    fn write_rows<'a, E: Stored>(
        _simd: S,
        to: &'a Shared<'a, E>,
        at: [usize; 3],
        rows: &'a [E::Real],
        width: usize,
        scale: E::Real,
        place: Place<'a>,
    ) -> () {
        let [batch, head, n_heads] = at;
        for (i, row) in rows.chunks_exact(padded(width)).enumerate() {
            let at = (batch * place.length + place.row(i)) * n_heads + head;
            // Safety: that of `write`, which is the only caller.
            let to = unsafe { to.part(at * width, width) };
            for (to, x) in to.iter_mut().zip(row) {
                *to = E::from_real(*x * scale);
            }
        }
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

/// Adds rows to those of a whole sequence.
#[inline(always)]
fn add_rows<R: Real>(to: &mut [R], rows: &[R], width: usize, place: Place<'_>) {
    for (i, row) in rows.chunks_exact(width).enumerate() {
        let at = place.row(i);
        for (to, x) in to[at * width..(at + 1) * width].iter_mut().zip(row) {
            *to += *x;
        }
    }
}

struct Work<'a, 'b, E: Stored> {
    pass: &'a Pass<'a, 'b, E>,
    outputs: &'a Outputs<'a, E>,
    /// In the order of the part.
    d_query: &'a mut [E::Real],
    /// Of keys and values, in the order of the sequence, where blocks add to them; else they are written at once.
    sums: Option<[&'a mut Vec<E::Real>; 2]>,
    /// Batch row and head of the keys, and how many heads they have.
    key_head: [usize; 3],
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
            if column.is_empty() && self.sums.is_some() {
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
            let place = Place {
                length: sizes.key_length,
                first,
                order: pass.part.key_order(),
            };
            let (key, value) = (
                &self.memory.key[..n * d_head],
                &self.memory.value[..n * d_value],
            );
            match &mut self.sums {
                Some([d_key, d_value_sums]) => {
                    add_rows(d_key, key, d_head, place);
                    add_rows(d_value_sums, value, d_value, place);
                }
                // Safety: the task is the only one with this head, and each key is in one block.
                None => unsafe {
                    let one = E::Real::from_f64(1.0);
                    let (at, outputs) = (self.key_head, self.outputs);
                    write(&outputs.key, at, key, sizes.d_head, one, place);
                    write(&outputs.value, at, value, sizes.d_value, one, place);
                },
            }
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
