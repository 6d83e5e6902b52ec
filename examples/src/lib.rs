//! What the programs share: devices, presets, signals, output, plots.

mod attention_map;
mod comparison;
mod device;
mod exit;
mod lines;
mod nearest;
pub mod plot;
mod preset;
mod run_config;
mod say;
mod sentences;
mod stop;
mod training_run;
mod translation_config;
mod translator;
mod twin;

pub use attention_map::draw_attention;
pub use comparison::{CompareArguments, CompareError, compare};
pub use device::{DeviceError, choose_device};
pub use exit::exit_with;
pub use lines::Lines;
pub use nearest::Nearest;
pub use preset::Preset;
pub use run_config::{ConfigError, Overrides, RunConfig, TokenizerRecord, write_json};
pub use say::{complain, say};
pub use sentences::{BEGIN, END, NoSpecialToken, Sentences};
pub use stop::{Stop, keep_ctrl_c};
pub use training_run::{
    Course, Watched, announce_resume, check_writable, evaluate_unless_stopped, final_figures,
    from_checkpoint, open_folder, prepare, say_figures, train,
};
pub use translation_config::{HoldOut, HoldOutKind, TranslationConfig, TranslationOverrides};
pub use translator::{Search, TranslationError, Translator};
pub use twin::{export, serve};
