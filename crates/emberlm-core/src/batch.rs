//! A batch of training: sequences of tokens, what each position should say, and what else comes along.

use burn::tensor::{Int, Tensor};

use crate::{BatchData, RandomKey};

/// A target that does not count, as in PyTorch.
pub const IGNORED_TARGET: i64 = -100;

/// Sequences of tokens with a target at each position.
///
/// The objective decides what they are: the next token (causal), the token that was hidden (masked), the next token of
/// another sequence ([`source`](Self::source) given). Targets of [`IGNORED_TARGET`] do not count.
#[derive(Debug, Clone)]
pub struct TokenBatch {
    /// `[batch_size, seq_length]`
    pub inputs: Tensor<2, Int>,
    /// `[batch_size, seq_length]`
    pub targets: Tensor<2, Int>,
    /// What the rows of the inputs bring: padding, documents.
    pub data: BatchData,
    /// What an encoder reads.
    pub source: Option<Source>,
    /// Where dropout draws from in training.
    pub dropout_key: Option<RandomKey>,
}

impl TokenBatch {
    /// Sequences without padding, documents and source; dropout is off.
    pub fn new(inputs: Tensor<2, Int>, targets: Tensor<2, Int>) -> Self {
        Self {
            inputs,
            targets,
            data: BatchData::new(),
            source: None,
            dropout_key: None,
        }
    }
}

/// The sequences that an encoder reads for a decoder.
#[derive(Debug, Clone)]
pub struct Source {
    /// `[batch_size, source_length]`
    pub tokens: Tensor<2, Int>,
    /// Padding and documents of the sources.
    pub data: BatchData,
}

impl Source {
    /// Sources without padding.
    pub fn new(tokens: Tensor<2, Int>) -> Self {
        Self {
            tokens,
            data: BatchData::new(),
        }
    }
}
