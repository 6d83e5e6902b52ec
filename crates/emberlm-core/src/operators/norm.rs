//! Layer norm and RMS norm, alone or after the addition of a residual.

use std::ops::Range;

use burn::tensor::Tensor;
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Shared, Stored, View, each_vector, kernel, rows,
    run, run_one,
};

use super::{Implementation, add, rows_of};

/// What a norm is besides its input.
#[derive(Debug, Clone)]
pub struct NormParameters {
    /// Whether the mean is taken off: layer norm; else RMS norm.
    pub centered: bool,
    /// Added to the variance, or to the mean square.
    pub epsilon: f64,
    /// `[width]`; the factors.
    pub scale: Tensor<1>,
    /// `[width]`; added at last.
    pub shift: Option<Tensor<1>>,
}

/// Layer norm of the last axis: `y = (x - mean) / sqrt(var + epsilon) scale + shift`.
///
/// Ba et al. 2016, <https://arxiv.org/abs/1607.06450>; the variance is the mean of squares, without Bessel's correction.
///
/// # Shapes
///
/// - `x`, output: `[.., width]`
/// - `scale`, `shift`: `[width]`
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::operators::layer_norm;
///
/// let device = Device::flex();
/// let x = Tensor::<2>::from_floats([[1.0, 3.0]], &device);
/// let y: Vec<f32> = layer_norm(x, Tensor::ones([2], &device), None, 1e-9).into_data().iter::<f32>().collect();
/// assert_eq!(y, [-1.0, 1.0]);
/// ```
///
/// # Panics
///
/// If the width is zero, or not that of `scale` and `shift`.
pub fn layer_norm<const D: usize>(
    x: Tensor<D>,
    scale: Tensor<1>,
    shift: Option<Tensor<1>>,
    epsilon: f64,
) -> Tensor<D> {
    let parameters = NormParameters {
        centered: true,
        epsilon,
        scale,
        shift,
    };
    norm_by(Implementation::of(&x.device()), x, &parameters)
}

/// RMS norm of the last axis: `y = x / sqrt(mean(x^2) + epsilon) scale`.
///
/// Zhang and Sennrich 2019, <https://arxiv.org/abs/1910.07467>.
///
/// # Shapes
///
/// - `x`, output: `[.., width]`
/// - `scale`: `[width]`
///
/// # Panics
///
/// If the width is zero, or not that of `scale`.
pub fn rms_norm<const D: usize>(x: Tensor<D>, scale: Tensor<1>, epsilon: f64) -> Tensor<D> {
    let parameters = NormParameters {
        centered: false,
        epsilon,
        scale,
        shift: None,
    };
    norm_by(Implementation::of(&x.device()), x, &parameters)
}

/// [`layer_norm`] or [`rms_norm`] by a given implementation.
///
/// # Panics
///
/// As those.
pub fn norm_by<const D: usize>(
    implementation: Implementation,
    x: Tensor<D>,
    parameters: &NormParameters,
) -> Tensor<D> {
    check(x.dims()[D - 1], parameters);
    if implementation != Implementation::Native {
        return definition(x, parameters);
    }
    let dims = x.dims();
    let operator = Norm::new(parameters, false);
    let output: Tensor<2> = run_one(operator, inputs([x], parameters));
    output.reshape(dims)
}

/// `s = x + y` and the norm of `s`: the residual addition of a block and the norm that follows it, in one pass.
///
/// Returns `(s, norm(s))`.
///
/// # Shapes
///
/// - `x`, `y`, outputs: `[.., width]`
///
/// # Panics
///
/// If the shapes of `x` and `y` differ, the width is zero, or not that of `scale` and `shift`.
pub fn add_norm<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    parameters: &NormParameters,
) -> (Tensor<D>, Tensor<D>) {
    add_norm_by(Implementation::of(&x.device()), x, y, parameters)
}

