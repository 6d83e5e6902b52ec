//! Noise of a learned size on the logits.

use burn::tensor::Tensor;

use super::scoring::softplus;

/// `logits = clean + normal softplus(size)`: Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>, equation 4.
#[derive(Debug, Clone)]
pub struct Noise {
    /// `[n_tokens, n_experts]`: the logits without noise.
    pub clean: Tensor<2>,
    /// `[n_tokens, n_experts]`: the standard deviation of the noise.
    pub deviation: Tensor<2>,
    noisy: Option<Tensor<2>>,
}

impl Noise {
    /// Without standard normal numbers there is no noise.
    pub(super) fn new(clean: Tensor<2>, size: Tensor<2>, normal: Option<Tensor<2>>) -> Self {
        let deviation = softplus(size);
        Self {
            noisy: normal.map(|normal| clean.clone() + normal * deviation.clone()),
            clean,
            deviation,
        }
    }

    /// The logits that are chosen by.
    pub fn logits(&self) -> Tensor<2> {
        self.noisy.clone().unwrap_or_else(|| self.clean.clone())
    }
}
