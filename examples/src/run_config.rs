//! The configuration of a run: a preset, a file over it, options over both.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use emberlm::{
    core::{InvalidConfig, replace_file},
    text::{TextError, Tokenizer, TokenizerChoice},
    training::{Fingerprint, Objective, TrainingConfig},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use thiserror::Error;

use crate::{
    AttentionChoice, BalanceChoice, ModelConfig, ObjectiveKind, Preset, Vocabulary,
    model_config::{ARCHITECTURE, FieldError, parse_value},
    preset::N_BYTE_VALUES,
};

/// Everything a run needs to be repeated or continued; `config.json` in its folder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunConfig {
    /// The model.
    pub model: ModelConfig,
    /// What it is trained for; runs before there was a choice are causal.
    #[serde(default)]
    pub objective: Objective,
    /// Whether attention stays within documents.
    #[serde(default)]
    pub within_documents: bool,
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
    /// What the model is trained for; nothing means what the preset is for.
    pub objective: Option<ObjectiveKind>,
    /// Whether attention stays within documents.
    pub documents: bool,
    /// A named model and plan.
    pub preset: Option<Preset>,
    /// Which tokens a token sees.
    pub attention: Option<AttentionChoice>,
    /// How experts are kept busy.
    pub balance: Option<BalanceChoice>,
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
        /// `model`, `objective` or `training`.
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
    /// The model cannot be trained for the objective.
    #[error(
        "objective {objective} is none for the model {architecture}: leave --objective away, or take --preset {}",
        preset_name(*objective)
    )]
    Objective {
        /// What was asked for.
        objective: ObjectiveKind,
        /// What the model is.
        architecture: &'static str,
    },
    /// The tokenizer lacks a special token.
    #[error(
        "the tokenizer has no {name}, which objective {objective} needs: take one that has it, bytes, or bpe:N"
    )]
    SpecialToken {
        /// The token's name.
        name: String,
        /// What needs it.
        objective: ObjectiveKind,
    },
    /// Spans have sources and targets of their own.
    #[error(
        "--documents keeps attention within documents, which objective spans cannot: leave it away"
    )]
    Documents,
    /// A token of the objective is none of the model's.
    #[error("objective.{field} is {token}, but the model has {vocab_size} tokens: leave it out")]
    ObjectiveToken {
        /// Which field.
        field: &'static str,
        /// Its value.
        token: u32,
        /// Number of tokens the model knows.
        vocab_size: usize,
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
        /// Tokens of the longest sequence that the model reads.
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

fn preset_name(objective: ObjectiveKind) -> String {
    let value = clap::ValueEnum::to_possible_value(&objective.preset());
    value.map_or(String::new(), |value| value.get_name().to_owned())
}

/// What of a run's configuration options and files change.
#[derive(Debug, Clone)]
pub struct Sections {
    /// The model.
    pub model: ModelConfig,
    /// What it is trained for.
    pub objective: Objective,
    /// How it is trained.
    pub training: TrainingConfig,
}

impl Overrides {
    /// What the model is trained for, as options and preset say.
    ///
    /// # Errors
    ///
    /// A preset that is for another objective.
    pub fn objective(&self) -> Result<ObjectiveKind, ConfigError> {
        let asked = self.objective.or_else(|| {
            let preset = self.preset?;
            Some(preset.resolve().0.objective())
        });
        let objective = asked.unwrap_or(ObjectiveKind::Causal);
        let (model, _) = self.preset.unwrap_or(objective.preset()).resolve();
        check_objective(&model, objective)?;
        if self.documents && objective == ObjectiveKind::Spans {
            return Err(ConfigError::Documents);
        }
        Ok(objective)
    }

    /// The model and the plan for a new run with this vocabulary. The model knows as many tokens, unless the file says
    /// more.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or a field that is unknown, of the wrong type or invalid.
    pub fn resolve(&self, vocabulary: &Vocabulary) -> Result<Sections, ConfigError> {
        let objective = self.objective()?;
        let (mut model, training) = self.preset.unwrap_or(objective.preset()).resolve();
        model.set_vocab_size(vocabulary.n_tokens);
        if let Some(seq_length) = self.seq_length {
            model.set_max_seq_length(seq_length);
        }
        let mut sections = Sections {
            model,
            objective: vocabulary.objective.clone(),
            training,
        };
        if let Some(path) = &self.file {
            sections = sections.overlaid(path)?;
        }
        self.apply(&mut sections)?;
        sections.validate(vocabulary.n_tokens)?;
        Ok(sections)
    }

    /// The configuration with which a run is continued: the run's own, but for the number of steps and the time
    /// between checkpoints.
    ///
    /// # Errors
    ///
    /// Options that contradict the run.
    pub fn resume(&self, run: &RunConfig) -> Result<RunConfig, ConfigError> {
        let mut sections = run.sections();
        if let Some(preset) = self.preset {
            (sections.model, sections.training) = preset.resolve();
            // A preset's number of steps is a proposal, not a demand, and it knows of no tokenizer.
            sections.training.steps = run.training.steps;
            sections.model.set_vocab_size(run.model.vocab_size());
        }
        if let Some(path) = &self.file {
            sections = sections.overlaid(path)?;
        }
        self.apply(&mut sections)?;
        let mut resumed = run.clone();
        if let Some(steps) = self.steps {
            resumed.training.steps = steps;
        }
        if let Some(every) = self.checkpoint_every {
            resumed.training.checkpoint_every = every;
        }
        let of_run = ObjectiveKind::of(&run.objective);
        let asked = self.objective.unwrap_or(of_run);
        require_equal("objective", of_run.to_string(), asked.to_string())?;
        if self.documents {
            require_equal(
                "documents",
                run.within_documents.to_string(),
                "true".to_owned(),
            )?;
        }
        // First of all: the other fields of another architecture tell little.
        let architecture = |model: &ModelConfig| model.architecture().to_owned();
        require_equal(
            &format!("{MODEL}.{ARCHITECTURE}"),
            architecture(&resumed.model),
            architecture(&sections.model),
        )?;
        require_same(MODEL, &resumed.model, &sections.model)?;
        require_same(
            OBJECTIVE,
            &fields_of(&resumed.objective),
            &fields_of(&sections.objective),
        )?;
        require_same(TRAINING, &resumed.training, &sections.training)?;
        resumed.sections().validate(resumed.n_tokens())?;
        Ok(resumed)
    }

    fn apply(&self, sections: &mut Sections) -> Result<(), ConfigError> {
        let training = &mut sections.training;
        training.steps = self.steps.unwrap_or(training.steps);
        training.batch_size = self.batch_size.unwrap_or(training.batch_size);
        training.seq_length = self.seq_length.unwrap_or(training.seq_length);
        training.checkpoint_every = self.checkpoint_every.unwrap_or(training.checkpoint_every);
        training.seed = self.seed.unwrap_or(training.seed);
        if let Some(attention) = &self.attention {
            attention.apply(&mut sections.model);
        }
        if let Some(balance) = self.balance {
            let applied = balance.apply(&mut sections.model);
            applied.map_err(|source| ConfigError::Invalid {
                section: MODEL,
                source,
            })?;
        }
        if let Some(seed) = self.seed {
            sections.model.set_seed(seed);
        }
        Ok(())
    }
}

pub(crate) fn require_equal(field: &str, of_run: String, asked: String) -> Result<(), ConfigError> {
    if of_run == asked {
        return Ok(());
    }
    Err(ConfigError::Differs {
        field: field.to_owned(),
        of_run,
        asked,
    })
}

fn check_objective(model: &ModelConfig, objective: ObjectiveKind) -> Result<(), ConfigError> {
    if model.objective() == objective {
        return Ok(());
    }
    Err(ConfigError::Objective {
        objective,
        architecture: model.architecture(),
    })
}

impl RunConfig {
    /// Reads a run's `config.json`.
    ///
    /// # Errors
    ///
    /// A file that cannot be read, or is no valid configuration.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let config: Self = parse(path, &read(path)?)?;
        config.validate()?;
        Ok(config)
    }

    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// Those of the model, the objective and the plan.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.sections().validate(self.n_tokens())
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

    /// The first document whose content is not what the run began with.
    pub fn changed_document(&self, now: &[Fingerprint]) -> Option<String> {
        let content = |documents: &[Fingerprint]| -> Vec<(u64, u32)> {
            documents.iter().map(|d| (d.bytes, d.crc32)).collect()
        };
        let (before, after) = (content(&self.documents), content(now));
        let first = before.iter().zip(&after).position(|(a, b)| a != b);
        let first =
            first.or((before.len() != after.len()).then(|| before.len().min(after.len())))?;
        let document = now.get(first).or_else(|| self.documents.get(first))?;
        Some(document.path.display().to_string())
    }

    fn n_tokens(&self) -> usize {
        let of_bytes = || {
            let objective = ObjectiveKind::of(&self.objective);
            N_BYTE_VALUES + objective.special_tokens().len()
        };
        let record = self.tokenizer.as_ref();
        record.map_or_else(of_bytes, |record| record.vocab_size)
    }

    fn sections(&self) -> Sections {
        Sections {
            model: self.model.clone(),
            objective: self.objective.clone(),
            training: self.training.clone(),
        }
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

/// Any configuration from the JSON of a file.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, value: &Value) -> Result<T, ConfigError> {
    parse_value(value).map_err(in_file(path))
}

fn in_file(path: &Path) -> impl Fn(FieldError) -> ConfigError {
    move |FieldError { field, message }| ConfigError::Field {
        path: path.to_owned(),
        field,
        message,
    }
}

/// The fields of a configuration.
pub(crate) fn json<T: Serialize>(config: &T) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        _ => unreachable!("a configuration is a struct of plain data"),
    }
}

