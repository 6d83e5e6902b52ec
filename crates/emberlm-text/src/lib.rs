//! Text as training data: files mapped into memory, tokenizers, and the streams of tokens they make.
//!
//! [`Corpus`] opens files and folders. A [`Tokenizer`] is bytes, or a byte-level BPE that was trained on the text or
//! loaded. [`TokenFile`] keeps the text as tokens on disk, tokenised once. A [`TokenStream`] reads the training or the
//! held-out part of either as one run of tokens, and knows which document each of them is of. [`PairCorpus`] reads pairs of
//! sentences; [`corpus_bleu`] and [`corpus_chrf`] judge translations.
//!
//! Nothing here holds a position or knows of tensors: what is read depends on where it is asked for alone.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let folder = tempfile::tempdir()?;
//! # let folder = folder.path();
//! use emberlm_text::{CacheState, Corpus, TokenFile, TokenStream, TokenizerChoice};
//!
//! std::fs::write(folder.join("a.txt"), "the ember glows, the ember fades. ".repeat(20))?;
//! std::fs::write(folder.join("b.txt"), "an ember in the ash glows. ".repeat(20))?;
//! let corpus = Corpus::open(&[folder.to_owned()])?;
//!
//! let choice: TokenizerChoice = "bpe:300".parse()?;
//! let tokenizer = choice.resolve(&corpus, &["<pad>"], |_| ())?;
//! let tokens = tokenizer.encode("the ember glows");
//! assert_eq!(tokens.len(), 3);
//! assert_eq!(tokenizer.decode(&tokens), "the ember glows");
//! assert_eq!(tokenizer.token_id("<pad>"), Some(0));
//!
//! // Tokenised once, and found again the next time.
//! let cache = folder.join("tokens");
//! let (_, state) = TokenFile::cached(&corpus, &tokenizer, &cache, |_| ())?;
//! assert_eq!(state, CacheState::Built);
//! let (file, state) = TokenFile::cached(&corpus, &tokenizer, &cache, |_| ())?;
//! assert_eq!(state, CacheState::Found);
//!
//! let stream: TokenStream = file.training();
//! assert!(stream.bytes_per_token() > 3.0);
//! let everything = tokenizer.decode(&stream.tokens(0..stream.len()));
//! assert_eq!(everything.len(), corpus.training().len());
//! assert_eq!(stream.documents(0..1), [0]);
//! assert_eq!(stream.documents(stream.len() - 1..stream.len()), [1]);
//! # Ok(())
//! # }
//! ```

mod atomic;
mod bleu;
mod chrf;
mod corpus;
mod error;
mod mapped;
mod ngrams;
mod pairs;
mod progress;
mod token_file;
mod token_stream;
mod tokenizer;

pub use bleu::{Bleu, corpus_bleu, sentence_bleu, tokenize_13a};
pub use chrf::{ChrfOptions, corpus_chrf, sentence_chrf};
pub use corpus::{Corpus, Document, Fingerprint, TextPart, TextStream};
pub use error::{TextError, TokenUnit};
pub use mapped::MappedText;
pub use pairs::{Pair, PairCorpus, PairError, PairSide, PairSplit};
pub use progress::Progress;
pub use token_file::{CacheState, Damage, TokenFile};
pub use token_stream::TokenStream;
pub use tokenizer::{BpeTraining, Tokenizer, TokenizerChoice};
