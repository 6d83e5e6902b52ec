//! The loss of a text of any length, by a window that slides over it.

use burn::tensor::{Device, Int, Tensor, TensorData};
use emberlm::core::{CrossEntropyConfig, IGNORED_TARGET, LossModel, TokenBatch};
use thiserror::Error;

/// How a text is cut for a causal model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlidingConfig {
    /// Tokens that the model reads at once.
    pub window: usize,
    /// By how many tokens the window moves on.
    pub stride: usize,
    /// Windows in a pass of the model.
    pub batch_size: usize,
}

/// Why a text has no loss.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SlidingError {
    /// A window without tokens, or longer than the model.
    #[error("--window {window}: choose 1 to {longest}")]
    Window {
        /// What was asked for.
        window: usize,
        /// Positions of the model.
        longest: usize,
    },
    /// A stride that never ends or leaves tokens out.
    #[error("--stride {stride}: choose 1 to {window}, the window")]
    Stride {
        /// What was asked for.
        stride: usize,
        /// The window.
        window: usize,
    },
    /// Nothing is predicted.
    #[error("the text has {n_tokens} tokens, and the first is not predicted: give at least 2")]
    TooShort {
        /// Tokens there are.
        n_tokens: usize,
    },
    /// Somebody asked to stop.
    #[error("stopped before the end")]
    Stopped,
}

/// The loss of the tokens so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Score {
    /// Sum of the negative log-likelihoods in nats.
    pub nll_sum: f64,
    /// Number of tokens in the sum.
    pub n_tokens: usize,
}

impl Score {
    /// Mean loss in nats per token.
    pub fn loss(&self) -> f64 {
        self.nll_sum / self.n_tokens as f64
    }
}

impl SlidingConfig {
    /// Checks the fields against each other and the model's positions.
    ///
    /// # Errors
    ///
    /// [`SlidingError::Window`] and [`SlidingError::Stride`].
    pub fn validate(&self, longest: Option<usize>) -> Result<(), SlidingError> {
        let Self { window, stride, .. } = *self;
        let longest = longest.unwrap_or(usize::MAX - 1);
        if !(1..=longest).contains(&window) {
            return Err(SlidingError::Window { window, longest });
        }
        if !(1..=window).contains(&stride) {
            return Err(SlidingError::Stride { stride, window });
        }
        Ok(())
    }
}

/// Scores every token of a text but the first once: those of the first window all, then of each window the last `stride`,
/// which have at least `window - stride` tokens before them. `watch` is told the figures after each pass.
///
/// # Errors
///
/// [`SlidingError::TooShort`], and those of `watch`.
pub fn score<M: LossModel>(
    model: &M,
    tokens: impl IntoIterator<Item = u32>,
    config: &SlidingConfig,
    device: &Device,
    mut watch: impl FnMut(&Score) -> Result<(), SlidingError>,
) -> Result<Score, SlidingError> {
    let mut score = Score::default();
    let mut rows: Vec<Row> = Vec::new();
    let mut windows = Windows::new(tokens.into_iter(), config);
    while let Some(row) = windows.next() {
        let is_other = rows.last().is_some_and(|last| !last.fits(&row));
        if is_other || rows.len() == config.batch_size {
            score.add(model, &rows, device);
            watch(&score)?;
            rows.clear();
        }
        rows.push(row);
    }
    if rows.is_empty() {
        let n_tokens = windows.buffer.len();
        return Err(SlidingError::TooShort { n_tokens });
    }
    score.add(model, &rows, device);
    watch(&score)?;
    Ok(score)
}

