//! What the attention modules share: splitting a width into heads, attending, and joining the heads again.

use burn::{nn::Linear, tensor::Tensor};
use emberlm_core::Context;

use crate::{ScoreCap, ScoreOptions, scaled_dot_product};

/// Attends with every head and projects the joined heads.
pub(crate) fn attend(
    [query, key, value]: [Tensor<4>; 3],
    output: &Linear,
    context: &Context,
    dropout: f64,
    cap: ScoreCap,
) -> Tensor<3> {
    let options = ScoreOptions {
        scale: None,
        cap,
        dropout,
        dropout_key: context.dropout_key,
    };
    let heads = scaled_dot_product(query, key, value, &context.visibility, &options);
    output.forward(merge_heads(heads))
}

/// `[batch_size, seq_length, n_heads * d_head]` to `[batch_size, n_heads, seq_length, d_head]`.
pub(crate) fn split_heads(x: Tensor<3>, n_heads: usize) -> Tensor<4> {
    let [batch_size, seq_length, width] = x.dims();
    x.reshape([batch_size, seq_length, n_heads, width / n_heads])
        .swap_dims(1, 2)
}

/// `[batch_size, n_heads, seq_length, d_head]` to `[batch_size, seq_length, n_heads * d_head]`.
fn merge_heads(x: Tensor<4>) -> Tensor<3> {
    let [batch_size, n_heads, seq_length, d_head] = x.dims();
    x.swap_dims(1, 2)
        .reshape([batch_size, seq_length, n_heads * d_head])
}
