//! The decoder-only language model: embeddings, a causal stack of residual blocks, scores of the next token.

use burn::{
    config::Config,
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Device, Int, Tensor},
};
use emberlm_core::{
    Activation, BatchData, CachePositions, CachedModel, CausalModel, CrossEntropy,
    CrossEntropyConfig, Gpt2Init, InvalidConfig, Lengths, LossModel, ModelLoss, NormConfig,
    NormPlacement, Pattern, PatternError, RandomKey, RingError, RoutingStatistics, TokenBatch,
    assert_valid,
    operators::{Projection, projected_cross_entropy},
};

use crate::{
    ExpertLayers, FeedForwardKind, LayerAttention, PositionsConfig, Stack, StackCache, StackConfig,
    StackOutput, TokenEmbedding, TokenEmbeddingConfig,
};

/// Configuration of a [`Decoder`]. The defaults are GPT-2's, without biases.
#[derive(Config, Debug)]
pub struct DecoderConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Number of query heads; divides `d_model`.
    pub n_heads: usize,
    /// Number of key/value heads. Default: one a query head.
    pub n_kv_heads: Option<usize>,
    /// Inner width of the feed-forward layers. Default: `4 d_model`.
    pub d_ff: Option<usize>,
    /// Positions. Default: 1,024 learned ones.
    #[config(default = "PositionsConfig::Learned { max_seq_length: 1024 }")]
    pub positions: PositionsConfig,
    /// Norm. Default: layer norm without shift, epsilon 1e-5.
    #[config(default = "NormConfig::Layer { epsilon: 1e-5, bias: false }")]
    pub norm: NormConfig,
    /// Where the norms stand; with pre-norm there is a last one before the scores. Default: pre-norm.
    #[config(default = "NormPlacement::Pre")]
    pub norm_placement: NormPlacement,
    /// Kind of feed-forward layer. Default: plain.
    #[config(default = "FeedForwardKind::Plain")]
    pub feed_forward: FeedForwardKind,
    /// Blocks that have a mixture of experts in place of that layer. Default: none.
    pub experts: Option<ExpertLayers>,
    /// Non-linearity of the feed-forward layers. Default: exact GELU.
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Whether the linear projections have biases. Default: false.
    #[config(default = false)]
    pub bias: bool,
    /// Whether the output projection is the transposed embedding. Default: true.
    #[config(default = true)]
    pub tied_embedding: bool,
    /// Dropout on the embeddings, the attention weights, the inner activations and the residual additions.
    /// Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Which of the earlier tokens a token sees; it sees none of the later ones, whatever this says. Default: all.
    pub pattern: Option<Pattern>,
    /// How each block attends, where they differ, within the earlier tokens: takes the place of `pattern`. Default: all as
    /// `pattern` says.
    pub layers: Option<Vec<LayerAttention>>,
    /// Seed of the initialisation. Default: 0.
    #[config(default = 0)]
    pub seed: u64,
}

// More parameters than this are a typing mistake: 2^36 in f32 are 256 GiB, and training holds them four times.
const MAX_PARAMETERS: u128 = 1 << 36;

