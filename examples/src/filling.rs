//! Completing a sentence with holes.

use std::str::FromStr;

use burn::tensor::{Device, Int, Tensor, TensorData, activation::log_softmax};
use emberlm::{
    core::{
        BatchData, BeamConfig, BeamSearch, EarlyStopping, ForbiddenTokens, GenerationError,
        LengthPenalty, LogitProcessors, Source,
    },
    models::{Encoder, EncoderDecoder},
    text::Tokenizer,
    training::{MaskedConfig, SpansConfig},
};
use thiserror::Error;

/// A text with holes, each written `____` or `<mask>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sentence {
    /// What stands before, between and after the holes: one more than there are holes.
    parts: Vec<String>,
}

/// Why a sentence cannot be completed.
#[derive(Debug, Error)]
pub enum FillError {
    /// There is no hole.
    #[error("the sentence has no hole: write ____ or <mask> where something is missing")]
    NoHole,
    /// More holes than the model has sentinels.
    #[error("the sentence has {n_holes} holes, but the model knows {most}: leave fewer")]
    Holes {
        /// Holes there are.
        n_holes: usize,
        /// Sentinels of the model.
        most: usize,
    },
    /// The sentence is longer than the model.
    #[error("the sentence has {length} tokens, but the model has {longest} positions: shorten it")]
    TooLong {
        /// Tokens of the sentence, holes included.
        length: usize,
        /// Positions of the model.
        longest: usize,
    },
    /// Spans cannot be generated.
    #[error(transparent)]
    Generation(#[from] GenerationError),
}

/// What could stand in the holes.
#[derive(Debug, Clone, PartialEq)]
pub struct Completion {
    /// The tokens of each hole.
    pub holes: Vec<Vec<u32>>,
    /// The natural logarithm of their probability.
    pub log_probability: f64,
}

impl FromStr for Sentence {
    type Err = FillError;

