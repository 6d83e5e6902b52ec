//! Longformer's attention: a sliding window, and global tokens with projections of their own.

use burn::{
    config::Config,
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Bool, Device, IndexingUpdateOp, Int, Tensor, TensorData},
};
use emberlm_core::{
    CachePositions, Context, Global, InvalidConfig, KvCache, Pattern, RingError, RotaryConfig,
    SequenceMixer, Window, assert_valid,
    operators::{project, project_all},
};

use crate::{
    ScoreCap,
    heads::{Scores, merge_heads, split_heads},
};

/// Configuration of [`LongformerAttention`].
#[derive(Config, Debug)]
pub struct LongformerAttentionConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads; divides `d_model`.
    pub n_heads: usize,
    /// The keys around a query that it sees. The two published readings of a window's size are
    /// [`Window::one_sided`] (AllenAI's code) and [`Window::total`] (Hugging Face's).
    pub window: Window,
    /// Distance of neighbouring keys in the window, for each head, as in section 4.1 of the paper. Default: 1, no gaps.
    pub dilations: Option<Vec<usize>>,
    /// Tokens that see all and that all see. Default: none.
    #[config(default = "Global::First(0)")]
    pub global: Global,
    /// Whether a token sees none of the later ones, global or not: the autoregressive mode of section 4. Default: false.
    #[config(default = false)]
    pub causal: bool,
    /// Rotary embeddings of queries and keys, in both kinds of projections. Default: none, as in the paper.
    pub rotary: Option<RotaryConfig>,
    /// ALiBi: what a score loses for each step between query and key, one slope a head. Default: none.
    pub alibi: Option<Vec<f64>>,
    /// Whether the projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Dropout on the attention weights. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

impl LongformerAttentionConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, heads that do not divide the width, not one dilation a head, dilations of a window without neighbours,
    /// global positions that do not rise, or a
    /// dropout rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let Self {
            d_model, n_heads, ..
        } = *self;
        InvalidConfig::require_positive(&[("d_model", d_model), ("n_heads", n_heads)])?;
        if !d_model.is_multiple_of(n_heads) {
            return Err(InvalidConfig::HeadWidth { d_model, n_heads });
        }
        let n_dilations = self.dilations.as_ref().map_or(n_heads, Vec::len);
        if n_dilations != n_heads {
            return Err(InvalidConfig::Range {
                field: "dilations",
                range: "one a head",
                value: n_dilations as f64,
            });
        }
        for dilation in self.dilations.iter().flatten() {
            InvalidConfig::require_positive(&[("dilations", *dilation)])?;
            if *dilation > 1 && self.window.back == 0 && (self.causal || self.window.ahead == 0) {
                return Err(InvalidConfig::Unsupported {
                    field: "dilations",
                    reason: "the window leaves a query no key but its own, so there are none to be farther apart",
                });
            }
        }
        if let Some(rotary) = &self.rotary {
            rotary.validate()?;
            if rotary.scaling.changes_with_length() {
                return Err(InvalidConfig::Unsupported {
                    field: "rotary.scaling",
                    reason: "Longformer's cache holds keys that are turned already",
                });
            }
        }
        self.local().validate(n_heads)
    }

    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> LongformerAttention {
        assert_valid(self.validate());
        let square = || {
            LinearConfig::new(self.d_model, self.d_model)
                .with_bias(self.bias)
                .init(device)
        };
        LongformerAttention {
            query: square(),
            key: square(),
            value: square(),
            global_query: square(),
            global_key: square(),
            global_value: square(),
            output: square(),
            n_heads: self.n_heads,
            rotary: self.rotary.clone(),
            tokens: self.global.clone(),
            causal: self.causal,
            local: self.local(),
            of_global: self.scores(Pattern::GlobalQueries(self.global.clone())),
        }
    }

    /// What a token sees by the projections that all tokens have: its window and the global tokens.
    fn local(&self) -> Scores {
        let window = |dilation| match dilation {
            1 => Pattern::window(self.window),
            dilation => Pattern::dilated(self.window, dilation),
        };
        let window = match &self.dilations {
            None => window(1),
            Some(all) if all.iter().all(|dilation| *dilation == all[0]) => window(all[0]),
            Some(all) => Pattern::per_head(all.iter().copied().map(window).collect::<Vec<_>>()),
        };
        self.scores(match self.global.is_empty() {
            true => window,
            false => window | Pattern::GlobalKeys(self.global.clone()),
        })
    }

    fn scores(&self, pattern: Pattern) -> Scores {
        Scores {
            pattern: match self.causal {
                true => Pattern::causal() & pattern,
                false => pattern,
            },
            repeats: Vec::new(),
            dropout: self.dropout,
            scale: None,
            cap: ScoreCap::None,
            alibi: self.alibi.clone(),
        }
    }
}

