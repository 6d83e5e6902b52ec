//! Which experts the tokens of a pass go to, on the host.

use burn::tensor::{DType, Device, Tensor, TensorData};

/// A token's choice of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Choice {
    /// The token, counted over the batch: `row seq_length + position`.
    pub token: u32,
    /// The expert.
    pub expert: u32,
    /// How many experts the token likes better: 0 is its first choice.
    pub rank: u32,
}

/// All choices of a pass, by token and rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choices {
    n_tokens: usize,
    n_experts: usize,
    all: Vec<Choice>,
}

impl Choices {
    /// Choices in any order.
    ///
    /// # Panics
    ///
    /// If a token or an expert is out of range.
    pub fn new(n_tokens: usize, n_experts: usize, mut all: Vec<Choice>) -> Self {
        for choice in &all {
            assert!(
                (choice.token as usize) < n_tokens,
                "token: {} is not below {n_tokens}",
                choice.token
            );
            assert!(
                (choice.expert as usize) < n_experts,
                "expert: {} is not below {n_experts}",
                choice.expert
            );
        }
        all.sort_unstable_by_key(|choice| (choice.token, choice.rank));
        Self {
            n_tokens,
            n_experts,
            all,
        }
    }

    /// Number of tokens, routed or not.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Number of experts.
    pub fn n_experts(&self) -> usize {
        self.n_experts
    }

    /// All of them, by token and rank.
    pub fn all(&self) -> &[Choice] {
        &self.all
    }

    /// Those for which `keep` is true.
    pub fn filter(&self, keep: impl Fn(&Choice) -> bool) -> Self {
        Self {
            all: self.all.iter().copied().filter(keep).collect(),
            ..*self
        }
    }

    /// How often each expert is chosen.
    pub fn load(&self) -> Vec<u64> {
        let mut load = vec![0; self.n_experts];
        self.all
            .iter()
            .for_each(|choice| load[choice.expert as usize] += 1);
        load
    }

    /// One where a token chose an expert, else zero.
    ///
    /// # Shapes
    ///
    /// - output: `[n_tokens, n_experts]`
    pub fn mask(&self, device: &Device, dtype: DType) -> Tensor<2> {
        let mut mask = vec![0f32; self.n_tokens * self.n_experts];
        for choice in &self.all {
            mask[choice.token as usize * self.n_experts + choice.expert as usize] = 1.0;
        }
        let mask = TensorData::new(mask, [self.n_tokens, self.n_experts]);
        Tensor::from_data(mask, (device, dtype))
    }
}
