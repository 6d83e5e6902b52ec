//! Generation with decoders: batches of texts of different lengths, caches that reorder their rows, and Hugging Face's
//! beam search. `fixtures/beam/generate.py` made the numbers.

use burn::tensor::{DType, Device, Int, Tensor, TensorData, s};
use emberlm_core::{
    Activation, BatchGenerator, BeamConfig, BeamSearch, CachedModel, CausalModel, DecodingCache,
    EarlyStopping, Generator, LengthPenalty, NormConfig, Pattern, RotaryLayout, SamplingConfig,
    Strided, Window, log_probabilities,
};
use emberlm_models::{Decoder, DecoderConfig, FeedForwardKind, PositionsConfig};
use emberlm_testkit::{Fixture, assert_close, device, load_parameters, parameters_by_name, to_f64};

const VOCAB_SIZE: usize = 13;

fn gpt2_like() -> DecoderConfig {
    DecoderConfig::new(VOCAB_SIZE, 2, 12, 3)
        .with_positions(PositionsConfig::Learned { max_seq_length: 16 })
        .with_norm(NormConfig::Layer {
            epsilon: 1e-5,
            bias: true,
        })
        .with_bias(true)
}

fn llama_like() -> DecoderConfig {
    DecoderConfig::new(VOCAB_SIZE, 2, 16, 4)
        .with_n_kv_heads(Some(2))
        .with_positions(PositionsConfig::Rotary {
            theta: 100.0,
            layout: RotaryLayout::HalfSplit,
        })
        .with_norm(NormConfig::Rms { epsilon: 1e-5 })
        .with_feed_forward(FeedForwardKind::Gated)
        .with_activation(Activation::Silu)
        .with_tied_embedding(false)
}

fn configs() -> Vec<DecoderConfig> {
    let local = Pattern::window(Window::causal(3)) | Pattern::strided(Strided::merged(4));
    vec![
        gpt2_like(),
        llama_like(),
        gpt2_like().with_positions(PositionsConfig::Sinusoidal),
        llama_like().with_pattern(Some(local)),
    ]
}

/// Weights large enough that positions and distant tokens matter.
fn sharp(config: &DecoderConfig, dtype: DType) -> Decoder {
    let model = config.clone().with_seed(3).init(&device());
    let parameters = parameters_by_name(&model);
    let model = load_parameters(model, |name| {
        let values = &parameters[name];
        let scaled: Vec<f32> = values.iter::<f32>().map(|x| x * 8.0).collect();
        TensorData::new(scaled, values.shape().clone())
    });
    match dtype {
        DType::F64 => to_f64(model),
        _ => model,
    }
}

fn precisions() -> [(DType, f64); 2] {
    [(DType::F64, 1e-12), (DType::F32, 1e-5)]
}

fn tokens(rows: &[&[u32]], device: &Device) -> Tensor<2, Int> {
    let values: Vec<i64> = rows.concat().into_iter().map(i64::from).collect();
    Tensor::from_data(TensorData::new(values, [rows.len(), rows[0].len()]), device)
}

const TEXTS: [&[u32]; 3] = [&[5, 1, 12, 7, 7, 2, 9], &[3, 8], &[4, 4, 11, 0]];

#[test]
fn padded_rows_have_the_scores_that_they_have_alone() {
    let device = device();
    for config in configs() {
        for (dtype, tolerance) in precisions() {
            let model = sharp(&config, dtype);
            // Two tokens of each text come behind the padded part, one at a time.
            let mut cache = model.new_cache(7);
            cache.set_padding(&[0, 5, 3]);
            let padding = [0; 5];
            let rows: Vec<Vec<u32>> = TEXTS
                .iter()
                .map(|text| [&padding[..7 - text.len()], text].concat())
                .collect();
            let columns = |range: std::ops::Range<usize>| {
                let rows: Vec<&[u32]> = rows.iter().map(|row| &row[range.clone()]).collect();
                tokens(&rows, &device)
            };
            let parts = [0..5, 5..6, 6..7].map(columns);
            let scores = parts.map(|part| model.forward_cached(part, &mut cache));
            let scores = Tensor::cat(scores.to_vec(), 1);
            for (i, text) in TEXTS.iter().enumerate() {
                let alone = model.forward(tokens(&[text], &device), None);
                let padded = scores.clone().slice(s![i..i + 1, 7 - text.len().., ..]);
                assert_close(padded, alone, tolerance);
            }
        }
    }
}

