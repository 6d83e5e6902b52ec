//! Stacks against torch.nn.Transformer, and the encoder against Hugging Face's BERT: outputs and every gradient.
//! `fixtures/transformer/generate.py` and `fixtures/bert/convert.py` made the numbers.

mod reference;

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor, TensorData},
};
use emberlm_core::{
    Activation, BatchData, Context, CrossEntropyConfig, IGNORED_TARGET, Lengths, LossModel,
    NormPlacement, Pattern, TokenBatch,
};
use emberlm_models::{Encoder, EncoderConfig, PositionsConfig, Stack, StackConfig};
use emberlm_testkit::{Fixture, device, largest_difference};
use reference::{check, check_gradients, hidden_keys, load, padding, with_parameters};

#[derive(Module, Debug)]
struct Transformer {
    encoder: Stack,
    decoder: Stack,
}

fn transformer(placement: NormPlacement, activation: Activation, device: &Device) -> Transformer {
    let stack = |n_layers| {
        StackConfig::new(n_layers, 12, 3)
            .with_d_ff(Some(20))
            .with_norm_placement(placement)
            .with_final_norm(Some(true))
            .with_activation(activation)
    };
    Transformer {
        encoder: stack(2).init(device),
        decoder: stack(3)
            .with_pattern(Pattern::causal())
            .with_cross_attention(true)
            .init(device),
    }
}

fn check_transformer(
    file: &str,
    placement: NormPlacement,
    activation: Activation,
    dtype: DType,
    tolerance: f64,
) {
    let fixture = load(&format!("transformer/{file}"));
    let device = device().autodiff();
    let model = transformer(placement, activation, &device);
    let model = with_parameters(model, &fixture, dtype);
    let input = |name: &str| fixture.tensor::<3>(name, dtype, &device).require_grad();
    let (source, target) = (input("in.source"), input("in.target"));
    let [batch_size, source_length, _] = source.dims();
    let [_, target_length, _] = target.dims();

    let source_padding = hidden_keys(&fixture, "in.source_padding");
    let context = |length, data: &BatchData| {
        Context::new(Lengths::square(length)).with_data(batch_size, data.clone())
    };
    let encoded = model.encoder.forward(
        source.clone(),
        &context(source_length, &source_padding),
        None,
    );
    let encoded = model.decoder.project_source(encoded.hidden, source_padding);
    let target_padding = hidden_keys(&fixture, "in.target_padding");
    let output = model.decoder.forward(
        target.clone(),
        &context(target_length, &target_padding),
        Some(&encoded),
    );
    let output = output.hidden;

    // What stands at padded targets means nothing.
    let is_padding: Vec<bool> = padding(&fixture, "in.target_padding").concat();
    let kept: Vec<bool> = is_padding.iter().flat_map(|padded| [!padded; 12]).collect();
    let keep = |data: TensorData| {
        let values: Vec<f64> = data
            .iter::<f64>()
            .zip(&kept)
            .map(|(value, kept)| if *kept { value } else { 0.0 })
            .collect();
        let n = values.len();
        TensorData::new(values, [n])
    };
    let difference = largest_difference(&keep(output.to_data()), &keep(fixture.data("out")));
    assert!(difference <= tolerance, "out: {difference:e}");

    let cotangent = fixture.tensor::<3>("ct", dtype, &device);
    let gradients = (output * cotangent).sum().backward();
    for (name, input) in [("grad.source", source), ("grad.target", target)] {
        let gradient = input.grad(&gradients).expect("the output depends on it");
        check(&fixture, name, &gradient.into_data(), tolerance);
    }
    check_gradients(&model, &gradients, &fixture, tolerance);
}

#[test]
fn pre_norm_in_f64() {
    let placement = NormPlacement::Pre;
    check_transformer(
        "pre_norm.safetensors",
        placement,
        Activation::Relu,
        DType::F64,
        1e-10,
    );
}

#[test]
fn pre_norm_in_f32() {
    let placement = NormPlacement::Pre;
    check_transformer(
        "pre_norm.safetensors",
        placement,
        Activation::Relu,
        DType::F32,
        1e-4,
    );
}

#[test]
fn post_norm_in_f64() {
    let placement = NormPlacement::Post;
    check_transformer(
        "post_norm.safetensors",
        placement,
        Activation::Gelu,
        DType::F64,
        1e-10,
    );
}

