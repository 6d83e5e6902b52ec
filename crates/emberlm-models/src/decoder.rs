//! The decoder-only language model: embeddings, a causal stack of residual blocks, scores of the next token.

use burn::{
    config::Config,
    module::Module,
    nn::{Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig},
    tensor::{Device, Int, Tensor},
};
use emberlm_attention::{
    GroupedQueryAttention, GroupedQueryAttentionConfig, MultiHeadAttention,
    MultiHeadAttentionConfig,
};
use emberlm_core::{
    Activation, BatchData, CachedModel, CausalModel, Context, CrossEntropy, CrossEntropyConfig,
    DecodingCache, FeedForward, FeedForwardConfig, GatedMlp, Gpt2Init, InvalidConfig, KvCache,
    LearnedPositions, LearnedPositionsConfig, Lengths, Mlp, Norm, NormConfig, NormPlacement,
    Pattern, PatternError, RandomKey, ResidualBlock, ResidualBlockConfig, ResidualStream,
    RotaryConfig, RotaryLayout, SequenceMixer, assert_valid, dropout,
    operators::{Projection, embed, projected_cross_entropy},
    sinusoidal_positions,
};

/// How the model knows where a token stands.
#[derive(Config, Debug, PartialEq)]
pub enum PositionsConfig {
    /// A learned vector a position, up to `max_seq_length` of them.
    Learned {
        /// Number of positions.
        max_seq_length: usize,
    },
    /// Fixed sinusoids; the embedding is multiplied by `sqrt(d_model)` first, as in the paper.
    Sinusoidal,
    /// Queries and keys are rotated.
    Rotary {
        /// Base of the wavelengths.
        theta: f64,
        /// Which components form a pair.
        layout: RotaryLayout,
    },
}

/// The kind of feed-forward layer.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum FeedForwardKind {
    /// `down(f(up(x)))`
    Plain,
    /// `down(f(gate(x)) * up(x))`
    Gated,
}

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
        let longest = self.max_seq_length().unwrap_or(1);
        InvalidConfig::require_positive(&[("positions.max_seq_length", longest)])?;
        self.check_size()?;
        if matches!(self.positions, PositionsConfig::Sinusoidal) && !self.d_model.is_multiple_of(2)
        {
            return Err(InvalidConfig::OddWidth {
                field: "d_model",
                value: self.d_model,
            });
        }
        self.check_pattern()?;
        self.grouped_query().validate()?;
        self.mlp().validate()?;
        self.block().validate()
    }

    /// Makes the model, initialised as GPT-2 from `seed`: the same values on every backend.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> Decoder {
        assert_valid(self.validate());
        let blocks = (0..self.n_layers)
            .map(|_| {
                self.block()
                    .init(self.mixer(device), self.feed_forward_layer(device), device)
            })
            .collect();
        let positions = match self.positions {
            PositionsConfig::Learned { max_seq_length } => {
                Some(LearnedPositionsConfig::new(max_seq_length, self.d_model).init(device))
            }
            PositionsConfig::Sinusoidal | PositionsConfig::Rotary { .. } => None,
        };
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        let decoder = Decoder {
            tokens: EmbeddingConfig::new(self.vocab_size, self.d_model)
                .with_initializer(initializer)
                .init(device),
            positions,
            blocks,
            norm: (self.norm_placement == NormPlacement::Pre)
                .then(|| self.norm.init(self.d_model, device)),
            head: (!self.tied_embedding).then(|| {
                LinearConfig::new(self.d_model, self.vocab_size)
                    .with_bias(false)
                    .init(device)
            }),
            sinusoidal: matches!(self.positions, PositionsConfig::Sinusoidal),
            dropout: self.dropout,
        };
        Gpt2Init::new(self.n_layers, self.seed).apply(decoder)
    }

    /// Checks the pattern for the longest sequence that there can be, and without batch data: a decoder has none.
    fn check_pattern(&self) -> Result<(), InvalidConfig> {
        let Some(pattern) = &self.pattern else {
            return Ok(());
        };
        let (pattern, length) = match self.max_seq_length() {
            Some(longest) => (pattern.clone(), longest),
            None => (pattern.within(1), 1),
        };
        let lengths = Lengths::square(length).with_n_heads(self.n_heads);
        let checked = match pattern.changes_with_length() {
            true => Err(PatternError::ChangesWithLength),
            false => pattern.check(&lengths, &BatchData::new()),
        };
        checked.map_err(|source| InvalidConfig::Pattern {
            field: "pattern",
            source,
        })
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
        match self.positions {
            PositionsConfig::Learned { max_seq_length } => Some(max_seq_length),
            PositionsConfig::Sinusoidal | PositionsConfig::Rotary { .. } => None,
        }
    }

    fn block(&self) -> ResidualBlockConfig {
        ResidualBlockConfig::new(self.d_model)
            .with_norm(self.norm.clone())
            .with_placement(self.norm_placement)
            .with_dropout(self.dropout)
    }

    fn mlp(&self) -> FeedForwardConfig {
        FeedForwardConfig::new(self.d_model, self.feed_forward_width())
            .with_activation(self.activation)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
    }

    fn feed_forward_layer(&self, device: &Device) -> FeedForwardLayer {
        match self.feed_forward {
            FeedForwardKind::Plain => FeedForwardLayer::Plain(self.mlp().init(device)),
            FeedForwardKind::Gated => FeedForwardLayer::Gated(self.mlp().init_gated(device)),
        }
    }

    fn grouped_query(&self) -> GroupedQueryAttentionConfig {
        let rotary = match self.positions {
            PositionsConfig::Rotary { theta, layout } => Some(
                RotaryConfig::new(self.d_model / self.n_heads)
                    .with_theta(theta)
                    .with_layout(layout),
            ),
            PositionsConfig::Learned { .. } | PositionsConfig::Sinusoidal => None,
        };
        GroupedQueryAttentionConfig::new(self.d_model, self.n_heads)
            .with_n_kv_heads(self.n_kv_heads)
            .with_rotary(rotary)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
            .with_pattern(self.causal_pattern())
    }

    fn causal_pattern(&self) -> Pattern {
        match &self.pattern {
            None => Pattern::causal(),
            Some(pattern) => Pattern::causal() & pattern.clone(),
        }
    }

    /// Grouped-query attention where something needs it, else multi-head attention.
    fn mixer(&self, device: &Device) -> Mixer {
        let grouped_query = self.grouped_query();
        if grouped_query.rotary.is_some() || grouped_query.kv_heads() != self.n_heads {
            Mixer::GroupedQuery(grouped_query.init(device))
        } else {
            Mixer::MultiHead(
                MultiHeadAttentionConfig::new(self.d_model, self.n_heads)
                    .with_bias(self.bias)
                    .with_dropout(self.dropout)
                    .with_pattern(self.causal_pattern())
                    .init(device),
            )
        }
    }
}

