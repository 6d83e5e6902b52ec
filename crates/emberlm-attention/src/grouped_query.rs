//! Grouped-query attention: several query heads share one key/value head.

use burn::{
    config::Config,
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Device, Tensor},
};
use emberlm_core::{
    CachePositions, Context, InvalidConfig, KvCache, Pattern, RingError, RotaryConfig,
    SequenceMixer, assert_valid,
    operators::{project_all, rotate},
};

use crate::{
    ScoreCap,
    heads::{Scores, split_heads},
};

/// Configuration of [`GroupedQueryAttention`].
#[derive(Config, Debug)]
pub struct GroupedQueryAttentionConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Number of key/value heads; divides `n_heads`. Default: `n_heads`, which is multi-head attention; 1 is
    /// multi-query attention.
    pub n_kv_heads: Option<usize>,
    /// Width of a head. Default: `d_model / n_heads`.
    pub d_head: Option<usize>,
    /// Rotary embeddings of queries and keys, whose `d_head` must be this one's. Default: none.
    pub rotary: Option<RotaryConfig>,
    /// Whether the projections have biases. Default: false, as in Llama.
    #[config(default = false)]
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
    /// Patterns whose keys count once more, where a key may weigh more than once: a softmax over a multiset. Default: none.
    #[config(default = "Vec::new()")]
    pub repeats: Vec<Pattern>,
}

impl GroupedQueryAttentionConfig {
    /// Width of a head: as given, or `d_model / n_heads`.
    pub fn head_width(&self) -> usize {
        self.d_head.unwrap_or(self.d_model / self.n_heads.max(1))
    }

    /// Number of key/value heads: as given, or one a query head.
    pub fn kv_heads(&self) -> usize {
        self.n_kv_heads.unwrap_or(self.n_heads)
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, heads that do not divide evenly, a rotary width other than the head's, an impossible
    /// pattern, scale or slope, not one slope a head, or a dropout rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let Self {
            d_model, n_heads, ..
        } = *self;
        let n_kv_heads = self.kv_heads();
        InvalidConfig::require_positive(&[
            ("d_model", d_model),
            ("n_heads", n_heads),
            ("n_kv_heads", n_kv_heads),
            ("d_head", self.d_head.unwrap_or(1)),
        ])?;
        if self.d_head.is_none() && !d_model.is_multiple_of(n_heads) {
            return Err(InvalidConfig::HeadWidth { d_model, n_heads });
        }
        if !n_heads.is_multiple_of(n_kv_heads) {
            return Err(InvalidConfig::KeyValueHeads {
                n_heads,
                n_kv_heads,
            });
        }
        if let Some(rotary) = &self.rotary {
            rotary.validate()?;
            if rotary.d_head != self.head_width() {
                return Err(InvalidConfig::Range {
                    field: "rotary.d_head",
                    range: "the width of a head",
                    value: rotary.d_head as f64,
                });
            }
        }
        self.scores().validate(n_heads)
    }

    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> GroupedQueryAttention {
        assert_valid(self.validate());
        let linear = |d_input, d_output| {
            LinearConfig::new(d_input, d_output)
                .with_bias(self.bias)
                .init(device)
        };
        let query_width = self.n_heads * self.head_width();
        let kv_width = self.kv_heads() * self.head_width();
        GroupedQueryAttention {
            query: linear(self.d_model, query_width),
            key: linear(self.d_model, kv_width),
            value: linear(self.d_model, kv_width),
            output: linear(query_width, self.d_model),
            n_heads: self.n_heads,
            n_kv_heads: self.kv_heads(),
            rotary: self.rotary.clone(),
            scores: self.scores(),
        }
    }

    fn scores(&self) -> Scores {
        Scores {
            pattern: self.pattern.clone(),
            repeats: self.repeats.clone(),
            dropout: self.dropout,
            scale: self.scale,
            cap: self.cap,
            alibi: self.alibi.clone(),
        }
    }
}

