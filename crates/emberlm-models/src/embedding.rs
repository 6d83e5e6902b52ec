//! What a stack reads: token vectors, with what is added to them.

use burn::{
    config::Config,
    module::Module,
    nn::{Embedding, EmbeddingConfig, Initializer},
    tensor::{Device, Int, Tensor},
};
use emberlm_core::{
    Context, InvalidConfig, LearnedPositions, LearnedPositionsConfig, Norm, NormConfig,
    RotaryConfig, RotaryLayout, dropout,
    operators::{Projection, embed},
    sinusoidal_positions,
};

/// How the model knows where a token stands.
#[derive(Config, Debug, PartialEq)]
pub enum PositionsConfig {
    /// A learned vector a position, up to `max_seq_length` of them.
    Learned {
        /// Number of positions.
        max_seq_length: usize,
    },
    /// Fixed sinusoids; the embedding is multiplied by `sqrt(d_model)` first, as in the paper.
    Sinusoidal,
    /// Queries and keys are rotated.
    Rotary {
        /// Base of the wavelengths.
        theta: f64,
        /// Which components form a pair.
        layout: RotaryLayout,
    },
}

impl PositionsConfig {
    /// Longest sequence that has positions; nothing where positions know no limit.
    pub fn max_seq_length(&self) -> Option<usize> {
        match self {
            Self::Learned { max_seq_length } => Some(*max_seq_length),
            Self::Sinusoidal | Self::Rotary { .. } => None,
        }
    }

    /// The rotation of heads of this width, if positions are rotary.
    pub(crate) fn rotary(&self, d_head: usize) -> Option<RotaryConfig> {
        match *self {
            Self::Rotary { theta, layout } => Some(
                RotaryConfig::new(d_head)
                    .with_theta(theta)
                    .with_layout(layout),
            ),
            Self::Learned { .. } | Self::Sinusoidal => None,
        }
    }
}

/// Configuration of a [`TokenEmbedding`].
#[derive(Config, Debug)]
pub struct TokenEmbeddingConfig {
    /// Number of tokens.
    pub vocab_size: usize,
    /// Width of the model.
    pub d_model: usize,
    /// Positions that are added to the tokens; rotary ones add nothing here.
    pub positions: PositionsConfig,
    /// Number of token types, such as BERT's segments. Default: none.
    #[config(default = 0)]
    pub n_types: usize,
    /// Norm of the sum, as BERT has it. Default: none.
    pub norm: Option<NormConfig>,
    /// Dropout on the result. Default: 0.
    #[config(default = 0.0)]
    pub dropout: f64,
}

impl TokenEmbeddingConfig {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// A zero, an odd width for sinusoids, an impossible norm, or a rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let longest = self.positions.max_seq_length().unwrap_or(1);
        InvalidConfig::require_positive(&[
            ("vocab_size", self.vocab_size),
            ("d_model", self.d_model),
            ("positions.max_seq_length", longest),
        ])?;
        if self.positions == PositionsConfig::Sinusoidal && !self.d_model.is_multiple_of(2) {
            return Err(InvalidConfig::OddWidth {
                field: "d_model",
                value: self.d_model,
            });
        }
        if let Some(norm) = &self.norm {
            norm.validate()?;
        }
        InvalidConfig::require_rate("dropout", self.dropout)
    }

    /// Makes the tables, from N(0, 0.02).
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> TokenEmbedding {
        emberlm_core::assert_valid(self.validate());
        let table = |n_rows| {
            let initializer = Initializer::Normal {
                mean: 0.0,
                std: 0.02,
            };
            EmbeddingConfig::new(n_rows, self.d_model)
                .with_initializer(initializer)
                .init(device)
        };
        let longest = self.positions.max_seq_length();
        TokenEmbedding {
            tokens: table(self.vocab_size),
            positions: longest
                .map(|longest| LearnedPositionsConfig::new(longest, self.d_model).init(device)),
            types: (self.n_types > 0).then(|| table(self.n_types)),
            norm: (self.norm.as_ref()).map(|norm| norm.init(self.d_model, device)),
            sinusoidal: self.positions == PositionsConfig::Sinusoidal,
            dropout: self.dropout,
        }
    }
}

/// `dropout(norm(token + type + position))`, each part where the config has it; with sinusoidal positions
/// `token sqrt(d_model) + position`, Vaswani et al. 2017, section 3.4.
#[derive(Module, Debug)]
pub struct TokenEmbedding {
    /// `[vocab_size, d_model]`
    pub tokens: Embedding,
    /// `[max_seq_length, d_model]`
    pub positions: Option<LearnedPositions>,
    /// `[n_types, d_model]`
    pub types: Option<Embedding>,
    /// Norm of the sum.
    pub norm: Option<Norm>,
    sinusoidal: bool,
    dropout: f64,
}

impl TokenEmbedding {
    /// The vectors of tokens that stand from the context's first position on. Without `types` all are of the first type.
    ///
    /// # Shapes
    ///
    /// - `tokens`, `types`: `[batch_size, seq_length]`
    /// - output: `[batch_size, seq_length, d_model]`
    ///
    /// # Panics
    ///
    /// If a token is not in the table or the sequence is longer than the learned positions; if `types` are given to a
    /// model that has none.
    pub fn forward(
        &self,
        tokens: Tensor<2, Int>,
        types: Option<Tensor<2, Int>>,
        context: &Context,
    ) -> Tensor<3> {
        let [_, seq_length] = tokens.dims();
        let first_position = context.lengths.first_position;
        let positions = self.positions.as_ref();
        let positions = positions.map(|positions| (positions.weight.val(), first_position));
        let x = embed(self.tokens.weight.val(), tokens, positions);
        let x = match (&self.types, types) {
            (Some(table), Some(types)) => x + embed(table.weight.val(), types, None),
            (Some(table), None) => x + table.weight.val().narrow(0, 0, 1).unsqueeze(),
            (None, None) => x,
            (None, Some(_)) => panic!("types: the model has no token types"),
        };
        let x = if self.sinusoidal {
            let [_, _, d_model] = x.dims();
            let (dtype, device) = (x.dtype(), x.device());
            let table = sinusoidal_positions(first_position, seq_length, d_model, dtype, &device);
            x * (d_model as f64).sqrt() + table
        } else {
            x
        };
        let x = match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        dropout(x, self.dropout, context.dropout_key)
    }

    /// Longest sequence that has positions; nothing where positions know no limit.
    pub fn max_seq_length(&self) -> Option<usize> {
        let positions = self.positions.as_ref();
        positions.map(|positions| positions.weight.lazy_shape()[0])
    }

    /// The table as an output projection.
    pub fn projection(&self) -> Projection {
        Projection::Rows(self.tokens.weight.val())
    }
}
