//! A byte-level BPE, from its file.

use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer as Library;

use super::{Cuts, byte_level};
use crate::TextError;

pub(super) struct Bpe {
    library: Library,
    /// The bytes of each token; special tokens have those of their names, and numbers without a token none.
    tokens: Vec<Option<Token>>,
    cuts: Cuts,
    crc32: u32,
}

struct Token {
    bytes: Box<[u8]>,
    is_special: bool,
}

impl Bpe {
    /// `path` is for messages.
    pub(super) fn from_json(path: &Path, json: &[u8]) -> Result<Self, TextError> {
        let no_tokenizer = |message: String| TextError::NoTokenizer {
            path: path.to_owned(),
            message: message.replace('\n', " "),
        };
        let file: Value =
            serde_json::from_slice(json).map_err(|error| no_tokenizer(error.to_string()))?;
        check(&file).map_err(|reason| TextError::NotByteLevel {
            path: path.to_owned(),
            reason,
        })?;
        let mut library =
            Library::from_bytes(json).map_err(|error| no_tokenizer(error.to_string()))?;
        library.with_padding(None);
        library
            .with_truncation(None)
            .map_err(|error| no_tokenizer(error.to_string()))?;
        let tokens = tokens(&library);
        let has_byte = |byte: u8| library.token_to_id(&byte_level::character(byte).to_string());
        if let Some(byte) = (0..=u8::MAX).find(|&byte| has_byte(byte).is_none()) {
            return Err(TextError::NotByteLevel {
                path: path.to_owned(),
                reason: format!("it has no token for the byte {byte}"),
            });
        }
        let mut bpe = Self {
            library,
            tokens,
            cuts: Cuts::of(&file),
            crc32: 0,
        };
        bpe.crc32 = crc32fast::hash(bpe.to_json(false).as_bytes());
        Ok(bpe)
    }

    pub(super) fn to_json(&self, pretty: bool) -> String {
        self.library
            .to_string(pretty)
            .expect("it came from JSON and has none but strings and numbers")
    }

    /// Whether each token is the byte of its number.
    pub(super) fn is_bytes(&self) -> bool {
        let is_byte = |(number, token): (usize, &Option<Token>)| {
            let token = token.as_ref();
            token.is_some_and(|token| !token.is_special && *token.bytes == [number as u8])
        };
        self.vocab_size() == 256
            && self.tokens.iter().enumerate().all(is_byte)
            && self.library.get_normalizer().is_none()
            && self.cuts != Cuts::Never
    }

    pub(super) fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    pub(super) fn token_id(&self, name: &str) -> Option<u32> {
        self.library.token_to_id(name)
    }

    pub(super) fn encode(&self, text: &str) -> Vec<u32> {
        let encoding = self.library.encode_fast(text, false);
        let encoding = encoding.expect("all bytes are in the vocabulary, so every text is encoded");
        encoding.get_ids().to_vec()
    }

    pub(super) fn token_bytes(&self, token: u32) -> Option<&[u8]> {
        self.token(token).map(|token| &*token.bytes)
    }

    pub(super) fn starts_word(&self, token: u32) -> bool {
        self.token(token).is_some_and(|token| {
            token.is_special || token.bytes.first().is_some_and(u8::is_ascii_whitespace)
        })
    }

    pub(super) fn crc32(&self) -> u32 {
        self.crc32
    }

    pub(super) fn cuts(&self) -> Cuts {
        self.cuts
    }

    fn token(&self, token: u32) -> Option<&Token> {
        self.tokens.get(token as usize)?.as_ref()
    }
}

/// Every token of a tokenizer, by its number.
fn tokens(library: &Library) -> Vec<Option<Token>> {
    let vocabulary = library.get_vocab(true);
    let n_tokens = vocabulary
        .values()
        .max()
        .map_or(0, |&last| last as usize + 1);
    let added = library.get_added_tokens_decoder();
    let mut tokens: Vec<Option<Token>> = (0..n_tokens).map(|_| None).collect();
    for (name, number) in vocabulary {
        let added = added.get(&number);
        let bytes = match added {
            Some(_) => None,
            None => byte_level::bytes(&name),
        };
        tokens[number as usize] = Some(Token {
            bytes: bytes.unwrap_or_else(|| name.into_bytes()).into(),
            is_special: added.is_some_and(|token| token.special),
        });
    }
    tokens
}

/// Checks whether a file holds a byte-level BPE that always gives the same tokens, and says what is otherwise.
fn check(file: &Value) -> Result<(), String> {
    let model = &file["model"];
    match &model["type"] {
        Value::String(kind) if kind == "BPE" => {}
        // Files from before this field: only a BPE has merges.
        Value::Null if model["merges"].is_array() => {}
        Value::String(kind) => return Err(format!("its model is {kind}")),
        _ => return Err("it has no model".to_owned()),
    }
    if model["dropout"]
        .as_f64()
        .is_some_and(|dropout| dropout > 0.0)
    {
        return Err("its dropout makes the tokens random".to_owned());
    }
    for field in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model[field].as_str().is_some_and(|affix| !affix.is_empty()) {
            return Err(format!("it has a {field}"));
        }
    }
    let pre_tokenizer = &file["pre_tokenizer"];
    let last = match pre_tokenizer["pretokenizers"].as_array() {
        Some(sequence) => sequence.last().unwrap_or(&Value::Null),
        None => pre_tokenizer,
    };
    match last["type"].as_str() {
        Some("ByteLevel") => Ok(()),
        Some(kind) => Err(format!("its pre-tokenizer ends in {kind}")),
        None => Err("it has no pre-tokenizer".to_owned()),
    }
}