impl DecoderConfig {
    /// Inner width of the feed-forward layers: as given, or `4 d_model`.
    pub fn feed_forward_width(&self) -> usize {
        self.d_ff.unwrap_or(self.d_model.saturating_mul(4))
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, widths that do not divide evenly, a rate outside `[0, 1)`, a pattern that does not fit the heads or the
    /// positions or needs data of the batch, or tensors that no memory can hold.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[
            ("vocab_size", self.vocab_size),
            ("n_layers", self.n_layers),
            ("d_model", self.d_model),
            ("n_heads", self.n_heads),
            ("d_ff", self.feed_forward_width()),
        ])?;
        self.check_size()?;
        self.embedding().validate()?;
        self.check_pattern()?;
        if let Some(experts) = &self.experts {
            experts.validate_causal()?;
        }
        self.stack().validate()?;
        self.stack().check_longest(self.max_seq_length())
    }

    /// Makes the model, initialised as GPT-2 from `seed`: the same values on every backend.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> Decoder {
        assert_valid(self.validate());
        let decoder = Decoder {
            embedding: self.embedding().init(device),
            stack: self.stack().init(device),
            head: (!self.tied_embedding).then(|| {
                LinearConfig::new(self.d_model, self.vocab_size)
                    .with_bias(false)
                    .init(device)
            }),
        };
        Gpt2Init::new(self.n_layers, self.seed).apply(decoder)
    }

    /// Checks the pattern for the longest sequence that there can be, and without batch data: a decoder has none.
    fn check_pattern(&self) -> Result<(), InvalidConfig> {
        if let Some(layers) = &self.layers {
            let mut patterns = layers.iter().map(LayerAttention::visible);
            return patterns.try_for_each(|pattern| self.check_one(&pattern, "layers"));
        }
        match &self.pattern {
            Some(pattern) => self.check_one(pattern, "pattern"),
            None => Ok(()),
        }
    }

    fn check_one(&self, pattern: &Pattern, field: &'static str) -> Result<(), InvalidConfig> {
        let (pattern, length) = match self.max_seq_length() {
            Some(longest) => (pattern.clone(), longest),
            None => (pattern.within(1), 1),
        };
        let lengths = Lengths::square(length).with_n_heads(self.n_heads);
        let checked = match pattern.changes_with_length() {
            true => Err(PatternError::ChangesWithLength),
            false => pattern.check(&lengths, &BatchData::new()),
        };
        checked.map_err(|source| InvalidConfig::Pattern { field, source })
    }

    /// Names the largest factor of a model that no memory can hold.
    fn check_size(&self) -> Result<(), InvalidConfig> {
        let d_model = self.d_model as u128;
        let longest = self.max_seq_length().unwrap_or(0);
        let d_ff = self.feed_forward_width();
        let tables = d_model.saturating_mul(self.vocab_size as u128 + longest as u128);
        let block = d_model.saturating_mul(4 * d_model + 2 * d_ff as u128);
        if tables.saturating_add(block.saturating_mul(self.n_layers as u128)) <= MAX_PARAMETERS {
            return Ok(());
        }
        // The inner width is only blamed where it was chosen: by default it follows d_model.
        let factors = [
            ("vocab_size", self.vocab_size),
            ("positions.max_seq_length", longest),
            ("d_model", self.d_model),
            ("d_ff", self.d_ff.unwrap_or(0)),
            ("n_layers", self.n_layers),
        ];
        let (field, value) = factors
            .into_iter()
            .max_by_key(|(_, value)| *value)
            .expect("there are five");
        Err(InvalidConfig::TooLarge { field, value })
    }

    /// Longest sequence that has positions; nothing where positions know no limit.
    pub fn max_seq_length(&self) -> Option<usize> {
        self.positions.max_seq_length()
    }

    fn embedding(&self) -> TokenEmbeddingConfig {
        TokenEmbeddingConfig::new(self.vocab_size, self.d_model, self.positions.clone())
            .with_dropout(self.dropout)
    }

    fn stack(&self) -> StackConfig {
        let pattern = match &self.pattern {
            None => Pattern::causal(),
            Some(pattern) => Pattern::causal() & pattern.clone(),
        };
        let stack = StackConfig::new(self.n_layers, self.d_model, self.n_heads)
            .with_n_kv_heads(self.n_kv_heads)
            .with_d_ff(self.d_ff)
            .with_norm(self.norm.clone())
            .with_norm_placement(self.norm_placement)
            .with_feed_forward(self.feed_forward)
            .with_experts(self.experts.clone())
            .with_activation(self.activation)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
            .with_pattern(pattern)
            .with_layers(self.layers.as_ref().map(|layers| {
                let layers = layers.iter().cloned();
                layers.map(LayerAttention::within_past).collect()
            }));
        self.positions.apply(stack, false)
    }
}

/// A decoder-only Transformer: `scores = head(norm(blocks(embed(tokens))))`.
///
/// Radford et al. 2019 (GPT-2) by default; with rotary positions, RMS norm, gated SiLU and grouped queries it is
/// Llama (Touvron et al. 2023, <https://arxiv.org/abs/2302.13971>). Differences from GPT-2 by default: no biases.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use emberlm_core::CausalModel;
/// use emberlm_models::DecoderConfig;
///
/// let device = Device::flex();
/// let model = DecoderConfig::new(256, 2, 32, 4).init(&device);
/// let scores = model.forward(Tensor::<2, Int>::zeros([1, 7], &device), None);
/// assert_eq!(scores.dims(), [1, 7, 256]);
/// ```
#[derive(Module, Debug)]
pub struct Decoder {
    /// Token vectors and positions.
    pub embedding: TokenEmbedding,
    /// The blocks, causal.
    pub stack: Stack,
    /// `[d_model, vocab_size]`, where the embedding is not tied.
    pub head: Option<Linear>,
}

