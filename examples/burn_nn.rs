//! A model of burn-nn's layers, in which EmberLM's operators take the place of two of them. Takes a few seconds on a CPU.
//!
//! cargo run --release --example burn_nn
//!
//! The model is nothing of EmberLM's: a struct with burn-nn's `Linear`, `LayerNorm` and `SwiGlu`, which learns to say
//! which of 16 numbers is the largest. Its blocks can run in two ways on the same parameters: by burn-nn's own `forward`,
//! or by `emberlm::core::operators`, which take plain tensors. On the CPU backends these are fused kernels, forward and
//! backward, so a training step takes less time; elsewhere they are the same tensor operations as burn-nn's.
//!
//! Nothing else changes: the parameters, their names in a file of weights, the optimizer and the loop stay Burn's.

use std::{process::ExitCode, time::Instant};

use burn::{
    module::{Module, ModuleVisitor, Param},
    nn::{
        LayerNorm, LayerNormConfig, Linear, LinearConfig, SwiGlu, SwiGluConfig,
        loss::CrossEntropyLossConfig,
    },
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
    tensor::{Device, Int, Tensor, TensorData},
};
use clap::Parser;
use emberlm::{
    core::{
        Activation, RandomKey,
        operators::{gate, layer_norm, linears, project},
    },
    kernels::keep_freed_memory,
};
use emberlm_examples::{choose_device, exit_with, say};

/// Train a burn-nn model with its own layers and with EmberLM's operators, and compare
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Training steps of each
    #[arg(long, default_value_t = 60)]
    steps: u64,
    /// Device
    #[arg(long)]
    device: Option<String>,
}

/// Numbers to choose from.
const CHOICES: usize = 16;
const BATCH: usize = 512;
const WIDTH: usize = 128;
const INNER_WIDTH: usize = 384;

/// Whose layers run.
#[derive(Clone, Copy)]
enum By {
    BurnNn,
    Operators,
}

/// Pre-norm residual block: `x + W SwiGLU(LayerNorm(x))`.
#[derive(Module, Debug)]
struct Block {
    norm: LayerNorm,
    /// burn-nn's `LayerNorm` does not show its own.
    epsilon: f64,
    gated: SwiGlu,
    output: Linear,
}

impl Block {
    fn new(device: &Device) -> Self {
        let norm = LayerNormConfig::new(WIDTH);
        Self {
            norm: norm.init(device),
            epsilon: norm.epsilon,
            gated: SwiGluConfig::new(WIDTH, INNER_WIDTH)
                .with_bias(true)
                .init(device),
            output: LinearConfig::new(INNER_WIDTH, WIDTH).init(device),
        }
    }

    fn forward(&self, x: Tensor<2>, by: By) -> Tensor<2> {
        match by {
            By::BurnNn => self.by_burn_nn(x),
            By::Operators => self.by_operators(x),
        }
    }

    fn by_burn_nn(&self, x: Tensor<2>) -> Tensor<2> {
        let normed = self.norm.forward(x.clone());
        x + self.output.forward(self.gated.forward(normed))
    }

    fn by_operators(&self, x: Tensor<2>) -> Tensor<2> {
        let shift = self.norm.beta.as_ref().map(Param::val);
        let normed = layer_norm(x.clone(), self.norm.gamma.val(), shift, self.epsilon);
        let SwiGlu {
            linear_inner,
            linear_outer,
        } = &self.gated;
        // Both products without their biases, which the gate adds in its own pass.
        let weights = [linear_inner, linear_outer].map(|layer| (layer.weight.val(), None));
        let biases = match (&linear_inner.bias, &linear_outer.bias) {
            (Some(inner), Some(outer)) => Some([inner.val(), outer.val()]),
            _ => None,
        };
        let [inner, outer] = linears(normed, weights);
        let gated = gate(Activation::Silu, inner, outer, biases);
        x + project(&self.output, gated)
    }
}

#[derive(Module, Debug)]
struct LargestOf {
    input: Linear,
    blocks: Vec<Block>,
    scores: Linear,
}

impl LargestOf {
    fn new(device: &Device) -> Self {
        Self {
            input: LinearConfig::new(CHOICES, WIDTH).init(device),
            blocks: (0..3).map(|_| Block::new(device)).collect(),
            scores: LinearConfig::new(WIDTH, CHOICES).init(device),
        }
    }

    /// `[batch_size, CHOICES]` to the same.
    fn forward(&self, x: Tensor<2>, by: By) -> Tensor<2> {
        let x = self.input.forward(x);
        let x = self.blocks.iter().fold(x, |x, block| block.forward(x, by));
        self.scores.forward(x)
    }
}

