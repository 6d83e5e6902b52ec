//! How to train: steps, batches, optimizer, schedule, checkpoints.

use burn::config::Config;
use emberlm_core::InvalidConfig;

use crate::{
    AuxiliaryWeights, InverseSquareRoot, LearningRateSchedule, ScheduleKind, WarmupCosine,
};

/// Everything about a run but the model and the text.
#[derive(Config, Debug)]
pub struct TrainingConfig {
    /// Number of optimizer steps.
    pub steps: u64,
    /// Sequences in a step, over all its micro-batches.
    pub batch_size: usize,
    /// Tokens in a sequence.
    pub seq_length: usize,
    /// The micro-batches a step is split into; divides `batch_size`. Default: 1.
    #[config(default = 1)]
    pub accumulation: usize,
    /// Learning rate after the warm-up. Default: 2e-3.
    #[config(default = 2e-3)]
    pub learning_rate: f64,
    /// How the learning rate falls after the warm-up. Default: half a cosine.
    pub schedule: Option<ScheduleKind>,
    /// Learning rate at the last step of the cosine, as a share of `learning_rate`. Default: 0.1.
    #[config(default = 0.1)]
    pub final_learning_rate: f64,
    /// Steps of linear warm-up; before a cosine at most a tenth of the steps. Default: 100.
    #[config(default = 100)]
    pub warmup_steps: u64,
    /// AdamW's first decay rate. Default: 0.9.
    #[config(default = 0.9)]
    pub beta_1: f64,
    /// AdamW's second decay rate. Default: 0.99.
    #[config(default = 0.99)]
    pub beta_2: f64,
    /// AdamW's epsilon. Default: 1e-8.
    #[config(default = 1e-8)]
    pub epsilon: f64,
    /// Decoupled weight decay of the linear weights; norms, biases and embeddings have none. Default: 0.1.
    #[config(default = 0.1)]
    pub weight_decay: f64,
    /// Bound on the global norm of all gradients. Default: 1.
    #[config(default = 1.0)]
    pub max_gradient_norm: f64,
    /// Label smoothing of the training loss. Default: 0.
    #[config(default = 0.0)]
    pub label_smoothing: f64,
    /// Weight of the z-loss. Default: 0.
    #[config(default = 0.0)]
    pub z_loss: f64,
    /// Weights of the losses of layers that route their tokens. Default: the published ones.
    pub auxiliary: Option<AuxiliaryWeights>,
    /// Seed of batches and dropout. Default: 0.
    #[config(default = 0)]
    pub seed: u64,
    /// Steps between checkpoints. Default: 100.
    #[config(default = 100)]
    pub checkpoint_every: u64,
    /// Steps between validations. Default: 100.
    #[config(default = 100)]
    pub validate_every: u64,
    /// Windows of the held-out text that a validation during the run looks at. Default: 128.
    #[config(default = 128)]
    pub validation_windows: usize,
}

// Bounds that only typing mistakes reach: more steps than any run has, more tokens a step than any memory holds.
const MAX_STEPS: u64 = 1 << 32;
const MAX_TOKENS_PER_STEP: usize = 1 << 30;

impl TrainingConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, or a number outside its range; the error names the field.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[
            ("steps", usize::try_from(self.steps).unwrap_or(usize::MAX)),
            ("batch_size", self.batch_size),
            ("seq_length", self.seq_length),
            ("accumulation", self.accumulation),
            ("checkpoint_every", self.checkpoint_every.min(1) as usize),
            ("validate_every", self.validate_every.min(1) as usize),
            ("validation_windows", self.validation_windows),
        ])?;
        if self.steps > MAX_STEPS {
            return Err(InvalidConfig::TooLarge {
                field: "steps",
                value: usize::try_from(self.steps).unwrap_or(usize::MAX),
            });
        }
        if self.batch_size.saturating_mul(self.seq_length) > MAX_TOKENS_PER_STEP {
            return Err(InvalidConfig::TooLarge {
                field: "batch_size",
                value: self.batch_size,
            });
        }
        if !self.batch_size.is_multiple_of(self.accumulation) {
            return Err(InvalidConfig::Range {
                field: "accumulation",
                range: "a divisor of batch_size",
                value: self.accumulation as f64,
            });
        }
        for (field, value) in [
            ("beta_1", self.beta_1),
            ("beta_2", self.beta_2),
            ("label_smoothing", self.label_smoothing),
        ] {
            InvalidConfig::require_rate(field, value)?;
        }
        for (field, value, zero_allowed) in [
            ("learning_rate", self.learning_rate, false),
            ("final_learning_rate", self.final_learning_rate, true),
            ("epsilon", self.epsilon, false),
            ("weight_decay", self.weight_decay, true),
            ("max_gradient_norm", self.max_gradient_norm, false),
            ("z_loss", self.z_loss, true),
        ] {
            if !(value.is_finite() && (value > 0.0 || zero_allowed && value == 0.0)) {
                return Err(InvalidConfig::Range {
                    field,
                    range: if zero_allowed {
                        "a number of at least 0"
                    } else {
                        "a number above 0"
                    },
                    value,
                });
            }
        }
        self.auxiliary_weights().validate()
    }

    /// The weights of the losses of layers that route their tokens.
    pub fn auxiliary_weights(&self) -> AuxiliaryWeights {
        self.auxiliary.unwrap_or_else(AuxiliaryWeights::new)
    }

    /// The learning-rate schedule.
    pub fn schedule(&self) -> LearningRateSchedule {
        let peak = self.learning_rate;
        match self.schedule.unwrap_or_default() {
            ScheduleKind::WarmupCosine => LearningRateSchedule::WarmupCosine(WarmupCosine {
                peak,
                last: peak * self.final_learning_rate,
                warmup_steps: self.warmup_steps.min(self.steps / 10),
                steps: self.steps,
            }),
            ScheduleKind::InverseSquareRoot => {
                LearningRateSchedule::InverseSquareRoot(InverseSquareRoot {
                    peak,
                    warmup_steps: self.warmup_steps,
                })
            }
        }
    }

    /// Tokens in a step.
    pub fn tokens_per_step(&self) -> usize {
        self.batch_size * self.seq_length
    }
}
