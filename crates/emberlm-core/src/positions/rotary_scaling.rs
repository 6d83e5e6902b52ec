//! How the frequencies of rotary embeddings are changed, so that a model reads longer sequences than it was trained on.

use std::f64::consts::TAU;

use burn::config::Config;

use super::{LongRopeScaling, YarnScaling};
use crate::InvalidConfig;

/// A rule for the frequencies of [`RotaryConfig`](crate::RotaryConfig). Below, `d` is the number of components that are
/// turned and `f_i = theta^(-2i/d)` the plain frequency of pair `i`, in radians a position.
///
/// Equal to the rope types of Hugging Face's transformers, whose names are given; computed in f64 instead of f32.
#[derive(Config, Debug, PartialEq)]
pub enum RotaryScaling {
    /// `f_i` ("default").
    None,
    /// Positions are interpolated: `f_i / factor` ("linear"). Chen et al. 2023, <https://arxiv.org/abs/2306.15595>.
    Linear {
        /// The longer length over the trained one, at least 1.
        factor: f64,
    },
    /// The base grows with the sequence ("dynamic"): for a sequence of `n` positions
    /// `theta (factor n / original_max_positions - factor + 1)^(d / (d - 2))`, where a shorter `n` counts as
    /// `original_max_positions`. Peng et al. 2023, section 3.3, <https://arxiv.org/abs/2309.00071>.
    DynamicNtk {
        /// How fast the base grows, at least 1.
        factor: f64,
        /// Length up to which nothing changes: `max_position_embeddings` of transformers.
        original_max_positions: usize,
    },
    /// Fast pairs stay, slow ones are interpolated ("yarn").
    Yarn(YarnScaling),
    /// A divisor for each pair ("longrope").
    LongRope(LongRopeScaling),
    /// `f_i ((1 - s_i) / factor + s_i)`, with
    /// `s_i = (original_max_positions f_i / 2 pi - low_freq_factor) / (high_freq_factor - low_freq_factor)` kept within
    /// 0 and 1 ("llama3"). Llama 3.1, <https://arxiv.org/abs/2407.21783>.
    Llama3 {
        /// Divisor of the slow pairs, at least 1.
        factor: f64,
        /// Pairs that make fewer turns over the trained length are divided by `factor`. Llama 3.1 has 1.
        low_freq_factor: f64,
        /// Pairs that make more turns over the trained length stay as they are. Llama 3.1 has 4.
        high_freq_factor: f64,
        /// The trained length.
        original_max_positions: usize,
    },
    /// `f_i / factor` for the first `floor(proportion d / 2)` pairs; the others are not turned ("proportional").
    ///
    /// Unlike a smaller [`d_rotary`](crate::RotaryConfig::d_rotary) it leaves the exponents `2i/d`, and which components
    /// form a pair, those of the whole width.
    Proportional {
        /// Share of the pairs that are turned, above 0 and at most 1.
        proportion: f64,
        /// Divisor of the frequencies, at least 1.
        factor: f64,
    },
}

impl RotaryScaling {
    /// Whether the frequencies depend on the length of the sequence.
    pub fn changes_with_length(&self) -> bool {
        match self {
            Self::DynamicNtk { .. } | Self::LongRope(_) => true,
            Self::None
            | Self::Linear { .. }
            | Self::Yarn(_)
            | Self::Llama3 { .. }
            | Self::Proportional { .. } => false,
        }
    }

