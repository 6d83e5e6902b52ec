//! Classification of sequences: an encoder, and a head that reads the hidden state of one position.

use burn::{
    config::Config,
    module::Module,
    nn::{Linear, LinearConfig},
    tensor::{Device, Int, Tensor, s},
};
use emberlm_core::{
    BatchData, CrossEntropyConfig, Gpt2Init, InvalidConfig, LossModel, ModelLoss, RandomKey,
    RoutingStatistics, TokenBatch, assert_valid, dropout,
    operators::{cross_entropy, project},
};

use crate::{Encoder, EncoderConfig, StackOutput, encoder::with_targets};

/// Configuration of a [`SequenceClassifier`].
#[derive(Config, Debug)]
pub struct SequenceClassifierConfig {
    /// The encoder. Its own heads are left out: nothing would train them.
    pub encoder: EncoderConfig,
    /// Number of classes.
    pub n_classes: usize,
    /// The position that is read. Default: 0.
    #[config(default = 0)]
    pub position: usize,
    /// Dropout before each projection of the head. Default: the encoder's.
    pub head_dropout: Option<f64>,
}

impl SequenceClassifierConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// Those of the encoder, no classes, a position beyond the learned ones, or a rate outside `[0, 1)`.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.encoder.validate()?;
        InvalidConfig::require_positive(&[("n_classes", self.n_classes)])?;
        InvalidConfig::require_rate("head_dropout", self.dropout())?;
        let longest = self.encoder.positions.max_seq_length();
        match longest.is_some_and(|longest| self.position >= longest) {
            true => Err(InvalidConfig::Range {
                field: "position",
                range: "one of the encoder's positions",
                value: self.position as f64,
            }),
            false => Ok(()),
        }
    }

    /// Makes the model. Its encoder has the values that it has by itself; the head is drawn from N(0, 0.02).
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> SequenceClassifier {
        assert_valid(self.validate());
        let encoder = self.encoder.clone();
        let (n_layers, d_model, seed) = (encoder.n_layers, encoder.d_model, encoder.seed);
        let head = ClassificationHead {
            dense: LinearConfig::new(d_model, d_model).init(device),
            classes: LinearConfig::new(d_model, self.n_classes).init(device),
            dropout: self.dropout(),
        };
        SequenceClassifier {
            encoder: encoder
                .with_masked_head(false)
                .with_pooler(false)
                .init(device),
            head: Gpt2Init::new(n_layers, seed).apply(head),
            position: self.position,
        }
    }

    fn dropout(&self) -> f64 {
        self.head_dropout.unwrap_or(self.encoder.dropout)
    }
}

/// An encoder that says of which class a sequence is: `classes(drop(tanh(dense(drop(h_p)))))` of the hidden state `h_p` of
/// one position `p`.
///
/// Liu et al. 2019 (RoBERTa), <https://arxiv.org/abs/1907.11692>, and Beltagy et al. 2020 (Longformer),
/// <https://arxiv.org/abs/2004.05150>, section 5, in whose code the head has these layers. In sparse attention make the
/// position a global token, so that it sees all.
///
/// ```
/// use burn::tensor::{Device, Int, Tensor};
/// use emberlm_core::BatchData;
/// use emberlm_models::{EncoderConfig, SequenceClassifierConfig};
///
/// let device = Device::flex();
/// let model = SequenceClassifierConfig::new(EncoderConfig::new(256, 2, 32, 4), 3).init(&device);
/// let tokens = Tensor::<2, Int>::zeros([5, 7], &device);
/// assert_eq!(model.scores(tokens, None, BatchData::new(), None).dims(), [5, 3]);
/// ```
#[derive(Module, Debug)]
pub struct SequenceClassifier {
    /// Reads the sequence.
    pub encoder: Encoder,
    /// Reads the hidden state of the position.
    pub head: ClassificationHead,
    position: usize,
}

/// `classes(drop(tanh(dense(drop(h)))))`.
#[derive(Module, Debug)]
pub struct ClassificationHead {
    /// `[d_model, d_model]`
    pub dense: Linear,
    /// `[d_model, n_classes]`
    pub classes: Linear,
    dropout: f64,
}

// The head's part of a sequence's random key, after those of embedding and stack.
const HEAD: u64 = 2;

impl SequenceClassifier {
    /// Scores of the classes, not normalised.
    ///
    /// # Shapes
    ///
    /// - `tokens`, `types`: `[batch_size, seq_length]`; without `types` all tokens are of the first type
    /// - output: `[batch_size, n_classes]`
    ///
    /// Padding and documents of the rows come in `data`; the position that is read is no padding.
    ///
    /// # Panics
    ///
    /// If the sequence ends before the position that is read, or is longer than the learned positions.
    pub fn scores(
        &self,
        tokens: Tensor<2, Int>,
        types: Option<Tensor<2, Int>>,
        data: BatchData,
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        let hidden = (self.encoder).hidden_states(tokens, types, data, dropout_key);
        let read = self.read(hidden);
        self.head.forward(read, head_key(dropout_key))
    }

    /// The hidden state of the position.
    fn read(&self, hidden: Tensor<3>) -> Tensor<2> {
        let ([_, seq_length, _], position) = (hidden.dims(), self.position);
        assert!(
            position < seq_length,
            "seq_length: position {position} is read, the sequence has {seq_length}"
        );
        let read = hidden.slice(s![.., position..position + 1, ..]);
        read.squeeze_dim(1)
    }
}

fn head_key(dropout_key: Option<RandomKey>) -> Option<RandomKey> {
    dropout_key.map(|key| key.fold(HEAD))
}

impl ClassificationHead {
    /// Scores of the classes.
    ///
    /// # Shapes
    ///
    /// - `hidden`: `[batch_size, d_model]`
    /// - output: `[batch_size, n_classes]`
    ///
    /// # Panics
    ///
    /// If the width is another.
    pub fn forward(&self, hidden: Tensor<2>, dropout_key: Option<RandomKey>) -> Tensor<2> {
        let key = |part| dropout_key.map(|key| key.fold(part));
        let hidden = dropout(hidden, self.dropout, key(0));
        let hidden = project(&self.dense, hidden).tanh();
        project(&self.classes, dropout(hidden, self.dropout, key(1)))
    }
}

impl LossModel for SequenceClassifier {
    /// The cross-entropy of the classes. The batch's targets are `[batch_size, 1]`, the class of each sequence; or
    /// `[batch_size, seq_length]`, and the head reads every position that has a target, instead of its own: so a model can
    /// learn of parts of a sequence besides.
    ///
    /// # Panics
    ///
    /// If the targets have another shape, or the batch has a source.
    fn loss(&self, batch: TokenBatch, config: &CrossEntropyConfig) -> ModelLoss {
        assert!(
            batch.source.is_none(),
            "source: a classifier reads its inputs alone"
        );
        let ([_, seq_length], [_, n_targets]) = (batch.inputs.dims(), batch.targets.dims());
        assert!(
            n_targets == 1 || n_targets == seq_length,
            "targets: a sequence of {seq_length} has 1 class or {seq_length}, got {n_targets}"
        );
        let key = batch.dropout_key;
        let StackOutput { hidden, routing } = self.encoder.read(&batch);
        let (hidden, targets) = match n_targets {
            1 => (self.read(hidden), batch.targets.squeeze_dim(1)),
            _ => with_targets(hidden, batch.targets),
        };
        let scores = self.head.forward(hidden, head_key(key));
        ModelLoss {
            cross_entropy: cross_entropy(config, scores, targets, None),
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
