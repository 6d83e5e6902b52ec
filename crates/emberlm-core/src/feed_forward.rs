//! Position-wise feed-forward layers, plain and gated.

use burn::{
    config::Config,
    module::{Module, Param},
    nn::{Linear, LinearConfig},
    tensor::{Device, Tensor},
};

use crate::{
    Activation, Context, FeedForward, FeedForwardOutput, InvalidConfig, assert_valid, dropout,
    operators::{activate, gate, linear, linears, project},
};

/// Configuration of [`Mlp`] and [`GatedMlp`].
#[derive(Config, Debug)]
pub struct FeedForwardConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Inner width.
    pub d_ff: usize,
    /// The non-linearity. Default: exact GELU.
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Whether the projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Dropout on the inner activations. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

impl FeedForwardConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A width of zero, or a dropout rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[("d_model", self.d_model), ("d_ff", self.d_ff)])?;
        InvalidConfig::require_rate("dropout", self.dropout)
    }

    /// Makes a plain layer.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> Mlp {
        assert_valid(self.validate());
        Mlp {
            up: self.linear(self.d_model, self.d_ff, device),
            down: self.linear(self.d_ff, self.d_model, device),
            activation: self.activation,
            dropout: self.dropout,
        }
    }

    /// Makes a gated layer, which has a third projection of the same size as `up`.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init_gated(&self, device: &Device) -> GatedMlp {
        assert_valid(self.validate());
        GatedMlp {
            gate: self.linear(self.d_model, self.d_ff, device),
            up: self.linear(self.d_model, self.d_ff, device),
            down: self.linear(self.d_ff, self.d_model, device),
            activation: self.activation,
            dropout: self.dropout,
        }
    }

    /// Makes either.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init_dense(&self, gated: bool, device: &Device) -> DenseLayer {
        match gated {
            true => DenseLayer::Gated(self.init_gated(device)),
            false => DenseLayer::Plain(self.init(device)),
        }
    }

    fn linear(&self, d_input: usize, d_output: usize, device: &Device) -> Linear {
        LinearConfig::new(d_input, d_output)
            .with_bias(self.bias)
            .init(device)
    }
}

/// Plain feed-forward layer: `down(f(up(x)))`.
///
/// Vaswani et al. 2017, equation 2, <https://arxiv.org/abs/1706.03762>, with any [`Activation`] as `f`.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{Context, FeedForward, FeedForwardConfig, Lengths};
///
/// let device = Device::flex();
/// let layer = FeedForwardConfig::new(8, 32).init(&device);
/// let y = layer.forward(Tensor::ones([2, 5, 8], &device), &Context::new(Lengths::square(5)));
/// assert_eq!(y.hidden.dims(), [2, 5, 8]);
/// ```
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[d_model, d_ff]`
    pub up: Linear,
    /// `[d_ff, d_model]`
    pub down: Linear,
    #[module(skip)]
    activation: Activation,
    dropout: f64,
}

impl Mlp {
    /// The non-linearity.
    pub fn activation(&self) -> Activation {
        self.activation
    }
}

impl FeedForward for Mlp {
    fn forward(&self, x: Tensor<3>, context: &Context) -> FeedForwardOutput {
        // The bias is added where the activation reads the product anyway.
        let product = linear(x, self.up.weight.val(), None);
        let hidden = activate(self.activation, product, bias(&self.up));
        let hidden = dropout(hidden, self.dropout, context.dropout_key);
        project(&self.down, hidden).into()
    }
}

/// Gated feed-forward layer: `down(f(gate(x)) * up(x))`; with SiLU it is SwiGLU, with GELU GeGLU, with ReLU ReGLU.
///
/// Shazeer 2020, <https://arxiv.org/abs/2002.05202>; the names `gate`, `up`, `down` are Llama's.
#[derive(Module, Debug)]
pub struct GatedMlp {
    /// `[d_model, d_ff]`
    pub gate: Linear,
    /// `[d_model, d_ff]`
    pub up: Linear,
    /// `[d_ff, d_model]`
    pub down: Linear,
    #[module(skip)]
    activation: Activation,
    dropout: f64,
}

impl GatedMlp {
    /// The non-linearity.
    pub fn activation(&self) -> Activation {
        self.activation
    }
}

impl FeedForward for GatedMlp {
    fn forward(&self, x: Tensor<3>, context: &Context) -> FeedForwardOutput {
        let products = linears(x, [&self.gate, &self.up].map(|up| (up.weight.val(), None)));
        let [gate_product, up_product] = products;
        let biases = bias(&self.gate).zip(bias(&self.up));
        let hidden = gate(
            self.activation,
            gate_product,
            up_product,
            biases.map(|(gate, up)| [gate, up]),
        );
        let hidden = dropout(hidden, self.dropout, context.dropout_key);
        project(&self.down, hidden).into()
    }
}

/// A plain or a gated layer.
#[derive(Module, Debug)]
pub enum DenseLayer {
    /// `down(f(up(x)))`
    Plain(Mlp),
    /// `down(f(gate(x)) * up(x))`
    Gated(GatedMlp),
}

impl FeedForward for DenseLayer {
    fn forward(&self, x: Tensor<3>, context: &Context) -> FeedForwardOutput {
        match self {
            Self::Plain(layer) => layer.forward(x, context),
            Self::Gated(layer) => layer.forward(x, context),
        }
    }
}

fn bias(linear: &Linear) -> Option<Tensor<1>> {
    linear.bias.as_ref().map(Param::val)
}
