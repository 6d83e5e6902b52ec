//! The experts of a mixture: from tokens to the weighted sums of what experts make of them.

use std::ops::Range;

use burn::tensor::Tensor;
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Scratch, Shared, Stored, View, kernel,
    matrix::{
        FEW_ROWS, Matrix, Store, Target, Threads, gathered_product, product_on, scattered_product,
        transpose,
    },
    run_one,
};
use rayon::prelude::*;

use super::{
    Implementation,
    activation::{activate_by, activate_elements, activation_gradient, gate_by},
    add,
    combine::{combine_by, dot},
    grouped_matmuls_by, indices,
};
use crate::Activation;

/// Which token stands in which row, the rows of an expert together.
#[derive(Debug, Clone, Copy)]
pub struct ExpertRows<'a> {
    /// Of each row, the token.
    pub tokens: &'a [usize],
    /// Number of rows of each expert.
    pub group_sizes: &'a [usize],
}

/// The weights of experts without biases.
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    /// `[n_experts, d_model, d_ff]`, if the experts have a gate.
    pub gate: Option<Tensor<3>>,
    /// `[n_experts, d_model, d_ff]`
    pub up: Tensor<3>,
    /// `[n_experts, d_ff, d_model]`
    pub down: Tensor<3>,
}

/// `y_t = sum of w_i down_e(f(gate_e(x_t)) * up_e(x_t))` over the rows `i` of token `t`, each of its expert `e`; without a
/// gate `down_e(f(up_e(x_t)))`; zero for a token without a row.
///
/// Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>, equation 1. It is [`embed`](super::embed),
/// [`grouped_matmuls`](super::grouped_matmuls), [`gate`](super::gate) and [`combine`](super::combine) in one: on the CPU
/// backends the rows of all experts are never held in memory, neither those that go in nor those that come out.
///
/// # Shapes
///
/// - `x`, output: `[n_tokens, d_model]`
/// - `weights`: `[n_rows]`
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{Activation, operators::{ExpertRows, ExpertWeights, experts}};
///
/// let device = Device::flex();
/// let x = Tensor::<2>::from_floats([[1.0], [2.0]], &device);
/// let weights = Tensor::<1>::from_floats([1.0, 0.5, 0.5], &device);
/// let rows = ExpertRows { tokens: &[0, 1, 1], group_sizes: &[2, 1] };
/// let layers = ExpertWeights {
///     gate: None,
///     up: Tensor::from_floats([[[1.0]], [[10.0]]], &device),
///     down: Tensor::ones([2, 1, 1], &device),
/// };
/// let y: Vec<f32> = experts(x, weights, rows, layers, Activation::Relu).into_data().iter::<f32>().collect();
/// assert_eq!(y, [1.0, 11.0]);
/// ```
///
/// # Panics
///
/// If the numbers of rows, weights and tokens differ, a token is not below `n_tokens`, or shapes disagree; the message
/// names what.
pub fn experts(
    x: Tensor<2>,
    weights: Tensor<1>,
    rows: ExpertRows<'_>,
    layers: ExpertWeights,
    activation: Activation,
) -> Tensor<2> {
    let implementation = Implementation::of(&x.device());
    experts_by(implementation, x, weights, rows, layers, activation)
}

