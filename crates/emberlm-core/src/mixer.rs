//! What a residual block holds: a mixer along the sequence and a feed-forward layer.

use burn::tensor::Tensor;

use crate::Context;

/// Mixes information along the sequence: attention, or whatever takes its place.
pub trait SequenceMixer {
    /// State of incremental decoding.
    type Cache;

    /// Mixes a whole sequence.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[batch_size, seq_length, d_model]`
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3>;

    /// Mixes the next positions of a sequence whose earlier part is in the cache, and adds them to it.
    ///
    /// Law: over a split sequence this equals [`forward`](Self::forward) over the whole.
    fn forward_cached(&self, x: Tensor<3>, context: &Context, cache: &mut Self::Cache)
    -> Tensor<3>;

    /// An empty cache for `capacity` positions.
    fn new_cache(&self, capacity: usize) -> Self::Cache;
}

/// Transforms each position by itself.
pub trait FeedForward {
    /// # Shapes
    ///
    /// - `x`, output: `[batch_size, seq_length, d_model]`
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3>;
}