/// [`add_norm`] by a given implementation.
///
/// # Panics
///
/// As [`add_norm`].
pub fn add_norm_by<const D: usize>(
    implementation: Implementation,
    x: Tensor<D>,
    y: Tensor<D>,
    parameters: &NormParameters,
) -> (Tensor<D>, Tensor<D>) {
    let dims = x.dims();
    assert_eq!(dims, y.dims(), "the shapes of the two summands differ");
    check(dims[D - 1], parameters);
    if implementation != Implementation::Native {
        let sum = x + y;
        return (sum.clone(), definition(sum, parameters));
    }
    let operator = Norm::new(parameters, true);
    let [sum, normed] = run(operator, inputs([x, y], parameters));
    let back = |x| Tensor::<2>::from_dispatch(x).reshape(dims);
    (back(sum), back(normed))
}

fn check(width: usize, NormParameters { scale, shift, .. }: &NormParameters) {
    assert!(width > 0, "width: a norm needs at least one component");
    let [n] = scale.dims();
    assert_eq!(
        n, width,
        "width: the scale has {n} components, the input {width}"
    );
    if let Some(shift) = shift {
        let [n] = shift.dims();
        assert_eq!(
            n, width,
            "width: the shift has {n} components, the input {width}"
        );
    }
}

fn inputs<const D: usize, const N: usize>(
    rows: [Tensor<D>; N],
    parameters: &NormParameters,
) -> Vec<burn::backend::DispatchTensor> {
    let mut inputs = Vec::from(rows.map(rows_of));
    inputs.push(parameters.scale.clone().into_dispatch());
    inputs.extend(parameters.shift.clone().map(Tensor::into_dispatch));
    inputs
}

fn definition<const D: usize>(x: Tensor<D>, parameters: &NormParameters) -> Tensor<D> {
    let x = match parameters.centered {
        true => x.clone() - x.mean_dim(D - 1),
        false => x,
    };
    let mean_square = x.clone().square().mean_dim(D - 1);
    let normed = x / (mean_square + parameters.epsilon).sqrt();
    let scaled = normed * parameters.scale.clone().unsqueeze();
    match &parameters.shift {
        Some(shift) => scaled + shift.clone().unsqueeze(),
        None => scaled,
    }
}

/// Inputs: `x`, with a residual `y`, then the scale and the shift if there is one. Outputs: with a residual the sum, then
/// the normed.
#[derive(Debug)]
struct Norm {
    centered: bool,
    epsilon: f64,
    residual: bool,
    has_shift: bool,
}

/// Of each row the mean (zero for RMS norm), the reciprocal of the root, and an offset: the normed row is
/// `(x - mean) factor + offset`. The offset makes up for the mean's rounding, which may be no less than the deviations
/// from it.
#[derive(Debug)]
struct Statistics<R> {
    means: Vec<R>,
    factors: Vec<R>,
    offsets: Vec<R>,
}

impl Norm {
    fn new(parameters: &NormParameters, residual: bool) -> Self {
        Self {
            centered: parameters.centered,
            epsilon: parameters.epsilon,
            residual,
            has_shift: parameters.shift.is_some(),
        }
    }

    /// Where the scale is among the inputs; the shift is behind it.
    fn scale(&self) -> usize {
        1 + usize::from(self.residual)
    }
}

impl Operator for Norm {
    type Saved<E: Stored> = Statistics<E::Real>;

    fn keeps_input(&self, i: usize) -> bool {
        // With a residual it is the sum that is needed.
        i == self.scale() || (i == 0 && !self.residual)
    }