/// Longformer's attention.
///
/// Beltagy et al. 2020, <https://arxiv.org/abs/2004.05150>, section 3. With the global tokens `G` and the window `W_i` of
/// token `i`,
///
/// ```text
/// o_i = attention(q_i, K[W_i and G], V[W_i and G])     i not in G
/// o_g = attention(q'_g, K', V')                        g in G, over all tokens
/// q = x W_q, k = x W_k, v = x W_v;  q' = x W'_q, k' = x W'_k, v' = x W'_v
/// ```
///
/// A local token sees a global one by the projections that all tokens have. `causal` takes the later tokens from both
/// lines. Differences from Hugging Face's `LongformerSelfAttention`: the output projection belongs to the module; any
/// length; dilation and the causal mode, which it has dropped; a padded query is not zeroed.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_attention::LongformerAttentionConfig;
/// use emberlm_core::{Context, Global, Lengths, SequenceMixer, Window};
///
/// let device = Device::flex();
/// let attention = LongformerAttentionConfig::new(16, 4, Window::total(6))
///     .with_global(Global::Positions(vec![0, 9]))
///     .init(&device);
/// let context = Context::new(Lengths::square(20));
/// let y = attention.forward(Tensor::ones([1, 20, 16], &device), &context);
/// assert_eq!(y.dims(), [1, 20, 16]);
/// ```
#[derive(Module, Debug)]
pub struct LongformerAttention {
    /// `[d_model, d_model]`
    pub query: Linear,
    /// `[d_model, d_model]`
    pub key: Linear,
    /// `[d_model, d_model]`
    pub value: Linear,
    /// `[d_model, d_model]`, of the global tokens.
    pub global_query: Linear,
    /// `[d_model, d_model]`, of what global tokens see.
    pub global_key: Linear,
    /// `[d_model, d_model]`, of what global tokens see.
    pub global_value: Linear,
    /// `[d_model, d_model]`
    pub output: Linear,
    n_heads: usize,
    #[module(skip)]
    rotary: Option<RotaryConfig>,
    #[module(skip)]
    tokens: Global,
    causal: bool,
    #[module(skip)]
    local: Scores,
    #[module(skip)]
    of_global: Scores,
}

// A part of a layer's random key.
const GLOBAL: u64 = 0;

impl LongformerAttention {
    fn split(&self, x: Tensor<3>) -> Tensor<4> {
        split_heads(x, self.n_heads)
    }

    /// Query, key and value by the projections that all tokens have, not turned.
    fn local_heads(&self, x: Tensor<3>) -> [Tensor<4>; 3] {
        let heads = project_all([&self.query, &self.key, &self.value], x);
        heads.map(|x| self.split(x))
    }

    /// Key and value by the projections of the global tokens, not turned.
    fn global_heads(&self, x: Tensor<3>) -> [Tensor<4>; 2] {
        let heads = project_all([&self.global_key, &self.global_value], x);
        heads.map(|x| self.split(x))
    }

    /// Query of the global tokens alone, not turned.
    fn global_queries(&self, x: Tensor<3>, rows: &GlobalRows) -> Tensor<4> {
        let indices = to_indices(&rows.all(), &x.device());
        self.split(project(&self.global_query, x.select(1, indices)))
    }

    /// Turns what stands at the positions of the queries.
    fn turn<const N: usize>(&self, heads: [Tensor<4>; N], context: &Context) -> [Tensor<4>; N] {
        match &self.rotary {
            Some(rotary) => rotary.forward_all(heads, context.lengths.first_position),
            None => heads,
        }
    }

