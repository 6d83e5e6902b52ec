//! The encoder-decoder: an encoder reads a source, a decoder writes with an eye on it.

use burn::{
    config::Config,
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Device, Int, Tensor},
};
use emberlm_core::{
    Activation, BatchData, CachedModel, Context, CrossEntropyConfig, InvalidConfig, LayerRouting,
    LossModel, ModelLoss, NormConfig, NormPlacement, Pattern, RandomKey, RoutingStatistics, Source,
    StepSoFar, TokenBatch, XavierInit, assert_valid, operators::Projection,
};

use crate::{
    ExpertLayers, FeedForwardKind, LayerAttention, PositionsConfig, Stack, StackCache, StackConfig,
    StackOutput, StackSource, TokenEmbedding, TokenEmbeddingConfig, decoder::projected_loss,
};

/// Configuration of an [`EncoderDecoder`]. The defaults are those of Vaswani et al. 2017, but that the norms stand before.
#[derive(Config, Debug)]
pub struct EncoderDecoderConfig {
    /// Number of tokens of the target, and of the source where they share an embedding.
    pub vocab_size: usize,
    /// Number of blocks of the encoder.
    pub n_encoder_layers: usize,
    /// Number of blocks of the decoder.
    pub n_decoder_layers: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads; divides `d_model`.
    pub n_heads: usize,
    /// Inner width of the feed-forward layers. Default: `4 d_model`.
    pub d_ff: Option<usize>,
    /// Number of tokens of the source where it has an embedding of its own. Default: the embedding is shared, positions
    /// included.
    pub source_vocab_size: Option<usize>,
    /// Positions of both. Default: sinusoids, with embeddings times `sqrt(d_model)`.
    #[config(default = "PositionsConfig::Sinusoidal")]
    pub positions: PositionsConfig,
    /// How each block of the encoder attends to the source, where not to all of it: with Longformer's blocks this is LED
    /// (Beltagy et al. 2020, section 7, <https://arxiv.org/abs/2004.05150>). Default: to all.
    pub encoder_layers: Option<Vec<LayerAttention>>,
    /// Norm. Default: layer norm with bias, epsilon 1e-5.
    #[config(default = "NormConfig::Layer { epsilon: 1e-5, bias: true }")]
    pub norm: NormConfig,
    /// Where the norms stand. Default: before.
    #[config(default = "NormPlacement::Pre")]
    pub norm_placement: NormPlacement,
    /// Whether both stacks end in a norm. Default: where the norms stand before, which need it.
    pub final_norm: Option<bool>,
    /// Kind of feed-forward layer. Default: plain.
    #[config(default = "FeedForwardKind::Plain")]
    pub feed_forward: FeedForwardKind,
    /// Blocks of the encoder and of the decoder that have a mixture of experts in place of that layer. Default: none.
    pub experts: Option<ExpertLayers>,
    /// Non-linearity of the feed-forward layers. Default: ReLU.
    #[config(default = "Activation::Relu")]
    pub activation: Activation,
    /// Whether the linear projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Whether the output projection is the transposed embedding of the target. Default: true.
    #[config(default = true)]
    pub tied_embedding: bool,
    /// Dropout on the embeddings, the attention weights, the inner activations and the residual additions. Default: 0.1.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// Seed of the initialisation. Default: 0.
    #[config(default = 0)]
    pub seed: u64,
}

