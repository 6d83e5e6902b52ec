//! Loads a run and writes text.
//!
//! cargo run --release --example generate -- --run runs/0001 --prompt "It is a truth"

use std::{
    io::{Write, stdout},
    path::PathBuf,
    process::ExitCode,
    time::Instant,
};

use clap::Parser;
use emberlm::core::{
    CachedModel, GenerationError, Generator, SamplingConfig, StopStrings, Utf8Stream,
};
use emberlm_examples::{AttentionChoice, CacheKind, LoadedRun, RunModel, choose_device, exit_with};

/// Write text with a trained model
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The run's folder
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// The text to continue
    #[arg(long)]
    prompt: String,
    /// Tokens to write at most
    #[arg(long, default_value_t = 400, value_parser = clap::value_parser!(u32).range(..=1_000_000))]
    max_tokens: u32,
    /// Always take the likeliest token; the same as --temperature 0
    #[arg(long)]
    greedy: bool,
    /// Below 1 sharper, above 1 flatter
    #[arg(long, default_value_t = 0.8)]
    temperature: f64,
    /// Choose among the K likeliest tokens
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    /// Choose among the likeliest tokens that make up this share of the probability
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Leave out tokens below this share of the likeliest one's probability
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Above 1 makes what is in the text already less likely
    #[arg(long, default_value_t = 1.0)]
    repetition_penalty: f64,
    /// Stop before this string; may be given several times
    #[arg(long, value_name = "STRING")]
    stop: Vec<String>,
    /// What is kept of the text: dense keeps all, the others what the pattern shows to later tokens
    #[arg(long, value_enum, default_value = "dense")]
    cache: CacheKind,
    /// Which tokens a token sees, instead of what the model was trained with
    #[arg(long, value_name = "PATTERN")]
    pattern: Option<AttentionChoice>,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Device, such as flex, ndarray, vulkan:0
    #[arg(long)]
    device: Option<String>,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(generate(&Args::parse()))
}

fn generate(args: &Args) -> Result<(), AnyError> {
    let mut sampling = SamplingConfig::default()
        .with_temperature(if args.greedy { 0.0 } else { args.temperature })
        .with_top_k(args.top_k)
        .with_top_p(args.top_p)
        .with_min_p(args.min_p)
        .with_repetition_penalty(args.repetition_penalty);
    sampling.seed = args.seed;
    sampling.validate()?;
    let mut stops = StopStrings::new(args.stop.clone())?;
    if args.prompt.is_empty() {
        return Err(GenerationError::EmptyPrompt.into());
    }
    let (device_name, device) = choose_device(args.device.as_deref())?;
    let run = LoadedRun::load_with(&args.run, args.pattern.as_ref(), &device)?;
    let RunModel::Decoder(model) = &run.model else {
        return Err(run.unfit(&args.run));
    };
    let tokenizer = &run.tokenizer;
    let prompt = tokenizer.encode(&args.prompt);
    let max_tokens = args.max_tokens as usize;
    let mut generator = match args.cache.positions() {
        None => Generator::new(model, &prompt, max_tokens, sampling, &device)?,
        Some(positions) => {
            let cache = model.new_ring_cache(positions)?;
            Generator::from_cache(model, cache, &prompt, max_tokens, sampling, &device)?
        }
    };
    eprintln!("device: {device_name}");
    let mut characters = Utf8Stream::new();
    let begin = Instant::now();
    let mut n_tokens = 0;
    let mut told = false;
    show(&args.prompt)?;
    while let Some(token) = generator.next() {
        n_tokens += 1;
        if generator.n_slides() > 0 && !told {
            told = true;
            let longest = model.max_seq_length().unwrap_or(usize::MAX);
            eprintln!(
                "\nthe text is longer than the {longest} positions of the model: from here on it sees the last half of them again"
            );
        }
        show(&stops.push(&characters.push(&tokenizer.decode_bytes(&[token?]))))?;
        if stops.is_stopped() {
            break;
        }
    }
    if !stops.is_stopped() {
        show(&stops.push(&characters.finish()))?;
        show(&stops.finish())?;
    }
    let seconds = begin.elapsed().as_secs_f64();
    show("\n")?;
    eprintln!(
        "{n_tokens} tokens in {seconds:.2} s, {:.0} tokens/s",
        n_tokens as f64 / seconds
    );
    Ok(())
}

fn show(text: &str) -> std::io::Result<()> {
    stdout().write_all(text.as_bytes())?;
    stdout().flush()
}
