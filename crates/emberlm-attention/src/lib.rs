//! Attention for language models on Burn.
//!
//! | file | what | when |
//! |---|---|---|
//! | `attend` | attention over a schedule: the dense definition, tensor operations on blocks, fused kernels | everything below calls it |
//! | `multi_head` | one key/value head per query head; self and cross | encoders, GPT-2, cross-attention |
//! | `grouped_query` | several query heads share a key/value head; rotary | Llama, Mistral: a smaller cache |
//! | `sliding_window` | the last keys, and sinks | generation without end |
//! | `blockwise` | dense in little memory, or local in blocks | images, long inputs |
//! | `sparse_transformer` | two index sets of about sqrt(n) keys each | autoregressive models of long sequences |
//! | `longformer` | a window; global tokens with projections of their own | documents, tasks with a query token |
//! | `big_bird` | a window, global and random blocks | documents |
//!
//! The last five are patterns for `attend`; all but `longformer`'s are modules of `grouped_query`, so that weights go
//! from a dense model to a sparse one and back.

mod attend;
mod big_bird;
mod blockwise;
mod grouped_query;
mod heads;
mod longformer;
mod multi_head;
mod sliding_window;
mod sparse_transformer;

pub use attend::{
    AttendOptions, Implementation, ScoreCap, attend, attend_all, attend_by, attend_with_log_sum_exp,
};
pub use big_bird::{
    BigBirdAttention, BigBirdAttentionConfig, BigBirdGlobals, RandomPlan, RepeatedBlocks,
};
pub use blockwise::{BlockwiseAttention, BlockwiseAttentionConfig, BlockwiseKind};
pub use grouped_query::{GroupedQueryAttention, GroupedQueryAttentionConfig};
pub use longformer::{LongformerAttention, LongformerAttentionConfig};
pub use multi_head::{CrossCache, MultiHeadAttention, MultiHeadAttentionConfig};
pub use sliding_window::{SlidingWindowAttention, SlidingWindowAttentionConfig};
pub use sparse_transformer::{
    SparseHeads, SparseKind, SparseTransformerAttention, SparseTransformerAttentionConfig,
};
