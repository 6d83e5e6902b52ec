//! The CPU's way: a thread takes some rows of an expert through all its layers. What comes out for a token is added up in
//! the order of the experts, whatever the number of threads, each time that some units for each thread are done.

use std::{
    cmp::Reverse,
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Scratch, Shared, Stored, View, kernel,
    matrix::{Matrix, Store, Target, Threads, product_on},
    rows,
};
use rayon::prelude::*;

use super::{
    ExpertRows,
    products::{Rows, SumBack, gather, gather_turned, multiply_inner, room, turned},
    units::{Part, Unit, cut, parts, rows_of, units, waves, widest_part},
};
use crate::{
    Activation,
    operators::{
        activation::{activate_elements, activation_gradient},
        combine::dot,
        embedding::Groups,
    },
};

/// Rows whose inner elements, those before the activation and the gradients of both stay in the second cache.
const ROWS_IN_CACHE: usize = 16;
/// Up to so many rows in all are left to one thread: on two cores it reads the weights as fast as both, which would have
/// to wait for each other.
const ROWS_OF_ONE_THREAD: usize = 8;

kernel! {
    /// Multiplies each row with its weight.
    fn scale_rows<'a, R: Real>(_simd: S, rows: &'a mut [R], weights: &'a [R]) -> () {
        let width = rows.len() / weights.len().max(1);
        for (row, weight) in rows.chunks_exact_mut(width.max(1)).zip(weights) {
            row.iter_mut().for_each(|x| *x = *x * *weight);
        }
    }
}

kernel! {
    /// Adds rows of a token, each times its weight, of which `outputs` has those from `first` on.
    fn add_rows<'a, R: Real>(
        _simd: S,
        outputs: &'a [R],
        first: usize,
        weights: &'a [R],
        rows: &'a [u32],
        to: &'a mut [R],
    ) -> () {
        for row in rows {
            let row = *row as usize;
            let output = &outputs[(row - first) * to.len()..][..to.len()];
            to.iter_mut().zip(output).for_each(|(to, x)| *to += weights[row] * *x);
        }
    }
}

/// Inputs: `x`, the weights of the rows, gate's weights if there is one, up's and down's.
pub(super) struct Experts {
    activation: Activation,
    is_gated: bool,
    tokens: Vec<usize>,
    /// Of each token, its rows.
    rows_of_tokens: Groups,
    units: Vec<Unit>,
    n_experts: usize,
}

impl std::fmt::Debug for Experts {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Experts of {} rows", self.tokens.len())
    }
}

/// What goes into the activation, or its gradients, of all rows: of gate, if there is one, and up.
#[derive(Debug)]
pub(super) struct Before<R> {
    gate: Vec<R>,
    up: Vec<R>,
}

impl Experts {
    pub(super) fn new(
        activation: Activation,
        rows: ExpertRows<'_>,
        n_tokens: usize,
        is_gated: bool,
    ) -> Self {
        Self {
            activation,
            is_gated,
            tokens: rows.tokens.to_vec(),
            rows_of_tokens: Groups::new(n_tokens, rows.tokens),
            units: units(rows.group_sizes),
            n_experts: rows.group_sizes.len(),
        }
    }

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

    /// Where elements of a gate are: nowhere, if there is none.
    fn of_gate(&self, elements: Range<usize>) -> Range<usize> {
        match self.is_gated {
            true => elements,
            false => 0..0,
        }
    }

