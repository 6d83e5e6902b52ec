//! The functions that make scores of a router's logits.

use burn::{
    config::Config,
    tensor::{DType, Tensor, activation},
};

/// The score of an expert.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// `exp(l_e) / sum_j exp(l_j)`: most routers.
    Softmax,
    /// `1 / (1 + exp(-l_e))`, each expert by itself: DeepSeek-V3, <https://arxiv.org/abs/2412.19437>, equation 15.
    Sigmoid,
    /// `sqrt(log(1 + exp(l_e)))`: Megatron-LM's `sqrtsoftplus`.
    SqrtSoftplus,
}

impl Scoring {
    /// # Shapes
    ///
    /// - `logits`, output: `[n_tokens, n_experts]`
    pub fn forward(&self, logits: Tensor<2>) -> Tensor<2> {
        match self {
            Self::Softmax => activation::softmax(logits, 1),
            Self::Sigmoid => sigmoid(logits),
            Self::SqrtSoftplus => {
                // Below the smallest number the root's gradient would be infinite times zero.
                let smallest = match logits.dtype() {
                    DType::F64 => f64::MIN_POSITIVE,
                    _ => f64::from(f32::MIN_POSITIVE),
                };
                softplus(logits).clamp_min(smallest).sqrt()
            }
        }
    }
}

/// `1 / (1 + exp(-x))`. Burn's own may go through f32 whatever it is given.
pub(crate) fn sigmoid<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    match x.dtype() {
        DType::F64 => ((x * 0.5).tanh() + 1.0) * 0.5,
        _ => activation::sigmoid(x),
    }
}

/// `log(1 + exp(x))`, which does not overflow.
pub(super) fn softplus(x: Tensor<2>) -> Tensor<2> {
    let size = x.clone().abs();
    // The larger of `x` and 0, as a sum whose gradient at 0 is a half, where that of the rest is 0.
    (x + size.clone()) * 0.5 + size.neg().exp().log1p()
}
