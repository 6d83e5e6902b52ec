//! LongRoPE: a searched divisor for each rotary frequency.

use burn::config::Config;

use super::rotary_scaling::{require, require_attention_factor, require_factor, require_positions};
use crate::InvalidConfig;

/// LongRoPE: `f_i / short_factors[i]` in sequences of up to `original_max_positions`, `f_i / long_factors[i]` in longer
/// ones.
///
/// Ding et al. 2024, <https://arxiv.org/abs/2402.13753>; Phi-3. Cosines and sines are multiplied by
/// [`attention_factor`](Self::attention_factor) at every length.
///
/// ```
/// use emberlm_core::{LongRopeScaling, RotaryConfig, RotaryScaling};
///
/// let scaling = LongRopeScaling::new(vec![1.0, 1.5], vec![1.0, 16.0], 4096, 32.0);
/// let rotary = RotaryConfig::new(4).with_scaling(RotaryScaling::LongRope(scaling));
/// assert!(rotary.frequencies(4097)[1] < rotary.frequencies(4096)[1]);
/// ```
#[derive(Config, Debug, PartialEq)]
pub struct LongRopeScaling {
    /// Divisors up to the trained length, one for each pair.
    pub short_factors: Vec<f64>,
    /// Divisors beyond the trained length, one for each pair.
    pub long_factors: Vec<f64>,
    /// The trained length.
    pub original_max_positions: usize,
    /// The longest length over the trained one, at least 1; decides the attention factor alone.
    pub factor: f64,
    /// Factor of the cosines and sines. Default: `sqrt(1 + ln(factor) / ln(original_max_positions))`.
    pub attention_factor: Option<f64>,
}

impl LongRopeScaling {
    /// Factor of the cosines and sines.
    pub(super) fn cos_sin_factor(&self) -> f64 {
        // Without growth it is 1, for a trained length of 1 too.
        let ratio = match self.factor > 1.0 {
            true => self.factor.ln() / (self.original_max_positions as f64).ln(),
            false => 0.0,
        };
        self.attention_factor.unwrap_or((1.0 + ratio).sqrt())
    }

    pub(super) fn frequencies(
        &self,
        plain: impl Iterator<Item = f64>,
        seq_length: usize,
    ) -> Vec<f64> {
        let divisors = match seq_length > self.original_max_positions {
            true => &self.long_factors,
            false => &self.short_factors,
        };
        let scaled = |(frequency, divisor)| frequency / divisor;
        plain.zip(divisors).map(scaled).collect()
    }

    pub(super) fn validate(&self, n_pairs: usize) -> Result<(), InvalidConfig> {
        require_factor(self.factor)?;
        require_positions(self.original_max_positions)?;
        require_attention_factor(self.attention_factor)?;
        // Its logarithm divides.
        let length = self.original_max_positions;
        let holds = length > 1 || self.factor == 1.0 || self.attention_factor.is_some();
        let field = "scaling.original_max_positions";
        require(field, "above 1 for LongRoPE", length as f64, holds)?;
        for (field, divisors) in [
            ("scaling.short_factors", &self.short_factors),
            ("scaling.long_factors", &self.long_factors),
        ] {
            let n = divisors.len();
            require(field, "one number for each pair", n as f64, n == n_pairs)?;
            for divisor in divisors {
                let holds = *divisor > 0.0 && divisor.is_finite();
                require(field, "above 0 and finite", *divisor, holds)?;
            }
        }
        Ok(())
    }
}
