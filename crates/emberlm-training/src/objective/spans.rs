//! Denoising spans, as T5 is trained.

use std::ops::Range;

use burn::config::Config;
use emberlm_core::{InvalidConfig, RandomKey};

use super::masked::shuffled;

/// Configuration of span corruption: spans of a window are replaced by sentinels, and the target is what they stand for.
///
/// Raffel et al. 2019, section 3.1.4, <https://arxiv.org/abs/1910.10683>, and its `random_spans_noise_mask`: of `n`
/// tokens `round(n rate)` are noise, in `round(noise / mean_span)` spans; noise and the rest are cut into as many pieces
/// at random, and take turns, beginning with what is kept. Both counts depend on `n` alone, so all windows of a batch
/// have inputs and targets of the same lengths.
#[derive(Config, Debug, PartialEq)]
pub struct SpansConfig {
    /// The first sentinel; the others count down from it, as T5's do, `n_sentinels` of them.
    pub first_sentinel: u32,
    /// Number of sentinels.
    pub n_sentinels: u32,
    /// Token at the end of inputs and of targets.
    pub end_token: u32,
    /// Token that the decoder begins with; T5: padding.
    pub start_token: u32,
    /// Share of the tokens that are noise. Default: 0.15.
    #[config(default = 0.15)]
    pub rate: f64,
    /// Mean length of a span of noise. Default: 3.
    #[config(default = 3.0)]
    pub mean_span: f64,
}

/// A window with holes, and what was in them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spans {
    /// What the encoder reads: the kept tokens with a sentinel for each span, then the end.
    pub source: Vec<u32>,
    /// What the decoder should write: each sentinel, then its span, then the end.
    pub target: Vec<u32>,
}

impl SpansConfig {
    /// Checks the fields against windows of `length` tokens.
    ///
    /// # Errors
    ///
    /// A rate outside `(0, 1)`, a mean span below 1, windows of fewer than two tokens, or more spans than sentinels.
    pub fn validate(&self, length: usize) -> Result<(), InvalidConfig> {
        let refuse = |field, range, value| {
            Err(InvalidConfig::Range {
                field,
                range,
                value,
            })
        };
        if !(self.rate > 0.0 && self.rate < 1.0) {
            return refuse("rate", "above 0 and below 1", self.rate);
        }
        if !(self.mean_span >= 1.0 && self.mean_span.is_finite()) {
            return refuse("mean_span", "at least 1", self.mean_span);
        }
        if length < 2 {
            return refuse("seq_length", "at least 2 for spans", length as f64);
        }
        let (_, n_spans) = self.counts(length);
        if n_spans > self.n_sentinels as usize
            || self.first_sentinel.saturating_add(1) < self.n_sentinels
        {
            return refuse(
                "n_sentinels",
                "as many as a window has spans, counting down from first_sentinel",
                f64::from(self.n_sentinels),
            );
        }
        Ok(())
    }

    /// Replaces spans of a window by sentinels.
    ///
    /// ```
    /// use emberlm_core::RandomKey;
    /// use emberlm_training::SpansConfig;
    ///
    /// let config = SpansConfig::new(99, 10, 1, 0);
    /// let tokens: Vec<u32> = (10..30).collect();
    /// let spans = config.apply(&tokens, &RandomKey::new(4));
    /// assert_eq!((spans.source.len(), spans.target.len()), (17 + 1 + 1, 3 + 1 + 1));
    /// ```
    ///
    /// # Panics
    ///
    /// If the window has fewer than two tokens.
    pub fn apply(&self, tokens: &[u32], key: &RandomKey) -> Spans {
        let (n_noise, n_spans) = self.counts(tokens.len());
        let kept = pieces(tokens.len() - n_noise, n_spans, &key.fold_str("kept"));
        let noise = pieces(n_noise, n_spans, &key.fold_str("noise"));
        let mut spans = Spans {
            source: Vec::new(),
            target: Vec::new(),
        };
        let mut rest = tokens;
        let mut take = |n| {
            let (taken, left) = rest.split_at(n);
            rest = left;
            taken
        };
        for (i, (kept, noise)) in kept.into_iter().zip(noise).enumerate() {
            let sentinel = self.first_sentinel - i as u32;
            spans.source.extend(take(kept.len()));
            spans.source.push(sentinel);
            spans.target.push(sentinel);
            spans.target.extend(take(noise.len()));
        }
        spans.source.push(self.end_token);
        spans.target.push(self.end_token);
        spans
    }

