//! A language model as burn-train sees it: batches in, losses and gradients out.

use burn::{
    module::{Module, ModuleDisplay},
    tensor::{DType, ExecutionError, Tensor},
    train::{InferenceStep, ItemLazy, TrainOutput, TrainStep},
};
use emberlm_core::{CrossEntropy, CrossEntropyConfig, IGNORED_TARGET, LossModel, TokenBatch};

/// What the trainer can train: a Burn module with a loss.
pub trait Trainable: Module + ModuleDisplay + LossModel + 'static {}

impl<M: Module + ModuleDisplay + LossModel + 'static> Trainable for M {}

/// The figures of a step or of a validation batch.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutput {
    /// Sum of the negative log-likelihoods in nats.
    pub nll_sum: f64,
    /// Number of targets in the sum.
    pub n_targets: f64,
    /// What the trainer adds.
    pub progress: Option<StepProgress>,
}

impl StepOutput {
    /// Mean loss in nats per token.
    pub fn loss(&self) -> f64 {
        self.nll_sum / self.n_targets
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
}

impl<M: Trainable> LanguageModel<M> {
    /// Trains `model` with label smoothing and a weighted z-loss.
    pub fn new(model: M, label_smoothing: f64, z_loss: f64) -> Self {
        Self {
            model,
            loss: counting_targets().with_label_smoothing(label_smoothing),
            z_loss,
        }
    }
}

fn counting_targets() -> CrossEntropyConfig {
    CrossEntropyConfig::new().with_ignored_target(Some(IGNORED_TARGET))
}

fn output(loss: &CrossEntropy) -> StepOutput {
    let both = Tensor::cat(
        vec![
            loss.nll_sum.clone().detach(),
            loss.n_targets.clone().detach(),
        ],
        0,
    );
    let both = both.into_data().convert_dtype(DType::F64);
    let mut values = both.iter::<f64>();
    let mut next = || values.next().expect("two numbers were joined");
    StepOutput {
        nll_sum: next(),
        n_targets: next(),
        progress: None,
    }
}

impl<M: Trainable> TrainStep for LanguageModel<M> {
    type Input = TokenBatch;
    type Output = StepOutput;

    fn step(&self, batch: TokenBatch) -> TrainOutput<StepOutput> {
        let loss = self.model.loss(batch, &self.loss);
        let total = if self.z_loss > 0.0 {
            loss.nll_sum.clone() + loss.z_sum.clone() * self.z_loss
        } else {
            loss.nll_sum.clone()
        };
        let item = output(&loss);
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
        output(&self.model.loss(batch, &counting_targets()))
    }
}
