//! Times whole training steps: EmberLM's decoder beside a plain burn-nn `TransformerEncoder` of the same shapes, in one
//! process, alternating.
//!
//! cargo run --release -p emberlm-bench -- --preset tiny --steps 20

mod shapes;

use std::{error::Error, process::ExitCode, time::Instant};

use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig,
        attention::generate_autoregressive_mask,
        transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput},
    },
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
    tensor::{Device, Int, Tensor},
};
use clap::Parser;
use emberlm::{
    core::{CausalModel, CrossEntropyConfig, RandomKey},
    models::DecoderConfig,
    training::{LanguageModel, TokenBatch, adamw},
};
use emberlm_bench::{MemoryRise, cpu_seconds, median, random_batch, train_step};
use emberlm_examples::{choose_device, exit_with};
use serde::Serialize;

use crate::shapes::Shape;

/// Time training steps beside plain Burn
#[derive(Parser)]
struct Args {
    /// Which shapes
    #[arg(long, default_value = "tiny")]
    preset: Shape,
    /// Counted steps of each
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Device
    #[arg(long)]
    device: Option<String>,
    /// Time only this one, without alternating, and measure its memory
    #[arg(long)]
    only: Option<Contender>,
    /// Print a line of JSON for each contender, and nothing else
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Contender {
    Emberlm,
    PlainBurn,
}

impl Contender {
    fn name(self) -> &'static str {
        match self {
            Self::Emberlm => "emberlm",
            Self::PlainBurn => "plain burn",
        }
    }
}

/// What was measured of one contender.
#[derive(Serialize)]
struct Figures {
    contender: &'static str,
    preset: String,
    device: String,
    timed_steps: usize,
    median_step_ms: f64,
    min_step_ms: f64,
    tokens_per_second: f64,
    /// Processor time of all threads over time on the clock: 2 is two busy cores.
    cpu_utilisation: Option<f64>,
    /// Of [`Shape::flops_per_step`].
    gflops: f64,
    /// Most that is resident in steps, less what is resident between them: model and optimizer state.
    peak_bytes: Option<u64>,
}

/// A contender's steps so far.
struct Runner {
    contender: Contender,
    step: Box<dyn FnMut()>,
    seconds: Vec<f64>,
    cpu_seconds: Option<f64>,
}

impl Runner {
    fn new(contender: Contender, shape: Shape, device: &Device) -> Self {
        let (config, training) = shape.resolve();
        let batch = random_batch(&training, config.vocab_size, device);
        let step: Box<dyn FnMut()> = match contender {
            Contender::Emberlm => {
                let mut model = LanguageModel::new(config.init(device), 0.0, 0.0);
                let mut optimizer = adamw(&training, &model);
                Box::new(move || train_step(&mut model, &mut optimizer, batch.clone()))
            }
            Contender::PlainBurn => {
                let mut model = PlainBurn::new(&config, training.seq_length, device);
                let mut optimizer = AdamWConfig::new().init();
                Box::new(move || plain_step(&mut model, &mut optimizer, batch.clone()))
            }
        };
        Self {
            contender,
            step,
            seconds: Vec::new(),
            cpu_seconds: Some(0.0),
        }
    }

    fn count_step(&mut self) {
        let cpu_begin = cpu_seconds();
        let begin = Instant::now();
        (self.step)();
        self.seconds.push(begin.elapsed().as_secs_f64());
        let spent = cpu_begin.and_then(|begin| Some(cpu_seconds()? - begin));
        self.cpu_seconds = self.cpu_seconds.and_then(|sum| Some(sum + spent?));
    }

    fn figures(&self, shape: Shape, device: &str, peak_bytes: Option<u64>) -> Figures {
        let (_, training) = shape.resolve();
        let median = median(self.seconds.clone());
        let least = self.seconds.iter().copied().fold(f64::INFINITY, f64::min);
        Figures {
            contender: self.contender.name(),
            preset: shape.name(),
            device: device.to_owned(),
            timed_steps: self.seconds.len(),
            median_step_ms: median * 1e3,
            min_step_ms: least * 1e3,
            tokens_per_second: training.tokens_per_step() as f64 / median,
            cpu_utilisation: self
                .cpu_seconds
                .map(|seconds| seconds / self.seconds.iter().sum::<f64>()),
            gflops: shape.flops_per_step() / median / 1e9,
            peak_bytes,
        }
    }
}

/// What a Burn user writes without EmberLM: burn-nn's encoder with a causal mask.
#[derive(Module, Debug)]
struct PlainBurn {
    tokens: Embedding,
    positions: Embedding,
    encoder: TransformerEncoder,
    head: Linear,
}

