//! What a feed-forward layer gives: its output, and what routing of tokens gives besides.

use std::sync::Arc;

use burn::tensor::Tensor;

use crate::Choices;

/// What a feed-forward layer gives. A dense layer gives its output alone, by `.into()`.
#[derive(Debug, Clone)]
pub struct FeedForwardOutput {
    /// `[batch_size, seq_length, d_model]`
    pub hidden: Tensor<3>,
    /// Losses besides that of the model, unweighted: the trainer weighs them.
    pub losses: Vec<AuxiliaryLoss>,
    /// Where the tokens went, of a layer that routes them.
    pub routed: Option<Routed>,
}

impl FeedForwardOutput {
    /// Where the tokens went in numbers, of a layer that routes them.
    pub fn statistics(&self) -> Option<&RoutingStatistics> {
        self.routed.as_ref().map(|routed| &routed.statistics)
    }
}

/// Where the tokens of a layer went.
#[derive(Debug, Clone)]
pub struct Routed {
    /// Token by token, before any were dropped.
    pub choices: Arc<Choices>,
    /// In numbers.
    pub statistics: RoutingStatistics,
}

impl From<Tensor<3>> for FeedForwardOutput {
    fn from(hidden: Tensor<3>) -> Self {
        Self {
            hidden,
            losses: Vec::new(),
            routed: None,
        }
    }
}

/// What the routing of a layer gave besides its output, on its way out of a model.
#[derive(Debug, Clone)]
pub struct LayerRouting {
    /// The layer, numbered by the stack; a block by itself says 0.
    pub layer: usize,
    /// Its losses, unweighted.
    pub losses: Vec<AuxiliaryLoss>,
    /// Where its tokens went, token by token, before any were dropped.
    pub choices: Arc<Choices>,
    /// Where its tokens went, in numbers.
    pub statistics: RoutingStatistics,
}

/// What an auxiliary loss is for, and so which weight a trainer gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AuxiliaryKind {
    /// That experts get the same number of tokens.
    Balance,
    /// That the router's logits stay small.
    RouterZ,
    /// That experts get the same sum of gates.
    Importance,
    /// That experts get the same expected number of tokens under the router's noise.
    Load,
}

impl AuxiliaryKind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Balance, Self::RouterZ, Self::Importance, Self::Load];
}

/// How the losses of several layers become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverLayers {
    /// They are added.
    Sum,
    /// Their mean.
    Mean,
    /// A product's factors are averaged first, as if all layers were one with their tokens together.
    Pool,
}

/// A loss of one layer, unweighted, shape `[1]`.
#[expect(
    clippy::large_enum_variant,
    reason = "a layer gives a few of them a pass"
)]
#[derive(Debug, Clone)]
pub enum LayerLoss {
    /// A value.
    Value(Tensor<1>),
    /// `factor sum_i shares_i probabilities_i`, over the experts, or over the experts of each sequence.
    Product {
        /// A constant.
        factor: f64,
        /// Shares of the choices, which have no gradient, `[n]`.
        shares: Tensor<1>,
        /// Mean probabilities, `[n]`.
        probabilities: Tensor<1>,
    },
}

impl LayerLoss {
    /// The value, shape `[1]`.
    pub fn value(&self) -> Tensor<1> {
        match self {
            Self::Value(value) => value.clone(),
            Self::Product {
                factor,
                shares,
                probabilities,
            } => (shares.clone() * probabilities.clone()).sum() * *factor,
        }
    }
}

/// A loss of a layer besides that of the model.
#[derive(Debug, Clone)]
pub struct AuxiliaryLoss {
    /// What it is for.
    pub kind: AuxiliaryKind,
    /// How those of several layers become one.
    pub over_layers: OverLayers,
    /// That of this layer.
    pub loss: LayerLoss,
}

