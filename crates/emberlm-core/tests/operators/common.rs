//! How an operator is compared: one pass is written once, and run by every implementation in every element type.

use burn::tensor::{DType, Device, Gradients, Int, Tensor, TensorData};
use emberlm_core::operators::Implementation;
use emberlm_testkit::{device, largest_difference, random, random_tokens};
use rayon::ThreadPoolBuilder;

use crate::memory::{NOT_A_NUMBER, filled_with};

/// Numbers of rows, and widths: one, odd ones, and those around the lengths of vectors.
pub(crate) const N_ROWS: [usize; 5] = [1, 3, 17, 33, 1000];
/// See [`N_ROWS`].
pub(crate) const WIDTHS: [usize; 11] = [1, 3, 7, 8, 15, 16, 17, 31, 32, 65, 1000];

/// All pairs of [`N_ROWS`] and [`WIDTHS`], but for the largest.
pub(crate) fn sizes() -> impl Iterator<Item = [usize; 2]> {
    let pairs = N_ROWS
        .into_iter()
        .flat_map(|n_rows| WIDTHS.map(|width| [n_rows, width]));
    pairs.filter(|[n_rows, width]| n_rows * width < 100_000)
}

/// Largest error in f64.
const LIMIT_F64: f64 = 1e-12;
/// Largest error in f32, or the definition's own where that is larger.
const LIMIT_F32: f64 = 1e-6;
/// Largest error of a slope against differences.
const LIMIT_DIFFERENCES: f64 = 1e-8;
/// Elements over which a largest magnitude is taken. A gradient of one element is a single sum, and now and then almost
/// nothing is left of such a sum, against which any rounding is large. So a smaller tensor is that of several runs.
const N_ELEMENTS: usize = 32;

/// A pass in the making: it hands out inputs, takes outputs, and computes the gradients.
///
/// Inputs are random and the same for every implementation and element type: they are rounded to the shortest type that
/// is compared.
pub(crate) struct Pass {
    /// Which code to call.
    pub(crate) by: Implementation,
    dtype: DType,
    /// To which type inputs are rounded first.
    rounded: DType,
    device: Device,
    /// Of the next tensor.
    seed: u64,
    /// How far the inputs are moved along their directions.
    step: f64,
    leaves: Vec<Leaf>,
    results: Vec<Named>,
    loss: Option<Tensor<1>>,
}

struct Leaf {
    name: &'static str,
    direction: Vec<f64>,
    gradient: Box<dyn Fn(&Gradients) -> TensorData>,
}

/// A result by its name.
#[derive(Debug, Clone, PartialEq)]
struct Named {
    name: String,
    data: TensorData,
    /// A sum of positive numbers, of which something is always left.
    is_positive_sum: bool,
}

impl Pass {
    fn new(by: Implementation, dtype: DType, rounded: DType, seed: u64) -> Self {
        Self {
            by,
            dtype,
            rounded,
            device: device().autodiff(),
            seed,
            step: 0.0,
            leaves: Vec::new(),
            results: Vec::new(),
            loss: None,
        }
    }

    fn next_seed(&mut self) -> u64 {
        self.seed += 1;
        self.seed
    }

    /// What `f` makes of the index of each element and of a number between -1 and 1.
    fn values<const D: usize>(
        &mut self,
        shape: [usize; D],
        f: impl Fn(usize, f64) -> f64,
    ) -> Vec<f64> {
        let seed = self.next_seed();
        let uniform = random(shape, seed, DType::F64, &device()).into_data();
        let values: Vec<f64> = (0..)
            .zip(uniform.iter::<f64>())
            .map(|(i, x)| f(i, x))
            .collect();
        let rounded = TensorData::new(values, shape).convert_dtype(self.rounded);
        rounded.convert_dtype(DType::F64).iter::<f64>().collect()
    }

    fn tensor<const D: usize>(&self, values: Vec<f64>, shape: [usize; D]) -> Tensor<D> {
        Tensor::from_data(TensorData::new(values, shape), (&self.device, self.dtype))
    }

