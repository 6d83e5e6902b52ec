//! Activations: plain, and of a gate.

use std::ops::Range;

use burn::tensor::Tensor;
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Shared, Stored, View, each_vector, kernel,
    math::{Function, Gelu, GeluTanh, Relu, Silu, SquaredRelu},
    rows, run_one,
};

use super::{Implementation, add, rows_of};
use crate::Activation;

/// `f(x + bias)`: an activation after the bias of the projection before it, in one pass.
///
/// # Shapes
///
/// - `x`, output: `[.., width]`
/// - `bias`: `[width]`
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{Activation, operators::activate};
///
/// let device = Device::flex();
/// let x = Tensor::<2>::from_floats([[-1.0, 2.0]], &device);
/// let bias = Tensor::<1>::from_floats([0.5, 1.0], &device);
/// let y: Vec<f32> = activate(Activation::Relu, x, Some(bias)).into_data().iter::<f32>().collect();
/// assert_eq!(y, [0.0, 3.0]);
/// ```
///
/// # Panics
///
/// If the widths differ.
pub fn activate<const D: usize>(
    activation: Activation,
    x: Tensor<D>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    activate_by(Implementation::of(&x.device()), activation, x, bias)
}

/// [`activate`] by a given implementation.
///
/// # Panics
///
/// As [`activate`].
pub fn activate_by<const D: usize>(
    implementation: Implementation,
    activation: Activation,
    x: Tensor<D>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let dims = x.dims();
    check_bias(dims[D - 1], bias.as_ref());
    if implementation != Implementation::Native {
        return activation.definition(add_bias(x, bias));
    }
    run_on_rows(
        Activated {
            activation,
            is_gate: false,
        },
        [x],
        [bias],
    )
}

/// `f(gate + gate_bias) (up + up_bias)`: SwiGLU with SiLU, GeGLU with GELU, ReGLU with ReLU.
///
/// Shazeer 2020, <https://arxiv.org/abs/2002.05202>.
///
/// # Shapes
///
/// - `gate`, `up`, output: `[.., width]`
/// - each bias: `[width]`
///
/// # Panics
///
/// If the shapes of gate and up differ, or the width of a bias.
pub fn gate<const D: usize>(
    activation: Activation,
    gate: Tensor<D>,
    up: Tensor<D>,
    biases: Option<[Tensor<1>; 2]>,
) -> Tensor<D> {
    gate_by(
        Implementation::of(&gate.device()),
        activation,
        gate,
        up,
        biases,
    )
}

/// [`gate`] by a given implementation.
///
/// # Panics
///
/// As [`gate`].
pub fn gate_by<const D: usize>(
    implementation: Implementation,
    activation: Activation,
    gate: Tensor<D>,
    up: Tensor<D>,
    biases: Option<[Tensor<1>; 2]>,
) -> Tensor<D> {
    let dims = gate.dims();
    assert_eq!(dims, up.dims(), "the shapes of gate and up differ");
    let biases = match biases {
        Some(biases) => biases.map(Some),
        None => [None, None],
    };
    biases
        .iter()
        .for_each(|bias| check_bias(dims[D - 1], bias.as_ref()));
    if implementation != Implementation::Native {
        let [gate_bias, up_bias] = biases;
        return activation.definition(add_bias(gate, gate_bias)) * add_bias(up, up_bias);
    }
    run_on_rows(
        Activated {
            activation,
            is_gate: true,
        },
        [gate, up],
        biases,
    )
}

fn check_bias(width: usize, bias: Option<&Tensor<1>>) {
    if let Some(bias) = bias {
        let [n] = bias.dims();
        assert_eq!(
            n, width,
            "width: the bias has {n} components, the input {width}"
        );
    }
}

fn add_bias<const D: usize>(x: Tensor<D>, bias: Option<Tensor<1>>) -> Tensor<D> {
    match bias {
        Some(bias) => x + bias.unsqueeze(),
        None => x,
    }
}

fn run_on_rows<const D: usize, const N: usize>(
    operator: Activated,
    inputs: [Tensor<D>; N],
    biases: [Option<Tensor<1>>; N],
) -> Tensor<D> {
    let dims = inputs[0].dims();
    let rows = inputs.map(rows_of);
    let biases = biases.into_iter().flatten().map(Tensor::into_dispatch);
    let output: Tensor<2> = run_one(operator, rows.into_iter().chain(biases));
    output.reshape(dims)
}

/// Inputs: `x`, or gate and up; then as many biases, or none.
#[derive(Debug)]
struct Activated {
    activation: Activation,
    is_gate: bool,
}