impl Decoder {
    /// The hidden states after the last norm, which the output projection turns into scores.
    ///
    /// # Shapes
    ///
    /// - `tokens`: `[batch_size, seq_length]`
    /// - output: `[batch_size, seq_length, d_model]`
    ///
    /// Padding and documents of the rows come in `data`; a row's documents do not see each other.
    ///
    /// # Panics
    ///
    /// If the sequence is longer than the learned positions.
    pub fn hidden_states(
        &self,
        tokens: Tensor<2, Int>,
        data: BatchData,
        dropout_key: Option<RandomKey>,
    ) -> Tensor<3> {
        let (x, context) = self.embedding.whole(tokens, None, data, dropout_key);
        self.stack.forward(x, &context, None).hidden
    }

    /// Scores of the next token from hidden states.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[batch_size, seq_length, d_model]`
    /// - output: `[batch_size, seq_length, vocab_size]`
    pub fn project(&self, hidden: Tensor<3>) -> Tensor<3> {
        self.projection().forward(hidden)
    }

    /// An empty cache of bounded memory: a text of any length can be generated with it, by
    /// [`Generator::from_cache`](emberlm_core::Generator::from_cache).
    ///
    /// # Errors
    ///
    /// Learned positions, a relative bias, or a pattern that may look back to any position.
    pub fn new_ring_cache(&self, positions: CachePositions) -> Result<StackCache, RingError> {
        match self.embedding.max_seq_length() {
            Some(max_seq_length) => Err(RingError::LearnedPositions { max_seq_length }),
            None => self.stack.new_ring_cache(positions, None),
        }
    }

    fn projection(&self) -> Projection {
        match &self.head {
            Some(head) => Projection::Columns(head.weight.val()),
            None => self.embedding.projection(),
        }
    }
}

impl CausalModel for Decoder {
    fn forward(&self, tokens: Tensor<2, Int>, dropout_key: Option<RandomKey>) -> Tensor<3> {
        self.project(self.hidden_states(tokens, BatchData::new(), dropout_key))
    }
}

impl LossModel for Decoder {
    /// # Panics
    ///
    /// If the batch has a source: there is no encoder.
    fn loss(&self, batch: TokenBatch, config: &CrossEntropyConfig) -> ModelLoss {
        assert!(
            batch.source.is_none(),
            "source: a decoder-only model has no encoder to read it"
        );
        let embedding = &self.embedding;
        let (x, context) = embedding.whole(batch.inputs, None, batch.data, batch.dropout_key);
        let context = context.with_so_far(batch.so_far);
        let StackOutput { hidden, routing } = self.stack.forward(x, &context, None);
        ModelLoss {
            cross_entropy: projected_loss(hidden, &self.projection(), batch.targets, config),
            routing,
        }
    }

    fn n_routed_layers(&self) -> usize {
        self.stack.n_routed_layers()
    }

    fn after_step(self, routing: &[(usize, RoutingStatistics)]) -> Self {
        Self {
            stack: self.stack.after_step(0, routing),
            ..self
        }
    }
}

/// The loss of hidden states `[batch_size, seq_length, d_model]` against targets `[batch_size, seq_length]`.
pub(crate) fn projected_loss(
    hidden: Tensor<3>,
    projection: &Projection,
    targets: Tensor<2, Int>,
    config: &CrossEntropyConfig,
) -> CrossEntropy {
    let [batch_size, seq_length, d_model] = hidden.dims();
    let n_tokens = batch_size * seq_length;
    let hidden = hidden.reshape([n_tokens, d_model]);
    projected_cross_entropy(
        config,
        hidden,
        projection,
        targets.reshape([n_tokens]),
        None,
    )
}

impl CachedModel for Decoder {
    type Cache = StackCache;

    fn max_seq_length(&self) -> Option<usize> {
        self.embedding.max_seq_length()
    }

    fn new_cache(&self, capacity: usize) -> StackCache {
        self.stack.new_cache(capacity, None)
    }

    fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut StackCache) -> Tensor<3> {
        let context = cache.context(tokens.dims()[1]);
        let context = context.with_tokens(Some(tokens.clone()));
        let x = self.embedding.forward(tokens, None, &context);
        self.project(self.stack.forward_cached(x, &context, cache))
    }
}
