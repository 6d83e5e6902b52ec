//! Times sparse attention as a layer of a model, or its core without the projections, and a whole training step of a
//! decoder with a window.
//!
//! cargo run --release -p emberlm-bench --bin sparse -- --module longformer --length 8192 --backward --json
//! cargo run --release -p emberlm-bench --bin sparse -- --step --length 65536 --repeats 1
//!
//! Each call makes a context of its own and so compiles its patterns in the timed part, where the layers of a model share
//! that. `benches/peers/sparse.py` calls this program.

use std::{error::Error, fs, path::PathBuf, process::ExitCode};

use burn::tensor::{DType, Device, Tensor};
use clap::{Parser, ValueEnum};
use emberlm::{
    attention::{
        AttendOptions, BigBirdAttentionConfig, LongformerAttentionConfig, RandomPlan,
        RepeatedBlocks, attend,
    },
    core::{Context, Global, Lengths, Pattern, RotaryLayout, SequenceMixer, Window},
    models::{DecoderConfig, PositionsConfig},
    training::{LanguageModel, TrainingConfig, adamw},
};
use emberlm_bench::{
    Pass, Times, check_size, peak_resident_bytes, random_batch, time, train_step, uniform,
};
use emberlm_examples::{choose_device, exit_with};
use peak_alloc::PeakAlloc;
use serde::Serialize;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Time sparse attention as a layer, or a training step of a decoder
#[derive(Parser)]
struct Args {
    /// Which attention
    #[arg(long, required_unless_present = "step", conflicts_with = "step")]
    module: Option<Module>,
    /// A training step instead: a decoder of 4 layers, width 256, 4 heads, rotary positions, 256 tokens, each of which
    /// sees itself and the --window before it
    #[arg(long)]
    step: bool,
    /// Positions of the sequence
    #[arg(long, default_value_t = 8192)]
    length: usize,
    /// longformer, --step: neighbours that a token sees, on each side [default: 256]
    #[arg(long)]
    window: Option<usize>,
    /// longformer: the first positions are global [default: 16]
    #[arg(long)]
    globals: Option<usize>,
    /// bigbird: positions of a block [default: 64]
    #[arg(long)]
    block: Option<usize>,
    /// bigbird: key blocks that are drawn for each query block [default: 3]
    #[arg(long, conflicts_with = "plan")]
    random: Option<usize>,
    /// bigbird: a file with the drawn blocks as JSON, [heads, query blocks but the first and the last, key blocks]
    #[arg(long)]
    plan: Option<PathBuf>,
    /// Heads
    #[arg(long, default_value_t = 8, conflicts_with = "step")]
    heads: usize,
    /// Width of a head
    #[arg(long, default_value_t = 64, conflicts_with = "step")]
    d_head: usize,
    /// The attention alone, of heads that are there, instead of the layer with its projections
    #[arg(long, conflicts_with = "step")]
    core: bool,
    /// Forward and backward pass under autodiff, instead of the forward pass alone
    #[arg(long, conflicts_with = "step")]
    backward: bool,
    /// Repeats at least, after two that are not counted, and for 0.3 seconds at least
    #[arg(long, default_value_t = 5)]
    repeats: usize,
    /// Device
    #[arg(long)]
    device: Option<String>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Module {
    Longformer,
    #[value(name = "bigbird")]
    BigBird,
}

/// Measured of a layer, or of its core.
#[derive(Serialize)]
struct LayerFigures {
    module: String,
    core: bool,
    pattern: String,
    length: usize,
    heads: usize,
    d_head: usize,
    backward: bool,
    device: String,
    median_ms: f64,
    min_ms: f64,
    /// Pairs of a query and a key, of all heads.
    n_visible: u64,
    /// Of visible pairs alone: `4 d` each forward, `14 d` forward and backward.
    gflops: f64,
    /// At the peak, beyond parameters and inputs.
    peak_bytes: usize,
}

/// Measured of a training step.
#[derive(Serialize)]
struct StepFigures {
    length: usize,
    window: usize,
    device: String,
    median_s: f64,
    min_s: f64,
    /// At the peak of a step, beyond model and optimizer state.
    peak_bytes: usize,
    /// The most that was resident of the process.
    peak_resident_bytes: Option<u64>,
}

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if args.length == 0 || args.repeats == 0 {
        return Err("--length and --repeats are at least 1".into());
    }
    args.check_meaning()?;
    match args.module {
        Some(Module::Longformer) => time_layer(args, &longformer(args)?),
        Some(Module::BigBird) => time_layer(args, &big_bird(args)?),
        None => time_step(args),
    }
}

