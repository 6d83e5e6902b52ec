//! chrF of translations, with the numbers of sacreBLEU.

use std::iter;

use crate::ngrams::{Overlap, is_space, segments, words};

/// Which n-grams chrF counts, and how much recall weighs.
#[derive(Debug, Clone, PartialEq)]
pub struct ChrfOptions {
    /// The longest n-grams of characters. Default: 6.
    pub char_order: usize,
    /// The longest n-grams of words. Default: 0, no words.
    pub word_order: usize,
    /// How many times as much recall weighs as precision. Default: 2.
    pub beta: f64,
}

impl Default for ChrfOptions {
    /// chrF2: Popović 2016, <https://aclanthology.org/W16-2341>.
    fn default() -> Self {
        Self {
            char_order: 6,
            word_order: 0,
            beta: 2.0,
        }
    }
}

impl ChrfOptions {
    /// chrF++, with words and pairs of words: Popović 2017, <https://aclanthology.org/W17-4770>.
    pub fn plus_plus() -> Self {
        Self {
            word_order: 2,
            ..Self::default()
        }
    }
}

/// chrF of a corpus, from 0 to 100, one reference a hypothesis.
///
/// Popović 2015, <https://aclanthology.org/W15-3049>: with `P` and `R` the shares of the hypotheses' and the
/// references' n-grams that match, averaged over the lengths,
///
/// `chrF = 100 (1 + beta^2) P R / (beta^2 P + R)`.
///
/// As in sacreBLEU's default (signature `nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no`): the counts of all segments are
/// added first, case counts, white space does not, and lengths that one side has no n-grams of are left out of the
/// average. A segment whose reference is too short for a length adds nothing to it. A character is a code point. For
/// words, ASCII punctuation is cut off the end of a word, or else the beginning, one character.
///
/// Equals sacreBLEU's `corpus_chrf(hypotheses, [references])`. No hypotheses at all score 0.
///
/// ```
/// use emberlm_text::{ChrfOptions, corpus_chrf};
///
/// let (hypotheses, references) = (["the cat sat on the mat"], ["the cat sat on a mat"]);
/// let chrf2 = corpus_chrf(&hypotheses, &references, &ChrfOptions::default());
/// let chrf_plus_plus = corpus_chrf(&hypotheses, &references, &ChrfOptions::plus_plus());
/// assert!((chrf2 - 72.0848317308462).abs() < 1e-9);
/// assert!((chrf_plus_plus - 72.03039245302905).abs() < 1e-9);
/// ```
///
/// # Panics
///
/// If there are more or fewer references than hypotheses.
pub fn corpus_chrf<H: AsRef<str>, R: AsRef<str>>(
    hypotheses: &[H],
    references: &[R],
    options: &ChrfOptions,
) -> f64 {
    let mut sums = vec![Overlap::default(); options.char_order + options.word_order];
    for (hypothesis, reference) in segments(hypotheses, references) {
        for (sum, overlap) in sums
            .iter_mut()
            .zip(overlaps(hypothesis, reference, options))
        {
            sum.add(overlap);
        }
    }
    score(&sums, options.beta)
}

/// chrF of one segment: [`corpus_chrf`] of it alone. Equals sacreBLEU's `sentence_chrf(hypothesis, [reference])`.
pub fn sentence_chrf(hypothesis: &str, reference: &str, options: &ChrfOptions) -> f64 {
    corpus_chrf(&[hypothesis], &[reference], options)
}

/// Of characters, shortest n-grams first, then of words.
fn overlaps(hypothesis: &str, reference: &str, options: &ChrfOptions) -> Vec<Overlap> {
    let texts = [hypothesis, reference];
    let characters =
        texts.map(|text| -> Vec<char> { text.chars().filter(|&c| !is_space(c)).collect() });
    let words = texts.map(|text| -> Vec<&str> { words(text).flat_map(cut_punctuation).collect() });
    let of_characters =
        (1..=options.char_order).map(|order| Overlap::of(&characters[0], &characters[1], order));
    let of_words = (1..=options.word_order).map(|order| Overlap::of(&words[0], &words[1], order));
    of_characters
        .chain(of_words)
        .map(|overlap| match overlap.reference {
            0 => Overlap::default(),
            _ => overlap,
        })
        .collect()
}

/// A word without one character of punctuation at its end, or else at its beginning, and that character.
fn cut_punctuation(word: &str) -> impl Iterator<Item = &str> {
    let [first, last] = [word.chars().next(), word.chars().next_back()].map(|c| {
        c.filter(char::is_ascii_punctuation)
            .map_or(0, char::len_utf8)
    });
    let cut = match (first, last) {
        (_, 1) => word.len() - 1,
        (first, _) => first,
    };
    let (head, tail) = word.split_at(cut);
    iter::once(head)
        .chain(iter::once(tail))
        .filter(|part| !part.is_empty())
}

fn score(overlaps: &[Overlap], beta: f64) -> f64 {
    let (mut precision, mut recall, mut n_orders) = (0.0, 0.0, 0);
    for overlap in overlaps {
        if overlap.hypothesis > 0 && overlap.reference > 0 {
            precision += overlap.matches as f64 / overlap.hypothesis as f64;
            recall += overlap.matches as f64 / overlap.reference as f64;
            n_orders += 1;
        }
    }
    if precision + recall == 0.0 {
        return 0.0;
    }
    let [precision, recall] = [precision, recall].map(|sum| sum / f64::from(n_orders));
    let weight = beta * beta;
    100.0 * (1.0 + weight) * precision * recall / (weight * precision + recall)
}
