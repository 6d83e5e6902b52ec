//! The configuration of a run: a preset, a file over it, options over both.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use emberlm::{
    core::{InvalidConfig, replace_file},
    models::{DecoderConfig, PositionsConfig},
    text::{TextError, Tokenizer, TokenizerChoice},
    training::{Fingerprint, TrainingConfig},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{Preset, preset::N_BYTE_VALUES};

/// Everything a run needs to be repeated or continued; `config.json` in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunConfig {
    /// The model.
    pub model: DecoderConfig,
    /// How it is trained.
    pub training: TrainingConfig,
    /// The files and folders the text comes from.
    pub sources: Vec<PathBuf>,
    /// The documents and their checksums, so that a continued run sees the same text.
    pub documents: Vec<Fingerprint>,
    /// The tokenizer in the run's folder; nothing if the tokens are bytes.
    pub tokenizer: Option<TokenizerRecord>,
}

/// What the tokenizer of a run was, so that a continued run has the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizerRecord {
    /// What was asked for: `bpe:N` or a file.
    pub choice: String,
    /// Number of its tokens.
    pub vocab_size: usize,
    /// CRC-32 of its content.
    pub crc32: u32,
}

impl TokenizerRecord {
    /// That of a tokenizer; nothing if its tokens are bytes.
    pub fn of(tokenizer: &Tokenizer, choice: &TokenizerChoice) -> Option<Self> {
        (!tokenizer.is_bytes()).then(|| Self {
            choice: choice.to_string(),
            vocab_size: tokenizer.vocab_size(),
            crc32: tokenizer.crc32(),
        })
    }

    /// The tokenizer of the run in the folder `run`.
    ///
    /// # Errors
    ///
    /// A file that is missing, no tokenizer, or not the one that the run began with.
    pub fn load(&self, run: &Path) -> Result<Tokenizer, ConfigError> {
        let path = run.join(Tokenizer::FILE_NAME);
        let tokenizer = Tokenizer::load(&path)?;
        if tokenizer.crc32() != self.crc32 {
            return Err(ConfigError::Tokenizer { path });
        }
        Ok(tokenizer)
    }

    /// Checks whether a tokenizer that was asked for is that of the run, which has none (`None`) if its tokens are bytes.
    ///
    /// # Errors
    ///
    /// Another choice, or a file that is missing or no tokenizer.
    pub fn check(of_run: Option<&Self>, asked: &TokenizerChoice) -> Result<(), ConfigError> {
        let same = match (of_run, asked) {
            (None, TokenizerChoice::Bytes) => true,
            (record, TokenizerChoice::File(path)) => {
                let record = record.map(|record| record.crc32);
                let tokenizer = Tokenizer::load(path)?;
                record == (!tokenizer.is_bytes()).then(|| tokenizer.crc32())
            }
            (record, asked) => record.is_some_and(|record| record.choice == asked.to_string()),
        };
        if same {
            return Ok(());
        }
        Err(ConfigError::Differs {
            field: "tokenizer".to_owned(),
            of_run: of_run.map_or("bytes".to_owned(), |record| record.choice.clone()),
            asked: asked.to_string(),
        })
    }
}

/// What the command line says about the configuration.
#[derive(Debug, Clone, Default)]
pub struct Overrides {
    /// A named model and plan.
    pub preset: Option<Preset>,
    /// A JSON file with fields of `model` and `training`.
    pub file: Option<PathBuf>,
    /// Number of steps.
    pub steps: Option<u64>,
    /// Sequences a step.
    pub batch_size: Option<usize>,
    /// Tokens a sequence; learned positions follow it.
    pub seq_length: Option<usize>,
    /// Seed of initialisation, batches and dropout.
    pub seed: Option<u64>,
    /// Steps between checkpoints.
    pub checkpoint_every: Option<u64>,
}

