//! Losses by the coefficient of variation over the experts.

use std::f64::consts::FRAC_1_SQRT_2;

use burn::tensor::Tensor;
use emberlm_core::{AuxiliaryKind, AuxiliaryLoss, LayerLoss, OverLayers};

use super::routed_column;
use crate::Routing;

/// tensor2tensor's guard against a division by zero.
const EPSILON: f64 = 1e-10;

/// The squared coefficient of variation of the sums of the gates of each expert, added over the layers.
///
/// Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>, equations 6 and 7; the weight there is 0.1.
pub fn importance_loss(routing: &Routing) -> AuxiliaryLoss {
    let n_experts = routing.choices.n_experts();
    let importance = routing.gates.clone().sum_dim(0).reshape([n_experts]);
    squared_cv(AuxiliaryKind::Importance, importance)
}

/// The squared coefficient of variation of the expected number of tokens of each expert, if the noise of the logits were
/// drawn anew, added over the layers; nothing for a router without noise, or for as many experts a token as there are.
///
/// Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>, equations 8 to 11; the weight there is 0.1.
pub fn load_loss(routing: &Routing) -> Option<AuxiliaryLoss> {
    let noise = routing.noise.as_ref()?;
    let [n_tokens, n_experts] = noise.clean.dims();
    let k = routing.choices.all().last()?.rank as usize + 1;
    if k >= n_experts {
        return None;
    }
    // What a logit must exceed to be among the best k: the k-th best of the others. For a chosen expert that is the
    // (k + 1)-th of all, for another one the k-th.
    let logits = noise.logits();
    let best = logits.clone().topk(k + 1, 1);
    let last_in = best
        .clone()
        .narrow(1, k - 1, 1)
        .expand([n_tokens, n_experts]);
    let first_out = best.narrow(1, k, 1).expand([n_tokens, n_experts]);
    let chosen = routing.choices.mask(&logits.device(), logits.dtype());
    let threshold = chosen.clone() * first_out + (chosen * -1.0 + 1.0) * last_in;
    let z = (noise.clean.clone() - threshold) / noise.deviation.clone();
    let probability = ((z * FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
    let probability = match routed_column(routing) {
        Some(routed) => probability * routed,
        None => probability,
    };
    let load = probability.sum_dim(0).reshape([n_experts]);
    Some(squared_cv(AuxiliaryKind::Load, load))
}

/// `var(x) / mean(x)^2`, with the variance of a whole population.
fn squared_cv(kind: AuxiliaryKind, x: Tensor<1>) -> AuxiliaryLoss {
    let mean = x.clone().mean();
    let variance = (x - mean.clone()).square().mean();
    AuxiliaryLoss {
        kind,
        over_layers: OverLayers::Sum,
        loss: LayerLoss::Value(variance / (mean.square() + EPSILON)),
    }
}
