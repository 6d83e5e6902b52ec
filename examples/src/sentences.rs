//! Sentences as the tokens of an encoder-decoder, and back.

use emberlm::{
    text::{BpeTraining, Pair, TextError, Tokenizer, TokenizerChoice},
    training::TokenPair,
};
use thiserror::Error;

/// The start token of a target.
pub const BEGIN: &str = "<begin>";
/// The last token of a source and of a target.
pub const END: &str = "<end>";

/// A tokenizer that knows where sentences begin and end.
#[derive(Debug, Clone)]
pub struct Sentences {
    /// The tokenizer.
    pub tokenizer: Tokenizer,
    /// The start token of a target.
    pub begin: u32,
    /// The last token of a source and of a target.
    pub end: u32,
}

/// The tokenizer lacks a special token.
#[derive(Debug, Error)]
#[error(
    "the tokenizer has no {name}: a translation needs {BEGIN} and {END}, which bpe:N makes; bytes have none"
)]
pub struct NoSpecialToken {
    name: &'static str,
}

impl Sentences {
    /// Sentences in the tokens of a tokenizer.
    ///
    /// # Errors
    ///
    /// If it lacks [`BEGIN`] or [`END`].
    pub fn new(tokenizer: Tokenizer) -> Result<Self, NoSpecialToken> {
        let find = |name| tokenizer.token_id(name).ok_or(NoSpecialToken { name });
        let (begin, end) = (find(BEGIN)?, find(END)?);
        Ok(Self {
            tokenizer,
            begin,
            end,
        })
    }

    /// Learns the tokens of both sides of pairs together, or loads them.
    ///
    /// # Errors
    ///
    /// A number of tokens that is too small, a file that is no tokenizer, or one without the special tokens.
    pub fn choose(
        choice: &TokenizerChoice,
        pairs: &[&Pair],
    ) -> Result<Self, Box<dyn std::error::Error>> {
        let tokenizer = match choice {
            TokenizerChoice::Bytes => Tokenizer::bytes(),
            TokenizerChoice::Bpe { vocab_size } => {
                let sides = pairs.iter().flat_map(|pair| [&pair.source, &pair.target]);
                BpeTraining::new(*vocab_size)
                    .with_special_tokens(&[BEGIN, END])
                    .train_on(sides.map(String::as_str))?
            }
            TokenizerChoice::File(path) => Tokenizer::load(path).map_err(|error| match error {
                TextError::Missing { .. } => TextError::TokenizerChoice {
                    given: choice.to_string(),
                },
                error => error,
            })?,
        };
        Ok(Self::new(tokenizer)?)
    }

    /// What the encoder reads.
    pub fn source(&self, text: &str) -> Vec<u32> {
        let mut tokens = self.tokenizer.encode(text);
        tokens.push(self.end);
        tokens
    }

    /// What the decoder reads and predicts.
    pub fn target(&self, text: &str) -> Vec<u32> {
        let mut tokens = vec![self.begin];
        tokens.extend(self.tokenizer.encode(text));
        tokens.push(self.end);
        tokens
    }

    /// A pair of sentences as tokens.
    pub fn pair(&self, pair: &Pair) -> TokenPair {
        TokenPair {
            source: self.source(&pair.source),
            target: self.target(&pair.target),
        }
    }

    /// The text of what a decoder wrote, up to its end token.
    pub fn text(&self, tokens: &[u32]) -> String {
        let end = tokens.iter().position(|token| *token == self.end);
        self.tokenizer
            .decode(&tokens[..end.unwrap_or(tokens.len())])
    }
}
