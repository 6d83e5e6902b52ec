//! What a stack reads: token vectors, with what is added to them.

use burn::{
    config::Config,
    module::Module,
    nn::{Embedding, EmbeddingConfig, Initializer},
    tensor::{Device, Int, Tensor},
};
use emberlm_core::{
    BatchData, Context, InvalidConfig, LearnedPositions, LearnedPositionsConfig, Lengths, Norm,
    NormConfig, RandomKey, RelativeBiasConfig, RotaryConfig, RotaryLayout, RotaryScaling, dropout,
    operators::{Projection, embed},
    sinusoidal_positions,
};

use crate::StackConfig;

/// How the model knows where a token stands.
#[derive(Config, Debug, PartialEq)]
pub enum PositionsConfig {
    /// It does not, but for what a causal pattern tells (Kazemnejad et al. 2023, <https://arxiv.org/abs/2305.19466>).
    None,
    /// A learned vector a position, up to `max_seq_length` of them.
    Learned {
        /// Number of positions.
        max_seq_length: usize,
    },
    /// Learned vectors whose table has `offset` rows before that of position 0: OPT and BART have 2.
    LearnedOffset {
        /// Number of positions.
        max_seq_length: usize,
        /// Rows before position 0.
        offset: usize,
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
    /// Queries and keys are rotated, in part or by frequencies that are scaled for longer sequences.
    ScaledRotary {
        /// Base of the wavelengths.
        theta: f64,
        /// Which components form a pair.
        layout: RotaryLayout,
        /// How many of a head's components are rotated; nothing means all.
        d_rotary: Option<usize>,
        /// How the frequencies are scaled.
        scaling: RotaryScaling,
    },
    /// Scores fall with the distance.
    Alibi,
    /// A learned bias of the scores by distance, in buckets, one for all blocks.
    RelativeBias {
        /// Number of buckets. T5: 32.
        n_buckets: usize,
        /// Distances from here on share a bucket. T5: 128.
        max_distance: usize,
        /// Whether scores are scaled by `1 / sqrt(d_head)`, which T5's are not.
        scaled: bool,
    },
}

impl PositionsConfig {
    /// Longest sequence that has positions; nothing where positions know no limit.
    pub fn max_seq_length(&self) -> Option<usize> {
        self.learned().map(|(max_seq_length, _)| max_seq_length)
    }

    /// Number of learned positions, and of the rows before them.
    fn learned(&self) -> Option<(usize, usize)> {
        match *self {
            Self::Learned { max_seq_length } => Some((max_seq_length, 0)),
            Self::LearnedOffset {
                max_seq_length,
                offset,
            } => Some((max_seq_length, offset)),
            Self::None
            | Self::Sinusoidal
            | Self::Rotary { .. }
            | Self::ScaledRotary { .. }
            | Self::Alibi
            | Self::RelativeBias { .. } => None,
        }
    }

    /// Gives a stack what of the positions is its; `bidirectional` where queries see later keys.
    pub(crate) fn apply(&self, stack: StackConfig, bidirectional: bool) -> StackConfig {
        let rotary = RotaryConfig::new(stack.d_model / stack.n_heads.max(1));
        match self {
            Self::Rotary { theta, layout } => {
                stack.with_rotary(Some(rotary.with_theta(*theta).with_layout(*layout)))
            }
            Self::ScaledRotary {
                theta,
                layout,
                d_rotary,
                scaling,
            } => {
                let rotary = rotary.with_theta(*theta).with_layout(*layout);
                let rotary = rotary
                    .with_d_rotary(*d_rotary)
                    .with_scaling(scaling.clone());
                stack.with_rotary(Some(rotary))
            }
            Self::Alibi => stack.with_alibi(true),
            Self::RelativeBias {
                n_buckets,
                max_distance,
                scaled,
            } => {
                let bias = RelativeBiasConfig::new(stack.n_heads)
                    .with_n_buckets(*n_buckets)
                    .with_max_distance(*max_distance)
                    .with_bidirectional(bidirectional);
                let scale = (!scaled).then_some(1.0);
                stack.with_relative_bias(Some(bias)).with_scale(scale)
            }
            Self::None | Self::Learned { .. } | Self::LearnedOffset { .. } | Self::Sinusoidal => {
                stack
            }
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
        let learned = self.positions.learned().map(|(max_seq_length, offset)| {
            LearnedPositionsConfig::new(max_seq_length, self.d_model)
                .with_offset(offset)
                .init(device)
        });
        TokenEmbedding {
            tokens: table(self.vocab_size),
            positions: learned,
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

// Parts of a sequence's random key.
const EMBEDDING: u64 = 0;
const STACK: u64 = 1;

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
        let x = self.look_up(tokens, context);
        let x = match (&self.types, types) {
            (Some(table), Some(types)) => x + embed(table.weight.val(), types, None),
            (Some(table), None) => x + table.weight.val().narrow(0, 0, 1).unsqueeze(),
            (None, None) => x,
            (None, Some(_)) => panic!("types: the model has no token types"),
        };
        let x = match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        };
        dropout(x, self.dropout, context.dropout_key)
    }

    /// The vectors of whole sequences, and the context in which a stack reads them.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub(crate) fn whole(
        &self,
        tokens: Tensor<2, Int>,
        types: Option<Tensor<2, Int>>,
        data: BatchData,
        dropout_key: Option<RandomKey>,
    ) -> (Tensor<3>, Context) {
        let [batch_size, seq_length] = tokens.dims();
        let context = Context::new(Lengths::square(seq_length))
            .with_data(batch_size, data)
            .with_dropout_key(dropout_key);
        let x = self.forward(tokens.clone(), types, &context.fold(EMBEDDING));
        (x, context.fold(STACK).with_tokens(Some(tokens)))
    }

    /// Tokens and positions. Rows that are padded on the left have positions of their own.
    fn look_up(&self, tokens: Tensor<2, Int>, context: &Context) -> Tensor<3> {
        let of_rows = context.row_positions(&tokens.device());
        let first_position = context.lengths.first_position;
        let table = self.tokens.weight.val();
        if let Some(learned) = &self.positions {
            let (positions, first_row) = (learned.weight.val(), learned.row(first_position));
            return match of_rows {
                Some(of_rows) => {
                    let rows = of_rows + learned.row(0) as i64;
                    embed(table, tokens, None) + embed(positions, rows, None)
                }
                None => embed(table, tokens, Some((positions, first_row))),
            };
        }
        let x = embed(table, tokens, None);
        if !self.sinusoidal {
            return x;
        }
        let [_, seq_length, d_model] = x.dims();
        let (dtype, device) = (x.dtype(), x.device());
        let sinusoids = |first, n| sinusoidal_positions(first, n, d_model, dtype, &device);
        let positions = match of_rows {
            Some(of_rows) => {
                let all = sinusoids(0, context.lengths.query_end());
                embed(all.squeeze_dim(0), of_rows, None)
            }
            None => sinusoids(first_position, seq_length),
        };
        x * (d_model as f64).sqrt() + positions
    }

    /// Longest sequence that has positions; nothing where positions know no limit.
    pub fn max_seq_length(&self) -> Option<usize> {
        let positions = self.positions.as_ref();
        positions.map(LearnedPositions::max_seq_length)
    }

    /// The table as an output projection.
    pub fn projection(&self) -> Projection {
        Projection::Rows(self.tokens.weight.val())
    }
}