    fn keeps_output(&self, i: usize) -> bool {
        self.residual && i == 0
    }

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, Self::Saved<E>) {
        let x = inputs[0].reals();
        let y = self.residual.then(|| inputs[1].reals());
        let scale = inputs[self.scale()].reals();
        let shift = self.has_shift.then(|| inputs[self.scale() + 1].reals());
        let (n_rows, width) = (inputs[0].n_rows(), inputs[0].width());
        let n_elements = n_rows * width;
        let mut sum = Buffer::new(if self.residual { n_elements } else { 0 });
        let mut normed = Buffer::new(n_elements);
        let [mut means, mut factors, mut offsets] = [(); 3].map(|()| Buffer::new(n_rows));
        let to = Results {
            sum: sum.shared(),
            normed: normed.shared(),
            means: means.shared(),
            factors: factors.shared(),
            offsets: offsets.shared(),
        };
        let epsilon = E::Real::from_f64(self.epsilon);
        rows::for_each_range(n_rows, width, |range| {
            let parameters = Parameters {
                scale: &scale,
                shift: shift.as_deref(),
                centered: self.centered,
            };
            forward_rows(range, &x, y.as_deref(), parameters, epsilon, &to);
        });
        // Safety: the ranges cover all rows.
        let (sum, normed, statistics) = unsafe {
            let statistics = Statistics {
                means: means.finish(),
                factors: factors.finish(),
                offsets: offsets.finish(),
            };
            (sum.finish(), normed.finish(), statistics)
        };
        let shape = inputs[0].shape();
        let normed = Array::from_reals(normed, shape);
        let outputs = match self.residual {
            true => vec![Array::from_reals(sum, shape), normed],
            false => vec![normed],
        };
        (outputs, statistics)
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, Self::Saved<E>>) -> Vec<Gradient<E>> {
        let x = match self.residual {
            true => pass.output(0).reals(),
            false => pass.input(0).reals(),
        };
        let d_sum = self.residual.then(|| pass.gradient(0)).flatten();
        let scale = pass.input(self.scale());
        let width = scale.width();
        let mut gradients = vec![Gradient::None; pass.wanted.len()];
        let Some(d_normed) = pass.gradient(usize::from(self.residual)) else {
            // Only the sum was used.
            for gradient in &mut gradients[..self.scale()] {
                *gradient = Gradient::OfOutput(0);
            }
            return gradients;
        };
        let shape = d_normed.shape();
        let (d_normed, scale) = (d_normed.reals(), scale.reals());
        let d_sum = d_sum.map(|d_sum| d_sum.reals());
        let n_rows = d_normed.len() / width;
        let mut d_x = Buffer::new(n_rows * width);
        let to = d_x.shared();
        let incoming = Incoming {
            x: &x,
            d_sum: d_sum.as_deref(),
            d_normed: &d_normed,
            statistics: pass.saved,
        };
        let sums = rows::sum_ranges(
            n_rows,
            width,
            |range| {
                let parameters = Parameters {
                    scale: &scale,
                    shift: None,
                    centered: self.centered,
                };
                let mut d_scale = vec![E::Real::default(); width];
                let mut d_shift = match self.has_shift {
                    true => d_scale.clone(),
                    false => Vec::new(),
                };
                backward_rows(
                    range,
                    &incoming,
                    parameters,
                    &to,
                    &mut d_scale,
                    &mut d_shift,
                );
                (d_scale, d_shift)
            },
            |a, b| (add(a.0, b.0), add(a.1, b.1)),
        );
        let zeros = || vec![E::Real::default(); width];
        let (d_scale, d_shift) = sums.unwrap_or_else(|| (zeros(), zeros()));
        // Safety: the ranges cover all rows.
        let d_x = unsafe { d_x.finish() };
        gradients[0] = Gradient::Of(Array::from_reals(d_x, shape));
        if self.residual {
            gradients[1] = Gradient::OfInput(0);
        }
        gradients[self.scale()] = Gradient::Of(Array::from_reals(d_scale, &[width]));
        if self.has_shift {
            gradients[self.scale() + 1] = Gradient::Of(Array::from_reals(d_shift, &[width]));
        }
        gradients
    }
}

#[derive(Clone, Copy)]
struct Parameters<'a, R> {
    scale: &'a [R],
    shift: Option<&'a [R]>,
    centered: bool,
}

