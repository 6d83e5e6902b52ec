//! Multi-head attention, within one sequence or from one sequence to another.

use burn::{
    config::Config,
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Device, Tensor},
};
use emberlm_core::{
    CachePositions, Context, CrossMixer, InvalidConfig, KvCache, Pattern, RingError, SequenceMixer,
    assert_valid,
    operators::{project, project_all},
    select_rows,
};

use crate::{
    ScoreCap,
    heads::{Scores, split_heads},
};

/// Configuration of [`MultiHeadAttention`].
#[derive(Config, Debug)]
pub struct MultiHeadAttentionConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads; divides `d_model`.
    pub n_heads: usize,
    /// Width of the sequence that keys and values come from. Default: `d_model`.
    pub d_source: Option<usize>,
    /// Whether the projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Dropout on the attention weights. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
    /// Factor of the products of queries and keys. Default: `1 / sqrt(d_head)`; T5 has 1.
    pub scale: Option<f64>,
    /// Bound on the scores. Default: none.
    #[config(default = "ScoreCap::None")]
    pub cap: ScoreCap,
    /// ALiBi: what a score loses for each step between query and key, one slope a query head;
    /// [`alibi_slopes`](emberlm_core::alibi_slopes) gives the published ones. Default: none.
    pub alibi: Option<Vec<f64>>,
    /// Which keys a query sees. Default: all.
    #[config(default = "Pattern::full()")]
    pub pattern: Pattern,
}

impl MultiHeadAttentionConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, heads that do not divide the width, an impossible pattern, scale or slope, not one slope a head, or a
    /// dropout rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let Self {
            d_model, n_heads, ..
        } = *self;
        InvalidConfig::require_positive(&[
            ("d_model", d_model),
            ("n_heads", n_heads),
            ("d_source", self.d_source.unwrap_or(d_model)),
        ])?;
        if !d_model.is_multiple_of(n_heads) {
            return Err(InvalidConfig::HeadWidth { d_model, n_heads });
        }
        self.scores().validate(n_heads)
    }

    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> MultiHeadAttention {
        assert_valid(self.validate());
        let linear = |d_input| {
            LinearConfig::new(d_input, self.d_model)
                .with_bias(self.bias)
                .init(device)
        };
        let d_source = self.d_source.unwrap_or(self.d_model);
        MultiHeadAttention {
            query: linear(self.d_model),
            key: linear(d_source),
            value: linear(d_source),
            output: linear(self.d_model),
            n_heads: self.n_heads,
            scores: self.scores(),
        }
    }

    fn scores(&self) -> Scores {
        Scores {
            pattern: self.pattern.clone(),
            repeats: Vec::new(),
            dropout: self.dropout,
            scale: self.scale,
            cap: self.cap,
            alibi: self.alibi.clone(),
        }
    }
}

/// Multi-head attention: `head_i = attention(x W_i^Q, s W_i^K, s W_i^V)`, the heads joined and projected.
///
/// Vaswani et al. 2017, section 3.2.2, <https://arxiv.org/abs/1706.03762>. As a [`SequenceMixer`] the source `s` is
/// `x` itself; as a [`CrossMixer`] it is another sequence.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_attention::MultiHeadAttentionConfig;
/// use emberlm_core::{Context, Lengths, Pattern, SequenceMixer};
///
/// let device = Device::flex();
/// let attention = MultiHeadAttentionConfig::new(8, 2)
///     .with_pattern(Pattern::causal())
///     .init(&device);
/// let context = Context::new(Lengths::square(5));
/// let y = attention.forward(Tensor::ones([1, 5, 8], &device), &context);
/// assert_eq!(y.dims(), [1, 5, 8]);
/// ```
#[derive(Module, Debug)]
pub struct MultiHeadAttention {
    /// `[d_model, d_model]`
    pub query: Linear,
    /// `[d_source, d_model]`
    pub key: Linear,
    /// `[d_source, d_model]`
    pub value: Linear,
    /// `[d_model, d_model]`
    pub output: Linear,
    n_heads: usize,
    #[module(skip)]
    scores: Scores,
}

/// Keys and values of a source sequence, projected once for all decoding steps.
#[derive(Clone, Debug)]
pub struct CrossCache {
    key: Tensor<4>,
    value: Tensor<4>,
}

impl CrossCache {
    /// Number of sources.
    pub fn batch_size(&self) -> usize {
        self.key.dims()[0]
    }

    /// Row `i` becomes what row `rows[i]` was, as in [`KvCache::select`].
    ///
    /// # Panics
    ///
    /// If there is no such row.
    pub fn select(&mut self, rows: &[usize]) {
        self.key = select_rows(self.key.clone(), rows);
        self.value = select_rows(self.value.clone(), rows);
    }
}

impl MultiHeadAttention {
    /// Query, key and value of one sequence.
    fn heads(&self, x: Tensor<3>) -> [Tensor<4>; 3] {
        project_all([&self.query, &self.key, &self.value], x).map(|x| split_heads(x, self.n_heads))
    }

    /// How much each position of `x` takes of each position of the source, by head; over the source the weights add up to
    /// 1.
    ///
    /// # Shapes
    ///
    /// - `x`: `[batch_size, seq_length, d_model]`
    /// - output: `[batch_size, n_heads, seq_length, source_length]`
    ///
    /// # Panics
    ///
    /// If the lengths are not the context's, or the pattern does not fit them.
    pub fn cross_weights(&self, x: Tensor<3>, source: &CrossCache, context: &Context) -> Tensor<4> {
        let query = split_heads(project(&self.query, x), self.n_heads);
        self.scores.weights(query, source.key.clone(), context)
    }

    fn attend(&self, heads: [Tensor<4>; 3], context: &Context) -> Tensor<3> {
        self.scores.attend(heads, &self.output, context)
    }

    /// An empty cache whose memory is bounded by what later queries see.
    ///
    /// # Errors
    ///
    /// A pattern without a bound on the past.
    pub fn new_ring_cache(&self, positions: CachePositions) -> Result<KvCache, RingError> {
        self.scores.new_ring_cache(positions)
    }
}

impl CrossMixer for MultiHeadAttention {
    type Source = CrossCache;

    fn project_source(&self, source: Tensor<3>) -> CrossCache {
        let heads = project_all([&self.key, &self.value], source);
        let [key, value] = heads.map(|x| split_heads(x, self.n_heads));
        CrossCache { key, value }
    }

    /// # Panics
    ///
    /// If the lengths are not the context's, or the pattern does not fit them.
    fn forward_cross(&self, x: Tensor<3>, source: &CrossCache, context: &Context) -> Tensor<3> {
        let query = split_heads(project(&self.query, x), self.n_heads);
        self.attend([query, source.key.clone(), source.value.clone()], context)
    }
}

impl SequenceMixer for MultiHeadAttention {
    type Cache = KvCache;

    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        assert_eq!(
            self.query.weight.lazy_shape()[0],
            self.key.weight.lazy_shape()[0],
            "d_source: a sequence attends to itself, so the widths of both are the same"
        );
        self.attend(self.heads(x), context)
    }

    fn forward_cached(&self, x: Tensor<3>, context: &Context, cache: &mut KvCache) -> Tensor<3> {
        let [query, key, value] = self.heads(x);
        let (key, value) = cache.append(key, value);
        self.scores
            .attend_cached([query, key, value], &self.output, context, cache)
    }

    fn new_cache(&self, capacity: usize) -> KvCache {
        KvCache::new(capacity)
    }
}
