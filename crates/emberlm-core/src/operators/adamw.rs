//! The optimizer's step, and the sum of squares that clipping needs.

use burn::tensor::Tensor;
use emberlm_kernels::{
    Array, Buffer, Operator, Real, Shared, Stored, View, each_vector, kernel, rows, run, run_one,
};

use super::Implementation;

/// The numbers of a step of AdamW.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Step size.
    pub learning_rate: f64,
    /// Decay of the mean of the gradients.
    pub beta_1: f64,
    /// Decay of the mean of their squares.
    pub beta_2: f64,
    /// Added to the root of the mean of the squares.
    pub epsilon: f64,
    /// Decoupled decay, times the step size.
    pub weight_decay: f64,
    /// Number of this step, from 1 on.
    pub time: usize,
}

/// One step of AdamW, in one pass: `m = b1 m + (1 - b1) g`, `v = b2 v + (1 - b2) g^2`,
/// `p = (1 - lr decay) p - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + epsilon)`.
///
/// Loshchilov and Hutter 2019, <https://arxiv.org/abs/1711.05101>. Returns the parameter and its two moments. Without
/// moments they begin at zero.
///
/// # Shapes
///
/// - all tensors: that of the parameter
///
/// # Panics
///
/// If the shapes differ, or `time` is zero.
pub fn adamw<const D: usize>(
    step: &AdamWStep,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: Option<[Tensor<D>; 2]>,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let implementation = Implementation::of(&parameter.device());
    adamw_by(implementation, step, parameter, gradient, moments)
}

/// [`adamw`] by a given implementation.
///
/// # Panics
///
/// As [`adamw`].
pub fn adamw_by<const D: usize>(
    implementation: Implementation,
    step: &AdamWStep,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: Option<[Tensor<D>; 2]>,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let dims = parameter.dims();
    assert!(step.time > 0, "time: steps count from 1");
    for other in [Some(&gradient)]
        .into_iter()
        .chain(moments.iter().flatten().map(Some))
        .flatten()
    {
        assert_eq!(
            other.dims(),
            dims,
            "the shapes of a parameter, its gradient and its moments differ"
        );
    }
    if implementation != Implementation::Native {
        return definition(step, parameter, gradient, moments);
    }
    let n_elements: usize = dims.iter().product();
    let inputs = [parameter, gradient].into_iter();
    let inputs = inputs.chain(moments.into_iter().flatten());
    let inputs = inputs.map(|x| x.reshape([n_elements]).into_dispatch());
    let [parameter, moment_1, moment_2] =
        run(*step, inputs).map(|x| Tensor::<1>::from_dispatch(x).reshape(dims));
    (parameter, [moment_1, moment_2])
}

fn definition<const D: usize>(
    step: &AdamWStep,
    parameter: Tensor<D>,
    gradient: Tensor<D>,
    moments: Option<[Tensor<D>; 2]>,
) -> (Tensor<D>, [Tensor<D>; 2]) {
    let [moment_1, moment_2] =
        moments.unwrap_or_else(|| [gradient.zeros_like(), gradient.zeros_like()]);
    let moment_1 = moment_1 * step.beta_1 + gradient.clone() * (1.0 - step.beta_1);
    let moment_2 = moment_2 * step.beta_2 + gradient.square() * (1.0 - step.beta_2);
    let [correction_1, correction_2] = step.corrections();
    let root = (moment_2.clone() * correction_2).sqrt() + step.epsilon;
    let delta = moment_1.clone() * correction_1 / root;
    let parameter = parameter * step.kept() - delta * step.learning_rate;
    (parameter, [moment_1, moment_2])
}

impl AdamWStep {
    /// By what the moments are multiplied because they began at zero.
    fn corrections(&self) -> [f64; 2] {
        [self.beta_1, self.beta_2].map(|beta| (1.0 - beta.powf(self.time as f64)).recip())
    }

    /// What the decay leaves of a parameter.
    fn kept(&self) -> f64 {
        1.0 - self.learning_rate * self.weight_decay
    }
}

/// Inputs: the parameter, its gradient, then both moments or none. Outputs: the parameter and both moments.
impl Operator for AdamWStep {
    type Saved<E: Stored> = ();

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, ()) {
        let reals = |i: usize| inputs.get(i).map(|view| view.reals()).unwrap_or_default();
        let [parameter, gradient, moment_1, moment_2] = [reals(0), reals(1), reals(2), reals(3)];
        let n_elements = parameter.len();
        let mut outputs: [Buffer<E::Real>; 3] = std::array::from_fn(|_| Buffer::new(n_elements));
        let to = outputs.each_mut().map(Buffer::shared);
        rows::for_each_range(n_elements, 1, |range| {
            let from = [&parameter, &gradient, &moment_1, &moment_2]
                .map(|x| x.get(range.clone()).unwrap_or_default());
            // Safety: each element belongs to one range.
            let to = to
                .each_ref()
                .map(|to| unsafe { to.part(range.start, range.len()) });
            step_elements(*self, from, to);
        });
        let shape = inputs[0].shape();
        // Safety: the ranges cover all elements.
        let outputs = outputs.map(|output| Array::from_reals(unsafe { output.finish() }, shape));
        (outputs.into(), ())
    }
}

