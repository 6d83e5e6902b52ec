//! The normalisation of a block: layer norm or RMS norm.

use burn::{
    config::Config,
    module::{Module, Param},
    nn::Initializer,
    tensor::{Device, Tensor},
};

use crate::{
    InvalidConfig,
    operators::{Implementation, NormParameters, add_norm, norm_by},
};

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
            Self::Layer { epsilon, bias } => Norm::Layer(LayerNorm {
                gamma: Initializer::Ones.init([d_model], device),
                beta: bias.then(|| Initializer::Zeros.init([d_model], device)),
                epsilon,
            }),
            Self::Rms { epsilon } => Norm::Rms(RmsNorm {
                gamma: Initializer::Ones.init([d_model], device),
                epsilon,
            }),
        }
    }
}

/// The parameters of a layer norm, named as in burn-nn.
#[derive(Module, Debug)]
pub struct LayerNorm {
    /// `[d_model]`; the factors.
    pub gamma: Param<Tensor<1>>,
    /// `[d_model]`; the shift.
    pub beta: Option<Param<Tensor<1>>>,
    /// Added to the variance.
    pub epsilon: f64,
}

/// The parameters of a root mean square norm, named as in burn-nn.
#[derive(Module, Debug)]
pub struct RmsNorm {
    /// `[d_model]`; the factors.
    pub gamma: Param<Tensor<1>>,
    /// Added to the mean square.
    pub epsilon: f64,
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
        norm_by(Implementation::of(&x.device()), x, &self.parameters())
    }

    /// `s = x + y` and the norm of `s`, as [`add_norm`].
    pub fn add_and_forward<const D: usize>(
        &self,
        x: Tensor<D>,
        y: Tensor<D>,
    ) -> (Tensor<D>, Tensor<D>) {
        add_norm(x, y, &self.parameters())
    }

    fn parameters(&self) -> NormParameters {
        match self {
            Self::Layer(norm) => NormParameters {
                centered: true,
                epsilon: norm.epsilon,
                scale: norm.gamma.val(),
                shift: norm.beta.as_ref().map(Param::val),
            },
            Self::Rms(norm) => NormParameters {
                centered: false,
                epsilon: norm.epsilon,
                scale: norm.gamma.val(),
                shift: None,
            },
        }
    }
}
