//! The normalisation of a block: layer norm or RMS norm, both Burn's modules.

use burn::{
    config::Config,
    module::Module,
    nn::{LayerNorm, LayerNormConfig, RmsNorm, RmsNormConfig},
    tensor::{DType, Device, Tensor},
};

use crate::InvalidConfig;

/// Which normalisation.
#[derive(Config, Debug, PartialEq)]
pub enum NormConfig {
    /// Layer norm, <https://arxiv.org/abs/1607.06450>.
    Layer {
        /// Added to the variance.
        epsilon: f64,
        /// Whether there is a learned shift.
        bias: bool,
    },
    /// Root mean square norm, <https://arxiv.org/abs/1910.07467>.
    Rms {
        /// Added to the mean square.
        epsilon: f64,
    },
}

impl NormConfig {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// An epsilon that is not positive.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let (Self::Layer { epsilon, .. } | Self::Rms { epsilon }) = *self;
        if epsilon > 0.0 && epsilon.is_finite() {
            Ok(())
        } else {
            Err(InvalidConfig::Range {
                field: "norm.epsilon",
                range: "a number above 0",
                value: epsilon,
            })
        }
    }

    /// Makes the module for vectors of `d_model` components.
    pub fn init(&self, d_model: usize, device: &Device) -> Norm {
        match *self {
            Self::Layer { epsilon, bias } => Norm::Layer(
                LayerNormConfig::new(d_model)
                    .with_epsilon(epsilon)
                    .with_bias(bias)
                    .init(device),
            ),
            Self::Rms { epsilon } => Norm::Rms(
                RmsNormConfig::new(d_model)
                    .with_epsilon(epsilon)
                    .init(device),
            ),
        }
    }
}

/// Layer norm or RMS norm, by [`NormConfig`].
#[derive(Module, Debug)]
pub enum Norm {
    /// Layer norm.
    Layer(LayerNorm),
    /// Root mean square norm.
    Rms(RmsNorm),
}

impl Norm {
    /// Normalises the last axis.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[.., d_model]`
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match self {
            Self::Layer(norm) => norm.forward(x),
            // Burn's module takes the mean square in f32 whatever it is given; a model in f64 keeps its precision.
            Self::Rms(norm) if x.dtype() == DType::F64 => {
                let rms = (x.clone().square().mean_dim(D - 1) + norm.epsilon).sqrt();
                x / rms * norm.gamma.val().unsqueeze()
            }
            Self::Rms(norm) => norm.forward(x),
        }
    }
}
