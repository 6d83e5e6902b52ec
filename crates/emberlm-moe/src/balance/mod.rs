//! Losses that keep experts equally busy and logits small.
//!
//! With `c_e` the number of choices of expert `e`, `T` the number of tokens, `k` of choices a token, `E` of experts, and
//! `P_e` the mean over the tokens of the probability of `e`, most balance losses are `factor sum_e c_e P_e`. They differ by
//! the factor, by which choices count, and by what is counted together: [`BalanceLoss`] names them.

mod cv;
mod z;

use burn::{
    config::Config,
    tensor::{Tensor, TensorData},
};
use emberlm_core::{AuxiliaryKind, AuxiliaryLoss, LayerLoss, OverLayers};

use crate::{Choice, Choices, Routing};
pub use cv::{importance_loss, load_loss};
pub use z::z_loss;

/// A published balance loss.
///
/// All are 1 at perfect balance, `c_e = T k / E` and `P_e = 1 / E`, but where the table says otherwise. The shares have no
/// gradient.
///
/// | name | of one layer | choices | layers | at balance |
/// |---|---|---|---|---|
/// | `Switch` | `E sum_e c_e / (T k) P_e` | all | added | 1 |
/// | `HuggingFaceMixtral` | `E sum_e c_e / T P_e` | all | counted together | `k` |
/// | `HuggingFaceSwitch` | `E sum_e c_e / S P_e` of each sequence of `S`, mean over them | first | counted together | 1 |
/// | `GShard` | `1 / E sum_e c_e / T P_e` | first | added | `1 / E^2` |
/// | `MegaBlocks` | `E sum_e c_e / (T k) P_e` | all | mean | 1 |
/// | `Sequence` | `E sum_e c_e / (S k) P_e` of each sequence of `S`, mean over them | all | added | 1 |
/// | `GlobalBatch` | as `Switch`, with `c_e / (T k)` of all micro-batches of the step so far | all | added | 1 |
#[derive(Config, Debug, Copy, PartialEq, Eq)]
pub enum BalanceLoss {
    /// Fedus et al. 2021, <https://arxiv.org/abs/2101.03961>, equations 4 to 6, divided by `k` for several experts as
    /// Megatron-LM does.
    Switch,
    /// `load_balancing_loss_func` of Hugging Face's Mixtral: `k` times `Switch` for one layer. Several layers are counted
    /// as if their tokens were of one.
    HuggingFaceMixtral,
    /// `load_balancing_loss_func` of Hugging Face's Switch Transformer, in which padding counts
    /// ([`route_padding`](crate::MixtureOfExpertsConfig::route_padding)).
    HuggingFaceSwitch,
    /// Lepikhin et al. 2020, <https://arxiv.org/abs/2006.16668>, algorithm 1: the mean over the experts of `c_e / T P_e`.
    /// DeepSpeed and Tutel have `E^2` times this.
    GShard,
    /// `batched_load_balancing_loss` of MegaBlocks: the mean over the layers.
    MegaBlocks,
    /// DeepSeek-V3's complementary loss, <https://arxiv.org/abs/2412.19437>, equations 17 to 20.
    Sequence,
    /// Qiu et al. 2025, <https://arxiv.org/abs/2501.11873>, section 3: the shares are of the whole step, as far as it has
    /// gone, so that a micro-batch need not be balanced by itself. Accumulation does not equal one large batch here.
    GlobalBatch,
}

/// Which tokens are counted.
#[derive(Debug, Clone, Copy)]
pub struct Counting<'a> {
    /// Length of the sequences that the tokens are of.
    pub seq_length: usize,
    /// The load of the earlier micro-batches of this step.
    pub earlier: Option<&'a [u64]>,
}

