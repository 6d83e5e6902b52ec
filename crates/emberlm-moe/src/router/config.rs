//! How a router is made: by the name of its publication, or of its parts.

use burn::{
    config::Config,
    module::Param,
    nn::LinearConfig,
    tensor::{Device, Tensor},
};
use emberlm_core::{InvalidConfig, assert_valid};

use super::{Groups, Router, Scoring};

/// How tokens and experts find each other.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum Method {
    /// Each token takes the `k` experts with the best scores.
    TopK {
        /// Experts of a token.
        k: usize,
    },
    /// The same, of scores with noise in training, whose size is learned.
    NoisyTopK {
        /// Experts of a token.
        k: usize,
    },
    /// The two best, of which the second is taken by chance in training: with the probability `g_2 / threshold` of its
    /// gate `g_2`.
    RandomSecond {
        /// From this gate on the second is always taken. GShard: 0.5; Mesh TensorFlow and ST-MoE: 0.2.
        threshold: f64,
    },
    /// Each expert takes the tokens with the best scores for it.
    ExpertChoice {
        /// Experts of a token in the mean.
        capacity_factor: f64,
    },
    /// In training the `k` best under Sinkhorn's normalisation, by which all experts are liked alike; else the `k` best.
    Sinkhorn {
        /// Experts of a token.
        k: usize,
    },
    /// Experts by a fixed hash of the token: nothing is learned.
    Hash {
        /// Experts of a token.
        k: usize,
        /// Number of tokens.
        vocab_size: usize,
        /// Seed of the hash.
        seed: u64,
    },
}

/// How the scores of the chosen experts make their weights.
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum Gates {
    /// They are the weights.
    Scores,
    /// Divided by their sum over the chosen experts (and `1e-20`).
    Renormalised,
    /// The softmax of the logits of the chosen experts alone. With [`Scoring::Softmax`] this is `Renormalised`.
    SoftmaxOfChosen,
}

/// Configuration of a [`Router`]. The constructors have the names of the publications.
#[derive(Config, Debug, PartialEq)]
pub struct RouterConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of experts.
    pub n_experts: usize,
    /// How tokens and experts find each other.
    pub method: Method,
    /// The function that makes scores of logits. Default: softmax.
    #[config(default = "Scoring::Softmax")]
    pub scoring: Scoring,
    /// How scores make weights. Default: renormalised.
    #[config(default = "Gates::Renormalised")]
    pub gates: Gates,
    /// A limit to few groups of experts. Default: none.
    pub groups: Option<Groups>,
    /// What the weights are multiplied by in the end. Default: 1.
    #[config(default = 1.0)]
    pub scale: f64,
    /// In training the router's input is multiplied by uniform numbers from `1 - jitter` to `1 + jitter`. Default: 0.
    #[config(default = 0.0)]
    pub jitter: f64,
    /// Whether the choice, and not the weights, goes by scores plus a bias of each expert, which balances the load without
    /// a loss: [`Router::balance`]. Default: no.
    #[config(default = false)]
    pub correction_bias: bool,
    /// Whether a decoder may take a router that looks at later tokens. Default: no.
    #[config(default = false)]
    pub allow_leak: bool,
}

impl RouterConfig {
    /// Mixtral's: softmax, the `k` best, renormalised. Jiang et al. 2024, <https://arxiv.org/abs/2401.04088>, section 2.1.
    pub fn mixtral(d_model: usize, n_experts: usize, k: usize) -> Self {
        Self::new(d_model, n_experts, Method::TopK { k })
    }

    /// The Switch Transformer's: the best expert with its probability for a weight, jitter 0.01. Fedus et al. 2021,
    /// <https://arxiv.org/abs/2101.03961>, section 2.1.
    pub fn switch(d_model: usize, n_experts: usize) -> Self {
        Self::new(d_model, n_experts, Method::TopK { k: 1 })
            .with_gates(Gates::Scores)
            .with_jitter(0.01)
    }

    /// The sparsely-gated mixture's: the `k` best of noisy logits, their softmax. Shazeer et al. 2017,
    /// <https://arxiv.org/abs/1701.06538>, equations 3 to 5.
    pub fn noisy_top_k(d_model: usize, n_experts: usize, k: usize) -> Self {
        Self::new(d_model, n_experts, Method::NoisyTopK { k }).with_gates(Gates::SoftmaxOfChosen)
    }

    /// GShard's: two experts, the second by chance. Lepikhin et al. 2020, <https://arxiv.org/abs/2006.16668>, algorithm 1.
    /// There a second choice that chance refuses still takes a place of the expert's capacity; here it leaves it to others,
    /// as in Mesh TensorFlow.
    pub fn gshard(d_model: usize, n_experts: usize) -> Self {
        Self::new(d_model, n_experts, Method::RandomSecond { threshold: 0.5 })
    }

    /// DeepSeek-V2's: softmax, the `k` best of the best groups by their maximum, weights not renormalised, times
    /// `scale`. DeepSeek-AI 2024, <https://arxiv.org/abs/2405.04434>, section 2.2.
    pub fn deepseek_v2(d_model: usize, n_experts: usize, k: usize, scale: f64) -> Self {
        Self::new(d_model, n_experts, Method::TopK { k })
            .with_gates(Gates::Scores)
            .with_scale(scale)
    }

