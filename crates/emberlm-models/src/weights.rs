//! Weights in safetensors files, and loading the model of a training run.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use burn::{
    module::Module,
    store::{ModuleSnapshot, ModuleStore, SafetensorsStore},
    tensor::Device,
};
use emberlm_core::{InvalidConfig, replace_file};
use serde::{Deserialize, de::DeserializeOwned};
use thiserror::Error;

use crate::{Decoder, DecoderConfig, EncoderDecoder, EncoderDecoderConfig};

/// Why a model cannot be loaded or saved.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// A file or folder cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The config file is no config.
    #[error("{path}: {message}")]
    Config {
        /// Which file.
        path: PathBuf,
        /// The field and what is wrong with it.
        message: String,
    },
    /// The config's fields do not fit together.
    #[error("{path}: {source}")]
    InvalidConfig {
        /// Which file.
        path: PathBuf,
        /// What does not fit.
        source: InvalidConfig,
    },
    /// The weights do not fit the model, or the file is damaged.
    #[error("{path}: {message}")]
    Weights {
        /// Which file.
        path: PathBuf,
        /// Which tensors, and what is wrong.
        message: String,
    },
}

/// Writes a module's weights as safetensors under their module paths (names of enum variants left out).
///
/// The file appears whole or not at all: it is written beside `path`, synced and renamed.
///
/// # Errors
///
/// [`LoadError::Io`] if the file cannot be written.
pub fn save_weights<M: Module>(module: &M, path: &Path) -> Result<(), LoadError> {
    let weights = |message: String| LoadError::Weights {
        path: path.to_owned(),
        message,
    };
    let mut store = SafetensorsStore::from_bytes(None).skip_enum_variants(true);
    store
        .collect_from(module)
        .map_err(|error| weights(error.to_string()))?;
    let bytes = store
        .get_bytes()
        .map_err(|error| weights(error.to_string()))?;
    replace_file(path, &bytes).map_err(|source| LoadError::Io {
        path: path.to_owned(),
        source,
    })
}

/// Reads weights that [`save_weights`] wrote into a module of the same shape.
///
/// # Errors
///
/// A file that cannot be read or is damaged, a missing tensor, or one of another shape.
pub fn load_weights<M: Module>(mut module: M, path: &Path) -> Result<M, LoadError> {
    let bytes = fs::read(path).map_err(|source| LoadError::Io {
        path: path.to_owned(),
        source,
    })?;
    let mut store = SafetensorsStore::from_bytes(Some(bytes)).skip_enum_variants(true);
    module
        .load_from(&mut store)
        .map_err(|error| LoadError::Weights {
            path: path.to_owned(),
            message: error.to_string().replace('\n', " "),
        })?;
    Ok(module)
}

/// Loads the decoder of a training run: `config.json` (its field `model`) and `model.safetensors` in `run`.
///
/// # Errors
///
/// A missing or damaged file, or a config that is none.
pub fn load_decoder(run: &Path, device: &Device) -> Result<(DecoderConfig, Decoder), LoadError> {
    load_run(run, DecoderConfig::validate, |config| config.init(device))
}

/// Loads the encoder-decoder of a training run, from the same files as [`load_decoder`].
///
/// # Errors
///
/// As [`load_decoder`].
pub fn load_encoder_decoder(
    run: &Path,
    device: &Device,
) -> Result<(EncoderDecoderConfig, EncoderDecoder), LoadError> {
    load_run(run, EncoderDecoderConfig::validate, |config| {
        config.init(device)
    })
}

fn load_run<C: DeserializeOwned, M: Module>(
    run: &Path,
    validate: impl FnOnce(&C) -> Result<(), InvalidConfig>,
    init: impl FnOnce(&C) -> M,
) -> Result<(C, M), LoadError> {
    #[derive(Deserialize)]
    struct Run<C> {
        model: C,
    }
    let path = run.join("config.json");
    let text = fs::read_to_string(&path).map_err(|source| LoadError::Io {
        path: path.clone(),
        source,
    })?;
    let Run { model: config } = serde_json::from_str(&text).map_err(|error| LoadError::Config {
        path: path.clone(),
        message: error.to_string(),
    })?;
    validate(&config).map_err(|source| LoadError::InvalidConfig { path, source })?;
    let model = load_weights(init(&config), &run.join("model.safetensors"))?;
    Ok((config, model))
}