/// Grouped-query attention with optional rotary embeddings.
///
/// Ainslie et al. 2023, <https://arxiv.org/abs/2305.13245>: as multi-head attention, but query head `h` reads
/// key/value head `h / (n_heads / n_kv_heads)`, so that the cache shrinks by that factor. The keys are cached after
/// their rotation, unless its frequencies change with the length (see [`RotaryConfig`]): then before, and all of them are
/// turned in each pass.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_attention::GroupedQueryAttentionConfig;
/// use emberlm_core::{Context, Lengths, Pattern, RotaryConfig, SequenceMixer};
///
/// let device = Device::flex();
/// let attention = GroupedQueryAttentionConfig::new(16, 4)
///     .with_n_kv_heads(Some(2))
///     .with_rotary(Some(RotaryConfig::new(4)))
///     .with_pattern(Pattern::causal())
///     .init(&device);
/// let context = Context::new(Lengths::square(5));
/// let y = attention.forward(Tensor::ones([1, 5, 16], &device), &context);
/// assert_eq!(y.dims(), [1, 5, 16]);
/// ```
#[derive(Module, Debug)]
pub struct GroupedQueryAttention {
    /// `[d_model, n_heads * d_head]`
    pub query: Linear,
    /// `[d_model, n_kv_heads * d_head]`
    pub key: Linear,
    /// `[d_model, n_kv_heads * d_head]`
    pub value: Linear,
    /// `[n_heads * d_head, d_model]`
    pub output: Linear,
    n_heads: usize,
    n_kv_heads: usize,
    #[module(skip)]
    rotary: Option<RotaryConfig>,
    #[module(skip)]
    scores: Scores,
}

impl GroupedQueryAttention {
    /// Query, key and value of the positions of `x`, not turned.
    fn heads(&self, x: Tensor<3>) -> [Tensor<4>; 3] {
        let [query, key, value] = project_all([&self.query, &self.key, &self.value], x);
        let query = split_heads(query, self.n_heads);
        let [key, value] = [key, value].map(|x| split_heads(x, self.n_kv_heads));
        [query, key, value]
    }

    /// Turns what stands at `first_position` and later.
    fn turn(&self, [query, key]: [Tensor<4>; 2], first_position: usize) -> [Tensor<4>; 2] {
        match &self.rotary {
            Some(rotary) => rotary.forward_all([query, key], first_position),
            None => [query, key],
        }
    }

    /// A rotary embedding whose keys cannot be cached after their rotation.
    fn rotary_of_uncached(&self, cache: &KvCache) -> Option<&RotaryConfig> {
        let rotary = self.rotary.as_ref();
        rotary.filter(|rotary| cache.counts_in_cache() || rotary.scaling.changes_with_length())
    }

    /// An empty cache whose memory is bounded by what later queries see.
    ///
    /// # Errors
    ///
    /// A pattern without a bound on the past; rotary frequencies that change with the length, where positions are
    /// absolute.
    pub fn new_ring_cache(&self, positions: CachePositions) -> Result<KvCache, RingError> {
        let rotary = self.rotary.as_ref();
        let changes = rotary.is_some_and(|rotary| rotary.scaling.changes_with_length());
        if changes && positions == CachePositions::Absolute {
            return Err(RingError::ChangesWithLength);
        }
        self.scores.new_ring_cache(positions)
    }
}

impl SequenceMixer for GroupedQueryAttention {
    type Cache = KvCache;

    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let [query, key, value] = self.heads(x);
        let [query, key] = self.turn([query, key], context.lengths.first_position);
        self.scores
            .attend([query, key, value], &self.output, context)
    }

    fn forward_cached(&self, x: Tensor<3>, context: &Context, cache: &mut KvCache) -> Tensor<3> {
        let first_position = context.lengths.first_position;
        let [query, key, value] = self.heads(x);
        let heads = if let Some(rotary) = self.rotary_of_uncached(cache) {
            let (key, value) = cache.append(key, value);
            let n_slots = cache.slots().n_slots();
            let first_slot = first_position - cache.slots().gap();
            let [query] = rotate([query], &rotary.rotation(first_slot, n_slots));
            let [key] = rotate([key], &rotary.rotation(0, n_slots));
            [query, key, value]
        } else {
            let [query, key] = self.turn([query, key], first_position);
            let (key, value) = cache.append(key, value);
            [query, key, value]
        };
        self.scores
            .attend_cached(heads, &self.output, context, cache)
    }

    fn new_cache(&self, capacity: usize) -> KvCache {
        KvCache::new(capacity)
    }
}
