//! Attention over a schedule: one operator for every pattern.
//!
//! | implementation | how | memory | where |
//! |---|---|---|---|
//! | [`Implementation::Reference`] | all scores, as the formula says | product of the lengths | any backend |
//! | [`Implementation::Portable`] | the blocks of the schedule, gathered, as tensor operations | visited blocks | any backend |
//! | [`Implementation::Native`] | fused kernels | the lengths | `flex`, `ndarray` |
//!
//! All three give the same outputs and gradients; [`attend`] takes the fastest that the tensors' device has.

mod merged;
mod options;
mod portable;
mod reference;
mod sums;

#[cfg(any(feature = "flex", feature = "ndarray"))]
mod native;

use std::sync::{Arc, Once};

use burn::tensor::{Bool, Device, Tensor, TensorData};
use emberlm_core::{BlockSizes, Schedule, Span};

pub use emberlm_core::operators::Implementation;
pub use merged::attend_all;
pub use options::{AttendOptions, ScoreCap};

/// The fastest that takes this schedule: the kernels know blocks of 64 queries and keys alone.
fn fastest(device: &Device, schedule: &Schedule) -> Implementation {
    match *schedule.block_sizes() == BlockSizes::default() {
        true => Implementation::of(device),
        false => Implementation::Portable,
    }
}

/// Attention from each query to the keys that the schedule says are visible:
/// `o_i = sum_j w_ij v_j`, `w_i = softmax_j s_ij`, with the scores `s` as [`AttendOptions`] says.
///
/// Vaswani et al. 2017, <https://arxiv.org/abs/1706.03762>. Query head `h` reads key/value head
/// `h / (n_heads / n_kv_heads)`, Ainslie et al. 2023, <https://arxiv.org/abs/2305.13245>. A query that sees no key, and
/// has no sink, gets zeros and no gradient. NaN and infinite inputs pass through.
///
/// # Shapes
///
/// - `query`: `[batch_size, n_heads, query_length, d_head]`
/// - `key`: `[batch_size, n_kv_heads, key_length, d_head]`
/// - `value`: `[batch_size, n_kv_heads, key_length, d_value]`
/// - output: `[batch_size, n_heads, query_length, d_value]`
///
/// A schedule that is the same for all batch rows, or heads, may be compiled for one.
///
/// ```
/// use std::sync::Arc;
///
/// use burn::tensor::{Device, Tensor};
/// use emberlm_attention::{AttendOptions, attend};
/// use emberlm_core::{BatchData, BlockSizes, Lengths, Pattern, Schedule};
///
/// let lengths = Lengths::square(3).with_n_heads(2);
/// let causal = Schedule::compile(&Pattern::causal(), &lengths, &BlockSizes::default(), &BatchData::new())?;
/// let x = Tensor::<4>::ones([1, 2, 3, 4], &Device::flex());
/// let y = attend(x.clone(), x.clone(), x, &Arc::new(causal), &AttendOptions::default());
/// assert_eq!(y.dims(), [1, 2, 3, 4]);
/// # Ok::<(), emberlm_core::PatternError>(())
/// ```
///
/// # Panics
///
/// If shapes or element types disagree with each other or with the schedule, or an option is impossible; the message
/// names the axis or the option.
pub fn attend(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    schedule: &Arc<Schedule>,
    options: &AttendOptions,
) -> Tensor<4> {
    let implementation = fastest(&query.device(), schedule);
    if implementation == Implementation::Portable {
        static SAID: Once = Once::new();
        SAID.call_once(|| {
            log::info!(
                "attention on {:?}: no fused kernels for this device or these blocks, tensor operations instead",
                query.device()
            );
        });
    }
    attend_by(implementation, query, key, value, schedule, options)
}

/// [`attend`] by a given implementation.
///
/// # Panics
///
/// As [`attend`]; and if the device does not have the implementation, or [`Implementation::Native`] is asked for a
/// schedule of other blocks than 64 by 64.
pub fn attend_by(
    implementation: Implementation,
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    schedule: &Arc<Schedule>,
    options: &AttendOptions,
) -> Tensor<4> {
    run(
        implementation,
        [query, key, value],
        schedule,
        options,
        false,
    )
    .0
}

