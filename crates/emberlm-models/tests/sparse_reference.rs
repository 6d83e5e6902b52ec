//! Encoders with sparse attention against Hugging Face's Longformer and BigBird: outputs and every gradient.
//! `fixtures/sparse/convert.py` made the numbers.

mod reference;

use burn::tensor::{DType, TensorData};
use emberlm_attention::{BigBirdAttentionConfig, RandomPlan, RepeatedBlocks};
use emberlm_core::{Activation, BatchData, Global, Window};
use emberlm_models::{EncoderConfig, LayerAttention, PositionsConfig};
use emberlm_testkit::{Fixture, device, largest_difference};
use reference::{check_gradients, hidden_keys, load, padding, with_parameters};

const WIDTH: usize = 32;

/// Compares the hidden states where there is no padding, and all gradients.
fn check_encoder(fixture: &Fixture, config: &EncoderConfig, data: BatchData) {
    let device = device().autodiff();
    let config = config.clone().with_masked_head(false);
    let model = with_parameters(config.init(&device), fixture, DType::F32);
    let tokens = fixture.ints("in.tokens", &device);
    let hidden = model.hidden_states(tokens, None, data, None);
    let is_padding: Vec<bool> = padding(fixture, "in.padding").concat();
    let without_padding = |data: TensorData| {
        let values: Vec<f64> = data.iter::<f64>().collect();
        let rows = values.chunks(WIDTH).zip(&is_padding);
        let kept: Vec<f64> = rows
            .filter(|(_, is_padding)| !**is_padding)
            .flat_map(|(row, _)| row.iter().copied())
            .collect();
        let n = kept.len();
        TensorData::new(kept, [n])
    };
    let difference = largest_difference(
        &without_padding(hidden.to_data()),
        &without_padding(fixture.data("out.hidden")),
    );
    assert!(difference <= 1e-4, "out.hidden: {difference:e}");
    let cotangent = fixture.tensor::<3>("ct.hidden", DType::F32, &device);
    let gradients = (hidden * cotangent).sum().backward();
    check_gradients(&model, &gradients, fixture, 1e-4);
}

fn longformer(global: &Global) -> EncoderConfig {
    let layer = |window| LayerAttention::Longformer {
        window: Window::total(window),
        dilations: None,
        global: global.clone(),
        causal: false,
    };
    EncoderConfig::new(64, 2, WIDTH, 4)
        .with_d_ff(Some(64))
        .with_n_types(1)
        .with_positions(PositionsConfig::LearnedOffset {
            max_seq_length: 64,
            offset: 2,
        })
        .with_layers(Some(vec![layer(4), layer(8)]))
}

#[test]
fn longformer_with_global_tokens_of_each_row() {
    let fixture = load("sparse/longformer.safetensors");
    let global = padding(&fixture, "in.global").into_iter().map(|row| {
        let positions = row.into_iter().enumerate();
        positions
            .filter_map(|(position, is_global)| is_global.then_some(position))
            .collect()
    });
    let global: Vec<Vec<usize>> = global.collect();
    assert_eq!(global, [vec![0, 9], vec![0]]);
    let data = hidden_keys(&fixture, "in.padding").with_globals(global);
    check_encoder(&fixture, &longformer(&Global::Batch), data);
}

#[test]
fn longformer_without_global_tokens() {
    let fixture = load("sparse/longformer_local.safetensors");
    let data = hidden_keys(&fixture, "in.padding");
    check_encoder(&fixture, &longformer(&Global::First(0)), data);
}

/// The random blocks of a layer: heads, inner query blocks, key blocks.
fn random_blocks(fixture: &Fixture, layer: usize) -> Vec<Vec<Vec<usize>>> {
    let data = fixture.data(&format!("in.random.{layer}"));
    let [_, n_rows, n_random] = data.shape()[..] else {
        panic!("three axes")
    };
    let blocks: Vec<usize> = data.iter::<i64>().map(|block| block as usize).collect();
    let heads = blocks.chunks(n_rows * n_random);
    heads
        .map(|head| head.chunks(n_random).map(<[usize]>::to_vec).collect())
        .collect()
}

fn big_bird(fixture: &Fixture, repeats: RepeatedBlocks) -> EncoderConfig {
    let layer = |layer| {
        let plan = RandomPlan::Given {
            rows: random_blocks(fixture, layer),
            repeats,
        };
        let attention = BigBirdAttentionConfig::new(WIDTH, 2, 4, plan);
        LayerAttention::Pattern {
            pattern: attention.pattern(),
            repeats: attention.repeats(),
        }
    };
    full_big_bird().with_layers(Some(vec![layer(0), layer(1)]))
}

fn full_big_bird() -> EncoderConfig {
    EncoderConfig::new(64, 2, WIDTH, 2)
        .with_d_ff(Some(48))
        .with_activation(Activation::GeluTanh)
        .with_positions(PositionsConfig::Learned {
            max_seq_length: 128,
        })
}

/// In training no block is named twice, so that both readings of repeated ones are one.
#[test]
fn big_bird_with_the_random_blocks_of_training() {
    for file in ["big_bird_train", "big_bird_train_pad"] {
        let fixture = load(&format!("sparse/{file}.safetensors"));
        for repeats in [RepeatedBlocks::Once, RepeatedBlocks::EachTime] {
            let data = hidden_keys(&fixture, "in.padding");
            check_encoder(&fixture, &big_bird(&fixture, repeats), data);
        }
    }
}

#[test]
fn big_bird_in_evaluation_counts_block_zero_three_times() {
    let fixture = load("sparse/big_bird_eval.safetensors");
    assert!(random_blocks(&fixture, 0).concat().concat() == [0; 2 * 14 * 2]);
    let config = big_bird(&fixture, RepeatedBlocks::EachTime);
    check_encoder(&fixture, &config, hidden_keys(&fixture, "in.padding"));
}

#[test]
#[should_panic(expected = "out.hidden")]
fn counted_once_it_is_another_model() {
    let fixture = load("sparse/big_bird_eval.safetensors");
    let config = big_bird(&fixture, RepeatedBlocks::Once);
    check_encoder(&fixture, &config, hidden_keys(&fixture, "in.padding"));
}

#[test]
fn a_short_big_bird_is_full_attention() {
    let fixture = load("sparse/big_bird_short_full.safetensors");
    let data = hidden_keys(&fixture, "in.padding");
    check_encoder(&fixture, &full_big_bird(), data);
}
