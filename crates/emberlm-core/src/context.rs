//! What a layer is told besides its input.

use std::sync::{Arc, Mutex, PoisonError};

use burn::tensor::Tensor;

use crate::{BatchData, BlockSizes, Lengths, Pattern, PatternError, RandomKey, Schedule};

/// What the stack tells every layer: how long the sequences are and where they begin, what the batch brings (padding,
/// documents, global tokens), the random key of this step, and a bias of the scores. New kinds of information become
/// new fields, so that no signature of a layer changes.
///
/// ```
/// use emberlm_core::{Context, Lengths, Pattern};
///
/// let context = Context::new(Lengths::square(5));
/// let schedule = context.schedule(&Pattern::causal(), 2)?;
/// assert_eq!(schedule.statistics().n_visible, 2 * 15);
/// # Ok::<(), emberlm_core::PatternError>(())
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Context {
    /// Lengths of queries and keys, and the position of the first query (tokens already in the cache).
    pub lengths: Lengths,
    /// Source of randomness of this layer in this step; nothing outside training, which turns dropout off.
    pub dropout_key: Option<RandomKey>,
    /// Added to the scores of every attention layer that is given this context, as T5's layers share a
    /// [`RelativeBias`](crate::RelativeBias); gets a gradient. Attention to another sequence has a context of its own.
    /// Shape: `[batch_size or 1, n_heads or 1, query_length, key_length]`.
    pub bias: Option<Tensor<4>>,
    data: Arc<BatchData>,
    schedules: Arc<Mutex<Vec<Compiled>>>,
}

#[derive(Debug)]
struct Compiled {
    pattern: Pattern,
    lengths: Lengths,
    schedule: Arc<Schedule>,
}

impl Context {
    /// Sequences of these lengths, without padding; dropout is off.
    ///
    /// The numbers of batch rows and heads of `lengths` are not looked at.
    pub fn new(lengths: Lengths) -> Self {
        Self {
            lengths: lengths.with_batch_size(1),
            dropout_key: None,
            bias: None,
            data: Arc::new(BatchData::new()),
            schedules: Arc::default(),
        }
    }

    /// Adds what the rows of a batch of this size bring. Where there are documents, a query sees keys of its own alone,
    /// whatever the pattern says.
    pub fn with_data(mut self, batch_size: usize, data: BatchData) -> Self {
        self.lengths = self.lengths.with_batch_size(batch_size);
        self.data = Arc::new(data);
        self.schedules = Arc::default();
        self
    }

    /// Turns dropout on, drawn from `key`.
    pub fn with_dropout_key(mut self, key: Option<RandomKey>) -> Self {
        self.dropout_key = key;
        self
    }

    /// Adds a bias to the scores.
    pub fn with_bias(mut self, bias: Option<Tensor<4>>) -> Self {
        self.bias = bias;
        self
    }

    /// The same context with a random key of its own, so that the parts of a stack never draw the same mask.
    pub fn fold(&self, part: u64) -> Self {
        Self {
            dropout_key: self.dropout_key.map(|key| key.fold(part)),
            ..self.clone()
        }
    }

    /// The pattern compiled for this pass and `n_heads` heads. It is compiled once, for all layers that share this
    /// context or one that was folded from it. Global positions that the sequence has not reached are left out.
    ///
    /// # Errors
    ///
    /// A pattern that does not fit the heads or the batch.
    pub fn schedule(
        &self,
        pattern: &Pattern,
        n_heads: usize,
    ) -> Result<Arc<Schedule>, PatternError> {
        // A panic elsewhere leaves a list of whole entries.
        let mut schedules = self
            .schedules
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let lengths = self.lengths.with_n_heads(n_heads);
        let known = schedules
            .iter()
            .find(|known| known.lengths == lengths && known.pattern == *pattern);
        if let Some(known) = known {
            return Ok(known.schedule.clone());
        }
        let mut there = pattern.within(lengths.key_length.max(lengths.query_end()));
        if self.data.has_documents() {
            there = there & Pattern::documents();
        }
        let schedule = Schedule::compile(&there, &lengths, &BlockSizes::default(), &self.data)?;
        let schedule = Arc::new(schedule);
        schedules.push(Compiled {
            pattern: pattern.clone(),
            lengths,
            schedule: schedule.clone(),
        });
        Ok(schedule)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_share_the_schedules_of_a_pass() {
        let context = Context::new(Lengths::square(100)).with_dropout_key(Some(RandomKey::new(1)));
        let first = context.schedule(&Pattern::causal(), 4).unwrap();
        let layer = context.fold(3);
        let again = layer.schedule(&Pattern::causal(), 4).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        let other = layer.schedule(&Pattern::full(), 4).unwrap();
        assert!(!Arc::ptr_eq(&first, &other));
        assert_ne!(layer.dropout_key, context.dropout_key);
    }

    #[test]
    fn other_lengths_make_other_schedules() {
        let mut context = Context::new(Lengths::square(3));
        context.schedule(&Pattern::causal(), 1).unwrap();
        context.lengths = Lengths::new(1, 3).with_first_position(2);
        let schedule = context.schedule(&Pattern::causal(), 1).unwrap();
        assert_eq!(schedule.statistics().n_visible, 3);
    }

    #[test]
    fn padding_makes_other_schedules() {
        let context = Context::new(Lengths::square(3));
        let plain = context.schedule(&Pattern::full(), 1).unwrap();
        let data =
            BatchData::new().with_hidden_keys(vec![vec![false; 3], vec![true, false, false]]);
        let padded = context
            .with_data(2, data)
            .schedule(&Pattern::full(), 1)
            .unwrap();
        assert_eq!(plain.statistics().n_visible, 9);
        assert_eq!(padded.statistics().n_visible, 9 + 6);
    }

    #[test]
    fn documents_of_the_batch_keep_apart() {
        let data = BatchData::new().with_documents(vec![vec![0, 0, 1]]);
        let context = Context::new(Lengths::square(3)).with_data(1, data);
        let schedule = context.schedule(&Pattern::causal(), 1).unwrap();
        assert_eq!(schedule.statistics().n_visible, 1 + 2 + 1);
    }

    #[test]
    fn global_positions_may_come_later() {
        let context = Context::new(Lengths::square(3));
        let pattern = Pattern::causal() & Pattern::global(vec![0, 7]);
        let schedule = context.schedule(&pattern, 1).unwrap();
        assert_eq!(schedule.statistics().n_visible, 3);
    }

    #[test]
    fn what_the_batch_lacks_is_an_error() {
        let context = Context::new(Lengths::square(3));
        context.schedule(&Pattern::documents(), 1).unwrap_err();
    }
}
