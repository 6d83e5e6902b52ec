//! Routers: which experts a token goes to, and with which weights.

mod expert_choice;
mod groups;
mod hash;
mod noisy;
mod scoring;
mod select;
mod sinkhorn;

use burn::{
    config::Config,
    module::{Module, Param},
    nn::{Linear, LinearConfig},
    tensor::{DType, Device, Tensor, TensorData},
};
use emberlm_core::{InvalidConfig, RandomKey, RoutingStatistics, assert_valid, operators::linear};

use crate::{Choice, Choices};
pub use groups::{GroupScore, Groups};
pub use noisy::Noise;
pub use scoring::Scoring;
pub(crate) use scoring::sigmoid;
use select::Scores;

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

/// What a router is told besides the hidden states.
#[derive(Debug, Clone, Copy, Default)]
pub struct RouterInput<'a> {
    /// The tokens, one for each hidden state.
    pub tokens: Option<&'a [i64]>,
    /// Which of them are padding and go nowhere.
    pub padding: Option<&'a [bool]>,
    /// Where noise, jitter and chance come from.
    pub chance: Chance<'a>,
}

/// Where the random numbers of a router come from.
#[derive(Debug, Clone, Copy, Default)]
pub enum Chance<'a> {
    /// There are none: this is not training.
    #[default]
    Off,
    /// They are drawn from a key.
    Key(RandomKey),
    /// They are given, as those of another implementation.
    Given(&'a Draws),
}

/// Random numbers of a router.
#[derive(Debug, Clone, Default)]
pub struct Draws {
    /// What the router's input is multiplied by, `[n_tokens, d_model]`.
    pub jitter: Option<Tensor<2>>,
    /// Standard normal numbers for the noise of the logits, `[n_tokens, n_experts]`.
    pub normal: Option<Tensor<2>>,
    /// Numbers between 0 and 1, one a token, that second choices are taken by.
    pub uniform: Option<Vec<f64>>,
}

impl Chance<'_> {
    fn is_off(&self) -> bool {
        matches!(self, Self::Off)
    }
}

/// Where the tokens of a pass go.
#[derive(Debug, Clone)]
pub struct Routing {
    /// `[n_tokens, n_experts]`, with their noise; nothing where no router is learned.
    pub logits: Option<Tensor<2>>,
    /// `[n_tokens, n_experts]`: the scoring function of the logits.
    pub scores: Tensor<2>,
    /// The weights of the chosen experts, zero elsewhere. Shape: `[n_tokens, n_experts]`.
    pub gates: Tensor<2>,
    /// The choices, before any are dropped.
    pub choices: Choices,
    /// Which tokens are padding.
    pub padding: Option<Vec<bool>>,
    /// The noise of the logits.
    pub noise: Option<Noise>,
    /// Counts of this pass.
    pub statistics: RoutingStatistics,
    scoring: Scoring,
}

impl Routing {
    /// Scores that sum to one for each token, `[n_tokens, n_experts]`.
    pub fn probabilities(&self) -> Tensor<2> {
        match self.scoring {
            Scoring::Softmax => self.scores.clone(),
            Scoring::Sigmoid | Scoring::SqrtSoftplus => {
                self.scores.clone() / (self.scores.clone().sum_dim(1) + SMALLEST_SUM)
            }
        }
    }

    /// Whether a token is routed.
    pub fn is_routed(&self, token: usize) -> bool {
        is_routed(self.padding.as_deref(), token)
    }
}

fn is_routed(padding: Option<&[bool]>, token: usize) -> bool {
    padding.is_none_or(|padding| !padding[token])
}

/// DeepSeek's guard against a division by zero, which changes no other sum.
const SMALLEST_SUM: f64 = 1e-20;

// Parts of a router's random key.
const JITTER: u64 = 0;
const NOISE: u64 = 1;
const SECOND: u64 = 2;

