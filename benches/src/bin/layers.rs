//! Times each operator of a layer, forward alone or with its backward pass, as a Burn user calls it.
//!
//! cargo run --release -p emberlm-bench --bin layers -- --op layer_norm --rows 2048 --width 384 --backward --json
//!
//! Shapes and what is counted are those of `benches/peers/layers.py`, which calls this program. The gradient that comes
//! in is ones: Burn's `backward` takes a tensor of any shape and begins with ones of that shape, written in the timed
//! part. Flex writes them on one thread, which is no small share of the cheap operators; `ones_ms` says how long that
//! takes by itself. Of an operator with two outputs it can begin at one tensor only, so `add_norm` ends with their sum, on both
//! sides. Gradients and outputs are freed in the timed part.

use std::{error::Error, process::ExitCode};

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use clap::{Parser, ValueEnum};
use emberlm::{
    core::{
        Activation, CrossEntropyConfig, RandomKey, RotaryLayout,
        operators::{
            AdamWStep, Implementation, NormParameters, Projection, Rotation, activate_by, adamw_by,
            add_dropped_by, add_norm_by, cross_entropy_by, embed_by, gate_by, linear_by, norm_by,
            projected_cross_entropy_by, rotate_by,
        },
    },
    kernels::keep_freed_memory,
};
use emberlm_bench::{ImplementationChoice, Pass, Times, check_size, time, uniform};
use emberlm_examples::{choose_device, exit_with};
use peak_alloc::PeakAlloc;
use serde::Serialize;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Components of a head that rotary positions turn.
const D_HEAD: usize = 64;
const DROPOUT: f64 = 0.1;
const EPSILON: f64 = 1e-5;

/// Time an operator of a layer
#[derive(Parser)]
struct Args {
    /// Which operator
    #[arg(long)]
    op: Op,
    /// Rows: tokens
    #[arg(long, default_value_t = 2048)]
    rows: usize,
    /// Components of a row; classes of cross_entropy; of rotary a multiple of 64
    #[arg(long, default_value_t = 384)]
    width: usize,
    /// Classes of projected_cross_entropy [default: 2048]
    #[arg(long)]
    vocab: Option<usize>,
    /// Element type
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// How it is computed [default: what the device does fastest]
    #[arg(long)]
    implementation: Option<ImplementationChoice>,
    /// Forward and backward pass under autodiff, instead of the forward pass alone
    #[arg(long)]
    backward: bool,
    /// Repeats at least, after two that are not counted, and for 0.3 seconds at least
    #[arg(long, default_value_t = 20)]
    repeats: usize,
    /// Device
    #[arg(long)]
    device: Option<String>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

/// A new one is an arm here, in [`Bench::call`] and in [`numbers`].
#[derive(Clone, Copy, PartialEq, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Op {
    LayerNorm,
    RmsNorm,
    AddNorm,
    Gelu,
    GeluTanh,
    Silu,
    Relu,
    SquaredRelu,
    Swiglu,
    CrossEntropy,
    ProjectedCrossEntropy,
    Linear,
    Embedding,
    Rotary,
    Dropout,
    Adamw,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F64,
    F32,
}

/// One measurement.
#[derive(Serialize)]
struct Figures {
    op: String,
    rows: usize,
    width: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    vocab: Option<usize>,
    implementation: String,
    device: String,
    backward: bool,
    median_ms: f64,
    min_ms: f64,
    /// What writing the gradient that comes in takes by itself; it is part of `median_ms`.
    #[serde(skip_serializing_if = "Option::is_none")]
    ones_ms: Option<f64>,
    /// Read and written at least: [`numbers`].
    bytes: usize,
    gb_per_s: f64,
    /// At the peak, beyond the inputs.
    peak_bytes: usize,
}

fn main() -> ExitCode {
    keep_freed_memory();
    exit_with(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let bench = Bench::new(args)?;
    let Times {
        median_ms,
        min_ms,
        peak_bytes,
    } = bench.time(bench.call())?;
    let ones_ms = match args.backward && !args.op.is_loss() {
        true => Some(bench.time(bench.ones())?.median_ms),
        false => None,
    };
    let bytes =
        numbers(args.op, args.rows, args.width, bench.vocab, args.backward) * bench.dtype().size();
    let figures = Figures {
        op: args.op.name(),
        rows: args.rows,
        width: args.width,
        vocab: (args.op == Op::ProjectedCrossEntropy).then_some(bench.vocab),
        implementation: format!("{:?}", bench.implementation).to_lowercase(),
        device: bench.device_name.clone(),
        backward: args.backward,
        median_ms,
        min_ms,
        ones_ms,
        bytes,
        gb_per_s: bytes as f64 / median_ms / 1e6,
        peak_bytes,
    };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!(
            "{} {} [{}, {}] {}: {:.3} ms (at least {:.3}), {:.1} GB/s, {:.1} MiB beyond the inputs",
            figures.implementation,
            figures.op,
            figures.rows,
            figures.width,
            if args.backward {
                "forward and backward"
            } else {
                "forward"
            },
            figures.median_ms,
            figures.min_ms,
            figures.gb_per_s,
            figures.peak_bytes as f64 / 1024.0 / 1024.0,
        );
    }
    Ok(())
}

