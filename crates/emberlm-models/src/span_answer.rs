//! Answers that are spans of the text: an encoder, and scores of each position as a beginning and as an end.

use burn::{
    config::Config,
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Bool, Device, Int, Tensor, TensorData, s},
};
use emberlm_core::{
    BatchData, CrossEntropyConfig, Gpt2Init, InvalidConfig, LossModel, ModelLoss, RandomKey,
    RoutingStatistics, TokenBatch, assert_valid,
    operators::{cross_entropy, project},
};

use crate::{Encoder, EncoderConfig, StackOutput};

/// Configuration of a [`SpanAnswer`].
#[derive(Config, Debug)]
pub struct SpanAnswerConfig {
    /// The encoder. Its own heads are left out: nothing would train them.
    pub encoder: EncoderConfig,
}

impl SpanAnswerConfig {
    /// Checks the fields.
    ///
    /// # Errors
    ///
    /// Those of the encoder.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.encoder.validate()
    }

    /// Makes the model. Its encoder has the values that it has by itself; the head is drawn from N(0, 0.02).
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> SpanAnswer {
        assert_valid(self.validate());
        let encoder = self.encoder.clone();
        let ends = LinearConfig::new(encoder.d_model, 2).init(device);
        SpanAnswer {
            ends: Gpt2Init::new(encoder.n_layers, encoder.seed).apply(ends),
            encoder: encoder
                .with_masked_head(false)
                .with_pooler(false)
                .init(device),
        }
    }
}

/// An encoder that finds the answer to a question in a text: position `i` begins it with the probability
/// `softmax_i(S h_i)` and ends it with `softmax_i(E h_i)`.
///
/// Devlin et al. 2018 (BERT), <https://arxiv.org/abs/1810.04805>, section 4.2. Differences: both products have a bias, as
/// in the published code, and padding has no probability.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use emberlm_core::BatchData;
/// use emberlm_models::{EncoderConfig, SpanAnswerConfig};
///
/// let device = Device::flex();
/// let model = SpanAnswerConfig::new(EncoderConfig::new(256, 2, 32, 4)).init(&device);
/// let tokens = Tensor::<2, Int>::zeros([1, 9], &device);
/// let scores = model.scores(tokens, None, BatchData::new(), None);
/// let best = &scores.best_spans(3, 4)[0];
/// assert!(best.len() == 3 && best.iter().all(|span| span.start <= span.end));
/// ```
#[derive(Module, Debug)]
pub struct SpanAnswer {
    /// Reads question and text.
    pub encoder: Encoder,
    /// `[d_model, 2]`: `S` and `E`.
    pub ends: Linear,
}

// The exponential of it is zero beside any score that a network has, and half precision can hold it.
const HIDDEN: f64 = -1e4;

impl SpanAnswer {
    /// Scores of each position as the beginning and as the end of the answer.
    ///
    /// # Shapes
    ///
    /// - `tokens`, `types`: `[batch_size, seq_length]`; without `types` all tokens are of the first type
    ///
    /// Padding and documents of the rows come in `data`.
    ///
    /// # Panics
    ///
    /// If the sequence is longer than the learned positions.
    pub fn scores(
        &self,
        tokens: Tensor<2, Int>,
        types: Option<Tensor<2, Int>>,
        data: BatchData,
        dropout_key: Option<RandomKey>,
    ) -> SpanScores {
        let hidden = (self.encoder).hidden_states(tokens, types, data.clone(), dropout_key);
        self.scores_of(hidden, &data)
    }

    /// Scores of the hidden states of the encoder.
    fn scores_of(&self, hidden: Tensor<3>, data: &BatchData) -> SpanScores {
        let ([batch_size, seq_length, _], device) = (hidden.dims(), hidden.device());
        let hidden_keys: Option<Vec<Vec<bool>>> = (0..batch_size)
            .map(|row| data.hidden_keys(row).map(<[bool]>::to_vec))
            .collect();
        let mut both = project(&self.ends, hidden).swap_dims(1, 2);
        if let Some(hidden_keys) = &hidden_keys {
            let mask = TensorData::new(hidden_keys.concat(), [batch_size, 1, seq_length]);
            let mask = Tensor::<3, Bool>::from_data(mask, &device);
            both = both.mask_fill(mask.expand([batch_size, 2, seq_length]), HIDDEN);
        }
        SpanScores { both, hidden_keys }
    }
}

