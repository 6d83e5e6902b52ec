//! What trainers and generators ask of a language model.

use burn::tensor::{Int, Tensor};

use crate::{CrossEntropy, CrossEntropyConfig, RandomKey, TokenBatch};

/// A model that scores the next token at every position of a sequence.
pub trait CausalModel {
    /// Scores of the next token after each position.
    ///
    /// # Shapes
    ///
    /// - `tokens`: `[batch_size, seq_length]`
    /// - output: `[batch_size, seq_length, vocab_size]`, not normalised
    ///
    /// Dropout is on if and only if `dropout_key` is given.
    fn forward(&self, tokens: Tensor<2, Int>, dropout_key: Option<RandomKey>) -> Tensor<3>;
}

/// A model with a loss for the batches of its objective: what a trainer trains.
pub trait LossModel {
    /// The loss of the model's scores against the batch's targets, of which [`IGNORED_TARGET`](crate::IGNORED_TARGET) and
    /// what else `config` ignores do not count.
    ///
    /// A model that ends in a projection need not hold the scores whole: see
    /// [`projected_cross_entropy`](crate::operators::projected_cross_entropy).
    ///
    /// # Panics
    ///
    /// If the batch brings what the model cannot read, such as a source for a model without an encoder.
    fn loss(&self, batch: TokenBatch, config: &CrossEntropyConfig) -> CrossEntropy;
}

/// A [`CausalModel`] that decodes step by step.
pub trait CachedModel: CausalModel {
    /// State of the positions so far.
    type Cache;

    /// Longest sequence the model has positions for; nothing if it knows no limit.
    fn max_seq_length(&self) -> Option<usize>;

    /// An empty cache for `capacity` positions.
    fn new_cache(&self, capacity: usize) -> Self::Cache;

    /// Scores of the next token after each of the new positions, which are added to the cache.
    ///
    /// Law: over a split sequence this equals [`CausalModel::forward`] over the whole.
    fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut Self::Cache) -> Tensor<3>;
}
