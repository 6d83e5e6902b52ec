//! Text for language models: metrics of translations, and corpora of sentence pairs. No tensors.

mod bleu;
mod chrf;
mod ngrams;
mod pairs;

pub use bleu::{Bleu, corpus_bleu, sentence_bleu, tokenize_13a};
pub use chrf::{ChrfOptions, corpus_chrf, sentence_chrf};
pub use pairs::{Pair, PairCorpus, PairError, PairSide, PairSplit};
