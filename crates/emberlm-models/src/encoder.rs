//! The encoder: a stack that sees the whole sequence, with BERT's heads.

use burn::{
    config::Config,
    module::{Module, Param},
    nn::{Initializer, Linear, LinearConfig},
    tensor::{Device, Int, Tensor, TensorData, s},
};
use emberlm_core::{
    Activation, BatchData, CrossEntropyConfig, Gpt2Init, IGNORED_TARGET, InvalidConfig, LossModel,
    ModelLoss, Norm, NormConfig, NormPlacement, Pattern, RandomKey, RoutingStatistics, TokenBatch,
    assert_valid,
    operators::{activate, cross_entropy, linear, project},
};

use crate::{
    ExpertLayers, FeedForwardKind, LayerAttention, PositionsConfig, Stack, StackConfig,
    StackOutput, TokenEmbedding, TokenEmbeddingConfig,
};

/// Configuration of an [`Encoder`]. The defaults are BERT's.
#[derive(Config, Debug)]
pub struct EncoderConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads; divides `d_model`.
    pub n_heads: usize,
    /// Inner width of the feed-forward layers. Default: `4 d_model`.
    pub d_ff: Option<usize>,
    /// Positions. Default: 512 learned ones.
    #[config(default = "PositionsConfig::Learned { max_seq_length: 512 }")]
    pub positions: PositionsConfig,
    /// Number of token types. Default: 2, the segments of a pair.
    #[config(default = 2)]
    pub n_types: usize,
    /// Norm. Default: layer norm with bias, epsilon 1e-12.
    #[config(default = "NormConfig::Layer { epsilon: 1e-12, bias: true }")]
    pub norm: NormConfig,
    /// Where the norms stand; with post-norm the embedding is normed too, as in BERT. Default: post-norm.
    #[config(default = "NormPlacement::Post")]
    pub norm_placement: NormPlacement,
    /// Kind of feed-forward layer. Default: plain.
    #[config(default = "FeedForwardKind::Plain")]
    pub feed_forward: FeedForwardKind,
    /// Blocks that have a mixture of experts in place of that layer. Default: none.
    pub experts: Option<ExpertLayers>,
    /// Non-linearity of the feed-forward layers and of the masked head. Default: exact GELU.
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Whether the linear projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Dropout on the embeddings, the attention weights and the residual additions. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Which tokens a token sees. Default: all.
    #[config(default = "Pattern::full()")]
    pub pattern: Pattern,
    /// How each block attends, where they differ: takes the place of `pattern`. Default: all as `pattern` says.
    pub layers: Option<Vec<LayerAttention>>,
    /// Whether there is a head that scores hidden tokens. Default: true.
    #[config(default = true)]
    pub masked_head: bool,
    /// Whether there is a pooler. Default: false.
    #[config(default = false)]
    pub pooler: bool,
    /// Seed of the initialisation. Default: 0.
    #[config(default = 0)]
    pub seed: u64,
}

impl EncoderConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, widths that do not divide evenly, an impossible pattern, one that names positions beyond the learned
    /// ones, or a rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.embedding().validate()?;
        self.stack().validate()?;
        self.stack().check_longest(self.positions.max_seq_length())
    }

    /// Makes the model, initialised from `seed`: the same values on every backend. BERT draws all weights from N(0, 0.02);
    /// here those that write into the residual stream are smaller with depth, as in GPT-2.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> Encoder {
        assert_valid(self.validate());
        let square = || LinearConfig::new(self.d_model, self.d_model).init(device);
        let encoder = Encoder {
            embedding: self.embedding().init(device),
            stack: self.stack().init(device),
            masked_head: self.masked_head.then(|| MaskedHead {
                dense: square(),
                norm: self.norm.init(self.d_model, device),
                bias: Initializer::Zeros.init([self.vocab_size], device),
                activation: self.activation,
            }),
            pooler: self.pooler.then(square),
        };
        Gpt2Init::new(self.n_layers, self.seed).apply(encoder)
    }

    fn embedding(&self) -> TokenEmbeddingConfig {
        let is_post = self.norm_placement == NormPlacement::Post;
        TokenEmbeddingConfig::new(self.vocab_size, self.d_model, self.positions.clone())
            .with_n_types(self.n_types)
            .with_norm(is_post.then(|| self.norm.clone()))
            .with_dropout(self.dropout)
    }

    fn stack(&self) -> StackConfig {
        let stack = StackConfig::new(self.n_layers, self.d_model, self.n_heads)
            .with_d_ff(self.d_ff)
            .with_norm(self.norm.clone())
            .with_norm_placement(self.norm_placement)
            .with_feed_forward(self.feed_forward)
            .with_experts(self.experts.clone())
            .with_activation(self.activation)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
            .with_pattern(self.pattern.clone())
            .with_layers(self.layers.clone());
        self.positions.apply(stack, true)
    }
}

