//! Activation functions by their published names.

use burn::{
    config::Config,
    tensor::{Tensor, activation},
};

/// An element-wise activation function.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(0, x)`.
    Relu,
    /// `x Phi(x)` with the exact normal distribution function, <https://arxiv.org/abs/1606.08415>.
    Gelu,
    /// GELU's tanh approximation `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`, as in GPT-2.
    GeluTanh,
    /// `x sigmoid(x)`, also called swish, <https://arxiv.org/abs/1702.03118>.
    Silu,
}

impl Activation {
    /// Applies the function to every element.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Relu => activation::relu(x),
            Self::Gelu => activation::gelu(x),
            Self::GeluTanh => activation::gelu_approximate(x),
            Self::Silu => activation::silu(x),
        }
    }
}
