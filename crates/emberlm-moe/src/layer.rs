//! The layer: a router, experts, and what a residual block asks of a feed-forward layer.

use std::{borrow::Cow, sync::Arc};

use burn::{
    config::Config,
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{DType, Device, Tensor},
};
use emberlm_core::{
    Activation, AuxiliaryLoss, Context, DenseLayer, FeedForward, FeedForwardConfig,
    FeedForwardOutput, InvalidConfig, Routed, RoutingStatistics, assert_valid, operators::linear,
};

use crate::{
    BalanceLoss, Capacity, CapacityScope, Chance, Choice, Choices, Counting, Dispatch,
    DropPriority, Experts, ExpertsConfig, Gates, Local, Placement, Renormalisation, Router,
    RouterConfig, RouterInput, Routing, importance_loss, load_loss, router::sigmoid, z_loss,
};

/// Experts that every token goes to, as one feed-forward layer.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct SharedExpertConfig {
    /// Inner width: of several experts the sum.
    pub d_ff: usize,
    /// Whether the output is multiplied by `sigmoid(x w)`: Qwen2-MoE, <https://arxiv.org/abs/2407.10671>. Default: no.
    #[config(default = false)]
    pub gate: bool,
}

/// How the bias of the choice is moved after each step of training.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct BiasUpdate {
    /// Size of a step. Wang et al. 2024 and DeepSeek-V3: 0.001.
    #[config(default = 1e-3)]
    pub rate: f64,
    /// Whether the mean of the changes is taken out of them, as in torchtitan. Default: no, as in the paper.
    #[config(default = false)]
    pub recentred: bool,
}

/// Configuration of a [`MixtureOfExperts`].
#[derive(Config, Debug)]
pub struct MixtureOfExpertsConfig {
    /// The router; it says the width of the model and the number of experts.
    pub router: RouterConfig,
    /// Inner width of each expert.
    pub d_ff: usize,
    /// The non-linearity. Default: SiLU.
    #[config(default = "Activation::Silu")]
    pub activation: Activation,
    /// Whether the experts have a gate. Default: yes.
    #[config(default = true)]
    pub gated: bool,
    /// Whether the projections of the experts have biases. Default: no.
    #[config(default = false)]
    pub bias: bool,
    /// Dropout inside of the experts. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Experts that every token goes to. Default: none.
    pub shared: Option<SharedExpertConfig>,
    /// A bound on the tokens of an expert. Default: none, nothing is dropped.
    pub capacity: Option<Capacity>,
    /// The balance loss. Default: none.
    pub balance: Option<BalanceLoss>,
    /// Whether there is the loss that keeps the logits small. Default: no.
    #[config(default = false)]
    pub z_loss: bool,
    /// Whether there are Shazeer's losses of importance and, with a noisy router, load. Default: no.
    #[config(default = false)]
    pub importance: bool,
    /// How the router's bias is moved, if it has one.
    #[config(default = "BiasUpdate { rate: 1e-3, recentred: false }")]
    pub bias_update: BiasUpdate,
    /// Whether padding is routed and counted like any token, as Hugging Face does. Default: no.
    #[config(default = false)]
    pub route_padding: bool,
}

