//! What `benches/peers/translate.py` needs to do the same: weights, batches, and answers to its commands.

use std::{
    error::Error,
    fs,
    io::{BufRead, BufWriter, Write},
    path::Path,
    time::Instant,
};

use burn::{data::dataloader::DataLoader, module::Module};
use emberlm::{
    models::{EncoderDecoder, save_weights},
    training::{LanguageModel, PairBatches, PairLoader, Session, TokenPair, TrainingConfig},
};
use serde_json::json;

use crate::Sentences;

type AnyError = Box<dyn Error>;

/// Writes `start.safetensors`, `batches.jsonl` with the batches of all steps, and `tokenizer.json` into a folder.
///
/// # Errors
///
/// A file that cannot be written.
pub fn export(
    folder: &Path,
    model: &EncoderDecoder,
    sentences: &Sentences,
    pairs: &[TokenPair],
    training: &TrainingConfig,
) -> Result<(), AnyError> {
    fs::create_dir_all(folder)?;
    save_weights(model, &folder.join("start.safetensors"))?;
    sentences.tokenizer.save(folder.join("tokenizer.json"))?;
    let mut file = BufWriter::new(fs::File::create(folder.join("batches.jsonl"))?);
    let batches = PairBatches::new(pairs.into(), training.tokens_per_step(), training.seed);
    for rows in batches.from(0).take(training.steps as usize) {
        let side = |side: fn(&TokenPair) -> &Vec<u32>| -> Vec<&Vec<u32>> {
            rows.iter().map(|i| side(&pairs[*i])).collect()
        };
        let (source, target) = (side(|pair| &pair.source), side(|pair| &pair.target));
        serde_json::to_writer(&mut file, &json!({"source": source, "target": target}))?;
        writeln!(file)?;
    }
    Ok(file.flush()?)
}

/// Answers each `steps N` of `input` with the figures of the next N steps, as a line of JSON, after a line with its name
/// and the number of parameters.
///
/// # Errors
///
/// A line that is no command, or output that cannot be written.
pub fn serve(
    model: EncoderDecoder,
    loader: &PairLoader,
    training: &TrainingConfig,
    input: impl BufRead,
    mut output: impl Write,
) -> Result<(), AnyError> {
    let model = LanguageModel::with_config(model, training);
    let mut session = Session::new(model, training);
    let mut batches = loader.iter();
    let parameters = session.model.num_params();
    writeln!(
        output,
        "{}",
        json!({"contender": "emberlm", "parameters": parameters})
    )?;
    output.flush()?;
    for line in input.lines() {
        let line = line?;
        let n_steps = match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["steps", n] => n.parse().ok().filter(|n: &u32| *n > 0),
            _ => None,
        };
        let Some(n_steps) = n_steps else {
            return Err(format!("not a command: {}", line.trim()).into());
        };
        let (mut times, mut losses, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..n_steps {
            // Making the tensors of a batch is not in the times.
            let step: Vec<_> = batches.by_ref().take(training.accumulation).collect();
            let begin = Instant::now();
            let (figures, _) = session.step(training, &mut step.into_iter())?;
            times.push(begin.elapsed().as_secs_f64() * 1e3);
            losses.push(figures.loss());
            tokens.push(figures.n_targets as u64);
        }
        let answer = json!({
            "step_ms": times,
            "losses": losses,
            "target_tokens": tokens,
            "median_step_ms": median(&times),
        });
        writeln!(output, "{answer}")?;
        output.flush()?;
    }
    Ok(())
}

/// Of numbers of which there is at least one.
fn median(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let (n, half) = (values.len(), values.len() / 2);
    if n % 2 == 1 {
        values[half]
    } else {
        (values[half - 1] + values[half]) / 2.0
    }
}