/// [`experts`] by a given implementation.
///
/// # Panics
///
/// As [`experts`].
pub fn experts_by(
    implementation: Implementation,
    x: Tensor<2>,
    weights: Tensor<1>,
    rows: ExpertRows<'_>,
    layers: ExpertWeights,
    activation: Activation,
) -> Tensor<2> {
    check(&x, &weights, rows, &layers);
    let [n_tokens, _] = x.dims();
    if implementation != Implementation::Native {
        let indices = indices(rows.tokens, &x.device());
        let by = |x, weights| grouped_matmuls_by(implementation, x, weights, rows.group_sizes);
        let x = x.select(0, indices);
        let inner = match layers.gate {
            Some(of_gate) => {
                let projections = [(of_gate, None), (layers.up, None)];
                let [gate, up] =
                    grouped_matmuls_by(implementation, x, projections, rows.group_sizes);
                gate_by(implementation, activation, gate, up, None)
            }
            None => {
                let [up] = by(x, [(layers.up, None)]);
                activate_by(implementation, activation, up, None)
            }
        };
        let [outputs] = by(inner, [(layers.down, None)]);
        return combine_by(implementation, outputs, weights, rows.tokens, n_tokens);
    }
    let [_, _, d_ff] = layers.up.dims();
    let operator = Experts {
        activation,
        is_gated: layers.gate.is_some(),
        tokens: rows.tokens.to_vec(),
        units: units(rows.group_sizes, d_ff),
        group_sizes: rows.group_sizes.to_vec(),
    };
    let inputs = [x.into_dispatch(), weights.into_dispatch()].into_iter();
    let layers = [layers.gate, Some(layers.up), Some(layers.down)];
    let layers = layers.into_iter().flatten().map(Tensor::into_dispatch);
    run_one(operator, inputs.chain(layers))
}

fn check(x: &Tensor<2>, weights: &Tensor<1>, rows: ExpertRows<'_>, layers: &ExpertWeights) {
    let ([n_tokens, d_model], [n_weights]) = (x.dims(), weights.dims());
    let n_rows = rows.tokens.len();
    assert_eq!(
        n_weights, n_rows,
        "n_rows: there are {n_rows}, and {n_weights} weights"
    );
    let n_in_groups: usize = rows.group_sizes.iter().sum();
    assert_eq!(
        n_in_groups, n_rows,
        "group_sizes: the groups have {n_in_groups} rows, there are {n_rows}"
    );
    if let Some(token) = rows.tokens.iter().find(|token| **token >= n_tokens) {
        panic!("tokens: {token} is not below {n_tokens}");
    }
    let [n_experts, _, d_ff] = layers.up.dims();
    assert_eq!(
        n_experts,
        rows.group_sizes.len(),
        "n_experts: there are weights of {n_experts}, and {} sizes",
        rows.group_sizes.len()
    );
    let into = [n_experts, d_model, d_ff];
    for (name, dims, expected) in [
        ("up", layers.up.dims(), into),
        (
            "gate",
            layers.gate.as_ref().map_or(into, Tensor::dims),
            into,
        ),
        ("down", layers.down.dims(), [n_experts, d_ff, d_model]),
    ] {
        assert_eq!(
            dims, expected,
            "{name}: the shape is {dims:?}, not {expected:?}"
        );
    }
}

/// Rows of one expert and a part of its inner width: what a thread works on at once, in its second cache.
#[derive(Debug, Clone, Copy)]
struct Unit {
    expert: usize,
    first_row: usize,
    n_rows: usize,
    /// Which part of the inner width.
    part: usize,
    first_inner: usize,
    n_inner: usize,
    /// Where its `n_rows n_inner` inner elements begin among those of all units.
    start: usize,
}

/// Rows of a unit at most.
const ROWS: usize = 512;
/// Inner width of a unit at most.
const INNER: usize = 1024;
/// Rows whose inner elements, those before the activation and the gradients of both stay in the second cache.
const ROWS_IN_CACHE: usize = 16;
/// Columns of a result that a thread adds up at once, where several work.
const COLUMNS: usize = 256;
/// With at most so many rows a product with a transposed weight is faster where the elements of a column lie together: it
/// reads the weight once, as it lies, and would else copy it in another order first.
const FEW_ROWS_BACK: usize = 128;

/// Up to so many rows, the products into at least so large an inner width wait for their weights too.
const WAITING_ROWS: usize = 80;
const WAITING_INNER: usize = 512;

/// Up to so many rows in all are left to one thread: on two cores it reads the weights as fast as both, which would have
/// to wait for each other twice.
const ROWS_OF_ONE_THREAD: usize = 8;