impl Args {
    /// Refuses what has no meaning for what is timed.
    fn check_meaning(&self) -> Result<(), String> {
        let bigbird = self.module == Some(Module::BigBird);
        let longformer = self.module == Some(Module::Longformer);
        let given = [
            ("--window", self.window.is_some(), longformer || self.step),
            ("--globals", self.globals.is_some(), longformer),
            ("--block", self.block.is_some(), bigbird),
            ("--random", self.random.is_some(), bigbird),
            ("--plan", self.plan.is_some(), bigbird),
        ];
        match given.iter().find(|(_, given, meant)| *given && !meant) {
            Some((name, ..)) => Err(format!("{name} has no meaning here: see --help")),
            None => Ok(()),
        }
    }

    fn window(&self) -> Window {
        Window::one_sided(self.window.unwrap_or(256))
    }

    fn n_globals(&self) -> usize {
        self.globals.unwrap_or(16).min(self.length)
    }
}

/// One call, which begins with inputs and ends with its last pass.
type Call = Box<dyn FnMut()>;

/// A layer that can be timed.
trait Layer {
    /// Which keys a query sees, all parts together.
    fn visible(&self) -> Pattern;
    fn describe(&self) -> String;
    fn whole(&self, inputs: &Inputs) -> Call;
    fn core(&self, inputs: &Inputs) -> Call;
}

fn longformer(args: &Args) -> Result<LongformerAttentionConfig, Box<dyn Error>> {
    let d_model = args.heads.saturating_mul(args.d_head);
    let config = LongformerAttentionConfig::new(d_model, args.heads, args.window())
        .with_global(Global::First(args.n_globals()));
    config.validate()?;
    Ok(config)
}

impl Layer for LongformerAttentionConfig {
    fn visible(&self) -> Pattern {
        Pattern::window(self.window) | Pattern::Global(self.global.clone())
    }

    fn describe(&self) -> String {
        self.visible().to_string()
    }

    fn whole(&self, inputs: &Inputs) -> Call {
        inputs.whole(self.init(&inputs.device))
    }

    fn core(&self, inputs: &Inputs) -> Call {
        let attention = self.init(&inputs.device);
        let &Inputs {
            pass,
            lengths,
            n_globals,
            ..
        } = inputs;
        let length = lengths.query_length;
        let local = [1, 2, 3].map(|seed| inputs.heads(length, seed));
        let global =
            [(n_globals, 4), (length, 5), (length, 6)].map(|(n, seed)| inputs.heads(n, seed));
        let d_y = inputs.heads(length, 7);
        Box::new(move || {
            let [local, global] =
                [&local, &global].map(|heads| heads.each_ref().map(|x| pass.leaf(x)));
            let global = (n_globals > 0).then_some(global);
            let y = attention.attend_heads(local, global, &Context::new(lengths));
            pass.end_with(y, &d_y);
        })
    }
}

fn big_bird(args: &Args) -> Result<BigBirdAttentionConfig, Box<dyn Error>> {
    let random = match &args.plan {
        None => RandomPlan::Drawn {
            n_blocks: args.random.unwrap_or(3),
            seed: 0,
        },
        Some(path) => {
            let of_plan = |error: &dyn Error| format!("--plan {}: {error}", path.display());
            let text = fs::read_to_string(path).map_err(|error| of_plan(&error))?;
            RandomPlan::Given {
                rows: serde_json::from_str(&text).map_err(|error| of_plan(&error))?,
                repeats: RepeatedBlocks::Once,
            }
        }
    };
    let d_model = args.heads.saturating_mul(args.d_head);
    let block = args.block.unwrap_or(64);
    let config = BigBirdAttentionConfig::new(d_model, args.heads, block, random);
    config.validate()?;
    Ok(config)
}

impl Layer for BigBirdAttentionConfig {
    fn visible(&self) -> Pattern {
        self.pattern()
    }

    fn describe(&self) -> String {
        let random = match &self.random {
            RandomPlan::Drawn { n_blocks, .. } => format!("{n_blocks} random"),
            RandomPlan::Given { .. } => "random ones by a plan".into(),
        };
        format!("blocks of {}, {random}", self.block)
    }

    fn whole(&self, inputs: &Inputs) -> Call {
        inputs.whole(self.init(&inputs.device))
    }

    fn core(&self, inputs: &Inputs) -> Call {
        let &Inputs { pass, lengths, .. } = inputs;
        let [query, key, value, d_y] =
            [1, 2, 3, 4].map(|seed| inputs.heads(lengths.query_length, seed));
        let (pattern, n_heads) = (self.pattern(), self.n_heads);
        Box::new(move || {
            let schedule = Context::new(lengths)
                .schedule(&pattern, n_heads)
                .expect("it was compiled before for its statistics");
            let [query, key, value] = [&query, &key, &value].map(|x| pass.leaf(x));
            let y = attend(query, key, value, &schedule, &AttendOptions::default());
            pass.end_with(y, &d_y);
        })
    }
}

/// What layers are timed on.
struct Inputs {
    pass: Pass,
    lengths: Lengths,
    n_globals: usize,
    n_heads: usize,
    d_head: usize,
    device: Device,
}