/// [`attend_by`], with the log-sum-exp of each query's scores and its sink, `[batch_size, n_heads, query_length]`, which
/// gets a gradient too: what is needed to merge attention over several sets of keys (give the sinks to one of them
/// alone). Negative infinity for a query that sees no key and has no sink.
///
/// # Panics
///
/// As [`attend_by`].
pub fn attend_with_log_sum_exp(
    implementation: Implementation,
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    schedule: &Arc<Schedule>,
    options: &AttendOptions,
) -> (Tensor<4>, Tensor<3>) {
    let (output, lse) = run(implementation, [query, key, value], schedule, options, true);
    let lse = lse.expect("it was asked for");
    (output, lse.squeeze_dim(3))
}

/// The output and, if asked for, the log-sum-exp `[batch_size, n_heads, query_length, 1]`.
fn run(
    implementation: Implementation,
    [query, key, value]: [Tensor<4>; 3],
    schedule: &Arc<Schedule>,
    options: &AttendOptions,
    with_log_sum_exp: bool,
) -> (Tensor<4>, Option<Tensor<4>>) {
    check_shapes(&query, &key, &value, schedule, options);
    match implementation {
        Implementation::Reference => {
            let hidden = hidden(schedule, &query.device());
            let lengths = schedule.lengths();
            let (output, lse) = reference::attend(query, key, value, hidden, lengths, options);
            (output, Some(lse))
        }
        Implementation::Portable => {
            let (output, lse) = portable::attend([query, key, value], schedule, options);
            (output, Some(lse))
        }
        #[cfg(any(feature = "flex", feature = "ndarray"))]
        Implementation::Native => {
            native::attend([query, key, value], schedule, options, with_log_sum_exp)
        }
        #[cfg(not(any(feature = "flex", feature = "ndarray")))]
        Implementation::Native => panic!(
            "device: the fused kernels are for flex and ndarray, and neither feature of emberlm-attention is on"
        ),
    }
}

/// The pairs that are not visible, dense: `[batch_size or 1, n_heads or 1, query_length, key_length]`.
fn hidden(schedule: &Schedule, device: &Device) -> Tensor<4, Bool> {
    let lengths = schedule.lengths();
    let (n_queries, n_keys) = (lengths.query_length, lengths.key_length);
    let shared = schedule.parts().iter().all(|part| part.n_layouts() == 1);
    let [n_batch, n_heads] = match shared {
        true => [1, 1],
        false => [lengths.batch_size, lengths.n_heads],
    };
    let mut hidden = vec![true; n_batch * n_heads * n_queries * n_keys];
    for (row, hidden) in hidden
        .chunks_exact_mut((n_queries * n_keys).max(1))
        .enumerate()
    {
        visit_visible(schedule, row / n_heads, row % n_heads, |query, key| {
            hidden[query * n_keys + key] = false;
        });
    }
    let data = TensorData::new(hidden, [n_batch, n_heads, n_queries, n_keys]);
    Tensor::from_data(data, device)
}

/// Every pair of a query and a key that is visible to this head of this batch row.
fn visit_visible(
    schedule: &Schedule,
    batch: usize,
    head: usize,
    mut visit: impl FnMut(usize, usize),
) {
    let BlockSizes {
        query: n_queries,
        key: n_keys,
    } = *schedule.block_sizes();
    let place = |order: Option<&[u32]>, i: usize| order.map_or(i, |order| order[i] as usize);
    for part in schedule.parts() {
        let rows = part.layout(batch, head).rows();
        let mut pair = |query, key| {
            visit(
                place(part.query_order(), query),
                place(part.key_order(), key),
            );
        };
        for query_block in 0..rows.len() {
            for span in rows.spans(query_block) {
                for key_block in span.blocks() {
                    for row in 0..n_queries {
                        for column in 0..n_keys {
                            let visible = match *span {
                                Span::Full { .. } => true,
                                Span::Partial { mask, .. } => {
                                    schedule.masks().is_visible(mask, row, column)
                                }
                            };
                            if visible {
                                pair(query_block * n_queries + row, key_block * n_keys + column);
                            }
                        }
                    }
                }
            }
        }
    }
}

