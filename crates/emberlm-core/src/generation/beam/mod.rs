//! Beam search: several likely continuations of a prompt.

mod config;
mod group;
mod search;

pub use config::{BeamConfig, EarlyStopping, LengthPenalty};
pub use group::Hypothesis;
pub use search::BeamSearch;
