//! What a layer is told besides its input.

use crate::{RandomKey, Visibility};

/// What the stack tells every layer: which keys are visible, where the queries stand, and the random key of
/// this step. New kinds of information become new fields, so that no signature of a layer changes.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Context {
    /// Which keys each query may see.
    pub visibility: Visibility,
    /// Absolute position of the first query (tokens already in the cache).
    pub first_position: usize,
    /// Source of randomness of this layer in this step; nothing outside training, which turns dropout off.
    pub dropout_key: Option<RandomKey>,
}

impl Context {
    /// Queries that stand at position 0 and later, with the given visibility.
    pub fn new(visibility: Visibility) -> Self {
        Self {
            visibility,
            ..Self::default()
        }
    }

    /// The queries begin at this absolute position.
    pub fn with_first_position(mut self, first_position: usize) -> Self {
        self.first_position = first_position;
        self
    }

    /// Turns dropout on, drawn from `key`.
    pub fn with_dropout_key(mut self, key: Option<RandomKey>) -> Self {
        self.dropout_key = key;
        self
    }

    /// The same context with a random key of its own, so that the parts of a stack never draw the same mask.
    pub fn fold(&self, part: u64) -> Self {
        Self {
            dropout_key: self.dropout_key.map(|key| key.fold(part)),
            ..self.clone()
        }
    }
}
