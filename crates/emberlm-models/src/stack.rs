//! A stack of residual blocks: what encoders and decoders have in common.

use burn::{
    config::Config,
    module::Module,
    nn::Linear,
    tensor::{Device, Tensor},
};
use emberlm_attention::{
    CrossCache, GroupedQueryAttention, GroupedQueryAttentionConfig, LongformerAttention,
    LongformerAttentionConfig, MultiHeadAttention, MultiHeadAttentionConfig,
};
use emberlm_core::{
    Activation, BatchData, CachePositions, Context, CrossInput, CrossMixer, DecodingCache,
    DenseLayer, FeedForward, FeedForwardConfig, FeedForwardOutput, Global, InvalidConfig, KvCache,
    LayerRouting, Lengths, Norm, NormConfig, NormPlacement, Pattern, RelativeBias,
    RelativeBiasConfig, ResidualBlock, ResidualBlockConfig, ResidualStream, RingError,
    RotaryConfig, RoutingStatistics, SequenceMixer, Window, alibi_slopes, assert_valid,
};

use emberlm_moe::MixtureOfExperts;

use crate::{ExpertLayers, LayerAttention};

/// The kind of feed-forward layer.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum FeedForwardKind {
    /// `down(f(up(x)))`
    Plain,
    /// `down(f(gate(x)) * up(x))`
    Gated,
}

/// Configuration of a [`Stack`]. The defaults are those of Vaswani et al. 2017 but for the norms, which stand before.
#[derive(Config, Debug)]
pub struct StackConfig {
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
    /// Rotary positions of queries and keys. Default: none.
    pub rotary: Option<RotaryConfig>,
    /// Whether scores fall with the distance, by ALiBi's slopes. Default: false.
    #[config(default = false)]
    pub alibi: bool,
    /// Relative bias of the scores, one for all blocks. Default: none.
    pub relative_bias: Option<RelativeBiasConfig>,
    /// Factor of the products of queries and keys. Default: `1 / sqrt(d_head)`.
    pub scale: Option<f64>,
    /// Norm. Default: layer norm with bias, epsilon 1e-5.
    #[config(default = "NormConfig::Layer { epsilon: 1e-5, bias: true }")]
    pub norm: NormConfig,
    /// Where the norms stand. Default: before.
    #[config(default = "NormPlacement::Pre")]
    pub norm_placement: NormPlacement,
    /// Whether there is a norm after the last block. Default: where the norms stand before, which need it.
    pub final_norm: Option<bool>,
    /// Kind of feed-forward layer. Default: plain.
    #[config(default = "FeedForwardKind::Plain")]
    pub feed_forward: FeedForwardKind,
    /// Blocks that have a mixture of experts in place of that layer. Default: none.
    pub experts: Option<ExpertLayers>,
    /// Non-linearity of the feed-forward layers. Default: ReLU.
    #[config(default = "Activation::Relu")]
    pub activation: Activation,
    /// Whether the linear projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Dropout on the attention weights, the inner activations and the residual additions. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Which keys a query of the sequence itself sees. Default: all.
    #[config(default = "Pattern::full()")]
    pub pattern: Pattern,
    /// How each block attends, where they differ: takes the place of `pattern`. Default: all as `pattern` says.
    pub layers: Option<Vec<LayerAttention>>,
    /// Whether each block attends to a source too. Default: false.
    #[config(default = false)]
    pub cross_attention: bool,
}

