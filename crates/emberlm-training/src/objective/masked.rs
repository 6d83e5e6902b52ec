//! Masked tokens, as BERT is trained.

use std::ops::Range;

use burn::config::Config;
use emberlm_core::{IGNORED_TARGET, InvalidConfig, RandomKey};

/// Configuration of masking: which share of a window is predicted, and what stands there instead.
///
/// Devlin et al. 2018, section 3.1, <https://arxiv.org/abs/1810.04805>: 15 % of the tokens are predicted; of those 80 %
/// become the mask, 10 % a random token, and 10 % stay.
#[derive(Config, Debug, PartialEq)]
pub struct MaskedConfig {
    /// The token that stands for a hidden one.
    pub mask_token: u32,
    /// Number of tokens that text is made of: `first_token .. first_token + n_tokens`. Random tokens are drawn from these;
    /// others are special and never predicted.
    pub n_tokens: u32,
    /// The first of them. Default: 0.
    #[config(default = 0)]
    pub first_token: u32,
    /// Share of the tokens that are predicted. Default: 0.15.
    #[config(default = 0.15)]
    pub rate: f64,
    /// Share of those that become the mask. Default: 0.8.
    #[config(default = 0.8)]
    pub mask_rate: f64,
    /// Share of those that become a random token. Default: 0.1.
    #[config(default = 0.1)]
    pub random_rate: f64,
    /// Whether the tokens of a word are predicted together, as in BERT's whole-word models. Default: false.
    #[config(default = false)]
    pub whole_words: bool,
}

/// A window as the model reads it, and what it has to say: [`IGNORED_TARGET`] where nothing is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masked {
    /// Tokens, some of them hidden.
    pub inputs: Vec<u32>,
    /// The tokens that were there.
    pub targets: Vec<i64>,
}

impl MaskedConfig {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// Rates outside `[0, 1]`, a `rate` of zero, two rates of more than 1 together, or no tokens.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let share = |field, value: f64, range, allowed: bool| match allowed {
            true => Ok(()),
            false => Err(InvalidConfig::Range {
                field,
                range,
                value,
            }),
        };
        let (mask, random) = (self.mask_rate, self.random_rate);
        InvalidConfig::require_positive(&[("n_tokens", self.n_tokens as usize)])?;
        share(
            "rate",
            self.rate,
            "above 0, at most 1",
            self.rate > 0.0 && self.rate <= 1.0,
        )?;
        share("mask_rate", mask, "in [0, 1]", (0.0..=1.0).contains(&mask))?;
        let rest = 1.0 - mask;
        share(
            "random_rate",
            random,
            "at least 0, at most what mask_rate leaves",
            random >= 0.0 && random <= rest + 1e-12,
        )
    }

    /// The tokens that text is made of.
    pub fn tokens(&self) -> Range<u32> {
        self.first_token..self.first_token.saturating_add(self.n_tokens)
    }

    /// Hides tokens of a window: exactly `round(rate * n)` of the `n` that are not special, at least one if there are any;
    /// fewer where a whole word does not fit any more, and the shortest word where none does. `starts_word` says which tokens begin a word.
    ///
    /// ```
    /// use emberlm_core::{IGNORED_TARGET, RandomKey};
    /// use emberlm_training::MaskedConfig;
    ///
    /// let config = MaskedConfig::new(100, 100);
    /// let tokens: Vec<u32> = (0..40).collect();
    /// let masked = config.apply(&tokens, &RandomKey::new(1), |_| true);
    /// let asked = masked.targets.iter().filter(|target| **target != IGNORED_TARGET);
    /// assert_eq!(asked.count(), 6);
    /// ```
    pub fn apply(
        &self,
        tokens: &[u32],
        key: &RandomKey,
        starts_word: impl Fn(u32) -> bool,
    ) -> Masked {
        let mut masked = Masked {
            inputs: tokens.to_vec(),
            targets: vec![IGNORED_TARGET; tokens.len()],
        };
        let (order, replace) = (key.fold_str("order"), key.fold_str("replace"));
        for position in self.chosen(tokens, &order, starts_word) {
            masked.targets[position] = i64::from(tokens[position]);
            masked.inputs[position] = self.replacement(tokens[position], position, &replace);
        }
        masked
    }

    /// The positions that are predicted.
    fn chosen(
        &self,
        tokens: &[u32],
        order: &RandomKey,
        starts_word: impl Fn(u32) -> bool,
    ) -> Vec<usize> {
        let candidates = self.candidates(tokens, starts_word);
        let n_candidates: usize = candidates.iter().map(Range::len).sum();
        let most = ((n_candidates as f64 * self.rate).round() as usize).max(1);
        let mut chosen = Vec::with_capacity(most);
        for i in shuffled(candidates.len(), order) {
            if chosen.len() + candidates[i].len() <= most {
                chosen.extend(candidates[i].clone());
            }
        }
        if chosen.is_empty() {
            // All words are too long: a window that asks for nothing would teach nothing.
            let shortest = candidates.into_iter().min_by_key(Range::len);
            chosen.extend(shortest.into_iter().flatten());
        }
        chosen
    }

    /// What is hidden together: words, or single tokens.
    fn candidates(&self, tokens: &[u32], starts_word: impl Fn(u32) -> bool) -> Vec<Range<usize>> {
        let mut candidates: Vec<Range<usize>> = Vec::new();
        for (i, token) in tokens.iter().enumerate() {
            if !self.tokens().contains(token) {
                continue;
            }
            match candidates.last_mut() {
                Some(word) if self.whole_words && word.end == i && !starts_word(*token) => {
                    word.end = i + 1;
                }
                _ => candidates.push(i..i + 1),
            }
        }
        candidates
    }

    fn replacement(&self, token: u32, position: usize, key: &RandomKey) -> u32 {
        let position = position as u64;
        let share = key.uniform(position);
        if share < self.mask_rate {
            self.mask_token
        } else if share < self.mask_rate + self.random_rate {
            let draw = key
                .fold_str("token")
                .below(position, u64::from(self.n_tokens));
            self.first_token + draw as u32
        } else {
            token
        }
    }
}