/// Scores of each position of a batch as the beginning and as the end of an answer, not normalised.
#[derive(Debug, Clone)]
pub struct SpanScores {
    /// `[batch_size, 2, seq_length]`
    both: Tensor<3>,
    hidden_keys: Option<Vec<Vec<bool>>>,
}

/// A span of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AnswerSpan {
    /// Position of its first token.
    pub start: usize,
    /// Position of its last token.
    pub end: usize,
    /// Sum of the scores of both positions.
    pub score: f64,
}

impl SpanScores {
    /// Scores of the beginning: `[batch_size, seq_length]`. Hidden positions have one whose probability is zero.
    pub fn start(&self) -> Tensor<2> {
        self.both.clone().slice(s![.., 0..1, ..]).squeeze_dim(1)
    }

    /// Scores of the end, as [`start`](Self::start).
    pub fn end(&self) -> Tensor<2> {
        self.both.clone().slice(s![.., 1..2, ..]).squeeze_dim(1)
    }

    /// The spans of each row with the highest sums of both scores, best first: at most `n_best`, of at most `max_length`
    /// tokens, none of which begins or ends at padding. Of equal ones the earlier comes first.
    ///
    /// The tokens of a question are text like any other: leave out their spans by their positions.
    pub fn best_spans(&self, n_best: usize, max_length: usize) -> Vec<Vec<AnswerSpan>> {
        let [batch_size, _, seq_length] = self.both.dims();
        let values: Vec<f64> = self.both.to_data().iter::<f64>().collect();
        let rows = (0..batch_size).map(|row| {
            let [starts, ends] = [2 * row, 2 * row + 1]
                .map(|line| &values[line * seq_length..(line + 1) * seq_length]);
            let hidden = self.hidden_keys.as_ref().map(|rows| &rows[row]);
            let is_text = |position: &usize| hidden.is_none_or(|hidden| !hidden[*position]);
            let mut spans: Vec<AnswerSpan> = (0..seq_length)
                .filter(is_text)
                .flat_map(|start| {
                    let last = seq_length.min(start.saturating_add(max_length));
                    (start..last).filter(is_text).map(move |end| AnswerSpan {
                        start,
                        end,
                        score: starts[start] + ends[end],
                    })
                })
                .collect();
            // Stable: the spans are in the order of their positions.
            spans.sort_by(|a, b| b.score.total_cmp(&a.score));
            spans.truncate(n_best);
            spans
        });
        rows.collect()
    }
}

impl LossModel for SpanAnswer {
    /// The mean of the cross-entropies of beginning and end. The batch's targets are `[batch_size, 2]`: the positions of
    /// the first and the last token of the answer, or twice [`IGNORED_TARGET`](emberlm_core::IGNORED_TARGET).
    ///
    /// # Panics
    ///
    /// If the targets have another shape, the batch has a source, or labels are smoothed over hidden positions.
    fn loss(&self, batch: TokenBatch, config: &CrossEntropyConfig) -> ModelLoss {
        assert!(
            batch.source.is_none(),
            "source: a model that finds spans reads its inputs alone"
        );
        let [batch_size, n_targets] = batch.targets.dims();
        assert_eq!(
            n_targets, 2,
            "targets: a span has a beginning and an end, got {n_targets}"
        );
        let StackOutput { hidden, routing } = self.encoder.read(&batch);
        let scores = self.scores_of(hidden, &batch.data);
        assert!(
            config.label_smoothing == 0.0 || scores.hidden_keys.is_none(),
            "label_smoothing: hidden positions must have no probability"
        );
        let [_, _, seq_length] = scores.both.dims();
        let n_rows = 2 * batch_size;
        let both = scores.both.reshape([n_rows, seq_length]);
        let targets = batch.targets.reshape([n_rows]);
        ModelLoss {
            cross_entropy: cross_entropy(config, both, targets, None),
            routing,
        }
    }

    fn n_routed_layers(&self) -> usize {
        self.encoder.n_routed_layers()
    }

    fn after_step(self, routing: &[(usize, RoutingStatistics)]) -> Self {
        Self {
            encoder: self.encoder.after_step(routing),
            ..self
        }
    }
}