impl StackConfig {
    /// Inner width of the feed-forward layers: as given, or `4 d_model`.
    pub fn feed_forward_width(&self) -> usize {
        self.d_ff.unwrap_or(self.d_model.saturating_mul(4))
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, widths that do not divide evenly, an impossible pattern, or a rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[
            ("n_layers", self.n_layers),
            ("d_model", self.d_model),
            ("n_heads", self.n_heads),
            ("d_ff", self.feed_forward_width()),
        ])?;
        if let Some(bias) = &self.relative_bias {
            bias.validate()?;
        }
        self.check_layers()?;
        self.mlp().validate()?;
        if let Some(experts) = &self.experts {
            experts.validate(self.d_model, self.n_layers)?;
        }
        self.block().validate()
    }

    /// Makes the stack.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> Stack {
        assert_valid(self.validate());
        let block = |layer| {
            let cross = self.cross_attention.then(|| {
                MultiHeadAttentionConfig::new(self.d_model, self.n_heads)
                    .with_scale(self.scale)
                    .with_bias(self.bias)
                    .with_dropout(self.dropout)
                    .init(device)
            });
            let feed_forward = self.feed_forward_layer(layer, device);
            let mixer = self.mixer(&self.layer(layer), device);
            (self.block()).init_with_cross(mixer, cross, feed_forward, device)
        };
        let is_pre = self.norm_placement == NormPlacement::Pre;
        let final_norm = self.final_norm.unwrap_or(is_pre);
        Stack {
            blocks: (0..self.n_layers).map(block).collect(),
            norm: final_norm.then(|| self.norm.init(self.d_model, device)),
            relative_bias: (self.relative_bias.as_ref()).map(|bias| bias.init(device)),
        }
    }

    fn slopes(&self) -> Option<Vec<f64>> {
        self.alibi.then(|| alibi_slopes(self.n_heads))
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

    fn feed_forward_layer(&self, layer: usize, device: &Device) -> FeedForwardLayer {
        match &self.experts {
            Some(experts) if experts.has(layer) => {
                FeedForwardLayer::Experts(experts.mixture.init(device))
            }
            _ => {
                let gated = self.feed_forward == FeedForwardKind::Gated;
                FeedForwardLayer::Dense(self.mlp().init_dense(gated, device))
            }
        }
    }

    /// How a block attends.
    fn layer(&self, layer: usize) -> LayerAttention {
        match &self.layers {
            Some(layers) => layers[layer].clone(),
            None => LayerAttention::pattern(self.pattern.clone()),
        }
    }

    fn check_layers(&self) -> Result<(), InvalidConfig> {
        let n_layers = self.layers.as_ref().map_or(self.n_layers, Vec::len);
        if n_layers != self.n_layers {
            return Err(InvalidConfig::Range {
                field: "layers",
                range: "one a block",
                value: n_layers as f64,
            });
        }
        (0..n_layers).try_for_each(|layer| self.check_layer(&self.layer(layer)))
    }

    /// Checks the patterns against the longest sequence that there are positions for, if there is one.
    pub(crate) fn check_longest(&self, longest: Option<usize>) -> Result<(), InvalidConfig> {
        let Some(longest) = longest else {
            return Ok(());
        };
        let field = match self.layers {
            Some(_) => "layers",
            None => "pattern",
        };
        (0..self.n_layers).try_for_each(|layer| {
            let checked = self.layer(layer).visible().check_longest(longest);
            checked.map_err(|source| InvalidConfig::Pattern { field, source })
        })
    }

    fn check_layer(&self, attention: &LayerAttention) -> Result<(), InvalidConfig> {
        match attention {
            LayerAttention::Pattern { pattern, repeats } => {
                self.grouped_query(pattern, repeats).validate()
            }
            LayerAttention::Longformer {
                window,
                dilations,
                global,
                causal,
            } => {
                let kv_heads = self.n_kv_heads.unwrap_or(self.n_heads);
                if kv_heads != self.n_heads || self.scale.is_some() {
                    return Err(InvalidConfig::Unsupported {
                        field: "layers",
                        reason: "Longformer has one key/value head a query head, and the usual scale",
                    });
                }
                self.longformer(*window, dilations, global, *causal)
                    .validate()
            }
        }
    }

    fn grouped_query(&self, pattern: &Pattern, repeats: &[Pattern]) -> GroupedQueryAttentionConfig {
        GroupedQueryAttentionConfig::new(self.d_model, self.n_heads)
            .with_n_kv_heads(self.n_kv_heads)
            .with_rotary(self.rotary.clone())
            .with_alibi(self.slopes())
            .with_scale(self.scale)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
            .with_pattern(pattern.clone())
            .with_repeats(repeats.to_vec())
    }

    fn longformer(
        &self,
        window: Window,
        dilations: &Option<Vec<usize>>,
        global: &Global,
        causal: bool,
    ) -> LongformerAttentionConfig {
        LongformerAttentionConfig::new(self.d_model, self.n_heads, window)
            .with_dilations(dilations.clone())
            .with_global(global.clone())
            .with_causal(causal)
            .with_rotary(self.rotary.clone())
            .with_alibi(self.slopes())
            .with_bias(self.bias)
            .with_dropout(self.dropout)
    }

    /// Grouped-query attention where something needs it, else multi-head attention.
    fn mixer(&self, attention: &LayerAttention, device: &Device) -> Mixer {
        let (pattern, repeats) = match attention {
            LayerAttention::Longformer {
                window,
                dilations,
                global,
                causal,
            } => {
                let config = self.longformer(*window, dilations, global, *causal);
                return Mixer::Longformer(config.init(device));
            }
            LayerAttention::Pattern { pattern, repeats } => (pattern, repeats),
        };
        let grouped_query = self.grouped_query(pattern, repeats);
        let is_plain = grouped_query.rotary.is_none() && repeats.is_empty();
        if is_plain && grouped_query.kv_heads() == self.n_heads {
            Mixer::MultiHead(
                MultiHeadAttentionConfig::new(self.d_model, self.n_heads)
                    .with_alibi(self.slopes())
                    .with_scale(self.scale)
                    .with_bias(self.bias)
                    .with_dropout(self.dropout)
                    .with_pattern(pattern.clone())
                    .init(device),
            )
        } else {
            Mixer::GroupedQuery(grouped_query.init(device))
        }
    }
}

