//! Routers: which experts a token goes to, and with which weights.

mod config;
mod expert_choice;
mod groups;
mod hash;
mod noisy;
mod scoring;
mod select;
mod sinkhorn;

use burn::{
    module::{Module, Param},
    nn::Linear,
    tensor::{DType, Device, Tensor, TensorData},
};
use emberlm_core::{RandomKey, RoutingStatistics, operators::linear};

use crate::{Choice, Choices};
pub use config::{Gates, Method, RouterConfig};
pub use groups::{GroupScore, Groups};
pub use noisy::Noise;
pub use scoring::Scoring;
pub(crate) use scoring::sigmoid;
use select::Scores;

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
        let (considered, left, mut statistics) = self.choose(on_host, input);
        let mask = considered.mask(&device, dtype);
        let mut gates = self.weigh(&logits, &scores, mask) * self.config.scale;
        let choices = match left {
            None => considered,
            Some(left) => {
                gates = gates * left.mask(&device, dtype);
                left
            }
        };
        statistics.load = choices.load();
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
        let mut scores = all.try_into_vec::<f64>().expect("it was converted");
        let mut bias = scores.split_off(n_tokens * n_experts);
        let logits = bias.split_off(self.correction_bias.as_ref().map_or(0, |_| n_experts));
        OnHost {
            scores: Scores {
                values: scores,
                n_experts,
            },
            bias,
            logits: by_logits.then_some(Scores {
                values: logits,
                n_experts,
            }),
        }
    }

    /// The choices that the weights are made of, and what is left of them where chance refuses some.
    fn choose(
        &self,
        on_host: OnHost,
        input: &RouterInput<'_>,
    ) -> (Choices, Option<Choices>, RoutingStatistics) {
        let OnHost {
            mut scores,
            bias,
            logits,
        } = on_host;
        let is_routed = |token: usize| is_routed(input.padding, token);
        let statistics = statistics(&scores, is_routed);
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
        let left = match (self.config.method, input.chance) {
            (Method::RandomSecond { threshold }, Chance::Key(key)) => {
                let key = key.fold(SECOND);
                let uniform = |token| key.uniform(token);
                Some(random_second(&scores, &considered, threshold, uniform))
            }
            (
                Method::RandomSecond { threshold },
                Chance::Given(Draws {
                    uniform: Some(uniform),
                    ..
                }),
            ) => {
                let uniform = |token| uniform[token as usize];
                Some(random_second(&scores, &considered, threshold, uniform))
            }
            _ => None,
        };
        (considered, left, statistics)
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
fn statistics(scores: &Scores, is_routed: impl Fn(usize) -> bool + Sync) -> RoutingStatistics {
    let parts =
        scores.by_tokens(|tokens| statistics_of(scores, tokens.filter(|token| is_routed(*token))));
    let mut statistics = RoutingStatistics::default();
    parts.iter().for_each(|part| statistics.add(part));
    statistics
}

fn statistics_of(scores: &Scores, tokens: impl Iterator<Item = usize>) -> RoutingStatistics {
    let mut statistics = RoutingStatistics::default();
    for token in tokens {
        let of_token = scores.of(token);
        let sum: f64 = of_token.iter().sum();
        statistics.n_tokens += 1;
        if !sum.is_finite() {
            statistics.n_not_finite += 1;
        } else if sum > 0.0 {
            // Of the shares `s / sum`: `ln sum - sum_i s_i ln s_i / sum`.
            let positive = of_token.iter().filter(|score| **score > 0.0);
            let sum_logs: f64 = positive.map(|score| score * score.ln()).sum();
            statistics.entropy_sum += sum.ln() - sum_logs / sum;
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
