//! Completes a sentence with a hole.
//!
//! cargo run --release --example fill -- --run runs/0001 "It is a ____ universally acknowledged"

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use emberlm::training::Objective;
use emberlm_examples::{
    LoadedRun, RunModel, Sentence, choose_device, complain, exit_with, fill_masked, fill_spans, say,
};

/// Complete a sentence with a model that was trained with objective masked or spans
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The run's folder
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// The sentence; each hole is written ____ or <mask>
    sentence: String,
    /// Tokens that are missing in each hole; with objective spans, so many at most [default: 1, of bytes 5; with
    /// objective spans 10, of bytes 40]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    tokens: Option<u16>,
    /// How many completions to print
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    best: u16,
    /// Device, such as flex, ndarray, vulkan:0
    #[arg(long)]
    device: Option<String>,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(fill(&Args::parse()))
}

fn fill(args: &Args) -> Result<(), AnyError> {
    let sentence: Sentence = args.sentence.parse()?;
    let (device_name, device) = choose_device(args.device.as_deref())?;
    let run = LoadedRun::load(&args.run, &device)?;
    let tokenizer = &run.tokenizer;
    let parts = sentence.encode(tokenizer);
    let n_best = usize::from(args.best);
    let n_tokens = |of_words, of_bytes| match (args.tokens, tokenizer.is_bytes()) {
        (Some(n), _) => usize::from(n),
        (None, true) => of_bytes,
        (None, false) => of_words,
    };
    let completions = match (&run.model, &run.config.objective) {
        (RunModel::Encoder(model), Objective::Masked(config)) => {
            fill_masked(model, config, &parts, n_tokens(1, 5), n_best, &device)?
        }
        (RunModel::EncoderDecoder(model), Objective::Spans(config)) => {
            fill_spans(model, config, &parts, n_tokens(10, 40), n_best, &device)?
        }
        _ => return Err(run.unfit(&args.run)),
    };
    complain(format_args!("device: {device_name}"));
    for completion in &completions {
        let percent = 100.0 * completion.log_probability.exp();
        let text = completion.text(&parts, tokenizer);
        say(format_args!("{percent:>6.2} %  {text}"));
    }
    Ok(())
}
