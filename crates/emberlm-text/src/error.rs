//! Why text cannot be used.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::TextPart;

/// Why text cannot be opened, tokenised or cut into windows.
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

    /// A file changed between its opening and its reading.
    #[error("{path} changed while it was read: start again, and leave the text alone meanwhile")]
    Changed {
        /// The file.
        path: PathBuf,
    },

    /// A window of no tokens was asked for.
    #[error("a sequence of 0 tokens has nothing to predict: choose a --seq-length of at least 1")]
    EmptySequence,

    /// The text is shorter than one window and the token that follows it.
    #[error(
        "the {part} text has {length} {unit}s, too few for a sequence of {seq_length} and the \
         {unit} after it: choose a shorter --seq-length, or give more text"
    )]
    SequenceTooLong {
        /// Tokens a window was to have.
        seq_length: usize,
        /// Tokens there are.
        length: usize,
        /// What the tokens are called.
        unit: TokenUnit,
        /// Which text they are counted in.
        part: TextPart,
    },

    /// The choice of a tokenizer is none.
    #[error(
        "tokenizer {given} is neither bytes, nor bpe:N such as bpe:4096, nor a tokenizer.json that \
         exists: choose one of the three"
    )]
    TokenizerChoice {
        /// What was given.
        given: String,
    },

    /// A vocabulary was to be trained that is too small, or larger than any text can fill.
    #[error(
        "a vocabulary of {vocab_size} cannot be trained: it holds 256 bytes, the special tokens and \
         what is learned, so choose {least} to {most}"
    )]
    VocabularySize {
        /// What was asked for.
        vocab_size: usize,
        /// 256 and the number of special tokens.
        least: usize,
        /// The largest that can be asked for.
        most: usize,
    },

    /// A special token is empty, named twice, or named as a byte.
    #[error(
        "special token {name:?} is empty, named twice or named as a byte: give each a name of its \
         own, such as <mask>"
    )]
    SpecialToken {
        /// Its name.
        name: String,
    },

    /// A tokenizer cannot be trained.
    #[error("the tokenizer cannot be trained: {message}")]
    Training {
        /// What the library said.
        message: String,
    },

    /// A file is no tokenizer.
    #[error("{path} is no tokenizer.json: {message}")]
    NoTokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },

    /// A tokenizer is of a kind that is not supported.
    #[error(
        "{path} is not a byte-level BPE: {reason}; choose another tokenizer.json, such as that of \
         GPT-2 or Llama 3, or train one with bpe:N"
    )]
    NotByteLevel {
        /// The file.
        path: PathBuf,
        /// What is otherwise.
        reason: String,
    },

    /// A file cannot be written.
    #[error("cannot write {path}: {cause}")]
    Unwritable {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        cause: io::Error,
    },
}

/// What the tokens of a stream are called in messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenUnit {
    /// A token is a byte.
    Byte,
    /// A token is a part of a word.
    Token,
}

impl fmt::Display for TokenUnit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Byte => "byte",
            Self::Token => "token",
        })
    }
}

impl TextError {
    pub(crate) fn from_io(path: &Path, cause: io::Error) -> Self {
        let path = path.to_owned();
        match cause.kind() {
            io::ErrorKind::NotFound => Self::Missing { path },
            _ => Self::Unreadable { path, cause },
        }
    }

    /// For `map_err` where the file or folder at `path` is written.
    pub(crate) fn unwritable(path: &Path) -> impl Fn(io::Error) -> Self {
        move |cause| Self::Unwritable {
            path: path.to_owned(),
            cause,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Corpus, MappedText, TextStream, TokenFile, TokenStream, Tokenizer};

    #[test]
    fn everything_is_shared_between_threads() {
        fn shared<T: Send + Sync + 'static>() {}
        shared::<MappedText>();
        shared::<Corpus>();
        shared::<TextStream>();
        shared::<TokenStream>();
        shared::<TokenFile>();
        shared::<Tokenizer>();
        shared::<TextError>();
    }

    #[test]
    fn messages_name_the_cause_and_the_fix() {
        let error = TextError::SequenceTooLong {
            seq_length: 512,
            length: 40,
            unit: TokenUnit::Byte,
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
