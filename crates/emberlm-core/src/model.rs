//! What trainers and generators ask of a language model.

use burn::tensor::{Int, Tensor};

use crate::{CrossEntropy, CrossEntropyConfig, RandomKey};

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

    /// The loss of the scores against the tokens that follow.
    ///
    /// By default it is that of [`forward`](Self::forward). A model that ends in a projection overrides it, so that the
    /// scores need not be held whole: see [`projected_cross_entropy`](crate::operators::projected_cross_entropy).
    ///
    /// # Shapes
    ///
    /// - `tokens`, `targets`: `[batch_size, seq_length]`
    fn loss(
        &self,
        tokens: Tensor<2, Int>,
        targets: Tensor<2, Int>,
        config: &CrossEntropyConfig,
        dropout_key: Option<RandomKey>,
    ) -> CrossEntropy {
        let logits = self.forward(tokens, dropout_key);
        let [batch_size, seq_length, vocab_size] = logits.dims();
        let n_tokens = batch_size * seq_length;
        config.forward(
            logits.reshape([n_tokens, vocab_size]),
            targets.reshape([n_tokens]),
        )
    }
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