/// The numbers below `n` in a random order.
pub(super) fn shuffled(n: usize, key: &RandomKey) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        order.swap(last, key.below(last as u64, last as u64 + 1) as usize);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MaskedConfig {
        MaskedConfig::new(999, 900)
    }

    fn asked(masked: &Masked) -> Vec<usize> {
        let targets = masked.targets.iter().enumerate();
        targets
            .filter(|(_, target)| **target != IGNORED_TARGET)
            .map(|(i, _)| i)
            .collect()
    }

    #[test]
    fn shares_are_those_of_the_paper() {
        let tokens: Vec<u32> = (0..100_000).map(|i| i % 900).collect();
        let masked = config().apply(&tokens, &RandomKey::new(1), |_| true);
        let asked = asked(&masked);
        assert_eq!(asked.len(), 15_000);
        let share = |count: usize| count as f64 / 15_000.0;
        let mask = asked.iter().filter(|i| masked.inputs[**i] == 999).count();
        let kept = asked
            .iter()
            .filter(|i| masked.inputs[**i] == tokens[**i])
            .count();
        // Four standard deviations of 15,000 draws; one random token in 900 is the token itself.
        assert!((share(mask) - 0.8).abs() < 0.013);
        assert!((share(kept) - (0.1 + 0.1 / 900.0)).abs() < 0.01);
        assert!(
            asked
                .iter()
                .all(|i| masked.targets[*i] == i64::from(tokens[*i]))
        );
        let others = (0..tokens.len()).filter(|i| masked.targets[*i] == IGNORED_TARGET);
        assert!(others.into_iter().all(|i| masked.inputs[i] == tokens[i]));
    }

    #[test]
    fn a_key_always_hides_the_same_and_another_key_something_else() {
        let tokens: Vec<u32> = (0..200).collect();
        let of_seed = |seed| config().apply(&tokens, &RandomKey::new(seed), |_| true);
        assert_eq!(of_seed(1), of_seed(1));
        assert_ne!(asked(&of_seed(1)), asked(&of_seed(2)));
    }

    #[test]
    fn special_tokens_are_never_asked_for() {
        let tokens = [950, 1, 2, 960, 3, 999];
        let all = config().with_rate(1.0);
        let masked = all.apply(&tokens, &RandomKey::new(1), |_| true);
        assert_eq!(asked(&masked), [1, 2, 4]);
        let none = config().apply(&[950, 960], &RandomKey::new(1), |_| true);
        assert_eq!(none.inputs, [950, 960]);
        assert_eq!(asked(&none), [0usize; 0]);
    }

    #[test]
    fn special_tokens_may_come_first() {
        let config = MaskedConfig::new(1, 90).with_first_token(10);
        let all = config
            .with_rate(1.0)
            .with_mask_rate(0.0)
            .with_random_rate(1.0);
        let tokens: Vec<u32> = (0..120).collect();
        let masked = all.apply(&tokens, &RandomKey::new(1), |_| true);
        assert_eq!(asked(&masked), (10..100).collect::<Vec<_>>());
        assert!(
            masked.inputs[10..100]
                .iter()
                .all(|token| all.tokens().contains(token))
        );
        assert_eq!(masked.inputs[..10], tokens[..10]);
        assert_ne!(masked.inputs[10..100], tokens[10..100]);
    }

    #[test]
    fn words_are_hidden_whole() {
        // Words of three tokens, of which the first has a number that three divides.
        let tokens: Vec<u32> = (0..300).collect();
        let whole = config().with_whole_words(true);
        let masked = whole.apply(&tokens, &RandomKey::new(3), |token| token % 3 == 0);
        let asked = asked(&masked);
        assert_eq!(asked.len(), 45);
        for word in asked.chunks(3) {
            assert!(word[0].is_multiple_of(3) && word[2] == word[0] + 2);
        }
    }

    #[test]
    fn a_window_of_one_long_word_is_hidden_as_well() {
        let tokens: Vec<u32> = (0..6).collect();
        let whole = config().with_whole_words(true);
        let masked = whole.apply(&tokens, &RandomKey::new(3), |token| token == 2);
        assert_eq!(asked(&masked), [0, 1]);
    }

    #[test]
    fn every_position_is_as_likely_as_any() {
        let tokens: Vec<u32> = (0..20).collect();
        let mut counts = [0; 20];
        for seed in 0..20_000 {
            let masked = config().apply(&tokens, &RandomKey::new(seed), |_| true);
            asked(&masked).into_iter().for_each(|i| counts[i] += 1);
        }
        // Three of twenty each time: 3,000 expected, with a standard deviation of 50.
        assert!(
            counts.iter().all(|n| (2750..3250).contains(n)),
            "{counts:?}"
        );
    }

    #[test]
    fn bad_rates_name_the_field() {
        for (config, field) in [
            (config().with_rate(0.0), "rate"),
            (config().with_rate(f64::NAN), "rate"),
            (config().with_mask_rate(1.5), "mask_rate"),
            (config().with_random_rate(0.3), "random_rate"),
            (MaskedConfig::new(1, 0), "n_tokens"),
        ] {
            let error = config.validate().expect_err("it is invalid").to_string();
            assert!(error.contains(field), "{error}");
        }
        config().validate().expect("the defaults are valid");
    }
}