/// The mixer of a block.
#[derive(Module, Debug)]
pub enum Mixer {
    /// Multi-head attention.
    MultiHead(MultiHeadAttention),
    /// Grouped-query attention.
    GroupedQuery(GroupedQueryAttention),
}

impl SequenceMixer for Mixer {
    type Cache = KvCache;

    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        match self {
            Self::MultiHead(attention) => attention.forward(x, context),
            Self::GroupedQuery(attention) => attention.forward(x, context),
        }
    }

    fn forward_cached(&self, x: Tensor<3>, context: &Context, cache: &mut KvCache) -> Tensor<3> {
        match self {
            Self::MultiHead(attention) => attention.forward_cached(x, context, cache),
            Self::GroupedQuery(attention) => attention.forward_cached(x, context, cache),
        }
    }

    fn new_cache(&self, capacity: usize) -> KvCache {
        match self {
            Self::MultiHead(attention) => attention.new_cache(capacity),
            Self::GroupedQuery(attention) => attention.new_cache(capacity),
        }
    }
}

/// The feed-forward layer of a block.
#[derive(Module, Debug)]
pub enum FeedForwardLayer {
    /// `down(f(up(x)))`
    Plain(Mlp),
    /// `down(f(gate(x)) * up(x))`
    Gated(GatedMlp),
}

impl FeedForward for FeedForwardLayer {
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        match self {
            Self::Plain(layer) => layer.forward(x, context),
            Self::Gated(layer) => layer.forward(x, context),
        }
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
    /// `[vocab_size, d_model]`
    pub tokens: Embedding,
    /// Learned positions, where the config has them.
    pub positions: Option<LearnedPositions>,
    /// The stack.
    pub blocks: Vec<ResidualBlock<Mixer, FeedForwardLayer>>,
    /// The last norm of a pre-norm stack.
    pub norm: Option<Norm>,
    /// `[d_model, vocab_size]`, where the embedding is not tied.
    pub head: Option<Linear>,
    sinusoidal: bool,
    dropout: f64,
}

/// Keys and values of all blocks.
#[derive(Clone, Debug)]
pub struct DecoderCache {
    layers: Vec<KvCache>,
    /// Of each row, where any has some.
    padding: Option<Vec<usize>>,
}

impl DecodingCache for DecoderCache {
    fn len(&self) -> usize {
        self.layers.first().map_or(0, KvCache::len)
    }

    fn truncate(&mut self, len: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(len));
    }

    fn batch_size(&self) -> Option<usize> {
        let padded = self.padding.as_ref().map(Vec::len);
        padded.or_else(|| self.layers.first().and_then(KvCache::batch_size))
    }

    fn select(&mut self, rows: &[usize]) {
        self.layers.iter_mut().for_each(|layer| layer.select(rows));
        if let Some(padding) = self.padding.take() {
            self.padding = padding_of(rows.iter().map(|row| padding[*row]));
        }
    }

    fn set_padding(&mut self, padding: &[usize]) {
        assert!(
            self.is_empty(),
            "padding: {} positions are in the cache, padding comes before the first",
            self.len()
        );
        if let Some(batch_size) = self.batch_size() {
            assert_eq!(padding.len(), batch_size, "batch_size: rows of the padding");
        }
        self.padding = padding_of(padding.iter().copied());
    }
}