    /// DeepSeek-V3's: sigmoid, the `k` best by scores plus a bias, renormalised, times `scale`. DeepSeek-AI 2024,
    /// <https://arxiv.org/abs/2412.19437>, section 2.1.2.
    pub fn deepseek_v3(d_model: usize, n_experts: usize, k: usize, scale: f64) -> Self {
        Self::new(d_model, n_experts, Method::TopK { k })
            .with_scoring(Scoring::Sigmoid)
            .with_scale(scale)
            .with_correction_bias(true)
    }

    /// Expert choice: experts take the tokens they like best, with their probabilities for weights. Zhou et al. 2022,
    /// <https://arxiv.org/abs/2202.09368>, section 3.2.
    pub fn expert_choice(d_model: usize, n_experts: usize, capacity_factor: f64) -> Self {
        Self::new(d_model, n_experts, Method::ExpertChoice { capacity_factor })
            .with_gates(Gates::Scores)
    }

    /// Sinkhorn's, as Megatron-LM has it: weights are the sigmoid of the logit for one expert, the softmax for several.
    /// Clark et al. 2022, <https://arxiv.org/abs/2202.01169>, section 3.1.
    pub fn sinkhorn(d_model: usize, n_experts: usize, k: usize) -> Self {
        Self::new(d_model, n_experts, Method::Sinkhorn { k })
            .with_gates(Gates::Scores)
            .with_scoring(match k {
                1 => Scoring::Sigmoid,
                _ => Scoring::Softmax,
            })
    }

    /// A hash layer's: `k` experts of equal weight by a random table of the tokens. Roller et al. 2021,
    /// <https://arxiv.org/abs/2106.04426>, section 3.2.
    pub fn hash(d_model: usize, n_experts: usize, k: usize, vocab_size: usize) -> Self {
        let method = Method::Hash {
            k,
            vocab_size,
            seed: 0,
        };
        Self::new(d_model, n_experts, method)
    }

    /// Experts of a token in the mean.
    pub fn experts_per_token(&self) -> f64 {
        match self.method {
            Method::TopK { k }
            | Method::NoisyTopK { k }
            | Method::Sinkhorn { k }
            | Method::Hash { k, .. } => k as f64,
            Method::RandomSecond { .. } => 2.0,
            Method::ExpertChoice { capacity_factor } => capacity_factor,
        }
    }

    /// Whether a token's experts depend on no later token.
    pub fn is_causal(&self) -> bool {
        !matches!(
            self.method,
            Method::ExpertChoice { .. } | Method::Sinkhorn { .. }
        )
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, more experts of a token than there are, groups that do not divide the experts or hold too few, a factor that
    /// is no positive number, or options that the method has no use for.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        InvalidConfig::require_positive(&[
            ("d_model", self.d_model),
            ("n_experts", self.n_experts),
        ])?;
        let range = |field, range, value| InvalidConfig::Range {
            field,
            range,
            value,
        };
        let k = match self.method {
            Method::ExpertChoice { capacity_factor } => {
                if !(capacity_factor > 0.0 && capacity_factor <= self.n_experts as f64) {
                    return Err(range(
                        "capacity_factor",
                        "above 0, and at most n_experts",
                        capacity_factor,
                    ));
                }
                1
            }
            Method::RandomSecond { threshold } if !(threshold > 0.0 && threshold <= 1.0) => {
                return Err(range("threshold", "above 0, and at most 1", threshold));
            }
            Method::Hash { k, vocab_size, .. } => {
                InvalidConfig::require_positive(&[("vocab_size", vocab_size)])?;
                k
            }
            _ => self.experts_per_token() as usize,
        };
        InvalidConfig::require_positive(&[("k", k)])?;
        if k > self.n_experts {
            return Err(range("k", "at most n_experts", k as f64));
        }
        for (field, value, zero_allowed) in
            [("scale", self.scale, false), ("jitter", self.jitter, true)]
        {
            if !(value.is_finite() && (value > 0.0 || zero_allowed && value == 0.0)) {
                return Err(range(field, "a positive number", value));
            }
        }
        let by_scores = matches!(self.method, Method::TopK { .. });
        let unsupported = |field, reason| Err(InvalidConfig::Unsupported { field, reason });
        if matches!(self.method, Method::Hash { .. }) && self.jitter > 0.0 {
            return unsupported("jitter", "a hash does not look at the hidden states");
        }
        match (by_scores, &self.groups, self.correction_bias) {
            (false, Some(_), _) => unsupported("groups", "they limit the method TopK alone"),
            (false, None, true) => {
                unsupported("correction_bias", "it is for the method TopK alone")
            }
            (true, Some(groups), _) => groups.validate(self.n_experts, k),
            _ => Ok(()),
        }
    }

    /// Makes a router with burn-nn's initialisation.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> Router {
        assert_valid(self.validate());
        let linear = || {
            LinearConfig::new(self.d_model, self.n_experts)
                .with_bias(false)
                .init(device)
        };
        let is_learned = !matches!(self.method, Method::Hash { .. });
        let is_noisy = matches!(self.method, Method::NoisyTopK { .. });
        let zeros = || Tensor::zeros([self.n_experts], device);
        Router {
            gate: is_learned.then(linear),
            noise: is_noisy.then(linear),
            correction_bias: (self.correction_bias)
                .then(|| Param::from_tensor(zeros()).set_require_grad(false)),
            config: self.clone(),
        }
    }
}