    /// An input of numbers between -1 and 1, whose gradient is compared.
    pub(crate) fn leaf<const D: usize>(
        &mut self,
        name: &'static str,
        shape: [usize; D],
    ) -> Tensor<D> {
        self.leaf_of(name, shape, |_, x| x)
    }

    /// An input of what `f` makes of the index of each element and of a number between -1 and 1.
    pub(crate) fn leaf_of<const D: usize>(
        &mut self,
        name: &'static str,
        shape: [usize; D],
        f: impl Fn(usize, f64) -> f64,
    ) -> Tensor<D> {
        let mut values = self.values(shape, f);
        let direction = self.values(shape, |_, x| x);
        for (value, direction) in values.iter_mut().zip(&direction) {
            *value += self.step * direction;
        }
        let tensor = self.tensor(values, shape).require_grad();
        let read = tensor.clone();
        self.leaves.push(Leaf {
            name,
            direction,
            gradient: Box::new(move |gradients| {
                // What the outputs do not depend on has none, which is one of zeros.
                let gradient = read.grad(gradients);
                gradient
                    .unwrap_or_else(|| read.zeros_like().inner())
                    .into_data()
            }),
        });
        tensor
    }

    /// As [`leaf_of`](Self::leaf_of), without a gradient.
    pub(crate) fn constant_of<const D: usize>(
        &mut self,
        shape: [usize; D],
        f: impl Fn(usize, f64) -> f64,
    ) -> Tensor<D> {
        let values = self.values(shape, f);
        self.tensor(values, shape)
    }

    /// Numbers from 0 to `n - 1`.
    pub(crate) fn tokens(&mut self, shape: [usize; 2], n: usize) -> Tensor<2, Int> {
        let seed = self.next_seed();
        random_tokens(shape, n, seed, &self.device)
    }

    /// The outputs are weighted by random numbers, and added to the loss.
    pub(crate) fn output<const D: usize>(&mut self, name: &'static str, y: Tensor<D>) {
        self.take(name, y, false);
    }

    /// An output of one element, that is a sum of positive numbers.
    pub(crate) fn positive_sum(&mut self, name: &'static str, y: Tensor<1>) {
        self.take(name, y, true);
    }

    fn take<const D: usize>(&mut self, name: &'static str, y: Tensor<D>, is_positive_sum: bool) {
        assert_eq!(y.dtype(), self.dtype, "element type of {name}");
        let weights = self.constant_of(y.dims(), |_, x| x);
        let part = (y.clone() * weights).sum();
        self.loss = Some(match self.loss.take() {
            Some(loss) => loss + part,
            None => part,
        });
        self.results.push(Named {
            name: name.to_owned(),
            data: y.into_data(),
            is_positive_sum,
        });
    }

    /// Outputs and gradients.
    fn finish(self) -> (Vec<Named>, Vec<Leaf>) {
        let gradients = self.loss.expect("a pass has an output").backward();
        let mut results = self.results;
        for leaf in &self.leaves {
            results.push(Named {
                name: format!("gradient of {}", leaf.name),
                data: (leaf.gradient)(&gradients),
                is_positive_sum: false,
            });
        }
        (results, self.leaves)
    }
}

/// The results of one run, or of several where a tensor is small.
fn results(
    by: Implementation,
    dtype: DType,
    rounded: DType,
    pass: &impl Fn(&mut Pass),
) -> Vec<Named> {
    let run = |i: u64| {
        let mut run = Pass::new(by, dtype, rounded, 1000 * i);
        pass(&mut run);
        run.finish().0
    };
    let first = run(0);
    let fewest = first
        .iter()
        .filter(|result| !result.is_positive_sum)
        .map(|result| result.data.num_elements())
        .filter(|n| *n > 0)
        .min();
    let n_runs = N_ELEMENTS.div_ceil(fewest.unwrap_or(N_ELEMENTS)) as u64;
    let mut all = vec![first];
    all.extend((1..n_runs).map(run));
    let joined = |i: usize| {
        let elements = all.iter().flat_map(|results| results[i].data.iter::<f64>());
        let elements: Vec<f64> = elements.collect();
        let n = elements.len();
        Named {
            data: TensorData::new(elements, [n]),
            ..all[0][i].clone()
        }
    };
    (0..all[0].len()).map(joined).collect()
}