    /// The elements of a gate, if there is one.
    fn if_gated<'a, R>(&self, gate: &'a [R]) -> Option<&'a [R]> {
        self.is_gated.then_some(gate)
    }

    /// Memory for what goes into the activation, of gate, if there is one, and up.
    fn buffers<R: Real>(&self, d_ff: usize) -> [Buffer<R>; 2] {
        let elements = 0..self.tokens.len() * d_ff;
        [self.of_gate(elements.clone()), elements].map(|of| Buffer::new(of.len()))
    }

    /// Those of a unit.
    ///
    /// # Safety
    ///
    /// Nobody else has those of this unit.
    unsafe fn before_of<'a, R>(
        &self,
        unit: &Unit,
        d_ff: usize,
        [gate, up]: &[Shared<'a, R>; 2],
    ) -> [&'a mut [R]; 2] {
        let elements = unit.elements(d_ff);
        let of_gate = self.of_gate(elements.clone());
        // Safety: the caller's promise.
        unsafe {
            [
                gate.part(of_gate.start, of_gate.len()),
                up.part(elements.start, elements.len()),
            ]
        }
    }

    /// `N` times the memory for what a task holds of any unit, for as many of `n_tasks` as run at once.
    fn scratch<R: Real, const N: usize>(
        &self,
        n_tasks: usize,
        [d_model, d_ff]: [usize; 2],
    ) -> Scratch<[Buffer<R>; N], impl Fn() -> [Buffer<R>; N]> {
        let n_rows = self.units.iter().map(|unit| unit.rows.len()).max();
        let size = n_rows.unwrap_or(0) * d_model.max(widest_part(d_ff));
        let n_tasks = if self.are_few() { 1 } else { n_tasks };
        Scratch::new(n_tasks, move || [(); N].map(|()| Buffer::new(size)))
    }

    /// Whether the rows are so few that one thread computes them all.
    fn are_few(&self) -> bool {
        self.tokens.len() <= ROWS_OF_ONE_THREAD
    }

    /// Calls for each of some tasks, of so many rows each, the longest first, so that threads end at about the same time.
    fn for_each(&self, n_rows: &[usize], work: impl Fn(usize) + Sync) {
        let mut order: Vec<usize> = (0..n_rows.len()).collect();
        order.sort_by_key(|task| Reverse(n_rows[*task]));
        if self.are_few() {
            return order.into_iter().for_each(work);
        }
        let n_begun = AtomicUsize::new(0);
        let n_threads = order.len().min(rayon::current_num_threads());
        (0..n_threads)
            .into_par_iter()
            .with_max_len(1)
            .for_each(|_| {
                while let Some(task) = order.get(n_begun.fetch_add(1, Ordering::Relaxed)) {
                    work(*task);
                }
            });
    }

    /// Calls for each unit that has rows, with the place of an output of `width` elements for each row.
    /// Returns the weighted sums of the outputs of each token, in the order of the rows: `[n_tokens, width]`.
    fn sum_by_token<R: Real>(
        &self,
        width: usize,
        weights: &[R],
        sizes: [usize; 2],
        work: impl Fn(&Unit, &[usize], &mut [R], &mut [Buffer<R>; 4]) + Sync,
    ) -> Vec<R> {
        let units: Vec<_> = (self.units.iter())
            .filter(|unit| !unit.rows.is_empty())
            .collect();
        let waves = waves(&units, width);
        let n_rows = waves.iter().map(|wave| rows_of(wave).len()).max();
        let mut outputs = Buffer::new(n_rows.unwrap_or(0) * width);
        let n_tokens = self.rows_of_tokens.n_targets();
        let mut sums = vec![R::default(); n_tokens * width];
        let scratch = self.scratch(units.len(), sizes);
        for wave in waves {
            let rows = rows_of(wave);
            let to_outputs = outputs.shared();
            let lengths: Vec<_> = wave.iter().map(|unit| unit.rows.len()).collect();
            self.for_each(&lengths, |i| {
                let unit = wave[i];
                let first = unit.rows.start - rows.start;
                // Safety: each unit has rows of its own.
                let output = unsafe { to_outputs.part(first * width, unit.rows.len() * width) };
                let tokens = &self.tokens[unit.rows.clone()];
                scratch.lend(|scratch| work(unit, tokens, output, scratch));
            });
            // Safety: the units have written their rows, and nobody writes them now.
            let outputs = unsafe { to_outputs.part(0, rows.len() * width) };
            if width == 0 {
                continue;
            }
            let to_sums = Shared::new(&mut sums);
            rows::for_each_range(n_tokens, width, |tokens| {
                for token in tokens {
                    // Safety: each token belongs to one range.
                    let to = unsafe { to_sums.part(token * width, width) };
                    let of_token = self.rows_of_tokens.of(token);
                    let of_wave = of_token.partition_point(|row| (*row as usize) < rows.start)
                        ..of_token.partition_point(|row| (*row as usize) < rows.end);
                    add_rows(outputs, rows.start, weights, &of_token[of_wave], to);
                }
            });
        }
        sums
    }

    /// The sums. What goes into the activation is written to `before`, where it is to be kept.
    fn mix<E: Stored>(
        &self,
        inputs: &[View<'_, E>],
        before: Option<&[Shared<'_, E::Real>; 2]>,
    ) -> Array<E> {
        let (x, n_tokens, d_model) = (inputs[0].reals(), inputs[0].n_rows(), inputs[0].width());
        let gate_weight = self.gate().map(|gate| Matrix::of_view(&inputs[gate]));
        let [up_weight, down_weight] =
            [self.up(), self.down()].map(|i| Matrix::of_view(&inputs[i]));
        let d_ff = inputs[self.up()].width();

        let weights = inputs[1].reals();
        let sizes = [d_model, d_ff];
        let work = |unit: &Unit, tokens: &[usize], output: &mut [_], scratch: &mut [_; 4]| {
            let [rows, gates, ups, inners] = scratch;
            // Safety: each unit has rows of its own.
            let mut kept = before.map(|before| unsafe { self.before_of(unit, d_ff, before) });
            let rows = Rows::new(&x, [n_tokens, d_model], tokens, widest_part(d_ff), rows);
            for part in parts(d_ff) {
                let elements = unit.inner(&part);
                let of_gate = self.of_gate(elements.clone());
                let inner = room(inners, elements.len());
                let [gate, up] = match &mut kept {
                    Some([gate, up]) => [&mut gate[of_gate], &mut up[elements]],
                    None => [room(gates, of_gate.len()), room(ups, elements.len())],
                };
                let of_part = |weight| part.columns(weight, unit.expert * d_model, d_model);
                if let Some(weight) = &gate_weight {
                    rows.multiply(&of_part(weight), gate);
                }
                rows.multiply(&of_part(&up_weight), up);
                activate_elements(self.activation, self.if_gated(gate), up, inner);
                let (n, store) = (unit.rows.len(), part.store());
                let weight = part.rows(&down_weight, unit.expert * d_ff);
                multiply_inner(n, inner, &weight, output, store);
            }
        };
        let y = self.sum_by_token(d_model, &weights, sizes, work);
        Array::from_reals(y, &[n_tokens, d_model])
    }

    /// The gradients of the weights that are wanted: of an expert and a part of the inner width in each task. `weighted`
    /// are the inner elements times the weights of the rows, `d_before` their gradients before the activation.
    fn weight_gradients<E: Stored>(
        &self,
        pass: &Pass<'_, E, Before<E::Real>>,
        d_before: &Before<E::Real>,
        weighted: &[E::Real],
        d_output: &[E::Real],
    ) -> Vec<Gradient<E>> {
        let x_view = pass.input(0);
        let (x, d_model) = (x_view.reals(), x_view.width());
        let d_ff = pass.input(self.up()).width();
        let of_input = |i: usize| match pass.wanted[i] {
            true => Some(Buffer::new(self.n_experts * d_model * d_ff)),
            false => None,
        };
        let mut gate = self.gate().and_then(of_input);
        let [mut up, mut down] = [self.up(), self.down()].map(of_input);
        let into_inner = [(&mut gate, &d_before.gate), (&mut up, &d_before.up)]
            .map(|(to, d_before)| to.as_mut().map(|to| (to.shared(), d_before)));
        let into_inner: Vec<_> = into_inner.into_iter().flatten().collect();
        let to_down = down.as_mut().map(Buffer::shared);

        let of_experts: Vec<_> = (self.units)
            .chunk_by(|a, b| a.expert == b.expert)
            .flat_map(|units| parts(d_ff).map(move |part| (units, part)))
            .collect();
        let scratch = self.scratch(of_experts.len(), [d_model, d_ff]);
        let work = |i: usize, [rows, turn]: &mut [_; 2]| {
            let (units, part): &(&[Unit], Part) = &of_experts[i];
            let n_inner = part.inner.len();
            for (i, unit) in units.iter().enumerate() {
                let store = match i {
                    0 => Store::Replace,
                    _ => Store::Add,
                };
                let (n, tokens) = (unit.rows.len(), &self.tokens[unit.rows.clone()]);
                let start = unit.elements(d_ff).start;
                let of_part = unit.inner(part);
                let of_part = start + of_part.start..start + of_part.end;
                if !into_inner.is_empty() {
                    let x = gather_turned(tokens, &x, d_model, turn);
                    let first = unit.expert * d_model * d_ff + part.inner.start;
                    for (to, d_before) in &into_inner {
                        let d_before = Matrix::new(&d_before[of_part.clone()], [n, n_inner]);
                        // Safety: each part of the inner width has columns of its own.
                        let to = unsafe { Target::columns(to, first, [d_model, n_inner], d_ff) };
                        product_on(Threads::One, &x, &d_before, to, store);
                    }
                }
                if let Some(to) = &to_down {
                    let inner = turned(&weighted[of_part], [n, n_inner], turn);
                    let inner = Matrix::new(inner, [n_inner, n]);
                    let rows = gather(tokens, d_output, d_model, rows);
                    let rows = Matrix::new(rows, [n, d_model]);
                    let first = (unit.expert * d_ff + part.inner.start) * d_model;
                    // Safety: each part of the inner width has rows of its own.
                    let to = unsafe { Target::columns(to, first, [n_inner, d_model], d_model) };
                    product_on(Threads::One, &inner, &rows, to, store);
                }
            }
        };
        let n_rows = |units: &[Unit]| units.iter().map(|unit| unit.rows.len()).sum();
        let lengths: Vec<_> = (of_experts.iter())
            .map(|(units, _)| n_rows(units))
            .collect();
        self.for_each(&lengths, |i| scratch.lend(|scratch| work(i, scratch)));
        let finish = |(i, gradient): (usize, Option<Buffer<E::Real>>)| match gradient {
            // Safety: each expert has a unit, and all parts of the inner width are written.
            Some(of) => Gradient::Of(Array::from_reals(
                unsafe { of.finish() },
                pass.input(i).shape(),
            )),
            None => Gradient::None,
        };
        let found = [(self.up(), up), (self.down(), down)];
        let found = self.gate().map(|i| (i, gate)).into_iter().chain(found);
        found.map(finish).collect()
    }
}

impl Operator for Experts {
    type Saved<E: Stored> = Before<E::Real>;

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, Before<E::Real>) {
        let mut before = self.buffers(inputs[self.up()].width());
        let y = self.mix(inputs, Some(&before.each_mut().map(Buffer::shared)));
        // Safety: the units cover all rows.
        let [gate, up] = before.map(|buffer| unsafe { buffer.finish() });
        (vec![y], Before { gate, up })
    }

    fn infer<E: Stored>(&self, inputs: &[View<'_, E>]) -> Vec<Array<E>> {
        vec![self.mix(inputs, None)]
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, Before<E::Real>>) -> Vec<Gradient<E>> {
        let d_model = pass.input(0).width();
        let weights = pass.input(1).reals();
        let d_output = pass.gradient(0).expect("of the one output").reals();
        let views = [self.up(), self.down()].map(|i| pass.input(i));
        let [up_weight, down_weight] = views.each_ref().map(Matrix::of_view);
        let gate_view = self.gate().map(|gate| pass.input(gate));
        let gate_weight = gate_view.as_ref().map(Matrix::of_view);
        let (d_ff, n_rows) = (views[0].width(), self.tokens.len());

        // The inner elements times the weights of the rows, and their gradients before the activation.
        let (mut weighted, mut d_before) = (Buffer::new(n_rows * d_ff), self.buffers(d_ff));
        let (to_weighted, to_before) = (weighted.shared(), d_before.each_mut().map(Buffer::shared));
        let mut d_weights = Buffer::new(n_rows);
        let to_weights = d_weights.shared();
        let sizes = [d_model, d_ff];
        let work = |unit: &Unit, tokens: &[usize], d_rows: &mut [_], scratch: &mut [_; 4]| {
            let [rows, d_inner, sum, columns] = scratch;
            let n = unit.rows.len();
            let d_output = gather(tokens, &d_output, d_model, rows);
            // Safety: each unit has rows of its own.
            let ([d_gate, d_up], weighted, d_weights) = unsafe {
                (
                    self.before_of(unit, d_ff, &to_before),
                    unit.part_of(&to_weighted, d_ff),
                    unit.part_of(&to_weights, 1),
                )
            };
            d_weights.fill(E::Real::default());
            let elements = unit.elements(d_ff);
            let gate = &pass.saved.gate[self.of_gate(elements.clone())];
            let up = &pass.saved.up[elements];
            for part in parts(d_ff) {
                let n_inner = part.inner.len();
                let of_part = unit.inner(&part);
                let d_inner = room(d_inner, of_part.len());
                let mut back = SumBack::new(n, d_inner, [&mut *sum, &mut *columns]);
                back.add(d_output, &part.rows(&down_weight, unit.expert * d_ff));
                back.finish();
                // A few rows at a time, which stay in the cache from one function to the next.
                for rows in cut(n, ROWS_IN_CACHE) {
                    let of_rows = rows.start * n_inner..rows.end * n_inner;
                    let d_inner = &mut d_inner[of_rows.clone()];
                    let of_unit = of_part.start + of_rows.start..of_part.start + of_rows.end;
                    let gate = self.if_gated(&gate[self.of_gate(of_unit.clone())]);
                    let up = &up[of_unit.clone()];
                    let inner = &mut weighted[of_unit.clone()];
                    activate_elements(self.activation, gate, up, inner);
                    let width = n_inner.max(1);
                    let pairs = (inner.chunks_exact(width)).zip(d_inner.chunks_exact(width));
                    for (d_weight, (inner, d_inner)) in
                        d_weights[rows.clone()].iter_mut().zip(pairs)
                    {
                        *d_weight += dot(inner, d_inner);
                    }
                    let weights = &weights[unit.rows.clone()][rows];
                    scale_rows(inner, weights);
                    scale_rows(d_inner, weights);
                    let d_gate = &mut d_gate[self.of_gate(of_unit.clone())];
                    activation_gradient(
                        self.activation,
                        gate,
                        up,
                        d_inner,
                        d_gate,
                        &mut d_up[of_unit],
                    );
                }
            }
            if pass.wanted[0] {
                let mut back = SumBack::new(n, d_rows, [sum, columns]);
                for part in parts(d_ff) {
                    let mut add = |weight: &Matrix<'_, E::Real>, d_before: &[E::Real]| {
                        let weight = part.columns(weight, unit.expert * d_model, d_model);
                        back.add(&d_before[unit.inner(&part)], &weight);
                    };
                    if let Some(weight) = &gate_weight {
                        add(weight, d_gate);
                    }
                    add(&up_weight, d_up);
                }
                back.finish();
            }
        };
        let width = if pass.wanted[0] { d_model } else { 0 };
        let ones = vec![E::Real::from_f64(1.0); n_rows];
        let d_x = self.sum_by_token(width, &ones, sizes, work);
        // Safety: the units cover all rows.
        let [weighted, d_weights] = [weighted, d_weights].map(|of| unsafe { of.finish() });
        // Safety: as above.
        let [gate, up] = d_before.map(|buffer| unsafe { buffer.finish() });
        let d_x = pass.if_wanted(0, || Array::from_reals(d_x, pass.input(0).shape()));
        let d_weights = pass.if_wanted(1, || Array::from_reals(d_weights, &[n_rows]));
        let of_weights = self.weight_gradients(pass, &Before { gate, up }, &weighted, &d_output);
        [d_x, d_weights].into_iter().chain(of_weights).collect()
    }
}
