//! Attention over several sets of keys, as one softmax.

use std::sync::Arc;

use burn::tensor::Tensor;
use emberlm_core::Schedule;

use super::{AttendOptions, attend_with_log_sum_exp, fastest};

/// Attention to the keys of several schedules at once, where a key counts once for each schedule that shows it: with
/// `m_ij` the number of these, `w_ij` is `m_ij exp(s_ij) / sum_k m_ik exp(s_ik)`.
///
/// The parts are computed one by one and merged by their log-sum-exp: `o = sum_p exp(l_p) o_p / sum_p exp(l_p)`. A key
/// that dropout takes is taken from all parts.
///
/// # Shapes
///
/// As [`attend`](super::attend).
///
/// # Panics
///
/// As [`attend`](super::attend); if there is no schedule, or there are sinks, which belong to one part alone.
pub fn attend_all(
    [query, key, value]: [Tensor<4>; 3],
    schedules: &[Arc<Schedule>],
    options: &AttendOptions,
) -> Tensor<4> {
    assert!(
        options.sinks.is_none(),
        "sinks: they belong to one of the parts; merge by `attend_with_log_sum_exp`"
    );
    let parts = schedules.iter().map(|schedule| {
        let implementation = fastest(&query.device(), schedule);
        let [query, key, value] = [&query, &key, &value].map(Clone::clone);
        let (output, lse) =
            attend_with_log_sum_exp(implementation, query, key, value, schedule, options);
        (output, lse.unsqueeze_dim::<4>(3))
    });
    let parts: Vec<(Tensor<4>, Tensor<4>)> = parts.collect();
    let highest = parts.iter().map(|(_, lse)| lse.clone().detach());
    let highest = highest.reduce(Tensor::max_pair);
    // A query that sees nothing anywhere keeps its zeros.
    let highest = highest.expect("schedules: at least one").clamp_min(-1e30);
    let weighed = parts.into_iter().map(|(output, lse)| {
        let weight = (lse - highest.clone()).exp();
        (output * weight.clone(), weight)
    });
    let (sum, weights) = weighed
        .reduce(|(a, v), (b, w)| (a + b, v + w))
        .expect("as many as schedules");
    sum / weights.clamp_min(1e-30)
}