    /// Factor of the cosines and sines.
    pub(super) fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn(yarn) => yarn.cos_sin_factor(),
            Self::LongRope(long_rope) => long_rope.cos_sin_factor(),
            Self::None
            | Self::Linear { .. }
            | Self::DynamicNtk { .. }
            | Self::Llama3 { .. }
            | Self::Proportional { .. } => 1.0,
        }
    }

    /// Radians a position, one for each pair of `width` components, in a sequence of `seq_length`.
    pub(super) fn frequencies(&self, width: usize, theta: f64, seq_length: usize) -> Vec<f64> {
        let plain = unscaled(width, theta);
        match *self {
            Self::None => plain.collect(),
            Self::Linear { factor } => plain.map(|frequency| frequency / factor).collect(),
            Self::DynamicNtk {
                factor,
                original_max_positions,
            } => {
                let trained = original_max_positions as f64;
                let growth = factor * (seq_length as f64).max(trained) / trained - (factor - 1.0);
                let exponent = width as f64 / (width as f64 - 2.0);
                unscaled(width, theta * growth.powf(exponent)).collect()
            }
            Self::Yarn(ref yarn) => yarn.frequencies(plain, width, theta),
            Self::LongRope(ref long_rope) => long_rope.frequencies(plain, seq_length),
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_positions,
            } => {
                let scaled = |frequency: f64| {
                    let turns = original_max_positions as f64 * frequency / TAU;
                    let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
                    frequency * ((1.0 - kept) / factor + kept)
                };
                plain.map(scaled).collect()
            }
            Self::Proportional { proportion, factor } => {
                let n_turned = (proportion * width as f64 / 2.0).floor() as usize;
                let scaled = |(pair, frequency)| match pair < n_turned {
                    true => frequency / factor,
                    false => 0.0,
                };
                plain.enumerate().map(scaled).collect()
            }
        }
    }

    /// Checks the fields against each other, and against the width and the base.
    pub(super) fn validate(&self, width: usize, theta: f64) -> Result<(), InvalidConfig> {
        match *self {
            Self::None => Ok(()),
            Self::Linear { factor } => require_factor(factor),
            Self::DynamicNtk {
                factor,
                original_max_positions,
            } => {
                require_factor(factor)?;
                require_positions(original_max_positions)?;
                // The exponent d / (d - 2).
                require("d_rotary", "above 2", width as f64, width > 2)
            }
            Self::Yarn(ref yarn) => yarn.validate(theta),
            Self::LongRope(ref long_rope) => long_rope.validate(width / 2),
            Self::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_positions,
            } => {
                require_factor(factor)?;
                require_positions(original_max_positions)?;
                let field = "scaling.low_freq_factor";
                require(field, "above 0", low, low > 0.0)?;
                let field = "scaling.high_freq_factor";
                let range = "finite and above low_freq_factor";
                require(field, range, high, high > low && high.is_finite())
            }
            Self::Proportional { proportion, factor } => {
                require_factor(factor)?;
                let (field, range) = ("scaling.proportion", "above 0 and at most 1");
                require(
                    field,
                    range,
                    proportion,
                    proportion > 0.0 && proportion <= 1.0,
                )
            }
        }
    }
}

/// `theta^(-2i/d)` for each pair `i` of `width` components.
fn unscaled(width: usize, theta: f64) -> impl Iterator<Item = f64> {
    (0..width / 2).map(move |pair| theta.powf(-2.0 * pair as f64 / width as f64))
}

pub(super) fn require(
    field: &'static str,
    range: &'static str,
    value: f64,
    holds: bool,
) -> Result<(), InvalidConfig> {
    match holds {
        true => Ok(()),
        false => Err(InvalidConfig::Range {
            field,
            range,
            value,
        }),
    }
}

pub(super) fn require_factor(factor: f64) -> Result<(), InvalidConfig> {
    let holds = factor >= 1.0 && factor.is_finite();
    require("scaling.factor", "at least 1 and finite", factor, holds)
}

pub(super) fn require_positions(original_max_positions: usize) -> Result<(), InvalidConfig> {
    InvalidConfig::require_positive(&[("scaling.original_max_positions", original_max_positions)])
}

pub(super) fn require_attention_factor(factor: Option<f64>) -> Result<(), InvalidConfig> {
    let factor = factor.unwrap_or(1.0);
    let holds = factor > 0.0 && factor.is_finite();
    require(
        "scaling.attention_factor",
        "above 0 and finite",
        factor,
        holds,
    )
}
