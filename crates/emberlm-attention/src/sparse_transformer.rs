//! The Sparse Transformer's attention.

use burn::{config::Config, tensor::Device};
use emberlm_core::{Fixed, InvalidConfig, Pattern, Strided};

use crate::{GroupedQueryAttention, GroupedQueryAttentionConfig, heads::by_head};

/// Which sparse attention: section 4.3 of the paper.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum SparseKind {
    /// The last `stride` keys, and every `stride`-th: see [`Strided`].
    Strided,
    /// The own block of `stride` keys, and the last `n_summary` of every block: see [`Fixed`].
    Fixed {
        /// The summary columns `c` of a block.
        n_summary: usize,
    },
}

/// How the two index sets of the paper come together: section 4.3, "incorporating factorized attention".
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum SparseHeads {
    /// The first half of the heads has the local set, the other half the long one (equation 8).
    Separate,
    /// Every head sees both (equation 7).
    Merged,
    /// All heads of a layer have one of the sets, in turn: layer 0 the local one, layer 1 the long one (equation 6).
    Alternating {
        /// The number of this layer, from 0.
        layer: usize,
    },
    /// Every head has the local set alone.
    Local,
}

/// Configuration of the Sparse Transformer's attention.
///
/// Child et al. 2019, <https://arxiv.org/abs/1904.10509>. With the stride `l` near the root of the length `n`, a query
/// sees a number of keys near that root, so that a layer costs `O(n sqrt n)`. The index sets are
/// [`Pattern`]s; the module that they are given to is [`SparseTransformerAttention`]. In the fixed kind, heads that have
/// the summary set take different columns, as many as there are: head `h` the columns of sub-index `h mod (l / c)`.
/// Difference: the published code counts the local context in blocks of its kernel.
///
/// ```
/// use emberlm_attention::{SparseHeads, SparseKind, SparseTransformerAttentionConfig};
///
/// let config = SparseTransformerAttentionConfig::new(64, 4, 16)
///     .with_kind(SparseKind::Fixed { n_summary: 8 })
///     .with_heads(SparseHeads::Separate);
/// assert_eq!(
///     config.pattern().to_string(),
///     "heads(fixed-local:16, fixed-local:16, fixed-summary:16:8, fixed-summary:16:8:1)"
/// );
/// ```
#[derive(Config, Debug)]
pub struct SparseTransformerAttentionConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads; divides `d_model`.
    pub n_heads: usize,
    /// The stride `l`.
    pub stride: usize,
    /// Which sparse attention. Default: strided.
    #[config(default = "SparseKind::Strided")]
    pub kind: SparseKind,
    /// How the index sets come together. Default: every head sees both.
    #[config(default = "SparseHeads::Merged")]
    pub heads: SparseHeads,
    /// Whether the projections have biases. Default: true.
    #[config(default = true)]
    pub bias: bool,
    /// Dropout on the attention weights. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

/// The attention of the Sparse Transformer: attention whose pattern is that of a [`SparseTransformerAttentionConfig`].
pub type SparseTransformerAttention = GroupedQueryAttention;

impl SparseTransformerAttentionConfig {
    /// The keys that each head sees.
    pub fn pattern(&self) -> Pattern {
        let local = |_| self.local();
        match self.heads {
            SparseHeads::Local => self.local(),
            SparseHeads::Merged => self.all_heads(Self::merged),
            SparseHeads::Alternating { layer } if layer.is_multiple_of(2) => self.local(),
            SparseHeads::Alternating { .. } => self.all_heads(Self::long),
            SparseHeads::Separate => {
                let n_local = self.n_heads.div_ceil(2);
                let long = (0..self.n_heads - n_local).map(|head| self.long(head));
                Pattern::per_head((0..n_local).map(local).chain(long).collect::<Vec<_>>())
            }
        }
    }

    fn local(&self) -> Pattern {
        match self.kind {
            SparseKind::Strided => Pattern::strided(Strided::local(self.stride)),
            SparseKind::Fixed { .. } => Pattern::fixed(Fixed::local(self.stride)),
        }
    }

    fn long(&self, head: usize) -> Pattern {
        match self.kind {
            SparseKind::Strided => Pattern::strided(Strided::column(self.stride)),
            SparseKind::Fixed { n_summary } => {
                let fixed = Fixed::summary(self.stride, n_summary);
                Pattern::fixed(fixed.with_sub_index(self.sub_index(head, n_summary)))
            }
        }
    }

    fn merged(&self, head: usize) -> Pattern {
        match self.kind {
            SparseKind::Strided => Pattern::strided(Strided::merged(self.stride)),
            SparseKind::Fixed { n_summary } => {
                let fixed = Fixed::merged(self.stride, n_summary);
                Pattern::fixed(fixed.with_sub_index(self.sub_index(head, n_summary)))
            }
        }
    }

    fn all_heads(&self, pattern: fn(&Self, usize) -> Pattern) -> Pattern {
        by_head((0..self.n_heads).map(|head| pattern(self, head)).collect())
    }

    fn sub_index(&self, head: usize, n_summary: usize) -> usize {
        head % (self.stride / n_summary.max(1)).max(1)
    }

    /// The general attention with this pattern: for rotary positions, grouped heads and more.
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
    /// A zero, heads that do not divide the width, summary columns that do not fit the stride, or a dropout rate outside
    /// `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[("n_heads", self.n_heads)])?;
        self.attention().validate()
    }

    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> SparseTransformerAttention {
        emberlm_core::assert_valid(self.validate());
        self.attention().init(device)
    }
}