struct Results<'a, R> {
    sum: Shared<'a, R>,
    normed: Shared<'a, R>,
    means: Shared<'a, R>,
    factors: Shared<'a, R>,
    offsets: Shared<'a, R>,
}

kernel! {
    fn forward_rows<'a, R: Real>(
        simd: S,
        range: Range<usize>,
        x: &'a [R],
        y: Option<&'a [R]>,
        parameters: Parameters<'a, R>,
        epsilon: R,
        to: &'a Results<'a, R>,
    ) -> () {
        let width = parameters.scale.len();
        let count = R::from_f64(width as f64);
        let scale = parameters.scale.as_ptr();
        for i in range {
            let at = i * width;
            let row = &x[at..at + width];
            // Safety: each row of the results belongs to one range; all rows have `width` elements.
            unsafe {
                let row = match y {
                    None => row.as_ptr(),
                    Some(y) => {
                        let y = y[at..at + width].as_ptr();
                        let sum = to.sum.part(at, width).as_mut_ptr();
                        each_vector!(R, S, width, |j, n| {
                            let a = R::load_some(simd, row.as_ptr().add(j), n);
                            let b = R::load_some(simd, y.add(j), n);
                            R::store_some(simd, sum.add(j), R::vadd(simd, a, b), n);
                        });
                        sum.cast_const()
                    }
                };
                let mut mean = R::default();
                if parameters.centered {
                    let mut sum = R::splat(simd, R::default());
                    each_vector!(R, S, width, |j, n| {
                        sum = R::vadd(simd, sum, R::load_some(simd, row.add(j), n));
                    });
                    mean = R::reduce_sum(simd, sum) / count;
                }
                let means = R::splat(simd, mean);
                let mut squares = R::splat(simd, R::default());
                let mut rest = squares;
                each_vector!(R, S, width, |j, n| {
                    // What is behind the row must not count.
                    let x = match n == emberlm_kernels::lanes::<R, S>() {
                        true => R::vsub(simd, R::load(simd, row.add(j)), means),
                        false => deviations(simd, row.add(j), mean, n),
                    };
                    squares = R::vmul_add(simd, x, x, squares);
                    rest = R::vadd(simd, rest, x);
                });
                let mut square = R::reduce_sum(simd, squares) / count;
                let mut rounding = R::default();
                if parameters.centered {
                    // What the deviations are on average is what the mean was rounded by.
                    rounding = R::reduce_sum(simd, rest) / count;
                    square = square - rounding * rounding;
                }
                let factor = R::from_f64(1.0) / (square + epsilon).sqrt();
                let offset = -(rounding * factor);
                let (factors, offsets) = (R::splat(simd, factor), R::splat(simd, offset));
                let normed = to.normed.part(at, width).as_mut_ptr();
                each_vector!(R, S, width, |j, n| {
                    let x = R::vsub(simd, R::load_some(simd, row.add(j), n), means);
                    let x = R::vmul_add(simd, x, factors, offsets);
                    let scale = R::load_some(simd, scale.add(j), n);
                    let y = match parameters.shift {
                        None => R::vmul(simd, x, scale),
                        Some(shift) => {
                            let shift = R::load_some(simd, shift.as_ptr().add(j), n);
                            R::vmul_add(simd, x, scale, shift)
                        }
                    };
                    R::store_some(simd, normed.add(j), y, n);
                });
                to.means.part(i, 1)[0] = mean;
                to.factors.part(i, 1)[0] = factor;
                to.offsets.part(i, 1)[0] = offset;
            }
        }
    }
}

/// `x - mean` of the last few elements of a row, and zeros behind them.
#[inline(always)]
unsafe fn deviations<R: Real, S: emberlm_kernels::pulp::Simd>(
    simd: S,
    row: *const R,
    mean: R,
    n: usize,
) -> R::Vector<S> {
    // Safety: the caller's.
    unsafe {
        let mut means = R::splat(simd, R::default());
        R::store_some(simd, (&raw mut means).cast::<R>(), R::splat(simd, mean), n);
        R::vsub(simd, R::load_some(simd, row, n), means)
    }
}