/// The units of all experts: expert by expert, in each part by part of the inner width.
fn units(group_sizes: &[usize], d_ff: usize) -> Vec<Unit> {
    let mut units = Vec::new();
    let (mut first_of_expert, mut start) = (0, 0);
    for (expert, &n) in group_sizes.iter().enumerate() {
        for (part, inner) in cut(d_ff, INNER).enumerate() {
            for rows in cut(n, ROWS) {
                units.push(Unit {
                    expert,
                    first_row: first_of_expert + rows.start,
                    n_rows: rows.len(),
                    part,
                    first_inner: inner.start,
                    n_inner: inner.len(),
                    start,
                });
                start += rows.len() * inner.len();
            }
        }
        first_of_expert += n;
    }
    units
}

/// Ranges of similar length, at most `most`, that cover `n`.
fn cut(n: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let n_parts = n.div_ceil(most);
    (0..n_parts).map(move |part| part * n / n_parts..(part + 1) * n / n_parts)
}

impl Unit {
    fn rows(&self) -> Range<usize> {
        self.first_row..self.first_row + self.n_rows
    }

    /// Whether its products are left to the kernel that asks for the weights ahead. One row's wait for them anyway.
    fn has_few_rows(&self) -> bool {
        (2..=FEW_ROWS).contains(&self.n_rows)
    }

    /// Whether the products into the inner width take the tokens where they are.
    fn reads_tokens(&self) -> bool {
        self.has_few_rows() || (self.n_rows <= WAITING_ROWS && self.n_inner >= WAITING_INNER)
    }

    fn inner(&self) -> Range<usize> {
        self.start..self.start + self.n_rows * self.n_inner
    }

    /// Its inner elements among those of all units.
    ///
    /// # Safety
    ///
    /// Nobody else has those of this unit.
    unsafe fn part_of<'a, R>(&self, to: &Shared<'a, R>) -> &'a mut [R] {
        // Safety: the caller's promise.
        unsafe { to.part(self.start, self.n_rows * self.n_inner) }
    }

    /// Its part of a weight into the inner width, of some rows: `[.., n_inner]`.
    fn inner_columns<'a, R: Real>(&self, rows: &'a Matrix<'_, R>) -> Matrix<'a, R> {
        rows.columns(self.first_inner, self.n_inner)
    }

    /// Its part of a weight out of the inner width, of all experts: `[n_inner, d_model]`.
    fn inner_rows<'a, R: Real>(&self, weight: &'a Matrix<'_, R>, d_ff: usize) -> Matrix<'a, R> {
        weight.rows(self.expert * d_ff + self.first_inner, self.n_inner)
    }
}

/// `x w`, in rows, on this thread.
fn multiply<R: Real>(n: usize, x: &[R], w: &Matrix<'_, R>, to: &mut [R], store: Store) {
    let [d_input, d_output] = w.dims();
    let (x, to) = (Matrix::new(x, [n, d_input]), Target::new(to, [n, d_output]));
    product_on(Threads::One, &x, w, to, store);
}

/// The sum of `x w^T` over pairs `x, w`, in rows, on this thread.
fn multiply_back<'a, R: Real>(
    n: usize,
    pairs: impl IntoIterator<Item = (&'a [R], Matrix<'a, R>)>,
    to: &mut [R],
    [x_turned, y_turned]: [&mut Buffer<R>; 2],
) {
    let mut store = Store::Replace;
    let y = room(y_turned, to.len());
    let d_output = to.len() / n;
    for (x, w) in pairs {
        match n > FEW_ROWS_BACK {
            true => multiply(n, x, &w.transposed(), to, store),
            false => {
                let [_, d_input] = w.dims();
                let x = Matrix::new(turned(x, [n, d_input], x_turned), [d_input, n]);
                let y = Target::new(y, [d_output, n]);
                product_on(Threads::One, &w, &x, y, store);
            }
        }
        store = Store::Add;
    }
    if n <= FEW_ROWS_BACK {
        transpose(y, [d_output, n], to);
    }
}

