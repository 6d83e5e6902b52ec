//! Cross-entropy of next-token scores, with label smoothing, ignored targets and z-loss.

use burn::{
    config::Config,
    tensor::{Int, Tensor, activation::log_softmax},
};

use crate::InvalidConfig;

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
    /// If the numbers of rows differ.
    pub fn forward(&self, logits: Tensor<2>, targets: Tensor<1, Int>) -> CrossEntropy {
        let [n_tokens, vocab_size] = logits.dims();
        let [n_targets] = targets.dims();
        assert_eq!(
            n_tokens, n_targets,
            "n_tokens: {n_tokens} rows of scores, {n_targets} targets"
        );
        let ignored = self
            .ignored_target
            .map(|value| targets.clone().equal_scalar(value));
        // An ignored target may lie outside the vocabulary: look up class 0 and drop the result.
        let lookup = match &ignored {
            Some(ignored) => targets.mask_fill(ignored.clone(), 0),
            None => targets,
        };
        let lookup = lookup.reshape([n_tokens, 1]);

        let log_probs = log_softmax(logits.clone(), 1);
        let log_likelihood = log_probs.clone().gather(1, lookup.clone());
        // log Z = logit - log p, for whichever class.
        let log_partition = logits.gather(1, lookup) - log_likelihood.clone();
        let nll = if self.label_smoothing > 0.0 {
            // Times the reciprocal: Burn's autodiff rounds the divisor of a division by a scalar to f32.
            let uniform = log_probs.sum_dim(1) * (vocab_size as f64).recip();
            -(log_likelihood * (1.0 - self.label_smoothing) + uniform * self.label_smoothing)
        } else {
            -log_likelihood
        };
        let z = log_partition.square();

        let ignored = ignored.map(|ignored| ignored.reshape([n_tokens, 1]));
        let sum = |x: Tensor<2>| match &ignored {
            Some(ignored) => x.mask_fill(ignored.clone(), 0.0).sum(),
            None => x.sum(),
        };
        let n_targets = sum(nll.clone().detach().ones_like());
        CrossEntropy {
            nll_sum: sum(nll),
            z_sum: sum(z),
            n_targets,
        }
    }
}
