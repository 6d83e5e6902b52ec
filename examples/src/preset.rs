//! Models and training plans by name.

use clap::ValueEnum;
use emberlm::{
    models::{DecoderConfig, PositionsConfig},
    training::TrainingConfig,
};

/// A named model with a plan to train it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Preset {
    /// 4 layers, width 128, 4 heads: 0.85 M parameters, minutes on two CPU cores.
    Tiny,
    /// 6 layers, width 384, 6 heads: 10.8 M parameters.
    Small,
}

/// The number of tokens of a model of bytes.
pub(crate) const N_BYTE_VALUES: usize = 256;
const BATCH_SIZE: usize = 8;
const SEQ_LENGTH: usize = 256;
const STEPS: u64 = 1500;

impl Preset {
    /// The model and how to train it, on bytes.
    pub fn resolve(self) -> (DecoderConfig, TrainingConfig) {
        let (n_layers, d_model, n_heads, learning_rate) = match self {
            Self::Tiny => (4, 128, 4, 2e-3),
            Self::Small => (6, 384, 6, 1e-3),
        };
        let positions = PositionsConfig::Learned {
            max_seq_length: SEQ_LENGTH,
        };
        (
            DecoderConfig::new(N_BYTE_VALUES, n_layers, d_model, n_heads).with_positions(positions),
            TrainingConfig::new(STEPS, BATCH_SIZE, SEQ_LENGTH).with_learning_rate(learning_rate),
        )
    }
}
