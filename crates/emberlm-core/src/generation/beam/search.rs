//! The search over all prompts and groups, one pass of the model a step.

use burn::tensor::Device;

use super::{
    BeamConfig, Hypothesis,
    group::{Group, Step},
};
use crate::{
    CachedModel, GenerationError, InvalidConfig, LogitProcessors, SampleError,
    generation::rows::{Rows, Scores, log_sum_exp, longest, positions_for},
};

/// Beam search: keeps the `n_beams` likeliest beginnings, lengthens each by every token, and keeps the likeliest again.
///
/// Candidates, their number, the ranks at which a hypothesis may end, and the rules of stopping are those of Hugging
/// Face transformers 5, so that tokens and scores are the same. Three things differ. Where there are fewer
/// continuations than beams, there are fewer beams, and no hypotheses without probability in their place. Equal
/// candidates go by the order of their beams and tokens. And groups are there: transformers gave them up.
///
/// In each step all running hypotheses of all prompts are one batch. Its scores are read from the device once, and the
/// cache is reordered once ([`DecodingCache::select`](crate::DecodingCache::select)); prompts that are done leave it.
/// Prompts of different lengths are padded on the left: see [`BatchGenerator`](crate::BatchGenerator).
///
/// **Diverse groups** (Vijayakumar et al. 2016, <https://arxiv.org/abs/1610.02424>): each group is a beam search of
/// `n_beams / n_groups` beams. In each step the groups choose one after the other, and for a group a token's score is
/// `log p - diversity_penalty * c`, where `c` hypotheses of earlier groups have just got this token (Hamming
/// diversity). As in the paper the term belongs to its step alone; it is no part of a hypothesis' log-probability. The
/// first group is a plain beam search, and groups may find the same hypothesis.
///
/// ```
/// # use burn::tensor::{Device, Int, Tensor};
/// # use emberlm_core::{BeamConfig, BeamSearch, CachedModel, DecodingCache};
/// # struct Coin;
/// # struct Tosses(usize, Option<usize>);
/// # impl DecodingCache for Tosses {
/// #     fn len(&self) -> usize { self.0 }
/// #     fn truncate(&mut self, len: usize) { self.0 = len }
/// #     fn batch_size(&self) -> Option<usize> { self.1 }
/// #     fn select(&mut self, rows: &[usize]) { self.1 = Some(rows.len()) }
/// #     fn set_padding(&mut self, _: &[usize]) {}
/// # }
/// # impl CachedModel for Coin {
/// #     type Cache = Tosses;
/// #     fn max_seq_length(&self) -> Option<usize> { None }
/// #     fn new_cache(&self, _: usize) -> Tosses { Tosses(0, None) }
/// #     fn forward_cached(&self, tokens: Tensor<2, Int>, cache: &mut Tosses) -> Tensor<3> {
/// #         let [n_rows, length] = tokens.dims();
/// #         *cache = Tosses(cache.0 + length, Some(n_rows));
/// #         let scores = Tensor::<1>::from_floats([0.75_f32.ln(), 0.25_f32.ln()], &tokens.device());
/// #         scores.unsqueeze::<3>().repeat(&[n_rows, length, 1])
/// #     }
/// # }
/// # let device = Device::flex();
/// // A model that throws token 0 three times in four.
/// let model = Coin;
/// let config = BeamConfig::new(4, 2).with_n_best(4);
/// let found = BeamSearch::new(config)?.search(&model, &[[0]], &device)?;
/// let best = &found[0][0];
/// assert_eq!(best.tokens, [0, 0]);
/// assert!((best.log_probability - (0.75f64 * 0.75).ln()).abs() < 1e-6);
/// assert_eq!(found[0][3].tokens, [1, 1]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct BeamSearch<'a> {
    config: BeamConfig,
    processors: LogitProcessors<'a>,
}

impl<'a> BeamSearch<'a> {
    /// A search with these options.
    ///
    /// # Errors
    ///
    /// What [`BeamConfig::validate`] returns.
    pub fn new(mut config: BeamConfig) -> Result<Self, InvalidConfig> {
        config.validate()?;
        config.end_tokens.sort_unstable();
        config.end_tokens.dedup();
        Ok(Self {
            config,
            processors: LogitProcessors::new(),
        })
    }

    /// Changes the log-probabilities of all tokens before the candidates are chosen. Nothing normalises them again.
    pub fn with_processors(mut self, processors: LogitProcessors<'a>) -> Self {
        self.processors = processors;
        self
    }

    /// The best continuations of each prompt, best first: `n_best` of them, or all if there are fewer.
    ///
    /// # Errors
    ///
    /// An empty prompt, too few positions for the longest one and the new tokens, scores that are NaN or positive
    /// infinity, or no continuation at all.
    ///
    /// # Panics
    ///
    /// If prompts differ in length and the model's pattern depends on absolute positions.
    pub fn search<M: CachedModel, P: AsRef<[u32]>>(
        &mut self,
        model: &M,
        prompts: &[P],
        device: &Device,
    ) -> Result<Vec<Vec<Hypothesis>>, GenerationError> {
        let capacity = positions_for(model, longest(prompts)?, self.config.max_new_tokens)?;
        self.search_from(model, model.new_cache(capacity), prompts, device)
    }

