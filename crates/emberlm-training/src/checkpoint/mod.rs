//! Checkpoints that survive a kill, a crash and a full disk: a step number plus named files.
//!
//! ```text
//! checkpoints/
//!   step-00000200/        one checkpoint; a folder of this name is complete
//!     manifest.json       step, score, and the length and CRC-32 of each file
//!     model, optimizer…   whatever the trainer put in
//!   .staging-00000300/    being written; becomes `step-00000300` by one rename
//!   .old-00000300/        what that rename replaces; put back if the rename did not happen
//!   .pruned-00000100/     being deleted
//!   .lock                 held by the one process that writes
//! ```
//!
//! [`CheckpointStore`] writes, [`CheckpointReader`] reads and may do so while a training writes.

mod faults;
mod manifest;
mod reader;
mod store;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

pub use faults::{Disk, Fault, FaultyDisk, Operation, Storage};
pub use reader::CheckpointReader;
pub use store::CheckpointStore;

/// What a checkpoint holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// The training step after which it was taken.
    pub step: u64,
    /// The validation loss at this very step, lower is better; `None` when it was not measured or
    /// not finite.
    pub score: Option<f64>,
    /// The bytes of each file, by name.
    pub files: BTreeMap<String, Vec<u8>>,
}

/// An intact checkpoint, and those that would have been preferred to it were they intact.
#[derive(Debug)]
pub struct Loaded {
    /// The intact checkpoint.
    pub checkpoint: Checkpoint,
    /// The damaged ones that were passed over; worth a warning each.
    pub damaged: Vec<Damaged>,
}

/// A checkpoint that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("checkpoint {path} is damaged: {reason}")]
pub struct Damaged {
    /// The checkpoint's folder.
    pub path: PathBuf,
    /// What is wrong with it.
    pub reason: Damage,
}

/// What is wrong with a damaged checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// A file is not there.
    #[error("{file} is missing")]
    Missing {
        /// The file's name.
        file: String,
    },
    /// A file is there, but the system does not give its content.
    #[error("{file} cannot be read: {reason}")]
    Unreadable {
        /// The file's name.
        file: String,
        /// The system's reason.
        reason: io::Error,
    },
    /// A file was cut short or has grown.
    #[error("{file} has {found} bytes instead of {expected}")]
    Length {
        /// The file's name.
        file: String,
        /// Bytes by the manifest.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A file, or the manifest itself, is not what was written.
    #[error("{file} does not match its checksum")]
    Checksum {
        /// The file's name.
        file: String,
    },
    /// The manifest is what was written, but lacks what a manifest needs.
    #[error("the manifest is malformed: {reason}")]
    Manifest {
        /// What the parser says.
        reason: serde_json::Error,
    },
    /// The manifest names a file that a checkpoint never holds.
    #[error("the manifest names the impossible file {name:?}")]
    FileName {
        /// The name.
        name: String,
    },
    /// The folder was renamed or its manifest copied from another checkpoint.
    #[error("the folder is of step {expected}, its manifest of step {found}")]
    Step {
        /// The step in the folder's name.
        expected: u64,
        /// The step in the manifest.
        found: u64,
    },
    /// Not damage, but as unusable: another version of the program wrote it.
    #[error(
        "it has format {found}, this version reads format {supported}; use the version that wrote it"
    )]
    Format {
        /// The checkpoint's format.
        found: u32,
        /// The format that is read.
        supported: u32,
    },
}

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// Something else is where the folder of the checkpoints should be.
    #[error("{path} is not a folder; move it away or choose another run folder")]
    NotAFolder {
        /// What should be a folder.
        path: PathBuf,
    },
    /// Another process trains in the same run folder.
    #[error("another process writes checkpoints to {dir}; stop it or choose another run folder")]
    InUse {
        /// The folder of the checkpoints.
        dir: PathBuf,
    },
    /// No space is left, or the quota is used up. What was written for this checkpoint is removed.
    #[error(
        "the disk is full, {path} could not be written; the previous checkpoint is intact: free some space and resume from it"
    )]
    DiskFull {
        /// What was to be written.
        path: PathBuf,
    },
    /// The system refused an operation.
    #[error("cannot {action} {path}: {reason}")]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// The system's reason.
        reason: io::Error,
    },
    /// The checkpoint is safe, but something older is still there. The next publish tries again.
    #[error(
        "the checkpoint of step {step} is saved, but older ones could not be cleaned up: {reason}"
    )]
    Cleanup {
        /// The step that was saved.
        step: u64,
        /// What stopped the cleaning.
        reason: Box<CheckpointError>,
    },
    /// There is no checkpoint of this step.
    #[error("{dir} holds no checkpoint of step {step}")]
    NoSuchStep {
        /// The folder of the checkpoints.
        dir: PathBuf,
        /// The step asked for.
        step: u64,
    },
    /// The checkpoint asked for cannot be used.
    #[error(transparent)]
    Damaged(Damaged),
    /// There are checkpoints, but each one is damaged.
    #[error(
        "no checkpoint in {dir} is intact (the newest: {newest}); restore one from a backup or start a new run"
    )]
    NoneIntact {
        /// The folder of the checkpoints.
        dir: PathBuf,
        /// What is wrong with the newest (of [`CheckpointReader::load_best`]: the first tried).
        newest: Damage,
    },
}

impl CheckpointError {
    /// The error of an operation that the system refused.
    fn io(action: &'static str, path: &Path, reason: io::Error) -> Self {
        let path = path.to_path_buf();
        match reason.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::DiskFull { path },
            _ => Self::Io {
                action,
                path,
                reason,
            },
        }
    }
}
