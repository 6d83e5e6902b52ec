//! Times whole training steps: EmberLM's decoder beside a plain burn-nn `TransformerEncoder` of the same shapes, in one
//! process, alternating.
//!
//! cargo run --release -p emberlm-bench -- --preset tiny --steps 20

use std::time::Instant;

use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, Initializer, Linear, LinearConfig,
        attention::generate_autoregressive_mask,
        transformer::{TransformerEncoder, TransformerEncoderConfig, TransformerEncoderInput},
    },
    optim::{AdamWConfig, GradientsParams, ModuleOptimizer},
    tensor::{Device, Int, Tensor, TensorData},
    train::TrainStep,
};
use clap::Parser;
use emberlm::{
    core::{CausalModel, CrossEntropyConfig, RandomKey},
    training::{LanguageModel, TokenBatch, adamw, global_norm, scale_gradients},
};
use emberlm_examples::{Preset, choose_device};

/// Time training steps beside plain Burn
#[derive(Parser)]
struct Args {
    /// Which shapes
    #[arg(long, default_value = "tiny")]
    preset: Preset,
    /// Counted steps of each
    #[arg(long, default_value_t = 20)]
    steps: usize,
    /// Device
    #[arg(long)]
    device: Option<String>,
    /// Time only this one, without alternating
    #[arg(long)]
    only: Option<Contender>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Contender {
    Emberlm,
    PlainBurn,
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
    fn new(preset: Preset, device: &Device) -> Self {
        let (model, training) = preset.resolve();
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
            positions: table(training.seq_length),
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

fn batch(preset: Preset, device: &Device) -> TokenBatch {
    let (_, training) = preset.resolve();
    let shape = [training.batch_size, training.seq_length];
    let tokens = |seed| {
        let key = RandomKey::new(seed);
        let values: Vec<i32> = (0..training.tokens_per_step() as u64)
            .map(|i| key.below(i, 256) as i32)
            .collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    };
    TokenBatch {
        inputs: tokens(1),
        targets: tokens(2),
        dropout_key: None,
    }
}

/// The whole step of EmberLM's trainer: forward, backward, norm, clip, AdamW.
fn our_step<M>(model: &mut LanguageModel<M>, optimizer: &mut ModuleOptimizer, batch: TokenBatch)
where
    M: emberlm::training::Trainable,
{
    let output = TrainStep::step(model, batch);
    let n_targets = output.item.n_targets;
    let norm = global_norm(model, &output.grads) / n_targets;
    let gradients = scale_gradients(model, output.grads, (1.0 / norm).min(1.0) / n_targets);
    *model = optimizer.step(1e-3, model.clone(), gradients);
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

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let (name, device) = choose_device(args.device.as_deref())?;
    println!("device: {name}");
    let device = device.autodiff();
    let batch = batch(args.preset, &device);
    let (config, training) = args.preset.resolve();
    let mut ours = LanguageModel::new(config.init(&device), 0.0, 0.0);
    let mut our_optimizer = adamw(&training, &ours);
    let mut plain = PlainBurn::new(args.preset, &device);
    let mut plain_optimizer = AdamWConfig::new().init();
    let (mut our_times, mut plain_times) = (Vec::new(), Vec::new());
    // Two uncounted steps of each: allocation and warm-up.
    for step in 0..args.steps + 2 {
        if args.only != Some(Contender::PlainBurn) {
            let begin = Instant::now();
            our_step(&mut ours, &mut our_optimizer, batch.clone());
            if step >= 2 {
                our_times.push(begin.elapsed().as_secs_f64());
            }
        }
        if args.only != Some(Contender::Emberlm) {
            let begin = Instant::now();
            plain_step(&mut plain, &mut plain_optimizer, batch.clone());
            if step >= 2 {
                plain_times.push(begin.elapsed().as_secs_f64());
            }
        }
    }
    let tokens = training.tokens_per_step() as f64;
    let line = |name: &str, times: &[f64]| {
        if !times.is_empty() {
            let seconds = median(times.to_vec());
            println!(
                "{name:<12} {:8.1} ms a step, {:6.0} tokens/s (median of {})",
                seconds * 1e3,
                tokens / seconds,
                times.len()
            );
        }
    };
    line("emberlm", &our_times);
    line("plain burn", &plain_times);
    if args.only.is_none() {
        println!(
            "speed of emberlm over plain burn: {:.2}",
            median(plain_times) / median(our_times)
        );
    }
    Ok(())
}
