//! Models with experts against Hugging Face's Mixtral and Switch Transformer: outputs, losses and every gradient.
//! `fixtures/moe/convert.py` made the numbers.

mod reference;

use burn::{
    module::Module,
    tensor::{DType, Device, Int, Tensor, TensorData},
};
use emberlm_core::{
    Activation, AuxiliaryKind, AuxiliaryLoss, CausalModel, CrossEntropyConfig, IGNORED_TARGET,
    LossModel, ModelLoss, NormConfig, RotaryLayout, Source, TokenBatch,
};
use emberlm_models::{
    DecoderConfig, EncoderDecoderConfig, ExpertLayers, FeedForwardKind, PositionsConfig,
};
use emberlm_moe::{
    BalanceLoss, Capacity, CapacityScope, CapacitySize, MixtureOfExpertsConfig, RouterConfig,
};
use emberlm_testkit::{Fixture, device, largest_difference};
use reference::{check, check_gradients, hidden_keys, load, padding, with_parameters};

const WIDTH: usize = 32;

fn counting() -> CrossEntropyConfig {
    CrossEntropyConfig::new().with_ignored_target(Some(IGNORED_TARGET))
}

fn auxiliary(loss: &ModelLoss, kind: AuxiliaryKind) -> Tensor<1> {
    let losses = loss.routing.iter().flat_map(|layer| &layer.losses);
    AuxiliaryLoss::over_layers(losses, kind).expect("the model has it")
}

/// Compares scores where there is no padding, the whole loss, and the gradients of it and of the scores with the fixture's
/// cotangent.
fn check_all<M: Module>(
    model: &M,
    fixture: &Fixture,
    scores: Tensor<3>,
    loss: Tensor<1>,
    is_padding: &[bool],
) {
    let [.., vocab_size] = scores.dims();
    let without_padding = |data: TensorData| {
        let values: Vec<f64> = data.iter::<f64>().collect();
        let rows = values.chunks(vocab_size).zip(is_padding);
        let kept = rows.filter(|(_, is_padding)| !**is_padding);
        let kept: Vec<f64> = kept.flat_map(|(row, _)| row.iter().copied()).collect();
        let n = kept.len();
        TensorData::new(kept, [n])
    };
    let difference = largest_difference(
        &without_padding(scores.to_data()),
        &without_padding(fixture.data("out.logits")),
    );
    assert!(difference <= 1e-4, "out.logits: {difference:e}");
    check(fixture, "out.loss", &loss.to_data(), 1e-4);
    let cotangent = fixture.tensor::<3>("ct.logits", DType::F32, &scores.device());
    let total = (scores * cotangent).sum() + loss;
    check_gradients(model, &total.backward(), fixture, 1e-4);
}

/// The labels that positions predict: each the next one.
fn next(labels: &TensorData, device: &Device) -> Tensor<2, Int> {
    let [batch_size, length] = labels.shape()[..] else {
        panic!("two axes")
    };
    let labels: Vec<i64> = labels.iter::<i64>().collect();
    let shifted = labels.chunks(length).flat_map(|row| {
        let next = row[1..].iter().copied();
        next.chain([IGNORED_TARGET])
    });
    let shifted = TensorData::new(shifted.collect::<Vec<_>>(), [batch_size, length]);
    Tensor::from_data(shifted, device)
}

#[test]
fn mixtral_equals_hugging_faces() {
    let fixture = load("moe/mixtral.safetensors");
    let device = device().autodiff();
    let mixture = MixtureOfExpertsConfig::new(RouterConfig::mixtral(WIDTH, 4, 2), 48)
        .with_balance(Some(BalanceLoss::HuggingFaceMixtral));
    let config = DecoderConfig::new(64, 2, WIDTH, 4)
        .with_n_kv_heads(Some(2))
        .with_positions(PositionsConfig::Rotary {
            theta: 1e6,
            layout: RotaryLayout::HalfSplit,
        })
        .with_norm(NormConfig::Rms { epsilon: 1e-5 })
        .with_feed_forward(FeedForwardKind::Gated)
        .with_activation(Activation::Silu)
        .with_tied_embedding(false)
        .with_experts(Some(ExpertLayers::new(mixture)));
    let model = with_parameters(config.init(&device), &fixture, DType::F32);
    let tokens = fixture.ints::<2>("in.tokens", &device);
    let data = hidden_keys(&fixture, "in.padding");
    let targets = next(&fixture.data("in.labels"), &device);
    let batch = TokenBatch {
        data: data.clone(),
        ..TokenBatch::new(tokens.clone(), targets)
    };
    let loss = model.loss(batch, &counting());
    let balance = auxiliary(&loss, AuxiliaryKind::Balance);
    check(&fixture, "out.aux_loss", &balance.to_data(), 1e-4);
    let total = loss.cross_entropy.mean() + balance * 0.02;
    let scores = model.project(model.hidden_states(tokens, data, None));
    // Hugging Face routes padding too, whose scores mean nothing.
    let is_padding = padding(&fixture, "in.padding").concat();
    check_all(&model, &fixture, scores, total, &is_padding);
}

