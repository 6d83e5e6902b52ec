//! Training a byte-level BPE on a text.

use std::collections::HashSet;
use std::path::Path;

use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, TokenizerBuilder};

use super::{Cuts, Tokenizer, byte_level};
use crate::{Progress, TextError, TextStream};

/// More text than this is trained on in evenly spaced parts. It bounds time and memory, and the library counts a pair
/// in 31 bits.
const MOST_BYTES: usize = 1 << 30;
/// Bytes of a part.
const PART: usize = 64 * 1024;
/// No language has as many useful tokens.
const MOST_TOKENS: usize = 1_000_000;

/// How a byte-level BPE is trained.
///
/// Its tokens are, by their numbers: the special tokens in the order given, the 256 bytes, and what is learned, the
/// most frequent pair first. Words are those of GPT-2's expression, without a space put before the text. A text with
/// few pairs gives fewer tokens than were asked for. The same text gives the same tokenizer.
///
/// Of more than 1 GiB of text, parts of 64 KiB that are evenly spaced and together no larger are trained on.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("ember.txt");
/// use emberlm_text::{BpeTraining, Corpus};
///
/// std::fs::write(&path, "an ember, a glowing ember. ".repeat(9))?;
/// let corpus = Corpus::open(&[path])?;
/// let training = BpeTraining::new(270).with_special_tokens(&["<pad>", "<s>", "</s>"]);
/// let tokenizer = training.train(&corpus.training(), |_| ())?;
/// assert_eq!(tokenizer.vocab_size(), 270);
/// assert_eq!(tokenizer.token_id("</s>"), Some(2));
/// assert_eq!(tokenizer.decode(&tokenizer.encode("Émbers!")), "Émbers!");
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct BpeTraining {
    vocab_size: usize,
    special_tokens: Vec<String>,
}

impl BpeTraining {
    /// A vocabulary of `vocab_size` tokens, all told, and no special tokens.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            vocab_size,
            special_tokens: Vec::new(),
        }
    }

    /// Reserves tokens that no text is made of, such as `<pad>`, `<s>`, `</s>`, `<mask>` and `<extra_id_0>`.
    pub fn with_special_tokens(mut self, names: &[&str]) -> Self {
        self.special_tokens = names.iter().map(|&name| name.to_owned()).collect();
        self
    }

    /// Trains on a text. `progress` counts the bytes that were split into words; merging them comes after.
    ///
    /// # Errors
    /// [`TextError::VocabularySize`], [`TextError::SpecialToken`] and [`TextError::Training`].
    pub fn train(
        &self,
        text: &TextStream,
        mut progress: impl FnMut(Progress) + Send,
    ) -> Result<Tokenizer, TextError> {
        self.check()?;
        let total = text.len();
        let stride = total.div_ceil(MOST_BYTES).max(1);
        let mut done = 0;
        let parts = text
            .documents()
            .iter()
            .flat_map(|document| Cuts::BetweenWords.parts(document.part(text.part()), PART))
            .inspect(|part| {
                done += part.len();
                progress(Progress {
                    done: done as u64,
                    total: total as u64,
                });
            })
            .step_by(stride)
            // Copied: a mapped file that someone changes is UTF-8 no longer.
            .map(|part| String::from_utf8_lossy(part).into_owned());
        self.train_parts(parts)
    }

    /// Trains on texts such as the sentences of pairs, each of which is split into words by itself.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn train_on<'a>(
        &self,
        texts: impl Iterator<Item = &'a str> + Send,
    ) -> Result<Tokenizer, TextError> {
        self.check()?;
        self.train_parts(texts.map(str::to_owned))
    }

    fn train_parts(
        &self,
        parts: impl Iterator<Item = String> + Send,
    ) -> Result<Tokenizer, TextError> {
        let failed = |error: tokenizers::Error| TextError::Training {
            message: error.to_string().replace('\n', " "),
        };
        let special = |name: &String| AddedToken::from(name.clone(), true);
        let mut trainer = BpeTrainer::builder()
            .vocab_size(self.vocab_size)
            .show_progress(false)
            .special_tokens(self.special_tokens.iter().map(special).collect())
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .build();
        let byte_level = ByteLevel::new(false, true, true);
        let mut library = TokenizerBuilder::<BPE, NormalizerWrapper, _, ByteLevel, _>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(byte_level))
            .with_decoder(Some(byte_level))
            .build()
            .map_err(failed)?;
        library.train(&mut trainer, parts).map_err(failed)?;
        let json = library.to_string(false).map_err(failed)?;
        Tokenizer::from_json(Path::new("the trained tokenizer"), json.as_bytes())
    }

    fn check(&self) -> Result<(), TextError> {
        let least = 256 + self.special_tokens.len();
        if !(least..=MOST_TOKENS).contains(&self.vocab_size) {
            return Err(TextError::VocabularySize {
                vocab_size: self.vocab_size,
                least,
                most: MOST_TOKENS,
            });
        }
        let mut names = HashSet::new();
        match self
            .special_tokens
            .iter()
            .find(|name| !can_be_special(name) || !names.insert(*name))
        {
            Some(name) => Err(TextError::SpecialToken { name: name.clone() }),
            None => Ok(()),
        }
    }
}

/// Whether a name is text and not how bytes are written in the tokenizer's file, which a learned token may be.
fn can_be_special(name: &str) -> bool {
    let written = byte_level::bytes(name);
    written.is_none_or(|bytes| bytes.len() > 1 && bytes == name.as_bytes())
}