impl PlainBurn {
    fn new(model: &DecoderConfig, seq_length: usize, device: &Device) -> Self {
        let initializer = Initializer::Normal {
            mean: 0.0,
            std: 0.02,
        };
        let table = |rows| {
            EmbeddingConfig::new(rows, model.d_model)
                .with_initializer(initializer.clone())
                .init(device)
        };
        Self {
            tokens: table(model.vocab_size),
            positions: table(seq_length),
            encoder: TransformerEncoderConfig::new(
                model.d_model,
                model.feed_forward_width(),
                model.n_heads,
                model.n_layers,
            )
            .with_norm_first(true)
            .with_dropout(0.0)
            .init(device),
            head: LinearConfig::new(model.d_model, model.vocab_size)
                .with_bias(false)
                .init(device),
        }
    }
}

impl CausalModel for PlainBurn {
    fn forward(&self, tokens: Tensor<2, Int>, _dropout_key: Option<RandomKey>) -> Tensor<3> {
        let [batch_size, seq_length] = tokens.dims();
        let device = tokens.device();
        let positions = Tensor::arange(0..seq_length as i64, &device)
            .reshape([1, seq_length])
            .repeat_dim(0, batch_size);
        let x = self.tokens.forward(tokens) + self.positions.forward(positions);
        let mask = generate_autoregressive_mask(batch_size, seq_length, &device);
        let x = self
            .encoder
            .forward(TransformerEncoderInput::new(x).mask_attn(mask));
        self.head.forward(x)
    }
}

/// What a Burn user's loop does: forward, backward, AdamW; no global clip, which Burn lacks.
fn plain_step(model: &mut PlainBurn, optimizer: &mut ModuleOptimizer, batch: TokenBatch) {
    let logits = model.forward(batch.inputs, None);
    let [batch_size, seq_length, vocab_size] = logits.dims();
    let n_tokens = batch_size * seq_length;
    let loss = CrossEntropyConfig::new()
        .forward(
            logits.reshape([n_tokens, vocab_size]),
            batch.targets.reshape([n_tokens]),
        )
        .mean();
    let gradients = GradientsParams::from_grads(loss.backward(), model);
    *model = optimizer.step(1e-3, model.clone(), gradients);
    let _: f32 = loss.into_scalar();
}

fn main() -> ExitCode {
    let args = Args::parse();
    // As `pretrain` does. A plain loop of Burn does not.
    if args.only != Some(Contender::PlainBurn) {
        emberlm::kernels::keep_freed_memory();
    }
    exit_with(run(&args))
}

// Allocation and warm-up; memory is counted from before the last of them, which also touches again what was given back.
const UNCOUNTED_STEPS: usize = 3;

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if args.steps == 0 {
        return Err("--steps is at least 1".into());
    }
    let shape = args.preset;
    let mut contenders = match args.only {
        None => vec![Contender::Emberlm, Contender::PlainBurn],
        Some(Contender::PlainBurn) if !shape.is_gpt() => {
            return Err(format!(
                "--only plain-burn: burn-nn's encoder has no {} shape",
                shape.name()
            )
            .into());
        }
        Some(only) => vec![only],
    };
    contenders.retain(|contender| *contender != Contender::PlainBurn || shape.is_gpt());
    let (device_name, device) = choose_device(args.device.as_deref())?;
    if !args.json {
        println!("device: {device_name}");
    }
    let device = device.autodiff();
    let mut runners: Vec<Runner> = contenders
        .into_iter()
        .map(|contender| Runner::new(contender, shape, &device))
        .collect();
    let mut memory = None;
    for step in 0..UNCOUNTED_STEPS {
        if step + 1 == UNCOUNTED_STEPS && args.only.is_some() {
            memory = MemoryRise::begin();
        }
        for runner in &mut runners {
            (runner.step)();
        }
    }
    for _ in 0..args.steps {
        for runner in &mut runners {
            runner.count_step();
        }
    }
    let peak_bytes = memory.and_then(|memory| memory.bytes());
    let figures: Vec<Figures> = runners
        .iter()
        .map(|runner| runner.figures(shape, &device_name, peak_bytes))
        .collect();
    for figures in &figures {
        if args.json {
            println!("{}", serde_json::to_string(figures)?);
        } else {
            println!("{}", line(figures));
        }
    }
    if let ([ours, plain], false) = (figures.as_slice(), args.json) {
        println!(
            "speed of emberlm over plain burn: {:.2}",
            plain.median_step_ms / ours.median_step_ms
        );
    }
    Ok(())
}

fn line(figures: &Figures) -> String {
    let mut line = format!(
        "{:<12} {:8.1} ms a step, {:6.0} tokens/s, {:.1} GFLOP/s",
        figures.contender, figures.median_step_ms, figures.tokens_per_second, figures.gflops
    );
    if let Some(cores) = figures.cpu_utilisation {
        line += &format!(", {cores:.2} cores");
    }
    if let Some(bytes) = figures.peak_bytes {
        line += &format!(
            ", {:.0} MiB beyond the state",
            bytes as f64 / f64::from(1 << 20)
        );
    }
    line + &format!(" (median of {})", figures.timed_steps)
}
