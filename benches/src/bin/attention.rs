//! Times attention over a pattern, and its backward pass, as a Burn user calls it.
//!
//! cargo run --release -p emberlm-bench --bin attention -- --pattern causal --seq 2048 --backward --json

use std::{sync::Arc, time::Instant};

use burn::tensor::{DType, Device, Tensor};
use clap::{Parser, ValueEnum};
use emberlm::{
    attention::{AttendOptions, attend_by},
    core::{BatchData, BlockSizes, Lengths, Pattern, Schedule},
};
use emberlm_bench::{ImplementationChoice, Pass, check_size, time, uniform};
use emberlm_examples::{choose_device, exit_with};
use peak_alloc::PeakAlloc;
use serde::Serialize;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Time attention over a pattern
#[derive(Parser)]
struct Args {
    /// Pattern, such as causal, window:256, bigbird:64:3, strided:64, fixed:64:8, dilated:256:2, or documents:512,
    /// which is causal attention in documents of that length
    #[arg(long, default_value = "causal")]
    pattern: String,
    /// Query heads
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Key/value heads [default: as many as query heads]
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Width of a head
    #[arg(long, default_value_t = 64)]
    d_head: usize,
    /// Queries and keys
    #[arg(long, default_value_t = 2048)]
    seq: usize,
    /// Batch rows
    #[arg(long, default_value_t = 1)]
    batch: usize,
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
    #[arg(long, default_value_t = 7)]
    repeats: usize,
    /// Device
    #[arg(long)]
    device: Option<String>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Dtype {
    F64,
    F32,
    F16,
    Bf16,
}

/// One measurement.
#[derive(Serialize)]
struct Figures {
    pattern: String,
    batch: usize,
    heads: usize,
    kv_heads: usize,
    d_head: usize,
    seq: usize,
    backward: bool,
    implementation: String,
    device: String,
    median_ms: f64,
    min_ms: f64,
    /// Pairs of a query and a key, of all heads.
    n_visible: u64,
    /// Of visible pairs alone: `4 d` each forward, `14 d` forward and backward.
    gflops: f64,
    /// Bytes at the peak beyond those of query, key and value.
    peak_bytes: usize,
    /// The same over the bytes of query, key and value.
    peak_ratio: f64,
    schedule_ms: f64,
    density: f64,
}

fn main() -> std::process::ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(run(&Args::parse()))
}

fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let (device_name, device) = choose_device(args.device.as_deref())?;
    let kv_heads = args.kv_heads.unwrap_or(args.heads);
    if args.seq == 0 || args.repeats == 0 || kv_heads == 0 || !args.heads.is_multiple_of(kv_heads) {
        return Err("--seq and --repeats are at least 1, and --kv-heads divides --heads".into());
    }
    check_size(&[args.batch, args.heads, args.seq, args.d_head])?;
    let (pattern, data) = pattern(args)?;
    let lengths = Lengths::square(args.seq)
        .with_batch_size(args.batch)
        .with_n_heads(args.heads);
    let begin = Instant::now();
    let schedule = Schedule::compile(&pattern, &lengths, &BlockSizes::default(), &data)?;
    let schedule_ms = begin.elapsed().as_secs_f64() * 1e3;
    let schedule = Arc::new(schedule);
    let statistics = *schedule.statistics();

    let implementation = ImplementationChoice::resolve(args.implementation, &device)?;
    let at = if args.backward {
        device.clone().autodiff()
    } else {
        device.clone()
    };
    let query = input(args, args.heads, 1, &at);
    let [key, value] = [2, 3].map(|seed| input(args, kv_heads, seed, &at));
    let d_output = input(args, args.heads, 4, &at);
    let inputs_bytes = bytes(&query) + bytes(&key) + bytes(&value);

    let pass = Pass {
        backward: args.backward,
    };
    let times = time(&MEMORY, &at, args.repeats, || {
        let [query, key, value] = [&query, &key, &value].map(|input| pass.leaf(input));
        let options = AttendOptions::default();
        let output = attend_by(implementation, query, key, value, &schedule, &options);
        pass.end_with(output, &d_output);
    })?;
    let mut flops = statistics.forward_flops(args.d_head);
    if args.backward {
        flops += statistics.backward_flops(args.d_head);
    }
    let figures = Figures {
        pattern: args.pattern.clone(),
        batch: args.batch,
        heads: args.heads,
        kv_heads,
        d_head: args.d_head,
        seq: args.seq,
        backward: args.backward,
        implementation: format!("{implementation:?}").to_lowercase(),
        device: device_name.to_string(),
        median_ms: times.median_ms,
        min_ms: times.min_ms,
        n_visible: statistics.n_visible,
        gflops: flops as f64 / times.median_ms / 1e6,
        peak_bytes: times.peak_bytes,
        peak_ratio: times.peak_bytes as f64 / inputs_bytes as f64,
        schedule_ms,
        density: statistics.density,
    };
    if args.json {
        println!("{}", serde_json::to_string(&figures)?);
    } else {
        println!(
            "{} {}: {:.2} ms (at least {:.2}), {:.1} GFLOP/s, {:.2} times the inputs' memory; schedule {:.2} ms, density {:.4}",
            figures.implementation,
            figures.pattern,
            figures.median_ms,
            figures.min_ms,
            figures.gflops,
            figures.peak_ratio,
            figures.schedule_ms,
            figures.density
        );
    }
    Ok(())
}

/// The pattern, and the documents of `documents:N`.
fn pattern(args: &Args) -> Result<(Pattern, BatchData), Box<dyn std::error::Error>> {
    let Some(length) = args.pattern.strip_prefix("documents:") else {
        return Ok((args.pattern.parse()?, BatchData::new()));
    };
    let length: usize = length
        .parse()
        .map_err(|error| format!("--pattern {}: the documents' length: {error}", args.pattern))?;
    if length == 0 {
        return Err("--pattern documents: the documents' length is at least 1".into());
    }
    let documents = (0..args.seq).map(|i| (i / length) as u32).collect();
    Ok((
        Pattern::causal() & Pattern::documents(),
        BatchData::new().with_documents(vec![documents; args.batch]),
    ))
}

fn input(args: &Args, n_heads: usize, seed: u64, device: &Device) -> Tensor<4> {
    let shape = [args.batch, n_heads, args.seq, args.d_head];
    let dtype = match args.dtype {
        Dtype::F64 => DType::F64,
        Dtype::F32 => DType::F32,
        Dtype::F16 => DType::F16,
        Dtype::Bf16 => DType::BF16,
    };
    uniform(shape, seed, device, dtype)
}

fn bytes(tensor: &Tensor<4>) -> usize {
    tensor.shape().num_elements() * tensor.dtype().size()
}
