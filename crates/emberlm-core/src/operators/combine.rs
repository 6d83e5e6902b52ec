//! Weighted rows, added up where they came from: what comes after the experts of a mixture.

use burn::tensor::{IndexingUpdateOp, Tensor};
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Stored, View, each_vector, kernel, rows, run_one,
};

use super::{Implementation, embedding::Groups, indices};

/// `y_t = sum of w_i x_i` over the rows `i` that are of target `t`; zero where there is none.
///
/// With the rows of chosen experts, their gates and the tokens that chose them it is the output of a mixture of experts:
/// Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>, equation 1.
///
/// # Shapes
///
/// - `x`: `[n_rows, width]`
/// - `weights`: `[n_rows]`
/// - `targets`: `n_rows` numbers below `n_targets`
/// - output: `[n_targets, width]`
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::operators::combine;
///
/// let device = Device::flex();
/// let x = Tensor::<2>::from_floats([[1.0], [2.0], [3.0]], &device);
/// let weights = Tensor::<1>::from_floats([1.0, 10.0, 100.0], &device);
/// let y: Vec<f32> = combine(x, weights, &[1, 0, 1], 3).into_data().iter::<f32>().collect();
/// assert_eq!(y, [20.0, 301.0, 0.0]);
/// ```
///
/// # Panics
///
/// If the numbers of rows, weights and targets differ, or a target is not below `n_targets`.
pub fn combine(x: Tensor<2>, weights: Tensor<1>, targets: &[usize], n_targets: usize) -> Tensor<2> {
    combine_by(
        Implementation::of(&x.device()),
        x,
        weights,
        targets,
        n_targets,
    )
}

/// [`combine`] by a given implementation.
///
/// # Panics
///
/// As [`combine`].
pub fn combine_by(
    implementation: Implementation,
    x: Tensor<2>,
    weights: Tensor<1>,
    targets: &[usize],
    n_targets: usize,
) -> Tensor<2> {
    let ([n_rows, width], [n_weights]) = (x.dims(), weights.dims());
    assert_eq!(
        n_weights, n_rows,
        "n_rows: there are {n_rows}, and {n_weights} weights"
    );
    assert_eq!(
        targets.len(),
        n_rows,
        "n_rows: there are {n_rows}, and {} targets",
        targets.len()
    );
    if let Some(target) = targets.iter().find(|target| **target >= n_targets) {
        panic!("targets: {target} is not below {n_targets}");
    }
    if implementation != Implementation::Native {
        let device = x.device();
        let zeros = Tensor::zeros([n_targets, width], (&device, x.dtype()));
        let indices = indices(targets, &device);
        let weighted = x * weights.unsqueeze_dim(1);
        return zeros.select_assign(0, indices, weighted, IndexingUpdateOp::Add);
    }
    let operator = Combine {
        targets: targets.to_vec(),
        groups: Groups::new(n_targets, targets),
    };
    run_one(operator, [x.into_dispatch(), weights.into_dispatch()])
}

/// Inputs: the rows, the weights.
struct Combine {
    targets: Vec<usize>,
    groups: Groups,
}

impl std::fmt::Debug for Combine {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "Combine of {} rows", self.targets.len())
    }
}

kernel! {
    /// The weighted sum of some rows.
    fn sum_weighted<'a, R: Real>(
        _simd: S,
        elements: &'a [R],
        weights: &'a [R],
        rows: &'a [u32],
        to: &'a mut [R],
    ) -> () {
        to.fill(R::default());
        for row in rows {
            let weight = weights[*row as usize];
            let row = &elements[*row as usize * to.len()..][..to.len()];
            to.iter_mut().zip(row).for_each(|(to, x)| *to += weight * *x);
        }
    }
}

kernel! {
    /// `weight` times a row.
    fn scaled<'a, R: Real>(_simd: S, row: &'a [R], weight: R, to: &'a mut [R]) -> () {
        to.iter_mut().zip(row).for_each(|(to, x)| *to = weight * *x);
    }
}

kernel! {
    /// The inner product of two rows.
    pub(super) fn dot<'a, R: Real>(simd: S, a: &'a [R], b: &'a [R]) -> R {
        let mut sum = R::splat(simd, R::default());
        each_vector!(R, S, a.len().min(b.len()), |j, n| {
            // Safety: both slices have `n` elements from `j` on.
            unsafe {
                let a = R::load_some(simd, a.as_ptr().add(j), n);
                sum = R::vmul_add(simd, a, R::load_some(simd, b.as_ptr().add(j), n), sum);
            }
        });
        R::reduce_sum(simd, sum)
    }
}

impl Operator for Combine {
    type Saved<E: Stored> = ();

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, ()) {
        let (x, weights) = (inputs[0].reals(), inputs[1].reals());
        let width = inputs[0].width();
        let n_targets = self.groups.n_targets();
        let mut sums = Buffer::new(n_targets * width);
        let to = sums.shared();
        rows::for_each_range(n_targets, width, |range| {
            for target in range {
                // Safety: each target belongs to one range.
                let to = unsafe { to.part(target * width, width) };
                sum_weighted(&x, &weights, self.groups.of(target), to);
            }
        });
        // Safety: the ranges cover all rows.
        let sums = unsafe { sums.finish() };
        (vec![Array::from_reals(sums, &[n_targets, width])], ())
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, ()>) -> Vec<Gradient<E>> {
        let d_output = pass.gradient(0).expect("of the one output");
        let (d_output, width) = (d_output.reals(), d_output.width());
        let n_rows = self.targets.len();
        let of_target = |row: usize| &d_output[self.targets[row] * width..][..width];
        let d_x = pass.if_wanted(0, || {
            let weights = pass.input(1).reals();
            let mut d_x = Buffer::new(n_rows * width);
            let to = d_x.shared();
            rows::for_each_range(n_rows, width, |range| {
                for row in range {
                    // Safety: each row belongs to one range.
                    let to = unsafe { to.part(row * width, width) };
                    scaled(of_target(row), weights[row], to);
                }
            });
            // Safety: the ranges cover all rows.
            Array::from_reals(unsafe { d_x.finish() }, &[n_rows, width])
        });
        let d_weights = pass.if_wanted(1, || {
            let x = pass.input(0).reals();
            let mut d_weights = Buffer::new(n_rows);
            let to = d_weights.shared();
            rows::for_each_range(n_rows, width, |range| {
                for row in range {
                    // Safety: each row belongs to one range.
                    let to = unsafe { to.part(row, 1) };
                    to[0] = dot(&x[row * width..][..width], of_target(row));
                }
            });
            // Safety: the ranges cover all rows.
            Array::from_reals(unsafe { d_weights.finish() }, &[n_rows])
        });
        vec![d_x, d_weights]
    }
}
