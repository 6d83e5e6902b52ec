//! A language model as burn-train sees it: batches in, losses and gradients out.

use burn::{
    module::{Module, ModuleDisplay},
    tensor::{DType, ExecutionError, Tensor},
    train::{InferenceStep, ItemLazy, TrainOutput, TrainStep},
};
use emberlm_core::{
    AuxiliaryKind, AuxiliaryLoss, CrossEntropyConfig, IGNORED_TARGET, LossModel, ModelLoss,
    RoutingStatistics, TokenBatch,
};

use crate::{AuxiliaryWeights, TrainingConfig};

/// What the trainer can train: a Burn module with a loss.
pub trait Trainable: Module + ModuleDisplay + LossModel + 'static {}

impl<M: Module + ModuleDisplay + LossModel + 'static> Trainable for M {}

/// The figures of a step or of a validation batch.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// Sum of the negative log-likelihoods in nats.
    pub nll_sum: f64,
    /// Number of targets in the sum.
    pub n_targets: f64,
    /// Sum over the targets of the auxiliary losses, unweighted, of each kind that the model has: the mean times their number.
    pub auxiliary_sums: Vec<(AuxiliaryKind, f64)>,
    /// Where the tokens went, of each layer that routes them, by the layer's number.
    pub routing: Vec<(usize, RoutingStatistics)>,
    /// What the trainer adds.
    pub progress: Option<StepProgress>,
}

impl StepOutput {
    /// Mean loss in nats per token.
    pub fn loss(&self) -> f64 {
        self.nll_sum / self.n_targets
    }

    /// Mean auxiliary loss of a kind, unweighted; nothing where the model has none.
    pub fn auxiliary(&self, kind: AuxiliaryKind) -> Option<f64> {
        let of_kind = self.auxiliary_sums.iter().find(|(of, _)| *of == kind);
        of_kind.map(|(_, sum)| sum / self.n_targets)
    }

    /// Where the tokens of all layers went, taken together; nothing where no layer routes. Layers of other numbers of experts
    /// than the first are left out.
    pub fn routing_of_all(&self) -> Option<RoutingStatistics> {
        let (_, first) = self.routing.first()?;
        let n_experts = first.load.len();
        let mut all = RoutingStatistics::default();
        let alike = self
            .routing
            .iter()
            .filter(|(_, of)| of.load.len() == n_experts);
        alike.for_each(|(_, of)| all.add(of));
        Some(all)
    }

    /// Adds the figures of another micro-batch of the step.
    pub fn add(&mut self, other: &Self) {
        self.nll_sum += other.nll_sum;
        self.n_targets += other.n_targets;
        for (kind, sum) in &other.auxiliary_sums {
            match self.auxiliary_sums.iter_mut().find(|(of, _)| of == kind) {
                Some((_, total)) => *total += sum,
                None => self.auxiliary_sums.push((*kind, *sum)),
            }
        }
        for (layer, statistics) in &other.routing {
            match self.routing.iter_mut().find(|(of, _)| of == layer) {
                Some((_, total)) => total.add(statistics),
                None => self.routing.push((*layer, statistics.clone())),
            }
        }
    }

    /// Nothing yet.
    pub(crate) fn empty() -> Self {
        Self {
            nll_sum: 0.0,
            n_targets: 0.0,
            auxiliary_sums: Vec::new(),
            routing: Vec::new(),
            progress: None,
        }
    }
}

/// The figures of a training step that the model does not know.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepProgress {
    /// Learning rate of the step.
    pub learning_rate: f64,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
    /// Training tokens per second so far; nothing before the third step.
    pub tokens_per_second: Option<f64>,
    /// Peak resident size of the process.
    pub peak_memory_bytes: Option<u64>,
}

impl ItemLazy for StepOutput {
    fn sync(self) -> Result<Self, ExecutionError> {
        Ok(self)
    }
}

/// A language model with its training loss.
///
/// The gradients of a step are those of the SUM over its targets, so that micro-batches add up; the strategy divides
/// by the number of targets.
#[derive(Module, Debug)]
pub struct LanguageModel<M: Module> {
    /// The model.
    pub model: M,
    #[module(skip)]
    loss: CrossEntropyConfig,
    z_loss: f64,
    #[module(skip)]
    auxiliary: AuxiliaryWeights,
}