macro_rules! by_activation {
    ($activation:expr, $function:ident => $run:expr) => {
        match $activation {
            Activation::Relu => {
                let $function = Relu;
                $run
            }
            Activation::SquaredRelu => {
                let $function = SquaredRelu;
                $run
            }
            Activation::Gelu => {
                let $function = Gelu;
                $run
            }
            Activation::GeluTanh => {
                let $function = GeluTanh;
                $run
            }
            Activation::Silu => {
                let $function = Silu;
                $run
            }
        }
    };
}

impl Activated {
    fn n_rows_inputs(&self) -> usize {
        1 + usize::from(self.is_gate)
    }
}

/// `x` or gate, then up, then their biases, each empty where there is none.
#[derive(Clone, Copy)]
struct Sources<'a, R> {
    width: usize,
    x: &'a [R],
    up: &'a [R],
    bias: &'a [R],
    up_bias: &'a [R],
}

impl<'a, R> Sources<'a, R> {
    /// All elements as one row, without biases.
    fn of_elements(gate: Option<&'a [R]>, up: &'a [R]) -> Self {
        let (x, up) = match gate {
            Some(gate) => (gate, up),
            None => (up, &[][..]),
        };
        Self {
            width: x.len(),
            x,
            up,
            bias: &[],
            up_bias: &[],
        }
    }
}

/// Calls with the elements of the inputs.
fn with_sources<E: Stored, T>(
    n_rows_inputs: usize,
    inputs: &[View<'_, E>],
    run: impl FnOnce(Sources<'_, E::Real>) -> T,
) -> T {
    let reals = |i: usize| inputs.get(i).map(|view| view.reals()).unwrap_or_default();
    let x = reals(0);
    let (up, up_bias) = match n_rows_inputs {
        2 => (reals(1), reals(3)),
        _ => Default::default(),
    };
    let bias = reals(n_rows_inputs);
    run(Sources {
        width: inputs[0].width(),
        x: &x,
        up: &up,
        bias: &bias,
        up_bias: &up_bias,
    })
}

/// `f(gate) up`, or `f(up)` without a gate, element by element, on this thread.
pub(super) fn activate_elements<R: Real>(
    activation: Activation,
    gate: Option<&[R]>,
    up: &[R],
    to: &mut [R],
) {
    let (sources, to) = (Sources::of_elements(gate, up), Shared::new(to));
    by_activation!(activation, function => forward_rows(function, 0..1, sources, &to));
}

/// The gradients of gate and up in [`activate_elements`]; that of the gate is left as it is if there is none.
pub(super) fn activation_gradient<R: Real>(
    activation: Activation,
    gate: Option<&[R]>,
    up: &[R],
    d_output: &[R],
    d_gate: &mut [R],
    d_up: &mut [R],
) {
    let sources = Sources::of_elements(gate, up);
    let to = match gate {
        Some(_) => [d_gate, d_up],
        None => [d_up, d_gate],
    };
    let to = to.map(Shared::new);
    let mut no_sums = [Vec::new(), Vec::new()];
    by_activation!(activation, function => {
        backward_rows(function, 0..1, sources, d_output, &to, &mut no_sums);
    });
}

impl Operator for Activated {
    type Saved<E: Stored> = ();

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, ()) {
        let (n_rows, width) = (inputs[0].n_rows(), inputs[0].width());
        let mut output = Buffer::new(n_rows * width);
        let to = output.shared();
        with_sources(self.n_rows_inputs(), inputs, |sources| {
            by_activation!(self.activation, function => {
                rows::for_each_range(n_rows, width, |range| forward_rows(function, range, sources, &to));
            });
        });
        // Safety: the ranges cover all rows.
        let output = unsafe { output.finish() };
        (vec![Array::from_reals(output, inputs[0].shape())], ())
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, ()>) -> Vec<Gradient<E>> {
        let inputs: Vec<View<'_, E>> = (0..pass.wanted.len()).map(|i| pass.input(i)).collect();
        let (n_rows, width) = (inputs[0].n_rows(), inputs[0].width());
        let d_output = pass.gradient(0).expect("of the one output").reals();
        let n_rows_inputs = self.n_rows_inputs();
        let has_bias = inputs.len() > n_rows_inputs;
        let size_of = |is_there| if is_there { n_rows * width } else { 0 };
        let (mut d_x, mut d_up) = (
            Buffer::new(n_rows * width),
            Buffer::new(size_of(self.is_gate)),
        );
        let to = [d_x.shared(), d_up.shared()];
        let sums = with_sources(n_rows_inputs, &inputs, |sources| {
            by_activation!(self.activation, function => {
                let of_range = |range| {
                    let sum = || vec![E::Real::default(); if has_bias { width } else { 0 }];
                    let mut sums = [sum(), if self.is_gate { sum() } else { Vec::new() }];
                    backward_rows(function, range, sources, &d_output, &to, &mut sums);
                    sums
                };
                if has_bias {
                    rows::sum_ranges(n_rows, width, of_range, |[a, b], [c, d]| [add(a, c), add(b, d)])
                } else {
                    rows::for_each_range(n_rows, width, |range| { of_range(range); });
                    None
                }
            })
        });
        let zeros = || vec![E::Real::default(); width];
        let [d_bias, d_up_bias] = sums.unwrap_or_else(|| [zeros(), zeros()]);
        let rows = |elements| Gradient::Of(Array::from_reals(elements, inputs[0].shape()));
        let bias = |elements| Gradient::Of(Array::from_reals(elements, &[width]));
        // Safety: the ranges cover all rows.
        let mut gradients = vec![rows(unsafe { d_x.finish() })];
        if self.is_gate {
            // Safety: as above.
            gradients.push(rows(unsafe { d_up.finish() }));
        }
        if has_bias {
            gradients.push(bias(d_bias));
            if self.is_gate {
                gradients.push(bias(d_up_bias));
            }
        }
        gradients
    }
}

/// `n` elements of a row from `at` on, plus those of the bias.
#[inline(always)]
unsafe fn biased<R: Real, S: emberlm_kernels::pulp::Simd>(
    simd: S,
    rows: &[R],
    at: usize,
    bias: &[R],
    j: usize,
    n: usize,
) -> R::Vector<S> {
    // Safety: the caller's.
    unsafe {
        let x = R::load_some(simd, rows.as_ptr().add(at + j), n);
        match bias.is_empty() {
            true => x,
            false => R::vadd(simd, x, R::load_some(simd, bias.as_ptr().add(j), n)),
        }
    }
}

kernel! {
    fn forward_rows<'a, F: Function, R: Real>(
        simd: S,
        function: F,
        range: Range<usize>,
        from: Sources<'a, R>,
        to: &'a Shared<'a, R>,
    ) -> () {
        let _: F = function;
        for i in range {
            let at = i * from.width;
            // Safety: each row belongs to one range; all rows have `width` elements.
            unsafe {
                let to = to.part(at, from.width).as_mut_ptr();
                each_vector!(R, S, from.width, |j, n| {
                    let x = biased(simd, from.x, at, from.bias, j, n);
                    let mut y = F::value::<R, S>(simd, x);
                    if !from.up.is_empty() {
                        y = R::vmul(simd, y, biased(simd, from.up, at, from.up_bias, j, n));
                    }
                    R::store_some(simd, to.add(j), y, n);
                });
            }
        }
    }
}

