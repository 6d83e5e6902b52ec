//! Choosing the best experts of a token, with ties broken the same way everywhere.

use std::cmp::Ordering;

use crate::{Choice, Choices};

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
    pub(crate) fn top_k(&self, k: usize, is_routed: impl Fn(usize) -> bool) -> Choices {
        let n_tokens = self.n_tokens();
        let mut all = Vec::with_capacity(n_tokens * k);
        let mut order = Vec::new();
        for token in (0..n_tokens).filter(|token| is_routed(*token)) {
            best(self.of(token), k, &mut order);
            all.extend((0..).zip(&order).map(|(rank, expert)| Choice {
                token: token as u32,
                expert: *expert,
                rank,
            }));
        }
        Choices::new(n_tokens, self.n_experts, all)
    }
}

/// The indices of the `k` largest scores, the largest first, of equal ones the lower index; what is no number comes first,
/// so that it cannot hide.
pub(crate) fn best(scores: &[f64], k: usize, order: &mut Vec<u32>) {
    order.clear();
    order.extend(0..scores.len() as u32);
    let compare =
        |a: &u32, b: &u32| descending(scores[*a as usize], scores[*b as usize]).then(a.cmp(b));
    if k < order.len() {
        order.select_nth_unstable_by(k, compare);
        order.truncate(k);
    }
    order.sort_unstable_by(compare);
}

fn descending(a: f64, b: f64) -> Ordering {
    match (a.is_nan(), b.is_nan()) {
        (false, false) => b.partial_cmp(&a).expect("both are numbers"),
        (a, b) => b.cmp(&a),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(scores: &[f64], k: usize) -> Vec<u32> {
        let mut order = Vec::new();
        best(scores, k, &mut order);
        order
    }

    #[test]
    fn equal_scores_go_to_the_lower_index() {
        assert_eq!(chosen(&[1.0, 3.0, 3.0, 2.0, 3.0], 2), [1, 2]);
        assert_eq!(chosen(&[0.5; 6], 3), [0, 1, 2]);
        assert_eq!(chosen(&[0.0, -0.0, 1.0], 3), [2, 0, 1]);
        assert_eq!(chosen(&[1.0, 2.0], 2), [1, 0]);
    }

    #[test]
    fn what_is_no_number_is_seen() {
        assert_eq!(chosen(&[1.0, f64::NAN, 3.0], 2), [1, 2]);
    }
}
