//! Models and training plans by name.

use clap::ValueEnum;
use emberlm::{
    core::{NormConfig, NormPlacement, RotaryLayout},
    models::{DecoderConfig, EncoderConfig, EncoderDecoderConfig, PositionsConfig},
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
    /// An encoder of tiny's size, for masked tokens.
    BertTiny,
    /// An encoder and a decoder of 2 layers each, together a little larger than tiny, for spans.
    T5Tiny,
}

/// The number of tokens of a model of bytes.
pub(crate) const N_BYTE_VALUES: usize = 256;
const BATCH_SIZE: usize = 8;
const SEQ_LENGTH: usize = 256;
const STEPS: u64 = 1500;

impl Preset {
    /// The model and how to train it, on bytes.
    pub fn resolve(self) -> (ModelConfig, TrainingConfig) {
        let (model, learning_rate) = match self {
            Self::Tiny => (decoder(4, 128, 4), 2e-3),
            Self::Small => (decoder(6, 384, 6), 1e-3),
            Self::BertTiny => (bert_tiny(), 2e-3),
            Self::T5Tiny => (t5_tiny(), 2e-3),
        };
        let plan = TrainingConfig::new(STEPS, BATCH_SIZE, SEQ_LENGTH);
        (model, plan.with_learning_rate(learning_rate))
    }
}

fn learned_positions() -> PositionsConfig {
    PositionsConfig::Learned {
        max_seq_length: SEQ_LENGTH,
    }
}

fn decoder(n_layers: usize, d_model: usize, n_heads: usize) -> ModelConfig {
    let config = DecoderConfig::new(N_BYTE_VALUES, n_layers, d_model, n_heads);
    ModelConfig::Decoder(config.with_positions(learned_positions()))
}

/// Rotary positions and pre-norm: with BERT's learned positions and post-norm a model of this size says for long nothing
/// but the most frequent token, since nothing causal tells it where its neighbours are.
fn bert_tiny() -> ModelConfig {
    let positions = PositionsConfig::Rotary {
        theta: 10_000.0,
        layout: RotaryLayout::HalfSplit,
    };
    let config = EncoderConfig::new(N_BYTE_VALUES, 4, 128, 4)
        .with_positions(positions)
        .with_n_types(0)
        .with_norm_placement(NormPlacement::Pre);
    ModelConfig::Encoder(config)
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