struct Incoming<'a, R> {
    x: &'a [R],
    d_sum: Option<&'a [R]>,
    d_normed: &'a [R],
    statistics: &'a Statistics<R>,
}

kernel! {
    /// With `g = dy scale` and `z` the normed row before its scale: `dx = factor (g - mean(g) - z mean(g z))`, without
    /// the first mean for RMS norm; `d_scale = sum dy z`, `d_shift = sum dy`.
    fn backward_rows<'a, R: Real>(
        simd: S,
        range: Range<usize>,
        incoming: &'a Incoming<'a, R>,
        parameters: Parameters<'a, R>,
        to: &'a Shared<'a, R>,
        d_scale: &'a mut [R],
        d_shift: &'a mut [R],
    ) -> () {
        let width = parameters.scale.len();
        let count = R::from_f64(width as f64);
        let scale = parameters.scale.as_ptr();
        let has_shift = !d_shift.is_empty();
        let (d_scale, d_shift) = (d_scale.as_mut_ptr(), d_shift.as_mut_ptr());
        for i in range {
            let at = i * width;
            let x = incoming.x[at..at + width].as_ptr();
            let d_normed = incoming.d_normed[at..at + width].as_ptr();
            let means = R::splat(simd, incoming.statistics.means[i]);
            let factors = R::splat(simd, incoming.statistics.factors[i]);
            let offsets = R::splat(simd, incoming.statistics.offsets[i]);
            // Safety: as in the forward pass. Behind a row `d_normed` is read as zero, so nothing there counts.
            unsafe {
                let mut sum = R::splat(simd, R::default());
                let mut dot = sum;
                each_vector!(R, S, width, |j, n| {
                    let z = R::vsub(simd, R::load_some(simd, x.add(j), n), means);
                    let z = R::vmul_add(simd, z, factors, offsets);
                    let d = R::load_some(simd, d_normed.add(j), n);
                    let g = R::vmul(simd, d, R::load_some(simd, scale.add(j), n));
                    sum = R::vadd(simd, sum, g);
                    dot = R::vmul_add(simd, g, z, dot);
                    let total = R::load_some(simd, d_scale.add(j), n);
                    R::store_some(simd, d_scale.add(j), R::vmul_add(simd, d, z, total), n);
                    if has_shift {
                        let total = R::load_some(simd, d_shift.add(j), n);
                        R::store_some(simd, d_shift.add(j), R::vadd(simd, d, total), n);
                    }
                });
                let mean = match parameters.centered {
                    true => R::reduce_sum(simd, sum) / count,
                    false => R::default(),
                };
                let mean = R::splat(simd, mean);
                let dot = R::splat(simd, R::reduce_sum(simd, dot) / count);
                let d_x = to.part(at, width).as_mut_ptr();
                each_vector!(R, S, width, |j, n| {
                    let z = R::vsub(simd, R::load_some(simd, x.add(j), n), means);
                    let z = R::vmul_add(simd, z, factors, offsets);
                    let d = R::load_some(simd, d_normed.add(j), n);
                    let g = R::vmul(simd, d, R::load_some(simd, scale.add(j), n));
                    let g = R::vsub(simd, R::vsub(simd, g, mean), R::vmul(simd, z, dot));
                    let d = match incoming.d_sum {
                        None => R::vmul(simd, g, factors),
                        Some(d_sum) => {
                            let d_sum = R::load_some(simd, d_sum.as_ptr().add(at + j), n);
                            R::vmul_add(simd, g, factors, d_sum)
                        }
                    };
                    R::store_some(simd, d_x.add(j), d, n);
                });
            }
        }
    }
}
