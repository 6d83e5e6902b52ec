//! Which tokenizer, as a program's option says it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use super::{BpeTraining, Tokenizer};
use crate::{Corpus, Progress, TextError};

/// `bytes`, `bpe:N` or a file.
///
/// ```
/// use emberlm_text::TokenizerChoice::{self, *};
///
/// let parse = |choice: &str| choice.parse::<TokenizerChoice>();
/// assert_eq!(parse("bytes")?, Bytes);
/// assert_eq!(parse("bpe:4096")?, Bpe { vocab_size: 4096 });
/// assert_eq!(parse("gpt2/tokenizer.json")?, File("gpt2/tokenizer.json".into()));
/// assert!(parse("bpe:many").is_err());
/// # Ok::<(), emberlm_text::TextError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerChoice {
    /// A token is a byte.
    Bytes,
    /// A byte-level BPE that is trained on the text.
    Bpe {
        /// How many tokens it has, all told.
        vocab_size: usize,
    },
    /// A `tokenizer.json`.
    File(PathBuf),
}

impl TokenizerChoice {
    /// The tokenizer: bytes, or trained on the training part of `corpus`, or loaded.
    ///
    /// `special_tokens` are those of a BPE that is trained; see [`BpeTraining`]. A file has its own.
    ///
    /// # Errors
    /// Those of [`BpeTraining::train`] and [`Tokenizer::load`]; [`TextError::TokenizerChoice`] if there is no such file.
    pub fn resolve(
        &self,
        corpus: &Corpus,
        special_tokens: &[&str],
        progress: impl FnMut(Progress) + Send,
    ) -> Result<Tokenizer, TextError> {
        match self {
            Self::Bytes => Ok(Tokenizer::bytes()),
            Self::Bpe { vocab_size } => BpeTraining::new(*vocab_size)
                .with_special_tokens(special_tokens)
                .train(&corpus.training(), progress),
            Self::File(path) => Tokenizer::load(path).map_err(|error| match error {
                TextError::Missing { .. } => TextError::TokenizerChoice {
                    given: self.to_string(),
                },
                error => error,
            }),
        }
    }
}

impl FromStr for TokenizerChoice {
    type Err = TextError;

    fn from_str(given: &str) -> Result<Self, TextError> {
        let unknown = || TextError::TokenizerChoice {
            given: given.to_owned(),
        };
        match (given, given.strip_prefix("bpe:")) {
            ("bytes", _) => Ok(Self::Bytes),
            ("" | "bpe", _) => Err(unknown()),
            (_, Some(number)) => match number.parse() {
                Ok(vocab_size) => Ok(Self::Bpe { vocab_size }),
                Err(_) => Err(unknown()),
            },
            _ => Ok(Self::File(given.into())),
        }
    }
}

impl fmt::Display for TokenizerChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes => f.write_str("bytes"),
            Self::Bpe { vocab_size } => write!(f, "bpe:{vocab_size}"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_are_printed_as_they_are_parsed() {
        for given in ["bytes", "bpe:300", "a/tokenizer.json", "bytes.json"] {
            let choice: TokenizerChoice = given.parse().unwrap();
            assert_eq!(choice.to_string(), given);
        }
    }

    #[test]
    fn what_is_no_choice_names_the_three() {
        for given in [
            "",
            "bpe",
            "bpe:",
            "bpe:-1",
            "bpe:4k",
            "bpe:99999999999999999999",
        ] {
            let error = given.parse::<TokenizerChoice>().unwrap_err().to_string();
            let named = format!("tokenizer {given} is neither bytes, nor bpe:N such as bpe:4096");
            assert!(error.starts_with(&named), "{error}");
        }
    }

    #[test]
    fn a_file_that_is_missing_may_have_been_a_word() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.txt");
        std::fs::write(&path, "ember").unwrap();
        let corpus = Corpus::open(&[path]).unwrap();
        let choice: TokenizerChoice = "byte".parse().unwrap();
        let error = choice
            .resolve(&corpus, &[], |_| ())
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("tokenizer byte is neither bytes"),
            "{error}"
        );
    }
}
