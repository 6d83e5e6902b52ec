//! A longer model begins as the short one.

use burn::module::Module;
use emberlm_core::{BatchData, Global, Pattern, Window};
use emberlm_models::{Encoder, EncoderConfig, LayerAttention, PositionsConfig};
use emberlm_testkit::{
    assert_close, device, gradients_by_name, parameters_by_name, random_tokens, to_f64,
};

fn short() -> EncoderConfig {
    EncoderConfig::new(13, 2, 12, 3)
        .with_positions(learned(8))
        .with_pooler(true)
}

fn learned(max_seq_length: usize) -> PositionsConfig {
    PositionsConfig::LearnedOffset {
        max_seq_length,
        offset: 2,
    }
}

/// Windows that hold the whole short sequence.
fn longformer() -> LayerAttention {
    LayerAttention::Longformer {
        window: Window::one_sided(7),
        dilations: None,
        global: Global::First(1),
        causal: false,
    }
}

fn hidden(model: &Encoder, length: usize) -> burn::tensor::Tensor<3> {
    let device = device();
    let tokens = random_tokens([2, length], 13, 1, &device);
    let hidden = model.hidden_states(tokens, None, BatchData::new(), None);
    assert_eq!(hidden.dims(), [2, length, 12]);
    hidden
}

#[test]
fn a_short_sequence_is_read_as_before() {
    let device = device();
    let model = to_f64(short().init(&device));
    let blocks = Some(vec![
        LayerAttention::pattern("bigbird:8:1".parse().unwrap());
        2
    ]);
    for layers in [None, Some(vec![longformer(); 2]), blocks] {
        let config = short().with_positions(learned(32)).with_layers(layers);
        let long = model.lengthened(&config, &device);
        assert_close(hidden(&long, 8), hidden(&model, 8), 1e-12);
        hidden(&long, 32);
    }
}

#[test]
fn positions_are_repeated() {
    let device = device();
    let model = short().init(&device);
    let long = model.lengthened(&short().with_positions(learned(20)), &device);
    let table = |model: &Encoder| -> Vec<f32> {
        let positions = model.embedding.positions.as_ref().unwrap();
        positions.weight.val().into_data().iter().collect()
    };
    let (short, long) = (table(&model), table(&long));
    let row = |table: &[f32], row: usize| table[12 * row..12 * row + 12].to_vec();
    assert_eq!(long.len(), 12 * (2 + 20));
    for i in 0..2 {
        assert_eq!(row(&long, i), row(&short, i));
    }
    for position in 0..20 {
        assert_eq!(row(&long, 2 + position), row(&short, 2 + position % 8));
    }
}

/// Copies would share a gradient and an optimizer's state if they were the same parameters.
#[test]
fn copied_projections_are_parameters_of_their_own() {
    let device = device().autodiff();
    let model = short().init(&device);
    let config = short().with_layers(Some(vec![longformer(); 2]));
    let long = model.lengthened(&config, &device);
    let tokens = random_tokens([2, 8], 13, 1, &device);
    let y = long.hidden_states(tokens, None, BatchData::new(), None);
    let gradients = gradients_by_name(&long, &(y.clone() * y).sum().backward());
    let named = |name: &str| gradients[&format!("stack.blocks.0.mixer.{name}.weight")].clone();
    for name in ["query", "value"] {
        assert_ne!(named(name), named(&format!("global_{name}")));
    }
    let values = parameters_by_name(&long);
    let value = |name: &str| values[&format!("stack.blocks.1.mixer.{name}.weight")].clone();
    assert_eq!(value("key"), value("global_key"));
    assert_eq!(
        long.num_params(),
        model.num_params() + 2 * 3 * (12 * 12 + 12)
    );
}

#[test]
#[should_panic(expected = "d_model: 12 in the short model, 24 in the long one")]
fn another_width_is_refused() {
    let device = device();
    let model = short().init(&device);
    let wider = EncoderConfig::new(13, 2, 24, 3).with_pattern(Pattern::full());
    model.lengthened(&wider, &device);
}
