//! Rotary position embeddings, in both published layouts.

use burn::{config::Config, tensor::Tensor};

use crate::{
    InvalidConfig,
    operators::{Rotation, rotate},
};

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
        let [x] = self.forward_all([x], first_position);
        x
    }

    /// [`forward`](Self::forward) of queries and keys together.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_all<const N: usize>(
        &self,
        xs: [Tensor<4>; N],
        first_position: usize,
    ) -> [Tensor<4>; N] {
        for x in &xs {
            let [.., d_head] = x.dims();
            assert_eq!(
                d_head, self.d_head,
                "d_head: the input has {d_head} components, the rotary embedding {}",
                self.d_head
            );
        }
        let frequency = |pair| self.theta.powf(-2.0 * pair as f64 / self.d_head as f64);
        let rotation = Rotation {
            frequencies: (0..self.d_head / 2).map(frequency).collect(),
            layout: self.layout,
            first_position,
        };
        rotate(xs, &rotation)
    }
}
