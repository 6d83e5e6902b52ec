//! Writing text with a model: sampling one text or many, beam search, and the probabilities of given texts.
//!
//! All of it asks of a model what [`CachedModel`](crate::CachedModel) says, and nothing else.

mod batch;
mod beam;
mod error;
mod generator;
mod largest;
mod log_probability;
mod processors;
mod rows;
mod sampling;
mod text;

pub use batch::{BatchGenerator, Generated};
pub use beam::{BeamConfig, BeamSearch, EarlyStopping, Hypothesis, LengthPenalty};
pub use error::GenerationError;
pub use generator::Generator;
pub use log_probability::{log_probabilities, log_probabilities_from};
pub use processors::{
    ForbiddenTokens, ForcedFirstToken, LogitProcessor, LogitProcessors, MinimumNewTokens,
    NoRepeatNGram, RepetitionPenalty,
};
pub use sampling::{InvalidSampling, SampleError, Sampler, SamplingConfig};