impl MixtureOfExpertsConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// Whatever the router, the experts or the capacity cannot be.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.router.validate()?;
        self.experts().validate()?;
        if let Some(shared) = &self.shared {
            InvalidConfig::require_positive(&[("shared.d_ff", shared.d_ff)])?;
        }
        if let Some(capacity) = &self.capacity {
            capacity.validate()?;
        }
        let rate = self.bias_update.rate;
        if !(rate.is_finite() && rate >= 0.0) {
            return Err(InvalidConfig::Range {
                field: "bias_update.rate",
                range: "a number of at least 0",
                value: rate,
            });
        }
        Ok(())
    }

    /// Checks that a decoder can have the layer.
    ///
    /// # Errors
    ///
    /// As [`validate`](Self::validate), and where a token's experts depend on later tokens, unless the router's
    /// `allow_leak` says that this is meant.
    pub fn validate_causal(&self) -> Result<(), InvalidConfig> {
        self.validate()?;
        let unsupported = |field, reason| Err(InvalidConfig::Unsupported { field, reason });
        if self.router.allow_leak {
            return Ok(());
        }
        if !self.router.is_causal() {
            return unsupported(
                "router.method",
                "the experts of a token depend on later tokens: a decoder needs allow_leak for that",
            );
        }
        match self.capacity {
            Some(capacity) if self.looks_ahead(capacity.priority) => unsupported(
                "capacity.priority",
                "what is dropped depends on later tokens: a decoder needs allow_leak for that",
            ),
            _ => Ok(()),
        }
    }

    fn looks_ahead(&self, priority: DropPriority) -> bool {
        match priority {
            DropPriority::Position => false,
            DropPriority::FirstChoices => self.router.experts_per_token() > 1.0,
            DropPriority::Probability => true,
        }
    }

    fn experts(&self) -> ExpertsConfig {
        ExpertsConfig::new(self.router.n_experts, self.router.d_model, self.d_ff)
            .with_activation(self.activation)
            .with_gated(self.gated)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
    }

    /// Makes the layer.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> MixtureOfExperts {
        assert_valid(self.validate());
        MixtureOfExperts {
            router: self.router.init(device),
            experts: self.experts().init(device),
            shared: self
                .shared
                .map(|shared| self.shared_expert(&shared, device)),
            config: self.clone(),
        }
    }

    fn shared_expert(&self, config: &SharedExpertConfig, device: &Device) -> SharedExpert {
        let d_model = self.router.d_model;
        let layer = FeedForwardConfig::new(d_model, config.d_ff)
            .with_activation(self.activation)
            .with_bias(self.bias)
            .with_dropout(self.dropout);
        let gate = LinearConfig::new(d_model, 1).with_bias(false);
        SharedExpert {
            layer: layer.init_dense(self.gated, device),
            gate: config.gate.then(|| gate.init(device)),
        }
    }
}

/// The experts that every token goes to.
#[derive(Module, Debug)]
pub struct SharedExpert {
    /// The experts as one layer.
    pub layer: DenseLayer,
    /// `[d_model, 1]`
    pub gate: Option<Linear>,
}

impl SharedExpert {
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let y = self.layer.forward(x.clone(), context).hidden;
        match &self.gate {
            Some(gate) => y * sigmoid(linear(x, gate.weight.val(), None)),
            None => y,
        }
    }
}

// Parts of a layer's random key.
const ROUTER: u64 = 0;
const EXPERTS: u64 = 1;
const SHARED: u64 = 2;

/// A mixture of experts: `y_t = sum_e g_te expert_e(x_t) + shared(x_t)`, over the experts that token `t` is routed to.
///
/// Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>, equation 1; shared experts as in Dai et al. 2024
/// (DeepSeekMoE), <https://arxiv.org/abs/2401.06066>. Nothing is dropped unless the config has a capacity; what is dropped
/// adds nothing, and the shortcut of the residual block carries the token. Dropout, noise, jitter and, by default, capacity
/// act where the context has a dropout key, which is in training.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{Context, FeedForward, Lengths};
/// use emberlm_moe::{BalanceLoss, MixtureOfExpertsConfig, RouterConfig};
///
/// let device = Device::flex();
/// let layer = MixtureOfExpertsConfig::new(RouterConfig::mixtral(16, 8, 2), 32)
///     .with_balance(Some(BalanceLoss::Switch))
///     .init(&device);
/// let context = Context::new(Lengths::square(5));
/// let output = layer.forward(Tensor::ones([1, 5, 16], &device), &context);
/// assert_eq!(output.hidden.dims(), [1, 5, 16]);
/// assert_eq!(output.losses.len(), 1);
/// assert_eq!(output.statistics().unwrap().n_choices(), 10);
/// ```
#[derive(Module, Debug)]
pub struct MixtureOfExperts {
    /// Chooses and weighs.
    pub router: Router,
    /// The experts that are chosen from.
    pub experts: Experts,
    /// The experts that every token goes to.
    pub shared: Option<SharedExpert>,
    #[module(skip)]
    config: MixtureOfExpertsConfig,
}

