//! Upcycling: experts made of a trained dense layer.

use burn::{nn::Linear, tensor::Tensor};
use emberlm_core::{DenseLayer, GatedMlp, Mlp};

use crate::{Experts, Gates, GroupedLinear, MixtureOfExperts, MixtureOfExpertsConfig};

/// A dense layer that a mixture cannot be made of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpcycleError {
    /// One has a gate, the other has none.
    #[error("gated: the dense layer and the experts must both have a gate, or neither")]
    Gate,
    /// One has biases, the other has none.
    #[error("bias: the dense layer and the experts must both have biases, or neither")]
    Bias,
    /// Their sizes differ.
    #[error("d_model, d_ff: the dense layer has {dense:?}, the experts {experts:?}")]
    Sizes {
        /// Of the dense layer.
        dense: [usize; 2],
        /// Of the experts.
        experts: [usize; 2],
    },
    /// The weights of a token's experts do not sum to one.
    #[error(
        "router: the output equals the dense layer's only where the weights of a token sum to one: gates that are \
         renormalised, scale 1, no shared experts"
    )]
    Weights,
}

impl MixtureOfExpertsConfig {
    /// A mixture whose every expert is the dense layer: its output is the same, until training makes the experts differ.
    ///
    /// Komatsuzaki et al. 2022, <https://arxiv.org/abs/2212.05055>. The router is new.
    ///
    /// # Errors
    ///
    /// Other sizes, gates or biases than the config's, or a router whose weights do not sum to one.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn upcycle(&self, dense: &DenseLayer) -> Result<MixtureOfExperts, UpcycleError> {
        let sums_to_one = self.router.gates != Gates::Scores && self.router.scale == 1.0;
        if !sums_to_one || self.shared.is_some() {
            return Err(UpcycleError::Weights);
        }
        let up = match dense {
            DenseLayer::Plain(Mlp { up, .. }) | DenseLayer::Gated(GatedMlp { up, .. }) => up,
        };
        let dims = up.weight.dims();
        let own = [self.router.d_model, self.d_ff];
        if dims != own {
            return Err(UpcycleError::Sizes {
                dense: dims,
                experts: own,
            });
        }
        if up.bias.is_some() != self.bias {
            return Err(UpcycleError::Bias);
        }
        let mut layer = self.init(&up.weight.device());
        let Experts { gate, up, down, .. } = &mut layer.experts;
        match (dense, gate) {
            (DenseLayer::Plain(dense), None) => {
                repeat(&dense.up, up);
                repeat(&dense.down, down);
            }
            (DenseLayer::Gated(dense), Some(gate)) => {
                repeat(&dense.gate, gate);
                repeat(&dense.up, up);
                repeat(&dense.down, down);
            }
            _ => return Err(UpcycleError::Gate),
        }
        Ok(layer)
    }
}

fn repeat(dense: &Linear, experts: &mut GroupedLinear) {
    let [n_experts, ..] = experts.weight.dims();
    let copies = |weight: Tensor<2>| {
        weight
            .detach()
            .unsqueeze_dim::<3>(0)
            .repeat_dim(0, n_experts)
    };
    experts.weight = (experts.weight.clone()).map(|_| copies(dense.weight.val()));
    if let (Some(to), Some(bias)) = (experts.bias.take(), &dense.bias) {
        let copies = copies(bias.val().unsqueeze_dim(0)).squeeze_dim::<2>(1);
        experts.bias = Some(to.map(|_| copies));
    }
}
