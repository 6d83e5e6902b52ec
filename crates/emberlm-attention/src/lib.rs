//! Attention for language models on Burn.
//!
//! | file | what | when |
//! |---|---|---|
//! | `scaled_dot_product` | the dense definition | reading, testing, short sequences |
//! | `multi_head` | one key/value head per query head; self and cross | encoders, GPT-2, cross-attention |
//! | `grouped_query` | several query heads share a key/value head; rotary | Llama, Mistral: a smaller cache |

mod attend;
mod grouped_query;
mod heads;
mod multi_head;
mod scaled_dot_product;

pub use attend::{
    AttendOptions, Implementation, ScoreCap, attend, attend_by, attend_with_log_sum_exp,
};
pub use grouped_query::{GroupedQueryAttention, GroupedQueryAttentionConfig};
pub use multi_head::{CrossCache, MultiHeadAttention, MultiHeadAttentionConfig};
pub use scaled_dot_product::{ScoreOptions, scaled_dot_product};