impl MixtureOfExperts {
    /// How it was made.
    pub fn config(&self) -> &MixtureOfExpertsConfig {
        &self.config
    }

    /// Where the tokens go.
    ///
    /// # Shapes
    ///
    /// - `x`: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// If experts are hashed and the context has no tokens.
    pub fn route(&self, x: Tensor<3>, context: &Context) -> Routing {
        let padding = match self.config.route_padding {
            true => None,
            false => context.padding(),
        };
        // Only a hash looks at them.
        let tokens = match self.router.gate {
            Some(_) => None,
            None => context.tokens.clone().map(|tokens| {
                let tokens = tokens.into_data().convert_dtype(DType::I64);
                tokens.iter::<i64>().collect::<Vec<_>>()
            }),
        };
        let input = RouterInput {
            tokens: tokens.as_deref(),
            padding: padding.as_deref(),
            chance: match context.dropout_key {
                Some(key) => Chance::Key(key.fold(ROUTER)),
                None => Chance::Off,
            },
        };
        self.router.forward(rows_of(x), &input)
    }

    /// As [`FeedForward::forward`], with the experts somewhere else.
    pub fn forward_placed(
        &self,
        x: Tensor<3>,
        context: &Context,
        placement: &impl Placement,
    ) -> FeedForwardOutput {
        let routing = self.route(x.clone(), context);
        self.forward_routed(x, routing, context, placement)
    }

    /// What comes after [`route`](Self::route): capacity, experts, losses. The routing may be of another source, as one
    /// whose random numbers were given.
    ///
    /// # Shapes
    ///
    /// - `x`: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// If the routing is of another number of tokens.
    pub fn forward_routed(
        &self,
        x: Tensor<3>,
        routing: Routing,
        context: &Context,
        placement: &impl Placement,
    ) -> FeedForwardOutput {
        let [batch_size, seq_length, d_model] = x.dims();
        let n_tokens = batch_size * seq_length;
        let n_routed = routing.choices.n_tokens();
        assert_eq!(
            n_routed, n_tokens,
            "routing: of {n_routed} tokens, there are {n_tokens}"
        );
        let (kept, gates, rows) = self.kept(&routing, seq_length, context);
        let n_dropped = (routing.choices.all().len() - kept.all().len()) as u64;
        let hidden = match kept.all().is_empty() {
            true => x.clone().zeros_like(),
            false => {
                let dispatch = Dispatch::new(&kept, rows);
                let key = context.dropout_key.map(|key| key.fold(EXPERTS));
                let x = rows_of(x.clone());
                let sums = placement.mix(&self.experts, x, &dispatch, gates, key);
                sums.reshape([batch_size, seq_length, d_model])
            }
        };
        let hidden = match &self.shared {
            Some(shared) if n_tokens > 0 => hidden + shared.forward(x, &context.fold(SHARED)),
            _ => hidden,
        };
        FeedForwardOutput {
            hidden,
            losses: self.losses(&routing, seq_length, context),
            routed: Some(Routed {
                choices: Arc::new(routing.choices),
                statistics: RoutingStatistics {
                    n_dropped,
                    ..routing.statistics
                },
            }),
        }
    }

