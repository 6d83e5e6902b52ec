//! Which tokens a token sees, as the command line says it.

use std::{fmt, str::FromStr};

use emberlm::{
    core::{Global, ParsePatternError, Pattern, Window},
    models::{DecoderConfig, EncoderConfig, EncoderDecoderConfig, LayerAttention},
};
use thiserror::Error;

use crate::ModelConfig;

/// How all blocks of a model attend: the words of a [`Pattern`], or `longformer:SIDE[:GLOBALS]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AttentionChoice {
    /// By a pattern.
    Pattern(Pattern),
    /// As a Longformer.
    Longformer {
        /// Tokens that a token sees to each side.
        side: usize,
        /// First tokens that are global, with projections of their own.
        n_globals: usize,
    },
}

/// Words that are no [`AttentionChoice`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseAttentionError {
    /// No pattern.
    #[error(transparent)]
    Pattern(#[from] ParsePatternError),
    /// A Longformer that is written otherwise.
    #[error("\"{words}\" must have the form longformer:SIDE or longformer:SIDE:GLOBALS")]
    Longformer {
        /// The words.
        words: String,
    },
}

impl FromStr for AttentionChoice {
    type Err = ParseAttentionError;

    fn from_str(words: &str) -> Result<Self, Self::Err> {
        let mut parts = words.split(':');
        if parts.next() != Some("longformer") {
            return Ok(Self::Pattern(words.parse()?));
        }
        let numbers: Result<Vec<usize>, _> = parts.map(str::parse).collect();
        match numbers.as_deref() {
            Ok(&[side]) => Ok(Self::Longformer { side, n_globals: 0 }),
            Ok(&[side, n_globals]) => Ok(Self::Longformer { side, n_globals }),
            _ => Err(ParseAttentionError::Longformer {
                words: words.to_owned(),
            }),
        }
    }
}

impl fmt::Display for AttentionChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pattern(pattern) => pattern.fmt(f),
            Self::Longformer { side, n_globals } => write!(f, "longformer:{side}:{n_globals}"),
        }
    }
}

impl AttentionChoice {
    /// Changes how a model attends; of an encoder-decoder its encoder.
    pub fn apply(&self, model: &mut ModelConfig) {
        match model {
            ModelConfig::Decoder(config) => self.to_decoder(config),
            ModelConfig::Encoder(config) => self.to_encoder(config),
            ModelConfig::EncoderDecoder(config) => self.to_encoder_decoder(config),
        }
    }

    fn to_decoder(&self, config: &mut DecoderConfig) {
        match self {
            Self::Pattern(pattern) => {
                config.pattern = Some(pattern.clone());
                config.layers = None;
            }
            Self::Longformer { .. } => config.layers = Some(self.layers(config.n_layers)),
        }
    }

    fn to_encoder(&self, config: &mut EncoderConfig) {
        match self {
            Self::Pattern(pattern) => {
                config.pattern = pattern.clone();
                config.layers = None;
            }
            Self::Longformer { .. } => config.layers = Some(self.layers(config.n_layers)),
        }
    }

    fn to_encoder_decoder(&self, config: &mut EncoderDecoderConfig) {
        config.encoder_layers = Some(self.layers(config.n_encoder_layers));
    }

    /// The same in every block.
    fn layers(&self, n_layers: usize) -> Vec<LayerAttention> {
        let layer = match self {
            Self::Pattern(pattern) => LayerAttention::pattern(pattern.clone()),
            Self::Longformer { side, n_globals } => LayerAttention::Longformer {
                window: Window::one_sided(*side),
                dilations: None,
                global: Global::First(*n_globals),
                causal: false,
            },
        };
        vec![layer; n_layers]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_read_and_written() {
        let longformer = AttentionChoice::Longformer {
            side: 64,
            n_globals: 1,
        };
        assert_eq!("longformer:64:1".parse(), Ok(longformer.clone()));
        assert_eq!(longformer.to_string(), "longformer:64:1");
        let pattern: AttentionChoice = "causal & window:4".parse().expect("a pattern");
        assert_eq!(pattern.to_string(), "causal & window:4");
        for words in ["longformer", "longformer:x", "longformer:1:2:3"] {
            let error = words.parse::<AttentionChoice>().expect_err("it is none");
            assert!(error.to_string().starts_with(&format!("\"{words}\"")));
        }
    }
}
