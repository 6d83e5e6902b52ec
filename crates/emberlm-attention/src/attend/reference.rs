//! The dense definition of attention: all scores, then a softmax, then a weighted mean.

use burn::tensor::{Bool, DType, Int, Tensor};
use emberlm_core::{Lengths, dropout};

use super::{
    AttendOptions, ScoreCap,
    sums::{Sums, shift},
};

/// `o = softmax(s) v` over the visible keys, with `s` as [`AttendOptions`] says. All scores are held.
///
/// `hidden` is true for pairs that are not visible, `[batch_size or 1, n_heads or 1, query_length, key_length]`.
pub(super) fn attend(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    hidden: Tensor<4, Bool>,
    lengths: &Lengths,
    options: &AttendOptions,
) -> (Tensor<4>, Tensor<4>) {
    let [batch_size, n_heads, query_length, d_head] = query.dims();
    let [_, n_kv_heads, key_length, d_value] = value.dims();
    let device = query.device();
    // The query heads of a group stand below each other as rows, so that keys and values are never repeated.
    let rows = n_heads / n_kv_heads * query_length;
    let scale = options.scale.unwrap_or((d_head as f64).powf(-0.5));
    let query = query.reshape([batch_size, n_kv_heads, rows, d_head]) * scale;
    let shape = [batch_size, n_heads, query_length, key_length];
    let mut scores = cap(query.matmul(key.transpose()).reshape(shape), options.cap);
    if let Some(slopes) = &options.alibi {
        let positions = |first: usize, n: usize| {
            Tensor::<1, Int>::arange(first as i64..(first + n) as i64, &device)
        };
        let queries = positions(lengths.first_position, query_length).reshape([1, 1, -1, 1]);
        let keys = positions(0, key_length).reshape([1, 1, 1, -1]);
        let distance: Tensor<4, Int> = (queries - keys).abs();
        scores = scores.clone() - penalty(distance, slopes, scores.dtype());
    }
    if let Some(bias) = &options.bias {
        scores = scores + bias.clone();
    }
    let hidden = hidden.expand(shape);
    let scores = scores.mask_fill(hidden, f64::NEG_INFINITY);
    let maximum = scores.clone().detach().max_dim(3);
    let weights = (scores - shift(maximum.clone())).exp();
    let total = weights.clone().sum_dim(3);
    let values = dropout(weights, options.dropout, options.dropout_key)
        .reshape([batch_size, n_kv_heads, rows, key_length])
        .matmul(value)
        .reshape([batch_size, n_heads, query_length, d_value]);
    let sums = Sums {
        maximum,
        total,
        values,
    };
    Sums::merge(vec![sums], options.sinks.clone()).finish()
}

/// What ALiBi takes from the scores, by head on axis 1. Computed in f32 at least: 16-bit floats do not tell distances
/// apart.
pub(super) fn penalty<const D: usize>(
    distance: Tensor<D, Int>,
    slopes: &[f64],
    dtype: DType,
) -> Tensor<D> {
    let computed_in = match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let mut shape = [1; D];
    shape[1] = slopes.len();
    let slopes = Tensor::<1>::from_data(slopes, (&distance.device(), computed_in));
    (distance.float().cast(computed_in) * slopes.reshape(shape)).cast(dtype)
}

/// The bounded scores.
pub(super) fn cap<const D: usize>(scores: Tensor<D>, cap: ScoreCap) -> Tensor<D> {
    match cap {
        ScoreCap::None => scores,
        // Times the reciprocal: Burn's autodiff rounds the divisor of a division by a scalar to f32.
        ScoreCap::Tanh(limit) => (scores * limit.recip()).tanh() * limit,
    }
}