/// Scores experts for each token, chooses, and weighs the choice.
///
/// ```text
/// logits = x W_gate
/// scores = f(logits)                        softmax, sigmoid, sqrt(softplus)
/// chosen = best(scores + bias)              by the method, within the groups
/// gates  = scale weights(scores of chosen)
/// ```
///
/// All of it in f32 at least, whatever the type of `x`; f64 stays f64. Experts with equal scores are taken in their order.
/// A token whose scores are no numbers is counted in the statistics, and its gates are none either.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_moe::{RouterConfig, RouterInput};
///
/// let device = Device::flex();
/// let router = RouterConfig::mixtral(16, 8, 2).init(&device);
/// let routing = router.forward(Tensor::ones([5, 16], &device), &RouterInput::default());
/// assert_eq!(routing.choices.all().len(), 10);
/// ```
#[derive(Module, Debug)]
pub struct Router {
    /// `[d_model, n_experts]`, without a bias; nothing where the experts are hashed.
    pub gate: Option<Linear>,
    /// `[d_model, n_experts]`: the size of the noise before its softplus.
    pub noise: Option<Linear>,
    /// `[n_experts]`: added to the scores for the choice alone. It has no gradient; see [`balance`](Self::balance).
    pub correction_bias: Option<Param<Tensor<1>>>,
    #[module(skip)]
    config: RouterConfig,
}

impl Router {
    /// How it was made.
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// Routes hidden states.
    ///
    /// # Shapes
    ///
    /// - `x`: `[n_tokens, d_model]`
    ///
    /// # Panics
    ///
    /// If the experts are hashed and the tokens are not there or not in the table, or if there is padding for another
    /// number of tokens.
    pub fn forward(&self, x: Tensor<2>, input: &RouterInput<'_>) -> Routing {
        let [n_tokens, _] = x.dims();
        if let Some(padding) = input.padding {
            let n = padding.len();
            assert_eq!(n, n_tokens, "padding: of {n} tokens, there are {n_tokens}");
        }
        let device = x.device();
        let dtype = at_least_f32(x.dtype());
        if let Method::Hash { .. } = self.config.method {
            return self.hashed(n_tokens, (&device, dtype), input);
        }
        let x = x.cast(dtype);
        let gate = self.gate.as_ref().expect("all methods but Hash have one");
        let jittered = self.jittered(x.clone(), input.chance);
        let clean = linear(jittered, gate.weight.val().cast(dtype), None);
        let noise = self.noise.as_ref().map(|layer| {
            let size = linear(x, layer.weight.val().cast(dtype), None);
            let drawn = normal(&clean, input.chance);
            Noise::new(clean.clone(), size, drawn)
        });
        let logits = noise.as_ref().map_or(clean, Noise::logits);
        let scores = self.config.scoring.forward(logits.clone());
        let on_host = self.read(&scores, &logits);
        let (considered, choices, statistics) = self.choose(on_host, input);
        let mask = considered.mask(&device, dtype);
        let mut gates = self.weigh(&logits, &scores, mask) * self.config.scale;
        if choices != considered {
            gates = gates * choices.mask(&device, dtype);
        }
        Routing {
            logits: Some(logits),
            scores,
            gates,
            choices,
            padding: input.padding.map(<[bool]>::to_vec),
            noise,
            statistics,
            scoring: self.config.scoring,
        }
    }

    /// In training, inputs times uniform numbers around one.
    fn jittered(&self, x: Tensor<2>, chance: Chance<'_>) -> Tensor<2> {
        let jitter = self.config.jitter;
        match chance {
            Chance::Key(key) if jitter > 0.0 => {
                let key = key.fold(JITTER);
                let factor = |i| 1.0 - jitter + 2.0 * jitter * key.uniform(i);
                x.clone() * drawn_like(&x, factor)
            }
            Chance::Given(Draws {
                jitter: Some(factors),
                ..
            }) => x * factors.clone(),
            _ => x,
        }
    }

    /// The scores, and what is chosen by, in one read from the device.
    fn read(&self, scores: &Tensor<2>, logits: &Tensor<2>) -> OnHost {
        let [n_tokens, n_experts] = scores.dims();
        let mut parts = vec![scores.clone().detach()];
        if let Some(bias) = &self.correction_bias {
            parts.push(bias.val().detach().cast(scores.dtype()).unsqueeze());
        }
        let by_logits = matches!(self.config.method, Method::Sinkhorn { .. });
        if by_logits {
            parts.push(logits.clone().detach());
        }
        let all = Tensor::cat(parts, 0).into_data().convert_dtype(DType::F64);
        let mut all = all.iter::<f64>();
        let scores: Vec<f64> = all.by_ref().take(n_tokens * n_experts).collect();
        let mut bias = Vec::new();
        if self.correction_bias.is_some() {
            bias.extend(all.by_ref().take(n_experts));
        }
        OnHost {
            scores: Scores {
                values: scores,
                n_experts,
            },
            bias,
            logits: by_logits.then(|| Scores {
                values: all.collect(),
                n_experts,
            }),
        }
    }

