//! The encoder-decoder: padding and packing change nothing, the cache equals the whole, sources are needed.

use burn::tensor::{Device, Int, Tensor, TensorData, activation::softmax, s};
use emberlm_core::{
    BatchData, CachedModel, Context, CrossEntropyConfig, IGNORED_TARGET, InvalidConfig, Lengths,
    LossModel, SequenceMixer, Source, TokenBatch,
};
use emberlm_models::{DecoderConfig, EncoderDecoder, EncoderDecoderConfig, PositionsConfig};
use emberlm_testkit::{assert_close, device, largest_difference, random_tokens, to_f64};

fn config() -> EncoderDecoderConfig {
    EncoderDecoderConfig::new(13, 2, 2, 12, 3).with_d_ff(Some(20))
}

/// In f64, with weights large enough that a wrong key shows.
fn model(device: &Device) -> EncoderDecoder {
    to_f64(config().init(device))
}

fn rows(rows: &[&[i64]], pad: i64, device: &Device) -> (Tensor<2, Int>, BatchData) {
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let padded = |row: &&[i64]| {
        let mut row = row.to_vec();
        row.resize(longest, pad);
        row
    };
    let tokens: Vec<i64> = rows.iter().flat_map(padded).collect();
    let hidden = |row: &&[i64]| (0..longest).map(|i| i >= row.len()).collect();
    (
        Tensor::from_data(TensorData::new(tokens, [rows.len(), longest]), device),
        BatchData::new().with_hidden_keys(rows.iter().map(hidden).collect()),
    )
}

const SOURCES: [&[i64]; 3] = [&[1, 2, 3, 4, 5], &[6], &[7, 8, 9]];
const TARGETS: [&[i64]; 3] = [&[0, 3], &[0, 5, 6, 7], &[0]];

#[test]
fn a_batch_of_many_is_one_by_one() {
    let device = device();
    let model = model(&device);
    let (tokens, data) = rows(&SOURCES, 12, &device);
    let (targets, _) = rows(&TARGETS, 12, &device);
    let all = model.forward(Source { tokens, data }, targets, None);
    for (i, (source, target)) in SOURCES.iter().zip(TARGETS).enumerate() {
        let (source, _) = rows(&[source], 0, &device);
        let n = target.len();
        let (target, _) = rows(&[target], 0, &device);
        let alone = model.forward(Source::new(source), target, None);
        assert_close(all.clone().slice(s![i..i + 1, 0..n, ..]), alone, 1e-12);
    }
}

/// `softmax(q k^T / sqrt(d_head))` with the projections of the one block, written out.
#[test]
fn cross_attention_is_the_softmax_of_the_last_block() {
    let device = device();
    let config = EncoderDecoderConfig::new(13, 1, 1, 12, 3).with_dropout(0.0);
    let model: EncoderDecoder = to_f64(config.init(&device));
    let (source, target) = (
        random_tokens([2, 5], 13, 1, &device),
        random_tokens([2, 4], 13, 2, &device),
    );
    let weights = model.cross_attention(Source::new(source.clone()), target.clone());

    let context = Context::new(Lengths::square(4));
    let block = &model.decoder.blocks[0];
    let x = model.embedding.forward(target, None, &context);
    let h = x.clone() + block.mixer.forward(block.mixer_norm.forward(x), &context);
    let cross = block
        .cross
        .as_ref()
        .expect("a decoder that reads an encoder");
    let norm = block.cross_norm.as_ref().expect("of the cross-attention");
    let heads = |x: Tensor<3>| {
        let [batch_size, length, _] = x.dims();
        x.reshape([batch_size, length, 3, 4]).swap_dims(1, 2)
    };
    let query = heads(cross.query.forward(norm.forward(h)));
    let key = heads(cross.key.forward(model.encode(Source::new(source), None)));
    assert_close(
        weights,
        softmax(query.matmul(key.transpose()) * 0.5, 3),
        1e-12,
    );
}

#[test]
fn cross_attention_gives_padding_nothing() {
    let device = device();
    let rows: [&[u32]; 2] = [&[1, 2, 3, 4, 5], &[6, 7]];
    let source = Source::padded(&rows, &device);
    let target = random_tokens([2, 3], 13, 2, &device);
    let weights = model(&device).cross_attention(source, target);
    assert_eq!(weights.dims(), [2, 3, 3, 5]);
    let of_padding = weights.clone().slice(s![1.., .., .., 2..]);
    assert_close(of_padding, Tensor::zeros([1, 3, 3, 3], &device), 0.0);
    let sums = weights.sum_dim(3);
    assert_close(sums, Tensor::ones([2, 3, 3, 1], &device), 1e-12);
}

