//! Dropout, alone and with the addition of a residual.

use burn::tensor::{Bool, Tensor, TensorData};
use emberlm_kernels::{
    Array, Buffer, Gradient, Operator, Pass, Real, Stored, View, kernel, rows, run_one,
};

use super::Implementation;
use crate::RandomKey;

/// `x + dropout(y)`: the end of a residual branch, in one pass and without a stored mask.
///
/// The mask is that of [`dropout`](crate::dropout): a function of the key and the element's index. Without a key, or
/// with rate 0, it is the plain sum.
///
/// # Shapes
///
/// - `x`, `y`, output: any shape, the same for all
///
/// # Panics
///
/// If `rate` is not in `[0, 1)`, or the shapes differ.
pub fn add_dropped<const D: usize>(
    x: Tensor<D>,
    y: Tensor<D>,
    rate: f64,
    key: Option<RandomKey>,
) -> Tensor<D> {
    add_dropped_by(Implementation::of(&x.device()), x, y, rate, key)
}

/// [`add_dropped`] by a given implementation.
///
/// # Panics
///
/// As [`add_dropped`].
pub fn add_dropped_by<const D: usize>(
    implementation: Implementation,
    x: Tensor<D>,
    y: Tensor<D>,
    rate: f64,
    key: Option<RandomKey>,
) -> Tensor<D> {
    assert_eq!(x.dims(), y.dims(), "the shapes of the two summands differ");
    match Dropped::new(rate, key) {
        Some(operator) if implementation == Implementation::Native => run_flat(operator, [x, y]),
        Some(operator) => x + operator.definition(y),
        None => x + y,
    }
}

/// [`dropout`](crate::dropout) by a given implementation.
pub(crate) fn dropout_by<const D: usize>(
    implementation: Implementation,
    x: Tensor<D>,
    rate: f64,
    key: Option<RandomKey>,
) -> Tensor<D> {
    match Dropped::new(rate, key) {
        Some(operator) if implementation == Implementation::Native => run_flat(operator, [x]),
        Some(operator) => operator.definition(x),
        None => x,
    }
}

fn run_flat<const D: usize, const N: usize>(
    operator: Dropped,
    inputs: [Tensor<D>; N],
) -> Tensor<D> {
    let dims = inputs[0].dims();
    let n_elements: usize = dims.iter().product();
    let flat = inputs.map(|x| x.reshape([n_elements]).into_dispatch());
    let output: Tensor<1> = run_one(operator, flat);
    output.reshape(dims)
}

/// Inputs: what is dropped; or a residual, then what is dropped.
#[derive(Debug, Clone, Copy)]
struct Dropped {
    rate: f64,
    key: RandomKey,
}

impl Dropped {
    /// Nothing where nothing is dropped.
    fn new(rate: f64, key: Option<RandomKey>) -> Option<Self> {
        assert!(
            (0.0..1.0).contains(&rate),
            "dropout rate must be at least 0 and below 1, got {rate}"
        );
        key.filter(|_| rate > 0.0).map(|key| Self { rate, key })
    }

    fn is_dropped(&self, i: usize) -> bool {
        self.key.uniform(i as u64) < self.rate
    }

    /// By what the other elements are multiplied.
    fn scale(&self) -> f64 {
        1.0 / (1.0 - self.rate)
    }

    fn definition<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let dims = x.dims();
        let n_elements = dims.iter().product();
        let dropped: Vec<bool> = (0..n_elements).map(|i| self.is_dropped(i)).collect();
        let dropped = Tensor::<D, Bool>::from_data(TensorData::new(dropped, dims), &x.device());
        // Not a product with zeros: what is dropped may be infinite.
        (x * self.scale()).mask_fill(dropped, 0.0)
    }

    /// `x` after dropout, with `residual` added where there is one.
    fn apply<R: Real>(&self, x: &[R], residual: Option<&[R]>) -> Vec<R> {
        let mut output = Buffer::new(x.len());
        let to = output.shared();
        let scale = R::from_f64(self.scale());
        rows::for_each_range(x.len(), 1, |range| {
            // Safety: each element belongs to one range.
            let to = unsafe { to.part(range.start, range.len()) };
            drop_some(self, range.start, &x[range.clone()], scale, to);
            if let Some(residual) = residual {
                to.iter_mut()
                    .zip(&residual[range])
                    .for_each(|(to, x)| *to += *x);
            }
        });
        // Safety: the ranges cover all elements.
        unsafe { output.finish() }
    }
}

kernel! {
    /// Elements `first ..` after dropout.
    fn drop_some<'a, R: Real>(
        _simd: S,
        dropped: &'a Dropped,
        first: usize,
        x: &'a [R],
        scale: R,
        to: &'a mut [R],
    ) -> () {
        for (i, (to, x)) in to.iter_mut().zip(x).enumerate() {
            *to = match dropped.is_dropped(first + i) {
                true => R::default(),
                false => *x * scale,
            };
        }
    }
}

impl Operator for Dropped {
    type Saved<E: Stored> = ();

    fn keeps_input(&self, _: usize) -> bool {
        false
    }

    fn forward<E: Stored>(&self, inputs: &[View<'_, E>]) -> (Vec<Array<E>>, ()) {
        let output = match inputs {
            [x] => self.apply(&x.reals(), None),
            [residual, x] => self.apply(&x.reals(), Some(&residual.reals())),
            _ => unreachable!("it is called with one or two"),
        };
        (vec![Array::from_reals(output, inputs[0].shape())], ())
    }

    fn backward<E: Stored>(&self, pass: &Pass<'_, E, ()>) -> Vec<Gradient<E>> {
        let d_output = pass.gradient(0).expect("of the one output");
        let dropped = pass.wanted.len() - 1;
        let d_x = pass.if_wanted(dropped, || {
            Array::from_reals(self.apply(&d_output.reals(), None), d_output.shape())
        });
        match dropped {
            0 => vec![d_x],
            _ => vec![Gradient::OfOutput(0), d_x],
        }
    }
}