impl AuxiliaryLoss {
    /// The losses of one kind over all layers as one, shape `[1]`; nothing where there is none of the kind.
    ///
    /// # Panics
    ///
    /// If layers are pooled whose loss is no product, or whose numbers of experts differ.
    pub fn over_layers<'a>(
        losses: impl IntoIterator<Item = &'a Self>,
        kind: AuxiliaryKind,
    ) -> Option<Tensor<1>> {
        let losses: Vec<&Self> = losses
            .into_iter()
            .filter(|loss| loss.kind == kind)
            .collect();
        let first = losses.first()?;
        let n = losses.len() as f64;
        let sum = |part: &dyn Fn(&Self) -> Tensor<1>| {
            let parts = losses.iter().map(|loss| part(loss));
            parts.reduce(|a, b| a + b).expect("there is a first")
        };
        let value = |loss: &Self| loss.loss.value();
        Some(match first.over_layers {
            OverLayers::Sum => sum(&value),
            // Times the reciprocal: Burn's autodiff rounds the divisor of a division by a scalar to f32.
            OverLayers::Mean => sum(&value) * (1.0 / n),
            OverLayers::Pool => {
                let factors = |loss: &Self| match &loss.loss {
                    LayerLoss::Product {
                        factor,
                        shares,
                        probabilities,
                    } => (*factor, shares.clone(), probabilities.clone()),
                    LayerLoss::Value(_) => panic!("over_layers: a value cannot be pooled"),
                };
                let (factor, ..) = factors(first);
                let shares = sum(&|loss| factors(loss).1);
                let probabilities = sum(&|loss| factors(loss).2);
                (shares * probabilities).sum() * (factor / (n * n))
            }
        })
    }
}

/// Where the tokens of a layer went.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RoutingStatistics {
    /// How often each expert was chosen, before any were dropped.
    pub load: Vec<u64>,
    /// How many tokens were routed: padding is not.
    pub n_tokens: u64,
    /// How many choices were dropped because the expert was full.
    pub n_dropped: u64,
    /// Sum over the tokens of the entropy of their probabilities, in nats.
    pub entropy_sum: f64,
    /// How many tokens had scores that are no numbers. Their output is none either.
    pub n_not_finite: u64,
}

impl RoutingStatistics {
    /// Adds those of other tokens.
    ///
    /// # Panics
    ///
    /// If the numbers of experts differ.
    pub fn add(&mut self, other: &Self) {
        if self.load.is_empty() {
            self.load = vec![0; other.load.len()];
        }
        assert_eq!(
            self.load.len(),
            other.load.len(),
            "n_experts: of two layers"
        );
        self.load
            .iter_mut()
            .zip(&other.load)
            .for_each(|(a, b)| *a += b);
        self.n_tokens += other.n_tokens;
        self.n_dropped += other.n_dropped;
        self.entropy_sum += other.entropy_sum;
        self.n_not_finite += other.n_not_finite;
    }

    /// Number of choices: `k` for each token of a top-k router.
    pub fn n_choices(&self) -> u64 {
        self.load.iter().sum()
    }

    /// The busiest expert's load over the mean, less one: 0 is perfect balance. Wang et al. 2024, equation 4,
    /// <https://arxiv.org/abs/2408.15664>. Not a number where nothing was chosen.
    pub fn max_violation(&self) -> f64 {
        let most = self.load.iter().max().copied().unwrap_or(0) as f64;
        let mean = self.n_choices() as f64 / self.load.len() as f64;
        most / mean - 1.0
    }

    /// The idlest expert's load over the mean: 1 is perfect balance. Not a number where nothing was chosen.
    pub fn least_share(&self) -> f64 {
        let least = self.load.iter().min().copied().unwrap_or(0) as f64;
        least * self.load.len() as f64 / self.n_choices() as f64
    }

    /// Share of the choices that were dropped.
    pub fn dropped_share(&self) -> f64 {
        self.n_dropped as f64 / self.n_choices() as f64
    }

    /// Mean entropy of a token's probabilities, in nats.
    pub fn entropy(&self) -> f64 {
        self.entropy_sum / self.n_tokens as f64
    }
}
