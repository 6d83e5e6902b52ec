//! Text as training data: files mapped into memory, their streams of bytes, windows cut from them.
//!
//! [`Corpus`] opens files and folders, [`TextStream`] reads their training or held-out part as one
//! run of bytes, [`TrainingWindows`] and [`EvaluationWindows`] cut it for a language model over
//! bytes. Nothing here holds a position: what a window contains depends on its number alone, so a
//! resumed run sees the text it would have seen.

mod corpus;
mod mapped;
mod windows;

use std::io;
use std::path::{Path, PathBuf};

pub use corpus::{Corpus, Document, Fingerprint, TextPart, TextStream};
pub use mapped::MappedText;
pub use windows::{EvaluationWindows, TrainingWindows};

/// Why text cannot be opened or cut into windows.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TextError {
    /// No file and no folder was named.
    #[error("no text was given: name at least one file or folder")]
    NoSources,

    /// There is nothing at a path.
    #[error("{path} does not exist: check the path")]
    Missing {
        /// The path as it was given or found.
        path: PathBuf,
    },

    /// The operating system refuses to read, list or map a path.
    #[error("cannot read {path}: {cause}")]
    Unreadable {
        /// The file, link or folder.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },

    /// A pipe, a socket or a device was named.
    #[error("{path} is neither a file nor a folder: save the text to a file first")]
    NotAFile {
        /// The path as it was given.
        path: PathBuf,
    },

    /// A file that was named itself, not found in a folder, has no content.
    #[error("{path} is empty: name a file with text in it, or leave it out")]
    EmptyFile {
        /// The path as it was given.
        path: PathBuf,
    },

    /// A file is not UTF-8.
    #[error("{path} is not UTF-8 at byte {byte}: convert it to UTF-8, or leave it out")]
    InvalidUtf8 {
        /// The file.
        path: PathBuf,
        /// The offset of the first byte, counted from 0, that belongs to no character.
        byte: usize,
    },

    /// A folder has no `.txt` and no `.md` file with content.
    #[error(
        "{path} has no .txt or .md file with text in it ({skipped} other or empty files): \
         name another folder, or the files themselves"
    )]
    FolderWithoutText {
        /// The folder as it was given.
        path: PathBuf,
        /// How many files it has that are something else or empty.
        skipped: usize,
    },

    /// A window of no bytes was asked for.
    #[error("a sequence of 0 bytes has nothing to predict: choose a --seq-length of at least 1")]
    EmptySequence,

    /// The text is shorter than one window and the byte that follows it.
    #[error(
        "the {part} text has {text_bytes} bytes, too few for a sequence of {seq_length} and the \
         byte after it: choose a shorter --seq-length, or give more text"
    )]
    SequenceTooLong {
        /// Bytes a window was to have.
        seq_length: usize,
        /// Bytes there are.
        text_bytes: usize,
        /// Which text they are counted in.
        part: TextPart,
    },
}

impl TextError {
    fn from_io(path: &Path, cause: io::Error) -> Self {
        let path = path.to_owned();
        match cause.kind() {
            io::ErrorKind::NotFound => Self::Missing { path },
            _ => Self::Unreadable { path, cause },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_shared_between_threads() {
        fn shared<T: Send + Sync + 'static>() {}
        shared::<MappedText>();
        shared::<Corpus>();
        shared::<TextStream>();
        shared::<TrainingWindows>();
        shared::<EvaluationWindows>();
        shared::<TextError>();
    }

    #[test]
    fn messages_name_the_cause_and_the_fix() {
        let error = TextError::SequenceTooLong {
            seq_length: 512,
            text_bytes: 40,
            part: TextPart::HeldOut,
        };
        assert_eq!(
            error.to_string(),
            "the held-out text has 40 bytes, too few for a sequence of 512 and the byte after it: \
             choose a shorter --seq-length, or give more text"
        );
        let error = TextError::InvalidUtf8 {
            path: "a/latin1.txt".into(),
            byte: 7,
        };
        assert_eq!(
            error.to_string(),
            "a/latin1.txt is not UTF-8 at byte 7: convert it to UTF-8, or leave it out"
        );
    }
}