/// The rows of some tokens, one after the other.
fn gather<'a, R: Real>(tokens: &[usize], x: &[R], width: usize, to: &'a mut Buffer<R>) -> &'a [R] {
    let to = room(to, tokens.len() * width);
    for (to, token) in to.chunks_exact_mut(width.max(1)).zip(tokens) {
        to.copy_from_slice(&x[token * width..][..width]);
    }
    to
}

/// The transpose of `[n_rows, n_columns]` elements.
fn turned<'a, R: Real>(from: &[R], dims: [usize; 2], scratch: &'a mut Buffer<R>) -> &'a [R] {
    let to = room(scratch, from.len());
    transpose(from, dims, to);
    to
}

/// The first `n` elements, to be written.
fn room<R: Real>(scratch: &mut Buffer<R>, n: usize) -> &mut [R] {
    // Safety: it is borrowed by this result alone.
    unsafe { scratch.shared().part(0, n) }
}

/// Some columns of rows of `width` elements, which one thread writes.
struct Columns<'a, R> {
    to: Shared<'a, R>,
    width: usize,
    range: Range<usize>,
}

impl<R: Real> Columns<'_, R> {
    fn target(&self, n_rows: usize) -> Target<'_, R> {
        let dims = [n_rows, self.range.len()];
        // Safety: the thread has these columns.
        unsafe { Target::columns(&self.to, self.range.start, dims, self.width) }
    }
}

kernel! {
    /// Adds rows, each times a weight, to the columns of their tokens.
    fn add_to_tokens<'a, R: Real>(
        _simd: S,
        rows: &'a [R],
        weights: &'a [R],
        tokens: &'a [usize],
        columns: &'a Columns<'a, R>,
    ) -> () {
        let n = columns.range.len();
        for ((row, weight), token) in rows.chunks_exact(n.max(1)).zip(weights).zip(tokens) {
            let start = token * columns.width + columns.range.start;
            // Safety: the thread has these columns.
            let to = unsafe { columns.to.part(start, n) };
            to.iter_mut().zip(row).for_each(|(to, x)| *to += *weight * *x);
        }
    }
}

kernel! {
    /// Multiplies each row with its weight.
    fn scale_rows<'a, R: Real>(_simd: S, rows: &'a mut [R], weights: &'a [R]) -> () {
        let width = rows.len() / weights.len().max(1);
        for (row, weight) in rows.chunks_exact_mut(width.max(1)).zip(weights) {
            row.iter_mut().for_each(|x| *x = *x * *weight);
        }
    }
}

/// Inputs: `x`, the weights of the rows, gate's weights if there is one, up's and down's.
struct Experts {
    activation: Activation,
    is_gated: bool,
    tokens: Vec<usize>,
    units: Vec<Unit>,
    group_sizes: Vec<usize>,
}

impl std::fmt::Debug for Experts {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Experts of {} rows", self.tokens.len())
    }
}

/// What goes into the activation, of all units; nothing of a gate that is not there.
#[derive(Debug)]
struct Before<R> {
    gate: Vec<R>,
    up: Vec<R>,
}

impl Experts {
    /// Where gate's weights are among the inputs.
    fn gate(&self) -> Option<usize> {
        self.is_gated.then_some(2)
    }

    fn up(&self) -> usize {
        2 + usize::from(self.is_gated)
    }

    fn down(&self) -> usize {
        self.up() + 1
    }

    /// Inner elements of all units.
    fn n_inner(&self) -> usize {
        self.units.last().map_or(0, |unit| unit.inner().end)
    }

    /// Memory for the inner elements of gate, if there is one, and up.
    fn buffers<R: Real>(&self) -> [Buffer<R>; 2] {
        let n = self.n_inner();
        [if self.is_gated { n } else { 0 }, n].map(Buffer::new)
    }