    /// What the weights are made of, and what stays of it.
    fn choose(
        &self,
        on_host: OnHost,
        input: &RouterInput<'_>,
    ) -> (Choices, Choices, RoutingStatistics) {
        let OnHost {
            mut scores,
            bias,
            logits,
        } = on_host;
        let is_routed = |token: usize| is_routed(input.padding, token);
        let mut statistics = statistics(&scores, is_routed);
        let considered = match self.config.method {
            Method::TopK { k } => {
                if !bias.is_empty() {
                    for token in 0..scores.n_tokens() {
                        let of_token = scores.of_mut(token).iter_mut().zip(&bias);
                        of_token.for_each(|(score, bias)| *score += bias);
                    }
                }
                if let Some(groups) = &self.config.groups {
                    groups.limit(&mut scores, k);
                }
                scores.top_k(k, is_routed)
            }
            Method::NoisyTopK { k } => scores.top_k(k, is_routed),
            Method::RandomSecond { .. } => scores.top_k(2, is_routed),
            Method::ExpertChoice { capacity_factor } => {
                expert_choice::expert_choice(&scores, capacity_factor, is_routed)
            }
            Method::Sinkhorn { k } => {
                let logits = logits.expect("they were read for this method");
                match input.chance.is_off() {
                    false => {
                        let routed = (0..scores.n_tokens()).filter(|token| is_routed(*token));
                        balanced_top_k(&logits, k, &routed.collect::<Vec<_>>())
                    }
                    true => logits.top_k(k, is_routed),
                }
            }
            Method::Hash { .. } => unreachable!("it has no scores"),
        };
        let choices = match (self.config.method, input.chance) {
            (Method::RandomSecond { threshold }, Chance::Key(key)) => {
                let key = key.fold(SECOND);
                random_second(&scores, &considered, threshold, |token| key.uniform(token))
            }
            (
                Method::RandomSecond { threshold },
                Chance::Given(Draws {
                    uniform: Some(uniform),
                    ..
                }),
            ) => random_second(&scores, &considered, threshold, |token| {
                uniform[token as usize]
            }),
            _ => considered.clone(),
        };
        statistics.load = choices.load();
        (considered, choices, statistics)
    }

    fn weigh(&self, logits: &Tensor<2>, scores: &Tensor<2>, mask: Tensor<2>) -> Tensor<2> {
        let renormalised = |weights: Tensor<2>| {
            let sums = weights.clone().sum_dim(1);
            weights / (sums + SMALLEST_SUM)
        };
        match self.config.gates {
            Gates::Scores => scores.clone() * mask,
            Gates::Renormalised => renormalised(scores.clone() * mask),
            Gates::SoftmaxOfChosen => {
                let most = logits.clone().detach().max_dim(1);
                renormalised((logits.clone() - most).exp() * mask)
            }
        }
    }

    fn hashed(
        &self,
        n_tokens: usize,
        (device, dtype): (&Device, DType),
        input: &RouterInput<'_>,
    ) -> Routing {
        let Method::Hash {
            k,
            vocab_size,
            seed,
        } = self.config.method
        else {
            unreachable!("the caller looked");
        };
        let tokens = input.tokens.expect("tokens: experts by a hash need them");
        let n = tokens.len();
        assert_eq!(
            n, n_tokens,
            "tokens: there are {n} for {n_tokens} hidden states"
        );
        let n_experts = self.config.n_experts;
        let is_routed = |token: usize| is_routed(input.padding, token);
        let choices = hash::hash(tokens, k, (vocab_size, n_experts), seed, is_routed);
        let mask = choices.mask(device, dtype);
        let n_routed = (0..n_tokens).filter(|token| is_routed(*token)).count();
        Routing {
            logits: None,
            scores: mask.clone() / k as f64,
            gates: mask * (self.config.scale / k as f64),
            statistics: RoutingStatistics {
                load: choices.load(),
                n_tokens: n_routed as u64,
                ..RoutingStatistics::default()
            },
            choices,
            padding: input.padding.map(<[bool]>::to_vec),
            noise: None,
            scoring: Scoring::Softmax,
        }
    }

