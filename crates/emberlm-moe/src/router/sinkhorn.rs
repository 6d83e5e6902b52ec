//! Sinkhorn's normalisation: scores under which every expert is liked alike.

use super::select::Scores;

/// The largest mean change of a step at which the iteration ends. Megatron-LM: 1e-4.
const TOLERANCE: f64 = 1e-4;
/// The most steps: what has not converged by then will not.
const MAX_STEPS: usize = 10_000;
const EPSILON: f64 = 1e-8;

/// Scales `exp(scores)` by a factor for each token and one for each expert, so that its rows sum to `1 / n_tokens` and its
/// columns to `1 / n_experts`.
///
/// Sinkhorn and Knopp 1967, <https://doi.org/10.2140/pjm.1967.21.343>; for routing Clark et al. 2022,
/// <https://arxiv.org/abs/2202.01169>, appendix B.2. The iteration is Megatron-LM's: it ends when the factors of the experts
/// change by less than 1e-4 in the mean.
pub(super) fn sinkhorn(scores: &Scores) -> Scores {
    let (n_tokens, n_experts) = (scores.n_tokens(), scores.n_experts);
    // The largest is taken out of each token's scores, which its factor makes up for.
    let mut mass = scores.clone();
    for token in 0..n_tokens {
        let of_token = mass.of_mut(token);
        let most = of_token.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        of_token
            .iter_mut()
            .for_each(|score| *score = (*score - most).exp());
    }
    let mut of_tokens = vec![1.0; n_tokens];
    let mut of_experts = vec![1.0; n_experts];
    for _ in 0..MAX_STEPS {
        for (token, factor) in of_tokens.iter_mut().enumerate() {
            let products = mass.of(token).iter().zip(&of_experts);
            let sum: f64 = products.map(|(mass, factor)| mass * factor).sum();
            *factor = 1.0 / (n_tokens as f64 * (sum + EPSILON));
        }
        let mut sums = vec![0.0; n_experts];
        for (token, factor) in of_tokens.iter().enumerate() {
            let of_token = sums.iter_mut().zip(mass.of(token));
            of_token.for_each(|(sum, mass)| *sum += factor * mass);
        }
        let mut change = 0.0;
        for (factor, sum) in of_experts.iter_mut().zip(sums) {
            let next = 1.0 / (n_experts as f64 * (sum + EPSILON));
            change += (next - *factor).abs() / n_experts as f64;
            *factor = next;
        }
        if change <= TOLERANCE || change.is_nan() {
            break;
        }
    }
    for (token, of_token) in of_tokens.iter().enumerate() {
        let both = mass.of_mut(token).iter_mut().zip(&of_experts);
        both.for_each(|(mass, of_expert)| *mass *= of_token * of_expert);
    }
    mass
}

#[cfg(test)]
mod tests {
    use emberlm_core::RandomKey;

    use super::*;

    #[test]
    fn rows_and_columns_have_equal_sums() {
        let (n_tokens, n_experts) = (24, 5);
        let key = RandomKey::new(3);
        let values = (0..(n_tokens * n_experts) as u64).map(|i| 2.0 * key.normal(i));
        let scores = Scores {
            values: values.collect(),
            n_experts,
        };
        let balanced = sinkhorn(&scores);
        for expert in 0..n_experts {
            let sum: f64 = (0..n_tokens).map(|token| balanced.of(token)[expert]).sum();
            assert!(
                (sum * n_experts as f64 - 1.0).abs() < 1e-3,
                "expert {expert}: {sum}"
            );
        }
        for token in 0..n_tokens {
            let sum: f64 = balanced.of(token).iter().sum();
            assert!(
                (sum * n_tokens as f64 - 1.0).abs() < 1e-3,
                "token {token}: {sum}"
            );
        }
    }
}
