//! Fixed sinusoidal positions.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// Sinusoids of geometrically growing wavelength: `sin(t / 10000^(2i/d))` at component `2i`, the cosine at `2i + 1`.
///
/// Vaswani et al. 2017, section 3.5, <https://arxiv.org/abs/1706.03762>: sine and cosine alternate as in the paper
/// (tensor2tensor and some others put all sines first). Shape of the output: `[1, seq_length, d_model]`.
///
/// ```
/// use burn::tensor::{DType, Device};
/// use emberlm_core::sinusoidal_positions;
///
/// let table = sinusoidal_positions(0, 2, 4, DType::F32, &Device::flex());
/// let values: Vec<f32> = table.to_data().iter::<f32>().collect();
/// assert_eq!(values[..4], [0.0, 1.0, 0.0, 1.0]);
/// assert!((values[4] - 1f32.sin()).abs() < 1e-7);
/// ```
///
/// # Panics
///
/// If `d_model` is odd.
pub fn sinusoidal_positions(
    first_position: usize,
    seq_length: usize,
    d_model: usize,
    dtype: DType,
    device: &Device,
) -> Tensor<3> {
    assert!(
        d_model.is_multiple_of(2),
        "d_model: sinusoidal positions need an even width, got {d_model}"
    );
    let mut values = Vec::with_capacity(seq_length * d_model);
    for position in first_position..first_position + seq_length {
        for pair in 0..d_model / 2 {
            let frequency = 10_000f64.powf(-2.0 * pair as f64 / d_model as f64);
            let (sin, cos) = (position as f64 * frequency).sin_cos();
            values.extend([sin, cos]);
        }
    }
    Tensor::from_data(
        TensorData::new(values, [1, seq_length, d_model]),
        (device, dtype),
    )
}
