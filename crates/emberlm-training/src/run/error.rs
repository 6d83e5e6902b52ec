//! What can go wrong while a run's folder is read or written.

use std::{
    io,
    path::{Path, PathBuf},
};

use thiserror::Error;

/// Why a run's folder could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// The path is no folder, or does not exist.
    #[error("{} is not a folder: give the folder that a training run wrote", path.display())]
    NotAFolder {
        /// The path that was given.
        path: PathBuf,
    },
    /// The folder lacks a file that every run has from its first step on.
    #[error("{} holds no run: it has no {missing}; give the folder that a training run wrote", path.display())]
    NoRun {
        /// The folder that was given.
        path: PathBuf,
        /// The name of the file that it lacks.
        missing: &'static str,
    },
    /// A new run would go into a folder that holds something.
    #[error("{} is not empty: give a new folder, or continue the run in it with --resume", path.display())]
    NotEmpty {
        /// The folder that was given.
        path: PathBuf,
    },
    /// Another process trains in the folder.
    #[error("{} is in use: another process trains in it", path.display())]
    Locked {
        /// The folder that was given.
        path: PathBuf,
    },
    /// The operating system refused to read or write a file.
    #[error("cannot read or write {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A line of the metrics log is no step record, or its step does not come after the one before.
    #[error("{} is damaged in line {line}: {message}; remove that line or restore the file", path.display())]
    DamagedLine {
        /// The metrics log.
        path: PathBuf,
        /// The number of the line, counted from 1.
        line: usize,
        /// What is wrong with it.
        message: String,
    },
    /// A file's text and its JSON form do not agree, or a value has no JSON form.
    #[error("{} does not fit its JSON format: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser or the writer met, and where.
        source: serde_json::Error,
    },
}

impl RunError {
    /// Turns the system's error about `path` into this type, for `map_err`.
    pub(super) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Io { path, source }
    }

    /// Turns a JSON error about `path` into this type, for `map_err`.
    pub(super) fn json(path: &Path) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Json { path, source }
    }
}
