//! What BLEU and chrF share: words as Python splits them, and n-grams that two texts have in common.

use std::{collections::HashMap, hash::Hash};

/// How many n-grams of one order two texts have, and how many of the hypothesis' are the reference's too.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Overlap {
    pub(crate) hypothesis: u64,
    pub(crate) reference: u64,
    /// Each n-gram counts at most as often as the reference has it.
    pub(crate) matches: u64,
}

impl Overlap {
    /// Of the n-grams of `order` elements.
    pub(crate) fn of<T: Hash + Eq>(hypothesis: &[T], reference: &[T], order: usize) -> Self {
        let in_reference = counts(reference, order);
        let matches = counts(hypothesis, order)
            .into_iter()
            .map(|(ngram, count)| count.min(in_reference.get(ngram).copied().unwrap_or(0)));
        Self {
            hypothesis: number(hypothesis, order),
            reference: number(reference, order),
            matches: matches.sum(),
        }
    }

    pub(crate) fn add(&mut self, other: Self) {
        self.hypothesis += other.hypothesis;
        self.reference += other.reference;
        self.matches += other.matches;
    }
}

fn counts<T: Hash + Eq>(items: &[T], order: usize) -> HashMap<&[T], u64> {
    let mut counts = HashMap::new();
    for ngram in items.windows(order) {
        *counts.entry(ngram).or_insert(0) += 1;
    }
    counts
}

fn number<T>(items: &[T], order: usize) -> u64 {
    items.windows(order).len() as u64
}

/// The words of a text, as Python's `str.split()` finds them.
pub(crate) fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(is_space).filter(|word| !word.is_empty())
}

/// Python's white space: Unicode's, and four separators of ASCII.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The pairs of a hypothesis and its reference.
///
/// # Panics
///
/// If there is another number of references.
pub(crate) fn segments<'a, H: AsRef<str>, R: AsRef<str>>(
    hypotheses: &'a [H],
    references: &'a [R],
) -> impl Iterator<Item = (&'a str, &'a str)> {
    assert_eq!(
        hypotheses.len(),
        references.len(),
        "hypotheses and references: each hypothesis needs one reference"
    );
    hypotheses
        .iter()
        .map(AsRef::as_ref)
        .zip(references.iter().map(AsRef::as_ref))
}