    /// [`search`](Self::search) with a cache that holds no token, but perhaps a source for each prompt (which then is
    /// the start token of the target). It has room for the longest prompt and all new tokens but the last.
    ///
    /// # Errors
    ///
    /// As [`search`](Self::search).
    ///
    /// # Panics
    ///
    /// As [`search`](Self::search); and if the cache has another number of rows than there are prompts.
    pub fn search_from<M: CachedModel, P: AsRef<[u32]>>(
        &mut self,
        model: &M,
        cache: M::Cache,
        prompts: &[P],
        device: &Device,
    ) -> Result<Vec<Vec<Hypothesis>>, GenerationError> {
        positions_for(model, longest(prompts)?, self.config.max_new_tokens)?;
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let mut sources: Vec<Source> = (0..)
            .zip(prompts)
            .map(|(row, prompt)| Source::new(&self.config, prompt.as_ref(), row))
            .collect();
        let mut rows = Rows::new(model, cache, device);
        let mut scores = rows.begin(prompts);
        for n_new in 1.. {
            let log_probabilities = self.log_probabilities(&scores, &sources)?;
            for source in &mut sources {
                source.advance(&self.config, n_new, &log_probabilities);
            }
            let (parents, tokens) = number_rows(&mut sources);
            if parents.is_empty() {
                break;
            }
            rows.select(&parents);
            scores = rows.step(&tokens);
        }
        let vocab_size = scores.vocab_size();
        let best = sources.into_iter().map(|source| {
            let best = source.best(self.config.n_best);
            match best.is_empty() {
                true => Err(SampleError::NoCandidate { vocab_size }.into()),
                false => Ok(best),
            }
        });
        best.collect()
    }

    /// Of each token in each row, as the processors leave them.
    fn log_probabilities(
        &mut self,
        scores: &Scores,
        sources: &[Source],
    ) -> Result<Vec<Vec<f64>>, SampleError> {
        let mut texts = vec![(&[][..], 0); scores.n_rows()];
        for source in sources {
            for beam in source.groups.iter().flat_map(|group| &group.running) {
                texts[beam.row] = (&beam.text[..], source.n_prompt);
            }
        }
        let rows = texts
            .into_iter()
            .enumerate()
            .map(|(row, (text, n_prompt))| {
                let scores = scores.row(row)?;
                let log_sum = log_sum_exp(scores);
                // Without a finite score there is nothing to subtract.
                let log_sum = if log_sum.is_finite() { log_sum } else { 0.0 };
                let mut row = scores.iter().map(|score| score - log_sum).collect();
                self.processors.process_f64(text, n_prompt, &mut row)?;
                Ok(row)
            });
        rows.collect()
    }
}

/// The search after one prompt.
struct Source {
    n_prompt: usize,
    groups: Vec<Group>,
}

impl Source {
    fn new(config: &BeamConfig, prompt: &[u32], row: usize) -> Self {
        let n_beams = config.n_beams / config.n_groups;
        let groups = (0..config.n_groups).map(|_| Group::new(n_beams, prompt, row));
        Self {
            n_prompt: prompt.len(),
            groups: groups.collect(),
        }
    }

    fn advance(&mut self, config: &BeamConfig, n_new: usize, log_probabilities: &[Vec<f64>]) {
        let Some(first) = log_probabilities.first() else {
            return;
        };
        let step = Step {
            config,
            n_prompt: self.n_prompt,
            n_new,
            log_probabilities,
        };
        let mut penalties = vec![0.0; first.len()];
        for group in &mut self.groups {
            for token in group.advance(&step, &penalties) {
                penalties[token as usize] += config.diversity_penalty;
            }
        }
    }

    /// The best hypotheses of all groups.
    fn best(self, n_best: usize) -> Vec<Hypothesis> {
        let groups = self.groups.into_iter();
        let mut all: Vec<Hypothesis> = groups.flat_map(|group| group.finished).collect();
        all.sort_by(|a, b| b.score.total_cmp(&a.score));
        all.truncate(n_best);
        all
    }
}

/// Gives the running hypotheses the rows of the next pass: returns which row each goes on from, and its last token.
fn number_rows(sources: &mut [Source]) -> (Vec<usize>, Vec<u32>) {
    let (mut parents, mut tokens) = (Vec::new(), Vec::new());
    let groups = sources.iter_mut().flat_map(|source| &mut source.groups);
    for beam in groups.flat_map(|group| &mut group.running) {
        tokens.push(beam.last_token());
        parents.push(std::mem::replace(&mut beam.row, parents.len()));
    }
    (parents, tokens)
}
