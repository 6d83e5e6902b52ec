//! Upcycling: experts made of a trained dense layer.

use burn::{module::Param, nn::Linear, tensor::Tensor};
use emberlm_core::{Activation, DenseLayer};

use crate::{Experts, Gates, GroupedLinear, Method, MixtureOfExperts, MixtureOfExpertsConfig};

/// A dense layer that a mixture cannot be made of.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpcycleError {
    /// One has a gate, the other has none.
    #[error("gated: the dense layer and the experts must both have a gate, or neither")]
    Gate,
    /// Their non-linearities differ.
    #[error("activation: the dense layer has {dense:?}, the experts {experts:?}")]
    Activation {
        /// Of the dense layer.
        dense: Activation,
        /// Of the experts.
        experts: Activation,
    },
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
         renormalised, scale 1, no expert choice, no capacity in evaluation, no shared experts"
    )]
    Weights,
}

impl MixtureOfExpertsConfig {
    /// A mixture whose every expert is the dense layer: its output is the same, until training makes the experts differ.
    ///
    /// Komatsuzaki et al. 2022, <https://arxiv.org/abs/2212.05055>. The router is new. What drops choices in training, a
    /// capacity or chance, takes its part of the output there.
    ///
    /// # Errors
    ///
    /// Other sizes, gates, biases or another activation than the config's, or weights of a token that do not sum to one.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn upcycle(&self, dense: &DenseLayer) -> Result<MixtureOfExperts, UpcycleError> {
        let sums_to_one = self.router.gates != Gates::Scores && self.router.scale == 1.0;
        let by_tokens = !matches!(self.router.method, Method::ExpertChoice { .. });
        let keeps_all = (self.capacity).is_none_or(|capacity| !capacity.in_evaluation);
        if !(sums_to_one && by_tokens && keeps_all) || self.shared.is_some() {
            return Err(UpcycleError::Weights);
        }
        let (up, activation) = match dense {
            DenseLayer::Plain(dense) => (&dense.up, dense.activation()),
            DenseLayer::Gated(dense) => (&dense.up, dense.activation()),
        };
        if activation != self.activation {
            return Err(UpcycleError::Activation {
                dense: activation,
                experts: self.activation,
            });
        }
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

/// The parameter with another value: a leaf, and trained if it was.
fn replaced<const D: usize>(param: &Param<Tensor<D>>, value: Tensor<D>) -> Param<Tensor<D>> {
    let is_trained = param.val().is_require_grad();
    (param.clone()).map(|_| value.detach().set_require_grad(is_trained))
}

fn repeat(dense: &Linear, experts: &mut GroupedLinear) {
    let [n_experts, ..] = experts.weight.dims();
    let copies = |weight: Tensor<2>| weight.unsqueeze_dim::<3>(0).repeat_dim(0, n_experts);
    experts.weight = replaced(&experts.weight, copies(dense.weight.val()));
    if let (Some(to), Some(bias)) = (&experts.bias, &dense.bias) {
        let copies = copies(bias.val().unsqueeze_dim(0)).squeeze_dim::<2>(1);
        experts.bias = Some(replaced(to, copies));
    }
}
