//! The shapes that are timed, by the names that `benches/peers/decoder.py` has for them too.

use clap::ValueEnum;
use emberlm::{
    core::{Activation, NormConfig, RotaryLayout},
    models::{DecoderConfig, FeedForwardKind, PositionsConfig},
    training::TrainingConfig,
};
use emberlm_examples::Preset;

/// A named shape of model and batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// 4 layers, width 128, 4 heads, 8 sequences of 256: the preset of `pretrain`
    Tiny,
    /// 6 layers, width 384, 6 heads, 8 sequences of 256: the preset of `pretrain`
    Small,
    /// 4 layers, width 256, 4 heads, 2 sequences of 1024
    Long,
    /// 2 layers, width 768, 12 heads, 8 sequences of 128
    Wide,
    /// The sizes of small with RMS norm, rotary positions and SwiGLU of inner width 1024
    Llama,
}

impl Shape {
    /// The model and how it is trained.
    pub(crate) fn resolve(self) -> (DecoderConfig, TrainingConfig) {
        let (small, plan) = decoder(Preset::Small);
        match self {
            Self::Tiny => decoder(Preset::Tiny),
            Self::Small => (small, plan),
            Self::Long => (
                learned(small.vocab_size, 4, 256, 4, 1024),
                TrainingConfig::new(plan.steps, 2, 1024).with_learning_rate(plan.learning_rate),
            ),
            Self::Wide => (
                learned(small.vocab_size, 2, 768, 12, 128),
                TrainingConfig::new(plan.steps, 8, 128).with_learning_rate(plan.learning_rate),
            ),
            Self::Llama => (
                small
                    .with_d_ff(Some(1024))
                    .with_positions(PositionsConfig::Rotary {
                        theta: 10_000.0,
                        layout: RotaryLayout::HalfSplit,
                    })
                    .with_norm(NormConfig::Rms { epsilon: 1e-5 })
                    .with_feed_forward(FeedForwardKind::Gated)
                    .with_activation(Activation::Silu),
                plan,
            ),
        }
    }

    /// Whether burn-nn's encoder can be built with it.
    pub(crate) fn is_gpt(self) -> bool {
        self != Self::Llama
    }

    /// The name on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value()
            .expect("no shape is hidden")
            .get_name()
            .to_owned()
    }

    /// Floating-point operations that a training step asks for:
    ///
    /// `6 tokens n_matrix_parameters + 14 d_head visible_pairs n_heads n_layers batch_size`.
    ///
    /// A matrix is used once forward and twice backward, two operations a parameter and token; the tied embedding
    /// counts once, as the output projection. Attention has two products forward and five backward, which calculates
    /// the scores again, over the pairs that causal attention sees. Norms, activations, softmax, loss and optimizer are
    /// not counted, nor is what an implementation does beyond this, such as hidden pairs.
    pub(crate) fn flops_per_step(self) -> f64 {
        let (model, training) = self.resolve();
        let length = training.seq_length;
        let visible_pairs = length * (length + 1) / 2;
        // d_head times n_heads is d_model.
        let attention = 14 * model.d_model * visible_pairs * model.n_layers * training.batch_size;
        (6 * training.tokens_per_step() * n_matrix_parameters(&model) + attention) as f64
    }
}

fn decoder(preset: Preset) -> (DecoderConfig, TrainingConfig) {
    let (model, plan) = preset.resolve();
    (
        model.decoder().expect("the preset is one of a decoder"),
        plan,
    )
}

/// A GPT with a learned position for each token of a sequence.
fn learned(
    vocab_size: usize,
    n_layers: usize,
    d_model: usize,
    n_heads: usize,
    seq_length: usize,
) -> DecoderConfig {
    DecoderConfig::new(vocab_size, n_layers, d_model, n_heads).with_positions(
        PositionsConfig::Learned {
            max_seq_length: seq_length,
        },
    )
}

/// Parameters that every token is multiplied by: those of the projections and of the tied embedding.
fn n_matrix_parameters(model: &DecoderConfig) -> usize {
    let n_feed_forward = match model.feed_forward {
        FeedForwardKind::Plain => 2,
        FeedForwardKind::Gated => 3,
    };
    let block = 4 * model.d_model * model.d_model
        + n_feed_forward * model.d_model * model.feed_forward_width();
    model.n_layers * block + model.vocab_size * model.d_model
}

#[cfg(test)]
mod tests {
    use burn::{module::Module, tensor::Device};

    use super::*;

    #[test]
    fn matrices_are_all_but_norms_and_positions() {
        for shape in Shape::value_variants() {
            let (model, _) = shape.resolve();
            let norms = (2 * model.n_layers + 1) * model.d_model;
            let positions = model.max_seq_length().unwrap_or(0) * model.d_model;
            let n_parameters = model.init(&Device::flex()).num_params();
            assert_eq!(
                n_matrix_parameters(&model),
                n_parameters - norms - positions,
                "{shape:?}"
            );
        }
    }

    #[test]
    fn a_step_of_each_shape_has_its_operations() {
        // What flops_per_step of benches/peers/decoder.py gives.
        let flops = Shape::value_variants()
            .iter()
            .map(|shape| shape.flops_per_step());
        let expected = [
            11_952_717_824.0,
            140_156_338_176.0,
            54_507_077_632.0,
            89_601_343_488.0,
            140_156_338_176.0,
        ];
        assert_eq!(flops.collect::<Vec<_>>(), expected);
    }
}
