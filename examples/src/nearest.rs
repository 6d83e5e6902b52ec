//! A translation without a model: that of the training sentence most like the source.

use std::collections::HashMap;

use emberlm::text::Pair;

/// Finds the training pair whose source is nearest: by the cosine of TF-IDF vectors over words, `tf ln(N / df)`, in small
/// letters.
pub struct Nearest<'a> {
    pairs: &'a [&'a Pair],
    /// Of each word: its rarity, and the pairs that have it, how often each.
    words: HashMap<String, (f64, Vec<(usize, f64)>)>,
    norms: Vec<f64>,
}

impl<'a> Nearest<'a> {
    /// Among these pairs, of which there is at least one.
    pub fn new(pairs: &'a [&'a Pair]) -> Self {
        let mut words: HashMap<String, (f64, Vec<(usize, f64)>)> = HashMap::new();
        for (i, pair) in pairs.iter().enumerate() {
            for (word, count) in counts(&pair.source) {
                words.entry(word).or_default().1.push((i, count));
            }
        }
        let mut squares = vec![0.0; pairs.len()];
        for (rarity, postings) in words.values_mut() {
            *rarity = (pairs.len() as f64 / postings.len() as f64).ln();
            for (i, count) in postings {
                squares[*i] += (*count * *rarity).powi(2);
            }
        }
        let norms = squares.into_iter().map(f64::sqrt).collect();
        Self {
            pairs,
            words,
            norms,
        }
    }

    /// The nearest pair; of several the first, and the first of all if no word is known.
    pub fn find(&self, source: &str) -> &'a Pair {
        let mut products = vec![0.0; self.pairs.len()];
        for (word, count) in counts(source) {
            if let Some((rarity, postings)) = self.words.get(&word) {
                for (i, of_pair) in postings {
                    products[*i] += count * of_pair * rarity * rarity;
                }
            }
        }
        let (mut best, mut largest) = (0, 0.0);
        for (i, (product, norm)) in products.iter().zip(&self.norms).enumerate() {
            // A sentence of words that all have has no norm.
            if *product > largest * norm && *norm > 0.0 {
                (best, largest) = (i, product / norm);
            }
        }
        self.pairs[best]
    }
}

/// The words of a text in the order of the alphabet, so that sums are always the same.
fn counts(text: &str) -> std::collections::BTreeMap<String, f64> {
    let mut counts = std::collections::BTreeMap::new();
    let words = text.split(|c: char| !c.is_alphanumeric());
    for word in words.filter(|word| !word.is_empty()) {
        *counts.entry(word.to_lowercase()).or_default() += 1.0;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rare_words_decide() {
        let pair = |source: &str| Pair {
            source: source.to_owned(),
            target: source.to_uppercase(),
            reference: None,
        };
        let pairs = [
            "the king of the land",
            "the sea",
            "the ark of the sea",
            "the the of of",
        ]
        .map(pair);
        let pairs: Vec<&Pair> = pairs.iter().collect();
        let nearest = Nearest::new(&pairs);
        for (source, found) in [
            ("The king.", 0),
            ("of the sea the the", 1),
            ("Of the ark", 2),
            ("nothing known", 0),
        ] {
            assert_eq!(nearest.find(source), pairs[found], "{source}");
        }
    }
}
