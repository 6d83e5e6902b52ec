//! What trainers and generators ask of a language model.

use burn::tensor::{Int, Tensor};

use crate::{
    CrossEntropy, CrossEntropyConfig, DecodingCache, LayerRouting, RandomKey, RoutingStatistics,
    TokenBatch,
};

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
    fn loss(&self, batch: TokenBatch, config: &CrossEntropyConfig) -> ModelLoss;

    /// How many layers route their tokens: these have auxiliary losses and statistics. A dense model has none.
    fn n_routed_layers(&self) -> usize {
        0
    }

    /// The model after a step of training, with what each routed layer saw in all of the step, by the layer's number. What
    /// changes outside of the gradient changes here, and nowhere else: validation leaves it alone.
    fn after_step(self, routing: &[(usize, RoutingStatistics)]) -> Self
    where
        Self: Sized,
    {
        let _ = routing;
        self
    }
}

/// The loss of a model, and what the routing of its tokens gave besides. A dense model gives a cross-entropy, by `.into()`.
#[derive(Debug, Clone)]
pub struct ModelLoss {
    /// The loss of the scores.
    pub cross_entropy: CrossEntropy,
    /// Auxiliary losses and statistics of the layers that route their tokens.
    pub routing: Vec<LayerRouting>,
}

impl From<CrossEntropy> for ModelLoss {
    fn from(cross_entropy: CrossEntropy) -> Self {
        Self {
            cross_entropy,
            routing: Vec::new(),
        }
    }
}

/// A model that scores the next token step by step: the one trait that all of generation stands on.
///
/// A decoder implements it, and so does an encoder-decoder, for the tokens of its target: its cache then holds the
/// projected source beside the target's keys and values, and is made by a method of its own that takes the source.
/// [`Generator::from_cache`](crate::Generator::from_cache), [`BatchGenerator::from_cache`](crate::BatchGenerator::from_cache),
/// [`BeamSearch::search_from`](crate::BeamSearch::search_from) and
/// [`log_probabilities_from`](crate::log_probabilities_from) go on from such a cache.
///
/// One pass takes any number of new tokens and scores after each of them, and [`DecodingCache::truncate`] takes tokens
/// back. Speculative decoding (Leviathan et al. 2022, <https://arxiv.org/abs/2211.17192>) is these two: a small model
/// drafts `k` tokens, the large one scores all of them in one pass, and both caches are cut back to the last token that
/// was accepted.
pub trait CachedModel {
    /// State of the positions so far.
    type Cache: DecodingCache;

    /// Longest sequence the model has positions for; nothing if it knows no limit.
    fn max_seq_length(&self) -> Option<usize>;

    /// An empty cache for `capacity` positions.
    ///
    /// # Panics
    ///
    /// If the model needs a source: then it has a method that takes one.
    fn new_cache(&self, capacity: usize) -> Self::Cache;

    /// Scores of the next token after each of the new positions, which are added to the cache.
    ///
    /// # Shapes
    ///
    /// - `tokens`: `[batch_size, seq_length]`
    /// - output: `[batch_size, seq_length, vocab_size]`, not normalised; what stands at padding means nothing
    ///
    /// Laws: over a split sequence this equals the pass over the whole, which is [`CausalModel::forward`] where a model
    /// has it. A row that is padded ([`DecodingCache::set_padding`]) has the scores that it has alone without padding.
    ///
    /// # Panics
    ///
    /// If the cache is full, or the model cannot place tokens after padding.
    fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut Self::Cache) -> Tensor<3>;
}