impl Op {
    fn name(self) -> String {
        let value = self.to_possible_value().expect("none is hidden");
        value.get_name().to_owned()
    }

    /// Whether it ends in one number.
    fn is_loss(self) -> bool {
        matches!(self, Self::CrossEntropy | Self::ProjectedCrossEntropy)
    }
}

/// Numbers that have to be read and written at least, indices too: each pass reads its inputs once and writes its
/// results once. The same table as in `layers.py`.
fn numbers(op: Op, rows: usize, width: usize, vocab: usize, backward: bool) -> usize {
    let n = rows * width;
    let (forward, further) = match op {
        Op::LayerNorm | Op::RmsNorm => (2 * n + width, 3 * n + 2 * width),
        Op::AddNorm => (4 * n + width, 4 * n + 2 * width),
        Op::Gelu | Op::GeluTanh | Op::Silu | Op::Relu | Op::SquaredRelu => (2 * n, 3 * n),
        Op::Swiglu => (3 * n, 5 * n),
        Op::CrossEntropy => (n + rows, 2 * n + rows),
        Op::ProjectedCrossEntropy => (n + vocab * width + rows, 2 * n + 2 * vocab * width + rows),
        Op::Linear => (2 * n + width * width, 3 * n + 2 * width * width),
        Op::Embedding => (rows + rows.min(width) * width + n, rows + n + width * width),
        Op::Rotary => (2 * n + D_HEAD * rows, 2 * n + D_HEAD * rows),
        Op::Dropout => (3 * n, 2 * n),
        Op::Adamw => (7 * n, 0),
    };
    forward + if backward { further } else { 0 }
}

