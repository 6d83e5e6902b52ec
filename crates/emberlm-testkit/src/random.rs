//! Reproducible random tensors, the same on every backend.

use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};

/// Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
fn splitmix64(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Numbers between -1 and 1.
pub fn random<const D: usize>(
    shape: [usize; D],
    seed: u64,
    dtype: DType,
    device: &Device,
) -> Tensor<D> {
    let n_elements = Shape::from(shape).num_elements() as u64;
    let values: Vec<f64> = (0..n_elements)
        .map(|i| (splitmix64(splitmix64(seed) ^ i) >> 11) as f64 / (1u64 << 52) as f64 - 1.0)
        .collect();
    Tensor::from_data(TensorData::new(values, shape), (device, dtype))
}

/// Tokens below `vocab_size`.
pub fn random_tokens(
    shape: [usize; 2],
    vocab_size: usize,
    seed: u64,
    device: &Device,
) -> Tensor<2, Int> {
    let values: Vec<i32> = (0..(shape[0] * shape[1]) as u64)
        .map(|i| (splitmix64(splitmix64(seed) ^ i) % vocab_size as u64) as i32)
        .collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}