impl EncoderDecoderConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, widths that do not divide evenly, blocks of the encoder that attend to positions beyond the learned ones, or a
    /// rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[
            ("n_encoder_layers", self.n_encoder_layers),
            ("n_decoder_layers", self.n_decoder_layers),
            ("source_vocab_size", self.source_vocab_size.unwrap_or(1)),
        ])?;
        self.embedding(self.vocab_size).validate()?;
        self.encoder().validate()?;
        (self.encoder()).check_longest(self.positions.max_seq_length())?;
        self.decoder().validate()?;
        match &self.experts {
            Some(experts) => experts.validate_causal(),
            None => Ok(()),
        }
    }

    /// Makes the model, initialised as in tensor2tensor from `seed`: the same values on every backend.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> EncoderDecoder {
        assert_valid(self.validate());
        let model = EncoderDecoder {
            embedding: self.embedding(self.vocab_size).init(device),
            source_embedding: (self.source_vocab_size)
                .map(|vocab_size| self.embedding(vocab_size).init(device)),
            encoder: self.encoder().init(device),
            decoder: self.decoder().init(device),
            head: (!self.tied_embedding).then(|| {
                LinearConfig::new(self.d_model, self.vocab_size)
                    .with_bias(false)
                    .init(device)
            }),
        };
        XavierInit::new(self.seed).apply(model)
    }

    fn embedding(&self, vocab_size: usize) -> TokenEmbeddingConfig {
        TokenEmbeddingConfig::new(vocab_size, self.d_model, self.positions.clone())
            .with_dropout(self.dropout)
    }

    fn stack(&self, n_layers: usize) -> StackConfig {
        StackConfig::new(n_layers, self.d_model, self.n_heads)
            .with_d_ff(self.d_ff)
            .with_norm(self.norm.clone())
            .with_norm_placement(self.norm_placement)
            .with_final_norm(self.final_norm)
            .with_feed_forward(self.feed_forward)
            .with_experts(self.experts.clone())
            .with_activation(self.activation)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
    }

    fn encoder(&self) -> StackConfig {
        let stack = self.stack(self.n_encoder_layers);
        let stack = stack.with_layers(self.encoder_layers.clone());
        self.positions.apply(stack, true)
    }

    fn decoder(&self) -> StackConfig {
        let stack = self.stack(self.n_decoder_layers);
        let stack = stack
            .with_pattern(Pattern::causal())
            .with_cross_attention(true);
        self.positions.apply(stack, false)
    }
}

/// The Transformer: an encoder over the source, and a causal decoder whose blocks attend to what the encoder made.
///
/// Vaswani et al. 2017, <https://arxiv.org/abs/1706.03762>. Difference by default: pre-norm, as tensor2tensor and most
/// trainings since.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use emberlm_core::Source;
/// use emberlm_models::EncoderDecoderConfig;
///
/// let device = Device::flex();
/// let model = EncoderDecoderConfig::new(64, 2, 2, 32, 4).init(&device);
/// let source = Source::new(Tensor::<2, Int>::zeros([1, 7], &device));
/// let scores = model.forward(source, Tensor::<2, Int>::zeros([1, 5], &device), None);
/// assert_eq!(scores.dims(), [1, 5, 64]);
/// ```
#[derive(Module, Debug)]
pub struct EncoderDecoder {
    /// Token vectors of the target, and of the source unless it has its own.
    pub embedding: TokenEmbedding,
    /// Token vectors of the source, where they are not shared.
    pub source_embedding: Option<TokenEmbedding>,
    /// Reads the source.
    pub encoder: Stack,
    /// Writes the target.
    pub decoder: Stack,
    /// `[d_model, vocab_size]`, where the embedding is not tied.
    pub head: Option<Linear>,
}

// Parts of the model's random key.
const SOURCE: u64 = 0;
const TARGET: u64 = 1;

impl EncoderDecoder {
    /// What the encoder makes of a source.
    ///
    /// # Shapes
    ///
    /// - output: `[batch_size, source_length, d_model]`
    ///
    /// # Panics
    ///
    /// If the source is longer than the learned positions.
    pub fn encode(&self, source: Source, dropout_key: Option<RandomKey>) -> Tensor<3> {
        self.read(source, dropout_key, StepSoFar::default()).hidden
    }

    fn read(
        &self,
        source: Source,
        dropout_key: Option<RandomKey>,
        so_far: StepSoFar,
    ) -> StackOutput {
        let embedding = self.source_embedding.as_ref().unwrap_or(&self.embedding);
        let key = dropout_key.map(|key| key.fold(SOURCE));
        let (x, context) = embedding.whole(source.tokens, None, source.data, key);
        let context = context.with_so_far(so_far);
        self.encoder.forward(x, &context, None)
    }

    /// Scores of the next token after each position of the target.
    ///
    /// # Shapes
    ///
    /// - `tokens`: `[batch_size, seq_length]`
    /// - output: `[batch_size, seq_length, vocab_size]`, not normalised
    ///
    /// # Panics
    ///
    /// If a sequence is longer than the learned positions, or the batch sizes differ.
    pub fn forward(
        &self,
        source: Source,
        tokens: Tensor<2, Int>,
        dropout_key: Option<RandomKey>,
    ) -> Tensor<3> {
        let target = Target {
            dropout_key,
            ..Target::new(tokens)
        };
        let (_, hidden) = self.decode(source, target, |decoder, x, context, source| {
            decoder.forward(x, context, Some(source)).hidden
        });
        self.projection().forward(hidden)
    }

