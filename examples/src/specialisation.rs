//! What the experts of a model have specialised in: which classes of tokens they get, and whether that is more than chance.

use emberlm::core::{Choices, RandomKey};

/// The choices of one layer over a text, and the class of every token.
#[derive(Debug, Clone)]
pub struct ExpertClasses {
    n_experts: usize,
    n_classes: usize,
    /// Of each choice, the expert and the token.
    choices: Vec<(u32, u32)>,
    /// Of each token.
    classes: Vec<u32>,
}

/// How much the expert tells of the class of its token, in bits.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Information {
    /// Mutual information of expert and class over all choices.
    pub bits: f64,
    /// The mean of what is left where classes are shuffled over the tokens: a finite text is never without.
    pub shuffled_mean: f64,
    /// The largest of these.
    pub shuffled_most: f64,
    /// Entropy of the classes: the most that there is to tell.
    pub of_classes: f64,
}

impl ExpertClasses {
    /// No tokens yet.
    pub fn new(n_experts: usize, n_classes: usize) -> Self {
        Self {
            n_experts,
            n_classes,
            choices: Vec::new(),
            classes: Vec::new(),
        }
    }

    /// Adds tokens: their choices, and a class for each.
    ///
    /// # Panics
    ///
    /// If there is not one class below `n_classes` for each token, or the experts are others.
    pub fn add(&mut self, choices: &Choices, classes: &[u32]) {
        assert_eq!(
            classes.len(),
            choices.n_tokens(),
            "classes: one for each token"
        );
        assert_eq!(
            choices.n_experts(),
            self.n_experts,
            "n_experts: of the choices"
        );
        let known = classes
            .iter()
            .all(|class| (*class as usize) < self.n_classes);
        assert!(known, "classes: below {}", self.n_classes);
        let first = self.classes.len() as u32;
        let all = choices.all().iter();
        self.choices
            .extend(all.map(|choice| (choice.expert, first + choice.token)));
        self.classes.extend_from_slice(classes);
    }

    /// How often each expert was chosen for each class: `[n_experts][n_classes]`.
    pub fn counts(&self) -> Vec<Vec<u64>> {
        self.counts_of(&self.classes)
    }

    fn counts_of(&self, classes: &[u32]) -> Vec<Vec<u64>> {
        let mut counts = vec![vec![0; self.n_classes]; self.n_experts];
        for (expert, token) in &self.choices {
            counts[*expert as usize][classes[*token as usize] as usize] += 1;
        }
        counts
    }

    /// Mutual information `sum_ec p(e, c) log2 (p(e, c) / (p(e) p(c)))`, beside that of `n_shuffles` random orders of the
    /// classes.
    ///
    /// # Panics
    ///
    /// Without any shuffle.
    pub fn information(&self, n_shuffles: usize, seed: u64) -> Information {
        assert!(n_shuffles > 0, "n_shuffles: at least 1");
        let counts = self.counts();
        let shuffled: Vec<f64> = (0..n_shuffles as u64)
            .map(|shuffle| {
                let key = RandomKey::new(seed).fold_str("classes").fold(shuffle);
                let mut classes = self.classes.clone();
                // Fisher and Yates.
                for i in (1..classes.len()).rev() {
                    classes.swap(i, key.below(i as u64, i as u64 + 1) as usize);
                }
                mutual_information(&self.counts_of(&classes))
            })
            .collect();
        let of_classes = (0..self.n_classes).map(|class| counts.iter().map(|of| of[class]).sum());
        Information {
            bits: mutual_information(&counts),
            shuffled_mean: shuffled.iter().sum::<f64>() / n_shuffles as f64,
            shuffled_most: shuffled.iter().copied().fold(0.0, f64::max),
            of_classes: entropy(of_classes),
        }
    }
}

/// In bits.
fn entropy(counts: impl Iterator<Item = u64>) -> f64 {
    let counts: Vec<f64> = counts.map(|count| count as f64).collect();
    let total: f64 = counts.iter().sum();
    let shares = counts
        .iter()
        .filter(|count| **count > 0.0)
        .map(|count| count / total);
    shares.map(|share| -share * share.log2()).sum()
}

/// `H(experts) + H(classes) - H(both)`, in bits.
fn mutual_information(counts: &[Vec<u64>]) -> f64 {
    let n_classes = counts.first().map_or(0, Vec::len);
    let of_experts = entropy(counts.iter().map(|of| of.iter().sum()));
    let of_classes = (0..n_classes).map(|class| counts.iter().map(|of| of[class]).sum());
    let both = entropy(counts.iter().flatten().copied());
    (of_experts + entropy(of_classes) - both).max(0.0)
}

#[cfg(test)]
mod tests {
    use emberlm::core::Choice;

    use super::*;

    fn choices(experts: &[u32]) -> Choices {
        let all = (0..).zip(experts).map(|(token, expert)| Choice {
            token,
            expert: *expert,
            rank: 0,
        });
        Choices::new(experts.len(), 2, all.collect())
    }

    #[test]
    fn an_expert_that_names_the_class_tells_all_of_it() {
        let mut layer = ExpertClasses::new(2, 2);
        for _ in 0..50 {
            layer.add(&choices(&[0, 1, 1, 0]), &[1, 0, 0, 1]);
        }
        assert_eq!(layer.counts(), [[0, 100], [100, 0]]);
        let information = layer.information(10, 1);
        assert!(
            (information.bits - 1.0).abs() < 1e-12 && (information.of_classes - 1.0).abs() < 1e-12
        );
        // Of 200 tokens in a table of 2 by 2, chance leaves about 1 / (2 n ln 2) bits.
        assert!(information.shuffled_most < 0.05 && information.shuffled_mean > 0.0);
    }

    #[test]
    fn experts_that_know_nothing_are_like_chance() {
        let key = RandomKey::new(7);
        let mut layer = ExpertClasses::new(2, 3);
        for i in 0..400u64 {
            layer.add(
                &choices(&[key.below(i, 2) as u32]),
                &[key.below(1000 + i, 3) as u32],
            );
        }
        let information = layer.information(50, 2);
        assert!(
            information.bits <= 1.5 * information.shuffled_most,
            "{information:?}"
        );
    }
}