impl Score {
    fn add<M: LossModel>(&mut self, model: &M, rows: &[Row], device: &Device) {
        let length = rows[0].tokens.len() - 1;
        let tensor = |row: fn(&Row) -> Vec<i64>| {
            let tokens: Vec<i64> = rows.iter().flat_map(row).collect();
            Tensor::<2, Int>::from_data(TensorData::new(tokens, [rows.len(), length]), device)
        };
        let batch = TokenBatch::new(tensor(Row::inputs), tensor(Row::targets));
        let counting = CrossEntropyConfig::new().with_ignored_target(Some(IGNORED_TARGET));
        let loss = model.loss(batch, &counting).cross_entropy;
        self.nll_sum += f64::from(loss.nll_sum.into_scalar::<f32>());
        self.n_tokens += rows.iter().map(Row::n_scored).sum::<usize>();
    }
}

/// A window and the token after it.
struct Row {
    tokens: Vec<u32>,
    /// Tokens that an earlier window has scored.
    n_known: usize,
}

impl Row {
    fn fits(&self, other: &Self) -> bool {
        self.tokens.len() == other.tokens.len()
    }

    fn n_scored(&self) -> usize {
        self.tokens.len() - 1 - self.n_known
    }

    fn inputs(&self) -> Vec<i64> {
        let inputs = &self.tokens[..self.tokens.len() - 1];
        inputs.iter().map(|token| i64::from(*token)).collect()
    }

    fn targets(&self) -> Vec<i64> {
        let known = std::iter::repeat_n(IGNORED_TARGET, self.n_known);
        let scored = &self.tokens[1 + self.n_known..];
        known
            .chain(scored.iter().map(|token| i64::from(*token)))
            .collect()
    }
}

/// The windows of a text, of which no more than one is held.
struct Windows<I> {
    tokens: I,
    window: usize,
    stride: usize,
    buffer: Vec<u32>,
    n_known: Option<usize>,
}

impl<I: Iterator<Item = u32>> Windows<I> {
    fn new(tokens: I, config: &SlidingConfig) -> Self {
        Self {
            tokens,
            window: config.window,
            stride: config.stride,
            buffer: Vec::new(),
            n_known: None,
        }
    }

