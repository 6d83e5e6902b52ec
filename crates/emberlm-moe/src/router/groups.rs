//! Group-limited routing: the experts of a token come from few groups, and so from few devices.

use burn::config::Config;
use emberlm_core::InvalidConfig;

use super::select::{Scores, best};

/// How the scores of a group's experts make the score of the group.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// The largest: DeepSeek-V2, <https://arxiv.org/abs/2405.04434>, section 2.2.2.
    Maximum,
    /// The sum of the two largest: DeepSeek-V3, <https://arxiv.org/abs/2412.19437>, section 2.1.2, as its code has it.
    BestTwo,
    /// The sum of the largest `k / n_chosen`: Megatron-LM's `group_limited_topk`.
    ShareOfTopK,
}

/// Experts in groups of neighbours, of which a token may choose few.
///
/// The groups with the best scores are taken, and the experts of all others have the score minus infinity.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups; divides the number of experts.
    pub n_groups: usize,
    /// Number of groups that a token's experts come from.
    pub n_chosen: usize,
    /// The score of a group.
    pub score: GroupScore,
}

impl Groups {
    pub(super) fn validate(&self, n_experts: usize, k: usize) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[
            ("groups.n_groups", self.n_groups),
            ("groups.n_chosen", self.n_chosen),
        ])?;
        let range = |field, range, value: usize| InvalidConfig::Range {
            field,
            range,
            value: value as f64,
        };
        if !n_experts.is_multiple_of(self.n_groups) {
            return Err(range(
                "groups.n_groups",
                "a divisor of n_experts",
                self.n_groups,
            ));
        }
        if self.n_chosen > self.n_groups {
            return Err(range("groups.n_chosen", "at most n_groups", self.n_chosen));
        }
        if self.n_chosen * (n_experts / self.n_groups) < k {
            return Err(range(
                "groups.n_chosen",
                "enough groups for k experts",
                self.n_chosen,
            ));
        }
        let group = n_experts / self.n_groups;
        let n_summed = self.n_summed(k);
        if n_summed == 0 || n_summed > group {
            return Err(range(
                "groups.score",
                "a sum of as many experts as a group has, and at least one",
                n_summed,
            ));
        }
        Ok(())
    }

    /// How many of a group's experts its score is the sum of.
    fn n_summed(&self, k: usize) -> usize {
        match self.score {
            GroupScore::Maximum => 1,
            GroupScore::BestTwo => 2,
            GroupScore::ShareOfTopK => k / self.n_chosen,
        }
    }

    /// Takes the experts of all other groups out of the choice.
    pub(super) fn limit(&self, scores: &mut Scores, k: usize) {
        let size = scores.n_experts / self.n_groups;
        let n_summed = self.n_summed(k);
        let mut keys = Vec::new();
        for token in 0..scores.n_tokens() {
            let of_token = scores.of_mut(token);
            let of_groups: Vec<f64> = of_token
                .chunks(size)
                .map(|group| {
                    let experts = best(group, n_summed, &mut keys);
                    experts.map(|expert| group[expert as usize]).sum()
                })
                .collect();
            let chosen: Vec<u32> = best(&of_groups, self.n_chosen, &mut keys).collect();
            for (group, of_group) in (0..).zip(of_token.chunks_mut(size)) {
                if !chosen.contains(&group) {
                    of_group.fill(f64::NEG_INFINITY);
                }
            }
        }
    }
}
