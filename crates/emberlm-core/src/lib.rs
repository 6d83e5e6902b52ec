//! What language models are built from besides attention: positions, norms, activations, feed-forward layers,
//! residual blocks, caches, losses, sampling and generation, and which keys attention visits. What they compute with are
//! the fused [`operators`].
//!
//! Modules are ordinary Burn modules and run on any backend. Randomness (dropout, initialisation, sampling) is a
//! function of a key and a counter, so that a run can be continued exactly.

mod activation;
mod batch;
mod block;
mod cache;
mod choices;
mod context;
mod dropout;
mod error;
mod feed_forward;
mod file;
mod generation;
mod init;
mod loss;
mod mixer;
mod model;
mod norm;
pub mod operators;
mod pattern;
mod positions;
mod random;
mod routing;
mod schedule;
mod text_stream;

pub use activation::Activation;
pub use batch::{IGNORED_TARGET, Source, StepSoFar, TokenBatch};
pub use block::{CrossInput, NormPlacement, ResidualBlock, ResidualBlockConfig, ResidualStream};
pub use cache::{CachePositions, DecodingCache, KvCache, RingError, select_rows};
pub use choices::{Choice, Choices};
pub use context::Context;
pub use dropout::dropout;
pub use error::{InvalidConfig, assert_valid};
pub use feed_forward::{DenseLayer, FeedForwardConfig, GatedMlp, Mlp};
pub use file::{replace_file, sync_folder_of};
pub use generation::{
    BatchGenerator, BeamConfig, BeamSearch, EarlyStopping, ForbiddenTokens, ForcedFirstToken,
    Generated, GenerationError, Generator, Hypothesis, InvalidSampling, LengthPenalty,
    LogitProcessor, LogitProcessors, MinimumNewTokens, NoRepeatNGram, RepetitionPenalty,
    SampleError, Sampler, SamplingConfig, log_probabilities, log_probabilities_from,
};
pub use init::{Gpt2Init, SwitchInit, XavierInit};
pub use loss::{CrossEntropy, CrossEntropyConfig};
pub use mixer::{CrossMixer, FeedForward, NoCross, SequenceMixer};
pub use model::{CachedModel, CausalModel, LossModel, ModelLoss};
pub use norm::{LayerNorm, Norm, NormConfig, RmsNorm};
pub use pattern::{
    At, BatchData, BlockPlan, Blockwise, CacheSlots, Dilated, Fixed, Global, Horizon, Lengths,
    ParsePatternError, Pattern, PatternError, Picture, RandomBlocks, Reach, Strided, Window,
};
pub use positions::{
    LearnedPositions, LearnedPositionsConfig, LongRopeScaling, RelativeBias, RelativeBiasConfig,
    RotaryConfig, RotaryLayout, RotaryScaling, YarnScaling, alibi_slopes, relative_bucket,
    sinusoidal_positions,
};
pub use random::RandomKey;
pub use routing::{
    AuxiliaryKind, AuxiliaryLoss, FeedForwardOutput, LayerLoss, LayerRouting, OverLayers, Routed,
    RoutingStatistics,
};
pub use schedule::{BlockRows, BlockSizes, Layout, MaskTable, Part, Schedule, Span, Statistics};
pub use text_stream::{InvalidStopStrings, StopStrings, Utf8Stream};
