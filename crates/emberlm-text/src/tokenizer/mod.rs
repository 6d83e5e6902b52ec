//! Text to tokens and back.

mod bpe;
mod byte_level;
mod choice;
mod cuts;
mod training;

use std::fmt;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

pub use choice::TokenizerChoice;
pub use training::BpeTraining;

use crate::{TextError, atomic::write_whole};
use bpe::Bpe;
pub(crate) use cuts::Cuts;

/// Bytes as tokens, or a byte-level BPE.
///
/// Every text can be encoded: both know all 256 bytes. What is encoded and decoded is the same text again, unless a
/// loaded tokenizer normalises it (Unicode normal forms, a space before the text). A clone shares the memory.
///
/// The names of special tokens are special in the text too, as in the library of Hugging Face that does the work:
/// where `</s>` stands in a text, that is one token if the tokenizer has it.
///
/// Byte-level BPE: <https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf>,
/// section 2.2.
///
/// ```
/// use emberlm_text::Tokenizer;
///
/// let tokenizer = Tokenizer::bytes();
/// assert_eq!(tokenizer.vocab_size(), 256);
/// assert_eq!(tokenizer.encode("ash"), [97, 115, 104]);
/// assert_eq!(tokenizer.decode(&[97, 115, 104]), "ash");
/// assert_eq!(tokenizer.decode(b"caf\xc3".map(u32::from).as_slice()), "caf\u{fffd}");
/// ```
#[derive(Clone)]
pub struct Tokenizer {
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Bytes,
    Bpe(Arc<Bpe>),
}

impl Tokenizer {
    /// The name of the file in which a run keeps its tokenizer.
    pub const FILE_NAME: &str = "tokenizer.json";

    /// A token is a byte, by its value.
    pub fn bytes() -> Self {
        Self { kind: Kind::Bytes }
    }