    /// What [`forward`](SequenceMixer::forward) does between its projections: turns by the rotary embeddings, if there
    /// are any, and attends both ways.
    ///
    /// # Shapes
    ///
    /// - `local`: query, key and value by the projections that all tokens have, `[batch_size, n_heads, seq_length, d_head]`
    /// - `global`: by the other projections; the query of the tokens that are global in any batch row, in their order,
    ///   `[batch_size, n_heads, n_global, d_head]`, and key and value of all tokens, as above. Nothing where no token is
    ///   global.
    /// - output: `[batch_size, n_heads, seq_length, d_head]`
    ///
    /// # Panics
    ///
    /// As [`forward`](SequenceMixer::forward), and if `global` is not there for the tokens that are global.
    pub fn attend_heads(
        &self,
        local: [Tensor<4>; 3],
        global: Option<[Tensor<4>; 3]>,
        context: &Context,
    ) -> Tensor<4> {
        let [query, key, value] = local;
        let [query, key] = self.turn([query, key], context);
        let joined = self.local.attend_heads([query, key, value], context);
        match (self.rows(context), global) {
            (None, None) => joined,
            (Some(rows), Some([query, key, value])) => {
                let [key] = self.turn([key], context);
                let heads = [query, key, value];
                self.with_global_rows(joined, &rows, heads, (&self.of_global, context, context))
            }
            (None, Some(_)) => panic!("global: heads are given, but no token is global"),
            (Some(_), None) => panic!("global: tokens are global, but no heads are given"),
        }
    }

    /// Puts the outputs of the global tokens in the place of what the window gave them. Their query is not turned yet,
    /// the key is.
    fn with_global_rows(
        &self,
        local: Tensor<4>,
        rows: &GlobalRows,
        [query, key, value]: [Tensor<4>; 3],
        (scores, absolute, context): (&Scores, &Context, &Context),
    ) -> Tensor<4> {
        let all = rows.all();
        let (n_queries, n_global) = (query.dims()[2], all.len());
        assert!(
            n_queries == n_global,
            "global: {n_queries} queries, but {n_global} tokens are global"
        );
        let indices = to_indices(&all, &local.device());
        // At their positions; queries that are not global may be anything.
        let spread = |query: Tensor<4>| {
            let zeros = Tensor::zeros(local.dims(), (&local.device(), local.dtype()));
            zeros.select_assign(2, indices.clone(), query, IndexingUpdateOp::Add)
        };
        let turned = |query: Tensor<4>| {
            let [query] = self.turn([spread(query)], absolute);
            query
        };
        let context = context.fold(GLOBAL);
        let outputs = if self.attends_in_place() {
            let outputs = scores.attend_heads([turned(query), key, value], &context);
            outputs.select(2, indices.clone())
        } else {
            let query = match &self.rotary {
                Some(_) => turned(query).select(2, indices.clone()),
                None => query,
            };
            let scores = Scores {
                pattern: Pattern::full(),
                ..scores.clone()
            };
            scores.attend_heads([query, key, value], &context.of_queries(&all))
        };
        // In the order in which attention leaves its output.
        let [local, outputs] = [local, outputs].map(|x| x.swap_dims(1, 2));
        let outputs = match rows.mask(&outputs) {
            None => outputs,
            Some(is_global) => {
                let of_window = local.clone().select(1, indices.clone());
                of_window.mask_where(is_global, outputs)
            }
        };
        let joined = local.select_assign(1, indices, outputs, IndexingUpdateOp::Assign);
        joined.swap_dims(1, 2)
    }

    /// Whether global queries have to stand at their positions when they attend.
    fn attends_in_place(&self) -> bool {
        self.causal || self.of_global.alibi.is_some()
    }

    /// The global tokens among the queries, if there are any.
    ///
    /// # Panics
    ///
    /// If the batch decides which are global, and does not say.
    fn rows(&self, context: &Context) -> Option<GlobalRows> {
        match context.global_queries(&self.tokens) {
            Ok(rows) => rows
                .iter()
                .any(|row| !row.is_empty())
                .then_some(GlobalRows(rows)),
            Err(error) => panic!("global: {error}"),
        }
    }