const MODEL: &str = "model";
const OBJECTIVE: &str = "objective";
const TRAINING: &str = "training";

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
        // Another architecture may lack the field.
        let asked = asked.get(&field).unwrap_or(&Value::Null);
        let field = format!("{section}.{field}");
        require_equal(&field, of_run.to_string(), asked.to_string())?;
    }
    Ok(())
}

/// Puts the fields of a file over those of sections.
fn overlaid(
    path: &Path,
    mut sections: Map<String, Value>,
) -> Result<Map<String, Value>, ConfigError> {
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
    Ok(sections)
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
    let sections = Map::from_iter([
        (MODEL.to_owned(), Value::Object(json(model))),
        (TRAINING.to_owned(), Value::Object(json(training))),
    ]);
    let sections = Value::Object(overlaid(path, sections)?);
    let Sections { model, training } = parse(path, &sections)?;
    Ok((model, training))
}

/// The fields of an objective, if it has any.
fn fields_of(objective: &Objective) -> Map<String, Value> {
    match objective {
        Objective::Causal => Map::new(),
        Objective::Masked(config) => json(config),
        Objective::Spans(config) => json(config),
    }
}

impl Sections {
    /// The fields of each section; an objective without fields has none.
    fn fields(&self) -> Map<String, Value> {
        let objective = fields_of(&self.objective);
        let objective = (!objective.is_empty()).then_some(objective);
        let sections = [
            (MODEL, Some(json(&self.model))),
            (OBJECTIVE, objective),
            (TRAINING, Some(json(&self.training))),
        ];
        let sections = sections.into_iter().filter_map(|(name, fields)| {
            let fields = Value::Object(fields?);
            Some((name.to_owned(), fields))
        });
        sections.collect()
    }