/// What is timed, and where.
struct Bench<'a> {
    args: &'a Args,
    vocab: usize,
    implementation: Implementation,
    device_name: String,
    /// With autodiff for a backward pass.
    device: Device,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args) -> Result<Self, Box<dyn Error>> {
        let (rows, width) = (args.rows, args.width);
        if rows == 0 || width == 0 || args.repeats == 0 {
            return Err("--rows, --width and --repeats are at least 1".into());
        }
        if args.vocab.is_some() && args.op != Op::ProjectedCrossEntropy {
            return Err("--vocab is for projected_cross_entropy alone; the classes of cross_entropy are its --width".into());
        }
        let vocab = args.vocab.unwrap_or(2048);
        if vocab == 0 {
            return Err("--vocab is at least 1".into());
        }
        if args.op == Op::Rotary && !width.is_multiple_of(D_HEAD) {
            return Err(
                format!("--width {width}: rotary has heads of {D_HEAD}, give a multiple").into(),
            );
        }
        let mut sizes = vec![(rows, width)];
        match args.op {
            Op::Linear | Op::Embedding => sizes.push((width, width)),
            Op::ProjectedCrossEntropy => sizes.extend([(rows, vocab), (vocab, width)]),
            _ => {}
        }
        for (a, b) in sizes {
            check_size(&[a, b])?;
        }
        let (device_name, device) = choose_device(args.device.as_deref())?;
        let implementation = ImplementationChoice::resolve(args.implementation, &device)?;
        Ok(Self {
            args,
            vocab,
            implementation,
            device_name: device_name.to_string(),
            device: match args.backward {
                true => device.autodiff(),
                false => device,
            },
        })
    }

    /// Makes the inputs; the function runs the operator once.
    fn call(&self) -> Box<dyn Fn()> {
        let &Self {
            args: &Args {
                op, rows, width, ..
            },
            implementation,
            vocab,
            ..
        } = self;
        let pass = Pass {
            backward: self.args.backward,
        };
        match op {
            Op::LayerNorm | Op::RmsNorm => {
                let (x, scale) = (self.random([rows, width], 1), self.random([width], 2));
                Box::new(move || {
                    let parameters = parameters(op, pass.leaf(&scale));
                    pass.end(norm_by(implementation, pass.leaf(&x), &parameters));
                })
            }
            Op::AddNorm => {
                let [x, y] = [1, 2].map(|seed| self.random([rows, width], seed));
                let scale = self.random([width], 3);
                Box::new(move || {
                    let parameters = parameters(op, pass.leaf(&scale));
                    let (x, y) = (pass.leaf(&x), pass.leaf(&y));
                    let (sum, normed) = add_norm_by(implementation, x, y, &parameters);
                    if pass.backward {
                        pass.end(sum + normed);
                    }
                })
            }
            Op::Gelu | Op::GeluTanh | Op::Silu | Op::Relu | Op::SquaredRelu => {
                let activation = match op {
                    Op::Gelu => Activation::Gelu,
                    Op::GeluTanh => Activation::GeluTanh,
                    Op::Silu => Activation::Silu,
                    Op::Relu => Activation::Relu,
                    _ => Activation::SquaredRelu,
                };
                let x = self.random([rows, width], 1);
                Box::new(move || {
                    let x: Tensor<2> = pass.leaf(&x);
                    pass.end(activate_by(implementation, activation, x, None));
                })
            }
            Op::Adamw => {
                let [p, g, m, v] = [1, 2, 3, 4].map(|seed| self.random([rows, width], seed));
                let v = v.square();
                let step = AdamWStep {
                    learning_rate: 1e-3,
                    beta_1: 0.9,
                    beta_2: 0.99,
                    epsilon: 1e-8,
                    weight_decay: 0.1,
                    time: 10,
                };
                Box::new(move || {
                    let moments = Some([m.clone(), v.clone()]);
                    adamw_by(implementation, &step, p.clone(), g.clone(), moments);
                })
            }
            Op::Swiglu => {
                let [a, b] = [1, 2].map(|seed| self.random([rows, width], seed));
                Box::new(move || {
                    let (a, b): (Tensor<2>, _) = (pass.leaf(&a), pass.leaf(&b));
                    pass.end(gate_by(implementation, Activation::Silu, a, b, None));
                })
            }
            Op::CrossEntropy => {
                let config = CrossEntropyConfig::new();
                let (logits, targets) = (self.random([rows, width], 1), self.indices(width));
                Box::new(move || {
                    let (logits, targets) = (pass.leaf(&logits), targets.clone());
                    let loss = cross_entropy_by(implementation, &config, logits, targets, None);
                    pass.end(loss.mean());
                })
            }
            Op::ProjectedCrossEntropy => {
                let config = CrossEntropyConfig::new();
                let hidden = self.random([rows, width], 1);
                // Larger scores have probabilities so small that arithmetic is slow on them.
                let table = self.random([vocab, width], 2) / (width as f64).sqrt();
                let targets = self.indices(vocab);
                Box::new(move || {
                    let table = Projection::Rows(pass.leaf(&table));
                    let (hidden, targets) = (pass.leaf(&hidden), targets.clone());
                    let loss = projected_cross_entropy_by(
                        implementation,
                        &config,
                        hidden,
                        &table,
                        targets,
                        None,
                    );
                    pass.end(loss.mean());
                })
            }
            Op::Linear => {
                let x: Tensor<2> = self.random([rows, width], 1);
                let weight = self.random([width, width], 2);
                Box::new(move || {
                    let (x, weight) = (pass.leaf(&x), pass.leaf(&weight));
                    pass.end(linear_by(implementation, x, weight, None));
                })
            }
            Op::Embedding => {
                let table = self.random([width, width], 1);
                let tokens = self.indices(width).reshape([1, rows]);
                Box::new(move || {
                    let table = pass.leaf(&table);
                    pass.end(embed_by(implementation, table, tokens.clone(), None));
                })
            }
            Op::Rotary => {
                let x = self.random([1, width / D_HEAD, rows, D_HEAD], 1);
                let pairs = (0..D_HEAD / 2).map(|i| 2.0 * i as f64 / D_HEAD as f64);
                let rotation = Rotation {
                    frequencies: pairs.map(|share| 10_000_f64.powf(-share)).collect(),
                    layout: RotaryLayout::HalfSplit,
                    first_position: 0,
                    attention_factor: 1.0,
                };
                Box::new(move || {
                    let [y] = rotate_by(implementation, [pass.leaf(&x)], &rotation);
                    pass.end(y);
                })
            }
            Op::Dropout => {
                let [x, y] = [1, 2].map(|seed| self.random([rows, width], seed));
                let key = RandomKey::new(3);
                Box::new(move || {
                    let (x, y): (Tensor<2>, _) = (pass.leaf(&x), pass.leaf(&y));
                    pass.end(add_dropped_by(implementation, x, y, DROPOUT, Some(key)));
                })
            }
        }
    }

    /// What Burn's `backward` begins with.
    fn ones(&self) -> Box<dyn Fn()> {
        let shape = [self.args.rows, self.args.width];
        let (device, dtype) = (self.device.clone(), self.dtype());
        Box::new(move || drop(Tensor::<2>::ones(shape, (&device, dtype))))
    }

    fn time(&self, call: Box<dyn Fn()>) -> Result<Times, Box<dyn Error>> {
        time(&MEMORY, &self.device, self.args.repeats, call)
    }

    fn dtype(&self) -> DType {
        match self.args.dtype {
            Dtype::F64 => DType::F64,
            Dtype::F32 => DType::F32,
        }
    }

    /// From -1 to 1.
    fn random<const D: usize>(&self, shape: [usize; D], seed: u64) -> Tensor<D> {
        uniform(shape, seed, &self.device, self.dtype())
    }

    /// A class of `n` for each row.
    fn indices(&self, n: usize) -> Tensor<1, Int> {
        let key = RandomKey::new(0);
        let values: Vec<i64> = (0..self.args.rows as u64)
            .map(|i| key.below(i, n as u64) as i64)
            .collect();
        let shape = [values.len()];
        Tensor::from_data(TensorData::new(values, shape), &self.device)
    }
}

fn parameters(op: Op, scale: Tensor<1>) -> NormParameters {
    NormParameters {
        centered: op != Op::RmsNorm,
        epsilon: EPSILON,
        scale,
        shift: None,
    }
}