#[test]
fn selected_rows_go_on_as_the_texts_that_they_are() {
    let device = device();
    for config in configs() {
        let model = sharp(&config, DType::F64);
        let mut cache = model.new_cache(9);
        assert_eq!(cache.batch_size(), None);
        cache.set_padding(&[2, 0, 1]);
        assert_eq!(cache.batch_size(), Some(3));
        let first: [&[u32]; 3] = [&[0, 0, 6], &[1, 2, 3], &[0, 9, 8]];
        model.forward_cached(tokens(&first, &device), &mut cache);
        cache.select(&[2, 0, 2, 2]);
        model.forward_cached(tokens(&[&[4], &[5], &[7], &[4]], &device), &mut cache);
        cache.select(&[1, 2]);
        assert_eq!((cache.batch_size(), cache.len()), (Some(2), 4));
        // A drafted token that is taken back.
        model.forward_cached(tokens(&[&[12], &[12]], &device), &mut cache);
        cache.truncate(4);
        let next: [&[u32]; 2] = [&[1, 10], &[2, 11]];
        let scores = model.forward_cached(tokens(&next, &device), &mut cache);
        for (i, text) in [&[6, 5, 1, 10][..], &[9, 8, 7, 2, 11]]
            .into_iter()
            .enumerate()
        {
            let alone = model.forward(tokens(&[text], &device), None);
            let alone = alone.slice(s![.., text.len() - 2.., ..]);
            assert_close(scores.clone().slice(s![i..i + 1, .., ..]), alone, 1e-12);
        }
    }
}

#[test]
fn rows_of_one_length_may_have_any_pattern() {
    let pattern = Pattern::window(Window::causal(3)) | Pattern::global(vec![0, 5]);
    let model = sharp(&gpt2_like().with_pattern(Some(pattern)), DType::F64);
    let texts = [[3, 8, 1, 4, 12, 0, 7], [5, 1, 12, 7, 7, 2, 9]];
    let found = BatchGenerator::new(&model, &texts, 5, SamplingConfig::new(), &device())
        .and_then(BatchGenerator::run)
        .expect("scores");
    for (seed, (found, text)) in (0..).zip(found.iter().zip(&texts)) {
        let sampling = SamplingConfig::new().with_seed(seed);
        let alone = Generator::new(&model, text, 5, sampling, &device()).expect("a prompt");
        let alone: Result<Vec<u32>, _> = alone.collect();
        assert_eq!(Ok(&found.tokens), alone.as_ref());
    }
}

#[test]
fn texts_may_all_end_at_once() {
    let model = sharp(&gpt2_like(), DType::F32);
    let generator = BatchGenerator::new(&model, &TEXTS, 5, SamplingConfig::new(), &device());
    let all = (0..VOCAB_SIZE as u32).collect();
    let found = generator.and_then(|generator| generator.with_end_tokens(all).run());
    let found = found.expect("scores");
    assert!(found.len() == 3 && found.iter().all(|text| text.tokens.len() == 1));
}

#[test]
#[should_panic(expected = "depends on absolute positions, which padding on the left moves")]
fn absolute_patterns_refuse_padding() {
    let pattern = Pattern::window(Window::causal(3)) | Pattern::sinks(1);
    let model = sharp(&gpt2_like().with_pattern(Some(pattern)), DType::F32);
    let mut search = BeamSearch::new(BeamConfig::new(2, 3)).expect("valid");
    let _ = search.search(&model, &TEXTS, &device());
}

#[test]
#[should_panic(expected = "padding comes before the first")]
fn padding_comes_first() {
    let model = sharp(&gpt2_like(), DType::F32);
    let mut cache = model.new_cache(4);
    model.forward_cached(tokens(&[&[1], &[2]], &device()), &mut cache);
    cache.set_padding(&[0, 1]);
}

#[test]
#[should_panic(expected = "batch_size: row 2 is past the 2 that there are")]
fn rows_that_are_not_there_cannot_be_selected() {
    let model = sharp(&gpt2_like(), DType::F32);
    let mut cache = model.new_cache(4);
    model.forward_cached(tokens(&[&[1], &[2]], &device()), &mut cache);
    cache.select(&[0, 2]);
}