/// The model in training, by one of the two.
struct Training {
    by: By,
    model: LargestOf,
    optimizer: ModuleOptimizer,
    /// Of each step.
    milliseconds: Vec<f64>,
    loss: f64,
}

impl Training {
    fn new(by: By, model: LargestOf) -> Self {
        Self {
            by,
            model,
            optimizer: AdamWConfig::new().init(),
            milliseconds: Vec::new(),
            loss: f64::NAN,
        }
    }

    fn step(&mut self, (x, targets): (Tensor<2>, Tensor<1, Int>)) {
        let begin = Instant::now();
        let (loss, gradients) = self.gradients(x, targets);
        self.model = self.optimizer.step(2e-3, self.model.clone(), gradients);
        self.loss = loss.into_scalar();
        self.milliseconds.push(begin.elapsed().as_secs_f64() * 1e3);
    }

    fn gradients(&self, x: Tensor<2>, targets: Tensor<1, Int>) -> (Tensor<1>, GradientsParams) {
        let criterion = CrossEntropyLossConfig::new().init(&x.device());
        let loss = criterion.forward(self.model.forward(x, self.by), targets);
        let gradients = GradientsParams::from_grads(loss.backward(), &self.model);
        (loss, gradients)
    }

    fn median_milliseconds(&self) -> f64 {
        let mut times = self.milliseconds.clone();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }
}

/// Numbers from -1 to 1, and which of each row is the largest: a function of the step.
fn batch(step: u64, device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    let key = RandomKey::new(step);
    let values: Vec<f32> = (0..(BATCH * CHOICES) as u64)
        .map(|i| key.uniform(i) as f32 * 2.0 - 1.0)
        .collect();
    let x = Tensor::from_data(TensorData::new(values, [BATCH, CHOICES]), device);
    (x.clone(), x.argmax(1).reshape([BATCH]))
}

fn largest_difference<const D: usize>(a: Tensor<D>, b: Tensor<D>) -> f64 {
    (a - b).abs().max().into_scalar()
}

/// The largest difference between two gradients of one model.
fn largest_difference_of_gradients(
    model: &LargestOf,
    a: &GradientsParams,
    b: &GradientsParams,
) -> f64 {
    struct Visitor<'a> {
        gradients: [&'a GradientsParams; 2],
        largest: f64,
    }
    impl ModuleVisitor for Visitor<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let [a, b] = self
                .gradients
                .map(|gradients| gradients.get::<D>(param.id).expect("all take part"));
            self.largest = self.largest.max(largest_difference(a, b));
        }
    }
    let mut visitor = Visitor {
        gradients: [a, b],
        largest: 0.0,
    };
    model.visit(&mut visitor);
    visitor.largest
}

fn main() -> ExitCode {
    keep_freed_memory();
    exit_with(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    if args.steps == 0 {
        return Err("--steps is at least 1".into());
    }
    let (device_name, device) = choose_device(args.device.as_deref())?;
    say(format_args!("device: {device_name}"));
    let device = device.autodiff();
    device.seed(1);
    let model = LargestOf::new(&device);
    let mut trainings = [By::BurnNn, By::Operators].map(|by| Training::new(by, model.clone()));
    say(format_args!("model: {} parameters", model.num_params()));

    let (x, targets) = batch(0, &device);
    let [theirs, ours] = [By::BurnNn, By::Operators].map(|by| model.forward(x.clone(), by));
    say(format_args!(
        "largest difference of the scores: {:.1e}",
        largest_difference(theirs.detach(), ours.detach())
    ));
    let [theirs, ours] = trainings.each_ref().map(|training| {
        let (_, gradients) = training.gradients(x.clone(), targets.clone());
        gradients
    });
    say(format_args!(
        "largest difference of the gradients: {:.1e}",
        largest_difference_of_gradients(&model, &theirs, &ours)
    ));

    for step in 1..=args.steps {
        let batch = batch(step, &device);
        for training in &mut trainings {
            training.step(batch.clone());
        }
        if step == 1 || step % 20 == 0 || step == args.steps {
            let [theirs, ours] = trainings.each_ref().map(|training| training.loss);
            say(format_args!(
                "step {step:>3}  loss: burn-nn {theirs:.5}, operators {ours:.5}"
            ));
        }
    }
    let [theirs, ours] = trainings.each_ref().map(Training::median_milliseconds);
    say(format_args!(
        "a training step: burn-nn {theirs:.2} ms, operators {ours:.2} ms"
    ));
    Ok(())
}
