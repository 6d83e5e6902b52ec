//! Linear projections.

use burn::{backend::DispatchTensor, module::Param, nn::Linear, tensor::Tensor};
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Shared, Stored, View,
    matrix::{Matrix, Store, product},
    rows, run,
};

use super::{Implementation, on_rows, rows_of, sum_of_rows};

/// `y = x W + b`, as burn-nn's `Linear` has it.
///
/// # Shapes
///
/// - `x`: `[.., d_input]`
/// - `weight`: `[d_input, d_output]`, in any order of memory: a transposed table is read in place
/// - `bias`: `[d_output]`
/// - output: `[.., d_output]`
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::operators::linear;
///
/// let device = Device::flex();
/// let x = Tensor::<3>::ones([2, 5, 3], &device);
/// let y = linear(x, Tensor::ones([3, 4], &device), Some(Tensor::ones([4], &device)));
/// assert_eq!(y.dims(), [2, 5, 4]);
/// assert_eq!(y.max().into_scalar::<f32>(), 4.0);
/// ```
///
/// # Panics
///
/// If the widths disagree; the message names them.
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    linear_by(Implementation::of(&x.device()), x, weight, bias)
}

/// [`linear`] with the parameters of burn-nn's layer.
///
/// # Panics
///
/// As [`linear`].
pub fn project<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    let (weight, bias) = parameters(layer);
    linear(x, weight, bias)
}

/// [`linears`] with the parameters of burn-nn's layers.
///
/// # Panics
///
/// As [`linears`].
pub fn project_all<const D: usize, const N: usize>(
    layers: [&Linear; N],
    x: Tensor<D>,
) -> [Tensor<D>; N] {
    linears(x, layers.map(parameters))
}

fn parameters(layer: &Linear) -> (Tensor<2>, Option<Tensor<1>>) {
    (layer.weight.val(), layer.bias.as_ref().map(Param::val))
}

/// [`linear`] by a given implementation.
///
/// # Panics
///
/// As [`linear`].
pub fn linear_by<const D: usize>(
    implementation: Implementation,
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
) -> Tensor<D> {
    let [output] = linears_by(implementation, x, [(weight, bias)]);
    output
}

/// Several projections of one input, computed and differentiated together: query, key and value, or gate and up.
///
/// The gradient of the input is summed inside the products, not by tensor operations between them.
///
/// # Shapes
///
/// - `x`: `[.., d_input]`
/// - each weight `[d_input, d_output]` and bias `[d_output]`, with a `d_output` of its own
/// - outputs: `[.., d_output]`
///
/// # Panics
///
/// If the widths disagree, or there are more than three projections with a bias.
pub fn linears<const D: usize, const N: usize>(
    x: Tensor<D>,
    projections: [(Tensor<2>, Option<Tensor<1>>); N],
) -> [Tensor<D>; N] {
    linears_by(Implementation::of(&x.device()), x, projections)
}

/// [`linears`] by a given implementation.
///
/// # Panics
///
/// As [`linears`].
pub fn linears_by<const D: usize, const N: usize>(
    implementation: Implementation,
    x: Tensor<D>,
    projections: [(Tensor<2>, Option<Tensor<1>>); N],
) -> [Tensor<D>; N] {
    let dims = x.dims();
    for (weight, bias) in &projections {
        let [d_input, d_output] = weight.dims();
        assert_eq!(
            dims[D - 1],
            d_input,
            "d_input: the input has {} components, the weight {d_input}",
            dims[D - 1]
        );
        if let Some(bias) = bias {
            let [n] = bias.dims();
            assert_eq!(
                n, d_output,
                "d_output: the bias has {n}, the weight {d_output}"
            );
        }
    }
    if implementation != Implementation::Native {
        return projections
            .map(|(weight, bias)| on_rows(x.clone(), |x| definition(x, weight, bias)));
    }
    let (products, inputs) = Products::of(rows_of(x), projections);
    run::<_, N>(Linears(products), inputs).map(|output| {
        let output = Tensor::<2>::from_dispatch(output);
        let mut dims = dims;
        dims[D - 1] = output.dims()[1];
        output.reshape(dims)
    })
}

