//! Rotary position embeddings, in both published layouts.

use burn::{config::Config, tensor::Tensor};

use super::{RotaryScaling, rotary_scaling::require};
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
/// the difference of their positions alone. `d` is [`rotary_width`](Self::rotary_width): with
/// [`d_rotary`](Self::d_rotary) only the first components of a head are turned, as in GPT-J, GPT-NeoX and Phi.
/// [`scaling`](Self::scaling) changes the angles for sequences longer than the trained ones.
///
/// # Frequencies that change with the length
///
/// Those of [`RotaryScaling::DynamicNtk`] and [`RotaryScaling::LongRope`] are a function of the length of the sequence
/// so far: the position of the last token of a pass, plus one. Nothing is remembered between passes. A cache that holds
/// turned keys would mix angles of several lengths, so attention caches such keys as they are and turns all of them
/// anew in each pass, as Peng et al. 2023 ask for in section 3.3, <https://arxiv.org/abs/2309.00071>. (transformers
/// keeps the old rotation of dynamic keys, and drops the cache of Phi-3 when its factors change.)
///
/// Decoding with a cache then equals one pass over the whole up to the trained length. Beyond it no cache can: what
/// earlier tokens became in the pass of their own length would change with every later one. A layer's outputs at the
/// newest positions are those of a pass over the sequence so far.
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
    /// Width of a head; even, unless [`d_rotary`](Self::d_rotary) is given.
    pub d_head: usize,
    /// Number of components that are turned, the first ones of a head; even. Default: `d_head`.
    pub d_rotary: Option<usize>,
    /// Base of the wavelengths. Default: 10,000.
    #[config(default = 10_000.0)]
    pub theta: f64,
    /// Which components form a pair. Default: half-split.
    #[config(default = "RotaryLayout::HalfSplit")]
    pub layout: RotaryLayout,
    /// How the angles are changed for longer sequences. Default: not.
    #[config(default = "RotaryScaling::None")]
    pub scaling: RotaryScaling,
}

impl RotaryConfig {
    /// Number of components that are turned: as given, or the whole head.
    pub fn rotary_width(&self) -> usize {
        self.d_rotary.unwrap_or(self.d_head)
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// An odd or zero width, one that is wider than the head, a base that is not positive, or a scaling that is
    /// impossible or does not fit the width.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let width = self.rotary_width();
        let field = match self.d_rotary {
            Some(_) => "d_rotary",
            None => "d_head",
        };
        InvalidConfig::require_positive(&[("d_head", self.d_head), (field, width)])?;
        if !width.is_multiple_of(2) {
            return Err(InvalidConfig::OddWidth {
                field,
                value: width,
            });
        }
        require(field, "at most d_head", width as f64, width <= self.d_head)?;
        let holds = self.theta > 0.0 && self.theta.is_finite();
        require("theta", "positive", self.theta, holds)?;
        self.scaling.validate(width, self.theta)
    }

    /// The frequency of each pair in a sequence of `seq_length`, in radians a position; the length matters only if
    /// [`RotaryScaling::changes_with_length`].
    pub fn frequencies(&self, seq_length: usize) -> Vec<f64> {
        self.scaling
            .frequencies(self.rotary_width(), self.theta, seq_length)
    }

    /// Factor of the turned components, 1 unless [`scaling`](Self::scaling) has one.
    pub fn attention_factor(&self) -> f64 {
        self.scaling.attention_factor()
    }

    /// The rotation of rows from `first_position` on, in a sequence of `seq_length`.
    pub fn rotation(&self, first_position: usize, seq_length: usize) -> Rotation {
        Rotation {
            frequencies: self.frequencies(seq_length),
            layout: self.layout,
            first_position,
            attention_factor: self.attention_factor(),
        }
    }

    /// Turns queries or keys that stand at `first_position` and later; the last one ends the sequence.
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

    /// [`forward`](Self::forward) of queries and keys together; the longest ends the sequence.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_all<const N: usize>(
        &self,
        xs: [Tensor<4>; N],
        first_position: usize,
    ) -> [Tensor<4>; N] {
        let mut longest = 0;
        for x in &xs {
            let [.., length, d_head] = x.dims();
            assert_eq!(
                d_head, self.d_head,
                "d_head: the input has {d_head} components, the rotary embedding {}",
                self.d_head
            );
            longest = longest.max(length);
        }
        rotate(xs, &self.rotation(first_position, first_position + longest))
    }
}
