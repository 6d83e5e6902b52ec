//! The fused kernels for CPU backends: a forward pass that never holds more scores than a few blocks a thread, and a
//! backward pass that computes them again.

#![allow(
    unsafe_code,
    reason = "tiles are addressed by pointers, and threads write disjoint rows of one result"
)]

mod backward;
mod backward_memory;
mod blocks;
mod few;
mod forward;
mod operator;
mod problem;
mod scores;
mod sums;

use std::sync::Arc;

use burn::tensor::Tensor;
use emberlm_core::{BlockSizes, Schedule};
use emberlm_kernels::run_one;

use self::{operator::NativeAttention, problem::Dropout};
use super::{AttendOptions, ScoreCap};

/// Queries, and keys, of a block: those of the schedules that these kernels take.
const BLOCK: usize = 64;

/// The output and, if asked for, the log-sum-exp `[batch_size, n_heads, query_length, 1]`.
pub(super) fn attend(
    [query, key, value]: [Tensor<4>; 3],
    schedule: &Arc<Schedule>,
    options: &AttendOptions,
    with_log_sum_exp: bool,
) -> (Tensor<4>, Option<Tensor<4>>) {
    let blocks = *schedule.block_sizes();
    assert!(
        blocks
            == BlockSizes {
                query: BLOCK,
                key: BLOCK
            },
        "block sizes: the fused kernels take blocks of {BLOCK} queries and keys, the schedule has {blocks:?}"
    );
    let [.., d_head] = query.dims();
    let [.., d_value] = value.dims();
    let operator = NativeAttention {
        schedule: schedule.clone(),
        scale: options.scale.unwrap_or((d_head as f64).powf(-0.5)),
        cap: match options.cap {
            ScoreCap::None => None,
            ScoreCap::Tanh(limit) => Some(limit),
        },
        slopes: options.alibi.clone(),
        dropout: options
            .dropout_key
            .filter(|_| options.dropout > 0.0)
            .map(|key| Dropout {
                key,
                rate: options.dropout,
            }),
        has_bias: options.bias.is_some(),
        has_sinks: options.sinks.is_some(),
        with_log_sum_exp,
    };
    let by_rows = |x: Tensor<4>| x.swap_dims(1, 2).into_dispatch();
    let mut inputs = vec![by_rows(query), by_rows(key), by_rows(value)];
    inputs.extend(options.bias.clone().map(Tensor::into_dispatch));
    inputs.extend(options.sinks.clone().map(Tensor::into_dispatch));
    let output: Tensor<4> = run_one(operator, inputs);
    let output = output.swap_dims(1, 2);
    if !with_log_sum_exp {
        return (output, None);
    }
    let log_sum_exp = output.clone().narrow(3, d_value, 1);
    (output.narrow(3, 0, d_value), Some(log_sum_exp))
}
