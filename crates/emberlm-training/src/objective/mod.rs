//! Objectives: what is hidden of a text, and what a model has to say there. Each is a function of a window's tokens and a
//! random key, so that a resumed run hides what it would have hidden.

mod masked;
mod spans;

pub use masked::{Masked, MaskedConfig};
pub use spans::{Spans, SpansConfig};