fn definition(x: Tensor<4>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<4> {
    let y = x.matmul(weight.unsqueeze());
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// Products of one input. The inputs of such an operator are `x`, the weights, then the biases of those that have one.
#[derive(Debug)]
pub(super) struct Products {
    has_bias: Vec<bool>,
}

impl Products {
    /// With the inputs of the operator.
    pub(super) fn of<const W: usize, const B: usize, const N: usize>(
        x: DispatchTensor,
        projections: [(Tensor<W>, Option<Tensor<B>>); N],
    ) -> (Self, Vec<DispatchTensor>) {
        let has_bias = projections.iter().map(|(_, bias)| bias.is_some()).collect();
        let mut inputs = vec![x];
        let mut biases = Vec::new();
        for (weight, bias) in projections {
            inputs.push(weight.into_dispatch());
            biases.extend(bias.map(Tensor::into_dispatch));
        }
        inputs.extend(biases);
        (Self { has_bias }, inputs)
    }

    pub(super) fn len(&self) -> usize {
        self.has_bias.len()
    }

    /// Where the bias of product `i` is among the inputs.
    pub(super) fn bias(&self, i: usize) -> Option<usize> {
        let before = self.has_bias[..i].iter().filter(|has| **has).count();
        self.has_bias[i].then_some(1 + self.len() + before)
    }

    /// Whether input `i` is no bias, and so needed in the backward pass.
    pub(super) fn is_factor(&self, i: usize) -> bool {
        i <= self.len()
    }
}

#[derive(Debug)]
struct Linears(Products);

impl Operator for Linears {
    type Saved<E: Stored> = ();

    fn keeps_input(&self, i: usize) -> bool {
        self.0.is_factor(i)
    }

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, ()) {
        let x = Matrix::of_view(&inputs[0]);
        let [n_rows, _] = x.dims();
        let outputs = (0..self.0.len()).map(|i| {
            let weight = Matrix::of_view(&inputs[1 + i]);
            let [_, width] = weight.dims();
            let bias = self.0.bias(i).map(|bias| inputs[bias].reals());
            let output = multiply_from(&x, &weight, bias.as_deref());
            Array::from_reals(output, &[n_rows, width])
        });
        (outputs.collect(), ())
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, ()>) -> Vec<Gradient<E>> {
        let n = self.0.len();
        let x = Matrix::of_view(&pass.input(0));
        let mut d_x: Option<Vec<E::Real>> = None;
        let mut gradients = vec![Gradient::None; pass.wanted.len()];
        for i in 0..n {
            let Some(d_output) = pass.gradient(i) else {
                continue;
            };
            let d_output = Matrix::of_view(&d_output);
            let weight = pass.input(1 + i);
            if pass.wanted[0] {
                let weight = Matrix::of_view(&weight);
                match &mut d_x {
                    None => d_x = Some(multiply(&d_output, &weight.transposed())),
                    Some(d_x) => product(&d_output, &weight.transposed(), d_x, Store::Add),
                }
            }
            gradients[1 + i] = pass.if_wanted(1 + i, || {
                Array::from_reals(multiply(&x.transposed(), &d_output), weight.shape())
            });
            if let Some(bias) = self.0.bias(i) {
                let [_, width] = d_output.dims();
                gradients[bias] = pass.if_wanted(bias, || {
                    let d_output = pass.gradient(i).expect("it was there").reals();
                    Array::from_reals(sum_of_rows(&d_output, width), &[width])
                });
            }
        }
        if let Some(d_x) = d_x {
            gradients[0] = Gradient::Of(Array::from_reals(d_x, pass.input(0).shape()));
        }
        gradients
    }
}

/// `a b`
pub(super) fn multiply<R: Real>(a: &Matrix<'_, R>, b: &Matrix<'_, R>) -> Vec<R> {
    multiply_from(a, b, None)
}

/// `bias + a b` in every row, or `a b`.
fn multiply_from<R: Real>(a: &Matrix<'_, R>, b: &Matrix<'_, R>, bias: Option<&[R]>) -> Vec<R> {
    let ([n_rows, inner], [_, width]) = (a.dims(), b.dims());
    let mut output = Buffer::new(n_rows * width);
    // Safety: nobody else has the buffer; a product that replaces writes all of it, but for an empty inner axis.
    unsafe {
        let to = output.shared().part(0, n_rows * width);
        match bias {
            Some(bias) if width > 0 => {
                let rows = Shared::new(to);
                rows::for_each_range(n_rows, width, |range| {
                    // Safety: each row belongs to one range.
                    range.for_each(|i| rows.part(i * width, width).copy_from_slice(bias));
                });
                product(a, b, to, Store::Add);
            }
            _ if inner == 0 => to.fill(R::default()),
            _ => product(a, b, to, Store::Replace),
        }
        output.finish()
    }
}