fn switch(capacity: usize) -> EncoderDecoderConfig {
    let capacity = Capacity::new(CapacitySize::Tokens(capacity))
        .with_scope(CapacityScope::Sequence)
        .with_in_evaluation(true);
    let mixture = MixtureOfExpertsConfig::new(RouterConfig::switch(WIDTH, 4), 48)
        .with_activation(Activation::Relu)
        .with_gated(false)
        .with_capacity(Some(capacity))
        .with_balance(Some(BalanceLoss::HuggingFaceSwitch))
        .with_z_loss(true)
        .with_route_padding(true);
    EncoderDecoderConfig::new(64, 2, 2, WIDTH, 4)
        .with_d_ff(Some(48))
        .with_activation(Activation::Relu)
        .with_positions(PositionsConfig::RelativeBias {
            n_buckets: 8,
            max_distance: 16,
            scaled: false,
        })
        .with_norm(NormConfig::Rms { epsilon: 1e-6 })
        .with_bias(false)
        .with_dropout(0.0)
        .with_experts(Some(ExpertLayers::new(mixture).with_first(1).with_every(2)))
}

#[test]
fn the_switch_transformer_equals_hugging_faces() {
    for (file, capacity, n_dropped) in [("switch", 64, [0, 0]), ("switch_drop", 3, [12, 3])] {
        let fixture = load(&format!("moe/{file}.safetensors"));
        let device = device().autodiff();
        let model = with_parameters(switch(capacity).init(&device), &fixture, DType::F32);
        let source = Source {
            tokens: fixture.ints("in.tokens", &device),
            data: hidden_keys(&fixture, "in.padding"),
        };
        let target = fixture.ints::<2>("in.target", &device);
        let batch = TokenBatch {
            source: Some(source.clone()),
            ..TokenBatch::new(target.clone(), fixture.ints("in.labels", &device))
        };
        let loss = model.loss(batch, &counting());
        let layers: Vec<usize> = loss.routing.iter().map(|layer| layer.layer).collect();
        assert_eq!(layers, [1, 3]);
        let dropped = loss.routing.iter().map(|layer| layer.statistics.n_dropped);
        assert_eq!(dropped.collect::<Vec<_>>(), n_dropped, "{file}");
        for (layer, stack) in loss.routing.iter().zip(["encoder", "decoder"]) {
            for (loss, which) in layer.losses.iter().zip(["aux", "z"]) {
                let name = format!("out.{stack}_{which}_loss");
                check(&fixture, &name, &loss.loss.value().to_data(), 1e-4);
            }
        }
        // Hugging Face adds the losses of the two stacks.
        let [balance, z] = [0, 1].map(|i| {
            let of = |layer: usize| loss.routing[layer].losses[i].loss.value();
            of(0) + of(1)
        });
        let total = loss.cross_entropy.mean() + z * 0.001 + balance * 0.01;
        let is_padding = vec![false; target.shape().num_elements()];
        let scores = model.forward(source, target, None);
        check_all(&model, &fixture, scores, total, &is_padding);
    }
}

#[test]
fn a_decoder_refuses_what_looks_ahead() {
    let mixture = |router| ExpertLayers::new(MixtureOfExpertsConfig::new(router, 16));
    let config = |experts| DecoderConfig::new(16, 1, 8, 2).with_experts(Some(experts));
    let sinkhorn = RouterConfig::sinkhorn(8, 4, 1);
    let error = config(mixture(sinkhorn.clone())).validate().unwrap_err();
    assert!(error.to_string().contains("allow_leak"), "{error}");
    config(mixture(sinkhorn.with_allow_leak(true)))
        .validate()
        .unwrap();
    let wider = mixture(RouterConfig::mixtral(16, 4, 2));
    let error = config(wider).validate().unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("experts.mixture.router.d_model"),
        "{error}"
    );
}

/// The experts of hashed tokens need the tokens in every pass, also in one with a cache.
#[test]
fn hashed_tokens_reach_their_experts() {
    use burn::tensor::s;
    use emberlm_core::CachedModel;

    let device = device();
    let router = RouterConfig::hash(8, 4, 2, 16);
    let experts = ExpertLayers::new(MixtureOfExpertsConfig::new(router, 16));
    let model = DecoderConfig::new(16, 2, 8, 2)
        .with_experts(Some(experts))
        .init(&device);
    let tokens = emberlm_testkit::random_tokens([2, 7], 16, 1, &device);
    let whole = model.forward(tokens.clone(), None);
    let mut cache = model.new_cache(7);
    let parts = [0..3, 3..4, 4..7]
        .map(|range| model.forward_cached(tokens.clone().slice(s![.., range]), &mut cache));
    let split = Tensor::cat(parts.to_vec(), 1);
    emberlm_testkit::assert_close(split, whole, 1e-5);
}
