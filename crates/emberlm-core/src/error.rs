//! What can be wrong with a configuration.

use thiserror::Error;

use crate::PatternError;

/// A configuration whose fields do not fit together.
///
/// `validate` of every config returns it; `init` panics with the same words.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum InvalidConfig {
    /// A count or width that must not be zero.
    #[error("{field} must be at least 1, got 0")]
    Zero {
        /// The field's name.
        field: &'static str,
    },
    /// A number outside its range.
    #[error("{field} must be {range}, got {value}")]
    Range {
        /// The field's name.
        field: &'static str,
        /// The range in words.
        range: &'static str,
        /// What was given.
        value: f64,
    },
    /// Fields that exclude each other.
    #[error("{field} cannot be so: {reason}")]
    Unsupported {
        /// The field's name.
        field: &'static str,
        /// Why.
        reason: &'static str,
    },
    /// The heads do not divide the width.
    #[error("n_heads must divide d_model: {d_model} is no multiple of {n_heads}")]
    HeadWidth {
        /// Width of the model.
        d_model: usize,
        /// Number of query heads.
        n_heads: usize,
    },
    /// The key/value heads do not divide the query heads.
    #[error("n_kv_heads must divide n_heads: {n_heads} is no multiple of {n_kv_heads}")]
    KeyValueHeads {
        /// Number of query heads.
        n_heads: usize,
        /// Number of key/value heads.
        n_kv_heads: usize,
    },
    /// Rotary and sinusoidal positions work on pairs of components.
    #[error("{field} must be even for rotary and sinusoidal positions, got {value}")]
    OddWidth {
        /// The field's name.
        field: &'static str,
        /// What was given.
        value: usize,
    },
    /// A pattern that no attention can have.
    #[error("{field}: {source}")]
    Pattern {
        /// The field's name.
        field: &'static str,
        /// What is wrong with it.
        source: PatternError,
    },
    /// A model larger than memory can address.
    #[error("{field} is too large: {value} is more than any memory can hold")]
    TooLarge {
        /// The field's name.
        field: &'static str,
        /// What was given.
        value: usize,
    },
}

impl InvalidConfig {
    /// Checks that none of the named counts is zero.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig::Zero`] for the first that is.
    pub fn require_positive(fields: &[(&'static str, usize)]) -> Result<(), Self> {
        match fields.iter().find(|(_, value)| *value == 0) {
            Some(&(field, _)) => Err(Self::Zero { field }),
            None => Ok(()),
        }
    }

    /// Checks that a rate lies in `[0, 1)`.
    ///
    /// # Errors
    ///
    /// [`InvalidConfig::Range`] if not, or if it is not a number.
    pub fn require_rate(field: &'static str, value: f64) -> Result<(), Self> {
        if (0.0..1.0).contains(&value) {
            Ok(())
        } else {
            Err(Self::Range {
                field,
                range: "at least 0 and below 1",
                value,
            })
        }
    }
}

/// Unwraps the result of a config's `validate`, for its `init`.
///
/// # Panics
///
/// With the error's words if the config is invalid.
pub fn assert_valid(result: Result<(), InvalidConfig>) {
    if let Err(error) = result {
        panic!("{error}");
    }
}
