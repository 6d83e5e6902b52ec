//! Every way to know positions, in every assembly: decoding is the whole pass, padding changes nothing, and the order of
//! the tokens matters. What the positions are is tested where they are made.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, s};
use emberlm_core::{
    BatchData, CachedModel, CausalModel, DecodingCache, LongRopeScaling, RotaryLayout,
    RotaryScaling, Source, YarnScaling,
};
use emberlm_models::{
    Decoder, DecoderConfig, EncoderConfig, EncoderDecoderConfig, PositionsConfig,
};
use emberlm_testkit::{
    assert_close, device, largest_difference, load_parameters, parameters_by_name, random_tokens,
    to_f64,
};

const VOCAB_SIZE: usize = 13;
const D_MODEL: usize = 24;
const N_HEADS: usize = 3; // ALiBi's slopes differ for head counts that are no power of two
const D_HEAD: usize = D_MODEL / N_HEADS;
const LENGTH: usize = 9;
const TRAINED_LENGTH: usize = 12; // where the frequencies depend on the length beyond it

fn scaled(d_rotary: Option<usize>, scaling: RotaryScaling) -> PositionsConfig {
    PositionsConfig::ScaledRotary {
        theta: 100.0,
        layout: RotaryLayout::HalfSplit,
        d_rotary,
        scaling,
    }
}

/// All but `None`.
fn positions() -> Vec<PositionsConfig> {
    let interleaved = RotaryLayout::Interleaved;
    let llama3 = RotaryScaling::Llama3 {
        factor: 4.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_positions: 6,
    };
    let long_rope = LongRopeScaling::new(
        vec![1.0, 1.5, 2.0, 3.0],
        vec![2.0, 3.0, 4.0, 6.0],
        TRAINED_LENGTH,
        2.0,
    );
    vec![
        PositionsConfig::Learned { max_seq_length: 16 },
        PositionsConfig::LearnedOffset {
            max_seq_length: 16,
            offset: 2,
        },
        PositionsConfig::Sinusoidal,
        PositionsConfig::Rotary {
            theta: 100.0,
            layout: interleaved,
        },
        scaled(Some(D_HEAD / 2), RotaryScaling::None),
        scaled(None, RotaryScaling::Linear { factor: 4.0 }),
        scaled(None, dynamic(TRAINED_LENGTH)),
        scaled(None, RotaryScaling::Yarn(YarnScaling::new(4.0, 4))),
        scaled(None, RotaryScaling::LongRope(long_rope)),
        scaled(None, llama3),
        PositionsConfig::Alibi,
        relative(),
    ]
}

fn dynamic(original_max_positions: usize) -> RotaryScaling {
    RotaryScaling::DynamicNtk {
        factor: 4.0,
        original_max_positions,
    }
}

fn relative() -> PositionsConfig {
    PositionsConfig::RelativeBias {
        n_buckets: 8,
        max_distance: 6,
        scaled: false,
    }
}

/// In f64, with weights large enough that a wrong position shows.
fn sharp<M: burn::module::Module>(model: M) -> M {
    let parameters = parameters_by_name(&model);
    let model = load_parameters(model, |name| {
        let values = &parameters[name];
        let scaled: Vec<f32> = values.iter::<f32>().map(|x| x * 8.0).collect();
        TensorData::new(scaled, values.shape().clone())
    });
    to_f64(model)
}

fn decoder(positions: PositionsConfig, device: &Device) -> Decoder {
    let config = DecoderConfig::new(VOCAB_SIZE, 2, D_MODEL, N_HEADS).with_positions(positions);
    sharp(config.init(device))
}

fn tokens(row: &[u32], device: &Device) -> Tensor<2, Int> {
    let row: Vec<i64> = row.iter().map(|token| i64::from(*token)).collect();
    let n = row.len();
    Tensor::from_data(TensorData::new(row, [1, n]), device)
}

const ROWS: [&[u32]; 3] = [&[1, 2, 3, 4, 5, 6, 7, 8, 9], &[6, 2], &[7, 8, 9, 1, 1]];

#[test]
fn decoding_is_the_whole_pass() {
    let device = device();
    for positions in positions() {
        let model = decoder(positions.clone(), &device);
        let all = random_tokens([2, LENGTH], VOCAB_SIZE, 1, &device);
        let whole = model.forward(all.clone(), None);
        for split in 1..LENGTH {
            let mut cache = model.new_cache(LENGTH);
            let parts = [0..split, split..LENGTH]
                .map(|part| model.forward_cached(all.clone().slice(s![.., part]), &mut cache));
            let parts = Tensor::cat(parts.to_vec(), 1);
            let difference = largest_difference(&parts.into_data(), &whole.clone().into_data());
            assert!(
                difference <= 1e-12,
                "{positions:?}, split at {split}: {difference:e}"
            );
        }
    }
}