    fn from_str(text: &str) -> Result<Self, FillError> {
        let text = text.replace("<mask>", "____");
        let mut parts = vec![String::new()];
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once("____") {
            parts.last_mut().expect("there is one").push_str(before);
            parts.push(String::new());
            // A longer line is one hole too.
            rest = after.trim_start_matches('_');
        }
        parts.last_mut().expect("there is one").push_str(rest);
        if parts.len() == 1 {
            return Err(FillError::NoHole);
        }
        Ok(Self { parts })
    }
}

impl Sentence {
    /// The tokens of the parts. In a byte-level BPE the space before a word belongs to it, so that the space before a hole
    /// is part of what is missing.
    pub fn encode(&self, tokenizer: &Tokenizer) -> Vec<Vec<u32>> {
        let last = self.parts.len() - 1;
        let parts = self.parts.iter().enumerate();
        let parts = parts.map(|(i, part)| {
            let belongs_to_hole = i < last && !tokenizer.is_bytes();
            let part = match part.strip_suffix(' ') {
                Some(shorter) if belongs_to_hole => shorter,
                _ => part,
            };
            tokenizer.encode(part)
        });
        parts.collect()
    }
}

impl Completion {
    /// The whole text: the parts with what stands between them.
    pub fn text(&self, parts: &[Vec<u32>], tokenizer: &Tokenizer) -> String {
        let holes = self.holes.iter().map(Vec::as_slice).chain([&[][..]]);
        let tokens: Vec<u32> = parts
            .iter()
            .zip(holes)
            .flat_map(|(part, hole)| part.iter().chain(hole))
            .copied()
            .collect();
        tokenizer.decode(&tokens)
    }
}

// Beams at least: fewer lose what is likely only with its second token.
const N_BEAMS: usize = 16;

/// The `n_best` likeliest completions of `n_tokens` tokens a hole, found by a beam search from left to right: each token is
/// scored with the later ones still hidden, and the product of these is the completion's probability.
///
/// # Errors
///
/// [`FillError::TooLong`].
///
/// # Panics
///
/// If there are no holes or tokens.
pub fn fill_masked(
    model: &Encoder,
    config: &MaskedConfig,
    parts: &[Vec<u32>],
    n_tokens: usize,
    n_best: usize,
    device: &Device,
) -> Result<Vec<Completion>, FillError> {
    let (text, places) = with_masks(parts, config.mask_token, n_tokens);
    let longest = model.embedding.max_seq_length().unwrap_or(usize::MAX);
    if text.len() > longest {
        let length = text.len();
        return Err(FillError::TooLong { length, longest });
    }
    let mut beams = vec![(text, 0.0)];
    for place in &places {
        let scores = scores_at(model, &beams, *place, device);
        let mut candidates = Vec::new();
        for ((text, sum), scores) in beams.iter().zip(&scores) {
            let tokens = config.tokens();
            candidates.extend(tokens.map(|token| (text, token, sum + scores[token as usize])));
        }
        beams = best(candidates, *place, n_best.max(N_BEAMS));
    }
    beams.truncate(n_best);
    let completion = |(text, log_probability): (Vec<u32>, f64)| Completion {
        holes: (places.chunks(n_tokens))
            .map(|hole| hole.iter().map(|place| text[*place]).collect())
            .collect(),
        log_probability,
    };
    Ok(beams.into_iter().map(completion).collect())
}

/// The text with masks in its holes, and where they are.
fn with_masks(parts: &[Vec<u32>], mask: u32, n_tokens: usize) -> (Vec<u32>, Vec<usize>) {
    let (last, before) = parts.split_last().expect("a text has a last part");
    let (mut text, mut places) = (Vec::new(), Vec::new());
    for part in before {
        text.extend_from_slice(part);
        places.extend(text.len()..text.len() + n_tokens);
        text.extend(std::iter::repeat_n(mask, n_tokens));
    }
    text.extend_from_slice(last);
    (text, places)
}

/// The log-probabilities of all tokens at a place of each text.
fn scores_at(
    model: &Encoder,
    texts: &[(Vec<u32>, f64)],
    place: usize,
    device: &Device,
) -> Vec<Vec<f64>> {
    let tokens: Vec<i64> = texts
        .iter()
        .flat_map(|(text, _)| text.iter().map(|token| i64::from(*token)))
        .collect();
    let shape = [texts.len(), tokens.len() / texts.len()];
    let tokens = Tensor::<2, Int>::from_data(TensorData::new(tokens, shape), device);
    let hidden = model.hidden_states(tokens, None, BatchData::new(), None);
    let hidden = hidden.narrow(1, place, 1).squeeze_dim::<2>(1);
    let scores = log_softmax(model.masked_scores(hidden), 1);
    let [_, vocab_size] = scores.dims();
    let scores: Vec<f64> = scores.into_data().iter().collect();
    scores.chunks(vocab_size).map(<[f64]>::to_vec).collect()
}

/// The likeliest candidates, each text with its token in place.
fn best(
    mut candidates: Vec<(&Vec<u32>, u32, f64)>,
    place: usize,
    n: usize,
) -> Vec<(Vec<u32>, f64)> {
    candidates.sort_by(|a, b| b.2.total_cmp(&a.2));
    candidates.truncate(n);
    let lengthened = |(text, token, sum): (&Vec<u32>, u32, f64)| {
        let mut text = text.clone();
        text[place] = token;
        (text, sum)
    };
    candidates.into_iter().map(lengthened).collect()
}

/// The `n_best` likeliest completions of at most `most_tokens` tokens a hole, by beam search: the model reads the text
/// with a sentinel for each hole and writes what they stand for. The probability is that of all it writes after the first
/// sentinel.
///
/// # Errors
///
/// [`FillError::Holes`], [`FillError::TooLong`] and [`FillError::Generation`].
///
/// # Panics
///
/// If there are no holes or tokens.
pub fn fill_spans(
    model: &EncoderDecoder,
    config: &SpansConfig,
    parts: &[Vec<u32>],
    most_tokens: usize,
    n_best: usize,
    device: &Device,
) -> Result<Vec<Completion>, FillError> {
    let n_holes = parts.len() - 1;
    if n_holes > config.n_sentinels as usize {
        let most = config.n_sentinels as usize;
        return Err(FillError::Holes { n_holes, most });
    }
    let sentinels: Vec<u32> = (0..n_holes as u32)
        .map(|hole| config.first_sentinel - hole)
        .collect();
    let source = with_sentinels(parts, &sentinels, config.end_token);
    let embedding = model.source_embedding.as_ref().unwrap_or(&model.embedding);
    let longest = embedding.max_seq_length().unwrap_or(usize::MAX);
    if source.len() > longest {
        let length = source.len();
        return Err(FillError::TooLong { length, longest });
    }
    // The tokens of each hole, the sentinels of all but the first, and the end.
    let max_new_tokens = n_holes * (most_tokens + 1);
    let n_beams = n_best.max(N_BEAMS);
    let search = BeamConfig::new(n_beams, max_new_tokens)
        .with_end_tokens(vec![config.end_token])
        .with_length_penalty(LengthPenalty::HuggingFace(0.0))
        .with_early_stopping(EarlyStopping::Never)
        .with_n_best(n_best);
    let shape = [1, source.len()];
    let source: Vec<i64> = source.into_iter().map(i64::from).collect();
    let source = Tensor::<2, Int>::from_data(TensorData::new(source, shape), device);
    let prompt = [config.start_token, config.first_sentinel];
    let cache = model.start(Source::new(source), prompt.len() + max_new_tokens);
    let processors = LogitProcessors::new()
        .with(ForbiddenTokens(unused(config, n_holes)))
        .with(holes_in_order(config.clone(), most_tokens, n_holes));
    let mut search = BeamSearch::new(search)
        .map_err(GenerationError::from)?
        .with_processors(processors);
    let found = search.search_from(model, cache, &[prompt], device)?;
    let completions = found.into_iter().flatten().map(|hypothesis| Completion {
        holes: split(&hypothesis.tokens, config.end_token, &sentinels),
        log_probability: hypothesis.log_probability,
    });
    Ok(completions.collect())
}

fn with_sentinels(parts: &[Vec<u32>], sentinels: &[u32], end: u32) -> Vec<u32> {
    let after = sentinels.iter().chain([&end]);
    let pieces = parts.iter().zip(after);
    pieces
        .flat_map(|(part, token)| part.iter().chain([token]))
        .copied()
        .collect()
}

/// The sentinels of holes that are not there, and the token that begins all targets.
fn unused(config: &SpansConfig, n_holes: usize) -> Vec<u32> {
    let sentinels = (n_holes as u32..config.n_sentinels).map(|i| config.first_sentinel - i);
    sentinels.chain([config.start_token]).collect()
}

/// Lets each hole have 1 to `most_tokens` tokens, and then the next hole's sentinel or, after the last, the end.
fn holes_in_order(
    config: SpansConfig,
    most_tokens: usize,
    n_holes: usize,
) -> impl FnMut(&[u32], &mut [f32]) {
    move |text: &[u32], scores: &mut [f32]| {
        let is_sentinel = |token: &u32| {
            (*token <= config.first_sentinel) && config.first_sentinel - token < n_holes as u32
        };
        let n_begun = text.iter().filter(|token| is_sentinel(token)).count();
        let length = text
            .iter()
            .rev()
            .take_while(|token| !is_sentinel(token))
            .count();
        let next = match n_begun < n_holes {
            true => config.first_sentinel - n_begun as u32,
            false => config.end_token,
        };
        for (token, score) in scores.iter_mut().enumerate() {
            let token = token as u32;
            let ends_hole = token == config.end_token || is_sentinel(&token);
            let allowed = match ends_hole {
                true => token == next && length > 0,
                false => length < most_tokens,
            };
            if !allowed {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

/// The tokens between sentinels, without the end.
fn split(tokens: &[u32], end: u32, sentinels: &[u32]) -> Vec<Vec<u32>> {
    let tokens = tokens.strip_suffix(&[end]).unwrap_or(tokens);
    let holes = tokens.split(|token| sentinels.contains(token));
    holes.map(<[u32]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use emberlm::{
        models::{EncoderConfig, EncoderDecoderConfig, PositionsConfig},
        training::MaskedConfig,
    };

    use super::*;
    use crate::choose_device;

    fn parts(text: &str) -> Vec<String> {
        text.parse::<Sentence>().expect("it has a hole").parts
    }

    #[test]
    fn holes_are_found_however_they_are_written() {
        assert_eq!(parts("a ____ b"), ["a ", " b"]);
        assert_eq!(parts("<mask>"), ["", ""]);
        assert_eq!(parts("a <mask> b ________, c"), ["a ", " b ", ", c"]);
        for none in ["", "a b", "a __ b"] {
            let error = none.parse::<Sentence>().expect_err("no hole");
            assert!(error.to_string().contains("no hole"), "{error}");
        }
    }

    #[test]
    fn one_hidden_token_has_the_probabilities_of_the_model() {
        let (_, device) = choose_device(None).expect("a device");
        let model = EncoderConfig::new(23, 2, 12, 3).init(&device);
        let config = MaskedConfig::new(22, 20).with_first_token(1);
        let text = [vec![3, 4], vec![5]];
        let found = fill_masked(&model, &config, &text, 1, 20, &device).expect("short enough");
        let all: f64 = found.iter().map(|found| found.log_probability.exp()).sum();
        let expected = &scores_at(&model, &[(vec![3, 4, 22, 5], 0.0)], 2, &device)[0];
        for found in &found {
            let token = found.holes[0][0];
            assert!((1..21).contains(&token));
            assert_eq!(found.log_probability, expected[token as usize]);
        }
        assert!(found.is_sorted_by(|a, b| a.log_probability >= b.log_probability));
        let special = expected[0].exp() + expected[21].exp() + expected[22].exp();
        assert!((all + special - 1.0).abs() < 1e-5, "{all}");
    }

    #[test]
    fn several_holes_of_several_tokens_are_filled() {
        let (_, device) = choose_device(None).expect("a device");
        let positions = PositionsConfig::Learned { max_seq_length: 8 };
        let model = EncoderConfig::new(23, 2, 12, 3)
            .with_positions(positions)
            .init(&device);
        let config = MaskedConfig::new(22, 20);
        let text = [vec![3, 4], vec![5], vec![]];
        let found = fill_masked(&model, &config, &text, 2, 3, &device).expect("short enough");
        assert_eq!(found.len(), 3);
        for found in &found {
            let lengths: Vec<usize> = found.holes.iter().map(Vec::len).collect();
            assert_eq!(lengths, [2, 2]);
        }
        let error = fill_masked(&model, &config, &text, 3, 3, &device).expect_err("nine tokens");
        assert!(
            error.to_string().contains("9 tokens, but the model has 8"),
            "{error}"
        );
    }

    #[test]
    fn spans_have_their_holes_in_order() {
        let (_, device) = choose_device(None).expect("a device");
        let model = EncoderDecoderConfig::new(30, 1, 1, 12, 3).init(&device);
        let config = SpansConfig::new(29, 5, 1, 0);
        let text = [vec![3, 4], vec![5], vec![6]];
        let found = fill_spans(&model, &config, &text, 3, 4, &device).expect("short enough");
        assert_eq!(found.len(), 4);
        for found in &found {
            assert_eq!(found.holes.len(), 2, "{found:?}");
            for hole in &found.holes {
                assert!((1..=3).contains(&hole.len()), "{found:?}");
                assert!(
                    hole.iter().all(|token| (2..25).contains(token)),
                    "{found:?}"
                );
            }
        }
        let six = vec![vec![2]; 7];
        let error = fill_spans(&model, &config, &six, 3, 4, &device).expect_err("six holes");
        assert!(
            error.to_string().contains("6 holes, but the model knows 5"),
            "{error}"
        );
    }

    #[test]
    fn a_completion_is_put_into_its_text() {
        let tokenizer = Tokenizer::bytes();
        let sentence: Sentence = "a ____ in ____.".parse().expect("two holes");
        let completion = Completion {
            holes: ["cat", "hats"].map(|text| tokenizer.encode(text)).to_vec(),
            log_probability: 0.0,
        };
        let parts = sentence.encode(&tokenizer);
        assert_eq!(completion.text(&parts, &tokenizer), "a cat in hats.");
    }
}
