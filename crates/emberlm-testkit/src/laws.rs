//! Laws that every variant keeps, written once.

use burn::tensor::{DType, Device, Tensor, s};

use crate::{assert_close, random};

// f32 sums of a few dozen terms, taken in another order.
const TOLERANCE: f64 = 1e-5;

/// Causality: what comes after a position does not change its output, nor has its gradient any part in it.
///
/// `shape`: `[batch_size, seq_length, d_model]`; `f` maps such a tensor to one with the same first two axes.
///
/// # Panics
///
/// If a later input changes an earlier output ("largest difference"), or has a gradient from it.
#[track_caller]
pub fn causal(shape: [usize; 3], device: &Device, f: impl Fn(Tensor<3>) -> Tensor<3>) {
    let [batch_size, seq_length, d_model] = shape;
    let x = random(shape, 1, DType::F32, device);
    let whole = f(x.clone());
    for cut in 1..seq_length {
        let other = random(
            [batch_size, seq_length - cut, d_model],
            2,
            DType::F32,
            device,
        );
        let changed = x.clone().slice_assign(s![.., cut.., ..], other);
        let before = s![.., 0..cut, ..];
        assert_close(
            f(changed).slice(before),
            whole.clone().slice(before),
            TOLERANCE,
        );
    }
    let x = random(shape, 1, DType::F32, &device.clone().autodiff()).require_grad();
    let cut = seq_length / 2;
    let gradients = f(x.clone()).slice(s![.., 0..cut, ..]).sum().backward();
    let gradient = x.grad(&gradients).expect("the output depends on the input");
    let after = gradient.slice(s![.., cut.., ..]).abs().max();
    let leaked: f32 = after.into_scalar();
    assert!(
        leaked == 0.0,
        "a later input has a gradient of {leaked} from an earlier output"
    );
}

/// Decoding: over a sequence that is split at any place, `step` after `step` gives what `full` gives over the whole.
///
/// `step` is told the new part and its first position, and must begin anew at position 0.
///
/// # Panics
///
/// If the outputs differ ("largest difference").
#[track_caller]
pub fn cached_equals_full<const E: usize>(
    x: Tensor<3>,
    full: impl Fn(Tensor<3>) -> Tensor<E>,
    mut step: impl FnMut(Tensor<3>, usize) -> Tensor<E>,
) {
    let [_, seq_length, _] = x.dims();
    let whole = full(x.clone());
    let one_by_one: Vec<usize> = (0..=seq_length).collect();
    let splits = (1..seq_length).map(|cut| vec![0, cut, seq_length]);
    for borders in splits.chain([one_by_one]) {
        let parts = borders
            .windows(2)
            .map(|pair| step(x.clone().slice(s![.., pair[0]..pair[1], ..]), pair[0]))
            .collect();
        assert_close(Tensor::cat(parts, 1), whole.clone(), TOLERANCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_sum_is_causal() {
        causal([2, 5, 3], &crate::device(), |x| x.cumsum(1));
    }

    #[test]
    #[should_panic(expected = "largest difference")]
    fn a_mean_over_the_sequence_is_not() {
        causal([2, 5, 3], &crate::device(), |x| x.clone() - x.mean_dim(1));
    }

    #[test]
    fn a_running_sum_can_be_decoded() {
        let mut state: Option<Tensor<3>> = None;
        cached_equals_full(
            random([2, 5, 3], 1, DType::F32, &crate::device()),
            |x| x.cumsum(1),
            |x, position| {
                let [_, length, _] = x.dims();
                let sum = match state.take().filter(|_| position > 0) {
                    Some(before) => x.cumsum(1) + before,
                    None => x.cumsum(1),
                };
                state = Some(sum.clone().slice(s![.., length - 1.., ..]));
                sum
            },
        );
    }

    #[test]
    #[should_panic(expected = "largest difference")]
    fn a_forgotten_state_is_caught() {
        cached_equals_full(
            random([2, 5, 3], 1, DType::F32, &crate::device()),
            |x| x.cumsum(1),
            |x, _| x.cumsum(1),
        );
    }
}