/// The mixer of a block.
#[expect(
    clippy::large_enum_variant,
    reason = "a model has one a layer, made once"
)]
#[derive(Module, Debug)]
pub enum Mixer {
    /// Multi-head attention.
    MultiHead(MultiHeadAttention),
    /// Grouped-query attention.
    GroupedQuery(GroupedQueryAttention),
    /// Longformer's attention.
    Longformer(LongformerAttention),
}

impl Mixer {
    /// The projections that make query, key, value and output of all tokens.
    pub fn projections(&self) -> [&Linear; 4] {
        match self {
            Self::MultiHead(all) => [&all.query, &all.key, &all.value, &all.output],
            Self::GroupedQuery(all) => [&all.query, &all.key, &all.value, &all.output],
            Self::Longformer(all) => [&all.query, &all.key, &all.value, &all.output],
        }
    }

    /// As [`projections`](Self::projections), to be changed.
    pub fn projections_mut(&mut self) -> [&mut Linear; 4] {
        match self {
            Self::MultiHead(all) => [
                &mut all.query,
                &mut all.key,
                &mut all.value,
                &mut all.output,
            ],
            Self::GroupedQuery(all) => [
                &mut all.query,
                &mut all.key,
                &mut all.value,
                &mut all.output,
            ],
            Self::Longformer(all) => [
                &mut all.query,
                &mut all.key,
                &mut all.value,
                &mut all.output,
            ],
        }
    }

    fn new_ring_cache(&self, positions: CachePositions) -> Result<KvCache, RingError> {
        match self {
            Self::MultiHead(attention) => attention.new_ring_cache(positions),
            Self::GroupedQuery(attention) => attention.new_ring_cache(positions),
            Self::Longformer(attention) => attention.new_ring_cache(positions),
        }
    }
}