impl BalanceLoss {
    /// The loss of one layer.
    ///
    /// ```
    /// use burn::tensor::{Device, Tensor};
    /// use emberlm_moe::{BalanceLoss, Counting, RouterConfig, RouterInput};
    ///
    /// let device = Device::flex();
    /// let mut router = RouterConfig::mixtral(2, 2, 1).init(&device);
    /// // The logits are the hidden states.
    /// let weight = router.gate.as_mut().unwrap();
    /// weight.weight = weight.weight.clone().map(|_| Tensor::eye(2, &device));
    /// let (a, b) = (3f32.ln(), 0.0);
    /// let x = Tensor::<2>::from_floats([[a, b], [a, b], [a, b], [b, a]], &device);
    /// let routing = router.forward(x, &RouterInput::default());
    /// // Expert 0 has 3 of 4 tokens, and the probabilities 3/4, 3/4, 3/4, 1/4, whose mean is 5/8; expert 1 the rest.
    /// let counting = Counting { seq_length: 2, earlier: None };
    /// let value = |loss: BalanceLoss| -> f32 {
    ///     loss.forward(&routing, &counting).loss.value().into_scalar()
    /// };
    /// let close = |loss, expected: f32| assert!((value(loss) - expected).abs() < 1e-6);
    /// close(BalanceLoss::Switch, 2.0 * (0.75 * 0.625 + 0.25 * 0.375)); // 1.125
    /// close(BalanceLoss::HuggingFaceMixtral, 1.125); // k times Switch, and k is 1
    /// close(BalanceLoss::MegaBlocks, 1.125); // Switch, for one layer
    /// close(BalanceLoss::GShard, 1.125 / 4.0); // Switch over E^2, for first choices
    /// // Sequence 1 has shares 1, 0 and probabilities 3/4, 1/4; sequence 2 shares 1/2, 1/2 and probabilities 1/2, 1/2.
    /// close(BalanceLoss::Sequence, 0.5 * (2.0 * 0.75 + 2.0 * 0.5)); // 1.25
    /// close(BalanceLoss::HuggingFaceSwitch, 1.25); // Sequence, for first choices
    /// // An earlier micro-batch sent four tokens to expert 1: shares 3/8 and 5/8.
    /// let counting = Counting { earlier: Some(&[0, 4]), ..counting };
    /// let global: f32 = BalanceLoss::GlobalBatch.forward(&routing, &counting).loss.value().into_scalar();
    /// assert!((global - 2.0 * (0.375 * 0.625 + 0.625 * 0.375)).abs() < 1e-6); // 0.9375
    /// ```
    ///
    /// # Panics
    ///
    /// If the sequences do not divide the tokens, or the earlier load is of another number of experts.
    pub fn forward(&self, routing: &Routing, counting: &Counting<'_>) -> AuxiliaryLoss {
        let loss = match self {
            Self::Sequence => of_sequences(routing, counting, false),
            Self::HuggingFaceSwitch => of_sequences(routing, counting, true),
            _ => self.of_batch(routing, counting),
        };
        AuxiliaryLoss {
            kind: AuxiliaryKind::Balance,
            over_layers: self.over_layers(),
            loss,
        }
    }

    fn over_layers(&self) -> OverLayers {
        match self {
            Self::Switch | Self::GShard | Self::Sequence | Self::GlobalBatch => OverLayers::Sum,
            Self::MegaBlocks => OverLayers::Mean,
            Self::HuggingFaceMixtral | Self::HuggingFaceSwitch => OverLayers::Pool,
        }
    }

    fn of_batch(&self, routing: &Routing, counting: &Counting<'_>) -> LayerLoss {
        let choices = &routing.choices;
        let n_experts = choices.n_experts() as f64;
        let first_only = *self == Self::GShard;
        let mut load = vec![0u64; choices.n_experts()];
        for choice in choices
            .all()
            .iter()
            .filter(|choice| !first_only || choice.rank == 0)
        {
            load[choice.expert as usize] += 1;
        }
        if let (Self::GlobalBatch, Some(earlier)) = (self, counting.earlier) {
            assert_eq!(
                earlier.len(),
                load.len(),
                "earlier: load of another number of experts"
            );
            load.iter_mut()
                .zip(earlier)
                .for_each(|(load, earlier)| *load += earlier);
        }
        let n_tokens = routing.statistics.n_tokens.max(1) as f64;
        let n_choices = load.iter().sum::<u64>().max(1) as f64;
        let (factor, total) = match self {
            Self::HuggingFaceMixtral => (n_experts, n_tokens),
            Self::GShard => (1.0 / n_experts, n_tokens),
            _ => (n_experts, n_choices),
        };
        let probabilities = mean_of_routed(routing);
        let shares = load.iter().map(|load| *load as f64 / total).collect();
        LayerLoss::Product {
            factor,
            shares: like(&probabilities, shares),
            probabilities,
        }
    }
}