    /// Those of a unit.
    ///
    /// # Safety
    ///
    /// Nobody else has those of this unit.
    unsafe fn parts_of<'a, R>(
        &self,
        unit: &Unit,
        [gate, up]: &[Shared<'a, R>; 2],
    ) -> [&'a mut [R]; 2] {
        // Safety: the caller's promise.
        let gate = match self.is_gated {
            true => unsafe { unit.part_of(gate) },
            false => &mut [],
        };
        // Safety: as above.
        [gate, unsafe { unit.part_of(up) }]
    }

    /// Whether the rows are so few that one thread does everything.
    fn are_few(&self) -> bool {
        self.tokens.len() <= ROWS_OF_ONE_THREAD
    }

    /// Calls for each task, on all threads unless the rows are few, with `N` times the memory for what a task holds of any
    /// unit.
    fn for_each<T: Sync, R: Real, const N: usize>(
        &self,
        tasks: &[T],
        d_model: usize,
        work: impl Fn(&T, &mut [Buffer<R>; N]) + Sync,
    ) {
        let sizes = (self.units.iter()).map(|unit| unit.n_rows * unit.n_inner.max(d_model));
        let size = sizes.max().unwrap_or(0);
        let memory = || [(); N].map(|()| Buffer::new(size));
        if self.are_few() {
            let mut memory = memory();
            return tasks.iter().for_each(|task| work(task, &mut memory));
        }
        let scratch = Scratch::new(tasks.len(), memory);
        let tasks = tasks.par_iter().with_max_len(1);
        tasks.for_each(|task| scratch.lend(|memory| work(task, memory)));
    }

