//! LED: an encoder-decoder whose encoder is a Longformer.

use std::collections::BTreeMap;

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor, TensorData, s},
};
use emberlm_core::{CachedModel, Global, Source, Window};
use emberlm_models::{EncoderDecoder, EncoderDecoderConfig, LayerAttention};
use emberlm_testkit::{
    assert_close, device, gradients_by_name, load_parameters, parameters_by_name, random_tokens,
    to_f64,
};

const SOURCE_LENGTH: usize = 9;

fn dense() -> EncoderDecoderConfig {
    EncoderDecoderConfig::new(13, 2, 2, 12, 3)
        .with_d_ff(Some(20))
        .with_dropout(0.0)
}

fn led(side: usize) -> EncoderDecoderConfig {
    let layer = LayerAttention::Longformer {
        window: Window::one_sided(side),
        dilations: None,
        global: Global::First(1),
        causal: false,
    };
    dense().with_encoder_layers(Some(vec![layer; 2]))
}

/// A model with the weights of a dense one, those of global tokens included.
fn with_weights_of(dense: &EncoderDecoder, side: usize, device: &Device) -> EncoderDecoder {
    let weights = parameters_by_name(dense);
    load_parameters(led(side).init(device), |name| {
        weights[&name.replace("global_", "")].clone()
    })
}

/// Of a loss that every score counts in.
fn gradients(model: &EncoderDecoder, device: &Device) -> BTreeMap<String, TensorData> {
    let source = Source::new(random_tokens([2, SOURCE_LENGTH], 13, 1, device));
    let targets = random_tokens([2, 5], 13, 2, device);
    let scores = model.forward(source, targets, None);
    gradients_by_name(model, &(scores.clone() * scores).sum().backward())
}

#[test]
fn a_window_over_everything_is_the_dense_model() {
    let device = device().autodiff();
    let dense: EncoderDecoder = to_f64(dense().init(&device));
    let led = with_weights_of(&dense, SOURCE_LENGTH, &device);
    let source = Source::new(random_tokens([2, SOURCE_LENGTH], 13, 1, &device));
    let targets = random_tokens([2, 5], 13, 2, &device);
    assert_close(
        led.forward(source.clone(), targets.clone(), None),
        dense.forward(source, targets, None),
        1e-12,
    );
    // What the global token does with projections of its own, it did with the common ones.
    let mut of_led = gradients(&led, &device);
    let flat = |data: TensorData| {
        let values: Vec<f64> = data.iter().collect();
        let n = values.len();
        Tensor::<1>::from_data(TensorData::new(values, [n]), (&device, DType::F64))
    };
    for (name, expected) in gradients(&dense, &device) {
        let mut found = flat(of_led.remove(&name).expect("of the same name"));
        for part in ["query", "key", "value"] {
            let global = name.replace(&format!(".{part}."), &format!(".global_{part}."));
            if let Some(more) = (global != name).then(|| of_led.remove(&global)).flatten() {
                found = found + flat(more);
            }
        }
        // A bias of keys moves all scores of a query alike: its gradient is rounding.
        if !name.ends_with("key.bias") {
            assert_close(found, flat(expected), 1e-12);
        }
    }
    assert!(of_led.is_empty(), "{:?}", of_led.keys());
}

#[test]
fn gradients_reach_the_projections_of_global_tokens() {
    let device = device().autodiff();
    let model: EncoderDecoder = to_f64(led(2).init(&device));
    assert!(model.num_params() > dense().init(&device).num_params());
    let gradients = gradients(&model, &device);
    for block in 0..2 {
        for part in ["query", "key", "value"] {
            let name = format!("encoder.blocks.{block}.mixer.global_{part}.weight");
            let largest = gradients[&name]
                .iter::<f64>()
                .map(f64::abs)
                .fold(0.0, f64::max);
            assert!(largest > 1e-6, "{name}: {largest}");
        }
    }
}

#[test]
fn padded_sources_are_as_alone() {
    let device = device();
    let model: EncoderDecoder = to_f64(led(2).init(&device));
    let sources: [&[u32]; 3] = [&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[10], &[11, 2, 5, 7]];
    let targets = random_tokens([3, 4], 13, 2, &device);
    let all = model.forward(Source::padded(&sources, &device), targets.clone(), None);
    for (i, source) in sources.into_iter().enumerate() {
        let row = i..i + 1;
        let source = Source::padded(&[source], &device);
        let alone = model.forward(source, targets.clone().slice(s![row.clone(), ..]), None);
        assert_close(all.clone().slice(s![row, .., ..]), alone, 1e-12);
    }
}

#[test]
fn cached_scores_equal_the_whole_at_every_split() {
    let device = device();
    let model: EncoderDecoder = to_f64(led(2).init(&device));
    let sources: [&[u32]; 2] = [&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[10, 3]];
    let source = Source::padded(&sources, &device);
    let targets = random_tokens([2, 6], 13, 2, &device);
    let whole = model.forward(source.clone(), targets.clone(), None);
    for split in 1..6 {
        let mut cache = model.start(source.clone(), 6);
        let parts = [0..split, split..6]
            .map(|part| model.forward_cached(targets.clone().slice(s![.., part]), &mut cache));
        assert_close(Tensor::cat(parts.to_vec(), 1), whole.clone(), 1e-12);
    }
}
