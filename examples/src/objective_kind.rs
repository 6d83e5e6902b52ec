//! Objectives by name, and the special tokens that they need of a tokenizer.

use std::{fmt, ops::Range};

use clap::ValueEnum;
use emberlm::{
    text::Tokenizer,
    training::{MaskedConfig, Objective, SpansConfig},
};

use crate::{ConfigError, Preset};

/// What a model is trained for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ObjectiveKind {
    /// To say the next token.
    Causal,
    /// To say tokens that are hidden from it.
    Masked,
    /// To say spans that are cut out.
    Spans,
}

const MASK: &str = "<mask>";
const PAD: &str = "<pad>";
const END: &str = "</s>";

// As many as T5 has.
const N_SENTINELS: usize = 100;

fn sentinel(i: usize) -> String {
    format!("<extra_id_{i}>")
}

// Spans of bytes are longer: Xue et al. 2021 (ByT5), section 3.1, <https://arxiv.org/abs/2105.13626>.
const MEAN_SPAN_OF_BYTES: f64 = 20.0;

impl ObjectiveKind {
    /// That of an objective.
    pub fn of(objective: &Objective) -> Self {
        match objective {
            Objective::Causal => Self::Causal,
            Objective::Masked(_) => Self::Masked,
            Objective::Spans(_) => Self::Spans,
        }
    }

    /// The preset that is trained for it where none is named.
    pub fn preset(self) -> Preset {
        match self {
            Self::Causal => Preset::Tiny,
            Self::Masked => Preset::BertTiny,
            Self::Spans => Preset::T5Tiny,
        }
    }

    /// The special tokens that it needs, in the order of their numbers. Sentinels count down, as T5's do.
    pub fn special_tokens(self) -> Vec<String> {
        match self {
            Self::Causal => Vec::new(),
            Self::Masked => vec![PAD.to_owned(), MASK.to_owned()],
            Self::Spans => {
                let sentinels = (0..N_SENTINELS).rev().map(sentinel);
                [PAD, END]
                    .map(str::to_owned)
                    .into_iter()
                    .chain(sentinels)
                    .collect()
            }
        }
    }
}

/// The text of tokens with special ones by their names: those that a tokenizer of bytes does not know, too.
pub fn text_with_special_tokens(
    tokenizer: &Tokenizer,
    kind: ObjectiveKind,
    tokens: &[u32],
) -> String {
    if !tokenizer.is_bytes() {
        return tokenizer.decode(tokens);
    }
    let names = kind.special_tokens();
    let n_bytes = tokenizer.vocab_size();
    let name = |token: u32| names.get((token as usize).checked_sub(n_bytes)?);
    let pieces = tokens.chunk_by(|a, b| name(*a).is_none() && name(*b).is_none());
    pieces
        .map(|piece| match name(piece[0]) {
            Some(name) => name.clone(),
            None => tokenizer.decode(piece),
        })
        .collect()
}

impl fmt::Display for ObjectiveKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Causal => "causal",
            Self::Masked => "masked",
            Self::Spans => "spans",
        })
    }
}

/// The tokens that an objective has to do with.
#[derive(Debug, Clone)]
pub struct Vocabulary {
    /// Number of tokens, special ones included.
    pub n_tokens: usize,
    /// The objective, by the tokens' numbers.
    pub objective: Objective,
}

impl Vocabulary {
    /// The tokens of a tokenizer. Where it is that of bytes, special tokens come after the 256 bytes.
    ///
    /// # Errors
    ///
    /// A tokenizer that lacks a special token which the objective needs.
    pub fn of(tokenizer: &Tokenizer, kind: ObjectiveKind) -> Result<Self, ConfigError> {
        let names = kind.special_tokens();
        if tokenizer.is_bytes() {
            let n_bytes = tokenizer.vocab_size();
            let id = |name: &str| {
                let place = names.iter().position(|own| own == name)?;
                Some((n_bytes + place) as u32)
            };
            let objective = objective(kind, id, n_bytes, MEAN_SPAN_OF_BYTES)?;
            let n_tokens = n_bytes + names.len();
            return Ok(Self {
                n_tokens,
                objective,
            });
        }
        let n_tokens = tokenizer.vocab_size();
        let mean_span = SpansConfig::new(0, 0, 0, 0).mean_span;
        let objective = objective(kind, |name| tokenizer.token_id(name), n_tokens, mean_span)?;
        Ok(Self {
            n_tokens,
            objective,
        })
    }

