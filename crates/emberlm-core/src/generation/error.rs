//! Why nothing can be generated.

use thiserror::Error;

use crate::{InvalidConfig, InvalidSampling, SampleError};

/// Why nothing can be generated.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum GenerationError {
    /// There is nothing to continue.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// The model has too few positions for the prompt and what is to follow it.
    #[error(
        "prompt and new tokens need {needed} positions, the model has {longest}: shorten the prompt, or ask for fewer tokens"
    )]
    TooLong {
        /// Positions of the longest prompt and of the new tokens.
        needed: usize,
        /// Positions of the model.
        longest: usize,
    },
    /// The sampling options are invalid.
    #[error(transparent)]
    Sampling(#[from] InvalidSampling),
    /// The options of beam search are invalid.
    #[error(transparent)]
    Beam(#[from] InvalidConfig),
    /// The model's scores cannot be chosen from.
    #[error(transparent)]
    Sample(#[from] SampleError),
}
