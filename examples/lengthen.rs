//! Makes a Longformer or a BigBird of a short encoder that is trained, and trains it on longer sequences.
//!
//! cargo run --release --example lengthen -- --run runs/0001 --pattern longformer:64:1

use std::{path::PathBuf, process::ExitCode};

use clap::Parser;
use emberlm::{models::PositionsConfig, text::Corpus, training::RunFolder};
use emberlm_examples::{
    AttentionChoice, LoadedRun, ModelConfig, NewRunOptions, Pretraining, RunConfig, RunModel,
    Start, Stop, announce_text, check_writable, choose_device, exit_code, say,
};

/// Give a trained encoder sparse attention and longer sequences, and train it on
#[derive(Parser)]
#[command(version)]
struct Args {
    /// The run of the short encoder, trained by pretrain --objective masked
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Which tokens a token sees from now on: longformer:SIDE:GLOBALS, bigbird:BLOCK:BLOCKS or what else pretrain takes
    #[arg(long, value_name = "PATTERN", default_value = "longformer:64:1")]
    pattern: AttentionChoice,
    /// How many times as long the sequences become
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    times: u16,
    /// Number of optimizer steps on the longer sequences
    #[arg(long, default_value_t = 300)]
    steps: u64,
    /// Sequences in a step [default: so many that a step has as many tokens as before]
    #[arg(long)]
    batch_size: Option<usize>,
    /// Peak of the learning rate [default: a quarter of the run's]
    #[arg(long, value_name = "RATE")]
    learning_rate: Option<f64>,
    /// Folder where the text is kept as tokens, which runs share
    #[arg(long, value_name = "DIR", default_value = "runs/tokens")]
    cache: PathBuf,
    #[command(flatten)]
    new: NewRunOptions,
}

type AnyError = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_code(lengthen(&Args::parse()))
}

fn lengthen(args: &Args) -> Result<ExitCode, AnyError> {
    let (device_name, device) = choose_device(args.new.show.device.as_deref())?;
    say(format_args!("device: {device_name}"));
    let run = LoadedRun::load(&args.run, &device.clone().autodiff())?;
    let RunModel::Encoder(short) = &run.model else {
        return Err(run.unfit(&args.run));
    };
    if let Some(path) = &args.new.out {
        RunFolder::check_free(path)?;
    }
    if let Some(path) = &args.new.report {
        check_writable("--report", path)?;
    }
    let config = longer(args, &run.config)?;
    let ModelConfig::Encoder(model) = &config.model else {
        unreachable!("an encoder stays one")
    };
    let corpus = Corpus::open(&config.sources)?;
    if let Some(changed) = config.changed_document(&corpus.fingerprints()) {
        return Err(format!("{changed} is not the text the run was trained on").into());
    }
    announce_text(&corpus);
    let stop = Stop::on_signals()?;
    let plan = |config| Pretraining::new(config, &corpus, run.tokenizer.clone(), &args.cache);
    let (before, after) = (plan(run.config.clone())?, plan(config.clone())?);
    let long = short.lengthened(model, &device.clone().autodiff());
    let Some(of_short) = before.loss_of(short.clone(), &device, &stop)? else {
        return Ok(stopped());
    };
    let Some(of_long) = after.loss_of(long.clone(), &device, &stop)? else {
        return Ok(stopped());
    };
    let [short_length, long_length] =
        [&run.config, &config].map(|config| config.training.seq_length);
    say(format_args!(
        "before: loss {of_short:.4} of the short model at length {short_length}, {of_long:.4} with {} at length {long_length}",
        args.pattern
    ));
    after.run(&args.new.place(None), &device, &stop, |_| {
        Start::Given(long)
    })
}

fn stopped() -> ExitCode {
    say("stopped before anything was written");
    ExitCode::SUCCESS
}

/// The configuration of the longer model.
fn longer(args: &Args, short: &RunConfig) -> Result<RunConfig, AnyError> {
    let mut config = short.clone();
    let times = usize::from(args.times);
    args.pattern.apply(&mut config.model);
    if let ModelConfig::Encoder(model) = &mut config.model {
        match &mut model.positions {
            PositionsConfig::Learned { max_seq_length }
            | PositionsConfig::LearnedOffset { max_seq_length, .. } => *max_seq_length *= times,
            _ => {}
        }
    }
    let training = &mut config.training;
    training.seq_length *= times;
    training.batch_size = args
        .batch_size
        .unwrap_or((training.batch_size / times).max(1));
    if !training.batch_size.is_multiple_of(training.accumulation) {
        training.accumulation = 1;
    }
    training.steps = args.steps;
    training.learning_rate = args.learning_rate.unwrap_or(training.learning_rate / 4.0);
    training.warmup_steps = training.warmup_steps.min(args.steps.div_ceil(10));
    training.validation_windows = training.validation_windows.div_ceil(times);
    config.validate()?;
    Ok(config)
}