    /// Those of a byte-level BPE of `n_tokens` tokens that is about to be trained: special tokens come first.
    ///
    /// # Errors
    ///
    /// None that [`of`](Self::of) would not have.
    pub fn planned(n_tokens: usize, kind: ObjectiveKind) -> Result<Self, ConfigError> {
        let names = kind.special_tokens();
        let id = |name: &str| Some(names.iter().position(|own| own == name)? as u32);
        let mean_span = SpansConfig::new(0, 0, 0, 0).mean_span;
        let objective = objective(kind, id, n_tokens, mean_span)?;
        Ok(Self {
            n_tokens,
            objective,
        })
    }
}

fn objective(
    kind: ObjectiveKind,
    id: impl Fn(&str) -> Option<u32>,
    n_tokens: usize,
    mean_span: f64,
) -> Result<Objective, ConfigError> {
    let need = |name: &str| {
        id(name).ok_or_else(|| ConfigError::SpecialToken {
            name: name.to_owned(),
            objective: kind,
        })
    };
    Ok(match kind {
        ObjectiveKind::Causal => Objective::Causal,
        ObjectiveKind::Masked => {
            let mask = need(MASK)?;
            let special = [MASK, PAD, END, "<s>", "<unk>"].map(&id);
            let text = longest_gap(special.into_iter().flatten().collect(), n_tokens as u32);
            let masked = MaskedConfig::new(mask, text.end - text.start);
            Objective::Masked(masked.with_first_token(text.start))
        }
        ObjectiveKind::Spans => {
            let first = need(&sentinel(0))?;
            let follows = |i: &usize| {
                let expected = first.checked_sub(*i as u32);
                expected.is_some() && id(&sentinel(*i)) == expected
            };
            let n_sentinels = (0..).take_while(follows).count() as u32;
            let spans = SpansConfig::new(first, n_sentinels, need(END)?, need(PAD)?);
            Objective::Spans(spans.with_mean_span(mean_span))
        }
    })
}

/// The longest run of tokens `0 .. n_tokens` without special ones: what text is made of.
fn longest_gap(mut special: Vec<u32>, n_tokens: u32) -> Range<u32> {
    special.sort_unstable();
    let starts = [0].into_iter().chain(special.iter().map(|token| token + 1));
    let ends = special.iter().copied().chain([n_tokens]);
    let gaps = starts.zip(ends).filter(|(start, end)| start < end);
    let longest = gaps.max_by_key(|(start, end)| end - start);
    longest.map_or(0..0, |(start, end)| start..end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_tokens_come_after_the_bytes() {
        let of = |kind| Vocabulary::of(&Tokenizer::bytes(), kind).expect("all are there");
        assert_eq!(of(ObjectiveKind::Causal).n_tokens, 256);
        let masked = of(ObjectiveKind::Masked);
        assert_eq!(masked.n_tokens, 258);
        assert_eq!(
            masked.objective,
            Objective::Masked(MaskedConfig::new(257, 256))
        );
        let spans = of(ObjectiveKind::Spans);
        assert_eq!(spans.n_tokens, 358);
        let expected = SpansConfig::new(357, 100, 257, 256).with_mean_span(20.0);
        assert_eq!(spans.objective, Objective::Spans(expected));
    }

    #[test]
    fn special_tokens_of_a_trained_tokenizer_come_first() {
        let masked = Vocabulary::planned(400, ObjectiveKind::Masked).expect("all are there");
        let expected = MaskedConfig::new(1, 398).with_first_token(2);
        assert_eq!(masked.objective, Objective::Masked(expected));
        let spans = Vocabulary::planned(400, ObjectiveKind::Spans).expect("all are there");
        assert_eq!(
            spans.objective,
            Objective::Spans(SpansConfig::new(101, 100, 1, 0))
        );
    }

    #[test]
    fn special_tokens_of_bytes_are_shown_by_name() {
        let show = |tokens: &[u32]| {
            text_with_special_tokens(&Tokenizer::bytes(), ObjectiveKind::Masked, tokens)
        };
        assert_eq!(
            show(&[97, 257, 257, 0xc3, 0xa9, 256]),
            "a<mask><mask>é<pad>"
        );
    }

    #[test]
    fn text_lies_between_the_special_tokens() {
        // RoBERTa's.
        assert_eq!(longest_gap(vec![50264, 1, 2, 0, 3], 50265), 4..50264);
        assert_eq!(longest_gap(Vec::new(), 7), 0..7);
        assert_eq!(longest_gap(vec![0], 1), 0..0);
    }
}
