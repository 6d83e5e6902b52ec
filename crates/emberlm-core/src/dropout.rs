//! Dropout whose mask is a function of a key, so that a resumed run draws the same.

use burn::tensor::Tensor;

use crate::{
    RandomKey,
    operators::{Implementation, dropout_by},
};

/// Sets each element to zero with probability `rate` and divides the others by `1 - rate`.
///
/// From Srivastava et al. 2014, <https://jmlr.org/papers/v15/srivastava14a.html>, in its inverted form. The mask
/// is a function of (key, element index): the same on every backend and in every run. Without a key, or with rate
/// 0, the input is returned.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{RandomKey, dropout};
///
/// let x = Tensor::<2>::ones([4, 8], &Device::flex());
/// let a = dropout(x.clone(), 0.5, Some(RandomKey::new(1)));
/// let b = dropout(x.clone(), 0.5, Some(RandomKey::new(1)));
/// assert_eq!(a.to_data(), b.to_data());
/// assert_eq!(dropout(x.clone(), 0.5, None).to_data(), x.to_data());
/// ```
///
/// # Panics
///
/// If `rate` is not in `[0, 1)`.
pub fn dropout<const D: usize>(x: Tensor<D>, rate: f64, key: Option<RandomKey>) -> Tensor<D> {
    dropout_by(Implementation::of(&x.device()), x, rate, key)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;

    #[test]
    fn drops_the_stated_share_and_keeps_the_mean() {
        let x = Tensor::<3>::ones([10, 100, 100], &Device::flex());
        let y = dropout(x, 0.3, Some(RandomKey::new(7)));
        let values: Vec<f32> = y.to_data().iter::<f32>().collect();
        let zeros = values.iter().filter(|v| **v == 0.0).count() as f64 / 1e5;
        let mean = values.iter().map(|v| f64::from(*v)).sum::<f64>() / 1e5;
        // Three standard deviations of a share of 0.3 over 1e5 elements are 0.0044.
        assert!((zeros - 0.3).abs() < 0.0044, "share of zeros {zeros}");
        assert!((mean - 1.0).abs() < 0.0063, "mean {mean}");
    }

    #[test]
    fn keys_give_different_masks() {
        let x = Tensor::<1>::ones([1000], &Device::flex());
        let a: Vec<f32> = dropout(x.clone(), 0.5, Some(RandomKey::new(1)))
            .to_data()
            .iter::<f32>()
            .collect();
        let b: Vec<f32> = dropout(x, 0.5, Some(RandomKey::new(1).fold(1)))
            .to_data()
            .iter::<f32>()
            .collect();
        let equal = a.iter().zip(&b).filter(|(a, b)| a == b).count();
        assert!(
            (400..600).contains(&equal),
            "{equal} of 1000 elements agree"
        );
    }
}
