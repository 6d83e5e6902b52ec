//! Experts by a fixed hash of the token.

use emberlm_core::RandomKey;

use crate::{Choice, Choices};

/// `k` different experts for each token, by a random permutation of the experts that the token and the seed name.
///
/// # Panics
///
/// If a token is not below `vocab_size`.
pub(super) fn hash(
    tokens: &[i64],
    k: usize,
    (vocab_size, n_experts): (usize, usize),
    seed: u64,
    is_routed: impl Fn(usize) -> bool,
) -> Choices {
    let table = RandomKey::new(seed).fold_str("experts");
    let mut all = Vec::with_capacity(tokens.len() * k);
    let mut experts: Vec<u32> = Vec::with_capacity(n_experts);
    for (i, token) in tokens.iter().enumerate().filter(|(i, _)| is_routed(*i)) {
        let known = usize::try_from(*token).is_ok_and(|token| token < vocab_size);
        assert!(
            known,
            "token {i} is {token}, the table of experts has {vocab_size}"
        );
        let key = table.fold(*token as u64);
        experts.clear();
        experts.extend(0..n_experts as u32);
        for rank in 0..k {
            // The first steps of Fisher and Yates.
            let left = (n_experts - rank) as u64;
            let other = rank + key.below(rank as u64, left) as usize;
            experts.swap(rank, other);
            all.push(Choice {
                token: i as u32,
                expert: experts[rank],
                rank: rank as u32,
            });
        }
    }
    Choices::new(tokens.len(), n_experts, all)
}
