//! A mixer of one's own, in one file: its formula, its cache, a model around it, a training, and the tests of its laws.
//!
//! cargo run --release --example new_variant
//!
//! The book's chapter "A mixer of your own" explains it line by line.

use std::{process::ExitCode, sync::Arc};

use burn::{
    config::Config,
    data::dataloader::DataLoader,
    module::{Initializer, Module, Param},
    nn::{Embedding, EmbeddingConfig, Linear, LinearConfig},
    tensor::{Device, Tensor, TensorData, activation::sigmoid, s},
};
use clap::Parser;
use emberlm::{
    core::{
        Context, CrossEntropyConfig, FeedForwardConfig, InvalidConfig, Lengths, LossModel, Mlp,
        ModelLoss, ResidualBlock, ResidualBlockConfig, SequenceMixer, TokenBatch, assert_valid,
    },
    text::Corpus,
    training::{LanguageModel, Session, TrainingConfig, TrainingLoader, TrainingWindows},
};
use emberlm_examples::{choose_device, exit_with, say, shipped};

// ANCHOR: config
/// Configuration of [`MovingAverage`].
#[derive(Config, Debug)]
pub struct MovingAverageConfig {
    /// Width of the model.
    pub d_model: usize,
    /// Number of heads, each with a decay of its own; divides `d_model`.
    pub n_heads: usize,
}

impl MovingAverageConfig {
    /// Checks the fields against each other.
    ///
    /// # Errors
    ///
    /// A zero, or heads that do not divide the width.
    pub fn validate(&self) -> Result<(), InvalidConfig> {
        let Self { d_model, n_heads } = *self;
        InvalidConfig::require_positive(&[("d_model", d_model), ("n_heads", n_heads)])?;
        if !d_model.is_multiple_of(n_heads) {
            return Err(InvalidConfig::HeadWidth { d_model, n_heads });
        }
        Ok(())
    }

    /// Makes the module.
    ///
    /// # Panics
    ///
    /// If the config is invalid.
    pub fn init(&self, device: &Device) -> MovingAverage {
        assert_valid(self.validate());
        let linear = || LinearConfig::new(self.d_model, self.d_model).init(device);
        let (min, max) = (-2.0, 3.0);
        MovingAverage {
            value: linear(),
            output: linear(),
            decay: Initializer::Uniform { min, max }.init([self.n_heads], device),
        }
    }
}
// ANCHOR_END: config

// ANCHOR: module
/// An exponential moving average in each head `h`, with `v_t = x_t W^V` and a learned decay `a_h = sigmoid(d_h)`:
///
/// ```text
/// m_t = a_h m_{t-1} + (1 - a_h) v_t,   y_t = m_t W^O
/// ```
///
/// It looks at positions alone and knows neither padding nor packed documents.
#[derive(Module, Debug)]
pub struct MovingAverage {
    /// `[d_model, d_model]`
    pub value: Linear,
    /// `[d_model, d_model]`
    pub output: Linear,
    /// Before the sigmoid: `[n_heads]`
    pub decay: Param<Tensor<1>>,
}

/// The last average of each head, `[batch_size, n_heads, 1, d_head]`; nothing before the first token.
#[derive(Clone, Debug, Default)]
pub struct LastAverage(Option<Tensor<4>>);

impl SequenceMixer for MovingAverage {
    type Cache = LastAverage;

    fn forward(&self, x: Tensor<3>, context: &Context) -> Tensor<3> {
        self.forward_cached(x, context, &mut LastAverage::default())
    }

    fn forward_cached(
        &self,
        x: Tensor<3>,
        _context: &Context,
        cache: &mut LastAverage,
    ) -> Tensor<3> {
        let [batch_size, length, d_model] = x.dims();
        let n_heads = self.decay.dims()[0];
        let shape = [batch_size, length, n_heads, d_model / n_heads];
        let values = self.value.forward(x).reshape(shape).swap_dims(1, 2);

        // All at once: m_t = a^(t+1) m_before + sum over s <= t of a^(t-s) (1 - a) v_s.
        let decay = sigmoid(self.decay.val()).reshape([1, n_heads, 1, 1]);
        let (steps, past) = distances(length, &values);
        let weights = decay.clone().powf(steps) * past * (-decay.clone() + 1.0);
        let mut averages = weights.matmul(values);
        if let Some(before) = cache.0.take() {
            let since = Tensor::arange(1..length as i64 + 1, &before.device());
            let since = since
                .float()
                .cast(before.dtype())
                .reshape([1, 1, length, 1]);
            averages = averages + decay.powf(since) * before;
        }
        cache.0 = Some(averages.clone().slice(s![.., .., length - 1.., ..]));
        let joined = averages
            .swap_dims(1, 2)
            .reshape([batch_size, length, d_model]);
        self.output.forward(joined)
    }

    fn new_cache(&self, _capacity: usize) -> LastAverage {
        LastAverage::default()
    }
}

/// How many steps each key lies before each query, and 1 where it does, else 0: both `[1, 1, length, length]`.
fn distances(length: usize, like: &Tensor<4>) -> (Tensor<4>, Tensor<4>) {
    let pairs = (0..length).flat_map(|query| (0..length).map(move |key| (query, key)));
    let steps: Vec<f64> = pairs
        .clone()
        .map(|(query, key)| query.saturating_sub(key) as f64)
        .collect();
    let past: Vec<f64> = pairs.map(|(query, key)| f64::from(key <= query)).collect();
    let tensor = |numbers| {
        let data = TensorData::new(numbers, [1, 1, length, length]);
        Tensor::from_data(data, (&like.device(), like.dtype()))
    };
    (tensor(steps), tensor(past))
}
// ANCHOR_END: module

