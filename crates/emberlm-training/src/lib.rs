//! Training language models on Burn: windows of text, exact resume, metrics, and a loop that burn-train drives.
//!
//! It takes losses and batches and knows no concrete model: anything that is a Burn module and an
//! [`emberlm_core::LossModel`] can be trained.

mod auxiliary;
mod checkpoint;
mod config;
mod error;
mod gradients;
mod learner;
mod loader;
mod memory;
mod metrics;
mod objective;
mod optimizer;
mod pairs;
mod renderer;
mod run;
mod schedule;
mod session;
mod trainer;
mod windows;

pub use emberlm_core::TokenBatch;

pub use auxiliary::AuxiliaryWeights;
pub use checkpoint::{
    Checkpoint, CheckpointError, CheckpointReader, CheckpointStore, Damage, Damaged, Disk, Fault,
    FaultyDisk, Loaded, Operation, Storage,
};
pub use config::TrainingConfig;
pub use emberlm_text::{
    Corpus, Document, Fingerprint, MappedText, TextError, TextPart, TextStream, TokenStream,
};
pub use error::TrainingError;
pub use gradients::{global_norm, scale_gradients};
pub use learner::{LanguageModel, StepOutput, StepProgress, Trainable};
pub use loader::{EvaluationLoader, Numbered, TrainingLoader};
pub use memory::peak_memory_bytes;
pub use metrics::{metric_name, register_metrics};
pub use objective::{Batching, Masked, MaskedConfig, Objective, Spans, SpansConfig};
pub use optimizer::adamw;
pub use pairs::{PairBatches, PairEvaluationLoader, PairLoader, TokenPair, pair_batch};
pub use renderer::{LineRenderer, short_duration};
pub use run::{MetricsLog, Report, RoutingRecord, RunError, RunFolder, RunHistory, StepRecord};
pub use schedule::{InverseSquareRoot, LearningRateSchedule, ScheduleKind, WarmupCosine};
pub use session::{Counters, Session};
pub use trainer::{Ending, MAX_SKIPPED_IN_A_ROW, Trained, Trainer, Watch, evaluate};
pub use windows::{EvaluationWindows, TrainingWindows, evenly_spaced};
