//! The decoder against an independent PyTorch implementation: scores, loss and every gradient.
//! `fixtures/decoder/generate.py` made the numbers.

use burn::tensor::{DType, TensorData};
use emberlm_core::{Activation, CausalModel, CrossEntropyConfig, NormConfig, RotaryLayout};
use emberlm_models::{DecoderConfig, FeedForwardKind, PositionsConfig};
use emberlm_testkit::{
    Fixture, device, gradients_by_name, largest_difference, load_parameters, parameters_by_name,
};

fn check(config: &DecoderConfig, file: &str, dtype: DType, tolerance: f64) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/decoder");
    let fixture = Fixture::load(format!("{path}/{file}"));
    let device = device().autodiff();
    let names = fixture.names("param.");
    let model = load_parameters(config.init(&device), |name| {
        fixture.data(&format!("param.{name}")).convert_dtype(dtype)
    });
    let ours: Vec<String> = parameters_by_name(&model).into_keys().collect();
    assert_eq!(ours, names, "the parameters are the reference's");

    let logits = model.forward(fixture.ints("in.tokens", &device), None);
    let [batch_size, seq_length, vocab_size] = logits.dims();
    let compare = |what: &str, actual: &TensorData| {
        let difference = largest_difference(actual, &fixture.data(what));
        assert!(
            difference <= tolerance,
            "{what}: largest difference {difference:e}"
        );
    };
    compare("out.logits", &logits.to_data());

    let loss = CrossEntropyConfig::new().forward(
        logits.reshape([batch_size * seq_length, vocab_size]),
        fixture
            .ints::<2>("in.targets", &device)
            .reshape([batch_size * seq_length]),
    );
    let loss = loss.mean();
    compare("out.loss", &loss.to_data());

    let gradients = gradients_by_name(&model, &loss.backward());
    assert_eq!(
        gradients.len(),
        names.len(),
        "every parameter has a gradient"
    );
    for (name, gradient) in &gradients {
        if let Some(block) = name.strip_suffix("key.bias") {
            // A shift of all keys changes no softmax: the true gradient is zero, and what both sides have is rounding,
            // small beside the gradient of the queries' bias.
            let query = largest_magnitude(&fixture.data(&format!("grad.{block}query.bias")));
            let rounding = largest_magnitude(gradient);
            assert!(
                rounding <= tolerance * query,
                "grad.{name} is {rounding:e}, not zero"
            );
        } else {
            compare(&format!("grad.{name}"), gradient);
        }
    }
}

fn largest_magnitude(data: &TensorData) -> f64 {
    data.iter::<f64>()
        .fold(0.0, |largest, x| largest.max(x.abs()))
}

fn gpt2_like() -> DecoderConfig {
    DecoderConfig::new(11, 2, 12, 3)
        .with_d_ff(Some(20))
        .with_positions(PositionsConfig::Learned { max_seq_length: 9 })
        .with_norm(NormConfig::Layer {
            epsilon: 1e-5,
            bias: true,
        })
        .with_bias(true)
}

fn llama_like() -> DecoderConfig {
    DecoderConfig::new(11, 2, 16, 4)
        .with_n_kv_heads(Some(2))
        .with_d_ff(Some(20))
        .with_positions(PositionsConfig::Rotary {
            theta: 10_000.0,
            layout: RotaryLayout::HalfSplit,
        })
        .with_norm(NormConfig::Rms { epsilon: 1e-5 })
        .with_feed_forward(FeedForwardKind::Gated)
        .with_activation(Activation::Silu)
        .with_tied_embedding(false)
}

#[test]
fn gpt2_like_in_f64() {
    check(&gpt2_like(), "case.safetensors", DType::F64, 1e-9);
}

#[test]
fn gpt2_like_in_f32() {
    check(&gpt2_like(), "case.safetensors", DType::F32, 1e-4);
}

#[test]
fn llama_like_in_f64() {
    check(&llama_like(), "rotary.safetensors", DType::F64, 1e-9);
}

#[test]
fn llama_like_in_f32() {
    check(&llama_like(), "rotary.safetensors", DType::F32, 1e-4);
}