/// What is wrong with a configuration.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// There is nothing in the file.
    #[error("{path} is empty: write a JSON object such as {{\"model\": {{\"n_layers\": 6}}}}")]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// The file is not JSON, or a field has the wrong type.
    #[error("{path}: {field}: {message}")]
    Field {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// What is wrong with it.
        message: String,
    },
    /// There is no such field.
    #[error("{path}: there is no field {field}; the fields here are {}", known.join(", "))]
    UnknownField {
        /// Which file.
        path: PathBuf,
        /// Which field.
        field: String,
        /// The fields there are.
        known: Vec<String>,
    },
    /// The fields do not fit together.
    #[error("{section}.{source}")]
    Invalid {
        /// `model` or `training`.
        section: &'static str,
        /// What does not fit.
        source: InvalidConfig,
    },
    /// The model does not know all tokens of the tokenizer.
    #[error(
        "model.vocab_size is {vocab_size}, but the tokenizer has {n_tokens} tokens: make it {n_tokens} or more, or leave it out"
    )]
    Vocabulary {
        /// Number of tokens the model knows.
        vocab_size: usize,
        /// Number of tokens of the tokenizer.
        n_tokens: usize,
    },
    /// The tokenizer in the run's folder is another.
    #[error("{path} is not the tokenizer that the run began with: put that back")]
    Tokenizer {
        /// Its file.
        path: PathBuf,
    },
    /// The tokenizer cannot be read.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The sequences are longer than the model.
    #[error(
        "training.seq_length is {seq_length}, but model.positions has {max_seq_length}: raise max_seq_length"
    )]
    Positions {
        /// Tokens a sequence.
        seq_length: usize,
        /// Learned positions.
        max_seq_length: usize,
    },
    /// The run that is to be continued has another configuration.
    #[error(
        "{field} is {of_run} in the run to be resumed, but {asked} was asked for: leave the option away, or begin a new run"
    )]
    Differs {
        /// Which field.
        field: String,
        /// The run's value.
        of_run: String,
        /// The value asked for.
        asked: String,
    },
}

impl Overrides {
    /// The model and the plan for a new run whose tokenizer has `n_tokens` tokens. The model knows so many, unless the
    /// file says more.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or a field that is unknown, of the wrong type or invalid.
    pub fn resolve(&self, n_tokens: usize) -> Result<(DecoderConfig, TrainingConfig), ConfigError> {
        let (mut model, mut training) = self.preset.unwrap_or(Preset::Tiny).resolve();
        model.vocab_size = n_tokens;
        if let Some(seq_length) = self.seq_length {
            model.positions = PositionsConfig::Learned {
                max_seq_length: seq_length,
            };
        }
        if let Some(path) = &self.file {
            (model, training) = overlay(path, &model, &training)?;
        }
        self.apply(&mut model, &mut training);
        validate(&model, &training, n_tokens)?;
        Ok((model, training))
    }

    /// The configuration with which a run is continued: the run's own, but for the number of steps and the time
    /// between checkpoints.
    ///
    /// # Errors
    ///
    /// Options that contradict the run.
    pub fn resume(&self, run: &RunConfig) -> Result<RunConfig, ConfigError> {
        let (mut model, mut training) = match self.preset {
            Some(preset) => {
                let (mut model, mut training) = preset.resolve();
                // A preset's number of steps is a proposal, not a demand, and it knows of no tokenizer.
                training.steps = run.training.steps;
                model.vocab_size = run.model.vocab_size;
                (model, training)
            }
            None => (run.model.clone(), run.training.clone()),
        };
        if let Some(path) = &self.file {
            (model, training) = overlay(path, &model, &training)?;
        }
        self.apply(&mut model, &mut training);
        let mut resumed = run.clone();
        if let Some(steps) = self.steps {
            resumed.training.steps = steps;
        }
        if let Some(every) = self.checkpoint_every {
            resumed.training.checkpoint_every = every;
        }
        require_same("model", &resumed.model, &model)?;
        require_same("training", &resumed.training, &training)?;
        validate(&resumed.model, &resumed.training, resumed.n_tokens())?;
        Ok(resumed)
    }

    fn apply(&self, model: &mut DecoderConfig, training: &mut TrainingConfig) {
        training.steps = self.steps.unwrap_or(training.steps);
        training.batch_size = self.batch_size.unwrap_or(training.batch_size);
        training.seq_length = self.seq_length.unwrap_or(training.seq_length);
        training.checkpoint_every = self.checkpoint_every.unwrap_or(training.checkpoint_every);
        training.seed = self.seed.unwrap_or(training.seed);
        model.seed = self.seed.unwrap_or(model.seed);
    }
}

impl RunConfig {
    /// Reads a run's `config.json`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or is no valid configuration.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let config: Self = parse(path, &read(path)?)?;
        validate(&config.model, &config.training, config.n_tokens())?;
        Ok(config)
    }

    /// The tokenizer of the run in the folder `run`.
    ///
    /// # Errors
    ///
    /// A file that is missing, no tokenizer, or not the one that the run began with.
    pub fn load_tokenizer(&self, run: &Path) -> Result<Tokenizer, ConfigError> {
        let Some(record) = &self.tokenizer else {
            return Ok(Tokenizer::bytes());
        };
        record.load(run)
    }

    /// Checks whether a tokenizer that was asked for is that of the run.
    ///
    /// # Errors
    ///
    /// Another choice, or a file that is missing or no tokenizer.
    pub fn check_tokenizer(&self, asked: &TokenizerChoice) -> Result<(), ConfigError> {
        TokenizerRecord::check(self.tokenizer.as_ref(), asked)
    }

    fn n_tokens(&self) -> usize {
        let record = self.tokenizer.as_ref();
        record.map_or(N_BYTE_VALUES, |record| record.vocab_size)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    ///
    /// A file that cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ConfigError> {
        write_json(path, self)
    }
}