    /// A cache for `capacity` positions of the targets of these sources, whose keys and values are projected now, once.
    pub fn start(&self, source: Source, capacity: usize) -> StackCache {
        let data = source.data.clone();
        let encoded = self.encode(source, None);
        let source = self.decoder.project_source(encoded, data);
        self.decoder.new_cache(capacity, Some(source))
    }

    /// How much each position of the target takes of each position of the source in the last block of the decoder, by
    /// head; over the source the weights add up to 1.
    ///
    /// # Shapes
    ///
    /// - `tokens`: `[batch_size, seq_length]`
    /// - output: `[batch_size, n_heads, seq_length, source_length]`
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn cross_attention(&self, source: Source, tokens: Tensor<2, Int>) -> Tensor<4> {
        self.decode(source, Target::new(tokens), Stack::cross_weights)
            .1
    }

    /// What the encoder routed, and what `run` makes of the decoder, the vectors of the target's tokens, their context and
    /// the projected source.
    fn decode<T>(
        &self,
        source: Source,
        target: Target,
        run: impl FnOnce(&Stack, Tensor<3>, &Context, &StackSource) -> T,
    ) -> (Vec<LayerRouting>, T) {
        let Target {
            tokens,
            data,
            dropout_key,
            so_far,
        } = target;
        let source_data = source.data.clone();
        let encoded = self.read(source, dropout_key, so_far.clone());
        let source = self.decoder.project_source(encoded.hidden, source_data);
        let key = dropout_key.map(|key| key.fold(TARGET));
        let (x, context) = self.embedding.whole(tokens, None, data, key);
        let so_far = so_far.from_layer(self.encoder.blocks.len());
        let context = context.with_so_far(so_far);
        (encoded.routing, run(&self.decoder, x, &context, &source))
    }

    fn projection(&self) -> Projection {
        match &self.head {
            Some(head) => Projection::Columns(head.weight.val()),
            None => self.embedding.projection(),
        }
    }
}

impl CachedModel for EncoderDecoder {
    type Cache = StackCache;

    fn max_seq_length(&self) -> Option<usize> {
        self.embedding.max_seq_length()
    }

    /// # Panics
    ///
    /// Always: a cache begins with a source, see [`start`](EncoderDecoder::start).
    fn new_cache(&self, _capacity: usize) -> StackCache {
        panic!("source: an encoder-decoder begins with one, see EncoderDecoder::start")
    }

    fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut StackCache) -> Tensor<3> {
        let context = cache.context(tokens.dims()[1]);
        let context = context.with_tokens(Some(tokens.clone()));
        let x = self.embedding.forward(tokens, None, &context);
        let hidden = self.decoder.forward_cached(x, &context, cache);
        self.projection().forward(hidden)
    }
}

impl LossModel for EncoderDecoder {
    /// # Panics
    ///
    /// If the batch has no source.
    fn loss(&self, batch: TokenBatch, config: &CrossEntropyConfig) -> ModelLoss {
        let source = (batch.source).expect("source: the batch has none for the encoder to read");
        let target = Target {
            tokens: batch.inputs,
            data: batch.data,
            dropout_key: batch.dropout_key,
            so_far: batch.so_far,
        };
        let (mut routing, output) = self.decode(source, target, |decoder, x, context, source| {
            decoder.forward(x, context, Some(source))
        });
        // The layers of the decoder are numbered after those of the encoder.
        let first = self.encoder.blocks.len();
        routing.extend(output.routing.into_iter().map(|routing| LayerRouting {
            layer: first + routing.layer,
            ..routing
        }));
        ModelLoss {
            cross_entropy: projected_loss(output.hidden, &self.projection(), batch.targets, config),
            routing,
        }
    }

    fn n_routed_layers(&self) -> usize {
        self.encoder.n_routed_layers() + self.decoder.n_routed_layers()
    }

    fn after_step(self, routing: &[(usize, RoutingStatistics)]) -> Self {
        let first = self.encoder.blocks.len();
        Self {
            encoder: self.encoder.after_step(0, routing),
            decoder: self.decoder.after_step(first, routing),
            ..self
        }
    }
}

/// What a decoder reads besides its source.
struct Target {
    tokens: Tensor<2, Int>,
    data: BatchData,
    dropout_key: Option<RandomKey>,
    so_far: StepSoFar,
}

impl Target {
    fn new(tokens: Tensor<2, Int>) -> Self {
        Self {
            tokens,
            data: BatchData::new(),
            dropout_key: None,
            so_far: StepSoFar::default(),
        }
    }
}
