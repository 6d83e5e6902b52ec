//! Attention to the last keys.

use burn::{config::Config, tensor::Device};
use emberlm_core::{InvalidConfig, Pattern, RotaryConfig, Window};

use crate::{GroupedQueryAttention, GroupedQueryAttentionConfig};

/// Configuration of sliding-window attention: a token sees the last `window` tokens, itself among them, and the first
/// `n_sinks`.
///
/// Jiang et al. 2023 (Mistral), <https://arxiv.org/abs/2310.06825>, section 2: `i - window < j <= i`. With sinks it is
/// StreamingLLM, Xiao et al. 2023, <https://arxiv.org/abs/2309.17453>, whose cache is
/// [`new_ring_cache`](GroupedQueryAttention::new_ring_cache) with
/// [`CachePositions::InCache`](emberlm_core::CachePositions::InCache).
///
/// ```
/// use emberlm_attention::SlidingWindowAttentionConfig;
///
/// let config = SlidingWindowAttentionConfig::new(64, 4, 256).with_n_sinks(4);
/// assert_eq!(config.pattern().to_string(), "causal & (window:255:0 | sinks:4)");
/// ```
#[derive(Config, Debug)]
pub struct SlidingWindowAttentionConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of query heads.
    pub n_heads: usize,
    /// Tokens in the window, the query's own among them.
    pub window: usize,
    /// First tokens that all see. Default: none.
    #[config(default = 0)]
    pub n_sinks: usize,
    /// Number of key/value heads. Default: one a query head.
    pub n_kv_heads: Option<usize>,
    /// Rotary embeddings of queries and keys. Default: none.
    pub rotary: Option<RotaryConfig>,
    /// Whether the projections have biases. Default: false.
    #[config(default = false)]
    pub bias: bool,
    /// Dropout on the attention weights. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

/// Sliding-window attention: attention whose pattern is that of a [`SlidingWindowAttentionConfig`].
pub type SlidingWindowAttention = GroupedQueryAttention;

impl SlidingWindowAttentionConfig {
    /// The keys that a query sees.
    ///
    /// # Panics
    ///
    /// If the window is empty.
    pub fn pattern(&self) -> Pattern {
        let window = Pattern::window(Window::causal(self.window));
        match self.n_sinks {
            0 => Pattern::causal() & window,
            n => Pattern::causal() & (window | Pattern::sinks(n)),
        }
    }

    /// The general attention with this pattern.
    ///
    /// # Panics
    ///
    /// If the window is empty.
    pub fn attention(&self) -> GroupedQueryAttentionConfig {
        GroupedQueryAttentionConfig::new(self.d_model, self.n_heads)
            .with_n_kv_heads(self.n_kv_heads)
            .with_rotary(self.rotary.clone())
            .with_bias(self.bias)
            .with_dropout(self.dropout)
            .with_pattern(self.pattern())
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, and what [`GroupedQueryAttentionConfig::validate`] finds.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[("window", self.window)])?;
        self.attention().validate()
    }

    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> SlidingWindowAttention {
        emberlm_core::assert_valid(self.validate());
        self.attention().init(device)
    }
}
