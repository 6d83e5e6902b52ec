//! What the programs share: devices, presets, signals, output, plots.

mod attention_choice;
mod attention_map;
mod balance_choice;
mod class_accuracy;
mod comparison;
mod device;
mod document_config;
mod document_pattern;
mod document_table;
mod exit;
mod filling;
mod load_map;
mod loaded_run;
mod masked_accuracy;
mod model_config;
mod nearest;
mod ngrams;
mod novel_cases;
mod novels;
mod objective_kind;
mod options;
pub mod plot;
mod preset;
mod pretraining;
mod run_config;
mod run_log;
mod say;
mod sentences;
mod shipped;
mod sliding;
mod specialisation;
mod stop;
mod stream;
mod table;
mod token_classes;
mod training_run;
mod translation_config;
mod translator;
mod twin;
mod work;

pub use attention_choice::{AttentionChoice, ParseAttentionError};
pub use attention_map::draw_attention;
pub use balance_choice::BalanceChoice;
pub use class_accuracy::{ClassAccuracy, class_accuracy};
pub use comparison::{CompareArguments, CompareError, compare};
pub use device::{DeviceError, choose_device};
pub use document_config::{
    DocumentConfig, DocumentModel, DocumentOverrides, DocumentTask, TaskError, TaskKind,
};
pub use document_pattern::{DocumentPattern, PatternSizes};
pub use document_table::{Chance, DocumentTable, RowReport};
pub use exit::{exit_code, exit_with};
pub use filling::{Completion, FillError, Sentence, fill_masked, fill_spans};
pub use load_map::draw_load;
pub use loaded_run::{LoadedRun, RunModel};
pub use masked_accuracy::{MaskedAccuracy, NeighbourTable, masked_accuracy};
pub use model_config::ModelConfig;
pub use nearest::Nearest;
pub use ngrams::{N_NGRAMS, ngrams};
pub use novel_cases::{Case, CaseError, CaseLoader, NovelCases, Stretch};
pub use novels::{Novel, SingleNovel, novels};
pub use objective_kind::{ObjectiveKind, Vocabulary, text_with_special_tokens};
pub use options::{NewRunOptions, RunOptions, ShowOptions};
pub use preset::Preset;
pub use pretraining::{Place, Pretraining, Shown, Start, announce_text};
pub use run_config::{ConfigError, Overrides, RunConfig, Sections, TokenizerRecord, write_json};
pub use say::{complain, say};
pub use sentences::{BEGIN, END, NoSpecialToken, Sentences};
pub use shipped::shipped;
pub use sliding::{Score, SlidingConfig, SlidingError, score};
pub use specialisation::{ExpertClasses, Information};
pub use stop::{Stop, keep_ctrl_c};
pub use stream::{CacheKind, score_stream};
pub use token_classes::{ClassError, ClassifiedText, by_character, by_part_of_speech};
pub use training_run::{
    Course, Watched, announce_resume, check_writable, evaluate_unless_stopped, final_figures,
    from_checkpoint, open_folder, prepare, say_figures, train,
};
pub use translation_config::{HoldOut, HoldOutKind, TranslationConfig, TranslationOverrides};
pub use translator::{Search, TranslationError, Translator};
pub use twin::{export, serve};
pub use work::Work;
