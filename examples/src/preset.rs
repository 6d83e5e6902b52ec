//! Models and training plans by name.

use clap::ValueEnum;
use emberlm::{
    attention::{BigBirdAttentionConfig, RandomPlan, SparseTransformerAttentionConfig},
    core::{Activation, Global, NormConfig, NormPlacement, RotaryLayout, Window},
    models::{
        DecoderConfig, EncoderConfig, EncoderDecoderConfig, ExpertLayers, LayerAttention,
        PositionsConfig,
    },
    moe::{BalanceLoss, MixtureOfExpertsConfig, RouterConfig},
    training::TrainingConfig,
};

use crate::ModelConfig;

/// A named model with a plan to train it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// A decoder of 4 layers, width 128, 4 heads: 0.85 M parameters, minutes on two CPU cores.
    Tiny,
    /// A decoder of 6 layers, width 384, 6 heads: 10.8 M parameters.
    Small,
    /// Tiny with 8 experts of half its inner width in each block but the first, of which a token takes 2: as many active
    /// parameters.
    MoeTiny,
    /// An encoder of tiny's size, for masked tokens.
    BertTiny,
    /// Tiny with the strided attention of the Sparse Transformer, on sequences of 1,024.
    SparseTiny,
    /// Bert-tiny with Longformer's attention, on sequences of 1,024.
    LongformerTiny,
    /// Bert-tiny with BigBird's attention, on sequences of 1,024.
    BigbirdTiny,
    /// An encoder and a decoder of 2 layers each, together a little larger than tiny, for spans.
    T5Tiny,
}

/// The number of tokens of a model of bytes.
pub(crate) const N_BYTE_VALUES: usize = 256;
const BATCH_SIZE: usize = 8;
const SEQ_LENGTH: usize = 256;
const LONG: usize = 1024;
const STEPS: u64 = 1500;

impl Preset {
    /// The model and how to train it, on bytes.
    pub fn resolve(self) -> (ModelConfig, TrainingConfig) {
        let short = [BATCH_SIZE, SEQ_LENGTH];
        // As many tokens a step.
        let long = [BATCH_SIZE * SEQ_LENGTH / LONG, LONG];
        let (model, learning_rate, [batch_size, seq_length]) = match self {
            Self::Tiny => (decoder(4, 128, 4), 2e-3, short),
            Self::Small => (decoder(6, 384, 6), 1e-3, short),
            Self::MoeTiny => (moe_tiny(), 2e-3, short),
            Self::SparseTiny => (sparse_tiny(), 2e-3, long),
            Self::BertTiny => (ModelConfig::Encoder(bert_tiny()), 2e-3, short),
            Self::LongformerTiny => (longformer_tiny(), 2e-3, long),
            Self::BigbirdTiny => (bigbird_tiny(), 2e-3, long),
            Self::T5Tiny => (t5_tiny(), 2e-3, short),
        };
        let plan = TrainingConfig::new(STEPS, batch_size, seq_length);
        (model, plan.with_learning_rate(learning_rate))
    }
}

fn learned_positions() -> PositionsConfig {
    PositionsConfig::Learned {
        max_seq_length: SEQ_LENGTH,
    }
}

fn rotary_positions() -> PositionsConfig {
    PositionsConfig::Rotary {
        theta: 10_000.0,
        layout: RotaryLayout::HalfSplit,
    }
}

fn decoder(n_layers: usize, d_model: usize, n_heads: usize) -> ModelConfig {
    let config = DecoderConfig::new(N_BYTE_VALUES, n_layers, d_model, n_heads);
    ModelConfig::Decoder(config.with_positions(learned_positions()))
}

/// Mixtral's router, with the Switch Transformer's balance loss and ST-MoE's z-loss; plain experts, as tiny's own layers.
/// The first block is dense, as in DeepSeekMoE (Dai et al. 2024, <https://arxiv.org/abs/2401.06066>, section 5.1.2): with
/// experts there too this model learns later to look back.
fn moe_tiny() -> ModelConfig {
    let mixture = MixtureOfExpertsConfig::new(RouterConfig::mixtral(128, 8, 2), 256)
        .with_activation(Activation::Gelu)
        .with_gated(false)
        .with_balance(Some(BalanceLoss::Switch))
        .with_z_loss(true);
    let config = DecoderConfig::new(N_BYTE_VALUES, 4, 128, 4)
        .with_positions(learned_positions())
        .with_experts(Some(ExpertLayers::new(mixture).with_first(1)));
    ModelConfig::Decoder(config)
}

/// A stride near the root of the length, as the paper advises.
fn sparse_tiny() -> ModelConfig {
    let attention = SparseTransformerAttentionConfig::new(128, 4, 32);
    let config = DecoderConfig::new(N_BYTE_VALUES, 4, 128, 4)
        .with_positions(rotary_positions())
        .with_pattern(Some(attention.pattern()));
    ModelConfig::Decoder(config)
}

/// Rotary positions and pre-norm: with BERT's learned positions and post-norm a model of this size says for long nothing
/// but the most frequent token, since nothing causal tells it where its neighbours are.
fn bert_tiny() -> EncoderConfig {
    EncoderConfig::new(N_BYTE_VALUES, 4, 128, 4)
        .with_positions(rotary_positions())
        .with_n_types(0)
        .with_norm_placement(NormPlacement::Pre)
}

/// Windows that widen from block to block, as the paper has them (section 4.1), and one global token.
fn longformer_tiny() -> ModelConfig {
    let layer = |side| LayerAttention::Longformer {
        window: Window::one_sided(side),
        dilations: None,
        global: Global::First(1),
        causal: false,
    };
    let layers = [16, 32, 64, 128].map(layer).to_vec();
    ModelConfig::Encoder(bert_tiny().with_layers(Some(layers)))
}

/// Other random blocks in each head and each block of the model.
fn bigbird_tiny() -> ModelConfig {
    let layer = |seed| {
        let random = RandomPlan::Drawn { n_blocks: 2, seed };
        let attention = BigBirdAttentionConfig::new(128, 4, 32, random);
        LayerAttention::pattern(attention.pattern())
    };
    let layers = (0..4).map(layer).collect();
    ModelConfig::Encoder(bert_tiny().with_layers(Some(layers)))
}

fn t5_tiny() -> ModelConfig {
    let positions = PositionsConfig::RelativeBias {
        n_buckets: 32,
        max_distance: 128,
        scaled: true,
    };
    let config = EncoderDecoderConfig::new(N_BYTE_VALUES, 2, 2, 128, 4)
        .with_positions(positions)
        .with_norm(NormConfig::Rms { epsilon: 1e-6 })
        .with_bias(false)
        .with_dropout(0.0);
    ModelConfig::EncoderDecoder(config)
}
