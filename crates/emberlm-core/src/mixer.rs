//! What a residual block holds: a mixer along the sequence and a feed-forward layer.

use burn::{module::Module, tensor::Tensor};

use crate::{Context, FeedForwardOutput};

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

/// Mixes information of another sequence in: cross-attention.
pub trait CrossMixer {
    /// What is made of the other sequence once, for all steps of decoding.
    type Source;

    /// # Shapes
    ///
    /// - `source`: `[batch_size, source_length, d_source]`
    fn project_source(&self, source: Tensor<3>) -> Self::Source;

    /// # Shapes
    ///
    /// - `x`, output: `[batch_size, seq_length, d_model]`
    ///
    /// The context's lengths are those of `x` and of the source, its batch data the source's.
    fn forward_cross(&self, x: Tensor<3>, source: &Self::Source, context: &Context) -> Tensor<3>;
}

/// The cross mixer of blocks that have none.
#[derive(Module, Debug)]
pub struct NoCross {}

impl CrossMixer for NoCross {
    type Source = ();

    fn project_source(&self, _source: Tensor<3>) {}

    fn forward_cross(&self, x: Tensor<3>, _source: &(), _context: &Context) -> Tensor<3> {
        x
    }
}

/// Transforms each position, by itself or by experts that the positions share.
pub trait FeedForward {
    /// # Shapes
    ///
    /// - `x`, hidden states of the output: `[batch_size, seq_length, d_model]`
    fn forward(&self, x: Tensor<3>, context: &Context) -> FeedForwardOutput;
}
