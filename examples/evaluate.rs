//! Measures the loss of a model on any text.
//!
//! cargo run --release --example evaluate -- --run runs/0001 --text novel.txt

use std::{f64::consts::LN_2, path::PathBuf, process::ExitCode, time::Instant};

use clap::Parser;
use emberlm::{
    core::CachedModel,
    text::{MappedText, Tokenizer},
    training::short_duration,
};
use emberlm_examples::{
    LoadedRun, RunModel, Score, SlidingConfig, SlidingError, Stop, Work, choose_device, complain,
    exit_with, say, score,
};
use serde::Serialize;

/// Measure loss, perplexity and bits per byte of a text
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The run's folder
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// The text, a UTF-8 file
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// Tokens that the model reads at once [default: as many as it was trained on]
    #[arg(long, value_name = "N")]
    window: Option<usize>,
    /// By how many tokens the window moves on: every token has at least window - stride before it [default: half the
    /// window]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Windows in a pass of the model
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    batch_size: u16,
    /// Print the figures as JSON
    #[arg(long)]
    json: bool,
    /// Device, such as flex, ndarray, vulkan:0
    #[arg(long)]
    device: Option<String>,
}

/// The figures of a text.
#[derive(Serialize)]
struct Figures {
    run: PathBuf,
    text: PathBuf,
    window: usize,
    stride: usize,
    /// Tokens that were scored: all but the first.
    tokens: usize,
    /// Size of the text that they are of.
    bytes: usize,
    /// In nats per token.
    loss: f64,
    perplexity: f64,
    bits_per_byte: f64,
    seconds: f64,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(evaluate(&Args::parse()))
}

fn evaluate(args: &Args) -> Result<(), AnyError> {
    let (device_name, device) = choose_device(args.device.as_deref())?;
    let run = LoadedRun::load(&args.run, &device)?;
    let RunModel::Decoder(model) = &run.model else {
        return Err(run.unfit(&args.run));
    };
    let window = args.window.unwrap_or(run.config.training.seq_length);
    let config = SlidingConfig {
        window,
        stride: args.stride.unwrap_or(window.div_ceil(2)),
        batch_size: usize::from(args.batch_size),
    };
    config.validate(model.max_seq_length())?;
    let text = MappedText::open(&args.text)?;
    let stop = Stop::on_signals()?;
    let begin = Instant::now();
    let mut tokens = Streamed::new(&run.tokenizer, text.as_bytes());
    let mut work = Work::new("reading the text", "bytes").on_standard_error();
    // Only once there is something to score: a text that is too short is told by one line.
    let mut device_name = Some(device_name);
    let watch = |_: &Score| {
        if let Some(name) = device_name.take() {
            complain(format_args!("device: {name}"));
        }
        match stop.requested() {
            true => Err(SlidingError::Stopped),
            false => Ok(()),
        }
    };
    let tell = |bytes: usize| work.tell(bytes as u64, text.as_bytes().len() as u64);
    let score = score(model, tokens.iter(tell), &config, &device, watch)?;
    let bytes = text.as_bytes().len() - tokens.first_bytes;
    let figures = Figures {
        run: args.run.clone(),
        text: args.text.clone(),
        window: config.window,
        stride: config.stride,
        tokens: score.n_tokens,
        bytes,
        loss: score.loss(),
        perplexity: score.loss().exp(),
        bits_per_byte: score.nll_sum / LN_2 / bytes as f64,
        seconds: begin.elapsed().as_secs_f64(),
    };
    if args.json {
        say(serde_json::to_string_pretty(&figures)?);
        return Ok(());
    }
    say(format_args!(
        "{} tokens of {} bytes in {}, windows of {} and stride {}: loss {:.4} nats per token, perplexity {:.3}, {:.4} bits per byte",
        figures.tokens,
        figures.bytes,
        short_duration(begin.elapsed()),
        figures.window,
        figures.stride,
        figures.loss,
        figures.perplexity,
        figures.bits_per_byte
    ));
    Ok(())
}

// Bytes that are tokenised at once.
const PART: usize = 1 << 16;

/// The tokens of a text, of which no more than a part is held.
struct Streamed<'a> {
    tokenizer: &'a Tokenizer,
    text: &'a [u8],
    /// Size of the first token, which nothing predicts.
    first_bytes: usize,
}

impl<'a> Streamed<'a> {
    fn new(tokenizer: &'a Tokenizer, text: &'a [u8]) -> Self {
        Self {
            tokenizer,
            text,
            first_bytes: 0,
        }
    }

    /// `tell` is told how many bytes were tokenised.
    fn iter(&mut self, mut tell: impl FnMut(usize)) -> impl Iterator<Item = u32> {
        let Self {
            tokenizer,
            text,
            first_bytes,
        } = self;
        let mut done = 0;
        let parts = tokenizer.encode_parts(text, PART);
        parts.flat_map(move |tokens| {
            if done == 0 {
                *first_bytes = tokenizer.decode_bytes(&tokens[..1]).len();
            }
            done += tokenizer.decode_bytes(&tokens).len();
            tell(done.min(text.len()));
            tokens
        })
    }
}
