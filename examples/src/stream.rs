//! Decoding with a cache of bounded memory: texts without an end.

use burn::tensor::{Device, Int, Tensor, TensorData};
use clap::ValueEnum;
use emberlm::{
    core::{CachePositions, CachedModel, CrossEntropyConfig},
    models::{Decoder, StackCache},
};

use crate::{Score, SlidingError};

/// What a decoder keeps of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CacheKind {
    /// Everything.
    Dense,
    /// What the pattern shows to later tokens; positions are those of the text.
    Ring,
    /// As ring; positions count within the cache, as StreamingLLM has it.
    InCache,
}

impl CacheKind {
    /// What positions count, if memory is bounded.
    pub fn positions(self) -> Option<CachePositions> {
        match self {
            Self::Dense => None,
            Self::Ring => Some(CachePositions::Absolute),
            Self::InCache => Some(CachePositions::InCache),
        }
    }
}

// Tokens in a pass of the model.
const PART: usize = 64;

/// Scores every token of a text but the first, which is read once from its beginning to its end. `watch` is told the
/// figures of each part as it is read.
///
/// # Errors
///
/// [`SlidingError::TooShort`], and those of `watch`.
pub fn score_stream(
    model: &Decoder,
    mut cache: StackCache,
    tokens: impl IntoIterator<Item = u32>,
    device: &Device,
    mut watch: impl FnMut(&Score) -> Result<(), SlidingError>,
) -> Result<Score, SlidingError> {
    let mut tokens = tokens.into_iter();
    let mut part: Vec<i64> = tokens.by_ref().take(1).map(i64::from).collect();
    let mut all = Score::default();
    loop {
        let n_known = part.len();
        part.extend(tokens.by_ref().take(PART).map(i64::from));
        let n_new = part.len() - n_known;
        if n_new == 0 {
            break;
        }
        let score = score_part(model, &part, &mut cache, device);
        all.nll_sum += score.nll_sum;
        all.n_tokens += score.n_tokens;
        watch(&score)?;
        part.drain(..n_new);
    }
    match all.n_tokens {
        0 => Err(SlidingError::TooShort {
            n_tokens: part.len(),
        }),
        _ => Ok(all),
    }
}

/// Reads all but the last of some tokens, and scores all but the first.
fn score_part(model: &Decoder, part: &[i64], cache: &mut StackCache, device: &Device) -> Score {
    let n = part.len() - 1;
    let inputs = TensorData::new(part[..n].to_vec(), [1, n]);
    let targets = TensorData::new(part[1..].to_vec(), [n]);
    let scores = model.forward_cached(Tensor::<2, Int>::from_data(inputs, device), cache);
    let targets = Tensor::<1, Int>::from_data(targets, device);
    let loss = CrossEntropyConfig::new().forward(scores.squeeze_dim(0), targets);
    Score {
        nll_sum: f64::from(loss.nll_sum.into_scalar::<f32>()),
        n_tokens: n,
    }
}
