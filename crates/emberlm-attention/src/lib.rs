//! Attention for language models on Burn.
//!
//! | file | what | when |
//! |---|---|---|
//! | `attend` | attention over a schedule: the dense definition, tensor operations on blocks, fused kernels | everything below calls it |
//! | `multi_head` | one key/value head per query head; self and cross | encoders, GPT-2, cross-attention |
//! | `grouped_query` | several query heads share a key/value head; rotary | Llama, Mistral: a smaller cache |

mod attend;
mod grouped_query;
mod heads;
mod multi_head;

pub use attend::{
    AttendOptions, Implementation, ScoreCap, attend, attend_by, attend_with_log_sum_exp,
};
pub use grouped_query::{GroupedQueryAttention, GroupedQueryAttentionConfig};
pub use multi_head::{CrossCache, MultiHeadAttention, MultiHeadAttentionConfig};