#[test]
fn post_norm_in_f32() {
    let placement = NormPlacement::Post;
    check_transformer(
        "post_norm.safetensors",
        placement,
        Activation::Gelu,
        DType::F32,
        1e-4,
    );
}

/// The BERT of the fixtures, and the hidden states of their inputs.
fn bert(fixture: &Fixture, config: EncoderConfig, device: &Device) -> (Encoder, Tensor<3>) {
    let model = with_parameters(config.init(device), fixture, DType::F32);
    let hidden = model.hidden_states(
        fixture.ints("in.tokens", device),
        Some(fixture.ints("in.types", device)),
        hidden_keys(fixture, "in.padding"),
        None,
    );
    (model, hidden)
}

fn bert_config() -> EncoderConfig {
    EncoderConfig::new(64, 2, 32, 4)
        .with_d_ff(Some(64))
        .with_positions(PositionsConfig::Learned { max_seq_length: 32 })
}

#[test]
fn encoder_with_pooler_equals_hugging_faces_bert() {
    let fixture = load("bert/base.safetensors");
    let device = device().autodiff();
    let config = bert_config().with_masked_head(false).with_pooler(true);
    let (model, hidden) = bert(&fixture, config, &device);
    check(&fixture, "out.hidden", &hidden.to_data(), 1e-4);
    let pooled = model.pooled(hidden.clone());
    check(&fixture, "out.pooled", &pooled.to_data(), 1e-4);
    let cotangent = fixture.tensor::<3>("ct.hidden", DType::F32, &device);
    let loss = (hidden * cotangent).sum();
    let cotangent = fixture.tensor::<2>("ct.pooled", DType::F32, &device);
    let loss = loss + (pooled * cotangent).sum();
    check_gradients(&model, &loss.backward(), &fixture, 1e-4);
}

#[test]
fn masked_head_equals_hugging_faces_bert() {
    let fixture = load("bert/masked.safetensors");
    let device = device().autodiff();
    let (model, hidden) = bert(&fixture, bert_config(), &device);
    let scores = model.masked_scores(hidden);
    check(&fixture, "out.scores", &scores.to_data(), 1e-4);

    // What the model itself makes of a batch, whose types are all the first: with the fixture's types it would be the
    // mean of the labels' losses that is in the gradients.
    let [batch_size, seq_length, vocab_size] = scores.dims();
    let labels = fixture.ints::<2>("in.labels", &device);
    let config = CrossEntropyConfig::new().with_ignored_target(Some(IGNORED_TARGET));
    let n_tokens = batch_size * seq_length;
    let mean = config
        .forward(
            scores.clone().reshape([n_tokens, vocab_size]),
            labels.reshape([n_tokens]),
        )
        .mean();
    let cotangent = fixture.tensor::<3>("ct.scores", DType::F32, &device);
    let loss = (scores * cotangent).sum() + mean;
    check_gradients(&model, &loss.backward(), &fixture, 1e-4);
}

#[test]
fn the_loss_is_that_of_the_positions_with_a_target() {
    let fixture = load("bert/masked.safetensors");
    let device = device();
    let model = with_parameters(bert_config().init(&device), &fixture, DType::F32);
    let tokens = fixture.ints::<2>("in.tokens", &device);
    let labels = fixture.ints::<2>("in.labels", &device);
    let [batch_size, seq_length] = tokens.dims();
    let data = hidden_keys(&fixture, "in.padding");
    let batch = TokenBatch {
        data: data.clone(),
        ..TokenBatch::new(tokens.clone(), labels.clone())
    };
    let loss = model.loss(batch, &CrossEntropyConfig::new()).cross_entropy;
    let scores = model.masked_scores(model.hidden_states(tokens, None, data, None));
    let config = CrossEntropyConfig::new().with_ignored_target(Some(IGNORED_TARGET));
    let n_tokens = batch_size * seq_length;
    let whole = config.forward(scores.reshape([n_tokens, 64]), labels.reshape([n_tokens]));
    for (ours, all) in [
        (loss.nll_sum, whole.nll_sum),
        (loss.n_targets, whole.n_targets),
    ] {
        assert!(largest_difference(&ours.into_data(), &all.into_data()) <= 1e-6);
    }
}