impl SequenceMixer for Mixer {
    type Cache = KvCache;

    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        match self {
            Self::MultiHead(attention) => attention.forward(x, context),
            Self::GroupedQuery(attention) => attention.forward(x, context),
            Self::Longformer(attention) => attention.forward(x, context),
        }
    }

    fn forward_cached(&self, x: Tensor<3>, context: &Context, cache: &mut KvCache) -> Tensor<3> {
        match self {
            Self::MultiHead(attention) => attention.forward_cached(x, context, cache),
            Self::GroupedQuery(attention) => attention.forward_cached(x, context, cache),
            Self::Longformer(attention) => attention.forward_cached(x, context, cache),
        }
    }

    fn new_cache(&self, capacity: usize) -> KvCache {
        match self {
            Self::MultiHead(attention) => attention.new_cache(capacity),
            Self::GroupedQuery(attention) => attention.new_cache(capacity),
            Self::Longformer(attention) => attention.new_cache(capacity),
        }
    }
}

/// The feed-forward layer of a block.
#[expect(
    clippy::large_enum_variant,
    reason = "a model has one a layer, made once"
)]
#[derive(Module, Debug)]
pub enum FeedForwardLayer {
    /// One layer for all tokens.
    Dense(DenseLayer),
    /// A mixture of experts.
    Experts(MixtureOfExperts),
}

impl FeedForward for FeedForwardLayer {
    fn forward(&self, x: Tensor<3>, context: &Context) -> FeedForwardOutput {
        match self {
            Self::Dense(layer) => layer.forward(x, context),
            Self::Experts(layer) => layer.forward(x, context),
        }
    }
}

/// The hidden states of a stack, and what the routing of its tokens gave besides.
#[derive(Debug, Clone)]
pub struct StackOutput {
    /// `[batch_size, seq_length, d_model]`
    pub hidden: Tensor<3>,
    /// Of each block that routes its tokens, by the block's number.
    pub routing: Vec<LayerRouting>,
}

/// Residual blocks one after the other, and a last norm: `norm(block_n(.. block_1(x)))`.
///
/// Vaswani et al. 2017, section 3.1, <https://arxiv.org/abs/1706.03762>. With a causal pattern it is a decoder's, without
/// one an encoder's; with cross-attention it is the decoder of an encoder-decoder.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{Context, Lengths};
/// use emberlm_models::StackConfig;
///
/// let device = Device::flex();
/// let encoder = StackConfig::new(2, 16, 4).init(&device);
/// let y = encoder.forward(Tensor::ones([1, 5, 16], &device), &Context::new(Lengths::square(5)), None);
/// assert_eq!(y.hidden.dims(), [1, 5, 16]);
/// ```
#[derive(Module, Debug)]
pub struct Stack {
    /// The blocks, from the input on.
    pub blocks: Vec<ResidualBlock<Mixer, FeedForwardLayer, MultiHeadAttention>>,
    /// The norm after the last block.
    pub norm: Option<Norm>,
    /// The relative bias of all blocks' scores.
    pub relative_bias: Option<RelativeBias>,
}

/// A source as a stack with cross-attention reads it: keys and values of every block, projected once.
#[derive(Clone, Debug)]
pub struct StackSource {
    layers: Vec<CrossCache>,
    length: usize,
    data: BatchData,
}

impl StackSource {
    fn batch_size(&self) -> Option<usize> {
        self.layers.first().map(CrossCache::batch_size)
    }

    fn select(&mut self, rows: &[usize]) {
        self.layers.iter_mut().for_each(|layer| layer.select(rows));
        self.data = self.data.select(rows);
    }
}

/// Keys and values of all blocks, and the source if there is one.
#[derive(Clone, Debug)]
pub struct StackCache {
    layers: Vec<KvCache>,
    source: Option<StackSource>,
    /// Of each row, where any has some.
    padding: Option<Vec<usize>>,
}

impl DecodingCache for StackCache {
    fn len(&self) -> usize {
        self.layers.first().map_or(0, KvCache::len)
    }

