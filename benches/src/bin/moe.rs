//! Times a mixture of experts as a layer, or the dense feed-forward layer of as many operations.
//!
//! cargo run --release -p emberlm-bench --bin moe -- --d-model 512 --d-ff 1024 --experts 8 --top-k 2 --tokens 2048 --backward --json
//!
//! `benches/peers/moe.py` calls this program.

use std::{error::Error, process::ExitCode};

use burn::tensor::{DType, Device, Tensor};
use clap::{Parser, ValueEnum};
use emberlm::{
    core::{
        Activation, Context, FeedForward, FeedForwardConfig, InvalidConfig, Lengths, RandomKey,
        operators::Implementation,
    },
    moe::{Capacity, CapacitySize, LocalBy, MixtureOfExpertsConfig, RouterConfig},
};
use emberlm_bench::{ImplementationChoice, Pass, check_size, time, uniform};
use emberlm_examples::{choose_device, exit_with};
use peak_alloc::PeakAlloc;
use serde::Serialize;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Time a mixture of experts
#[derive(Parser)]
struct Args {
    /// Width of the model
    #[arg(long, default_value_t = 512)]
    d_model: usize,
    /// Inner width of an expert
    #[arg(long, default_value_t = 1024)]
    d_ff: usize,
    /// Number of experts
    #[arg(long, default_value_t = 8)]
    experts: usize,
    /// Experts of a token
    #[arg(long, default_value_t = 2)]
    top_k: usize,
    /// Number of tokens
    #[arg(long, default_value_t = 2048)]
    tokens: usize,
    /// The router
    #[arg(long, default_value = "mixtral")]
    router: RouterKind,
    /// Experts take at most this times their fair share of the choices [default: all]
    #[arg(long, value_name = "FACTOR")]
    capacity_factor: Option<f64>,
    /// How the experts' products are computed [default: the fastest that the device has]
    #[arg(long)]
    implementation: Option<ImplementationChoice>,
    /// The dense gated layer of inner width `top-k x d-ff` instead
    #[arg(long)]
    dense: bool,
    /// Forward and backward pass under autodiff, instead of the forward pass alone
    #[arg(long)]
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
enum RouterKind {
    Mixtral,
    Switch,
    NoisyTopK,
    Gshard,
    DeepseekV2,
    DeepseekV3,
    ExpertChoice,
    Sinkhorn,
}

#[derive(Serialize)]
struct Figures {
    layer: String,
    d_model: usize,
    d_ff: usize,
    experts: usize,
    top_k: usize,
    tokens: usize,
    backward: bool,
    device: String,
    median_ms: f64,
    min_ms: f64,
    /// Of the products of the experts that are active: `6 d_model d_ff` a token and expert forward, three times that
    /// forward and backward.
    gflops: f64,
    /// At the peak, beyond parameters and inputs.
    peak_bytes: usize,
}

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    if args.tokens == 0 || args.repeats == 0 {
        return Err("--tokens and --repeats are at least 1".into());
    }
    check_size(&[args.experts, args.d_model, args.d_ff])?;
    check_size(&[args.tokens, args.top_k.max(1), args.d_model.max(args.d_ff)])?;
    let config = args.config();
    config.validate()?;
    let (device_name, device) = choose_device(args.device.as_deref())?;
    let device = match args.backward {
        true => device.autodiff(),
        false => device,
    };
    let implementation = ImplementationChoice::resolve(args.implementation, &device)?;
    let layer = args.layer(&config, implementation, &device)?;
    let x = uniform([1, args.tokens, args.d_model], 1, &device, DType::F32);
    let pass = Pass {
        backward: args.backward,
    };
    let times = time(&MEMORY, &device, args.repeats, || {
        pass.end(layer(pass.leaf(&x)));
    })?;
    let flops = 6.0 * (args.d_model * args.d_ff * args.top_k * args.tokens) as f64;
    let flops = if args.backward { 3.0 * flops } else { flops };
    let figures = Figures {
        layer: args.describe(),
        d_model: args.d_model,
        d_ff: args.d_ff,
        experts: args.experts,
        top_k: args.top_k,
        tokens: args.tokens,
        backward: args.backward,
        device: device_name.to_string(),
        median_ms: times.median_ms,
        min_ms: times.min_ms,
        gflops: flops / times.median_ms / 1e6,
        peak_bytes: times.peak_bytes,
    };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!(
            "{} on {}: median {:.3} ms, fastest {:.3} ms, {:.1} GFLOP/s, {:.1} MiB at the peak",
            figures.layer,
            figures.device,
            figures.median_ms,
            figures.min_ms,
            figures.gflops,
            figures.peak_bytes as f64 / f64::from(1 << 20)
        );
    }
    Ok(())
}

type Layer = Box<dyn Fn(Tensor<3>) -> Tensor<3>>;

impl Args {
    fn config(&self) -> MixtureOfExpertsConfig {
        let (d_model, n_experts, k) = (self.d_model, self.experts, self.top_k);
        let router = match self.router {
            RouterKind::Mixtral => RouterConfig::mixtral(d_model, n_experts, k),
            RouterKind::Switch => RouterConfig::switch(d_model, n_experts),
            RouterKind::NoisyTopK => RouterConfig::noisy_top_k(d_model, n_experts, k),
            RouterKind::Gshard => RouterConfig::gshard(d_model, n_experts),
            RouterKind::DeepseekV2 => RouterConfig::deepseek_v2(d_model, n_experts, k, 1.0),
            RouterKind::DeepseekV3 => RouterConfig::deepseek_v3(d_model, n_experts, k, 1.0),
            RouterKind::ExpertChoice => RouterConfig::expert_choice(d_model, n_experts, k as f64),
            RouterKind::Sinkhorn => RouterConfig::sinkhorn(d_model, n_experts, k),
        };
        let capacity = self
            .capacity_factor
            .map(|factor| Capacity::new(CapacitySize::Factor(factor)).with_in_evaluation(true));
        MixtureOfExpertsConfig::new(router, self.d_ff).with_capacity(capacity)
    }

    fn describe(&self) -> String {
        if self.dense {
            return "dense".to_owned();
        }
        let router = self.router.to_possible_value();
        router.map_or(String::new(), |router| router.get_name().to_owned())
    }

    /// The layer, in training where there is a backward pass: then routers draw their noise.
    fn layer(
        &self,
        config: &MixtureOfExpertsConfig,
        implementation: Implementation,
        device: &Device,
    ) -> Result<Layer, InvalidConfig> {
        let key = self.backward.then(|| RandomKey::new(0));
        let context = Context::new(Lengths::square(self.tokens)).with_dropout_key(key);
        if self.dense {
            let dense = FeedForwardConfig::new(self.d_model, self.top_k * self.d_ff)
                .with_activation(Activation::Silu)
                .with_bias(false);
            dense.validate()?;
            let layer = dense.init_gated(device);
            return Ok(Box::new(move |x| layer.forward(x, &context).hidden));
        }
        let layer = config.init(device);
        let placement = LocalBy(implementation);
        Ok(Box::new(move |x| {
            layer.forward_placed(x, &context, &placement).hidden
        }))
    }
}
