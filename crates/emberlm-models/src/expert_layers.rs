//! Which blocks of a stack have experts.

use burn::config::Config;
use emberlm_core::InvalidConfig;
use emberlm_moe::MixtureOfExpertsConfig;

/// Blocks that have a mixture of experts in place of the dense feed-forward layer: `first`, `first + every`, and so on.
///
/// Mixtral has them in all blocks; the Switch Transformer in every second one, from the second on; DeepSeek in all but
/// the first few.
#[derive(Config, Debug)]
pub struct ExpertLayers {
    /// The mixture. Its width is the model's.
    pub mixture: MixtureOfExpertsConfig,
    /// Number of the first block with experts. Default: 0.
    #[config(default = 0)]
    pub first: usize,
    /// One of so many blocks from there on has experts. Default: 1, all.
    #[config(default = 1)]
    pub every: usize,
}

impl ExpertLayers {
    /// Whether a block has experts.
    pub fn has(&self, layer: usize) -> bool {
        layer >= self.first && (layer - self.first).is_multiple_of(self.every)
    }

    pub(crate) fn validate(&self, d_model: usize, n_layers: usize) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[("experts.every", self.every)])?;
        let range = |field, range, value: usize| InvalidConfig::Range {
            field,
            range,
            value: value as f64,
        };
        if self.first >= n_layers {
            return Err(range("experts.first", "the number of a block", self.first));
        }
        let own = self.mixture.router.d_model;
        if own != d_model {
            return Err(range(
                "experts.mixture.router.d_model",
                "the model's d_model",
                own,
            ));
        }
        self.mixture.validate()
    }

    /// Checks that a decoder can have them.
    pub(crate) fn validate_causal(&self) -> Result<(), InvalidConfig> {
        self.mixture.validate_causal()
    }
}
