//! A batch of training: sequences of tokens, what each position should say, and what else comes along.

use std::sync::Arc;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{BatchData, RandomKey};

/// A target that does not count, as in PyTorch.
pub const IGNORED_TARGET: i64 = -100;

/// Sequences of tokens with a target at each position, or with few of their own.
///
/// The objective decides what they are: the next token (causal), the token that was hidden (masked), the next token of
/// another sequence ([`source`](Self::source) given), the class of a sequence, the ends of a span. Targets of
/// [`IGNORED_TARGET`] do not count.
#[derive(Debug, Clone)]
pub struct TokenBatch {
    /// `[batch_size, seq_length]`
    pub inputs: Tensor<2, Int>,
    /// `[batch_size, seq_length]`; where a sequence has targets of its own, `[batch_size, n_targets]`: a class is one, a span two
    pub targets: Tensor<2, Int>,
    /// What the rows of the inputs bring: padding, documents.
    pub data: BatchData,
    /// What an encoder reads.
    pub source: Option<Source>,
    /// Where dropout draws from in training.
    pub dropout_key: Option<RandomKey>,
    /// What of the step of training is done already.
    pub so_far: StepSoFar,
}

/// What of a step of training is done already.
#[derive(Debug, Clone, Default)]
pub struct StepSoFar {
    /// How many steps were done before.
    pub step: u64,
    /// How often each expert was chosen in the earlier micro-batches of this step, by the number of the layer.
    pub loads: Arc<[(usize, Arc<[u64]>)]>,
}

impl StepSoFar {
    /// That of one layer.
    pub fn load(&self, layer: usize) -> Option<Arc<[u64]>> {
        let found = self.loads.iter().find(|(of, _)| *of == layer);
        found.map(|(_, load)| load.clone())
    }

    /// That of the layers from `first` on, numbered from there.
    pub fn from_layer(&self, first: usize) -> Self {
        let loads = self.loads.iter().filter(|(layer, _)| *layer >= first);
        Self {
            step: self.step,
            loads: loads
                .map(|(layer, load)| (layer - first, load.clone()))
                .collect(),
        }
    }
}

impl TokenBatch {
    /// Sequences without padding, documents and source; dropout is off.
    pub fn new(inputs: Tensor<2, Int>, targets: Tensor<2, Int>) -> Self {
        Self {
            inputs,
            targets,
            data: BatchData::new(),
            source: None,
            dropout_key: None,
            so_far: StepSoFar::default(),
        }
    }
}

/// The sequences that an encoder reads for a decoder.
#[derive(Debug, Clone)]
pub struct Source {
    /// `[batch_size, source_length]`
    pub tokens: Tensor<2, Int>,
    /// Padding and documents of the sources.
    pub data: BatchData,
}

impl Source {
    /// Sources without padding.
    pub fn new(tokens: Tensor<2, Int>) -> Self {
        Self {
            tokens,
            data: BatchData::new(),
        }
    }

    /// Sources of different lengths, padded at the end with token 0, which no query sees.
    ///
    /// ```
    /// use burn::tensor::Device;
    /// use emberlm_core::Source;
    ///
    /// let source = Source::padded(&[vec![4, 5, 2], vec![6, 2]], &Device::flex());
    /// assert_eq!(source.tokens.dims(), [2, 3]);
    /// ```
    ///
    /// # Panics
    ///
    /// If there are no sources, or one is empty.
    pub fn padded<R: AsRef<[u32]>>(rows: &[R], device: &Device) -> Self {
        let lengths: Vec<usize> = rows.iter().map(|row| row.as_ref().len()).collect();
        let longest = lengths.iter().max().copied().unwrap_or(0);
        let shortest = lengths.iter().min().copied().unwrap_or(0);
        assert!(shortest > 0, "source: it has at least one token");
        let mut tokens = Vec::with_capacity(rows.len() * longest);
        for row in rows {
            tokens.extend(row.as_ref().iter().map(|token| *token as i32));
            tokens.resize(tokens.len().next_multiple_of(longest), 0);
        }
        let tokens = Tensor::from_data(TensorData::new(tokens, [rows.len(), longest]), device);
        if shortest == longest {
            return Self::new(tokens);
        }
        let hidden = |length: &usize| (0..longest).map(|i| i >= *length).collect();
        let hidden = lengths.iter().map(hidden).collect();
        Self {
            tokens,
            data: BatchData::new().with_hidden_keys(hidden),
        }
    }
}
