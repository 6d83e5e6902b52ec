//! Rotary position embeddings, in both published layouts.

use burn::{
    config::Config,
    tensor::{DType, Device, Tensor, TensorData},
};

use crate::InvalidConfig;

/// Which components form a pair. Checkpoints are trained for one of the two.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum RotaryLayout {
    /// Components `2i` and `2i + 1`: the paper, GPT-J, Meta's Llama files.
    Interleaved,
    /// Components `i` and `i + d/2`: GPT-NeoX, Hugging Face's Llama ("rotate half").
    HalfSplit,
}

/// Rotary embeddings: each pair of components at position `t` is turned by the angle `t theta^(-2i/d)`.
///
/// Su et al. 2021, equation 34, <https://arxiv.org/abs/2104.09864>. The scores of a query and a key then depend on
/// the difference of their positions alone.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{RotaryConfig, RotaryLayout};
///
/// let device = Device::flex();
/// let rotary = RotaryConfig::new(4).with_layout(RotaryLayout::Interleaved);
/// let x = Tensor::<4>::from_floats([[[[1.0, 0.0, 1.0, 0.0]]]], &device);
/// let y: Vec<f32> = rotary.forward(x, 1).to_data().iter::<f32>().collect();
/// assert!((y[0] - 1f32.cos()).abs() < 1e-6 && (y[1] - 1f32.sin()).abs() < 1e-6);
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct RotaryConfig {
    /// Width of a head; even.
    pub d_head: usize,
    /// Base of the wavelengths. Default: 10,000.
    #[config(default = 10_000.0)]
    pub theta: f64,
    /// Which components form a pair. Default: half-split.
    #[config(default = "RotaryLayout::HalfSplit")]
    pub layout: RotaryLayout,
}

impl RotaryConfig {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// An odd or zero width, or a base that is not positive.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[("d_head", self.d_head)])?;
        if !self.d_head.is_multiple_of(2) {
            return Err(InvalidConfig::OddWidth {
                field: "d_head",
                value: self.d_head,
            });
        }
        if !(self.theta > 0.0 && self.theta.is_finite()) {
            return Err(InvalidConfig::Range {
                field: "theta",
                range: "positive",
                value: self.theta,
            });
        }
        Ok(())
    }

    /// Turns queries or keys that stand at `first_position` and later.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[batch_size, n_heads, seq_length, d_head]`
    ///
    /// # Panics
    ///
    /// If the last axis is not `d_head`.
    pub fn forward(&self, x: Tensor<4>, first_position: usize) -> Tensor<4> {
        let [batch_size, n_heads, seq_length, d_head] = x.dims();
        assert_eq!(
            d_head, self.d_head,
            "d_head: the input has {d_head} components, the rotary embedding {}",
            self.d_head
        );
        let half = d_head / 2;
        // The axis that tells the two components of a pair apart: last when they are neighbours.
        let (pairs, first, second): ([usize; 5], usize, [usize; 5]) = match self.layout {
            RotaryLayout::Interleaved => (
                [batch_size, n_heads, seq_length, half, 2],
                4,
                [1, 1, seq_length, half, 1],
            ),
            RotaryLayout::HalfSplit => (
                [batch_size, n_heads, seq_length, 2, half],
                3,
                [1, 1, seq_length, 1, half],
            ),
        };
        let [cos, sin] = self.tables(first_position, seq_length, x.dtype(), &x.device());
        let (cos, sin) = (cos.reshape(second), sin.reshape(second));
        let x = x.reshape(pairs);
        let a = x.clone().narrow(first, 0, 1);
        let b = x.narrow(first, 1, 1);
        let turned_a = a.clone() * cos.clone() - b.clone() * sin.clone();
        let turned_b = b * cos + a * sin;
        Tensor::cat(vec![turned_a, turned_b], first)
            .reshape([batch_size, n_heads, seq_length, d_head])
    }

    /// Cosines and sines, each `[seq_length, d_head / 2]`, computed in f64.
    fn tables(
        &self,
        first_position: usize,
        seq_length: usize,
        dtype: DType,
        device: &Device,
    ) -> [Tensor<2>; 2] {
        let half = self.d_head / 2;
        let angles: Vec<f64> = (first_position..first_position + seq_length)
            .flat_map(|position| {
                (0..half).map(move |pair| {
                    position as f64 * self.theta.powf(-2.0 * pair as f64 / self.d_head as f64)
                })
            })
            .collect();
        [f64::cos, f64::sin].map(|f| {
            let values: Vec<f64> = angles.iter().copied().map(f).collect();
            Tensor::from_data(TensorData::new(values, [seq_length, half]), (device, dtype))
        })
    }
}