// ANCHOR: model
/// Bytes in, scores of the next byte out: two residual blocks with the new mixer.
#[derive(Module, Debug)]
struct ByteModel {
    bytes: Embedding,
    blocks: Vec<ResidualBlock<MovingAverage, Mlp>>,
    scores: Linear,
}

impl ByteModel {
    fn new(width: usize, device: &Device) -> Self {
        let block = |_| {
            let mixer = MovingAverageConfig::new(width, 4).init(device);
            let feed_forward = FeedForwardConfig::new(width, 4 * width).init(device);
            ResidualBlockConfig::new(width).init(mixer, feed_forward, device)
        };
        Self {
            bytes: EmbeddingConfig::new(256, width).init(device),
            blocks: (0..2).map(block).collect(),
            scores: LinearConfig::new(width, 256).init(device),
        }
    }
}

impl LossModel for ByteModel {
    fn loss(&self, batch: TokenBatch, config: &CrossEntropyConfig) -> ModelLoss {
        let [_, length] = batch.inputs.dims();
        let context = Context::new(Lengths::square(length));
        let x = self.bytes.forward(batch.inputs);
        let x = (self.blocks.iter()).fold(x, |x, block| block.forward(x, &context));
        let scores = self.scores.forward(x);
        let targets = batch.targets.flatten(0, 1);
        config.forward(scores.flatten(0, 1), targets).into()
    }
}
// ANCHOR_END: model

/// Train a language model around a mixer that is no part of EmberLM
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Number of optimizer steps
    #[arg(long, default_value_t = 200)]
    steps: u64,
    /// Device, such as flex, ndarray, vulkan:0
    #[arg(long)]
    device: Option<String>,
}

fn main() -> ExitCode {
    emberlm::kernels::keep_freed_memory();
    exit_with(run(&Args::parse()))
}

// ANCHOR: training
fn run(args: &Args) -> Result<(), Box<dyn std::error::Error>> {
    let (name, device) = choose_device(args.device.as_deref())?;
    say(format_args!("device: {name}"));
    let config = TrainingConfig::new(args.steps, 8, 64).with_learning_rate(3e-3);
    config.validate()?;
    let corpus = Corpus::open(&[shipped("austen.txt")])?;
    let windows = TrainingWindows::new(corpus.training(), config.seq_length, config.seed)?;
    let loader = TrainingLoader::new(Arc::new(windows), &config, 1, &device);

    let device = device.autodiff();
    device.seed(config.seed);
    let model = LanguageModel::new(ByteModel::new(64, &device), 0.0, 0.0);
    say(format_args!("{} parameters", model.num_params()));
    let mut session = Session::new(model, &config);
    let mut batches = loader.iter();
    for step in 1..=config.steps {
        let (figures, _) = session.step(&config, &mut batches)?;
        if step == 1 || step % 50 == 0 {
            say(format_args!(
                "step {step:>4}: loss {:.3} nats per byte",
                figures.loss()
            ));
        }
    }
    Ok(())
}
// ANCHOR_END: training

// ANCHOR: tests
#[cfg(test)]
mod tests {
    use burn::tensor::DType;
    use emberlm_testkit::{assert_gradients_match, device, laws, random, to_f64};

    use super::*;

    fn context(x: &Tensor<3>) -> Context {
        Context::new(Lengths::square(x.dims()[1]))
    }

    #[test]
    fn it_keeps_the_laws_of_a_causal_mixer() {
        let device = device();
        let mixer = MovingAverageConfig::new(12, 3).init(&device);
        laws::causal([2, 7, 12], &device, |x| {
            mixer.forward(x.clone(), &context(&x))
        });
        let mut cache = mixer.new_cache(7);
        laws::cached_equals_full(
            random([2, 7, 12], 1, DType::F32, &device),
            |x| mixer.forward(x.clone(), &context(&x)),
            |x, position| {
                if position == 0 {
                    cache = mixer.new_cache(7);
                }
                let [_, n, _] = x.dims();
                let lengths = Lengths::new(n, position + n).with_first_position(position);
                mixer.forward_cached(x, &Context::new(lengths), &mut cache)
            },
        );
    }

    #[test]
    fn its_gradients_are_those_of_finite_differences() {
        let device = device().autodiff();
        let mixer = to_f64(MovingAverageConfig::new(4, 2).init(&device));
        let x = random([2, 3, 4], 1, DType::F64, &device);
        assert_gradients_match(x, |x| mixer.forward(x.clone(), &context(&x)));
    }

    #[test]
    fn a_constant_is_its_own_average_in_the_end() {
        let device = device();
        let mixer = to_f64(MovingAverageConfig::new(4, 2).init(&device));
        let x = random([1, 1, 4], 1, DType::F64, &device);
        let y = mixer.forward(x.clone().repeat_dim(1, 2000), &context(&x));
        let expected = mixer.output.forward(mixer.value.forward(x));
        emberlm_testkit::assert_close(y.slice(s![.., 1999.., ..]), expected, 1e-9);
    }

    #[test]
    fn heads_must_divide_the_width() {
        let error = MovingAverageConfig::new(10, 3).validate();
        assert!(matches!(error, Err(InvalidConfig::HeadWidth { .. })));
    }
}
// ANCHOR_END: tests
