use burn::{config::Config, tensor::Tensor};
use emberlm_core::{InvalidConfig, RandomKey};

/// A bound on the scores.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum ScoreCap {
    /// None.
    None,
    /// `limit * tanh(score / limit)`, as in Gemma 2, <https://arxiv.org/abs/2408.00118>.
    Tanh(f64),
}

impl ScoreCap {
    /// Checks the limit.
    ///
    /// # Errors
    ///
    /// A limit that is not above zero, or not finite.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        match *self {
            Self::Tanh(limit) if !(limit > 0.0 && limit.is_finite()) => Err(InvalidConfig::Range {
                field: "cap",
                range: "above 0 and finite",
                value: limit,
            }),
            Self::Tanh(_) | Self::None => Ok(()),
        }
    }
}

/// Options of [`attend`](crate::attend): how a product of query and key becomes a weight.
///
/// In this order: the product times `scale`, the cap, minus the distance times the slope, plus the bias; hidden pairs
/// drop out; the softmax over the keys and, if there is one, the head's sink; dropout.
#[derive(Debug, Clone)]
pub struct AttendOptions {
    /// Factor of the products; nothing means `1 / sqrt(d_head)`.
    pub scale: Option<f64>,
    /// Bound on the scaled products.
    pub cap: ScoreCap,
    /// A slope a head: a score loses `slope * |i - j|`. Press et al. 2022, <https://arxiv.org/abs/2108.12409>, where
    /// `j` is never after `i`.
    pub alibi: Option<Vec<f64>>,
    /// Added to the scores; gets a gradient, for which heads that share a bias take turns. Shape: `[batch_size or 1, n_heads or 1, query_length, key_length]`.
    pub bias: Option<Tensor<4>>,
    /// A logit a head that takes part in the softmax and has no value; gets a gradient. Shape: `[n_heads]`. As in
    /// gpt-oss, <https://arxiv.org/abs/2508.10925>.
    pub sinks: Option<Tensor<1>>,
    /// Rate of dropout on the weights.
    pub dropout: f64,
    /// Where dropout draws from; nothing turns it off. The weight of query `i` and key `j` draws with the counter
    /// `((batch * n_heads + head) * query_length + i) * key_length + j`.
    pub dropout_key: Option<RandomKey>,
}

impl Default for AttendOptions {
    fn default() -> Self {
        Self {
            scale: None,
            cap: ScoreCap::None,
            alibi: None,
            bias: None,
            sinks: None,
            dropout: 0.0,
            dropout_key: None,
        }
    }
}