/// Compares all implementations with the definition in f64: outputs and gradients, in f64 and f32. `case` names the
/// case.
#[track_caller]
pub(crate) fn check(case: &str, pass: impl Fn(&mut Pass)) {
    let expected = definition(&pass);
    let own = results(Implementation::Reference, DType::F32, DType::F32, &pass);
    let limit_f32 = |i: usize| {
        let error = largest_difference(&own[i].data, &expected[i].data);
        error.max(LIMIT_F32)
    };
    compare(case, &pass, &expected, DType::F64, |_| LIMIT_F64);
    compare(case, &pass, &expected, DType::F32, limit_f32);
}

/// [`check`] where single products sum a thousand numbers one after another, which alone is 1e-6 in f32. On flex the
/// definition has the same products; elsewhere only f64 is compared.
#[track_caller]
pub(crate) fn check_long_sums(case: &str, pass: impl Fn(&mut Pass)) {
    match cfg!(feature = "ndarray") {
        true => check_f64(case, pass),
        false => check(case, pass),
    }
}

/// [`check`] in f64 alone: where sums are so long, and of another order than the definition's, that f32 says little.
#[track_caller]
pub(crate) fn check_f64(case: &str, pass: impl Fn(&mut Pass)) {
    compare(case, &pass, &definition(&pass), DType::F64, |_| LIMIT_F64);
}

fn definition(pass: &impl Fn(&mut Pass)) -> Vec<Named> {
    results(Implementation::Reference, DType::F64, DType::F32, pass)
}

/// Compares results in a type with what is expected. Each has a limit, by its index.
#[track_caller]
fn compare(
    case: &str,
    pass: &impl Fn(&mut Pass),
    expected: &[Named],
    dtype: DType,
    limit: impl Fn(usize) -> f64,
) {
    for by in [Implementation::Portable, Implementation::Native] {
        let got = results(by, dtype, DType::F32, pass);
        for (i, expected) in expected.iter().enumerate() {
            let error = largest_difference(&got[i].data, &expected.data);
            let (name, limit) = (&expected.name, limit(i));
            println!("{by:?}, {dtype:?}: {error:.1e}, limit {limit:.1e}, {name}, {case}");
            assert!(
                error <= limit,
                "{by:?}, {dtype:?}, {name}: {error:e}, limit {limit:e} in {case}"
            );
        }
    }
}

/// Compares slopes along a random direction with five-point differences, in f64.
#[track_caller]
pub(crate) fn check_differences(case: &str, pass: impl Fn(&mut Pass)) {
    // The error is about step^4 times the fifth derivative over 30, and 1e-16 over the step.
    const STEP: f64 = 1e-3;
    for by in [Implementation::Reference, Implementation::Native] {
        let at = |step: f64| {
            let mut run = Pass::new(by, DType::F64, DType::F32, 0);
            run.step = step;
            pass(&mut run);
            run
        };
        let loss = |step: f64| -> f64 { at(step).loss.expect("an output").into_scalar() };
        let near = loss(STEP) - loss(-STEP);
        let far = loss(2.0 * STEP) - loss(-2.0 * STEP);
        let differences = (8.0 * near - far) / (12.0 * STEP);

        let (results, leaves) = at(0.0).finish();
        let gradients = &results[results.len() - leaves.len()..];
        let (mut slope, mut magnitude) = (0.0, 0.0);
        for (gradient, leaf) in gradients.iter().zip(&leaves) {
            for (gradient, direction) in gradient.data.iter::<f64>().zip(&leaf.direction) {
                slope += gradient * direction;
                magnitude += (gradient * direction).abs();
            }
        }
        let error = (slope - differences).abs() / magnitude;
        println!("{by:?} differences {error:.1e} of {case}");
        assert!(
            error <= LIMIT_DIFFERENCES,
            "{by:?}: {slope} by autodiff, {differences} by differences, {error:e} in {case}"
        );
    }
}