/// The mean of the probabilities over all tokens that are routed, `[n_experts]`. Zero where there is none.
fn mean_of_routed(routing: &Routing) -> Tensor<1> {
    let n_experts = routing.choices.n_experts();
    let n_tokens = routing.statistics.n_tokens.max(1) as f64;
    let sums = probabilities_of_routed(routing).sum_dim(0);
    // Times the reciprocal: Burn's autodiff rounds the divisor of a division by a scalar to f32.
    sums.reshape([n_experts]) * (1.0 / n_tokens)
}

/// One for each token that is routed, zero for padding, `[n_tokens, 1]`; nothing where all are routed.
fn routed_column(routing: &Routing) -> Option<Tensor<2>> {
    let padding = routing.padding.as_ref()?;
    let routed: Vec<f32> = padding.iter().map(|padding| f32::from(!padding)).collect();
    let n = routed.len();
    let device = (&routing.scores.device(), routing.scores.dtype());
    Some(Tensor::from_data(TensorData::new(routed, [n, 1]), device))
}

/// The mean over the sequences of `E sum_e c_e / (S k) P_e`.
fn of_sequences(routing: &Routing, counting: &Counting<'_>, first_only: bool) -> LayerLoss {
    let choices = &routing.choices;
    let (n_tokens, n_experts) = (choices.n_tokens(), choices.n_experts());
    let length = counting.seq_length.max(1);
    assert!(
        n_tokens.is_multiple_of(length),
        "seq_length: {length} does not divide {n_tokens} tokens"
    );
    let n_sequences = n_tokens / length;
    let mut shares = vec![0f64; n_sequences * n_experts];
    for choice in counted(choices, first_only) {
        shares[choice.token as usize / length * n_experts + choice.expert as usize] += 1.0;
    }
    for shares in shares.chunks_mut(n_experts) {
        let n_choices = shares.iter().sum::<f64>().max(1.0);
        shares.iter_mut().for_each(|share| *share /= n_choices);
    }
    let n_routed = (0..n_sequences).map(|sequence| {
        let tokens = sequence * length..(sequence + 1) * length;
        tokens
            .filter(|token| routing.is_routed(*token))
            .count()
            .max(1) as f64
    });
    let n_routed = TensorData::new(n_routed.collect::<Vec<_>>(), [n_sequences, 1]);
    let sums = probabilities_of_routed(routing)
        .reshape([n_sequences, length, n_experts])
        .sum_dim(1)
        .reshape([n_sequences, n_experts]);
    let n_routed = Tensor::<2>::from_data(n_routed, (&sums.device(), sums.dtype()));
    let probabilities = (sums / n_routed).reshape([n_sequences * n_experts]);
    LayerLoss::Product {
        factor: n_experts as f64 / n_sequences.max(1) as f64,
        shares: like(&probabilities, shares),
        probabilities,
    }
}

/// The choices that a loss counts.
fn counted(choices: &Choices, first_only: bool) -> impl Iterator<Item = &Choice> {
    let all = choices.all().iter();
    all.filter(move |choice| !first_only || choice.rank == 0)
}

/// The probabilities, zero for padding, `[n_tokens, n_experts]`.
fn probabilities_of_routed(routing: &Routing) -> Tensor<2> {
    let probabilities = routing.probabilities();
    match routed_column(routing) {
        Some(routed) => probabilities * routed,
        None => probabilities,
    }
}

fn like(x: &Tensor<1>, values: Vec<f64>) -> Tensor<1> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n]), (&x.device(), x.dtype()))
}
