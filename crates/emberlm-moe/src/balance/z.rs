//! The loss that keeps a router's logits small.

use burn::tensor::Tensor;
use emberlm_core::{AuxiliaryKind, AuxiliaryLoss, LayerLoss, OverLayers};

use super::routed_column;
use crate::Routing;

/// The mean over the routed tokens of `log(sum_e exp(logit_e))^2`, added over the layers; nothing where there are no logits.
///
/// Zoph et al. 2022 (ST-MoE), <https://arxiv.org/abs/2202.08906>, equation 5; the weight there is 0.001.
pub fn z_loss(routing: &Routing) -> Option<AuxiliaryLoss> {
    let logits = routing.logits.clone()?;
    // The sum is not changed by what is taken out of it and put back.
    let most = logits.clone().detach().max_dim(1);
    let log_sum = (logits - most.clone()).exp().sum_dim(1).log() + most;
    let squares: Tensor<2> = log_sum.square();
    let counted = match routed_column(routing) {
        Some(routed) => squares * routed,
        None => squares,
    };
    let n_tokens = routing.statistics.n_tokens.max(1) as f64;
    // Times the reciprocal: Burn's autodiff rounds the divisor of a division by a scalar to f32.
    Some(AuxiliaryLoss {
        kind: AuxiliaryKind::RouterZ,
        over_layers: OverLayers::Sum,
        loss: LayerLoss::Value(counted.sum() * (1.0 / n_tokens)),
    })
}