/// An encoder-only Transformer: hidden states that have seen the whole sequence.
///
/// Devlin et al. 2018 (BERT), <https://arxiv.org/abs/1810.04805>. Difference: BERT has no dropout on the inner
/// activations of the feed-forward layers; `dropout` here is on them too.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use emberlm_core::BatchData;
/// use emberlm_models::EncoderConfig;
///
/// let device = Device::flex();
/// let model = EncoderConfig::new(256, 2, 32, 4).init(&device);
/// let tokens = Tensor::<2, Int>::zeros([1, 7], &device);
/// let hidden = model.hidden_states(tokens, None, BatchData::new(), None);
/// assert_eq!(model.masked_scores(hidden).dims(), [1, 7, 256]);
/// ```
#[derive(Module, Debug)]
pub struct Encoder {
    /// Token vectors, positions and types.
    pub embedding: TokenEmbedding,
    /// The blocks.
    pub stack: Stack,
    /// Scores hidden tokens.
    pub masked_head: Option<MaskedHead>,
    /// `[d_model, d_model]`, of the first position.
    pub pooler: Option<Linear>,
}

/// BERT's head: `norm(f(dense(h))) E^T + bias`, with the table `E` of the embedding.
#[derive(Module, Debug)]
pub struct MaskedHead {
    /// `[d_model, d_model]`
    pub dense: Linear,
    /// Norm before the table.
    pub norm: Norm,
    /// `[vocab_size]`
    pub bias: Param<Tensor<1>>,
    #[module(skip)]
    activation: Activation,
}

impl Encoder {
    /// The hidden states of the last block.
    ///
    /// # Shapes
    ///
    /// - `tokens`, `types`: `[batch_size, seq_length]`; without `types` all tokens are of the first type
    /// - output: `[batch_size, seq_length, d_model]`
    ///
    /// Padding and documents of the rows come in `data`.
    ///
    /// # Panics
    ///
    /// If the sequence is longer than the learned positions.
    pub fn hidden_states(
        &self,
        tokens: Tensor<2, Int>,
        types: Option<Tensor<2, Int>>,
        data: BatchData,
        dropout_key: Option<RandomKey>,
    ) -> Tensor<3> {
        let (x, context) = self.embedding.whole(tokens, types, data, dropout_key);
        self.stack.forward(x, &context, None).hidden
    }

    /// What the stack makes of the inputs of a batch.
    pub(crate) fn read(&self, batch: &TokenBatch) -> StackOutput {
        let (inputs, data) = (batch.inputs.clone(), batch.data.clone());
        let (x, context) = self.embedding.whole(inputs, None, data, batch.dropout_key);
        let context = context.with_so_far(batch.so_far.clone());
        self.stack.forward(x, &context, None)
    }

    /// `tanh(pooler(h_0))` of the first position: `[batch_size, seq_length, d_model]` to `[batch_size, d_model]`.
    ///
    /// # Panics
    ///
    /// If the model has no pooler.
    pub fn pooled(&self, hidden: Tensor<3>) -> Tensor<2> {
        let pooler = self.pooler.as_ref().expect("pooler: the model has none");
        project(pooler, hidden.slice(s![.., 0..1, ..]).squeeze_dim::<2>(1)).tanh()
    }

    /// Scores of the token at each position.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[.., d_model]`
    /// - output: `[.., vocab_size]`
    ///
    /// # Panics
    ///
    /// If the model has no masked head.
    pub fn masked_scores<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        let head = self
            .masked_head
            .as_ref()
            .expect("masked_head: the model has none");
        let product = project(&head.dense, hidden);
        let hidden = head.norm.forward(activate(head.activation, product, None));
        let columns = self.embedding.tokens.weight.val().transpose();
        linear(hidden, columns, Some(head.bias.val()))
    }
}

impl LossModel for Encoder {
    /// The loss of the masked head, which scores the positions with a target alone.
    ///
    /// # Panics
    ///
    /// If there is no masked head, or the batch has a source.
    fn loss(&self, batch: TokenBatch, config: &CrossEntropyConfig) -> ModelLoss {
        assert!(
            batch.source.is_none(),
            "source: an encoder-only model reads its inputs alone"
        );
        let StackOutput { hidden, routing } = self.read(&batch);
        let (hidden, targets) = with_targets(hidden, batch.targets);
        ModelLoss {
            cross_entropy: cross_entropy(config, self.masked_scores(hidden), targets, None),
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

/// The hidden states of the positions with a target, and those targets: `[batch_size, seq_length, d_model]` and
/// `[batch_size, seq_length]` to `[n_targets, d_model]` and `[n_targets]`.
pub(crate) fn with_targets(
    hidden: Tensor<3>,
    targets: Tensor<2, Int>,
) -> (Tensor<2>, Tensor<1, Int>) {
    let ([batch_size, seq_length, d_model], device) = (hidden.dims(), hidden.device());
    let targets = targets.into_data();
    let counting: Vec<(i64, i64)> = (0..)
        .zip(targets.iter::<i64>())
        .filter(|(_, target)| *target != IGNORED_TARGET)
        .collect();
    let indices = |values: Vec<i64>| {
        let data = TensorData::new(values, [counting.len()]);
        Tensor::<1, Int>::from_data(data, &device)
    };
    let positions = indices(counting.iter().map(|(position, _)| *position).collect());
    let targets = indices(counting.iter().map(|(_, target)| *target).collect());
    let hidden = hidden.reshape([batch_size * seq_length, d_model]);
    (hidden.select(0, positions), targets)
}
