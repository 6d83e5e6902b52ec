//! Stacks and assembled architectures, and the files they are loaded from.

mod decoder;
mod weights;

pub use decoder::{
    Decoder, DecoderCache, DecoderConfig, FeedForwardKind, FeedForwardLayer, Mixer, PositionsConfig,
};
pub use weights::{LoadError, load_decoder, load_weights, save_weights};
