//! Cross-entropy of next-token scores, with label smoothing, ignored targets and z-loss.

use burn::{
    config::Config,
    tensor::{Int, Tensor},
};

use crate::{InvalidConfig, operators::cross_entropy};

/// Configuration of the cross-entropy.
#[derive(Config, Debug)]
pub struct CrossEntropyConfig {
    /// Share of the target's mass that is spread over ALL classes, as in PyTorch. Default: 0.
    #[config(default = 0.0)]
    pub label_smoothing: f64,
    /// Targets of this value do not count.
    pub ignored_target: Option<i64>,
}

/// Sums over the targets that count; divide by `n_targets` for a mean.
///
/// Sums, because token counts differ between the micro-batches of an accumulated gradient. The auxiliary z-loss
/// is not weighted: the trainer weighs it.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// Sum of the (smoothed) negative log-likelihoods in nats, shape `[1]`.
    pub nll_sum: Tensor<1>,
    /// Sum of the squared log-partition functions, shape `[1]`.
    pub z_sum: Tensor<1>,
    /// How many targets counted, shape `[1]`.
    pub n_targets: Tensor<1>,
}

impl CrossEntropy {
    /// Mean negative log-likelihood in nats, shape `[1]`. Not a number if no target counted.
    pub fn mean(&self) -> Tensor<1> {
        self.nll_sum.clone() / self.n_targets.clone()
    }

    /// Mean z-loss, shape `[1]`. Not a number if no target counted.
    pub fn mean_z(&self) -> Tensor<1> {
        self.z_sum.clone() / self.n_targets.clone()
    }
}

impl CrossEntropyConfig {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// Label smoothing outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_rate("label_smoothing", self.label_smoothing)
    }

    /// `-(1 - e) log p(y) - e / V sum_v log p(v)`, and `log(Z)^2` with `Z = sum_v exp(logit_v)`.
    ///
    /// Label smoothing: Szegedy et al. 2016, <https://arxiv.org/abs/1512.00567>, over all classes as PyTorch does;
    /// z-loss: Chowdhery et al. 2022, section 5, <https://arxiv.org/abs/2204.02311>.
    ///
    /// # Shapes
    ///
    /// - `logits`: `[n_tokens, vocab_size]`
    /// - `targets`: `[n_tokens]`
    ///
    /// ```
    /// use burn::tensor::{Device, Int, Tensor};
    /// use emberlm_core::CrossEntropyConfig;
    ///
    /// let device = Device::flex();
    /// let logits = Tensor::<2>::zeros([3, 8], &device);
    /// let targets = Tensor::<1, Int>::from_ints([0, 5, 7], &device);
    /// let loss: f32 = CrossEntropyConfig::new().forward(logits, targets).mean().into_scalar();
    /// assert!((loss - 8f32.ln()).abs() < 1e-6); // knowing nothing costs log V
    /// ```
    ///
    /// # Panics
    ///
    /// As [`cross_entropy`].
    pub fn forward(&self, logits: Tensor<2>, targets: Tensor<1, Int>) -> CrossEntropy {
        cross_entropy(self, logits, targets, None)
    }
}
