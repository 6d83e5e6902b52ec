//! The state of a run: model, optimizer, counters; and how it is saved and restored, exactly.

use std::path::Path;

use burn::{
    module::Module,
    optim::{ModuleOptimizer, OptimizerRecord},
    store::ModuleRecord,
    tensor::Bytes,
};
use serde::{Deserialize, Serialize};

use crate::{Checkpoint, CheckpointStore, TrainingConfig, TrainingError, adamw};

const MODEL_FILE: &str = "model.bpk";
const OPTIMIZER_FILE: &str = "optimizer.bpk";
const STATE_FILE: &str = "state.json";

/// The counters of a run.
///
/// Data position, learning rate and random keys are functions of the step and the config, so this and the two
/// records are all that an exact continuation needs.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Steps done.
    pub step: u64,
    /// Steps skipped for a loss or gradient that was not finite.
    pub skipped: u64,
    /// How many of the last steps in a row were skipped.
    pub skipped_in_a_row: u64,
    /// Lowest validation loss so far.
    pub best_valid_loss: Option<f64>,
    /// Seconds of training so far, without validation and checkpoints.
    pub seconds: f64,
    /// Tokens of the steps that count for the speed: all but the first two of each process.
    pub timed_tokens: u64,
    /// Seconds of those steps.
    pub timed_seconds: f64,
}

impl Counters {
    /// Training tokens per second; nothing before the third step.
    pub fn tokens_per_second(&self) -> Option<f64> {
        (self.timed_seconds > 0.0).then(|| self.timed_tokens as f64 / self.timed_seconds)
    }
}

/// Everything that training changes.
#[derive(Clone)]
pub struct Session<M: Module> {
    /// The model, with autodiff.
    pub model: M,
    /// The optimizer with its moments.
    pub optimizer: ModuleOptimizer,
    /// The counters.
    pub counters: Counters,
}

impl<M: Module> Session<M> {
    /// A run at step 0.
    pub fn new(model: M, config: &TrainingConfig) -> Self {
        Self {
            optimizer: adamw(config, &model),
            model,
            counters: Counters::default(),
        }
    }

    /// Goes back to a checkpoint that [`save`](Self::save) wrote for a model of the same shape.
    ///
    /// # Errors
    ///
    /// [`TrainingError::Mismatch`] if the checkpoint holds another model.
    pub fn restore(self, checkpoint: &Checkpoint, folder: &Path) -> Result<Self, TrainingError> {
        let mismatch = |message: String| TrainingError::Mismatch {
            step: checkpoint.step,
            folder: folder.to_owned(),
            message,
        };
        let file = |name: &str| {
            checkpoint
                .files
                .get(name)
                .ok_or_else(|| mismatch(format!("it holds no {name}")))
        };
        let bytes = |name: &str| Ok::<_, TrainingError>(Bytes::from_bytes_vec(file(name)?.clone()));
        let counters = serde_json::from_slice(file(STATE_FILE)?)
            .map_err(|error| mismatch(format!("{STATE_FILE}: {error}")))?;
        let record = ModuleRecord::from_bytes(bytes(MODEL_FILE)?)?;
        let model = self
            .model
            .try_load_record(record)
            .map_err(|error| mismatch(error.to_string()))?;
        let record = OptimizerRecord::from_bytes(bytes(OPTIMIZER_FILE)?)?;
        Ok(Self {
            model,
            optimizer: self.optimizer.load_record(record),
            counters,
        })
    }

    /// Publishes a checkpoint of the current step.
    ///
    /// # Errors
    ///
    /// If it cannot be written; the checkpoints before it are intact.
    pub fn save(
        &self,
        store: &mut CheckpointStore,
        valid_loss: Option<f64>,
    ) -> Result<(), TrainingError> {
        let model = self.model.clone().into_record().into_bytes()?;
        let optimizer = self.optimizer.to_record().into_bytes()?;
        let state = serde_json::to_vec_pretty(&self.counters)
            .expect("counters are plain numbers, which always serialise");
        let files: [(&str, &[u8]); 3] = [
            (MODEL_FILE, &model),
            (OPTIMIZER_FILE, &optimizer),
            (STATE_FILE, &state),
        ];
        store.publish(self.counters.step, &files, valid_loss)?;
        Ok(())
    }
}