fn check_shapes(
    query: &Tensor<4>,
    key: &Tensor<4>,
    value: &Tensor<4>,
    schedule: &Schedule,
    options: &AttendOptions,
) {
    let [batch_size, n_heads, query_length, d_head] = query.dims();
    let [key_batch, n_kv_heads, key_length, key_width] = key.dims();
    let [value_batch, value_heads, value_length, d_value] = value.dims();
    let lengths = schedule.lengths();
    let equal = |axis, name, got: usize, other, expected: usize| {
        assert!(
            got == expected,
            "{axis}: {name} has {got}, {other} {expected}"
        );
    };
    equal("batch_size", "the key", key_batch, "the query", batch_size);
    equal(
        "batch_size",
        "the value",
        value_batch,
        "the query",
        batch_size,
    );
    equal("d_head", "the key", key_width, "the query", d_head);
    equal(
        "n_kv_heads",
        "the value",
        value_heads,
        "the key",
        n_kv_heads,
    );
    equal(
        "key_length",
        "the value",
        value_length,
        "the key",
        key_length,
    );
    assert!(
        n_kv_heads > 0 && n_heads.is_multiple_of(n_kv_heads),
        "n_heads: {n_heads} query heads cannot share {n_kv_heads} key/value heads evenly"
    );
    // What is the same for all batch rows or heads may have been compiled for one.
    if lengths.batch_size != 1 || schedule.is_by_batch() {
        equal(
            "batch_size",
            "the query",
            batch_size,
            "the schedule",
            lengths.batch_size,
        );
    }
    if lengths.n_heads != 1 {
        equal(
            "n_heads",
            "the query",
            n_heads,
            "the schedule",
            lengths.n_heads,
        );
    }
    equal(
        "query_length",
        "the query",
        query_length,
        "the schedule",
        lengths.query_length,
    );
    equal(
        "key_length",
        "the key",
        key_length,
        "the schedule",
        lengths.key_length,
    );
    if let Some(slopes) = &options.alibi {
        equal("n_heads", "alibi", slopes.len(), "the query", n_heads);
    }
    if let Some(sinks) = &options.sinks {
        equal("n_heads", "sinks", sinks.dims()[0], "the query", n_heads);
    }
    if let Some(bias) = &options.bias {
        let [bias_batch, bias_heads, bias_queries, bias_keys] = bias.dims();
        if bias_batch != 1 {
            equal(
                "batch_size",
                "the bias",
                bias_batch,
                "the query",
                batch_size,
            );
        }
        if bias_heads != 1 {
            equal("n_heads", "the bias", bias_heads, "the query", n_heads);
        }
        equal(
            "query_length",
            "the bias",
            bias_queries,
            "the query",
            query_length,
        );
        equal("key_length", "the bias", bias_keys, "the key", key_length);
    }
    assert!(
        d_head > 0 && d_value > 0,
        "d_head and d_value must be at least 1, got {d_head} and {d_value}"
    );
    let dtype = query.dtype();
    let others = [("the key", key.dtype()), ("the value", value.dtype())];
    let bias = options.bias.iter().map(|bias| ("the bias", bias.dtype()));
    let sinks = options.sinks.iter().map(|sinks| ("sinks", sinks.dtype()));
    for (name, other) in others.into_iter().chain(bias).chain(sinks) {
        assert!(
            other == dtype,
            "element type: {name} has {other:?}, the query {dtype:?}"
        );
    }
    if let Err(error) = options.cap.validate() {
        panic!("{error}");
    }
    assert!(
        (0.0..1.0).contains(&options.dropout),
        "dropout rate must be at least 0 and below 1, got {}",
        options.dropout
    );
}
