//! Stacks and assembled architectures, and the files they are loaded from.
//!
//! One residual block, one [`Stack`], three assemblies: [`Decoder`], [`Encoder`], [`EncoderDecoder`].

mod decoder;
mod embedding;
mod encoder;
mod encoder_decoder;
mod layer;
mod lengthen;
mod stack;
mod weights;

pub use decoder::{Decoder, DecoderConfig};
pub use embedding::{PositionsConfig, TokenEmbedding, TokenEmbeddingConfig};
pub use encoder::{Encoder, EncoderConfig, MaskedHead};
pub use encoder_decoder::{EncoderDecoder, EncoderDecoderConfig};
pub use layer::LayerAttention;
pub use stack::{
    FeedForwardKind, FeedForwardLayer, Mixer, Stack, StackCache, StackConfig, StackSource,
};
pub use weights::{LoadError, load_decoder, load_encoder_decoder, load_weights, save_weights};
