//! Capacity: a bound on the tokens of an expert, beyond which choices are dropped.

use burn::config::Config;
use emberlm_core::InvalidConfig;

use crate::{Choice, Choices};

/// How many tokens an expert takes.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum CapacitySize {
    /// `ceil(factor T k / E)`.
    Factor(f64),
    /// A factor that goes from the first value to the last in a straight line over so many steps.
    Schedule {
        /// At step 0.
        first: f64,
        /// From the last step on.
        last: f64,
        /// Number of steps between.
        steps: u64,
    },
    /// So many.
    Tokens(usize),
}

/// Of which tokens an expert takes so many.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum CapacityScope {
    /// All of the batch.
    Batch,
    /// Those of each sequence by themselves: rows do not compete. Hugging Face's Switch Transformer.
    Sequence,
}

/// Which choices stay when there are too many.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum DropPriority {
    /// Those of the first positions: the Switch Transformer, DeepSpeed's top-k.
    Position,
    /// All first choices before all second ones, each from the first position on: GShard, DeepSpeed's top-2. Whether a
    /// second choice stays depends on later tokens.
    FirstChoices,
    /// Those with the largest weights: Megatron-LM's `probs`; with the largest scores, where weights are renormalised
    /// after dropping: DeepSpeed's. Whether a choice stays depends on later tokens.
    Probability,
}

/// When the weights of a token with several experts are made to sum to one.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Renormalisation {
    /// Before choices are dropped: what is dropped is missing. GShard.
    BeforeDropping,
    /// After: those that stay make up for what is dropped. DeepSpeed.
    AfterDropping,
}

/// A bound on the tokens of an expert.
#[derive(Config, Debug, Copy, PartialEq)]
pub struct Capacity {
    /// The bound.
    pub size: CapacitySize,
    /// It is at least this. DeepSpeed: 4. Default: 1.
    #[config(default = 1)]
    pub minimum: usize,
    /// Of which tokens. Default: the batch.
    #[config(default = "CapacityScope::Batch")]
    pub scope: CapacityScope,
    /// Which choices stay. Default: the first positions.
    #[config(default = "DropPriority::Position")]
    pub priority: DropPriority,
    /// When weights are renormalised. Default: before.
    #[config(default = "Renormalisation::BeforeDropping")]
    pub renormalisation: Renormalisation,
    /// Whether each expert computes as many rows as it may take, so that shapes are the same in every step. Default: no.
    #[config(default = false)]
    pub padded: bool,
    /// Whether choices are dropped outside training too. Default: no.
    #[config(default = false)]
    pub in_evaluation: bool,
}

impl Capacity {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// A bound of zero, or a factor that is no positive number.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let factors = match self.size {
            CapacitySize::Tokens(tokens) => {
                return InvalidConfig::require_positive(&[("capacity.size", tokens)]);
            }
            CapacitySize::Factor(factor) => [factor; 2],
            CapacitySize::Schedule { first, last, .. } => [first, last],
        };
        match factors
            .iter()
            .find(|factor| !(factor.is_finite() && **factor > 0.0))
        {
            None => Ok(()),
            Some(factor) => Err(InvalidConfig::Range {
                field: "capacity.size",
                range: "a factor above 0",
                value: *factor,
            }),
        }
    }

    /// How many choices an expert takes of `n_tokens` tokens with `k` choices each, at a step of training.
    pub fn of_expert(&self, n_tokens: usize, k: f64, n_experts: usize, step: u64) -> usize {
        let factor = match self.size {
            CapacitySize::Tokens(tokens) => return tokens.max(self.minimum),
            CapacitySize::Factor(factor) => factor,
            CapacitySize::Schedule { first, last, steps } => {
                let done = (step as f64 / steps.max(1) as f64).min(1.0);
                first + (last - first) * done
            }
        };
        let capacity = (n_tokens as f64 * k / n_experts as f64 * factor).ceil();
        (capacity as usize).max(self.minimum)
    }

    /// The choices that stay.
    pub(crate) fn keep(
        &self,
        choices: &Choices,
        weight: impl Fn(&Choice) -> f64,
        capacity: usize,
        seq_length: usize,
    ) -> Choices {
        let scope = |choice: &Choice| match self.scope {
            CapacityScope::Batch => 0,
            CapacityScope::Sequence => choice.token as usize / seq_length,
        };
        let mut order: Vec<Choice> = choices.all().to_vec();
        order.sort_by(|a, b| {
            let by_position = (a.token, a.rank).cmp(&(b.token, b.rank));
            match self.priority {
                DropPriority::Position => by_position,
                DropPriority::FirstChoices => a.rank.cmp(&b.rank).then(by_position),
                DropPriority::Probability => weight(b).total_cmp(&weight(a)).then(by_position),
            }
        });
        let n_scopes = order
            .iter()
            .map(|choice| scope(choice) + 1)
            .max()
            .unwrap_or(0);
        let mut taken = vec![0; n_scopes * choices.n_experts()];
        order.retain(|choice| {
            let taken = &mut taken[scope(choice) * choices.n_experts() + choice.expert as usize];
            *taken += 1;
            *taken <= capacity
        });
        Choices::new(choices.n_tokens(), choices.n_experts(), order)
    }
}