/// Beyond the trained length the frequencies grow with the sequence, so a step is the end of a pass over the sequence so
/// far: in one block, since what later blocks read of earlier tokens was made when the sequence was shorter.
#[test]
fn a_step_of_dynamic_scaling_is_the_end_of_the_pass_so_far() {
    let device = device();
    let config = DecoderConfig::new(VOCAB_SIZE, 1, D_MODEL, N_HEADS);
    let model = sharp(
        config
            .with_positions(scaled(None, dynamic(4)))
            .init(&device),
    );
    let all = random_tokens([2, LENGTH], VOCAB_SIZE, 1, &device);
    let mut cache = model.new_cache(LENGTH);
    for i in 0..LENGTH {
        let step = model.forward_cached(all.clone().slice(s![.., i..=i]), &mut cache);
        let whole = model.forward(all.clone().slice(s![.., 0..=i]), None);
        assert_close(step, whole.slice(s![.., i.., ..]), 1e-12);
    }
}

#[test]
fn prompts_padded_on_the_left_are_one_by_one() {
    let device = device();
    for positions in positions() {
        let model = decoder(positions.clone(), &device);
        let padding: Vec<usize> = ROWS.iter().map(|row| LENGTH - row.len()).collect();
        let padded = ROWS.iter().zip(&padding).map(|(row, n)| {
            let row = [vec![12; *n], row.to_vec()].concat();
            tokens(&row, &device)
        });
        let mut cache = model.new_cache(LENGTH + 1);
        cache.set_padding(&padding);
        model.forward_cached(Tensor::cat(padded.collect(), 0), &mut cache);
        let next = Tensor::cat(vec![tokens(&[3], &device); ROWS.len()], 0);
        let scores = model.forward_cached(next, &mut cache);
        for (i, row) in ROWS.iter().enumerate() {
            let alone = model.forward(tokens(&[row, &[3][..]].concat(), &device), None);
            assert_eq!(alone.dtype(), DType::F64);
            let last = alone.slice(s![.., row.len().., ..]);
            assert_close(scores.clone().slice(s![i..=i, .., ..]), last, 1e-12);
        }
    }
}

#[test]
fn an_encoder_does_not_see_padding() {
    let device = device();
    for positions in positions() {
        let config = EncoderConfig::new(VOCAB_SIZE, 2, D_MODEL, N_HEADS).with_positions(positions);
        let model = sharp(config.init(&device));
        let Source { tokens: all, data } = Source::padded(&ROWS, &device);
        let hidden = model.hidden_states(all, None, data, None);
        for (i, row) in ROWS.iter().enumerate() {
            let alone = model.hidden_states(tokens(row, &device), None, BatchData::new(), None);
            let here = hidden.clone().slice(s![i..=i, 0..row.len(), ..]);
            assert_close(here, alone, 1e-12);
        }
    }
}

#[test]
fn an_encoder_decoder_translates_a_batch_as_one_by_one_and_step_by_step() {
    let device = device();
    for positions in positions() {
        let config = EncoderDecoderConfig::new(VOCAB_SIZE, 2, 2, D_MODEL, N_HEADS)
            .with_dropout(0.0)
            .with_positions(positions);
        let model = sharp(config.init(&device));
        let target = random_tokens([1, 6], VOCAB_SIZE, 3, &device);
        let targets = target.clone().repeat_dim(0, ROWS.len());
        let source = Source::padded(&ROWS, &device);
        let whole = model.forward(source.clone(), targets.clone(), None);
        for (i, row) in ROWS.iter().enumerate() {
            let source = Source::new(tokens(row, &device));
            let alone = model.forward(source, target.clone(), None);
            assert_close(whole.clone().slice(s![i..=i, .., ..]), alone, 1e-12);
        }
        let mut cache = model.start(source, 6);
        let steps = (0..6)
            .map(|i| model.forward_cached(targets.clone().slice(s![.., i..=i]), &mut cache))
            .collect();
        assert_close(Tensor::cat(steps, 1), whole, 1e-12);
    }
}

/// Without positions an encoder's states follow the order of its tokens; with them they do not.
#[test]
fn the_order_of_the_tokens_matters_where_there_are_positions() {
    let device = device();
    let change = |positions: PositionsConfig| {
        let config = EncoderConfig::new(VOCAB_SIZE, 2, D_MODEL, N_HEADS).with_positions(positions);
        let model = sharp(config.init(&device));
        let hidden = |row: &[u32]| {
            let hidden = model.hidden_states(tokens(row, &device), None, BatchData::new(), None);
            hidden.slice(s![.., 0..1, ..]).into_data()
        };
        largest_difference(&hidden(&[1, 2, 3, 4, 5, 6]), &hidden(&[1, 4, 6, 2, 3, 5]))
    };
    assert!(change(PositionsConfig::None) < 1e-12);
    for positions in positions() {
        let change = change(positions.clone());
        assert!(change > 1e-6, "{positions:?}: {change:e}");
    }
}

#[test]
fn one_relative_bias_serves_all_blocks() {
    let model = decoder(relative(), &device());
    let names: Vec<String> = parameters_by_name(&model).into_keys().collect();
    let of_bias: Vec<&String> = (names.iter())
        .filter(|name| name.contains("relative_bias"))
        .collect();
    assert_eq!(of_bias, ["stack.relative_bias.weight"]);
}