    /// An empty cache whose memory is bounded by window and global tokens, in the causal mode.
    ///
    /// # Errors
    ///
    /// Global tokens that the batch decides; positions that count in the cache, where there are rotary embeddings or
    /// ALiBi: keys are held as they are turned once.
    pub fn new_ring_cache(&self, positions: CachePositions) -> Result<KvCache, RingError> {
        let moves = self.rotary.is_some() || self.local.alibi.is_some();
        if moves && positions == CachePositions::InCache {
            return Err(RingError::InCache);
        }
        KvCache::ring(&self.visible(), positions)
    }

    /// All that a query sees, by either kind of projections.
    fn visible(&self) -> Pattern {
        self.local.pattern.clone() | self.of_global.pattern.clone()
    }
}

impl SequenceMixer for LongformerAttention {
    type Cache = KvCache;

    /// # Panics
    ///
    /// If the lengths are not the context's, or global positions do not fit them.
    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        let local = self.local_heads(x.clone());
        let global = self.rows(context).map(|rows| {
            let [key, value] = self.global_heads(x.clone());
            [self.global_queries(x, &rows), key, value]
        });
        let joined = self.attend_heads(local, global, context);
        project(&self.output, merge_heads(joined))
    }

    /// # Panics
    ///
    /// As [`forward`](Self::forward), and if the module is not causal, or the cache was made for another pattern or filled by
    /// another layer.
    fn forward_cached(&self, x: Tensor<3>, context: &Context, cache: &mut KvCache) -> Tensor<3> {
        cache.check_pattern(|| self.visible());
        let [query, key, value] = self.local_heads(x.clone());
        let [query, key] = self.turn([query, key], context);
        let (key, value) = match self.tokens.is_empty() {
            true => cache.append(key, value),
            false => {
                let [global_key, global_value] = self.global_heads(x.clone());
                let [global_key] = self.turn([global_key], context);
                // One cache, with the heads of both projections.
                let both = |local, global| Tensor::cat(vec![local, global], 1);
                cache.append(both(key, global_key), both(value, global_value))
            }
        };
        let part = |x: &Tensor<4>, first| x.clone().narrow(1, first, self.n_heads);
        let [local, of_global] =
            [&self.local, &self.of_global].map(|scores| scores.in_slots(context, cache, &query));
        let heads = [query, part(&key, 0), part(&value, 0)];
        let mut joined = local.0.attend_heads(heads, &local.1);
        if let Some(rows) = self.rows(context) {
            let [key, value] = [key, value].map(|x| part(&x, self.n_heads));
            let heads = [self.global_queries(x, &rows), key, value];
            let by = (&of_global.0, context, &of_global.1);
            joined = self.with_global_rows(joined, &rows, heads, by);
        }
        project(&self.output, merge_heads(joined))
    }

    fn new_cache(&self, capacity: usize) -> KvCache {
        KvCache::new(capacity)
    }
}

/// The queries that are global: the same in all batch rows, or a list for each.
struct GlobalRows(Vec<Vec<usize>>);

impl GlobalRows {
    /// Those that are global in any batch row.
    fn all(&self) -> Vec<usize> {
        let mut all = self.0.concat();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Which of them are in each batch row, over `[batch_size, n_global, n_heads, d_head]`; nothing where all are in all.
    fn mask(&self, outputs: &Tensor<4>) -> Option<Tensor<4, Bool>> {
        let all = self.all();
        if self.0.iter().all(|rows| *rows == all) {
            return None;
        }
        let in_row = |rows: &Vec<usize>| {
            let is_there = |row| rows.binary_search(row).is_ok();
            all.iter().map(is_there).collect::<Vec<_>>()
        };
        let mask: Vec<bool> = self.0.iter().flat_map(in_row).collect();
        let mask = TensorData::new(mask, [self.0.len(), all.len(), 1, 1]);
        let mask = Tensor::<4, Bool>::from_data(mask, &outputs.device());
        Some(mask.expand(outputs.dims()))
    }
}

fn to_indices(rows: &[usize], device: &Device) -> Tensor<1, Int> {
    let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
    let n = rows.len();
    Tensor::from_data(TensorData::new(rows, [n]), device)
}
