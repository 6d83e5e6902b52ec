//! The decoder's laws, generation, and its files.

use std::{fs, time::Instant};

use burn::{
    module::Module,
    tensor::{Int, Tensor, TensorData, s},
};
use emberlm_core::{
    Activation, CachedModel, CausalModel, DecodingCache, Generator, InvalidConfig, NormConfig,
    NormPlacement, Pattern, RandomBlocks, RandomKey, RotaryLayout, SamplingConfig, Strided, Window,
};
use emberlm_models::{
    Decoder, DecoderConfig, FeedForwardKind, LoadError, PositionsConfig, load_decoder,
    load_weights, save_weights,
};
use emberlm_testkit::{assert_close, device, parameters_by_name, random_tokens};

fn configs() -> Vec<DecoderConfig> {
    let base = DecoderConfig::new(13, 2, 12, 3)
        .with_positions(PositionsConfig::Learned { max_seq_length: 16 });
    let rotary = |layout| PositionsConfig::Rotary {
        theta: 100.0,
        layout,
    };
    vec![
        base.clone(),
        base.clone().with_norm_placement(NormPlacement::Post),
        base.clone().with_positions(PositionsConfig::Sinusoidal),
        base.clone()
            .with_positions(rotary(RotaryLayout::Interleaved))
            .with_n_kv_heads(Some(1)),
        base.clone().with_pattern(Some(
            Pattern::window(Window::causal(3)) | Pattern::global(vec![0, 5]),
        )),
        base.clone()
            .with_pattern(Some(Pattern::strided(Strided::merged(3)))),
        base.clone()
            .with_pattern(Some(Pattern::random(RandomBlocks::past(2, 1)))),
        base.with_positions(rotary(RotaryLayout::HalfSplit))
            .with_norm(NormConfig::Rms { epsilon: 1e-5 })
            .with_feed_forward(FeedForwardKind::Gated)
            .with_activation(Activation::Silu)
            .with_tied_embedding(false)
            .with_bias(true),
    ]
}

#[test]
fn later_tokens_do_not_change_earlier_scores() {
    let device = device();
    for config in configs() {
        let model = config.init(&device);
        let tokens = random_tokens([2, 7], 13, 1, &device);
        let changed = tokens
            .clone()
            .slice_assign(s![.., 4..7], random_tokens([2, 3], 13, 2, &device));
        let scores = |tokens| model.forward(tokens, None).slice(s![.., 0..4, ..]);
        assert_close(scores(changed), scores(tokens), 1e-6);
    }
}

#[test]
fn cached_decoding_equals_the_full_pass_at_every_split() {
    let device = device();
    for config in configs() {
        let model = config.init(&device);
        let tokens = random_tokens([2, 7], 13, 1, &device);
        let whole = model.forward(tokens.clone(), None);
        let all: Vec<usize> = (0..=7).collect();
        for borders in [vec![0, 7], vec![0, 3, 7], vec![0, 6, 7], all] {
            let mut cache = model.new_cache(7);
            let parts = borders
                .windows(2)
                .map(|pair| {
                    let part = tokens.clone().slice(s![.., pair[0]..pair[1]]);
                    model.forward_cached(part, &mut cache)
                })
                .collect();
            assert_close(Tensor::cat(parts, 1), whole.clone(), 1e-5);
            assert_eq!(cache.len(), 7);
        }
    }
}

/// A model whose scores differ clearly, so that the likeliest token is no tie.
fn sharp(config: &DecoderConfig) -> Decoder {
    let mut config = config.clone();
    config.seed = 3;
    let model = config.init(&device());
    emberlm_testkit::load_parameters(model.clone(), |name| {
        let values = &parameters_by_name(&model)[name];
        let scaled: Vec<f32> = values.iter::<f32>().map(|x| x * 8.0).collect();
        TensorData::new(scaled, values.shape().clone())
    })
}

/// The likeliest token after a text, by the full pass.
fn likeliest(model: &Decoder, text: &[u32]) -> u32 {
    let tokens: Vec<i32> = text.iter().map(|token| *token as i32).collect();
    let tokens = TensorData::new(tokens, [1, text.len()]);
    let tokens = Tensor::<2, Int>::from_data(tokens, &device());
    let scores = model.forward(tokens, None);
    let last = scores.slice(s![0..1, text.len() - 1.., ..]).argmax(2);
    last.into_data().iter::<u32>().next().expect("one token")
}

fn greedy() -> SamplingConfig {
    SamplingConfig::default().with_temperature(0.0)
}

#[test]
fn cached_generation_equals_uncached_token_for_token() {
    let device = device();
    for config in configs() {
        let model = sharp(&config);
        let prompt = [1u32, 5, 2];
        let generated: Vec<u32> = Generator::new(&model, &prompt, 12, greedy(), &device)
            .expect("a prompt")
            .map(|token| token.expect("finite scores"))
            .collect();
        let mut text = prompt.to_vec();
        for token in generated {
            assert_eq!(token, likeliest(&model, &text));
            text.push(token);
        }
    }
}

#[test]
fn the_window_slides_past_the_learned_positions() {
    let device = device();
    let model = sharp(&configs()[0]);
    let mut generator =
        Generator::new(&model, &[1, 2, 3], 30, greedy(), &device).expect("a prompt");
    let tokens: Vec<u32> = generator
        .by_ref()
        .map(|token| token.expect("finite"))
        .collect();
    assert_eq!(tokens.len(), 30);
    // 16 positions: 13 tokens after the prompt of 3 and one more without its own position, then 8 or 9 each.
    assert_eq!(generator.n_slides(), 2);
    // After a slide the model sees the last 8 tokens from position 0, as if they were all there is.
    let text = generator.text();
    assert_eq!(text[17], likeliest(&model, &text[9..17]));
}