/// Rows without padding need no data of the batch.
fn padding_of(rows: impl Iterator<Item = usize>) -> Option<Vec<usize>> {
    let padding: Vec<usize> = rows.collect();
    padding.iter().any(|n| *n > 0).then_some(padding)
}

// Parts of the model's random key: the embedding, then the blocks from here on.
const EMBEDDING: u64 = 0;
const FIRST_BLOCK: u64 = 1;

impl Decoder {
    /// The hidden states after the last norm, which the output projection turns into scores.
    ///
    /// # Shapes
    ///
    /// - `tokens`: `[batch_size, seq_length]`
    /// - output: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// If the sequence is longer than the learned positions.
    pub fn hidden_states(
        &self,
        tokens: Tensor<2, Int>,
        dropout_key: Option<RandomKey>,
    ) -> Tensor<3> {
        let [_, seq_length] = tokens.dims();
        let context = Context::new(Lengths::square(seq_length)).with_dropout_key(dropout_key);
        let mut stream = ResidualStream::new(self.embed(tokens, &context));
        for (i, block) in (FIRST_BLOCK..).zip(&self.blocks) {
            stream = block.forward_stream(stream, &context.fold(i));
        }
        self.last_norm(stream)
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

    fn projection(&self) -> Projection {
        match &self.head {
            Some(head) => Projection::Columns(head.weight.val()),
            None => Projection::Rows(self.tokens.weight.val()),
        }
    }

    fn embed(&self, tokens: Tensor<2, Int>, context: &Context) -> Tensor<3> {
        let [_, seq_length] = tokens.dims();
        let first_position = context.lengths.first_position;
        let of_rows = context.row_positions(&tokens.device());
        let table = self.tokens.weight.val();
        let x = match (&self.positions, &of_rows) {
            (Some(learned), Some(of_rows)) => {
                embed(table, tokens, None) + embed(learned.weight.val(), of_rows.clone(), None)
            }
            (Some(learned), None) => {
                embed(table, tokens, Some((learned.weight.val(), first_position)))
            }
            (None, _) => embed(table, tokens, None),
        };
        let x = if self.sinusoidal {
            let [_, _, d_model] = x.dims();
            let (dtype, device) = (x.dtype(), x.device());
            let sinusoids = |first, n| sinusoidal_positions(first, n, d_model, dtype, &device);
            let positions = match of_rows {
                Some(of_rows) => {
                    let all = sinusoids(0, context.lengths.query_end());
                    embed(all.squeeze_dim(0), of_rows, None)
                }
                None => sinusoids(first_position, seq_length),
            };
            x * (d_model as f64).sqrt() + positions
        } else {
            x
        };
        dropout(x, self.dropout, context.fold(EMBEDDING).dropout_key)
    }

    fn last_norm(&self, stream: ResidualStream) -> Tensor<3> {
        match &self.norm {
            Some(norm) => stream.norm(norm).1,
            None => stream.into_sum(),
        }
    }
}

impl CausalModel for Decoder {
    fn forward(&self, tokens: Tensor<2, Int>, dropout_key: Option<RandomKey>) -> Tensor<3> {
        self.project(self.hidden_states(tokens, dropout_key))
    }

    fn loss(
        &self,
        tokens: Tensor<2, Int>,
        targets: Tensor<2, Int>,
        config: &CrossEntropyConfig,
        dropout_key: Option<RandomKey>,
    ) -> CrossEntropy {
        let hidden = self.hidden_states(tokens, dropout_key);
        let [batch_size, seq_length, d_model] = hidden.dims();
        let n_tokens = batch_size * seq_length;
        let hidden = hidden.reshape([n_tokens, d_model]);
        let targets = targets.reshape([n_tokens]);
        projected_cross_entropy(config, hidden, &self.projection(), targets, None)
    }
}

impl CachedModel for Decoder {
    type Cache = DecoderCache;

    fn max_seq_length(&self) -> Option<usize> {
        self.positions
            .as_ref()
            .map(|positions| positions.weight.lazy_shape()[0])
    }

    fn new_cache(&self, capacity: usize) -> DecoderCache {
        DecoderCache {
            layers: self
                .blocks
                .iter()
                .map(|block| block.mixer.new_cache(capacity))
                .collect(),
            padding: None,
        }
    }

    fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut DecoderCache) -> Tensor<3> {
        let [_, seq_length] = tokens.dims();
        let first_position = cache.len();
        let lengths = Lengths::new(seq_length, first_position + seq_length)
            .with_first_position(first_position);
        let mut context = Context::new(lengths);
        if let Some(padding) = &cache.padding {
            context = context.with_left_padding(padding);
        }
        let mut stream = ResidualStream::new(self.embed(tokens, &context));
        for (block, cache) in self.blocks.iter().zip(&mut cache.layers) {
            stream = block.forward_stream_cached(stream, &context, cache);
        }
        self.project(self.last_norm(stream))
    }
}