    /// Moves the bias of the choice towards balance: up by `rate` for each expert with fewer tokens than
    /// the mean, down for each with more. Called once a step, outside the gradient, with the step's load.
    ///
    /// Wang et al. 2024, <https://arxiv.org/abs/2408.15664>, algorithm 1; DeepSeek-V3 has rate 0.001. `recentred` takes the
    /// mean of the changes out of them, as torchtitan does, so that the bias does not drift.
    ///
    /// # Panics
    ///
    /// If the load is of another number of experts.
    pub fn balance(&mut self, load: &[u64], rate: f64, recentred: bool) {
        let Some(bias) = self.correction_bias.take() else {
            return;
        };
        let n_experts = self.config.n_experts;
        let n = load.len();
        assert_eq!(n, n_experts, "load: of {n} experts, there are {n_experts}");
        let total: u64 = load.iter().sum();
        let mut changes: Vec<f64> = load
            .iter()
            .map(|load| {
                // In whole numbers: `mean - load` times the number of experts.
                let missing = total as i128 - *load as i128 * n_experts as i128;
                missing.signum() as f64 * rate
            })
            .collect();
        if recentred {
            let mean = changes.iter().sum::<f64>() / n_experts as f64;
            changes.iter_mut().for_each(|change| *change -= mean);
        }
        let value = bias.val().detach();
        let changes = TensorData::new(changes, [n_experts]);
        let changes = Tensor::from_data(changes, (&value.device(), value.dtype()));
        self.correction_bias = Some(bias.map(|_| (value + changes).set_require_grad(false)));
    }
}

/// What was read from the device.
struct OnHost {
    scores: Scores,
    bias: Vec<f64>,
    logits: Option<Scores>,
}

/// All counts but the load.
fn statistics(scores: &Scores, is_routed: impl Fn(usize) -> bool) -> RoutingStatistics {
    let mut statistics = RoutingStatistics::default();
    for token in (0..scores.n_tokens()).filter(|token| is_routed(*token)) {
        let of_token = scores.of(token);
        let sum: f64 = of_token.iter().sum();
        statistics.n_tokens += 1;
        if sum.is_finite() {
            let shares = of_token.iter().map(|score| score / sum);
            let parts = shares.filter(|p| *p > 0.0).map(|p| -p * p.ln());
            statistics.entropy_sum += parts.sum::<f64>();
        } else {
            statistics.n_not_finite += 1;
        }
    }
    statistics
}

/// Drops second choices by chance: one with the gate `g` of two stays where `g / threshold` is above the number drawn.
fn random_second(
    scores: &Scores,
    both: &Choices,
    threshold: f64,
    uniform: impl Fn(u64) -> f64,
) -> Choices {
    let refused: Vec<bool> = (both.all().chunk_by(|a, b| a.token == b.token))
        .flat_map(|of_token| {
            let score = |choice: &Choice| scores.of(choice.token as usize)[choice.expert as usize];
            let sum: f64 = of_token.iter().map(score).sum();
            // Written so that what is no number stays.
            let is_refused = |choice: &Choice| {
                choice.rank == 1
                    && score(choice) / sum <= threshold * uniform(u64::from(choice.token))
            };
            of_token.iter().map(is_refused).collect::<Vec<_>>()
        })
        .collect();
    let stays = both
        .all()
        .iter()
        .zip(refused)
        .filter(|(_, refused)| !refused);
    let stays = stays.map(|(choice, _)| *choice).collect();
    Choices::new(both.n_tokens(), both.n_experts(), stays)
}

/// Standard normal numbers in the shape of `x`, where there is chance.
fn normal(x: &Tensor<2>, chance: Chance<'_>) -> Option<Tensor<2>> {
    match chance {
        Chance::Off => None,
        Chance::Key(key) => {
            let key = key.fold(NOISE);
            Some(drawn_like(x, |i| key.normal(i)))
        }
        Chance::Given(draws) => draws.normal.clone(),
    }
}

fn drawn_like(x: &Tensor<2>, draw: impl Fn(u64) -> f64) -> Tensor<2> {
    let dims = x.dims();
    let drawn: Vec<f64> = (0..dims.iter().product::<usize>() as u64)
        .map(draw)
        .collect();
    Tensor::from_data(TensorData::new(drawn, dims), (&x.device(), x.dtype()))
}

/// The best experts of the routed tokens under Sinkhorn's normalisation of those tokens.
fn balanced_top_k(logits: &Scores, k: usize, routed: &[usize]) -> Choices {
    let of_routed = Scores {
        values: routed
            .iter()
            .flat_map(|token| logits.of(*token))
            .copied()
            .collect(),
        n_experts: logits.n_experts,
    };
    let chosen = sinkhorn::sinkhorn(&of_routed).top_k(k, |_| true);
    let back = chosen.all().iter().map(|choice| Choice {
        token: routed[choice.token as usize] as u32,
        ..*choice
    });
    Choices::new(logits.n_tokens(), logits.n_experts, back.collect())
}

fn at_least_f32(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}