/// Writes plain data as JSON, whole or not at all.
///
/// # Errors
///
/// A file that cannot be written.
pub fn write_json(path: &Path, content: &impl Serialize) -> Result<(), ConfigError> {
    let mut text = serde_json::to_string_pretty(content).expect("plain data");
    text.push('\n');
    replace_file(path, text.as_bytes()).map_err(|source| ConfigError::Io {
        path: path.to_owned(),
        source,
    })
}

pub(crate) fn read(path: &Path) -> Result<Value, ConfigError> {
    let text = fs::read_to_string(path).map_err(|source| ConfigError::Io {
        path: path.to_owned(),
        source,
    })?;
    if text.trim().is_empty() {
        return Err(ConfigError::Empty {
            path: path.to_owned(),
        });
    }
    serde_json::from_str(&text).map_err(|error| ConfigError::Field {
        path: path.to_owned(),
        field: "not JSON".to_owned(),
        message: error.to_string(),
    })
}

pub(crate) fn parse<T: DeserializeOwned>(path: &Path, value: &Value) -> Result<T, ConfigError> {
    serde_path_to_error::deserialize(value).map_err(|error| ConfigError::Field {
        path: path.to_owned(),
        field: error.path().to_string(),
        message: error.inner().to_string(),
    })
}

pub(crate) fn json<T: Serialize>(config: &T) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        _ => unreachable!("a configuration is a struct of plain data"),
    }
}

/// Checks whether a section of a configuration is that of the run.
///
/// # Errors
///
/// The first field that differs.
pub(crate) fn require_same<T: Serialize>(
    section: &str,
    of_run: &T,
    asked: &T,
) -> Result<(), ConfigError> {
    let asked = json(asked);
    for (field, of_run) in json(of_run) {
        if of_run != asked[&field] {
            return Err(ConfigError::Differs {
                field: format!("{section}.{field}"),
                of_run: of_run.to_string(),
                asked: asked[&field].to_string(),
            });
        }
    }
    Ok(())
}

/// Puts the fields of a file over a model and a plan.
pub(crate) fn overlay<M: Serialize + DeserializeOwned>(
    path: &Path,
    model: &M,
    training: &TrainingConfig,
) -> Result<(M, TrainingConfig), ConfigError> {
    #[derive(Deserialize)]
    struct Sections<M> {
        model: M,
        training: TrainingConfig,
    }
    let mut sections = Map::from_iter([
        ("model".to_owned(), Value::Object(json(model))),
        ("training".to_owned(), Value::Object(json(training))),
    ]);
    let wrong_type = |field: &str| ConfigError::Field {
        path: path.to_owned(),
        field: field.to_owned(),
        message: "expected an object".to_owned(),
    };
    let known = |field: String, fields: &Map<String, Value>| ConfigError::UnknownField {
        path: path.to_owned(),
        field,
        known: fields.keys().cloned().collect(),
    };
    let Value::Object(given) = read(path)? else {
        return Err(wrong_type("the file"));
    };
    for (section, fields) in given {
        if !sections.contains_key(&section) {
            return Err(known(section, &sections));
        }
        let (Value::Object(fields), Some(Value::Object(base))) =
            (fields, sections.get_mut(&section))
        else {
            return Err(wrong_type(&section));
        };
        for (field, value) in fields {
            if !base.contains_key(&field) {
                return Err(known(format!("{section}.{field}"), base));
            }
            base.insert(field, value);
        }
    }
    let Sections { model, training } = parse(path, &Value::Object(sections))?;
    Ok((model, training))
}

fn validate(
    model: &DecoderConfig,
    training: &TrainingConfig,
    n_tokens: usize,
) -> Result<(), ConfigError> {
    let invalid = |section| move |source| ConfigError::Invalid { section, source };
    model.validate().map_err(invalid("model"))?;
    training.validate().map_err(invalid("training"))?;
    if model.vocab_size < n_tokens {
        return Err(ConfigError::Vocabulary {
            vocab_size: model.vocab_size,
            n_tokens,
        });
    }
    match model.max_seq_length() {
        Some(max_seq_length) if training.seq_length > max_seq_length => {
            Err(ConfigError::Positions {
                seq_length: training.seq_length,
                max_seq_length,
            })
        }
        _ => Ok(()),
    }
}