kernel! {
    /// From the parameter, the gradient and both moments, which may be empty.
    fn step_elements<'a, R: Real>(
        simd: S,
        step: AdamWStep,
        from: [&'a [R]; 4],
        to: [&'a mut [R]; 3],
    ) -> () {
        let constant = |x| R::splat(simd, R::from_f64(x));
        let [correction_1, correction_2] = step.corrections();
        // The step size and the first correction are one factor.
        let factor = constant(-step.learning_rate * correction_1);
        let correction_2 = constant(correction_2);
        let [beta_1, rest_1] = [constant(step.beta_1), constant(1.0 - step.beta_1)];
        let [beta_2, rest_2] = [constant(step.beta_2), constant(1.0 - step.beta_2)];
        let (epsilon, kept) = (constant(step.epsilon), constant(step.kept()));
        let [parameter, gradient, moment_1, moment_2] = from;
        let [to_parameter, to_1, to_2] = to;
        each_vector!(R, S, gradient.len(), |j, n| {
            // Safety: all slices have `n` elements from `j` on, but for moments that are empty.
            unsafe {
                let g = R::load_some(simd, gradient.as_ptr().add(j), n);
                let mut m = R::vmul(simd, rest_1, g);
                let mut v = R::vmul(simd, R::vmul(simd, rest_2, g), g);
                if !moment_1.is_empty() {
                    let old = R::load_some(simd, moment_1.as_ptr().add(j), n);
                    m = R::vmul_add(simd, beta_1, old, m);
                    let old = R::load_some(simd, moment_2.as_ptr().add(j), n);
                    v = R::vmul_add(simd, beta_2, old, v);
                }
                let root = R::vsqrt(simd, R::vmul(simd, v, correction_2));
                let delta = R::vdiv(simd, R::vmul(simd, factor, m), R::vadd(simd, root, epsilon));
                let p = R::load_some(simd, parameter.as_ptr().add(j), n);
                let p = R::vmul_add(simd, kept, p, delta);
                R::store_some(simd, to_parameter.as_mut_ptr().add(j), p, n);
                R::store_some(simd, to_1.as_mut_ptr().add(j), m, n);
                R::store_some(simd, to_2.as_mut_ptr().add(j), v, n);
            }
        });
    }
}

/// The sum of the squares of all elements, shape `[1]`: that of a gradient is its part of the global norm.
pub fn sum_of_squares<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    sum_of_squares_by(Implementation::of(&x.device()), x)
}

/// [`sum_of_squares`] by a given implementation.
pub fn sum_of_squares_by<const D: usize>(
    implementation: Implementation,
    x: Tensor<D>,
) -> Tensor<1> {
    if implementation != Implementation::Native {
        return x.square().sum();
    }
    let n_elements: usize = x.dims().iter().product();
    run_one(Squares, [x.reshape([n_elements]).into_dispatch()])
}

#[derive(Debug)]
struct Squares;

/// Elements that are summed as a row.
const ROW: usize = 64;

impl Operator for Squares {
    type Saved<E: Stored> = ();

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, ()) {
        let x = inputs[0].reals();
        let of_rows = |rows: std::ops::Range<usize>| {
            let end = x.len().min(rows.end * ROW);
            squares(&x[rows.start * ROW..end]).to_f64()
        };
        let sum = rows::sum_ranges(x.len().div_ceil(ROW), ROW, of_rows, |a, b| a + b);
        let sum = E::Real::from_f64(sum.unwrap_or(0.0));
        (vec![Array::from_reals(vec![sum], &[1])], ())
    }

    fn backward<E: Stored>(
        &self,
        pass: &emberlm_kernels::Pass<'_, E, ()>,
    ) -> Vec<emberlm_kernels::Gradient<E>> {
        let x = pass.input(0).reals();
        let d_sum = pass.gradient(0).expect("of the one output").at([0; 4]);
        let factor = d_sum.to_real() + d_sum.to_real();
        let mut d_x = Buffer::new(x.len());
        let to: Shared<'_, E::Real> = d_x.shared();
        rows::for_each_range(x.len(), 1, |range| {
            // Safety: each element belongs to one range.
            let to = unsafe { to.part(range.start, range.len()) };
            to.iter_mut()
                .zip(&x[range])
                .for_each(|(to, x)| *to = factor * *x);
        });
        // Safety: the ranges cover all elements.
        let d_x = unsafe { d_x.finish() };
        vec![pass.if_wanted(0, || Array::from_reals(d_x, pass.input(0).shape()))]
    }
}

kernel! {
    fn squares<'a, R: Real>(simd: S, x: &'a [R],) -> R {
        let mut sum = R::splat(simd, R::default());
        each_vector!(R, S, x.len(), |j, n| {
            // Safety: `n` elements from `j` on; zeros behind them add nothing.
            unsafe {
                let x = R::load_some(simd, x.as_ptr().add(j), n);
                sum = R::vmul_add(simd, x, x, sum);
            }
        });
        R::reduce_sum(simd, sum)
    }
}
