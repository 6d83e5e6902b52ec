//! The experts: feed-forward layers side by side, each with weights of its own.

use burn::{
    config::Config,
    module::{Initializer, Module, Param},
    tensor::{Device, Tensor},
};
use emberlm_core::{
    Activation, InvalidConfig, RandomKey, assert_valid, dropout,
    operators::{ExpertWeights, Implementation, activate, gate, grouped_matmuls_by},
};

/// Configuration of [`Experts`].
#[derive(Config, Debug)]
pub struct ExpertsConfig {
    /// Number of experts.
    pub n_experts: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Inner width of each expert.
    pub d_ff: usize,
    /// The non-linearity. Default: SiLU.
    #[config(default = "Activation::Silu")]
    pub activation: Activation,
    /// Whether there is a gate: `down(f(gate(x)) * up(x))`, else `down(f(up(x)))`. Default: yes.
    #[config(default = true)]
    pub gated: bool,
    /// Whether the projections have biases. Default: no.
    #[config(default = false)]
    pub bias: bool,
    /// Dropout on the inner activations in training. The Switch Transformer fine-tunes with 0.4. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

impl ExpertsConfig {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// A zero, or a dropout rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[
            ("n_experts", self.n_experts),
            ("d_model", self.d_model),
            ("d_ff", self.d_ff),
        ])?;
        InvalidConfig::require_rate("dropout", self.dropout)
    }

    /// Makes the experts, with burn-nn's initialisation of linear layers.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> Experts {
        assert_valid(self.validate());
        let linear = |d_input, d_output| GroupedLinear::new(self, d_input, d_output, device);
        Experts {
            gate: self.gated.then(|| linear(self.d_model, self.d_ff)),
            up: linear(self.d_model, self.d_ff),
            down: linear(self.d_ff, self.d_model),
            activation: self.activation,
            dropout: self.dropout,
        }
    }
}

/// Linear layers side by side.
#[derive(Module, Debug)]
pub struct GroupedLinear {
    /// `[n_experts, d_input, d_output]`
    pub weight: Param<Tensor<3>>,
    /// `[n_experts, d_output]`
    pub bias: Option<Param<Tensor<2>>>,
}

impl GroupedLinear {
    fn new(config: &ExpertsConfig, d_input: usize, d_output: usize, device: &Device) -> Self {
        // As burn-nn's Linear.
        let initializer = Initializer::KaimingUniform {
            gain: 1.0 / 3f64.sqrt(),
            fan_out_only: false,
        };
        Self {
            weight: initializer.init_with(
                [config.n_experts, d_input, d_output],
                Some(d_input),
                Some(d_output),
                device,
            ),
            bias: config.bias.then(|| {
                initializer.init_with(
                    [config.n_experts, d_output],
                    Some(d_input),
                    Some(d_output),
                    device,
                )
            }),
        }
    }

    fn parameters(&self) -> (Tensor<3>, Option<Tensor<2>>) {
        (self.weight.val(), self.bias.as_ref().map(Param::val))
    }
}

/// Feed-forward layers side by side: `down_e(f(gate_e(x)) * up_e(x))`, or `down_e(f(up_e(x)))` without a gate, for the rows
/// `x` of expert `e`.
///
/// Shazeer 2020, <https://arxiv.org/abs/2002.05202>; stacked as in Gale et al. 2022, <https://arxiv.org/abs/2211.15841>.
#[derive(Module, Debug)]
pub struct Experts {
    /// `[n_experts, d_model, d_ff]`
    pub gate: Option<GroupedLinear>,
    /// `[n_experts, d_model, d_ff]`
    pub up: GroupedLinear,
    /// `[n_experts, d_ff, d_model]`
    pub down: GroupedLinear,
    #[module(skip)]
    activation: Activation,
    dropout: f64,
}

impl Experts {
    /// Number of experts.
    pub fn n_experts(&self) -> usize {
        self.up.weight.dims()[0]
    }

    /// The non-linearity.
    pub(crate) fn activation(&self) -> Activation {
        self.activation
    }

    /// Whether training drops inner activations.
    pub(crate) fn drops(&self) -> bool {
        self.dropout > 0.0
    }

    /// All parameters, if there are no biases among them.
    pub(crate) fn weights(&self) -> Option<ExpertWeights> {
        if self.up.bias.is_some() {
            return None;
        }
        Some(ExpertWeights {
            gate: self.gate.as_ref().map(|gate| gate.weight.val()),
            up: self.up.weight.val(),
            down: self.down.weight.val(),
        })
    }

    /// # Shapes
    ///
    /// - `rows`, output: `[n_rows, d_model]`, the rows of an expert together, as many as its `group_sizes` says
    ///
    /// # Panics
    ///
    /// As [`grouped_matmuls_by`].
    pub fn forward(
        &self,
        rows: Tensor<2>,
        group_sizes: &[usize],
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        let implementation = Implementation::of(&rows.device());
        self.forward_by(implementation, rows, group_sizes, dropout_key)
    }

    /// [`forward`](Self::forward), with the products by a given implementation.
    ///
    /// # Panics
    ///
    /// As [`grouped_matmuls_by`].
    pub fn forward_by(
        &self,
        by: Implementation,
        rows: Tensor<2>,
        group_sizes: &[usize],
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        let up = self.up.parameters();
        let inner = match &self.gate {
            Some(layer) => {
                let [gate_rows, up_rows] =
                    grouped_matmuls_by(by, rows, [layer.parameters(), up], group_sizes);
                gate(self.activation, gate_rows, up_rows, None)
            }
            None => {
                let [rows] = grouped_matmuls_by(by, rows, [up], group_sizes);
                activate(self.activation, rows, None)
            }
        };
        let inner = dropout(inner, self.dropout, dropout_key);
        let down = self.down.parameters();
        let [output] = grouped_matmuls_by(by, inner, [down], group_sizes);
        output
    }
}