    fn next(&mut self) -> Option<Row> {
        let n_known = match self.n_known {
            None => 0,
            // The last window was shorter: the text has ended.
            Some(_) if self.buffer.len() <= self.window => return None,
            Some(_) => {
                self.buffer.drain(..self.stride);
                self.window - self.stride
            }
        };
        let missing = self.window + 1 - self.buffer.len();
        self.buffer.extend(self.tokens.by_ref().take(missing));
        self.n_known = Some(n_known);
        let has_new = self.buffer.len() > n_known + 1;
        has_new.then(|| Row {
            tokens: self.buffer.clone(),
            n_known,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use burn::tensor::activation::log_softmax;
    use emberlm::{
        core::{CausalModel, RandomKey},
        models::{Decoder, DecoderConfig, PositionsConfig},
        text::Corpus,
        training::{EvaluationLoader, EvaluationWindows, LanguageModel, evaluate},
    };

    use super::*;
    use crate::choose_device;

    const WINDOW: usize = 8;

    fn model(device: &Device) -> Decoder {
        let positions = PositionsConfig::Learned {
            max_seq_length: WINDOW,
        };
        DecoderConfig::new(256, 2, 12, 3)
            .with_positions(positions)
            .init(device)
    }

    fn text(length: usize) -> Vec<u8> {
        let key = RandomKey::new(7);
        (0..length as u64)
            .map(|i| 97 + key.below(i, 20) as u8)
            .collect()
    }

    fn sliding(stride: usize, batch_size: usize) -> SlidingConfig {
        SlidingConfig {
            window: WINDOW,
            stride,
            batch_size,
        }
    }

    fn score_of(text: &[u8], config: &SlidingConfig) -> Score {
        let (_, device) = choose_device(None).expect("a device");
        let tokens = text.iter().map(|byte| u32::from(*byte));
        score(&model(&device), tokens, config, &device, |_| Ok(())).expect("long enough")
    }

    /// `ln p` of the last token after those before it, from all scores.
    fn last_token(model: &Decoder, tokens: &[u8], device: &Device) -> f64 {
        let (target, inputs) = tokens.split_last().expect("two tokens");
        let inputs: Vec<i64> = inputs.iter().map(|byte| i64::from(*byte)).collect();
        let shape = [1, inputs.len()];
        let inputs = Tensor::<2, Int>::from_data(TensorData::new(inputs, shape), device);
        let scores = log_softmax(model.forward(inputs, None), 2).into_data();
        let scores: Vec<f64> = scores.iter::<f64>().collect();
        scores[scores.len() - 256 + usize::from(*target)]
    }

    #[test]
    fn a_stride_of_the_window_is_windows_side_by_side() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("text.txt");
        std::fs::write(&path, text(500)).expect("writable");
        let held_out = Corpus::open(&[path]).expect("a text").held_out();
        let bytes = held_out.bytes(0..held_out.len());
        let windows = Arc::new(EvaluationWindows::new(held_out, WINDOW).expect("long enough"));
        let all: Vec<usize> = (0..windows.len()).collect();
        let (_, device) = choose_device(None).expect("a device");
        let loader = EvaluationLoader::new(windows, &all, 3, &device);
        let language_model = LanguageModel::new(model(&device), 0.0, 0.0);
        let expected = evaluate(&language_model, &loader, |_, _| Ok(()))
            .expect("in memory")
            .loss();

        let score = score_of(&bytes, &sliding(WINDOW, 3));
        assert_eq!(score.n_tokens, bytes.len() - 1);
        assert_eq!(score.loss().to_bits(), expected.to_bits());
    }

    #[test]
    fn a_stride_of_one_gives_each_token_its_full_window() {
        let (_, device) = choose_device(None).expect("a device");
        let (model, text) = (model(&device), text(41));
        let expected: f64 = (1..text.len())
            .map(|target| {
                -last_token(
                    &model,
                    &text[target.saturating_sub(WINDOW)..=target],
                    &device,
                )
            })
            .sum();
        for batch_size in [1, 5] {
            let score = score_of(&text, &sliding(1, batch_size));
            assert_eq!(score.n_tokens, 40);
            assert!(
                (score.nll_sum - expected).abs() < 1e-4,
                "{score:?}, {expected}"
            );
        }
    }

    #[test]
    fn each_token_is_scored_once_with_enough_before_it() {
        for (length, stride) in [(2, 3), (9, 3), (10, 3), (11, 8), (40, 5), (41, 7), (100, 1)] {
            let config = sliding(stride, 4);
            let mut windows = Windows::new(0..length, &config);
            let mut scored = Vec::new();
            while let Some(row) = windows.next() {
                assert!(row.tokens.len() <= WINDOW + 1);
                if !scored.is_empty() {
                    assert!(row.n_known >= WINDOW - stride);
                }
                scored.extend_from_slice(&row.tokens[1 + row.n_known..]);
                assert_eq!(row.inputs().len(), row.targets().len());
            }
            assert_eq!(scored, (1..length).collect::<Vec<_>>(), "{length} {stride}");
        }
    }

    #[test]
    fn what_is_impossible_says_why() {
        let (_, device) = choose_device(None).expect("a device");
        let model = model(&device);
        for n_tokens in [0, 1] {
            let result = score(&model, 0..n_tokens, &sliding(1, 1), &device, |_| Ok(()));
            let n_tokens = n_tokens as usize;
            assert_eq!(result, Err(SlidingError::TooShort { n_tokens }));
        }
        for (stride, window, mention) in [
            (0, 8, "--stride 0: choose 1 to 8"),
            (9, 8, "--stride 9"),
            (1, 0, "--window 0: choose 1 to 8"),
            (1, 9, "--window 9"),
        ] {
            let config = SlidingConfig {
                window,
                ..sliding(stride, 1)
            };
            let error = config.validate(Some(WINDOW)).expect_err("impossible");
            assert!(error.to_string().starts_with(mention), "{error}");
        }
        assert_eq!(sliding(8, 1).validate(None), Ok(()));
    }
}