#[test]
fn a_cached_step_costs_no_more_than_linear_in_the_context() {
    let device = device();
    let config = DecoderConfig::new(256, 2, 64, 4).with_positions(PositionsConfig::Learned {
        max_seq_length: 2048,
    });
    let model = config.init(&device);
    let median_step = |context: usize| {
        let mut cache = model.new_cache(2048);
        model.forward_cached(random_tokens([1, context], 256, 1, &device), &mut cache);
        let mut seconds: Vec<f64> = (0..41)
            .map(|i| {
                let token = random_tokens([1, 1], 256, i, &device);
                let begin = Instant::now();
                model.forward_cached(token, &mut cache).into_data();
                begin.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        seconds[20]
    };
    let (short, long) = (median_step(250), median_step(2000));
    assert!(
        long < 8.0 * short,
        "8 times the context takes {:.1} times as long",
        long / short
    );
}

#[test]
fn dropout_is_a_function_of_the_key() {
    let device = device();
    let model = configs()[0].clone().with_dropout(0.3).init(&device);
    let tokens = random_tokens([2, 7], 13, 1, &device);
    let scores = |key| model.forward(tokens.clone(), key).into_data();
    let key = Some(RandomKey::new(1));
    assert_eq!(scores(key), scores(key));
    assert_ne!(scores(key), scores(Some(RandomKey::new(2))));
    assert_ne!(scores(key), scores(None));
}

#[test]
fn weights_survive_a_file() {
    let device = device();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    for mut config in configs() {
        let model = config.init(&device);
        save_weights(&model, &path).expect("writable");
        config.seed = 99;
        let other = config.init(&device);
        assert_ne!(parameters_by_name(&model), parameters_by_name(&other));
        let loaded = load_weights(other, &path).expect("intact");
        assert_eq!(parameters_by_name(&model), parameters_by_name(&loaded));
        let config_text = serde_json::json!({ "model": config }).to_string();
        fs::write(folder.path().join("config.json"), config_text).expect("writable");
        let (_, loaded) = load_decoder(folder.path(), &device).expect("a run");
        assert_eq!(parameters_by_name(&model), parameters_by_name(&loaded));
        assert_eq!(loaded.num_params(), model.num_params());
    }
}

#[test]
fn names_in_the_file_are_those_of_the_modules() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    let model = configs()[0].init(&device());
    save_weights(&model, &path).expect("writable");
    let bytes = fs::read(&path).expect("readable");
    let file = safetensors::SafeTensors::deserialize(&bytes).expect("safetensors");
    let mut names: Vec<&str> = file.names().into_iter().collect();
    names.sort_unstable();
    let expected = parameters_by_name(&model);
    assert_eq!(
        names,
        expected.keys().map(String::as_str).collect::<Vec<_>>()
    );
    assert!(names.contains(&"stack.blocks.1.mixer.query.weight"));
}

#[test]
fn files_that_do_not_fit_are_errors() {
    let device = device();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("model.safetensors");
    let model = configs()[0].init(&device);
    assert!(matches!(
        load_weights(model.clone(), &path),
        Err(LoadError::Io { .. })
    ));
    save_weights(&model, &path).expect("writable");
    let wider = DecoderConfig::new(13, 2, 24, 3).init(&device);
    assert!(matches!(
        load_weights(wider, &path),
        Err(LoadError::Weights { .. })
    ));
    let deeper = DecoderConfig::new(13, 3, 12, 3)
        .with_positions(PositionsConfig::Learned { max_seq_length: 16 })
        .init(&device);
    assert!(matches!(
        load_weights(deeper, &path),
        Err(LoadError::Weights { .. })
    ));
    let bytes = fs::read(&path).expect("readable");
    fs::write(&path, &bytes[..bytes.len() / 2]).expect("writable");
    assert!(matches!(
        load_weights(model, &path),
        Err(LoadError::Weights { .. })
    ));
    fs::write(folder.path().join("config.json"), "{\"model\": 3}").expect("writable");
    assert!(matches!(
        load_decoder(folder.path(), &device),
        Err(LoadError::Config { .. })
    ));
}

#[test]
fn configs_that_do_not_fit_are_refused() {
    let error = |config: DecoderConfig| config.validate().expect_err("invalid");
    assert_eq!(
        error(DecoderConfig::new(0, 2, 12, 3)),
        InvalidConfig::Zero {
            field: "vocab_size"
        }
    );
    assert!(matches!(
        error(DecoderConfig::new(13, 2, 12, 5)),
        InvalidConfig::HeadWidth { .. }
    ));
    assert!(matches!(
        error(DecoderConfig::new(13, 2, 1 << 40, 1)),
        InvalidConfig::TooLarge { .. }
    ));
    assert!(matches!(
        error(DecoderConfig::new(13, 2, 13, 1).with_positions(PositionsConfig::Sinusoidal)),
        InvalidConfig::OddWidth { .. }
    ));
    for pattern in [
        Pattern::documents(),
        Pattern::random(RandomBlocks::everywhere(4, 1)),
        Pattern::global(vec![4, 2000]),
        Pattern::per_head(vec![Pattern::full(), Pattern::causal()]),
    ] {
        assert!(matches!(
            error(DecoderConfig::new(13, 2, 12, 3).with_pattern(Some(pattern))),
            InvalidConfig::Pattern {
                field: "pattern",
                ..
            }
        ));
    }
    assert!(matches!(
        error(DecoderConfig::new(13, 2, 12, 3).with_dropout(1.0)),
        InvalidConfig::Range {
            field: "dropout",
            ..
        }
    ));
}
