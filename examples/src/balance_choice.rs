//! How experts are kept busy, as the command line says it.

use clap::ValueEnum;
use emberlm::{
    core::InvalidConfig,
    models::ExpertLayers,
    moe::{BalanceLoss, RouterConfig},
};

use crate::ModelConfig;

/// How the experts of a model are kept equally busy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BalanceChoice {
    /// Not at all
    None,
    /// By the Switch Transformer's loss
    Switch,
    /// By DeepSeek-V3's loss of each sequence
    Sequence,
    /// By the loss over all micro-batches of a step
    GlobalBatch,
    /// By a bias of the choice without a loss, as DeepSeek-V3
    Bias,
    /// By Sinkhorn's normalisation in training
    Sinkhorn,
}

impl BalanceChoice {
    /// Changes how the experts of a model are kept busy, and nothing else of them.
    ///
    /// # Errors
    ///
    /// A model without experts.
    pub fn apply(self, model: &mut ModelConfig) -> Result<(), InvalidConfig> {
        let Some(ExpertLayers { mixture, .. }) = model.experts_mut() else {
            return Err(InvalidConfig::Unsupported {
                field: "experts",
                reason: "--balance is for models that have some, such as the preset moe-tiny",
            });
        };
        mixture.balance = match self {
            Self::Switch => Some(BalanceLoss::Switch),
            Self::Sequence => Some(BalanceLoss::Sequence),
            Self::GlobalBatch => Some(BalanceLoss::GlobalBatch),
            Self::None | Self::Bias | Self::Sinkhorn => None,
        };
        mixture.router.correction_bias = self == Self::Bias;
        if self == Self::Sinkhorn {
            let k = mixture.router.experts_per_token() as usize;
            // Outside training a token goes to its best experts, and no later one matters.
            mixture.router =
                RouterConfig::sinkhorn(mixture.router.d_model, mixture.router.n_experts, k)
                    .with_allow_leak(true);
        }
        Ok(())
    }
}
