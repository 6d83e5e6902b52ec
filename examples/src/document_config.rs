//! The configuration of a comparison of attention patterns on long inputs.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use burn::{module::Param, tensor::Device};
use clap::ValueEnum;
use emberlm::{
    core::{NormPlacement, RotaryLayout, XavierInit},
    models::{
        DecoderConfig, EncoderConfig, PositionsConfig, SequenceClassifier, SequenceClassifierConfig,
    },
    training::{Fingerprint, TrainingConfig},
};
use serde::{Deserialize, Serialize};

use crate::{
    CaseError, ConfigError, DocumentPattern, N_NGRAMS, PatternSizes,
    run_config::{parse, read, require_equal, require_same, write_json},
};

/// What a model does with a long input, as an option says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TaskKind {
    /// A decoder says the next byte
    LanguageModel,
    /// An encoder names the novel that the end of a text is of, which is another one than that of the rest, at the first
    /// position
    Novel,
}

/// What a model does with a long input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DocumentTask {
    /// A decoder says the next byte.
    LanguageModel,
    /// An encoder names the novel of the end, at the first position.
    Novel {
        /// Bytes of the end.
        tail: usize,
        /// Held-out cases that the accuracy is measured on.
        n_cases: usize,
    },
}

/// The sizes of the models of all rows.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct DocumentModel {
    /// Number of blocks.
    pub n_layers: usize,
    /// Width.
    pub d_model: usize,
    /// Number of heads.
    pub n_heads: usize,
}

/// Everything that a table, or a row of it, needs to be repeated or continued; `config.json` in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DocumentConfig {
    /// The task.
    pub task: DocumentTask,
    /// The pattern, in the folder of a row.
    pub pattern: Option<DocumentPattern>,
    /// The sizes of the model.
    pub model: DocumentModel,
    /// How it is trained.
    pub training: TrainingConfig,
    /// What the text was given as.
    pub sources: Vec<PathBuf>,
    /// Its documents, and their checksums, so that a continued run sees the same.
    pub documents: Vec<Fingerprint>,
}

/// What the command line says about the configuration.
#[derive(Debug, Clone, Default)]
pub struct DocumentOverrides {
    /// The task.
    pub task: Option<TaskKind>,
    /// Number of steps.
    pub steps: Option<u64>,
    /// Sequences in a step.
    pub batch_size: Option<usize>,
    /// Bytes of a sequence.
    pub seq_length: Option<usize>,
    /// Number of blocks.
    pub layers: Option<usize>,
    /// Width of the model.
    pub width: Option<usize>,
    /// Number of heads.
    pub heads: Option<usize>,
    /// Bytes of the end.
    pub tail: Option<usize>,
    /// Held-out cases.
    pub cases: Option<usize>,
    /// Learning rate after the warm-up.
    pub learning_rate: Option<f64>,
    /// Seed of initialisation and batches.
    pub seed: Option<u64>,
    /// Steps between checkpoints.
    pub checkpoint_every: Option<u64>,
}

const BYTES: usize = 256;

/// Biases of queries and keys with which a head of 32 gives half of its weight to the 512 nearest of 8,192 tokens.
const NEARNESS: f64 = std::f64::consts::SQRT_2;

impl TaskKind {
    /// The task, the number of heads, and a plan that a table takes less than an hour for on two CPU cores.
    fn defaults(self) -> (DocumentTask, usize, TrainingConfig) {
        match self {
            Self::LanguageModel => (
                DocumentTask::LanguageModel,
                4,
                TrainingConfig::new(150, 2, 8192)
                    .with_validate_every(25)
                    .with_checkpoint_every(25)
                    .with_validation_windows(4),
            ),
            Self::Novel => (
                DocumentTask::Novel {
                    tail: 512,
                    n_cases: 600,
                },
                2,
                TrainingConfig::new(300, 4, 8192)
                    .with_learning_rate(4e-3)
                    .with_validate_every(50)
                    .with_checkpoint_every(25)
                    .with_validation_windows(60),
            ),
        }
    }
}

impl fmt::Display for DocumentTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LanguageModel => "language-model",
            Self::Novel { .. } => "novel",
        })
    }
}

impl DocumentTask {
    fn kind(&self) -> TaskKind {
        match self {
            Self::LanguageModel => TaskKind::LanguageModel,
            Self::Novel { .. } => TaskKind::Novel,
        }
    }
}