    /// Calls for parts of the columns of `[n_tokens, d_model]` zeros, and returns what these have become.
    fn by_columns<R: Real, const N: usize>(
        &self,
        [n_tokens, d_model]: [usize; 2],
        work: impl Fn(&Columns<'_, R>, &mut [Buffer<R>; N]) + Sync,
    ) -> Vec<R> {
        let mut sums = vec![R::default(); n_tokens * d_model];
        let to = Shared::new(&mut sums);
        let most = match self.are_few() {
            true => d_model.max(1),
            false => COLUMNS,
        };
        let parts = cut(d_model, most).map(|range| Columns {
            to,
            width: d_model,
            range,
        });
        self.for_each(&parts.collect::<Vec<_>>(), d_model, work);
        sums
    }

    /// Calls for each unit.
    fn for_each_unit<R: Real>(
        &self,
        d_model: usize,
        work: impl Fn(&Unit, &[usize], &mut [Buffer<R>; 4]) + Sync,
    ) {
        self.for_each(&self.units, d_model, |unit, scratch| {
            work(unit, &self.tokens[unit.rows()], scratch);
        });
    }

    /// The gradients of `n` weights between `d_model` and `d_ff`: calls for each unit, for those of one
    /// expert and one part of the inner width after one another; the first of them replaces what is there. Zero for experts
    /// without rows.
    fn of_weights<R: Real>(
        &self,
        n: usize,
        [d_model, d_ff]: [usize; 2],
        work: impl Fn(&[Shared<'_, R>], &Unit, Store, &mut [Buffer<R>; 2]) + Sync,
    ) -> Vec<Vec<R>> {
        let size = d_model * d_ff;
        let n_elements = self.group_sizes.len() * size;
        let mut gradients: Vec<_> = (0..n).map(|_| Buffer::new(n_elements)).collect();
        let to: Vec<_> = gradients.iter_mut().map(Buffer::shared).collect();
        for (expert, n_rows) in self.group_sizes.iter().enumerate() {
            if *n_rows == 0 {
                for to in &to {
                    // Safety: no unit is of this expert.
                    unsafe { to.part(expert * size, size) }.fill(R::default());
                }
            }
        }
        let parts = (self.units).chunk_by(|a, b| (a.expert, a.part) == (b.expert, b.part));
        self.for_each(&parts.collect::<Vec<_>>(), d_model, |units, scratch| {
            let mut store = Store::Replace;
            for unit in *units {
                work(&to, unit, store, scratch);
                store = Store::Add;
            }
        });
        // Safety: `work` writes all that is of its units, and every other expert has no rows.
        let finish = |gradient: Buffer<R>| unsafe { gradient.finish() };
        gradients.into_iter().map(finish).collect()
    }

    /// The sums. What goes into the activation is written to `before`, where it is to be kept.
    fn mix<E: Stored>(
        &self,
        inputs: &[View<'_, E>],
        before: Option<&[Shared<'_, E::Real>; 2]>,
    ) -> Array<E> {
        let (x, n_tokens, d_model) = (inputs[0].reals(), inputs[0].n_rows(), inputs[0].width());
        let weights = inputs[1].reals();
        let gate_weight = self.gate().map(|gate| Matrix::of_view(&inputs[gate]));
        let [up_weight, down_weight] =
            [self.up(), self.down()].map(|i| Matrix::of_view(&inputs[i]));
        let d_ff = inputs[self.up()].width();

        let mut inner = Buffer::new(self.n_inner());
        let to_inner = inner.shared();
        let of_tokens = Matrix::new(&x, [n_tokens, d_model]);
        self.for_each_unit(d_model, |unit, tokens, [rows, gates, ups, _]| {
            let rows = match unit.reads_tokens() {
                true => None,
                false => Some(gather(tokens, &x, d_model, rows)),
            };
            // Safety: each unit has elements of its own.
            let inner = unsafe { unit.part_of(&to_inner) };
            let [gate, up] = match before {
                // Safety: as above.
                Some(before) => unsafe { self.parts_of(unit, before) },
                None => {
                    let of_gate = if self.is_gated { inner.len() } else { 0 };
                    [room(gates, of_gate), room(ups, inner.len())]
                }
            };
            let project = |weight: &Matrix<'_, E::Real>, to: &mut [E::Real]| {
                let weight = weight.rows(unit.expert * d_model, d_model);
                let weight = unit.inner_columns(&weight);
                match rows {
                    Some(rows) => multiply(unit.n_rows, rows, &weight, to, Store::Replace),
                    None => {
                        let to = Target::new(to, [unit.n_rows, unit.n_inner]);
                        gathered_product(&of_tokens, tokens, &weight, to);
                    }
                }
            };
            if let Some(weight) = &gate_weight {
                project(weight, gate);
            }
            project(&up_weight, up);
            activate_elements(self.activation, self.is_gated.then_some(&*gate), up, inner);
        });
        // Safety: the units cover all elements.
        let inner = unsafe { inner.finish() };

        let y = self.by_columns([n_tokens, d_model], |columns, [tile]| {
            for unit in &self.units {
                let (inner, n) = (&inner[unit.inner()], unit.n_rows);
                let weight = unit.inner_rows(&down_weight, d_ff);
                let weight = weight.columns(columns.range.start, columns.range.len());
                let (weights, tokens) = (&weights[unit.rows()], &self.tokens[unit.rows()]);
                if unit.has_few_rows() {
                    let inner = Matrix::new(inner, [n, unit.n_inner]);
                    let to = columns.target(n_tokens);
                    scattered_product(&inner, &weight, weights, tokens, to);
                    continue;
                }
                let tile = room(tile, n * columns.range.len());
                multiply(n, inner, &weight, tile, Store::Replace);
                add_to_tokens(tile, weights, tokens, columns);
            }
        });
        Array::from_reals(y, &[n_tokens, d_model])
    }
}

impl Operator for Experts {
    type Saved<E: Stored> = Before<E::Real>;

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, Before<E::Real>) {
        let mut before = self.buffers();
        let y = self.mix(inputs, Some(&before.each_mut().map(Buffer::shared)));
        // Safety: the units cover all elements.
        let [gate, up] = before.map(|buffer| unsafe { buffer.finish() });
        (vec![y], Before { gate, up })
    }

    fn infer<E: Stored>(&self, inputs: &[View<'_, E>]) -> Vec<Array<E>> {
        vec![self.mix(inputs, None)]
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, Before<E::Real>>) -> Vec<Gradient<E>> {
        let x_view = pass.input(0);
        let (x, n_tokens, d_model) = (x_view.reals(), x_view.n_rows(), x_view.width());
        let weights = pass.input(1).reals();
        let d_output = pass.gradient(0).expect("of the one output").reals();
        let down_view = pass.input(self.down());
        let down_weight = Matrix::of_view(&down_view);
        let d_ff = pass.input(self.up()).width();
        let n_rows = self.tokens.len();

        // Of the inner elements: times the weights of the rows, and their gradients before the activation.
        let (mut weighted, mut d_before) = (Buffer::new(self.n_inner()), self.buffers());
        // Of each part of the inner width, the gradient of the weights.
        let mut d_weights = Buffer::new(d_ff.div_ceil(INNER) * n_rows);
        let (to_weighted, to_before) = (weighted.shared(), d_before.each_mut().map(Buffer::shared));
        let to_weights = d_weights.shared();
        self.for_each_unit(
            d_model,
            |unit, tokens, [rows, d_inner, x_turned, y_turned]| {
                let (n, rows) = (unit.n_rows, gather(tokens, &d_output, d_model, rows));
                let d_inner = room(d_inner, unit.inner().len());
                let weight = unit.inner_rows(&down_weight, d_ff);
                multiply_back(n, [(rows, weight)], d_inner, [x_turned, y_turned]);
                let up = &pass.saved.up[unit.inner()];
                let gate = (self.is_gated).then(|| &pass.saved.gate[unit.inner()]);
                // Safety: each unit has elements of its own, and rows of its own in its part.
                let ([d_gate, d_up], inner, d_weights) = unsafe {
                    (
                        self.parts_of(unit, &to_before),
                        unit.part_of(&to_weighted),
                        to_weights.part(unit.part * n_rows + unit.first_row, n),
                    )
                };
                let weights = &weights[unit.rows()];
                // A few rows at a time, which stay in the cache from one function to the next.
                for rows in cut(n, ROWS_IN_CACHE) {
                    let elements = rows.start * unit.n_inner..rows.end * unit.n_inner;
                    let gate = gate.map(|gate| &gate[elements.clone()]);
                    let d_gate = match self.is_gated {
                        true => &mut d_gate[elements.clone()],
                        false => &mut [],
                    };
                    let (up, d_up) = (&up[elements.clone()], &mut d_up[elements.clone()]);
                    let inner = &mut inner[elements.clone()];
                    let d_inner = &mut d_inner[elements];
                    activate_elements(self.activation, gate, up, inner);
                    let pairs = inner
                        .chunks_exact(unit.n_inner)
                        .zip(d_inner.chunks_exact(unit.n_inner));
                    for (d_weight, (inner, d_inner)) in
                        d_weights[rows.clone()].iter_mut().zip(pairs)
                    {
                        *d_weight = dot(inner, d_inner);
                    }
                    scale_rows(inner, &weights[rows.clone()]);
                    scale_rows(d_inner, &weights[rows]);
                    activation_gradient(self.activation, gate, up, d_inner, d_gate, d_up);
                }
            },
        );
        // Safety: the units cover all elements, and all rows in each part.
        let (weighted, d_weights) = unsafe { (weighted.finish(), d_weights.finish()) };
        // Safety: as above.
        let d_before = d_before.map(|buffer| unsafe { buffer.finish() });
        // Gate and up, or up alone.
        let into_inner: Vec<_> = (self.gate().into_iter().chain([self.up()]))
            .zip(&d_before[usize::from(!self.is_gated)..])
            .collect();

        let mut gradients = vec![Gradient::None; pass.wanted.len()];
        gradients[0] = pass.if_wanted(0, || {
            let into_inner: Vec<_> = (into_inner.iter())
                .map(|(i, d_before)| (Matrix::of_view(&pass.input(*i)), d_before))
                .collect();
            let ones = vec![E::Real::from_f64(1.0); ROWS];
            let d_x = self.by_columns(
                [n_tokens, d_model],
                |columns, [tile, x_turned, y_turned]| {
                    let n = columns.range.len();
                    for unit in &self.units {
                        let tile = room(tile, unit.n_rows * n);
                        let rows_of_experts: Vec<_> = (into_inner.iter())
                            .map(|(weight, _)| {
                                weight.rows(unit.expert * d_model + columns.range.start, n)
                            })
                            .collect();
                        let pairs = (rows_of_experts.iter().zip(&into_inner)).map(
                            |(weight, (_, d_before))| {
                                (&d_before[unit.inner()], unit.inner_columns(weight))
                            },
                        );
                        multiply_back(unit.n_rows, pairs, tile, [&mut *x_turned, &mut *y_turned]);
                        add_to_tokens(tile, &ones, &self.tokens[unit.rows()], columns);
                    }
                },
            );
            Array::from_reals(d_x, x_view.shape())
        });
        gradients[1] = pass.if_wanted(1, || {
            let parts = d_weights
                .chunks_exact(n_rows.max(1))
                .map(<[E::Real]>::to_vec);
            let sum = parts.reduce(add).unwrap_or_default();
            Array::from_reals(sum, &[n_rows])
        });
        let wanted: Vec<_> = (into_inner.into_iter())
            .filter(|(i, _)| pass.wanted[*i])
            .collect();
        if !wanted.is_empty() {
            let sizes = [d_model, d_ff];
            let found = self.of_weights(wanted.len(), sizes, |to, unit, store, [rows, turn]| {
                let (n, n_inner) = (unit.n_rows, unit.n_inner);
                let rows = gather(&self.tokens[unit.rows()], &x, d_model, rows);
                let x = Matrix::new(turned(rows, [n, d_model], turn), [d_model, n]);
                let first = unit.expert * d_model * d_ff + unit.first_inner;
                for (to, (_, d_before)) in to.iter().zip(&wanted) {
                    let d_before = Matrix::new(&d_before[unit.inner()], [n, n_inner]);
                    // Safety: each part of the inner width has columns of its own.
                    let to = unsafe { Target::columns(to, first, [d_model, n_inner], d_ff) };
                    product_on(Threads::One, &x, &d_before, to, store);
                }
            });
            for ((i, _), elements) in wanted.iter().zip(found) {
                gradients[*i] = Gradient::Of(Array::from_reals(elements, pass.input(*i).shape()));
            }
        }
        gradients[self.down()] = pass.if_wanted(self.down(), || {
            let sizes = [d_model, d_ff];
            let mut found = self.of_weights(1, sizes, |to, unit, store, [rows, turn]| {
                let (n, n_inner) = (unit.n_rows, unit.n_inner);
                let rows = gather(&self.tokens[unit.rows()], &d_output, d_model, rows);
                let inner = turned(&weighted[unit.inner()], [n, n_inner], turn);
                let first = (unit.expert * d_ff + unit.first_inner) * d_model;
                // Safety: each part of the inner width has rows of its own.
                let to = unsafe { to[0].part(first, n_inner * d_model) };
                let to = Target::new(to, [n_inner, d_model]);
                let (inner, rows) = (
                    Matrix::new(inner, [n_inner, n]),
                    Matrix::new(rows, [n, d_model]),
                );
                product_on(Threads::One, &inner, &rows, to, store);
            });
            Array::from_reals(found.remove(0), down_view.shape())
        });
        gradients
    }
}
