//! Choosing the best experts of a token, with ties broken the same way everywhere.

use std::ops::Range;

use rayon::prelude::*;

use crate::{Choice, Choices};

/// Tokens that a thread looks at together.
const TOKENS: usize = 256;

/// Scores of all tokens for all experts, on the host.
#[derive(Debug, Clone)]
pub(crate) struct Scores {
    pub(crate) values: Vec<f64>,
    pub(crate) n_experts: usize,
}

impl Scores {
    pub(crate) fn n_tokens(&self) -> usize {
        self.values.len() / self.n_experts
    }

    pub(crate) fn of(&self, token: usize) -> &[f64] {
        &self.values[token * self.n_experts..][..self.n_experts]
    }

    pub(crate) fn of_mut(&mut self, token: usize) -> &mut [f64] {
        &mut self.values[token * self.n_experts..][..self.n_experts]
    }

    /// The `k` best experts of each token that is routed.
    pub(crate) fn top_k(&self, k: usize, is_routed: impl Fn(usize) -> bool + Sync) -> Choices {
        let all = self.by_tokens(|tokens| {
            let mut all = Vec::with_capacity(tokens.len() * k);
            let mut keys = Vec::new();
            for token in tokens.filter(|token| is_routed(*token)) {
                let best = best(self.of(token), k, &mut keys);
                all.extend((0..).zip(best).map(|(rank, expert)| Choice {
                    token: token as u32,
                    expert,
                    rank,
                }));
            }
            all
        });
        Choices::new(self.n_tokens(), self.n_experts, all.concat())
    }

    /// What becomes of the tokens, some at a time and in order, on all threads where they are many.
    pub(crate) fn by_tokens<T: Send>(&self, work: impl Fn(Range<usize>) -> T + Sync) -> Vec<T> {
        let n_tokens = self.n_tokens();
        let n_parts = n_tokens.div_ceil(TOKENS);
        let part = |part: usize| work(part * TOKENS..n_tokens.min((part + 1) * TOKENS));
        match n_parts {
            0 | 1 => (0..n_parts).map(part).collect(),
            _ => (0..n_parts).into_par_iter().map(part).collect(),
        }
    }
}

/// Up to so many are kept in order while the scores are read.
const FEW: usize = 16;

/// The indices of the `k` largest scores, the largest first, of equal ones the lower index; what is no number comes first,
/// so that it cannot hide. `keys` is memory to be used again.
pub(crate) fn best<'a>(
    scores: &[f64],
    k: usize,
    keys: &'a mut Vec<u128>,
) -> impl Iterator<Item = u32> + use<'a> {
    // The two halves of a key are compared at once.
    let key =
        |(score, index): (&f64, u64)| u128::from(descending(*score)) << 64 | u128::from(index);
    keys.clear();
    let of_scores = scores.iter().zip(0..).map(key);
    if k <= FEW {
        // Most scores are below the best so far.
        for key in of_scores {
            if keys.len() < k {
                keys.push(key);
            } else if keys.last().is_some_and(|last| key < *last) {
                keys[k - 1] = key;
            } else {
                continue;
            }
            let better = keys.partition_point(|other| *other < key);
            keys[better..].rotate_right(1);
        }
    } else {
        keys.extend(of_scores);
        if k < keys.len() {
            keys.select_nth_unstable(k);
            keys.truncate(k);
        }
        keys.sort_unstable();
    }
    keys.iter().map(|key| *key as u32)
}

/// A number that is smaller for a larger score, equal for equal ones, and smallest for what is no number.
fn descending(score: f64) -> u64 {
    if score.is_nan() {
        return 0;
    }
    // Both zeros become the same one.
    let bits = (score + 0.0).to_bits();
    // The bits of numbers of one sign are in the order of their sizes.
    match score < 0.0 {
        true => bits,
        false => !(bits | 1 << 63),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(scores: &[f64], k: usize) -> Vec<u32> {
        best(scores, k, &mut Vec::new()).collect()
    }

    #[test]
    fn equal_scores_go_to_the_lower_index() {
        assert_eq!(chosen(&[1.0, 3.0, 3.0, 2.0, 3.0], 2), [1, 2]);
        assert_eq!(chosen(&[0.5; 6], 3), [0, 1, 2]);
        assert_eq!(chosen(&[0.0, -0.0, 1.0], 3), [2, 0, 1]);
        assert_eq!(chosen(&[1.0, 2.0], 2), [1, 0]);
    }

    #[test]
    fn few_and_many_are_chosen_alike() {
        let scores: Vec<f64> = (0..97).map(|i| f64::from(i * 37 % 41) - 9.0).collect();
        let all = chosen(&scores, 97);
        for k in 0..97 {
            assert_eq!(chosen(&scores, k), all[..k], "{k}");
        }
    }

    #[test]
    fn many_tokens_are_routed_as_each_alone() {
        let (n_tokens, n_experts) = (600, 7);
        let scores = Scores {
            values: (0..n_tokens * n_experts)
                .map(|i| f64::from(i as u32 * 37 % 101) + 1.0)
                .collect(),
            n_experts,
        };
        let is_routed = |token: usize| token % 256 != 255 && token % 11 != 3;
        let found = scores.top_k(3, is_routed);
        let expected = (0..n_tokens).filter(|token| is_routed(*token));
        let expected = expected.flat_map(|token| {
            let of_token = (0..).zip(chosen(scores.of(token), 3));
            of_token.map(move |(rank, expert)| Choice {
                token: token as u32,
                expert,
                rank,
            })
        });
        assert_eq!(found.all(), expected.collect::<Vec<_>>());

        let mut statistics = crate::router::statistics(&scores, is_routed);
        let whole = crate::router::statistics_of(&scores, (0..n_tokens).filter(|t| is_routed(*t)));
        assert!((statistics.entropy_sum - whole.entropy_sum).abs() < 1e-9);
        statistics.entropy_sum = whole.entropy_sum;
        assert_eq!(statistics, whole);
    }

    #[test]
    fn what_is_no_number_is_seen() {
        assert_eq!(chosen(&[1.0, f64::NAN, 3.0], 2), [1, 2]);
        assert_eq!(chosen(&[f64::INFINITY, -f64::NAN, f64::NAN], 3), [1, 2, 0]);
    }

    #[test]
    fn scores_of_all_signs_and_sizes_are_in_order() {
        let scores = [
            -1e300,
            -1.0,
            -1e-310,
            0.0,
            1e-310,
            1.0,
            2.0,
            f64::INFINITY,
            f64::NEG_INFINITY,
        ];
        assert_eq!(chosen(&scores, 9), [7, 6, 5, 4, 3, 2, 1, 0, 8]);
    }
}