    /// Reads a `tokenizer.json`, of ours or of Hugging Face's.
    ///
    /// It must hold a byte-level BPE (as that of GPT-2, RoBERTa, Llama 3, Qwen): a model `BPE` without dropout, prefix
    /// or suffix that has a token for each byte, and a pre-tokenizer that ends in `ByteLevel`. Padding, truncation and
    /// what a template adds around a text are not applied.
    ///
    /// # Errors
    /// [`TextError::Missing`], [`TextError::Unreadable`], [`TextError::NoTokenizer`] and [`TextError::NotByteLevel`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self, TextError> {
        let path = path.as_ref();
        let json = std::fs::read(path).map_err(|cause| TextError::from_io(path, cause))?;
        Self::from_json(path, &json)
    }

    /// `path` is for messages.
    fn from_json(path: &Path, json: &[u8]) -> Result<Self, TextError> {
        let bpe = Bpe::from_json(path, json)?;
        if bpe.is_bytes() {
            return Ok(Self::bytes());
        }
        Ok(Self {
            kind: Kind::Bpe(Arc::new(bpe)),
        })
    }

    /// Writes a `tokenizer.json` that [`load`](Self::load) and Hugging Face's library read, whole or not at all.
    ///
    /// That of bytes is a BPE without merges.
    ///
    /// # Errors
    /// [`TextError::Unwritable`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), TextError> {
        let path = path.as_ref();
        let json = match &self.kind {
            Kind::Bytes => format!("{:#}", byte_level::tokenizer_of_bytes()),
            Kind::Bpe(bpe) => bpe.to_json(true),
        };
        write_whole(path, |file| file.write_all(json.as_bytes()))
            .map_err(TextError::unwritable(path))
    }

    /// Whether a token is a byte.
    pub fn is_bytes(&self) -> bool {
        matches!(self.kind, Kind::Bytes)
    }

    /// One more than the largest token: how many a model must know.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::Bytes => 256,
            Kind::Bpe(bpe) => bpe.vocab_size(),
        }
    }

    /// The token of a name, such as that of a special token; `None` if there is none.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        match &self.kind {
            Kind::Bytes => None,
            Kind::Bpe(bpe) => bpe.token_id(name),
        }
    }

    /// The tokens of a text. Nothing is added to them.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match &self.kind {
            Kind::Bytes => text.bytes().map(u32::from).collect(),
            Kind::Bpe(bpe) => bpe.encode(text),
        }
    }

    /// The tokens of a text in parts of at least `least` bytes, but for the last one: one after the other they are
    /// [`encode`](Self::encode) of the whole, of which so no more than a part is held. Where it is not known how to cut
    /// (see [`TokenFile`](crate::TokenFile)), there is one part. What is no UTF-8 becomes U+FFFD.
    ///
    /// ```
    /// use emberlm_text::Tokenizer;
    ///
    /// let tokenizer = Tokenizer::bytes();
    /// let parts: Vec<Vec<u32>> = tokenizer.encode_parts(b"coal and ash", 6).collect();
    /// assert_eq!(parts, [tokenizer.encode("coal and"), tokenizer.encode(" ash")]);
    /// ```
    pub fn encode_parts<'a>(
        &'a self,
        text: &'a [u8],
        least: usize,
    ) -> impl Iterator<Item = Vec<u32>> + 'a {
        let parts = self.cuts().parts(text, least);
        parts.map(|part| self.encode(&String::from_utf8_lossy(part)))
    }

    /// The text of tokens, special ones by their names. What is no UTF-8, as where a character is cut, becomes U+FFFD,
    /// and so does a token that is not in the vocabulary.
    pub fn decode(&self, tokens: &[u32]) -> String {
        String::from_utf8_lossy(&self.decode_bytes(tokens)).into_owned()
    }

    /// The bytes of tokens, for streams that hold back characters until they are whole. A token that is not in the
    /// vocabulary gives those of U+FFFD.
    pub fn decode_bytes(&self, tokens: &[u32]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &token in tokens {
            match (&self.kind, u8::try_from(token)) {
                (Kind::Bytes, Ok(byte)) => bytes.push(byte),
                (Kind::Bpe(bpe), _) if bpe.token_bytes(token).is_some() => {
                    bytes.extend(bpe.token_bytes(token).unwrap_or_default());
                }
                _ => bytes.extend_from_slice("\u{FFFD}".as_bytes()),
            }
        }
        bytes
    }

    /// Whether a token begins a word: it is a special token, or its first byte is white space.
    ///
    /// In byte-level BPE the space before a word belongs to it, so a word is such a token and all after it up to the
    /// next; what stands at the start of a text is a word too. So punctuation belongs to the word it follows.
    pub fn starts_word(&self, token: u32) -> bool {
        match &self.kind {
            Kind::Bytes => u8::try_from(token).is_ok_and(|byte| byte.is_ascii_whitespace()),
            Kind::Bpe(bpe) => bpe.starts_word(token),
        }
    }

    /// CRC-32 (IEEE) of the tokenizer as JSON without white space: the same for the same tokenizer, however its file
    /// is laid out.
    pub fn crc32(&self) -> u32 {
        match &self.kind {
            Kind::Bytes => crc32fast::hash(byte_level::tokenizer_of_bytes().to_string().as_bytes()),
            Kind::Bpe(bpe) => bpe.crc32(),
        }
    }

    /// Where a text may be cut so that its parts have the tokens of the whole.
    pub(crate) fn cuts(&self) -> Cuts {
        match &self.kind {
            Kind::Bytes => Cuts::BetweenWords,
            Kind::Bpe(bpe) => bpe.cuts(),
        }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Tokenizer");
        shown.field("bytes", &self.is_bytes());
        shown.field("vocab_size", &self.vocab_size()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    /// With the words of GPT-2 and of Llama 3.
    static FIXTURES: LazyLock<[Tokenizer; 2]> = LazyLock::new(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/byte_level");
        ["gpt2.json", "llama3.json"].map(|name| Tokenizer::load(folder.join(name)).unwrap())
    });

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn the_parts_of_a_text_have_the_tokens_of_the_whole(
            text in "([a-cI',.!?/\\-0-9 \t\r\n\u{b}\u{1c}\u{85}\u{a0}\u{3000}éŐ\u{301}日。🔥]|'s|'LL| it| <s>|<mask>|  |\n\n){0,40}",
        ) {
            for tokenizer in &*FIXTURES {
                let parts: Vec<u32> = tokenizer.encode_parts(text.as_bytes(), 1).flatten().collect();
                prop_assert_eq!(parts, tokenizer.encode(&text));
            }
        }
    }

    #[test]
    fn a_cut_within_a_word_or_after_white_space_changes_the_tokens() {
        let [tokenizer, _] = &*FIXTURES;
        for (left, right) in [(" th", "e"), ("a  ", "b")] {
            let whole = tokenizer.encode(&[left, right].concat());
            assert_ne!(
                [tokenizer.encode(left), tokenizer.encode(right)].concat(),
                whole
            );
        }
    }
}
