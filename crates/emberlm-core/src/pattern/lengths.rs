//! The sizes that a pattern is used on.

use serde::{Deserialize, Serialize};

use super::PatternError;

/// How many queries and keys there are, and where the queries stand.
///
/// Queries stand at the absolute positions `first_position .. first_position + query_length`, keys at `0 .. key_length`.
///
/// ```
/// use emberlm_core::Lengths;
///
/// let training = Lengths::square(512).with_n_heads(8).with_batch_size(4);
/// let decoding = Lengths::decode(512);
/// assert_eq!((decoding.query_length, decoding.first_position), (1, 511));
/// assert_eq!(training.key_length, decoding.key_length);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Lengths {
    /// Number of queries.
    pub query_length: usize,
    /// Number of keys.
    pub key_length: usize,
    /// Absolute position of the first query.
    pub first_position: usize,
    /// Number of query heads, at least 1.
    pub n_heads: usize,
    /// Number of batch rows, at least 1.
    pub batch_size: usize,
}

impl Lengths {
    /// The largest position and the largest block: positions are stored in 32 bits.
    pub(crate) const LIMIT: usize = (1 << 31) - 1;

    /// Queries from position 0, one head, one batch row.
    pub fn new(query_length: usize, key_length: usize) -> Self {
        Self {
            query_length,
            key_length,
            first_position: 0,
            n_heads: 1,
            batch_size: 1,
        }
    }

    /// As many queries as keys: self-attention over a whole sequence.
    pub fn square(length: usize) -> Self {
        Self::new(length, length)
    }

    /// One query at the last of `key_length` positions: a decode step.
    ///
    /// # Panics
    ///
    /// If `key_length` is 0.
    pub fn decode(key_length: usize) -> Self {
        assert!(key_length > 0, "key_length must be at least 1 to decode");
        Self::new(1, key_length).with_first_position(key_length - 1)
    }

    /// Sets [`first_position`](Self::first_position).
    pub fn with_first_position(mut self, first_position: usize) -> Self {
        self.first_position = first_position;
        self
    }

    /// Sets [`n_heads`](Self::n_heads).
    pub fn with_n_heads(mut self, n_heads: usize) -> Self {
        self.n_heads = n_heads;
        self
    }

    /// Sets [`batch_size`](Self::batch_size).
    pub fn with_batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size;
        self
    }

    /// One past the absolute position of the last query.
    pub fn query_end(&self) -> usize {
        self.first_position + self.query_length
    }

    /// Checks that the sizes can be scheduled.
    ///
    /// # Errors
    ///
    /// If there are no heads or batch rows, if a position does not fit 31 bits, or if the number of pairs of all heads
    /// and batch rows does not fit 64 bits.
    pub fn validate(&self) -> Result<(), PatternError> {
        PatternError::require_positive("n_heads", self.n_heads)?;
        PatternError::require_positive("batch_size", self.batch_size)?;
        for (field, got) in [
            ("key_length", self.key_length),
            (
                "first_position + query_length",
                self.first_position.saturating_add(self.query_length),
            ),
        ] {
            if got > Self::LIMIT {
                return Err(PatternError::TooLarge {
                    field,
                    got,
                    limit: Self::LIMIT,
                });
            }
        }
        [self.key_length, self.n_heads, self.batch_size]
            .into_iter()
            .try_fold(self.query_length as u64, |product, size| {
                product.checked_mul(size as u64)
            })
            .map(|_| ())
            .ok_or(PatternError::Overflow {
                factors: "query_length, key_length, n_heads and batch_size",
            })
    }
}