/// [`check`] and [`check_differences`].
#[track_caller]
pub(crate) fn check_all(case: &str, pass: impl Fn(&mut Pass)) {
    check(case, &pass);
    check_differences(case, &pass);
}

/// Compares the kernels on 16-bit floats with the definition in f64, of the same inputs. `limit` is in epsilons, the
/// distance of 1 from the next number: half of one is the rounding of a result that was computed in f32.
#[cfg(not(feature = "ndarray"))]
#[track_caller]
pub(crate) fn check_sixteen_bits(case: &str, limit: f64, pass: impl Fn(&mut Pass)) {
    for (dtype, epsilon) in [(DType::F16, 2f64.powi(-10)), (DType::BF16, 2f64.powi(-7))] {
        let expected = results(Implementation::Reference, DType::F64, dtype, &pass);
        let got = results(Implementation::Native, dtype, dtype, &pass);
        for (expected, got) in expected.iter().zip(got) {
            let name = &expected.name;
            let error = largest_difference(&got.data, &expected.data) / epsilon;
            println!("{dtype:?} {error:.3} {name} of {case}");
            // A hundredth more for what f32 rounded before.
            assert!(
                error <= limit + 0.01,
                "{dtype:?}, {name}: {error} epsilons in {case}"
            );
        }
    }
}

#[cfg(feature = "ndarray")]
pub(crate) fn check_sixteen_bits(_: &str, _: f64, _: impl Fn(&mut Pass)) {}

/// Asserts that the kernels give equal bits on any number of threads, and whatever was in the memory before.
#[track_caller]
pub(crate) fn check_bits(case: &str, pass: impl Fn(&mut Pass) + Sync) {
    for dtype in [DType::F32, DType::F64] {
        let on = |n_threads: usize, fill: u8| {
            let pool = ThreadPoolBuilder::new().num_threads(n_threads).build();
            let run = || {
                let mut run = Pass::new(Implementation::Native, dtype, DType::F32, 0);
                pass(&mut run);
                run.finish().0
            };
            let pool = pool.expect("a pool of few threads");
            filled_with(fill, || pool.install(run))
        };
        let expected = on(1, NOT_A_NUMBER);
        // These bytes make 0.74 in f32 and 4.6e-4 in f64.
        for (n_threads, fill) in [(1, 0x3f), (2, NOT_A_NUMBER), (3, 0)] {
            for (expected, got) in expected.iter().zip(on(n_threads, fill)) {
                assert!(
                    *expected == got,
                    "{dtype:?}: {} on {n_threads} threads, {case}",
                    got.name
                );
            }
        }
    }
}

/// The elements of a tensor.
pub(crate) fn numbers<const D: usize>(tensor: Tensor<D>) -> Vec<f64> {
    tensor.into_data().iter::<f64>().collect()
}

#[test]
#[should_panic(expected = "Native, F64, y")]
fn the_comparison_catches_another_result() {
    check("a wrong kernel", |pass| {
        let x = pass.leaf("x", [3, 5]);
        let factor = if pass.by == Implementation::Native {
            1.0 + 1e-11
        } else {
            1.0
        };
        pass.output("y", x * factor);
    });
}

#[test]
#[should_panic(expected = "Native, F64, gradient of x")]
fn the_comparison_catches_another_gradient() {
    check("a wrong backward pass", |pass| {
        let x = pass.leaf("x", [3, 5]);
        let y = match pass.by {
            Implementation::Native => x.clone() * 2.0 - x.detach(),
            _ => x,
        };
        pass.output("y", y);
    });
}

#[test]
#[should_panic(expected = "by differences")]
fn differences_catch_a_wrong_gradient() {
    check_differences("half a gradient", |pass| {
        let x = pass.leaf("x", [3, 5]);
        pass.output("y", x.clone() * x.detach());
    });
}
