//! YaRN: rotary frequencies for longer sequences, pair by pair.

use std::f64::consts::TAU;

use burn::config::Config;

use super::rotary_scaling::{require, require_attention_factor, require_factor, require_positions};
use crate::InvalidConfig;

/// YaRN: `f_i (r_i / factor + 1 - r_i)`, with `r_i = (i - low) / (high - low)` kept within 0 and 1. Pairs before `low`
/// stay as they are, those after `high` are interpolated.
///
/// The borders are `low = pair(beta_fast)` and `high = pair(beta_slow)`, where
/// `pair(turns) = d ln(original_max_positions / (2 pi turns)) / (2 ln theta)` is the pair that makes so many turns over
/// the trained length, kept within 0 and `d - 1`. Cosines and sines are multiplied by
/// [`attention_factor`](Self::attention_factor), so that the scores have its square.
///
/// Peng et al. 2023, <https://arxiv.org/abs/2309.00071>. As in transformers, and unlike the paper's equation, the ramp
/// runs over the pair's index, and equal borders are set 0.001 apart.
///
/// ```
/// use emberlm_core::{RotaryConfig, RotaryScaling, YarnScaling};
///
/// let yarn = YarnScaling::new(4.0, 2048); // factor, trained length
/// let rotary = RotaryConfig::new(64).with_scaling(RotaryScaling::Yarn(yarn));
/// assert_eq!(rotary.attention_factor(), 0.1 * 4f64.ln() + 1.0);
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct YarnScaling {
    /// The longer length over the trained one, at least 1.
    pub factor: f64,
    /// The trained length.
    pub original_max_positions: usize,
    /// Turns over the trained length from which on a pair stays as it is. Default: 32.
    #[config(default = 32.0)]
    pub beta_fast: f64,
    /// Turns over the trained length up to which a pair is interpolated. Default: 1.
    #[config(default = 1.0)]
    pub beta_slow: f64,
    /// Factor of the cosines and sines. Default: that of `mscale` and `mscale_all_dim`.
    pub attention_factor: Option<f64>,
    /// With [`mscale_all_dim`](Self::mscale_all_dim): the factor of the cosines and sines is
    /// `magnitude(mscale) / magnitude(mscale_all_dim)`. Default: none; if either is missing or 0, it is `magnitude(1)`.
    pub mscale: Option<f64>,
    /// See [`mscale`](Self::mscale). DeepSeek's attention multiplies its scale by the square of its magnitude.
    pub mscale_all_dim: Option<f64>,
    /// Whether the borders are rounded, `low` down and `high` up. Default: true; gpt-oss has false.
    #[config(default = true)]
    pub truncate: bool,
}

impl YarnScaling {
    /// `0.1 mscale ln(factor) + 1`: how much larger queries and keys get. The paper's has `mscale` 1.
    pub fn magnitude(&self, mscale: f64) -> f64 {
        0.1 * mscale * self.factor.ln() + 1.0
    }

    /// Factor of the cosines and sines.
    pub(super) fn cos_sin_factor(&self) -> f64 {
        let given = |mscale: Option<f64>| mscale.filter(|mscale| *mscale != 0.0);
        match (
            self.attention_factor,
            given(self.mscale),
            given(self.mscale_all_dim),
        ) {
            (Some(factor), ..) => factor,
            (None, Some(mscale), Some(all)) => self.magnitude(mscale) / self.magnitude(all),
            (None, ..) => self.magnitude(1.0),
        }
    }

    pub(super) fn frequencies(
        &self,
        plain: impl Iterator<Item = f64>,
        width: usize,
        theta: f64,
    ) -> Vec<f64> {
        let [low, high] = self.borders(width as f64, theta);
        let scaled = |(pair, frequency)| {
            let interpolated = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (interpolated / self.factor + 1.0 - interpolated)
        };
        plain.enumerate().map(scaled).collect()
    }

    /// Where the ramp begins and ends, in pairs.
    fn borders(&self, width: f64, theta: f64) -> [f64; 2] {
        let pair = |turns: f64| {
            let wavelengths = self.original_max_positions as f64 / (turns * TAU);
            width * wavelengths.ln() / (2.0 * theta.ln())
        };
        let (low, high) = (pair(self.beta_fast), pair(self.beta_slow));
        let (low, high) = match self.truncate {
            true => (low.floor(), high.ceil()),
            false => (low, high),
        };
        let (low, high) = (low.max(0.0), high.min(width - 1.0));
        [low, if low == high { high + 0.001 } else { high }]
    }

    pub(super) fn validate(&self, theta: f64) -> Result<(), InvalidConfig> {
        require_factor(self.factor)?;
        require_positions(self.original_max_positions)?;
        require_attention_factor(self.attention_factor)?;
        // Its logarithm divides.
        require("theta", "above 1 for YaRN", theta, theta > 1.0)?;
        let (fast, slow) = (self.beta_fast, self.beta_slow);
        require("scaling.beta_slow", "above 0", slow, slow > 0.0)?;
        let holds = fast >= slow && fast.is_finite();
        require(
            "scaling.beta_fast",
            "finite and at least beta_slow",
            fast,
            holds,
        )?;
        for (field, mscale) in [
            ("scaling.mscale", self.mscale),
            ("scaling.mscale_all_dim", self.mscale_all_dim),
        ] {
            let mscale = mscale.unwrap_or(0.0);
            let holds = mscale >= 0.0 && mscale.is_finite();
            require(field, "at least 0 and finite", mscale, holds)?;
        }
        Ok(())
    }
}
