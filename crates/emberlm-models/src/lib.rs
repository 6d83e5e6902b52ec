//! Stacks and assembled architectures, and the files they are loaded from.
//!
//! One residual block, one [`Stack`], three assemblies: [`Decoder`], [`Encoder`], [`EncoderDecoder`]; and
//! encoders with a head for a task: [`SequenceClassifier`], [`SpanAnswer`].

mod decoder;
mod embedding;
mod encoder;
mod encoder_decoder;
mod expert_layers;
mod layer;
mod lengthen;
mod sequence_classifier;
mod span_answer;
mod stack;
mod weights;

pub use decoder::{Decoder, DecoderConfig};
pub use embedding::{PositionsConfig, TokenEmbedding, TokenEmbeddingConfig};
pub use encoder::{Encoder, EncoderConfig, MaskedHead};
pub use encoder_decoder::{EncoderDecoder, EncoderDecoderConfig};
pub use expert_layers::ExpertLayers;
pub use layer::LayerAttention;
pub use sequence_classifier::{ClassificationHead, SequenceClassifier, SequenceClassifierConfig};
pub use span_answer::{AnswerSpan, SpanAnswer, SpanAnswerConfig, SpanScores};
pub use stack::{
    FeedForwardKind, FeedForwardLayer, Mixer, Stack, StackCache, StackConfig, StackOutput,
    StackSource,
};
pub use weights::{LoadError, load_decoder, load_encoder_decoder, load_weights, save_weights};