#[test]
fn the_loss_counts_no_padding() {
    let device = device();
    let model = model(&device);
    let config = CrossEntropyConfig::new()
        .with_ignored_target(Some(IGNORED_TARGET))
        .with_label_smoothing(0.1);
    let loss_of = |sources: &[&[i64]], targets: &[&[i64]]| {
        let (tokens, data) = rows(sources, 11, &device);
        let source = Some(Source { tokens, data });
        let (inputs, data) = rows(targets, 11, &device);
        // Each token is its own target: any will do.
        let (targets, _) = rows(targets, IGNORED_TARGET, &device);
        let batch = TokenBatch {
            source,
            data,
            ..TokenBatch::new(inputs, targets)
        };
        let loss = model.loss(batch, &config).cross_entropy;
        let value = |x: Tensor<1>| x.into_data().iter::<f64>().next().unwrap();
        [value(loss.nll_sum), value(loss.n_targets)]
    };
    let all = loss_of(&SOURCES, &TARGETS);
    let each = (0..3).map(|i| loss_of(&SOURCES[i..=i], &TARGETS[i..=i]));
    let [nll_sum, n_targets] = each.fold([0.0; 2], |[a, b], [c, d]| [a + c, b + d]);
    assert_eq!(n_targets, 7.0);
    assert_eq!(all[1], n_targets);
    assert!((all[0] - nll_sum).abs() <= 1e-12 * nll_sum);
}

#[test]
fn packed_documents_are_one_by_one() {
    let device = device();
    let model = to_f64(
        DecoderConfig::new(13, 2, 12, 3)
            .with_positions(PositionsConfig::Rotary {
                theta: 10_000.0,
                layout: emberlm_core::RotaryLayout::HalfSplit,
            })
            .init(&device),
    );
    let hidden = |tokens: &[i64], documents: Option<Vec<u32>>| {
        let (tokens, _) = rows(&[tokens], 0, &device);
        let data = match documents {
            Some(documents) => BatchData::new().with_documents(vec![documents]),
            None => BatchData::new(),
        };
        model.hidden_states(tokens, data, None)
    };
    let packed = hidden(&[1, 2, 3, 4, 5], Some(vec![0, 0, 1, 1, 1]));
    assert_close(
        packed.clone().slice(s![.., 0..2, ..]),
        hidden(&[1, 2], None),
        1e-12,
    );
    // Rotary scores depend on distances alone, so a document may stand anywhere.
    assert_close(
        packed.slice(s![.., 2..5, ..]),
        hidden(&[3, 4, 5], None),
        1e-12,
    );
}

#[test]
fn cached_scores_equal_the_whole_at_every_split() {
    let device = device();
    let model = model(&device);
    let (tokens, data) = rows(&SOURCES, 12, &device);
    let source = Source { tokens, data };
    let targets = random_tokens([3, 6], 13, 1, &device);
    let whole = model.forward(source.clone(), targets.clone(), None);
    for split in 1..6 {
        let mut cache = model.start(source.clone(), 6);
        let parts = [0..split, split..6]
            .map(|part| model.forward_cached(targets.clone().slice(s![.., part]), &mut cache));
        assert_close(Tensor::cat(parts.to_vec(), 1), whole.clone(), 1e-12);
    }
}

#[test]
fn own_source_embeddings_and_an_untied_head() {
    let device = device();
    let config = config()
        .with_source_vocab_size(Some(29))
        .with_tied_embedding(false);
    let model = config.init(&device);
    let source = Source::new(Tensor::from_ints([[28, 0, 4]], &device));
    let scores = model.forward(source, Tensor::from_ints([[12, 1]], &device), None);
    assert_eq!(scores.dims(), [1, 2, 13]);
}

#[test]
fn the_source_matters() {
    let device = device();
    let model = model(&device);
    let scores = |source: &[i64]| {
        let (tokens, _) = rows(&[source], 0, &device);
        let target = Tensor::from_ints([[0, 1, 2]], &device);
        model.forward(Source::new(tokens), target, None).into_data()
    };
    assert!(largest_difference(&scores(&[1, 2, 3]), &scores(&[1, 2, 4])) > 1e-3);
}

#[test]
#[should_panic(expected = "source: the batch has none")]
fn a_batch_without_a_source_is_refused() {
    let device = device();
    let tokens = Tensor::<2, Int>::zeros([1, 2], &device);
    let batch = TokenBatch::new(tokens.clone(), tokens);
    config()
        .init(&device)
        .loss(batch, &CrossEntropyConfig::new());
}

#[test]
fn bad_configs_name_the_field() {
    let errors = [
        config().with_source_vocab_size(Some(0)).validate(),
        EncoderDecoderConfig::new(13, 0, 2, 12, 3).validate(),
        EncoderDecoderConfig::new(13, 2, 2, 9, 3).validate(),
        config().with_dropout(1.0).validate(),
    ];
    let fields = [
        "source_vocab_size",
        "n_encoder_layers",
        "d_model",
        "dropout",
    ];
    for (error, field) in errors.into_iter().zip(fields) {
        let error: InvalidConfig = error.expect_err("it is invalid");
        assert!(error.to_string().contains(field), "{error}");
    }
}
