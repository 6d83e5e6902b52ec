//! Gradients against finite differences.

use burn::tensor::{DType, Tensor, TensorData};

// Five-point differences in f64: their error is about step^4 times the fifth derivative over 30, plus 1e-16 / step, both below 1e-11 here.
const STEP: f64 = 1e-3;
const TOLERANCE: f64 = 1e-8;

/// Asserts that the gradient of `f` with respect to `x` is what five-point differences in f64 give.
///
/// The outputs are weighted by fixed numbers that all differ and summed. `x` must be f64 on a device with autodiff;
/// everything in `f` must keep f64.
///
/// # Panics
///
/// If the largest difference exceeds 1e-8 of the largest gradient (or of 1).
#[track_caller]
pub fn assert_gradients_match<const D: usize, const E: usize>(
    x: Tensor<D>,
    f: impl Fn(Tensor<D>) -> Tensor<E>,
) {
    assert_eq!(x.dtype(), DType::F64, "finite differences need f64");
    let device = x.device();
    let weighted = |y: Tensor<E>| {
        let n_elements = y.shape().num_elements();
        let weights: Vec<f64> = (0..n_elements)
            .map(|i| (1.7 * i as f64 + 0.3).cos())
            .collect();
        let weights = TensorData::new(weights, y.shape());
        (y * Tensor::from_data(weights, (&device, DType::F64))).sum()
    };
    let x = x.detach().require_grad();
    let gradients = weighted(f(x.clone())).backward();
    let analytic: Vec<f64> = x
        .grad(&gradients)
        .expect("the output depends on the input")
        .into_data()
        .iter::<f64>()
        .collect();

    let values: Vec<f64> = x.to_data().iter::<f64>().collect();
    let shape = x.shape();
    let at = |i: usize, delta: f64| -> f64 {
        let mut moved = values.clone();
        moved[i] += delta;
        let moved = Tensor::from_data(TensorData::new(moved, shape.clone()), (&device, DType::F64));
        let data = weighted(f(moved)).into_data();
        data.iter::<f64>().next().expect("a sum is one number")
    };
    let scale = analytic.iter().fold(1f64, |scale, g| scale.max(g.abs()));
    for (i, analytic) in analytic.iter().enumerate() {
        let near = at(i, STEP) - at(i, -STEP);
        let far = at(i, 2.0 * STEP) - at(i, -2.0 * STEP);
        let numeric = (8.0 * near - far) / (12.0 * STEP);
        assert!(
            (analytic - numeric).abs() <= TOLERANCE * scale,
            "gradient of element {i}: {analytic} by autodiff, {numeric} by differences"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_a_right_gradient() {
        let device = crate::device().autodiff();
        let x = crate::random([3, 4], 1, DType::F64, &device);
        assert_gradients_match(x, |x| x.clone().exp() * x);
    }

    #[test]
    #[should_panic(expected = "by autodiff")]
    fn catches_a_wrong_gradient() {
        let device = crate::device().autodiff();
        let x = crate::random([3, 4], 1, DType::F64, &device);
        assert_gradients_match(x, |x| x.clone().exp() * x.detach());
    }
}
