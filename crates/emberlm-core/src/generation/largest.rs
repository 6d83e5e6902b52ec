//! The largest of many numbers.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::sampling::order;

/// Indices of the `n` largest scores above negative infinity, largest first, lower indices first among equal ones. No
/// score is NaN.
///
/// Sorts no more than `n` at a time: a beam has few candidates, and a vocabulary is long.
pub(super) fn largest(scores: impl Iterator<Item = f64>, n: usize) -> Vec<usize> {
    let mut kept: BinaryHeap<Reverse<(u64, Reverse<usize>)>> = BinaryHeap::new();
    for (index, score) in scores.enumerate() {
        if score == f64::NEG_INFINITY {
            continue;
        }
        let candidate = Reverse((order(score), Reverse(index)));
        if kept.len() < n {
            kept.push(candidate);
        } else if let Some(mut worst) = kept.peek_mut()
            && candidate < *worst
        {
            *worst = candidate;
        }
    }
    let best_first = kept.into_sorted_vec().into_iter();
    best_first
        .map(|Reverse((_, Reverse(index)))| index)
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn is_the_head_of_a_stable_sort(
            scores in prop::collection::vec(prop_oneof![-3..3i32, Just(i32::MIN)], 0..40),
            n in 0..12usize,
        ) {
            let score = |x: i32| if x == i32::MIN { f64::NEG_INFINITY } else { f64::from(x) / 2.0 };
            let scores: Vec<f64> = scores.into_iter().map(score).collect();
            let mut expected: Vec<usize> = (0..scores.len())
                .filter(|i| scores[*i] > f64::NEG_INFINITY)
                .collect();
            expected.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            expected.truncate(n);
            prop_assert_eq!(largest(scores.into_iter(), n), expected);
        }
    }
}
