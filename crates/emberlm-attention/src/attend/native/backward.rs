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

use emberlm_core::{Layout, Part};
use emberlm_kernels::{
    Buffer, Real, Shared, Stored, View, each_vector, kernel, lanes,
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
    tasks.into_par_iter().with_max_len(1).for_each(|heads| {
        run_heads(problem, saved, &parts, &heads, &shared);
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

/// Private memory of a task: what is summed over blocks, in the order of the sequence.
struct HeadSums<R> {
    query: Vec<R>,
    key: Vec<R>,
    value: Vec<R>,
}

/// Some heads after another; those of one key/value head follow each other.
fn run_heads<E: Stored>(
    problem: &Problem<'_, E>,
    saved: &Saved<'_, E>,
    parts: &[PartPositions<'_, E::Real>],
    heads: &[usize],
    outputs: &Outputs<'_, E>,
) {
    let sizes = problem.sizes();
    let (d_head, d_value) = (padded(sizes.d_head), padded(sizes.d_value));
    let mut sums = HeadSums {
        query: Vec::new(),
        key: Vec::new(),
        value: Vec::new(),
    };
    let set_to_zeros = |sums: &mut Vec<E::Real>, n| {
        sums.clear();
        sums.resize(n, E::Real::default());
    };
    let group = sizes.n_heads / sizes.n_kv_heads;
    let mut packed = Vec::new();
    for (i, head_row) in heads.iter().copied().enumerate() {
        let (batch, head) = (head_row / sizes.n_heads, head_row % sizes.n_heads);
        set_to_zeros(&mut sums.query, sizes.query_length * d_head);
        if i % group == 0 {
            let at = [batch, sizes.kv_head(head)];
            packed = parts
                .iter()
                .map(|parts| PackedKeys::new(problem, parts.part, at))
                .collect();
            set_to_zeros(&mut sums.key, sizes.key_length * d_head);
            set_to_zeros(&mut sums.value, sizes.key_length * d_value);
        }
        let rows = QueryRows::new(problem, saved, batch, head);
        for (part, packed) in parts.iter().zip(&packed) {
            Pass::new(problem, part, packed, [batch, head], saved, &rows).run(&mut sums, outputs);
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

/// What the queries of one head bring, in the order of the sequence.
struct QueryRows<R> {
    /// `lse`; zero for a query without keys, whose scores are all hidden.
    log_sum_exp: Vec<R>,
    /// `delta - dlse`
    delta: Vec<R>,
}

impl<R: Real> QueryRows<R> {
    fn new<E: Stored<Real = R>>(
        problem: &Problem<'_, E>,
        saved: &Saved<'_, E>,
        batch: usize,
        head: usize,
    ) -> Self {
        let sizes = problem.sizes();
        let first = (batch * sizes.n_heads + head) * sizes.query_length;
        let log_sum_exp = saved.log_sum_exp[first..first + sizes.query_length]
            .iter()
            .map(|lse| {
                if *lse == R::NEG_INFINITY {
                    R::default()
                } else {
                    *lse
                }
            })
            .collect();
        let mut delta = vec![R::default(); sizes.query_length];
        dots(
            saved.output.first_columns(sizes.d_value),
            saved.d_output.first_columns(sizes.d_value),
            [batch, head],
            &mut delta,
        );
        for (query, delta) in delta.iter_mut().enumerate() {
            if saved.log_sum_exp[first + query] == R::NEG_INFINITY {
                // A query without keys has no gradient, whatever comes from behind.
                *delta = R::default();
            } else if problem.with_log_sum_exp {
                let at = [batch, head, query, sizes.d_value];
                *delta = *delta - saved.d_output.at(at).to_real();
            }
        }
        Self { log_sum_exp, delta }
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
    fn new<E: Stored<Real = R>>(problem: &Problem<'_, E>, part: &Part, at: [usize; 2]) -> Self {
        let order = part.key_order();
        Self {
            keys: pack_rows(problem.key, at, order, R::from_f64(1.0)),
            key_columns: pack_columns(problem.key, at, order),
            value_columns: pack_columns(problem.value, at, order),
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
    /// Scaled queries, and gradients of the output, in the order of the part.
    queries: Vec<E::Real>,
    d_outputs: Vec<E::Real>,
    packed: &'a PackedKeys<E::Real>,
    /// In the order of the part.
    log_sum_exp: Vec<E::Real>,
    delta: Vec<E::Real>,
}

impl<'a, 'b, E: Stored> Pass<'a, 'b, E> {
    fn new(
        problem: &'a Problem<'b, E>,
        PartPositions { part, keys }: &'a PartPositions<'a, E::Real>,
        packed: &'a PackedKeys<E::Real>,
        [batch, head]: [usize; 2],
        saved: &Saved<'_, E>,
        rows: &QueryRows<E::Real>,
    ) -> Self {
        let sizes = problem.sizes();
        let one = E::Real::from_f64(1.0);
        let queries = part.query_order();
        let in_order = |x: &[E::Real]| match queries {
            None => x.to_vec(),
            Some(order) => order.iter().map(|i| x[*i as usize]).collect(),
        };
        Self {
            problem,
            part,
            layout: part.layout(batch, head),
            head: Head::new(problem, batch, head),
            bias_row: problem
                .bias_at(batch, head)
                .map_or(0, |(bias, [b, h])| b * bias.dims()[1] + h),
            key_positions: keys,
            queries: pack_rows(problem.query, [batch, head], queries, problem.scores.scale),
            d_outputs: pack_rows(
                saved.d_output.first_columns(sizes.d_value),
                [batch, head],
                queries,
                one,
            ),
            packed,
            log_sum_exp: in_order(&rows.log_sum_exp),
            delta: in_order(&rows.delta),
        }
    }
}

impl<E: Stored> Pass<'_, '_, E> {
    fn run(&self, sums: &mut HeadSums<E::Real>, outputs: &Outputs<'_, E>) {
        let sizes = self.problem.sizes();
        let zeros = |n| vec![E::Real::default(); n];
        let mut scratch = Scratch {
            scores: zeros(BLOCK * BLOCK),
            weights: zeros(BLOCK * BLOCK),
            cap_slopes: zeros(if self.head.cap.is_some() { BLOCK } else { 0 }),
            key: zeros(BLOCK * padded(sizes.d_head)),
            value: zeros(BLOCK * padded(sizes.d_value)),
        };
        let arch = Arch::new();
        let d_head = padded(sizes.d_head);
        let order = self.part.query_order();
        let mut gathered = order.map(|order| zeros(order.len() * d_head));
        arch.dispatch(Work {
            pass: self,
            outputs,
            d_query: gathered.as_mut().unwrap_or(&mut sums.query),
            d_key: &mut sums.key,
            d_value: &mut sums.value,
            scratch: &mut scratch,
        });
        if let Some(d_query) = gathered {
            add_rows(&mut sums.query, &d_query, d_head, 0, order);
        }
    }

    fn n_queries(&self) -> usize {
        self.delta.len()
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
struct Scratch<R> {
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
    scratch: &'a mut Scratch<E::Real>,
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
            self.scratch.key.fill(E::Real::default());
            self.scratch.value.fill(E::Real::default());
            for block in blocks(pass.problem.schedule.masks(), column) {
                // Safety: the blocks are the layout's, and the buffers are made for its part.
                unsafe { self.pair(simd, &block, key_block) };
            }
            let order = pass.part.key_order();
            add_rows(
                self.d_key,
                &self.scratch.key[..n * d_head],
                d_head,
                first,
                order,
            );
            add_rows(
                self.d_value,
                &self.scratch.value[..n * d_value],
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
        let scores = self.scratch.scores.as_mut_ptr();
        let weights = self.scratch.weights.as_mut_ptr();
        // Safety: all pointers are to whole blocks of buffers that are padded to whole blocks and vectors.
        unsafe {
            let query = pass.queries.as_ptr().add(first_query * d_head);
            let d_output = pass.d_outputs.as_ptr().add(first_query * d_value);
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

            tile::product::<_, S, false>(
                simd,
                [n_queries, BLOCK, sizes.d_head],
                Left::new(query, d_head, 1),
                Rows::new(key_columns, BLOCK),
                Rows::new(scores, BLOCK),
            );
            tile::product::<_, S, false>(
                simd,
                [n_queries, BLOCK, sizes.d_value],
                Left::new(d_output, d_value, 1),
                Rows::new(value_columns, BLOCK),
                Rows::new(weights, BLOCK),
            );
            for i in 0..n_queries {
                self.row(simd, i, block, key_block);
            }
            tile::product::<_, S, true>(
                simd,
                [n_keys, d_value, n_queries],
                Left::new(weights, 1, BLOCK),
                Rows::new(d_output, d_value),
                Rows::new(self.scratch.value.as_mut_ptr(), d_value),
            );
            tile::product::<_, S, true>(
                simd,
                [n_keys, d_head, n_queries],
                Left::new(scores, 1, BLOCK),
                Rows::new(query, d_head),
                Rows::new(self.scratch.key.as_mut_ptr(), d_head),
            );
            tile::product::<_, S, true>(
                simd,
                [n_queries, d_head, n_keys],
                Left::new(scores, BLOCK, 1),
                Rows::new(key, d_head),
                Rows::new(d_query, d_head),
            );
        }
    }

    /// Turns the products of one query into gradients of scores, and the gradients of its weights into weights.
    #[inline(always)]
    unsafe fn row<S: Simd>(&mut self, simd: S, i: usize, block: &Block<'_>, key_block: usize) {
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
            let scores = self.scratch.scores.as_mut_ptr().add(i * BLOCK);
            let weights = self.scratch.weights.as_mut_ptr().add(i * BLOCK);
            if !pass.head.is_plain() || place.visible.is_some() {
                let slopes = self.scratch.cap_slopes.as_mut_ptr();
                pass.head.apply(simd, &place, scores, Some(slopes));
            }
            let kept = pass.head.kept(&place);
            let lse = E::Real::splat(simd, pass.log_sum_exp[row_in_part]);
            let delta = E::Real::splat(simd, pass.delta[row_in_part]);
            for j in (0..BLOCK).step_by(lanes) {
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
                for j in 0..pass.head.n_keys(&place) {
                    let at = row + pass.head.key(&place, j);
                    // All heads that see this bias are in one task.
                    self.outputs.bias.part(at, 1)[0] += *scores.add(j);
                }
            }
            if pass.head.cap.is_some() {
                for j in (0..BLOCK).step_by(lanes) {
                    let slope = E::Real::load(simd, self.scratch.cap_slopes.as_ptr().add(j));
                    let d_score = E::Real::load(simd, scores.add(j));
                    E::Real::store(simd, scores.add(j), E::Real::vmul(simd, d_score, slope));
                }
            }
        }
    }
}
