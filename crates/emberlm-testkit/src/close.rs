//! Comparing tensors.

use burn::tensor::{Tensor, TensorData};

/// Largest difference between two tensors over the largest magnitude of the expected one; 0 for two tensors of zeros.
///
/// # Panics
///
/// If the shapes differ or either tensor holds a number that is not finite.
pub fn largest_difference(actual: &TensorData, expected: &TensorData) -> f64 {
    assert_eq!(actual.shape(), expected.shape(), "the shapes differ");
    let (mut difference, mut magnitude) = (0f64, 0f64);
    for (i, (a, e)) in actual.iter::<f64>().zip(expected.iter::<f64>()).enumerate() {
        assert!(
            a.is_finite() && e.is_finite(),
            "element {i} is {a}, expected {e}"
        );
        difference = difference.max((a - e).abs());
        magnitude = magnitude.max(e.abs());
    }
    if difference == 0.0 {
        0.0
    } else {
        difference / magnitude
    }
}

/// Asserts that two tensors differ by at most `tolerance` of the expected one's largest magnitude.
///
/// # Panics
///
/// If they differ by more, naming the largest difference.
#[track_caller]
pub fn assert_close<const D: usize>(actual: Tensor<D>, expected: Tensor<D>, tolerance: f64) {
    let difference = largest_difference(&actual.into_data(), &expected.into_data());
    assert!(
        difference <= tolerance,
        "largest difference {difference:e} exceeds {tolerance:e}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_against_the_largest_magnitude() {
        let actual = TensorData::from([1.0, 10.1, -3.0]);
        let expected = TensorData::from([1.0, 10.0, -3.0]);
        assert!((largest_difference(&actual, &expected) - 0.01).abs() < 1e-12);
    }

    #[test]
    #[should_panic(expected = "exceeds")]
    fn catches_a_difference() {
        let device = crate::device();
        let a = Tensor::<1>::from_floats([1.0, 2.0], &device);
        assert_close(a.clone(), a + 0.01, 1e-3);
    }

    #[test]
    #[should_panic(expected = "element 1 is NaN")]
    fn not_a_number_is_never_close() {
        let nan = TensorData::from([0.0, f64::NAN]);
        largest_difference(&nan, &nan);
    }
}