impl Inputs {
    fn heads(&self, length: usize, seed: u64) -> Tensor<4> {
        let shape = [1, self.n_heads, length, self.d_head];
        uniform(shape, seed, &self.device, DType::F32)
    }

    fn whole(&self, attention: impl SequenceMixer + 'static) -> Call {
        let &Self { pass, lengths, .. } = self;
        let shape = [1, lengths.query_length, self.n_heads * self.d_head];
        let [x, d_y] = [1, 2].map(|seed| uniform(shape, seed, &self.device, DType::F32));
        Box::new(move || {
            let y = attention.forward(pass.leaf(&x), &Context::new(lengths));
            pass.end_with(y, &d_y);
        })
    }
}

fn time_layer(args: &Args, layer: &impl Layer) -> Result<(), Box<dyn Error>> {
    check_size(&[args.length, args.heads, args.d_head])?;
    let (device_name, device) = choose_device(args.device.as_deref())?;
    let inputs = Inputs {
        pass: Pass {
            backward: args.backward,
        },
        lengths: Lengths::square(args.length),
        n_globals: args.n_globals(),
        n_heads: args.heads,
        d_head: args.d_head,
        device: match args.backward {
            true => device.autodiff(),
            false => device,
        },
    };
    let schedule = Context::new(inputs.lengths).schedule(&layer.visible(), args.heads)?;
    let statistics = schedule.statistics();
    let mut flops = statistics.forward_flops(args.d_head);
    if args.backward {
        flops += statistics.backward_flops(args.d_head);
    }
    let call = match args.core {
        true => layer.core(&inputs),
        false => layer.whole(&inputs),
    };
    let times = time(&MEMORY, &inputs.device, args.repeats, call)?;
    let figures = LayerFigures {
        module: args.module.map(Module::name).unwrap_or_default(),
        core: args.core,
        pattern: layer.describe(),
        length: args.length,
        heads: args.heads,
        d_head: args.d_head,
        backward: args.backward,
        device: device_name.to_string(),
        median_ms: times.median_ms,
        min_ms: times.min_ms,
        n_visible: statistics.n_visible,
        gflops: flops as f64 / times.median_ms / 1e6,
        peak_bytes: times.peak_bytes,
    };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!(
            "{}{}, {}, at {}, {}: {:.2} ms (at least {:.2}), {:.1} GFLOP/s, {:.1} MiB beyond parameters and inputs",
            figures.module,
            if args.core { " core" } else { "" },
            figures.pattern,
            figures.length,
            if args.backward {
                "forward and backward"
            } else {
                "forward"
            },
            figures.median_ms,
            figures.min_ms,
            figures.gflops,
            mebibytes(figures.peak_bytes as f64),
        );
    }
    Ok(())
}

fn time_step(args: &Args) -> Result<(), Box<dyn Error>> {
    const VOCAB: usize = 256;
    const D_MODEL: usize = 256;
    let model = DecoderConfig::new(VOCAB, 4, D_MODEL, 4)
        .with_positions(PositionsConfig::Rotary {
            theta: 10_000.0,
            layout: RotaryLayout::HalfSplit,
        })
        .with_pattern(Some(Pattern::window(args.window())));
    model.validate()?;
    check_size(&[args.length, model.feed_forward_width()])?;
    let (device_name, device) = choose_device(args.device.as_deref())?;
    let device = device.autodiff();
    let training = TrainingConfig::new(args.repeats as u64, 1, args.length);
    let batch = random_batch(&training, VOCAB, &device);
    let mut model = LanguageModel::new(model.init(&device), 0.0, 0.0);
    let mut optimizer = adamw(&training, &model);
    let Times {
        median_ms,
        min_ms,
        peak_bytes,
    } = time(&MEMORY, &device, args.repeats, || {
        train_step(&mut model, &mut optimizer, batch.clone());
    })?;
    let figures = StepFigures {
        length: args.length,
        window: args.window.unwrap_or(256),
        device: device_name.to_string(),
        median_s: median_ms / 1e3,
        min_s: min_ms / 1e3,
        peak_bytes,
        peak_resident_bytes: peak_resident_bytes(),
    };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
        return Ok(());
    }
    let resident = figures
        .peak_resident_bytes
        .map(|bytes| format!(", {:.0} MiB resident", mebibytes(bytes as f64)));
    println!(
        "a step on {} tokens: {:.2} s (at least {:.2}), {:.0} MiB beyond the state{}",
        figures.length,
        figures.median_s,
        figures.min_s,
        mebibytes(peak_bytes as f64),
        resident.unwrap_or_default(),
    );
    Ok(())
}

impl Module {
    fn name(self) -> String {
        let value = self.to_possible_value().expect("none is hidden");
        value.get_name().to_owned()
    }
}

fn mebibytes(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}
