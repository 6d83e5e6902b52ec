//! A Burn model of one's own with EmberLM's attention in the middle: it learns to predict the next byte of this file.
//!
//! Embedding, norms, feed-forward layer, loss and optimizer are Burn's. The attention sees the byte itself and the 31
//! before it, with two query heads to a key/value head and rotary positions.

use burn::{
    module::Module,
    nn::{
        Embedding, EmbeddingConfig, Gelu, LayerNorm, LayerNormConfig, Linear, LinearConfig,
        loss::CrossEntropyLossConfig,
    },
    optim::{AdamWConfig, GradientsParams},
    tensor::{Device, Int, Tensor, TensorData},
};
use emberlm::{
    attention::{GroupedQueryAttention, GroupedQueryAttentionConfig},
    core::{Context, Lengths, Pattern, RotaryConfig, SequenceMixer, Window},
};

const TEXT: &[u8] = include_bytes!("main.rs");
const BATCH_SIZE: usize = 8;
const LENGTH: usize = 96;
const WIDTH: usize = 64;
const STEPS: usize = 120;

/// Scores the next byte at every position.
#[derive(Module, Debug)]
struct ByteModel {
    bytes: Embedding,
    attention_norm: LayerNorm,
    attention: GroupedQueryAttention,
    feed_forward_norm: LayerNorm,
    up: Linear,
    gelu: Gelu,
    down: Linear,
    norm: LayerNorm,
    scores: Linear,
}

impl ByteModel {
    fn new(device: &Device) -> Self {
        let norm = LayerNormConfig::new(WIDTH);
        let attention = GroupedQueryAttentionConfig::new(WIDTH, 4) // query heads
            .with_n_kv_heads(Some(2))
            .with_rotary(Some(RotaryConfig::new(WIDTH / 4)))
            .with_pattern(Pattern::causal() & Pattern::window(Window::causal(32)));
        Self {
            bytes: EmbeddingConfig::new(256, WIDTH).init(device),
            attention_norm: norm.init(device),
            attention: attention.init(device),
            feed_forward_norm: norm.init(device),
            up: LinearConfig::new(WIDTH, 4 * WIDTH).init(device),
            gelu: Gelu::new(),
            down: LinearConfig::new(4 * WIDTH, WIDTH).init(device),
            norm: norm.init(device),
            scores: LinearConfig::new(WIDTH, 256).init(device),
        }
    }

    /// `[BATCH_SIZE, LENGTH]` to `[BATCH_SIZE, LENGTH, 256]`.
    fn forward(&self, bytes: Tensor<2, Int>) -> Tensor<3> {
        // What the attention has to know of the batch: here, how long its sequences are.
        let context = Context::new(Lengths::square(LENGTH));
        let x = self.bytes.forward(bytes);
        let normed = self.attention_norm.forward(x.clone());
        let x = x + self.attention.forward(normed, &context);
        let normed = self.feed_forward_norm.forward(x.clone());
        let inner = self.gelu.forward(self.up.forward(normed));
        let x = x + self.down.forward(inner);
        self.scores.forward(self.norm.forward(x))
    }
}

/// Windows of the text, spread over it by the step's number, and the byte after each of theirs.
fn batch(step: usize, device: &Device) -> (Tensor<2, Int>, Tensor<1, Int>) {
    let start = |row: usize| (step * BATCH_SIZE + row) * 1009 % (TEXT.len() - LENGTH);
    let values = |shift: usize| -> Vec<i32> {
        let windows = (0..BATCH_SIZE).map(|row| &TEXT[start(row) + shift..][..LENGTH]);
        windows.flatten().map(|&byte| i32::from(byte)).collect()
    };
    let inputs = TensorData::new(values(0), [BATCH_SIZE, LENGTH]);
    let targets = TensorData::new(values(1), [BATCH_SIZE * LENGTH]);
    (
        Tensor::from_data(inputs, device),
        Tensor::from_data(targets, device),
    )
}

fn main() {
    let device = Device::flex().autodiff();
    device.seed(1);
    let mut model = ByteModel::new(&device);
    let mut optimizer = AdamWConfig::new().init();
    let criterion = CrossEntropyLossConfig::new().init(&device);
    println!("{} parameters", model.num_params());
    for step in 1..=STEPS {
        let (inputs, targets) = batch(step, &device);
        let scores = model.forward(inputs).flatten::<2>(0, 1);
        let loss = criterion.forward(scores, targets);
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(3e-3, model, gradients);
        if step == 1 || step % 20 == 0 {
            let nats: f64 = loss.into_scalar();
            println!("step {step:>3}: loss {nats:.3} nats per byte");
        }
    }
}
