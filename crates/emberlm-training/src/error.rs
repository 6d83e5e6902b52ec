//! What can end a training run besides its last step.

use std::{io, path::PathBuf};

use burn::store::RecordError;
use emberlm_core::InvalidConfig;
use thiserror::Error;

use crate::{CheckpointError, RunError, TextError};

/// Why training cannot begin, go on or be saved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TrainingError {
    /// The configuration is invalid.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// The text cannot be used.
    #[error(transparent)]
    Text(#[from] TextError),
    /// A checkpoint cannot be saved or loaded.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A checkpoint's content is not what this model expects.
    #[error("the checkpoint of step {step} in {folder} does not fit this model: {message}")]
    Mismatch {
        /// Its step.
        step: u64,
        /// The folder of the checkpoints.
        folder: PathBuf,
        /// What does not fit.
        message: String,
    },
    /// The state cannot be serialised.
    #[error("the state cannot be turned into bytes: {0}")]
    Record(#[from] RecordError),
    /// A file of the run's folder cannot be used.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Another file cannot be used.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Somebody asked an evaluation to stop.
    #[error("stopped before the end")]
    Stopped,
    /// A batch cannot be loaded.
    #[error("a batch cannot be loaded: {0}")]
    Data(String),
    /// The metrics could not be processed.
    #[error("the metrics could not be processed: {0}")]
    Metrics(String),
}