    fn truncate(&mut self, len: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(len));
    }

    fn batch_size(&self) -> Option<usize> {
        let of_padding = self.padding.as_ref().map(Vec::len);
        let of_source = self.source.as_ref().and_then(StackSource::batch_size);
        let of_keys = self.layers.first().and_then(KvCache::batch_size);
        of_padding.or(of_source).or(of_keys)
    }

    fn select(&mut self, rows: &[usize]) {
        self.layers.iter_mut().for_each(|layer| layer.select(rows));
        if let Some(source) = &mut self.source {
            source.select(rows);
        }
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

impl StackCache {
    /// The context of the next `seq_length` positions.
    pub(crate) fn context(&self, seq_length: usize) -> Context {
        let first_position = self.len();
        let lengths = Lengths::new(seq_length, first_position + seq_length);
        let context = Context::new(lengths.with_first_position(first_position));
        match &self.padding {
            Some(padding) => context.with_left_padding(padding),
            None => context,
        }
    }
}

impl Stack {
    /// Runs all blocks over a whole sequence.
    ///
    /// # Shapes
    ///
    /// - `x`, hidden states of the output: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// If the stack has cross-attention and there is no source, or the other way round.
    pub fn forward(
        &self,
        x: Tensor<3>,
        context: &Context,
        source: Option<&StackSource>,
    ) -> StackOutput {
        self.run(x, context, source, |block, stream, context, cross, _| {
            block.forward_stream(stream, context, cross)
        })
    }

    /// Runs all blocks over the next positions of a sequence whose earlier part is in the cache.
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward), and if the cache is of another stack: of another number of blocks, of other heads, or a
    /// ring of another pattern.
    pub fn forward_cached(
        &self,
        x: Tensor<3>,
        context: &Context,
        cache: &mut StackCache,
    ) -> Tensor<3> {
        let StackCache { layers, source, .. } = cache;
        assert!(
            layers.len() == self.blocks.len(),
            "cache: it is of {} blocks, the stack has {}",
            layers.len(),
            self.blocks.len()
        );
        self.run(
            x,
            context,
            source.as_ref(),
            |block, stream, context, cross, i| {
                block.forward_stream_cached(stream, context, cross, &mut layers[i])
            },
        )
        .hidden
    }

    /// How much each position takes of each position of the source in the last block, by head.
    ///
    /// # Shapes
    ///
    /// - `x`: `[batch_size, seq_length, d_model]`
    /// - output: `[batch_size, n_heads, seq_length, source_length]`
    ///
    /// # Panics
    ///
    /// If the stack has no cross-attention.
    pub fn cross_weights(
        &self,
        x: Tensor<3>,
        context: &Context,
        source: &StackSource,
    ) -> Tensor<4> {
        let n_before = self.blocks.len() - 1;
        let mut weights = None;
        self.run(
            x,
            context,
            Some(source),
            |block, stream, context, cross, i| {
                let (Some(mixer), Some(input), true) = (&block.cross, &cross, i == n_before) else {
                    return block.forward_stream(stream, context, cross);
                };
                let x = block.cross_input(stream.into_sum(), context);
                weights = Some(mixer.cross_weights(x.clone(), input.source, input.context));
                ResidualStream::new(x)
            },
        );
        weights.expect("a stack without cross-attention takes no source")
    }

    /// An empty cache for `capacity` positions; with the source that all of them attend to, if there is one.
    pub fn new_cache(&self, capacity: usize, source: Option<StackSource>) -> StackCache {
        let layer = |block: &Block| block.mixer.new_cache(capacity);
        StackCache {
            layers: self.blocks.iter().map(layer).collect(),
            source,
            padding: None,
        }
    }

    /// An empty cache of bounded memory for a sequence of any length: each block keeps what later queries see.
    ///
    /// # Errors
    ///
    /// A relative bias, or a block whose pattern has no bound on the past.
    pub fn new_ring_cache(
        &self,
        positions: CachePositions,
        source: Option<StackSource>,
    ) -> Result<StackCache, RingError> {
        if self.relative_bias.is_some() {
            return Err(RingError::RelativeBias);
        }
        let layer = |block: &Block| block.mixer.new_ring_cache(positions);
        Ok(StackCache {
            layers: self.blocks.iter().map(layer).collect::<Result<_, _>>()?,
            source,
            padding: None,
        })
    }

    /// Projects a source for all blocks.
    ///
    /// # Shapes
    ///
    /// - `source`: `[batch_size, source_length, d_model]`
    ///
    /// `data` are the padding and documents of the source.
    ///
    /// # Panics
    ///
    /// If the stack has no cross-attention.
    pub fn project_source(&self, source: Tensor<3>, data: BatchData) -> StackSource {
        let [_, length, _] = source.dims();
        let project = |block: &Block| match &block.cross {
            Some(cross) => cross.project_source(source.clone()),
            None => panic!("source: the stack has no cross-attention that could read it"),
        };
        StackSource {
            layers: self.blocks.iter().map(project).collect(),
            length,
            data,
        }
    }

    /// How many blocks route their tokens.
    pub fn n_routed_layers(&self) -> usize {
        let routes = |block: &&Block| matches!(block.feed_forward, FeedForwardLayer::Experts(_));
        self.blocks.iter().filter(routes).count()
    }

    /// The stack after a step of training, with what its blocks saw: see
    /// [`LossModel::after_step`](emberlm_core::LossModel::after_step). `first` is the number of the first block among the
    /// layers of the model.
    pub(crate) fn after_step(
        mut self,
        first: usize,
        routing: &[(usize, RoutingStatistics)],
    ) -> Self {
        for (layer, statistics) in routing {
            let block = layer
                .checked_sub(first)
                .and_then(|i| self.blocks.get_mut(i));
            if let Some(ResidualBlock {
                feed_forward: FeedForwardLayer::Experts(experts),
                ..
            }) = block
            {
                experts.after_step(statistics);
            }
        }
        self
    }

    fn run(
        &self,
        x: Tensor<3>,
        context: &Context,
        source: Option<&StackSource>,
        mut step: impl FnMut(&Block, ResidualStream, &Context, Cross<'_>, usize) -> ResidualStream,
    ) -> StackOutput {
        let [batch_size, query_length, _] = x.dims();
        let cross_context = source.map(|source| {
            let lengths = Lengths::new(query_length, source.length);
            Context::new(lengths).with_data(batch_size, source.data.clone())
        });
        let bias = self.relative_bias.as_ref();
        let context = match bias.map(|bias| bias.forward(&context.lengths)) {
            Some(bias) => &context.clone().with_bias(Some(bias)),
            None => context,
        };
        let mut stream = ResidualStream::new(x);
        let mut all_routing = Vec::new();
        for (i, block) in self.blocks.iter().enumerate() {
            let cross = source.zip(cross_context.as_ref());
            let cross = cross.map(|(source, context)| CrossInput {
                source: &source.layers[i],
                context,
            });
            stream = step(block, stream, &context.of_layer(i), cross, i);
            all_routing.extend(stream.take_routing().into_iter().map(|routing| {
                tell_of_numbers(i, &routing.statistics);
                LayerRouting {
                    layer: i,
                    ..routing
                }
            }));
        }
        StackOutput {
            hidden: match &self.norm {
                Some(norm) => stream.norm(norm).1,
                None => stream.into_sum(),
            },
            routing: all_routing,
        }
    }
}

/// Says that scores of a router are no numbers: the loss will be none either.
fn tell_of_numbers(layer: usize, statistics: &RoutingStatistics) {
    if statistics.n_not_finite > 0 {
        log::error!(
            "layer {layer}: the router's scores of {} of {} tokens are no numbers",
            statistics.n_not_finite,
            statistics.n_tokens
        );
    }
}

type Block = ResidualBlock<Mixer, FeedForwardLayer, MultiHeadAttention>;
type Cross<'a> = Option<CrossInput<'a, CrossCache>>;
