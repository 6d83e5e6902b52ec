//! Measures the loss of a model on any text.
//!
//! cargo run --release --example evaluate -- --run runs/0001 --text novel.txt

use std::{
    f64::consts::LN_2,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::{Parser, ValueEnum};
use emberlm::{
    core::CachedModel,
    models::{Decoder, StackCache},
    text::{MappedText, Tokenizer},
    training::short_duration,
};
use emberlm_examples::{
    AttentionChoice, CacheKind, LoadedRun, RunModel, Score, SlidingConfig, SlidingError, Stop,
    Work, choose_device, complain, exit_with, say, score, score_stream,
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
    /// Read the text once, from its beginning to its end, with a cache that keeps what the pattern shows to later tokens
    #[arg(long, value_enum, conflicts_with_all = ["window", "stride"])]
    cache: Option<CacheKind>,
    /// With --cache: tell the loss of so many tokens at a time too
    #[arg(long, value_name = "TOKENS", requires = "cache", value_parser = clap::value_parser!(u32).range(1..))]
    spans: Option<u32>,
    /// Which tokens a token sees, instead of what the model was trained with
    #[arg(long, value_name = "PATTERN")]
    pattern: Option<AttentionChoice>,
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
    #[serde(flatten)]
    way: Way,
    /// Tokens that were scored: all but the first.
    tokens: usize,
    /// Size of the text that they are of.
    bytes: usize,
    /// In nats per token.
    loss: f64,
    perplexity: f64,
    bits_per_byte: f64,
    seconds: f64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    spans: Vec<SpanFigures>,
}

/// How the text was read.
#[derive(Serialize)]
#[serde(untagged)]
enum Way {
    Windows { window: usize, stride: usize },
    Cache { cache: String },
}

/// The loss of some tokens of the text.
#[derive(Serialize)]
struct SpanFigures {
    /// How many were scored before.
    from: usize,
    tokens: usize,
    loss: f64,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(evaluate(&Args::parse()))
}

fn evaluate(args: &Args) -> Result<(), AnyError> {
    let (device_name, device) = choose_device(args.device.as_deref())?;
    let run = LoadedRun::load_with(&args.run, args.pattern.as_ref(), &device)?;
    let RunModel::Decoder(model) = &run.model else {
        return Err(run.unfit(&args.run));
    };
    let way = way(args, &run, model)?;
    let text = MappedText::open(&args.text)?;
    let stop = Stop::on_signals()?;
    let begin = Instant::now();
    let mut tokens = Streamed::new(&run.tokenizer, text.as_bytes());
    let mut work = Work::new("reading the text", "bytes").on_standard_error();
    // Only once there is something to score: a text that is too short is told by one line.
    let mut device_name = Some(device_name);
    let mut watch = || {
        if let Some(name) = device_name.take() {
            complain(format_args!("device: {name}"));
        }
        match stop.requested() {
            true => Err(SlidingError::Stopped),
            false => Ok(()),
        }
    };
    let tell = |bytes: usize| work.tell(bytes as u64, text.as_bytes().len() as u64);
    let mut spans = Spans::new(args.spans);
    let score = match &way {
        Reading::Windows(config) => score(model, tokens.iter(tell), config, &device, |_| watch())?,
        Reading::Cache(cache) => score_stream(
            model,
            (**cache).clone(),
            tokens.iter(tell),
            &device,
            |score| {
                spans.add(score);
                watch()
            },
        )?,
    };
    drop(work);
    let bytes = text.as_bytes().len() - tokens.first_bytes;
    let figures = Figures {
        run: args.run.clone(),
        text: args.text.clone(),
        way: way.describe(args),
        tokens: score.n_tokens,
        bytes,
        loss: score.loss(),
        perplexity: score.loss().exp(),
        bits_per_byte: score.nll_sum / LN_2 / bytes as f64,
        seconds: begin.elapsed().as_secs_f64(),
        spans: spans.finish(),
    };
    if args.json {
        say(serde_json::to_string_pretty(&figures)?);
    } else {
        figures.say(begin.elapsed());
    }
    Ok(())
}

/// How the text is to be read.
enum Reading {
    Windows(SlidingConfig),
    Cache(Box<StackCache>),
}

fn way(args: &Args, run: &LoadedRun, model: &Decoder) -> Result<Reading, AnyError> {
    if let Some(kind) = args.cache {
        let Some(positions) = kind.positions() else {
            return Err("--cache dense would hold the whole text: take ring or in-cache, or leave it away for windows".into());
        };
        return Ok(Reading::Cache(Box::new(model.new_ring_cache(positions)?)));
    }
    let window = args.window.unwrap_or(run.config.training.seq_length);
    let config = SlidingConfig {
        window,
        stride: args.stride.unwrap_or(window.div_ceil(2)),
        batch_size: usize::from(args.batch_size),
    };
    config.validate(model.max_seq_length())?;
    Ok(Reading::Windows(config))
}

impl Reading {
    fn describe(&self, args: &Args) -> Way {
        match self {
            Self::Windows(config) => Way::Windows {
                window: config.window,
                stride: config.stride,
            },
            Self::Cache(_) => {
                let kind = args.cache.and_then(|kind| kind.to_possible_value());
                let name = kind.map(|kind| kind.get_name().to_owned());
                Way::Cache {
                    cache: name.unwrap_or_default(),
                }
            }
        }
    }
}

/// The losses of spans of equal length.
struct Spans {
    length: Option<usize>,
    done: Vec<SpanFigures>,
    current: Score,
}

impl Spans {
    fn new(length: Option<u32>) -> Self {
        Self {
            length: length.map(|length| length as usize),
            done: Vec::new(),
            current: Score::default(),
        }
    }

    /// A part belongs to the span in which it ends.
    fn add(&mut self, part: &Score) {
        self.current.nll_sum += part.nll_sum;
        self.current.n_tokens += part.n_tokens;
        if self
            .length
            .is_some_and(|length| self.current.n_tokens >= length)
        {
            self.close();
        }
    }

    fn close(&mut self) {
        let from = self.done.iter().map(|span| span.tokens).sum();
        let Score { n_tokens, .. } = self.current;
        self.done.push(SpanFigures {
            from,
            tokens: n_tokens,
            loss: self.current.loss(),
        });
        self.current = Score::default();
    }

    fn finish(mut self) -> Vec<SpanFigures> {
        if self.length.is_some() && self.current.n_tokens > 0 {
            self.close();
        }
        self.done
    }
}

impl Figures {
    fn say(&self, elapsed: Duration) {
        let way = match &self.way {
            Way::Windows { window, stride } => format!("windows of {window} and stride {stride}"),
            Way::Cache { cache } => format!("one pass with cache {cache}"),
        };
        for SpanFigures { from, tokens, loss } in &self.spans {
            say(format_args!(
                "tokens {from:>9} to {:>9}: loss {loss:.4}",
                from + tokens
            ));
        }
        say(format_args!(
            "{} tokens of {} bytes in {}, {way}: loss {:.4} nats per token, perplexity {:.3}, {:.4} bits per byte",
            self.tokens,
            self.bytes,
            short_duration(elapsed),
            self.loss,
            self.perplexity,
            self.bits_per_byte
        ));
    }
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
