//! The model of a run, for programs that use it.

use std::path::Path;

use burn::tensor::Device;
use emberlm::{
    models::{Decoder, Encoder, EncoderDecoder, load_weights},
    text::Tokenizer,
    training::{RunFolder, Trainable},
};

use crate::{AttentionChoice, ModelConfig, RunConfig, from_checkpoint};

/// A trained model of any architecture.
#[expect(
    clippy::large_enum_variant,
    reason = "a program has one, and moves it a few times"
)]
pub enum RunModel {
    /// Writes on.
    Decoder(Decoder),
    /// Finds masked tokens.
    Encoder(Encoder),
    /// Finds spans.
    EncoderDecoder(EncoderDecoder),
}

/// A run with its model and its tokenizer.
pub struct LoadedRun {
    /// The configuration.
    pub config: RunConfig,
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The model.
    pub model: RunModel,
}

type AnyError = Box<dyn std::error::Error>;

impl LoadedRun {
    /// Reads the run in a folder: its weights, or its last checkpoint if it was killed before it wrote them.
    ///
    /// # Errors
    ///
    /// A folder without a run or weights, or files that are damaged.
    pub fn load(run: &Path, device: &Device) -> Result<Self, AnyError> {
        Self::load_with(run, None, device)
    }

    /// As [`load`](Self::load), with another attention than the model was trained with: a pattern has no weights.
    ///
    /// # Errors
    ///
    /// As [`load`](Self::load), and attention that the model cannot have.
    pub fn load_with(
        run: &Path,
        attention: Option<&AttentionChoice>,
        device: &Device,
    ) -> Result<Self, AnyError> {
        if !run.join(RunFolder::CONFIG).is_file() {
            return Err(format!(
                "{} holds no run: give the folder that pretrain wrote",
                run.display()
            )
            .into());
        }
        let mut config = RunConfig::read(&run.join(RunFolder::CONFIG))?;
        if let Some(attention) = attention {
            attention.apply(&mut config.model);
            let validated = config.model.validate();
            validated.map_err(|error| format!("--pattern {attention}: {error}"))?;
        }
        let tokenizer = config.load_tokenizer(run)?;
        let model = match &config.model {
            ModelConfig::Decoder(model) => {
                RunModel::Decoder(trained(run, &config, model.init(device))?)
            }
            ModelConfig::Encoder(model) => {
                RunModel::Encoder(trained(run, &config, model.init(device))?)
            }
            ModelConfig::EncoderDecoder(model) => {
                RunModel::EncoderDecoder(trained(run, &config, model.init(device))?)
            }
        };
        Ok(Self {
            config,
            tokenizer,
            model,
        })
    }

    /// Why a program cannot use this run: what it was trained for, and which programs can.
    pub fn unfit(&self, run: &Path) -> AnyError {
        let (objective, use_instead) = match self.model {
            RunModel::Decoder(_) => ("causal", "generate or evaluate"),
            RunModel::Encoder(_) => ("masked", "fill"),
            RunModel::EncoderDecoder(_) => ("spans", "fill"),
        };
        format!(
            "{} was trained with objective {objective}: use {use_instead}, or give another run",
            run.display()
        )
        .into()
    }
}

/// A new model with the weights of the run.
fn trained<M: Trainable>(run: &Path, config: &RunConfig, model: M) -> Result<M, AnyError> {
    let weights = run.join(RunFolder::WEIGHTS);
    if weights.is_file() {
        return Ok(load_weights(model, &weights)?);
    }
    from_checkpoint(run, &config.training, model)
}
