//! Attention in blocks.

use burn::{config::Config, tensor::Device};
use emberlm_core::{Blockwise, InvalidConfig, Pattern};

use crate::{GroupedQueryAttention, GroupedQueryAttentionConfig};

/// What the blocks of attention are for.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum BlockwiseKind {
    /// Memory: every query sees every key, block after block, so that no matrix of scores is ever held. Equal to dense
    /// attention. Liu and Abbeel 2023, <https://arxiv.org/abs/2305.19370>.
    Chunked,
    /// Locality: a query sees its own block and some before it. Parmar et al. 2018, section 3.2,
    /// <https://arxiv.org/abs/1802.05751>.
    Local {
        /// Positions of a block.
        block: usize,
        /// Earlier blocks that are visible as well.
        look_back: usize,
    },
}

/// Configuration of blockwise attention.
///
/// The size of the chunks is the operator's, chosen for the machine; here one says what is visible.
///
/// ```
/// use emberlm_attention::{BlockwiseAttentionConfig, BlockwiseKind};
///
/// let kind = BlockwiseKind::Local { block: 64, look_back: 1 };
/// let config = BlockwiseAttentionConfig::new(64, 4, kind).with_causal(true);
/// assert_eq!(config.pattern().to_string(), "causal & blockwise:64:1");
/// ```
#[derive(Config, Debug)]
pub struct BlockwiseAttentionConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads; divides `d_model`.
    pub n_heads: usize,
    /// What the blocks are for.
    pub kind: BlockwiseKind,
    /// Whether a token sees none of the later ones. Default: false.
    #[config(default = false)]
    pub causal: bool,
    /// Whether the projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Dropout on the attention weights. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

/// Blockwise attention: attention whose pattern is that of a [`BlockwiseAttentionConfig`].
pub type BlockwiseAttention = GroupedQueryAttention;

impl BlockwiseAttentionConfig {
    /// The keys that a query sees.
    pub fn pattern(&self) -> Pattern {
        let blocks = match self.kind {
            BlockwiseKind::Chunked => None,
            BlockwiseKind::Local { block, look_back } => Some(Pattern::blockwise(
                Blockwise::new(block).with_look_back(look_back),
            )),
        };
        match (self.causal, blocks) {
            (false, None) => Pattern::full(),
            (true, None) => Pattern::causal(),
            (false, Some(blocks)) => blocks,
            (true, Some(blocks)) => Pattern::causal() & blocks,
        }
    }

    /// The general attention with this pattern.
    pub fn attention(&self) -> GroupedQueryAttentionConfig {
        GroupedQueryAttentionConfig::new(self.d_model, self.n_heads)
            .with_bias(self.bias)
            .with_dropout(self.dropout)
            .with_pattern(self.pattern())
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// What [`GroupedQueryAttentionConfig::validate`] finds.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.attention().validate()
    }

    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> BlockwiseAttention {
        self.attention().init(device)
    }
}
