//! What the programs share: devices, presets, signals, output, plots.

mod comparison;
mod device;
mod exit;
pub mod plot;
mod preset;
mod run_config;
mod say;
mod stop;

pub use comparison::{CompareArguments, CompareError, compare};
pub use device::{DeviceError, choose_device};
pub use exit::exit_with;
pub use preset::Preset;
pub use run_config::{ConfigError, Overrides, RunConfig, TokenizerRecord};
pub use say::{complain, say};
pub use stop::{Stop, keep_ctrl_c};