/// Options that are for the other task, or that are missing.
#[derive(Debug, thiserror::Error)]
pub enum TaskError {
    /// A new table needs a task.
    #[error("--task language-model or --task novel: say which")]
    Missing,
    /// Cases belong to one task.
    #[error("{option} is for --task novel: leave it away")]
    NotOfTask {
        /// Which option.
        option: &'static str,
    },
    /// The cases are impossible.
    #[error(transparent)]
    Cases(#[from] CaseError),
    /// The rest is.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl DocumentOverrides {
    /// The configuration of a new table.
    ///
    /// # Errors
    ///
    /// No task, an option of the other one, or fields that do not fit together.
    pub fn resolve(
        &self,
        sources: Vec<PathBuf>,
        documents: Vec<Fingerprint>,
    ) -> Result<DocumentConfig, TaskError> {
        let (task, n_heads, training) = self.task.ok_or(TaskError::Missing)?.defaults();
        let config = DocumentConfig {
            task,
            pattern: None,
            model: DocumentModel {
                n_layers: 2,
                d_model: 64,
                n_heads,
            },
            training,
            sources,
            documents,
        };
        let config = self.over(&config)?;
        config.validate()?;
        Ok(config)
    }

    /// The configuration with which a table is continued: its own, but for the number of steps and the time between
    /// checkpoints.
    ///
    /// # Errors
    ///
    /// Options that contradict the table's.
    pub fn resume(&self, table: &DocumentConfig) -> Result<DocumentConfig, TaskError> {
        if let Some(kind) = self.task
            && kind != table.task.kind()
        {
            let (asked, ..) = kind.defaults();
            require_equal("task", table.task.to_string(), asked.to_string())?;
        }
        let asked = self.over(table)?;
        let mut resumed = table.clone();
        resumed.training.steps = asked.training.steps;
        resumed.training.checkpoint_every = asked.training.checkpoint_every;
        require_same("model", &resumed.model, &asked.model)?;
        require_same("training", &resumed.training, &asked.training)?;
        if let (
            DocumentTask::Novel { tail, n_cases },
            DocumentTask::Novel {
                tail: asked_tail,
                n_cases: asked_cases,
            },
        ) = (resumed.task, asked.task)
        {
            require_equal("tail", tail.to_string(), asked_tail.to_string())?;
            require_equal("cases", n_cases.to_string(), asked_cases.to_string())?;
        }
        resumed.validate()?;
        Ok(resumed)
    }

    /// Options over a configuration.
    fn over(&self, config: &DocumentConfig) -> Result<DocumentConfig, TaskError> {
        let mut config = config.clone();
        match &mut config.task {
            DocumentTask::Novel { tail, n_cases } => {
                *tail = self.tail.unwrap_or(*tail);
                *n_cases = self.cases.unwrap_or(*n_cases);
            }
            DocumentTask::LanguageModel => {
                let options = [("--tail", self.tail), ("--cases", self.cases)];
                if let Some((option, _)) = options.iter().find(|(_, value)| value.is_some()) {
                    return Err(TaskError::NotOfTask { option });
                }
            }
        }
        let DocumentModel {
            n_layers,
            d_model,
            n_heads,
        } = &mut config.model;
        *n_layers = self.layers.unwrap_or(*n_layers);
        *d_model = self.width.unwrap_or(*d_model);
        *n_heads = self.heads.unwrap_or(*n_heads);
        let training = &mut config.training;
        training.steps = self.steps.unwrap_or(training.steps);
        training.batch_size = self.batch_size.unwrap_or(training.batch_size);
        training.seq_length = self.seq_length.unwrap_or(training.seq_length);
        training.learning_rate = self.learning_rate.unwrap_or(training.learning_rate);
        training.seed = self.seed.unwrap_or(training.seed);
        training.checkpoint_every = self.checkpoint_every.unwrap_or(training.checkpoint_every);
        Ok(config)
    }
}

impl DocumentConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or is no valid configuration of this kind.
    pub fn read(path: &Path) -> Result<Self, TaskError> {
        let config: Self = parse(path, &read(path)?)?;
        config.validate()?;
        Ok(config)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ConfigError> {
        write_json(path, self)
    }

    /// That of a row.
    pub fn of_row(&self, pattern: DocumentPattern) -> Self {
        Self {
            pattern: Some(pattern),
            ..self.clone()
        }
    }

    /// The decoder of a row: rotary positions, so that it knows no longest sequence.
    pub fn decoder(&self, pattern: DocumentPattern) -> DecoderConfig {
        let DocumentModel {
            n_layers,
            d_model,
            n_heads,
        } = self.model;
        DecoderConfig::new(BYTES, n_layers, d_model, n_heads)
            .with_positions(PositionsConfig::Rotary {
                theta: 1e4,
                layout: RotaryLayout::HalfSplit,
            })
            .with_layers(Some(pattern.layers(&self.sizes(), true)))
            .with_seed(self.training.seed)
    }

    /// The encoder of a row, with a head that reads the first position.
    pub fn classifier(
        &self,
        pattern: DocumentPattern,
        n_classes: usize,
    ) -> SequenceClassifierConfig {
        let DocumentModel {
            n_layers,
            d_model,
            n_heads,
        } = self.model;
        let encoder = EncoderConfig::new(N_NGRAMS, n_layers, d_model, n_heads)
            .with_positions(PositionsConfig::Rotary {
                theta: 1e5,
                layout: RotaryLayout::HalfSplit,
            })
            .with_n_types(0)
            .with_d_ff(Some(d_model))
            .with_norm_placement(NormPlacement::Pre)
            .with_layers(Some(pattern.layers(&self.sizes(), false)))
            .with_seed(self.training.seed);
        SequenceClassifierConfig::new(encoder, n_classes)
    }

    /// The model of a row, which begins otherwise than a language model, so that it learns in few steps.
    ///
    /// At this width GPT-2's N(0, 0.02) is so small that attention says nothing for long: the weights are Xavier's. The
    /// n-grams begin near zero: what is read of them is normed, so small ones turn quickly. In the first block the biases of
    /// queries and keys begin at the same value instead of zero. By the rotation the scores then fall with the distance, and
    /// a token begins with what is near it, also where it sees all.
    pub fn new_classifier(
        &self,
        pattern: DocumentPattern,
        n_classes: usize,
        device: &Device,
    ) -> SequenceClassifier {
        let model = self.classifier(pattern, n_classes).init(device);
        let mut model = XavierInit::new(self.training.seed).apply(model);
        let table = &mut model.encoder.embedding.tokens.weight;
        let small = table.val() / self.model.d_model as f64;
        *table = Param::from_tensor(small.detach());
        let [query, key, ..] = model.encoder.stack.blocks[0].mixer.projections_mut();
        for bias in [&mut query.bias, &mut key.bias].into_iter().flatten() {
            *bias = Param::from_tensor((bias.val().ones_like() * NEARNESS).detach());
        }
        model
    }

    fn sizes(&self) -> PatternSizes {
        PatternSizes {
            n_layers: self.model.n_layers,
            d_model: self.model.d_model,
            n_heads: self.model.n_heads,
            seq_length: self.training.seq_length,
        }
    }

    fn validate(&self) -> Result<(), TaskError> {
        let invalid = |section| move |source| ConfigError::Invalid { section, source };
        (self.training.validate()).map_err(invalid("training"))?;
        // The patterns are the program's own: the sizes that are bad for one are bad for all.
        let pattern = self.pattern.unwrap_or(DocumentPattern::Full);
        let model = match self.task {
            DocumentTask::LanguageModel => self.decoder(pattern).validate(),
            DocumentTask::Novel { n_cases: 0, .. } => return Err(CaseError::NoCases.into()),
            DocumentTask::Novel { .. } => self.classifier(pattern, 2).validate(),
        };
        Ok(model.map_err(invalid("model"))?)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Tensor;

    use super::*;
    use crate::choose_device;

    #[test]
    fn a_classifier_begins_small_and_near() {
        let (_, device) = choose_device(None).unwrap();
        let overrides = DocumentOverrides {
            task: Some(TaskKind::Novel),
            layers: Some(2),
            width: Some(16),
            ..DocumentOverrides::default()
        };
        let config = overrides.resolve(Vec::new(), Vec::new()).unwrap();
        assert_eq!(config.model.n_heads, 2);
        let values = |tensor: &Tensor<1>| -> Vec<f64> { tensor.to_data().iter().collect() };
        for pattern in DocumentPattern::value_variants() {
            let model = config.new_classifier(*pattern, 6, &device.clone().autodiff());
            let encoder = &model.encoder;
            let table = encoder.embedding.tokens.weight.val();
            assert_eq!(table.dims(), [N_NGRAMS, 16]);
            // Xavier's 1 / 4, over 16.
            let std = table.powi_scalar(2).mean().sqrt().into_scalar::<f64>();
            assert!((std * 64.0 - 1.0).abs() < 0.02, "{std}");
            for (block, expected) in encoder.stack.blocks.iter().zip([NEARNESS, 0.0]) {
                let [query, key, value, output] = block.mixer.projections();
                for (projection, expected) in [
                    (query, expected),
                    (key, expected),
                    (value, 0.0),
                    (output, 0.0),
                ] {
                    let bias = projection.bias.as_ref().expect("they have biases").val();
                    let near = |x: &f64| (x - expected).abs() < 1e-6;
                    assert!(values(&bias).iter().all(near));
                }
            }
        }
    }
}