    /// The lengths of source and target of a window of `length` tokens.
    pub fn lengths(&self, length: usize) -> (usize, usize) {
        let (n_noise, n_spans) = self.counts(length);
        (length - n_noise + n_spans + 1, n_noise + n_spans + 1)
    }

    /// How many of `length` tokens are noise, and in how many spans.
    fn counts(&self, length: usize) -> (usize, usize) {
        let n_noise = (length as f64 * self.rate).round() as usize;
        let n_noise = n_noise.clamp(1, length - 1);
        let n_spans = (n_noise as f64 / self.mean_span).round() as usize;
        (n_noise, n_spans.clamp(1, n_noise.min(length - n_noise)))
    }
}

/// Cuts `0 .. n` into `n_pieces` that are not empty, each way as likely as any.
fn pieces(n: usize, n_pieces: usize, key: &RandomKey) -> Vec<Range<usize>> {
    let mut cuts: Vec<usize> = shuffled(n - 1, key)
        .into_iter()
        .take(n_pieces - 1)
        .map(|cut| cut + 1)
        .collect();
    cuts.sort_unstable();
    let starts = [0].into_iter().chain(cuts.clone());
    let ends = cuts.iter().copied().chain([n]);
    starts.zip(ends).map(|(start, end)| start..end).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SENTINELS: Range<u32> = 900..1000;

    fn config() -> SpansConfig {
        SpansConfig::new(999, 100, 1, 0)
    }

    /// Puts each span back where its sentinel stands.
    fn filled(spans: &Spans) -> Vec<u32> {
        let (end, target) = spans.target.split_last().unwrap();
        assert_eq!(*end, 1);
        let mut text = Vec::new();
        for token in &spans.source[..spans.source.len() - 1] {
            if SENTINELS.contains(token) {
                let place = target.iter().position(|other| other == token).unwrap();
                let span = &target[place + 1..];
                let n = span.iter().take_while(|other| !SENTINELS.contains(other));
                text.extend(span.iter().take(n.count()));
            } else {
                text.push(*token);
            }
        }
        text
    }

    proptest! {
        #[test]
        fn source_and_target_make_the_window(
            length in 2usize..200, seed: u64, rate in 0.05..0.9, mean_span in 1.0..8.0
        ) {
            let config = config().with_rate(rate).with_mean_span(mean_span);
            prop_assume!(config.validate(length).is_ok());
            let tokens: Vec<u32> = (2..2 + length as u32).collect();
            let spans = config.apply(&tokens, &RandomKey::new(seed));
            prop_assert_eq!(filled(&spans), tokens);
            let (_, n_spans) = config.counts(length);
            prop_assert_eq!((spans.source.len(), spans.target.len()), config.lengths(length));
            let sentinels = spans.source.iter().filter(|token| SENTINELS.contains(token));
            let expected: Vec<u32> = (0..n_spans as u32).map(|i| 999 - i).collect();
            prop_assert_eq!(sentinels.copied().collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn t5_defaults_at_512_tokens() {
        // random_spans_noise_mask(512): round(512 * 0.15) = 77 tokens of noise in round(77 / 3) = 26 spans.
        assert_eq!(config().counts(512), (77, 26));
        assert_eq!(config().lengths(512), (435 + 26 + 1, 77 + 26 + 1));
    }

    #[test]
    fn a_key_always_cuts_the_same() {
        let tokens: Vec<u32> = (2..200).collect();
        let of_seed = |seed| config().apply(&tokens, &RandomKey::new(seed));
        assert_eq!(of_seed(1), of_seed(1));
        assert_ne!(of_seed(1), of_seed(2));
    }

    #[test]
    fn every_cut_is_as_likely_as_any() {
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..6000 {
            let first: Vec<usize> = pieces(5, 3, &RandomKey::new(seed))
                .iter()
                .map(|piece| piece.start)
                .collect();
            *counts.entry(first).or_insert(0) += 1;
        }
        // Two of four places: six ways, 1,000 each, with a standard deviation of 29.
        assert_eq!(counts.len(), 6);
        assert!(
            counts.values().all(|n| (850..1150).contains(n)),
            "{counts:?}"
        );
    }

    #[test]
    fn what_does_not_fit_names_the_field() {
        for (config, length, field) in [
            (config().with_rate(1.0), 100, "rate"),
            (config().with_mean_span(0.5), 100, "mean_span"),
            (config(), 1, "seq_length"),
            (SpansConfig::new(999, 3, 1, 0), 512, "n_sentinels"),
        ] {
            let error = config.validate(length).expect_err("it is invalid");
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
