//! What the programs share: devices, presets, signals, output, plots.

mod comparison;
mod device;
mod exit;
mod filling;
mod lines;
mod loaded_run;
mod masked_accuracy;
mod model_config;
mod objective_kind;
pub mod plot;
mod preset;
mod run_config;
mod say;
mod sliding;
mod stop;

pub use comparison::{CompareArguments, CompareError, compare};
pub use device::{DeviceError, choose_device};
pub use exit::exit_with;
pub use filling::{Completion, FillError, Sentence, fill_masked, fill_spans};
pub use lines::Lines;
pub use loaded_run::{LoadedRun, RunModel};
pub use masked_accuracy::{MaskedAccuracy, NeighbourTable, masked_accuracy};
pub use model_config::ModelConfig;
pub use objective_kind::{ObjectiveKind, Vocabulary, text_with_special_tokens};
pub use preset::Preset;
pub use run_config::{ConfigError, Overrides, RunConfig, Sections, TokenizerRecord};
pub use say::{complain, say};
pub use sliding::{Score, SlidingConfig, SlidingError, score};
pub use stop::{Stop, keep_ctrl_c};