#[test]
fn the_probability_of_a_text_is_that_of_the_full_pass() {
    let device = device();
    for config in configs() {
        for (dtype, tolerance) in precisions() {
            let model = sharp(&config, dtype);
            let found = log_probabilities(&model, &TEXTS, &device).expect("scores");
            for (found, text) in found.iter().zip(TEXTS) {
                assert_eq!(found.len(), text.len() - 1);
                let scores = model.forward(tokens(&[text], &device), None).into_data();
                let scores: Vec<f64> = scores.iter().collect();
                for (t, found) in found.iter().enumerate() {
                    let row = &scores[t * VOCAB_SIZE..][..VOCAB_SIZE];
                    let sum: f64 = row.iter().map(|x| x.exp()).sum();
                    let expected = row[text[t + 1] as usize] - sum.ln();
                    let difference = (found - expected).abs() / expected.abs().max(1.0);
                    assert!(difference <= tolerance, "{found}, {expected}");
                }
            }
        }
    }
}

/// transformers' GPT-2 with the weights of the fixture.
fn fixture_model(fixture: &Fixture, dtype: DType) -> Decoder {
    let config = DecoderConfig::new(23, 2, 12, 3)
        .with_positions(PositionsConfig::Learned { max_seq_length: 16 })
        .with_norm(NormConfig::Layer {
            epsilon: 1e-5,
            bias: true,
        })
        .with_activation(Activation::GeluTanh)
        .with_bias(true);
    load_parameters(config.init(&device()), |name| {
        fixture.data(&format!("param.{name}")).convert_dtype(dtype)
    })
}

/// The rows of an integer tensor, without the -1.
fn rows_of(fixture: &Fixture, name: &str) -> Vec<Vec<u32>> {
    let data = fixture.data(name);
    let length = *data.shape().last().expect("an axis");
    let values: Vec<i64> = data.iter().collect();
    let row = |row: &[i64]| row.iter().filter_map(|x| u32::try_from(*x).ok()).collect();
    values.chunks(length).map(row).collect()
}

fn check_case(
    fixture: &Fixture,
    model: &Decoder,
    prompts: &[Vec<u32>],
    config: BeamConfig,
    case: &str,
) {
    let n_best = config.n_best;
    let mut search = BeamSearch::new(config).expect("valid");
    let batch = search.search(model, prompts, &device()).expect("scores");
    let expected = rows_of(fixture, &format!("{case}.tokens"));
    let scores: Vec<f64> = fixture.data(&format!("{case}.scores")).iter().collect();
    for (i, prompt) in prompts.iter().enumerate() {
        let alone = search.search(model, &[prompt], &device()).expect("scores");
        for found in [&batch[i], &alone[0]] {
            assert_eq!(found.len(), n_best);
            for (rank, found) in found.iter().enumerate() {
                let (expected, score) = (&expected[i * n_best + rank], scores[i * n_best + rank]);
                assert_eq!(&found.tokens, expected, "{case}, prompt {i}, rank {rank}");
                // transformers adds up in single precision.
                let difference = (found.score - score).abs() / score.abs();
                assert!(
                    difference < 1e-5,
                    "{case}, prompt {i}: {} {score}",
                    found.score
                );
            }
        }
    }
}

#[test]
fn beams_are_those_of_transformers() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/fixtures/beam/case.safetensors"
    );
    let fixture = Fixture::load(path);
    let prompts = rows_of(&fixture, "in.prompts");
    let end_tokens = rows_of(&fixture, "in.end_token").remove(0);
    for (dtype, _) in precisions() {
        let model = fixture_model(&fixture, dtype);
        for n_beams in [2, 3, 4, 5] {
            let config = BeamConfig::new(n_beams, 8).with_n_best(n_beams.min(3));
            check_case(
                &fixture,
                &model,
                &prompts,
                config.clone(),
                &format!("beams{n_beams}"),
            );
            for (name, early_stopping) in [
                ("true", EarlyStopping::True),
                ("false", EarlyStopping::False),
                ("never", EarlyStopping::Never),
            ] {
                for p in [0.0, 0.6, 1.0, 2.0, -1.0] {
                    let config = config
                        .clone()
                        .with_end_tokens(end_tokens.clone())
                        .with_early_stopping(early_stopping)
                        .with_length_penalty(LengthPenalty::HuggingFace(p));
                    let case = format!("beams{n_beams}.{name}.{p:?}");
                    check_case(&fixture, &model, &prompts, config, &case);
                }
            }
        }
    }
}
