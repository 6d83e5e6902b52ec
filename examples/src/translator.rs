//! Translating with an encoder-decoder.

use burn::tensor::{Device, Int, Tensor};
use emberlm::{
    core::{
        BatchGenerator, BeamConfig, BeamSearch, CachedModel, GenerationError, InvalidConfig,
        LengthPenalty, SamplingConfig, Source,
    },
    models::EncoderDecoder,
};
use thiserror::Error;

use crate::Sentences;

/// How a translation is searched for.
#[derive(Debug, Clone, Copy)]
pub struct Search {
    /// Hypotheses side by side; one is greedy.
    pub n_beams: usize,
    /// Their log-probability is divided by their length to this power.
    pub length_penalty: f64,
}

impl Search {
    /// The likeliest token, always.
    pub const GREEDY: Self = Self {
        n_beams: 1,
        length_penalty: 1.0,
    };

    /// Checks the options.
    ///
    /// # Errors
    ///
    /// No beams, or a penalty that is not finite.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        self.beams(1, 0).validate()
    }

    fn beams(&self, max_new_tokens: usize, end: u32) -> BeamConfig {
        BeamConfig::new(self.n_beams, max_new_tokens)
            .with_end_tokens(vec![end])
            .with_length_penalty(LengthPenalty::HuggingFace(self.length_penalty))
    }
}

/// Why a text cannot be translated.
#[derive(Debug, Error)]
pub enum TranslationError {
    /// There is no position for its last tokens.
    #[error(
        "the text has {n_tokens} tokens, the model has positions for {longest}: give a shorter one"
    )]
    TooLong {
        /// Tokens of the text, its end token included.
        n_tokens: usize,
        /// Positions of the model.
        longest: usize,
    },
    /// Nothing can be generated.
    #[error(transparent)]
    Generation(#[from] GenerationError),
}

/// A model and its sentences.
pub struct Translator<'a> {
    /// The model, without autodiff.
    pub model: &'a EncoderDecoder,
    /// Its tokens.
    pub sentences: &'a Sentences,
    /// Where it is.
    pub device: &'a Device,
}

// Sentences that are translated together, times beams.
const ROWS_AT_ONCE: usize = 50;

impl Translator<'_> {
    /// The translation of one text.
    ///
    /// # Errors
    ///
    /// A text longer than the model's positions, or options that are invalid.
    pub fn translate(&self, text: &str, search: &Search) -> Result<String, TranslationError> {
        let tokens = self.tokens(&[self.sentences.source(text)], search)?;
        Ok(self.sentences.text(&tokens[0]))
    }

    /// The tokens of the translations of many sources, in their order. Sources of like length are translated together.
    /// `progress` is told how many are done; it may end the work, and then there is no result.
    ///
    /// # Errors
    ///
    /// As [`translate`](Self::translate).
    pub fn translate_all(
        &self,
        sources: &[Vec<u32>],
        search: &Search,
        mut progress: impl FnMut(usize) -> bool,
    ) -> Result<Option<Vec<Vec<u32>>>, TranslationError> {
        let mut order: Vec<usize> = (0..sources.len()).collect();
        order.sort_by_key(|&i| sources[i].len());
        let mut translations = vec![Vec::new(); sources.len()];
        let mut done = 0;
        for rows in order.chunks((ROWS_AT_ONCE / search.n_beams).max(1)) {
            let chosen: Vec<&[u32]> = rows.iter().map(|&i| &sources[i][..]).collect();
            for (i, tokens) in rows.iter().zip(self.tokens(&chosen, search)?) {
                translations[*i] = tokens;
            }
            done += rows.len();
            if !progress(done) {
                return Ok(None);
            }
        }
        Ok(Some(translations))
    }

    /// At most twice as many tokens as the longest source and 16 more, as the positions allow.
    fn tokens<R: AsRef<[u32]>>(
        &self,
        sources: &[R],
        search: &Search,
    ) -> Result<Vec<Vec<u32>>, TranslationError> {
        let lengths = sources.iter().map(|source| source.as_ref().len());
        let n_tokens = lengths.max().unwrap_or(0);
        let longest = self.model.max_seq_length().unwrap_or(usize::MAX);
        if n_tokens > longest {
            return Err(TranslationError::TooLong { n_tokens, longest });
        }
        let Sentences { begin, end, .. } = *self.sentences;
        let limit = (2 * n_tokens + 16).min(longest);
        let cache = self
            .model
            .start(Source::padded(sources, self.device), limit);
        let prompts = vec![[begin]; sources.len()];
        if search.n_beams == 1 {
            let greedy = SamplingConfig::default().with_temperature(0.0);
            let (model, device) = (self.model, self.device);
            let generator =
                BatchGenerator::from_cache(model, cache, &prompts, limit, greedy, device)?;
            let generated = generator.with_end_tokens(vec![end]).run()?;
            return Ok(generated.into_iter().map(|text| text.tokens).collect());
        }
        let mut beams = BeamSearch::new(search.beams(limit, end)).map_err(GenerationError::from)?;
        let found = beams.search_from(self.model, cache, &prompts, self.device)?;
        let best = found.into_iter().filter_map(|mut best| best.pop());
        Ok(best.map(|best| best.tokens).collect())
    }

    /// How much each token that the decoder writes takes of each token of the source, in the last block, as the mean
    /// over heads: a row of the source's tokens for each of `target`, whose first token is the start token.
    ///
    /// # Errors
    ///
    /// Sequences longer than the model's positions.
    pub fn attention(
        &self,
        source: &[u32],
        target: &[u32],
    ) -> Result<Vec<Vec<f32>>, TranslationError> {
        let n_tokens = source.len().max(target.len());
        let longest = self.model.max_seq_length().unwrap_or(usize::MAX);
        if n_tokens > longest {
            return Err(TranslationError::TooLong { n_tokens, longest });
        }
        let read: Vec<i32> = target.iter().map(|token| *token as i32).collect();
        let read = Tensor::<1, Int>::from_ints(&read[..], self.device).unsqueeze();
        let weights = (self.model).cross_attention(Source::padded(&[source], self.device), read);
        let mean = weights.mean_dim(1).into_data();
        let mean: Vec<f32> = mean.iter::<f32>().collect();
        Ok(mean.chunks(source.len()).map(<[f32]>::to_vec).collect())
    }
}
