//! The configuration of a run that learns to translate.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use emberlm::{
    core::RandomKey,
    models::EncoderDecoderConfig,
    text::{PairCorpus, PairError, PairSplit},
    training::{Fingerprint, ScheduleKind, TrainingConfig},
};
use serde::{Deserialize, Serialize};

use crate::{
    ConfigError, TokenizerRecord,
    run_config::{overlay, parse, read, require_same, write_json},
};

/// Everything such a run needs to be repeated or continued; `config.json` in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TranslationConfig {
    /// The model.
    pub model: EncoderDecoderConfig,
    /// How it is trained. A step has at most `batch_size` times `seq_length` target tokens, padding included.
    pub training: TrainingConfig,
    /// The file of the pairs, and its checksum, so that a continued run sees the same.
    pub pairs: Fingerprint,
    /// Which of them are held out.
    pub hold_out: HoldOut,
    /// The tokenizer in the run's folder.
    pub tokenizer: TokenizerRecord,
}

/// Which pairs are held out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldOut {
    /// Single pairs or whole books.
    pub kind: HoldOutKind,
    /// How many pairs; of books at least so many.
    pub n_pairs: usize,
}

/// What is held out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum HoldOutKind {
    /// Pairs from everywhere
    Random,
    /// Whole books, of which nothing is trained on
    Books,
}

// One seed for all runs: their scores are of the same pairs, whatever the seed of their weights.
const SEED: u64 = 0;

impl HoldOut {
    /// The default number of pairs.
    pub fn new(kind: HoldOutKind) -> Self {
        let n_pairs = match kind {
            HoldOutKind::Random => 500,
            HoldOutKind::Books => 1000,
        };
        Self { kind, n_pairs }
    }

    /// Splits a corpus: the same file is always split in the same way.
    ///
    /// # Errors
    ///
    /// More pairs than there are, or books of a file that names none.
    pub fn split<'a>(&self, corpus: &'a PairCorpus) -> Result<PairSplit<'a>, PairError> {
        match self.kind {
            HoldOutKind::Random => corpus.split_random(self.n_pairs, SEED),
            HoldOutKind::Books => corpus.split_books(&self.books(corpus)),
        }
    }

    /// Books in an order drawn by their names, until they have enough pairs.
    fn books<'a>(&self, corpus: &'a PairCorpus) -> Vec<&'a str> {
        let key = RandomKey::new(SEED);
        let mut books = corpus.books();
        books.sort_by_key(|book| key.fold_str(book).bits(0));
        let size = |book: &str| {
            let pairs = corpus.pairs().iter();
            pairs.filter(|pair| pair.book() == Some(book)).count()
        };
        let mut n_pairs = 0;
        books
            .into_iter()
            .take_while(|book| {
                let enough = n_pairs >= self.n_pairs;
                n_pairs += size(book);
                !enough
            })
            .collect()
    }
}

/// What the command line says about the configuration.
#[derive(Debug, Clone, Default)]
pub struct TranslationOverrides {
    /// A JSON file with fields of `model` and `training`.
    pub file: Option<PathBuf>,
    /// Number of steps.
    pub steps: Option<u64>,
    /// Steps between checkpoints.
    pub checkpoint_every: Option<u64>,
    /// Seed of initialisation, batches and dropout.
    pub seed: Option<u64>,
    /// Dropout rate.
    pub dropout: Option<f64>,
}

/// The base model and a plan for it, of tens of thousands of pairs.
fn defaults(vocab_size: usize) -> (EncoderDecoderConfig, TrainingConfig) {
    let model = EncoderDecoderConfig::new(vocab_size, 3, 3, 256, 4);
    let training = TrainingConfig::new(2560, 10, 150)
        .with_learning_rate(1e-3)
        .with_schedule(Some(ScheduleKind::InverseSquareRoot))
        .with_warmup_steps(400)
        .with_beta_2(0.98)
        .with_label_smoothing(0.1);
    (model, training)
}

impl TranslationOverrides {
    /// The model and the plan for a new run whose tokenizer has `n_tokens` tokens. The model knows so many, unless the
    /// file says more.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or a field that is unknown, of the wrong type or invalid.
    pub fn resolve(
        &self,
        n_tokens: usize,
    ) -> Result<(EncoderDecoderConfig, TrainingConfig), ConfigError> {
        let (model, training) = defaults(n_tokens);
        let (model, training) = self.over(model, training)?;
        validate(&model, &training, n_tokens)?;
        Ok((model, training))
    }

    /// The configuration with which a run is continued: the run's own, but for the number of steps and the time
    /// between checkpoints.
    ///
    /// # Errors
    ///
    /// Options that contradict the run.
    pub fn resume(&self, run: &TranslationConfig) -> Result<TranslationConfig, ConfigError> {
        let (model, training) = self.over(run.model.clone(), run.training.clone())?;
        let mut resumed = run.clone();
        if let Some(steps) = self.steps {
            resumed.training.steps = steps;
        }
        if let Some(every) = self.checkpoint_every {
            resumed.training.checkpoint_every = every;
        }
        require_same("model", &resumed.model, &model)?;
        require_same("training", &resumed.training, &training)?;
        resumed.validate()?;
        Ok(resumed)
    }

    /// The file over a model and a plan, and options over both.
    fn over(
        &self,
        mut model: EncoderDecoderConfig,
        mut training: TrainingConfig,
    ) -> Result<(EncoderDecoderConfig, TrainingConfig), ConfigError> {
        if let Some(path) = &self.file {
            (model, training) = overlay(path, &model, &training)?;
        }
        training.steps = self.steps.unwrap_or(training.steps);
        training.checkpoint_every = self.checkpoint_every.unwrap_or(training.checkpoint_every);
        training.seed = self.seed.unwrap_or(training.seed);
        model.seed = self.seed.unwrap_or(model.seed);
        model.dropout = self.dropout.unwrap_or(model.dropout);
        Ok((model, training))
    }
}

impl TranslationConfig {
    /// Reads a run's `config.json`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or is no valid configuration of a run that learns to translate.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
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

    fn validate(&self) -> Result<(), ConfigError> {
        validate(&self.model, &self.training, self.tokenizer.vocab_size)
    }
}

fn validate(
    model: &EncoderDecoderConfig,
    training: &TrainingConfig,
    n_tokens: usize,
) -> Result<(), ConfigError> {
    let invalid = |section| move |source| ConfigError::Invalid { section, source };
    model.validate().map_err(invalid("model"))?;
    training.validate().map_err(invalid("training"))?;
    let vocab_size = model
        .vocab_size
        .min(model.source_vocab_size.unwrap_or(usize::MAX));
    if vocab_size < n_tokens {
        return Err(ConfigError::Vocabulary {
            vocab_size,
            n_tokens,
        });
    }
    Ok(())
}
