//! Tensors to measure with.

use burn::tensor::{DType, Device, Tensor, TensorData};
use emberlm::core::RandomKey;

/// Elements of the largest tensor: beyond it a typing error is likelier than a machine that has the memory.
const MAX_ELEMENTS: usize = 1 << 30;

/// Checks that a tensor of this shape may be made.
///
/// # Errors
///
/// More than 2^30 elements; the message has the shape.
pub fn check_size(shape: &[usize]) -> Result<(), String> {
    let n_elements = shape
        .iter()
        .try_fold(1_usize, |product, size| product.checked_mul(*size));
    match n_elements {
        Some(n) if n <= MAX_ELEMENTS => Ok(()),
        _ => Err(format!(
            "a tensor of {shape:?} is too large: it may have {MAX_ELEMENTS} elements"
        )),
    }
}

/// Numbers from -1 to 1, a function of the seed.
pub fn uniform<const D: usize>(
    shape: [usize; D],
    seed: u64,
    device: &Device,
    dtype: DType,
) -> Tensor<D> {
    let key = RandomKey::new(seed);
    let n_elements: usize = shape.iter().product();
    let values: Vec<f32> = (0..n_elements as u64)
        .map(|i| key.uniform(i) as f32 * 2.0 - 1.0)
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (device, dtype))
}
