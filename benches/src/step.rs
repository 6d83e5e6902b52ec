//! A training step on tokens of no meaning.

use burn::{
    optim::ModuleOptimizer,
    tensor::{Device, Tensor, TensorData},
    train::TrainStep,
};
use emberlm::{
    core::RandomKey,
    training::{
        LanguageModel, TokenBatch, Trainable, TrainingConfig, global_norm, scale_gradients,
    },
};

/// A batch of the training's shape, of random tokens.
pub fn random_batch(training: &TrainingConfig, vocab_size: usize, device: &Device) -> TokenBatch {
    let shape = [training.batch_size, training.seq_length];
    let tokens = |seed| {
        let key = RandomKey::new(seed);
        let values: Vec<i32> = (0..training.tokens_per_step() as u64)
            .map(|i| key.below(i, vocab_size as u64) as i32)
            .collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    };
    TokenBatch::new(tokens(1), tokens(2))
}

/// The whole step of EmberLM's trainer: forward, backward, norm, clip, AdamW.
pub fn train_step<M: Trainable>(
    model: &mut LanguageModel<M>,
    optimizer: &mut ModuleOptimizer,
    batch: TokenBatch,
) {
    let output = TrainStep::step(model, batch);
    let n_targets = output.item.n_targets;
    let norm = global_norm(model, &output.grads) / n_targets;
    let gradients = scale_gradients(model, output.grads, (1.0 / norm).min(1.0) / n_targets);
    *model = optimizer.step(1e-3, model.clone(), gradients);
}
