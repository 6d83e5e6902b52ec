//! Expert choice: the experts choose their tokens.

use super::select::{Scores, best};
use crate::{Choice, Choices};

/// Each expert takes the `n_tokens capacity_factor / n_experts` routed tokens with the highest scores for it, at least one
/// where there are any.
///
/// Zhou et al. 2022, <https://arxiv.org/abs/2202.09368>, section 3.2. All experts are equally loaded; a token may have any
/// number of experts, also none. Which it has depends on all other tokens, later ones too.
pub(super) fn expert_choice(
    scores: &Scores,
    capacity_factor: f64,
    is_routed: impl Fn(usize) -> bool,
) -> Choices {
    let routed: Vec<usize> = (0..scores.n_tokens())
        .filter(|token| is_routed(*token))
        .collect();
    let capacity = (routed.len() as f64 * capacity_factor / scores.n_experts as f64) as usize;
    let capacity = capacity.max(1).min(routed.len());
    let mut all = Vec::with_capacity(capacity * scores.n_experts);
    let (mut of_expert, mut keys) = (Vec::new(), Vec::new());
    for expert in 0..scores.n_experts {
        of_expert.clear();
        of_expert.extend(routed.iter().map(|token| scores.of(*token)[expert]));
        let best = best(&of_expert, capacity, &mut keys);
        all.extend(best.map(|i| Choice {
            token: routed[i as usize] as u32,
            expert: expert as u32,
            rank: 0,
        }));
    }
    // Ranks as the tokens see them.
    all.sort_unstable_by(|a, b| {
        let score = |choice: &Choice| scores.of(choice.token as usize)[choice.expert as usize];
        (a.token.cmp(&b.token))
            .then(score(b).total_cmp(&score(a)))
            .then(a.expert.cmp(&b.expert))
    });
    for i in 1..all.len() {
        if all[i].token == all[i - 1].token {
            all[i].rank = all[i - 1].rank + 1;
        }
    }
    Choices::new(scores.n_tokens(), scores.n_experts, all)
}