/// Adds `n` elements to a sum, if there is one.
#[inline(always)]
unsafe fn accumulate<R: Real, S: emberlm_kernels::pulp::Simd>(
    simd: S,
    sum: &mut [R],
    j: usize,
    x: R::Vector<S>,
    n: usize,
) {
    if !sum.is_empty() {
        // Safety: the caller's.
        unsafe {
            let to = sum.as_mut_ptr().add(j);
            R::store_some(simd, to, R::vadd(simd, R::load_some(simd, to, n), x), n);
        }
    }
}

kernel! {
    fn backward_rows<'a, F: Function, R: Real>(
        simd: S,
        function: F,
        range: Range<usize>,
        from: Sources<'a, R>,
        d_output: &'a [R],
        to: &'a [Shared<'a, R>; 2],
        sums: &'a mut [Vec<R>; 2],
    ) -> () {
        let _: F = function;
        let [sum, sum_up] = sums;
        for i in range {
            let at = i * from.width;
            let d_output = d_output[at..at + from.width].as_ptr();
            // Safety: as in the forward pass.
            unsafe {
                let d_x = to[0].part(at, from.width).as_mut_ptr();
                each_vector!(R, S, from.width, |j, n| {
                    let x = biased(simd, from.x, at, from.bias, j, n);
                    let mut d = R::load_some(simd, d_output.add(j), n);
                    let (value, derivative) = F::with_derivative::<R, S>(simd, x);
                    if !from.up.is_empty() {
                        let up = biased(simd, from.up, at, from.up_bias, j, n);
                        let d_up = R::vmul(simd, d, value);
                        R::store_some(simd, to[1].part(at + j, n).as_mut_ptr(), d_up, n);
                        accumulate(simd, sum_up, j, d_up, n);
                        d = R::vmul(simd, d, up);
                    }
                    let d = R::vmul(simd, d, derivative);
                    R::store_some(simd, d_x.add(j), d, n);
                    accumulate(simd, sum, j, d, n);
                });
            }
        }
    }
}