    /// The choices that are not dropped, their weights, and how many rows an expert has if all have as many.
    fn kept<'a>(
        &self,
        routing: &'a Routing,
        seq_length: usize,
        context: &Context,
    ) -> (Cow<'a, Choices>, Tensor<2>, Option<usize>) {
        let all = || (Cow::Borrowed(&routing.choices), routing.gates.clone(), None);
        let Some(capacity) = &self.config.capacity else {
            return all();
        };
        if context.dropout_key.is_none() && !capacity.in_evaluation {
            return all();
        }
        let (n_experts, k) = (
            self.config.router.n_experts,
            self.config.router.experts_per_token(),
        );
        let n_tokens = match capacity.scope {
            CapacityScope::Batch => routing.statistics.n_tokens as usize,
            CapacityScope::Sequence => seq_length,
        };
        let most = capacity.of_expert(n_tokens, k, n_experts, context.so_far.step);
        let weights = match capacity.priority {
            DropPriority::Position | DropPriority::FirstChoices => Vec::new(),
            DropPriority::Probability => {
                let weights = match capacity.renormalisation {
                    Renormalisation::BeforeDropping => &routing.gates,
                    Renormalisation::AfterDropping => &routing.scores,
                };
                let weights = weights.clone().detach().into_data();
                weights.convert_dtype(DType::F64).iter::<f64>().collect()
            }
        };
        let weight = |choice: &Choice| {
            let place = choice.token as usize * n_experts + choice.expert as usize;
            weights.get(place).copied().unwrap_or(0.0)
        };
        let kept = capacity.keep(&routing.choices, weight, most, seq_length);
        let gates = routing.gates.clone();
        let after = capacity.renormalisation == Renormalisation::AfterDropping
            && self.config.router.gates != Gates::Scores;
        let gates = match after && kept != routing.choices {
            true => {
                let mask = kept.mask(&gates.device(), gates.dtype());
                let stays = gates.clone() * mask;
                let before = gates.sum_dim(1);
                // A token without any expert left has no weights at all.
                let sums = stays.clone().sum_dim(1);
                let empty = sums.clone().equal_elem(0.0);
                stays * (before / sums.mask_fill(empty, 1.0))
            }
            false => gates,
        };
        // Where rows of a batch do not compete, an expert has the choices of all.
        let n_scopes = match capacity.scope {
            CapacityScope::Batch => 1,
            CapacityScope::Sequence => routing.choices.n_tokens() / seq_length.max(1),
        };
        let rows = capacity.padded.then_some(most * n_scopes);
        (Cow::Owned(kept), gates, rows)
    }

    fn losses(
        &self,
        routing: &Routing,
        seq_length: usize,
        context: &Context,
    ) -> Vec<AuxiliaryLoss> {
        let config = &self.config;
        let mut losses = Vec::new();
        if let Some(balance) = &config.balance {
            let counting = Counting {
                seq_length,
                earlier: context.earlier_load.as_deref(),
            };
            losses.push(balance.forward(routing, &counting));
        }
        if config.z_loss {
            losses.extend(z_loss(routing));
        }
        if config.importance {
            losses.push(importance_loss(routing));
            losses.extend(load_loss(routing));
        }
        losses
    }

    /// After a step of training with this load the router's bias is moved, if it has one.
    ///
    /// # Panics
    ///
    /// If the load is of another number of experts.
    pub fn after_step(&mut self, step: &RoutingStatistics) {
        let BiasUpdate { rate, recentred } = self.config.bias_update;
        self.router.balance(&step.load, rate, recentred);
    }
}

/// `[batch_size * seq_length, d_model]`
fn rows_of(x: Tensor<3>) -> Tensor<2> {
    let [batch_size, seq_length, d_model] = x.dims();
    match batch_size * seq_length {
        // A zero in a new shape says to Burn that the axis stays as long as it was.
        0 => Tensor::zeros([0, d_model], (&x.device(), x.dtype())),
        n_tokens => x.reshape([n_tokens, d_model]),
    }
}

impl FeedForward for MixtureOfExperts {
    fn forward(&self, x: Tensor<3>, context: &Context) -> FeedForwardOutput {
        self.forward_placed(x, context, &Local)
    }
}
