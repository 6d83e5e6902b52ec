//! Windows of tokens as the batch that an objective asks for.

use std::ops::Range;

use burn::tensor::{Device, Int, Tensor, TensorData};
use emberlm_core::{BatchData, IGNORED_TARGET, RandomKey, Source, TokenBatch};
use emberlm_text::{TokenStream, Tokenizer};

use super::{MaskedConfig, Objective, SpansConfig};

/// How windows become batches: the objective, and whether documents are kept apart.
///
/// ```
/// use emberlm_training::{Batching, MaskedConfig, Objective};
///
/// let masked = Objective::Masked(MaskedConfig::new(256, 256));
/// let batching = Batching::new(masked, 42).with_documents(true);
/// assert_eq!(batching.objective().name(), "masked");
/// ```
#[derive(Clone, Debug)]
pub struct Batching {
    objective: Objective,
    tokenizer: Tokenizer,
    documents: bool,
    key: RandomKey,
}

/// A window of a stream, and what makes it a row of a batch.
pub(crate) struct Window {
    /// The tokens, and the one that follows them.
    tokens: Vec<u32>,
    /// The document of each of them, where documents are kept apart.
    documents: Option<Vec<u32>>,
    /// What the objective draws from.
    key: RandomKey,
}

impl Batching {
    /// Batches of an objective, which draws from `seed` what it hides; for tokens that are bytes.
    pub fn new(objective: Objective, seed: u64) -> Self {
        Self {
            objective,
            tokenizer: Tokenizer::bytes(),
            documents: false,
            // A name of its own: windows and dropout draw from the same seed.
            key: RandomKey::new(seed).fold_str("objective"),
        }
    }

    /// The tokenizer of the windows, which says where words begin: masks of whole words ask for that.
    pub fn with_tokenizer(mut self, tokenizer: Tokenizer) -> Self {
        self.tokenizer = tokenizer;
        self
    }

    /// Whether a window that holds several documents says so, which keeps attention within them. The first token of a
    /// document is then no target of a causal model, which would have to tell it from another document.
    ///
    /// # Panics
    ///
    /// If documents are to be kept apart for [`Objective::Spans`]: its sources and targets have positions of their own.
    pub fn with_documents(mut self, documents: bool) -> Self {
        assert!(
            !(documents && matches!(self.objective, Objective::Spans(_))),
            "documents: spans cannot keep them apart"
        );
        self.documents = documents;
        self
    }

    /// The objective.
    pub fn objective(&self) -> &Objective {
        &self.objective
    }

    /// A window of a stream; the last token of the range is the one that follows it.
    pub(crate) fn window(
        &self,
        stream: &TokenStream,
        range: Range<usize>,
        key: RandomKey,
    ) -> Window {
        Window {
            documents: (self.documents).then(|| stream.documents(range.clone())),
            tokens: stream.tokens(range),
            key,
        }
    }

    /// What a window of a step hides.
    pub(crate) fn training_key(&self, step: u64, index: u64) -> RandomKey {
        self.key.fold_str("training").fold(step).fold(index)
    }

    /// What a window of the held-out text hides, always.
    pub(crate) fn evaluation_key(&self, window: usize) -> RandomKey {
        self.key.fold_str("evaluation").fold(window as u64)
    }

    /// The batch of windows of equal length.
    pub(crate) fn batch(&self, windows: &[Window], device: &Device) -> TokenBatch {
        let batch = match &self.objective {
            Objective::Causal => causal(windows, device),
            Objective::Masked(config) => self.masked(config, windows, device),
            Objective::Spans(config) => spans(config, windows, device),
        };
        let documents = windows.iter().filter_map(|window| {
            let documents = window.documents.as_ref()?;
            Some(documents[..documents.len() - 1].to_vec())
        });
        let documents: Vec<Vec<u32>> = documents.collect();
        if documents.is_empty() {
            return batch;
        }
        TokenBatch {
            data: BatchData::new().with_documents(documents),
            ..batch
        }
    }

    fn masked(&self, config: &MaskedConfig, windows: &[Window], device: &Device) -> TokenBatch {
        let masked: Vec<_> = windows
            .iter()
            .map(|window| {
                let starts_word = |token| self.tokenizer.starts_word(token);
                config.apply(window.inputs(), &window.key, starts_word)
            })
            .collect();
        TokenBatch::new(
            rows(masked.iter().map(|row| tokens(&row.inputs)), device),
            rows(masked.iter().map(|row| row.targets.clone()), device),
        )
    }
}

impl Window {
    fn inputs(&self) -> &[u32] {
        &self.tokens[..self.tokens.len() - 1]
    }

    /// The token after each input; those that begin another document do not count.
    fn next_tokens(&self) -> Vec<i64> {
        let mut next = tokens(&self.tokens[1..]);
        if let Some(documents) = &self.documents {
            for (target, pair) in next.iter_mut().zip(documents.windows(2)) {
                if pair[0] != pair[1] {
                    *target = IGNORED_TARGET;
                }
            }
        }
        next
    }
}

fn causal(windows: &[Window], device: &Device) -> TokenBatch {
    TokenBatch::new(
        rows(windows.iter().map(|window| tokens(window.inputs())), device),
        rows(windows.iter().map(Window::next_tokens), device),
    )
}

/// The decoder reads the target one position late, as T5's does.
fn spans(config: &SpansConfig, windows: &[Window], device: &Device) -> TokenBatch {
    let spans: Vec<_> = windows
        .iter()
        .map(|window| config.apply(window.inputs(), &window.key))
        .collect();
    let inputs = spans.iter().map(|row| {
        let (_, all_but_last) = row.target.split_last().expect("it has an end");
        [&[config.start_token], all_but_last].concat()
    });
    let source = rows(spans.iter().map(|row| tokens(&row.source)), device);
    TokenBatch {
        source: Some(Source::new(source)),
        ..TokenBatch::new(
            rows(inputs.map(|row| tokens(&row)), device),
            rows(spans.iter().map(|row| tokens(&row.target)), device),
        )
    }
}

fn tokens(tokens: &[u32]) -> Vec<i64> {
    tokens.iter().map(|token| i64::from(*token)).collect()
}

/// Rows of equal length: `[rows, length]`.
fn rows(rows: impl ExactSizeIterator<Item = Vec<i64>>, device: &Device) -> Tensor<2, Int> {
    let n_rows = rows.len();
    let all: Vec<i32> = rows.flatten().map(|token| token as i32).collect();
    let shape = [n_rows, all.len() / n_rows];
    Tensor::from_data(TensorData::new(all, shape), device)
}
