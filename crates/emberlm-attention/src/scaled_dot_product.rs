//! The dense definition of attention: all scores, then a softmax, then a weighted mean.

use burn::tensor::{Tensor, activation::softmax};
use emberlm_core::{RandomKey, Visibility, dropout};

use crate::ScoreCap;

/// Options of [`scaled_dot_product`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ScoreOptions {
    /// Factor of the scores; nothing means `1 / sqrt(d_head)`.
    pub scale: Option<f64>,
    /// Bound on the scaled scores.
    pub cap: ScoreCap,
    /// Dropout on the weights.
    pub dropout: f64,
    /// Where dropout draws from; nothing turns it off.
    pub dropout_key: Option<RandomKey>,
}

impl Default for ScoreOptions {
    fn default() -> Self {
        Self {
            scale: None,
            cap: ScoreCap::None,
            dropout: 0.0,
            dropout_key: None,
        }
    }
}

/// `softmax(cap(scale Q K^T)) V` over the visible keys, for any number of query heads a key/value head.
///
/// Vaswani et al. 2017, equation 1, <https://arxiv.org/abs/1706.03762>; query head `h` reads key/value head
/// `h / (n_heads / n_kv_heads)` as in Ainslie et al. 2023, <https://arxiv.org/abs/2305.13245>. A query that sees
/// no key gets zeros and no gradient. All scores are held: memory grows with the product of the lengths.
///
/// # Shapes
///
/// - `query`: `[batch_size, n_heads, query_length, d_head]`
/// - `key`: `[batch_size, n_kv_heads, key_length, d_head]`
/// - `value`: `[batch_size, n_kv_heads, key_length, d_value]`
/// - output: `[batch_size, n_heads, query_length, d_value]`
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_attention::{ScoreOptions, scaled_dot_product};
/// use emberlm_core::Visibility;
///
/// let device = Device::flex();
/// let x = Tensor::<4>::ones([1, 2, 3, 4], &device);
/// let causal = Visibility::causal(3, 0, &device);
/// let y = scaled_dot_product(x.clone(), x.clone(), x, &causal, &ScoreOptions::default());
/// assert_eq!(y.dims(), [1, 2, 3, 4]);
/// ```
///
/// # Panics
///
/// If `n_kv_heads` does not divide `n_heads`.
pub fn scaled_dot_product(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    visibility: &Visibility,
    options: &ScoreOptions,
) -> Tensor<4> {
    let [batch_size, n_heads, query_length, d_head] = query.dims();
    let [_, n_kv_heads, key_length, d_value] = value.dims();
    assert!(
        n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads),
        "n_heads: {n_heads} query heads cannot share {n_kv_heads} key/value heads evenly"
    );
    // The query heads of a group stand below each other as rows, so that keys and values are never repeated.
    let rows = n_heads / n_kv_heads * query_length;
    let scale = options.scale.unwrap_or_else(|| (d_head as f64).powf(-0.5));
    let query = query.reshape([batch_size, n_kv_heads, rows, d_head]) * scale;
    let scores =
        query
            .matmul(key.transpose())
            .reshape([batch_size, n_heads, query_length, key_length]);
    let scores = match options.cap {
        ScoreCap::None => scores,
        // Times the reciprocal: Burn's autodiff rounds the divisor of a division by a scalar to f32.
        ScoreCap::Tanh(limit) => (scores * limit.recip()).tanh() * limit,
    };
    let hidden = visibility
        .hidden()
        .map(|hidden| hidden.clone().expand(scores.shape()));
    let weights = match hidden {
        None => softmax(scores, 3),
        Some(hidden) if visibility.may_hide_whole_rows() => {
            // A finite fill keeps the softmax of a row without keys finite; its weights are then set to zero.
            let scores = scores.mask_fill(hidden.clone(), -1e30);
            softmax(scores, 3).mask_fill(hidden, 0.0)
        }
        Some(hidden) => softmax(scores.mask_fill(hidden, f64::NEG_INFINITY), 3),
    };
    dropout(weights, options.dropout, options.dropout_key)
        .reshape([batch_size, n_kv_heads, rows, key_length])
        .matmul(value)
        .reshape([batch_size, n_heads, query_length, d_value])
}