    /// Puts the fields of a file over these.
    fn overlaid(&self, path: &Path) -> Result<Self, ConfigError> {
        let sections = overlaid(path, self.fields())?;
        self.with_fields(sections).map_err(in_file(path))
    }

    /// The same sections with other fields. An objective stays of its kind.
    fn with_fields(&self, mut sections: Map<String, Value>) -> Result<Self, FieldError> {
        let mut take = |name| sections.remove(name).unwrap_or(Value::Null);
        let inside = |section: &'static str| {
            move |error: FieldError| FieldError {
                field: format!("{section}.{}", error.field),
                ..error
            }
        };
        let objective = take(OBJECTIVE);
        let objective = match &self.objective {
            Objective::Causal => Ok(Objective::Causal),
            Objective::Masked(_) => parse_value(&objective).map(Objective::Masked),
            Objective::Spans(_) => parse_value(&objective).map(Objective::Spans),
        };
        let Value::Object(model) = take(MODEL) else {
            unreachable!("the model is an object")
        };
        Ok(Self {
            model: ModelConfig::from_fields(model).map_err(inside(MODEL))?,
            objective: objective.map_err(inside(OBJECTIVE))?,
            training: parse_value(&take(TRAINING)).map_err(inside(TRAINING))?,
        })
    }

    fn validate(&self, n_tokens: usize) -> Result<(), ConfigError> {
        let invalid = |section| move |source| ConfigError::Invalid { section, source };
        let seq_length = self.training.seq_length;
        self.model.validate().map_err(invalid(MODEL))?;
        self.training.validate().map_err(invalid(TRAINING))?;
        check_objective(&self.model, ObjectiveKind::of(&self.objective))?;
        (self.objective.validate(seq_length)).map_err(invalid(OBJECTIVE))?;
        let vocab_size = self.model.vocab_size();
        if vocab_size < n_tokens {
            return Err(ConfigError::Vocabulary {
                vocab_size,
                n_tokens,
            });
        }
        self.check_tokens()?;
        let longest = match &self.objective {
            Objective::Causal | Objective::Masked(_) => seq_length,
            Objective::Spans(spans) => {
                let (source, target) = spans.lengths(seq_length);
                source.max(target)
            }
        };
        if let Some(max_seq_length) = self.model.max_seq_length()
            && longest > max_seq_length
        {
            return Err(ConfigError::Positions {
                seq_length: longest,
                max_seq_length,
            });
        }
        self.model.check_patterns(longest).map_err(invalid(MODEL))
    }

    /// Checks that the model knows the tokens of the objective.
    fn check_tokens(&self) -> Result<(), ConfigError> {
        let tokens = match &self.objective {
            Objective::Causal => Vec::new(),
            Objective::Masked(masked) => vec![
                ("mask_token", masked.mask_token),
                ("n_tokens", masked.tokens().end - 1),
            ],
            Objective::Spans(spans) => vec![
                ("first_sentinel", spans.first_sentinel),
                ("end_token", spans.end_token),
                ("start_token", spans.start_token),
            ],
        };
        let vocab_size = self.model.vocab_size();
        let unknown = tokens
            .into_iter()
            .find(|(_, token)| *token as usize >= vocab_size);
        match unknown {
            Some((field, token)) => Err(ConfigError::ObjectiveToken {
                field,
                token,
                vocab_size,
            }),
            None => Ok(()),
        }
    }
}
