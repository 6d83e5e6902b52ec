//! What a layer is told besides its input.

use std::{
    ops::Range,
    sync::{Arc, Mutex, PoisonError},
};

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{
    BatchData, BlockSizes, CacheSlots, Global, Lengths, Pattern, PatternError, RandomKey, Schedule,
    StepSoFar, operators::indices,
};

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
    /// The tokens that the hidden states began as: what experts by a hash go by. Shape: `[batch_size, query_length]`.
    pub tokens: Option<Tensor<2, Int>>,
    /// What of the step of training is done already.
    pub so_far: StepSoFar,
    /// The layer's part of it: how often each expert was chosen in the earlier micro-batches of this step.
    pub earlier_load: Option<Arc<[u64]>>,
    data: Arc<BatchData>,
    left_padding: Option<Arc<[usize]>>,
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
            tokens: None,
            so_far: StepSoFar::default(),
            earlier_load: None,
            data: Arc::new(BatchData::new()),
            left_padding: None,
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

    /// Hides the keys at the first `padding[row]` positions of each row, and lets the row's own positions count from
    /// there. Takes the place of [`with_data`](Self::with_data).
    pub fn with_left_padding(self, padding: &[usize]) -> Self {
        let slots = 0..self.lengths.key_length;
        let hidden = padding
            .iter()
            .map(|n| slots.clone().map(|slot| slot < *n).collect());
        let data = BatchData::new().with_hidden_keys(hidden.collect());
        Self {
            left_padding: Some(padding.into()),
            ..self.with_data(padding.len(), data)
        }
    }

    /// The positions of the tokens of each row where rows are padded on the left: what schemes
    /// of absolute positions look up. Padding stands at the row's first position. Relative schemes need nothing: they
    /// do not change when all positions of a row do.
    ///
    /// # Shapes
    ///
    /// - output: `[batch_size, query_length]`
    pub fn row_positions(&self, device: &Device) -> Option<Tensor<2, Int>> {
        let padding = self.left_padding.as_ref()?;
        let slots = self.lengths.first_position..self.lengths.query_end();
        let shape = [padding.len(), slots.len()];
        let positions = padding.iter().flat_map(|n| {
            slots
                .clone()
                .map(move |slot| slot.saturating_sub(*n) as i64)
        });
        let positions = TensorData::new(positions.collect::<Vec<_>>(), shape);
        Some(Tensor::from_data(positions, device))
    }

    /// The context as the slots of a cache have it, where that has forgotten positions: queries and keys are numbered by
    /// their slots. [`Pattern::in_slots`] gives the pattern.
    ///
    /// # Panics
    ///
    /// If the batch has documents or the scores a bias, which belong to positions that may be gone.
    pub fn in_slots(&self, slots: &CacheSlots) -> Self {
        if slots.gap() == 0 {
            return self.clone();
        }
        assert!(
            !self.data.has_documents() && self.bias.is_none(),
            "cache: documents and biases need one that forgets nothing"
        );
        let mut context = self.clone();
        context.lengths.key_length = slots.n_slots();
        context.lengths.first_position -= slots.gap();
        match &self.left_padding {
            Some(padding) => {
                let there = padding.iter().map(|n| n.saturating_sub(slots.gap()));
                context.with_left_padding(&there.collect::<Vec<_>>())
            }
            None => context,
        }
    }

    /// Which of the queries stand at global positions, rising, counted from the first query: one list for all batch rows,
    /// or one for each where the batch decides.
    ///
    /// # Errors
    ///
    /// If the batch decides, and brings no global positions, those of another number of rows, or some beyond the sequence.
    pub fn global_queries(&self, global: &Global) -> Result<Vec<Vec<usize>>, PatternError> {
        let first = self.lengths.first_position;
        let queries = first..self.lengths.query_end();
        let of = |range: Range<usize>| {
            let start = range.start.max(queries.start);
            let end = range.end.min(queries.end).max(start);
            (start - first..end - first).collect()
        };
        let among = |positions: &[usize]| {
            let there = positions
                .iter()
                .filter(|position| queries.contains(position));
            there.map(|position| position - first).collect()
        };
        Ok(match global {
            Global::Positions(positions) => vec![among(positions)],
            Global::First(n) => vec![of(0..*n)],
            Global::Last(n) => {
                vec![of(self.lengths.key_length.saturating_sub(*n)..usize::MAX)]
            }
            Global::Batch => {
                self.data.require_globals()?;
                self.data.check(&self.lengths)?;
                let rows = 0..self.lengths.batch_size;
                rows.map(|row| among(self.data.globals(row))).collect()
            }
        })
    }

    /// Some of the queries alone, of all batch rows, for what does not go by their positions: they stand one after another
    /// from position zero on. Bias, documents, tokens and hidden keys stay theirs; dropout is drawn for the new places.
    /// It is for attention alone: [`padding`](Self::padding) and [`row_positions`](Self::row_positions) do not know where
    /// the queries came from.
    ///
    /// ```
    /// use emberlm_core::{Context, Lengths, Pattern};
    ///
    /// let context = Context::new(Lengths::square(5)).of_queries(&[1, 4]);
    /// let schedule = context.schedule(&Pattern::full(), 1)?;
    /// assert_eq!(schedule.statistics().n_visible, 2 * 5);
    /// # Ok::<(), emberlm_core::PatternError>(())
    /// ```
    ///
    /// # Panics
    ///
    /// If there is no such query, or documents do not reach to it.
    pub fn of_queries(&self, queries: &[usize]) -> Self {
        let first = self.lengths.first_position;
        let there = first..self.lengths.query_end();
        let positions: Vec<usize> = queries.iter().map(|query| first + query).collect();
        for position in &positions {
            assert!(
                there.contains(position),
                "queries: there is none at position {position}, they are at {there:?}"
            );
        }
        let mut context = self.clone();
        context.lengths.first_position = 0;
        context.lengths.query_length = queries.len();
        context.data = Arc::new(self.data.of_queries(&positions));
        context.left_padding = None;
        context.schedules = Arc::default();
        let bias = context.bias.take();
        context.bias = bias.map(|bias| {
            let queries = indices(queries, &bias.device());
            bias.select(2, queries)
        });
        let tokens = context.tokens.take();
        context.tokens = tokens.map(|tokens| {
            let queries = indices(queries, &tokens.device());
            tokens.select(1, queries)
        });
        context
    }

    /// Which of the queries are padding, row after row; nothing where none is.
    pub fn padding(&self) -> Option<Vec<bool>> {
        self.data.hidden_keys(0)?;
        let queries = self.lengths.first_position..self.lengths.query_end();
        let rows = 0..self.lengths.batch_size;
        let hidden = rows.filter_map(|row| self.data.hidden_keys(row));
        let padding: Vec<bool> = hidden
            .flat_map(|hidden| &hidden[queries.clone()])
            .copied()
            .collect();
        padding.contains(&true).then_some(padding)
    }

    /// Adds the tokens.
    pub fn with_tokens(mut self, tokens: Option<Tensor<2, Int>>) -> Self {
        self.tokens = tokens;
        self
    }

    /// Adds what of the step of training is done already.
    pub fn with_so_far(mut self, so_far: StepSoFar) -> Self {
        self.so_far = so_far;
        self
    }

    /// That of a layer of a stack: with a random key of its own, and the load of its experts so far.
    pub fn of_layer(&self, layer: usize) -> Self {
        Self {
            earlier_load: self.so_far.load(layer),
            ..self.fold(layer as u64)
        }
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
    /// A pattern that does not fit the heads or the batch, or that depends on absolute positions where rows are padded
    /// on the left.
    pub fn schedule(
        &self,
        pattern: &Pattern,
        n_heads: usize,
    ) -> Result<Arc<Schedule>, PatternError> {
        if self.left_padding.is_some() && !pattern.is_shift_invariant() {
            return Err(PatternError::LeftPadding {
                pattern: pattern.to_string(),
            });
        }
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
    fn rows_count_their_positions_from_the_end_of_their_padding() {
        let lengths = Lengths::new(2, 5).with_first_position(3);
        let context = Context::new(lengths).with_left_padding(&[0, 2, 4]);
        let positions = context.row_positions(&Device::flex()).unwrap().into_data();
        let positions: Vec<i64> = positions.iter().collect();
        assert_eq!(positions, [3, 4, 1, 2, 0, 0]);
        let causal = context.schedule(&Pattern::causal(), 1).unwrap();
        assert_eq!(causal.statistics().n_visible, (4 + 5) + (2 + 3) + 1);
    }

    #[test]
    fn absolute_patterns_and_left_padding_exclude_each_other() {
        let context = Context::new(Lengths::square(3)).with_left_padding(&[0, 1]);
        let error = context.schedule(&(Pattern::causal() | Pattern::sinks(1)), 1);
        let words = error.unwrap_err().to_string();
        assert!(words.starts_with("causal | sinks:1 depends"), "{words}");
    }

    #[test]
    fn global_positions_may_come_later() {
        let context = Context::new(Lengths::square(3));
        let pattern = Pattern::causal() & Pattern::global(vec![0, 7]);
        let schedule = context.schedule(&pattern, 1).unwrap();
        assert_eq!(schedule.statistics().n_visible, 3);
    }

    #[test]
    fn some_of_the_queries_keep_what_is_theirs() {
        let device = Device::flex();
        let lengths = Lengths::new(3, 5).with_first_position(2);
        let data = BatchData::new().with_documents(vec![vec![0, 0, 1, 1, 0]]);
        let bias = Tensor::<1, Int>::arange(0..15, &device).float();
        let context = Context::new(lengths)
            .with_data(1, data.clone())
            .with_bias(Some(bias.reshape([1, 1, 3, 5])))
            .of_queries(&[0, 2]);
        // The first is at position 2, in document 1 with two keys; the other at 4, in document 0 with three.
        let visible = |context: &Context| {
            let schedule = context.schedule(&Pattern::full(), 1).unwrap();
            schedule.statistics().n_visible
        };
        assert_eq!(visible(&context), 2 + 3);
        let bias: Vec<f32> = context.bias.unwrap().into_data().iter().collect();
        assert_eq!(
            bias,
            [0.0, 1.0, 2.0, 3.0, 4.0, 10.0, 11.0, 12.0, 13.0, 14.0]
        );
        // Queries of documents of their own, by position: two of three see document 0.
        let data = data.with_query_documents(vec![vec![9, 9, 0, 1, 0]]);
        let context = Context::new(lengths).with_data(1, data);
        assert_eq!(visible(&context.of_queries(&[1, 2])), 2 + 3);
    }

    #[test]
    #[should_panic(expected = "queries: there is none at position 5")]
    fn queries_that_are_not_there_cannot_be_picked() {
        let lengths = Lengths::new(3, 5).with_first_position(2);
        Context::new(lengths).of_queries(&[3]);
    }

    #[test]
    fn what_the_batch_lacks_is_an_error() {
        let context = Context::new(Lengths::square(3));
        context.schedule(&Pattern::documents(), 1).unwrap_err();
    }
}
