//! Activation functions by their published names.

use std::f64::consts::FRAC_1_SQRT_2;

use burn::{
    config::Config,
    tensor::{DType, Tensor, activation},
};

use crate::operators::activate;

/// An element-wise activation function.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `max(0, x)`.
    Relu,
    /// `max(0, x)^2`, <https://arxiv.org/abs/2109.08668>.
    SquaredRelu,
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
        activate(*self, x, None)
    }

    /// In tensor operations.
    pub(crate) fn definition<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Relu => activation::relu(x),
            Self::SquaredRelu => activation::relu(x).square(),
            Self::Gelu => gelu(x),
            Self::GeluTanh => activation::gelu_approximate(x),
            // Burn's sigmoid may go through f32 whatever it is given; a model in f64 keeps its precision. The hyperbolic
            // tangent does not overflow, as the exponential would in the gradient.
            Self::Silu if x.dtype() == DType::F64 => {
                let doubled = (x.clone() * 0.5).tanh() + 1.0;
                x * doubled * 0.5
            }
            Self::Silu => activation::silu(x),
        }
    }
}

/// Exact GELU with its exact gradient.
///
/// Burn's operator is exact forward on every backend, but only flex overrides its backward: everywhere else the
/// gradient is that of the tanh approximation (burn-backend 0.22.1, `ActivationOps::gelu_backward`), off by 1e-4. So
/// where a gradient is wanted the formula is written out, `x (1 + erf(x / sqrt(2))) / 2`.
fn gelu<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    if x.is_autodiff() {
        let doubled = (x.clone() * FRAC_1_SQRT_2).erf() + 1.0;
        x * doubled * 0.5
    } else {
        activation::gelu(x)
    }
}