impl<M: Trainable> LanguageModel<M> {
    /// Trains `model` with label smoothing and a weighted z-loss.
    pub fn new(model: M, label_smoothing: f64, z_loss: f64) -> Self {
        Self {
            model,
            loss: counting_targets().with_label_smoothing(label_smoothing),
            z_loss,
            auxiliary: AuxiliaryWeights::none(),
        }
    }

    /// Trains `model` with the losses of a plan.
    pub fn with_config(model: M, config: &TrainingConfig) -> Self {
        let language_model = Self::new(model, config.label_smoothing, config.z_loss);
        language_model.with_auxiliary(config.auxiliary_weights())
    }

    /// With auxiliary losses, which have no weight else.
    pub fn with_auxiliary(mut self, weights: AuxiliaryWeights) -> Self {
        self.auxiliary = weights;
        self
    }

    /// The model after a step of training: see [`LossModel::after_step`].
    pub(crate) fn after_step(self, routing: &[(usize, RoutingStatistics)]) -> Self {
        Self {
            model: self.model.after_step(routing),
            ..self
        }
    }
}

fn counting_targets() -> CrossEntropyConfig {
    CrossEntropyConfig::new().with_ignored_target(Some(IGNORED_TARGET))
}

/// The auxiliary losses of all layers, by kind, unweighted, shape `[1]` each.
fn auxiliary(loss: &ModelLoss) -> Vec<(AuxiliaryKind, Tensor<1>)> {
    let all = || loss.routing.iter().flat_map(|layer| &layer.losses);
    let of_kind = |kind| Some((kind, AuxiliaryLoss::over_layers(all(), kind)?));
    AuxiliaryKind::ALL.into_iter().filter_map(of_kind).collect()
}

/// The figures, in one read from the device.
fn output(loss: ModelLoss, auxiliary: &[(AuxiliaryKind, Tensor<1>)]) -> StepOutput {
    let ModelLoss {
        cross_entropy,
        routing,
    } = loss;
    let mut parts = vec![cross_entropy.nll_sum.detach()];
    parts.push(cross_entropy.n_targets.detach());
    let dtype = parts[0].dtype();
    // A router computes in f32 at least, a model may not.
    let values = auxiliary
        .iter()
        .map(|(_, value)| value.clone().detach().cast(dtype));
    parts.extend(values);
    let values = Tensor::cat(parts, 0).into_data().convert_dtype(DType::F64);
    let values: Vec<f64> = values.iter::<f64>().collect();
    let n_targets = values[1];
    StepOutput {
        nll_sum: values[0],
        n_targets,
        auxiliary_sums: auxiliary
            .iter()
            .zip(&values[2..])
            .map(|((kind, _), value)| (*kind, value * n_targets))
            .collect(),
        routing: routing
            .into_iter()
            .map(|layer| (layer.layer, layer.statistics))
            .collect(),
        progress: None,
    }
}

impl<M: Trainable> TrainStep for LanguageModel<M> {
    type Input = TokenBatch;
    type Output = StepOutput;

    fn step(&self, batch: TokenBatch) -> TrainOutput<StepOutput> {
        let loss = self.model.loss(batch, &self.loss);
        let cross_entropy = &loss.cross_entropy;
        let mut total = cross_entropy.nll_sum.clone();
        if self.z_loss > 0.0 {
            total = total + cross_entropy.z_sum.clone() * self.z_loss;
        }
        let auxiliary = auxiliary(&loss);
        for (kind, value) in &auxiliary {
            let weight = self.auxiliary.of(*kind);
            if weight > 0.0 {
                // A mean, where the rest is a sum over the targets.
                let n_targets = cross_entropy.n_targets.clone();
                total = total.clone() + value.clone().cast(total.dtype()) * n_targets * weight;
            }
        }
        let item = output(loss, &auxiliary);
        TrainOutput::new(self, total.backward(), item)
    }
}

impl<M: Trainable> InferenceStep for LanguageModel<M> {
    type Input = TokenBatch;
    type Output = StepOutput;

    /// The plain cross-entropy, without label smoothing and dropout.
    fn step(&self, batch: TokenBatch) -> StepOutput {
        let batch = TokenBatch {
            dropout_key: None,
            ..batch
        };
        let loss = self.model.loss(batch, &counting_targets());
        let auxiliary = auxiliary(&loss);
        output(loss, &auxiliary)
    }
}
