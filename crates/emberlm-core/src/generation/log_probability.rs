//! How probable given texts are.

use burn::tensor::{Device, Int, Tensor, TensorData, activation::log_softmax, s};

use super::rows::{longest, positions_for};
use crate::{CachedModel, GenerationError, SampleError};

/// Positions of a pass: scores of all tokens of the vocabulary are held for so many.
const PASS: usize = 128;

/// The natural logarithm of the probability of each token given those before it, `ln p(y_t | y_<t)`, for `t` from the
/// second token on: sequence `i` gets `sequences[i].len() - 1` numbers.
///
/// Sequences may have different lengths. Shorter ones are filled up behind their end, which no pattern of a causal
/// model sees, so that any model can do this.
///
/// # Errors
///
/// A sequence without a token, one longer than the model, or scores that are NaN.
pub fn log_probabilities<M: CachedModel, P: AsRef<[u32]>>(
    model: &M,
    sequences: &[P],
    device: &Device,
) -> Result<Vec<Vec<f64>>, GenerationError> {
    let capacity = longest(sequences)?.saturating_sub(1);
    log_probabilities_from(model, &mut model.new_cache(capacity), sequences, device)
}

/// [`log_probabilities`] after what is in a cache: a source for each sequence. It has room for the longest sequence
/// without its last token.
///
/// # Errors
///
/// As [`log_probabilities`].
///
/// # Panics
///
/// If the cache has another number of rows than there are sequences.
pub fn log_probabilities_from<M: CachedModel, P: AsRef<[u32]>>(
    model: &M,
    cache: &mut M::Cache,
    sequences: &[P],
    device: &Device,
) -> Result<Vec<Vec<f64>>, GenerationError> {
    let n_inputs = longest(sequences)?.saturating_sub(1);
    positions_for(model, n_inputs, 0)?;
    let sequences: Vec<&[u32]> = sequences.iter().map(AsRef::as_ref).collect();
    let mut found: Vec<Vec<f64>> = vec![Vec::new(); sequences.len()];
    let tokens = padded(&sequences, n_inputs + 1, device);
    for begin in (0..n_inputs).step_by(PASS) {
        let end = n_inputs.min(begin + PASS);
        let scores = model.forward_cached(tokens.clone().slice(s![.., begin..end]), cache);
        let targets = tokens.clone().slice(s![.., begin + 1..end + 1]);
        let picked = log_softmax(scores, 2).gather(2, targets.unsqueeze_dim(2));
        let picked: Vec<f64> = picked.into_data().iter().collect();
        for (row, found) in found.iter_mut().enumerate() {
            let n_real = (sequences[row].len() - 1).clamp(begin, end) - begin;
            found.extend_from_slice(&picked[row * (end - begin)..][..n_real]);
        }
    }
    for (sequence, found) in sequences.iter().zip(&found) {
        if let Some(t) = found.iter().position(|x| x.is_nan()) {
            return Err(SampleError::Logit {
                token: sequence[t + 1] as usize,
                value: f32::NAN,
            }
            .into());
        }
    }
    Ok(found)
}

/// The sequences, filled up with token 0 behind their ends: `[batch_size, length]`.
fn padded(sequences: &[&[u32]], length: usize, device: &Device) -> Tensor<2, Int> {
    let tokens = sequences.iter().flat_map(|sequence| {
        let tokens = sequence.iter().copied().chain(std::iter::repeat(0));
        tokens.take(length).map(i64::from)
    });
    let tokens = TensorData::new(tokens.collect::<Vec<_>>(), [sequences.len(), length]);
    Tensor::from_data(tokens, device)
}
