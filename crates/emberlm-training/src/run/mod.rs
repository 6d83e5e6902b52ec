//! The folder of a run: what it holds, and reading it again.

mod error;
mod folder;
mod history;
mod metrics_log;
mod report;

pub use error::RunError;
pub use folder::RunFolder;
pub use history::RunHistory;
pub use metrics_log::{MetricsLog, RoutingRecord, StepRecord};
pub use report::Report;
