//! Encoders with a head for a task: their formulas, gradients of all parameters, padding that changes nothing.

use std::collections::BTreeMap;

use burn::{
    module::Module,
    nn::Linear,
    tensor::{
        Device, Int, Tensor, TensorData,
        activation::{log_softmax, softmax},
        s,
    },
};
use emberlm_core::{
    BatchData, CrossEntropy, CrossEntropyConfig, Global, IGNORED_TARGET, LossModel, RandomKey,
    TokenBatch, Window,
};
use emberlm_models::{
    AnswerSpan, DecoderConfig, EncoderConfig, EncoderDecoderConfig, LayerAttention,
    PositionsConfig, SequenceClassifier, SequenceClassifierConfig, SpanAnswer, SpanAnswerConfig,
};
use emberlm_testkit::{
    assert_close, device, gradients_by_name, load_parameters, parameters_by_name, random,
    random_tokens,
};

const VOCAB_SIZE: usize = 13;
const POSITION: usize = 2;

fn encoder() -> EncoderConfig {
    EncoderConfig::new(VOCAB_SIZE, 2, 12, 3).with_d_ff(Some(20))
}

fn classifier(device: &Device) -> SequenceClassifier {
    let config = SequenceClassifierConfig::new(encoder(), 4)
        .with_position(POSITION)
        .with_head_dropout(Some(0.25));
    with_random_parameters(config.init(device))
}

fn span_answer(device: &Device) -> SpanAnswer {
    with_random_parameters(SpanAnswerConfig::new(encoder()).init(device))
}

/// In f64, with biases and weights large enough that a wrong one shows.
fn with_random_parameters<M: Module>(model: M) -> M {
    let shapes = parameters_by_name(&model);
    let mut seed = 0;
    load_parameters(model, |name| {
        seed += 1;
        let shape = shapes[name].shape().clone();
        let n = shape.num_elements();
        let values = random([n], seed, burn::tensor::DType::F64, &device());
        let values: Vec<f64> = values.into_data().iter::<f64>().collect();
        TensorData::new(values, shape)
    })
}

/// Rows of different lengths, padded at the end.
fn padded(rows: &[&[i64]], device: &Device) -> (Tensor<2, Int>, BatchData) {
    let longest = rows.iter().map(|row| row.len()).max().unwrap_or(0);
    let tokens = rows.iter().flat_map(|row| {
        let padding = std::iter::repeat_n(7, longest - row.len());
        row.iter().copied().chain(padding)
    });
    let tokens = TensorData::new(tokens.collect::<Vec<i64>>(), [rows.len(), longest]);
    let hidden = |row: &&[i64]| (0..longest).map(|i| i >= row.len()).collect();
    let data = BatchData::new().with_hidden_keys(rows.iter().map(hidden).collect());
    (Tensor::from_data(tokens, device), data)
}

const ROWS: [&[i64]; 3] = [&[1, 2, 3, 4, 5, 6], &[3, 1, 2], &[5, 5, 1, 9]];

fn targets<const N: usize>(rows: [[i64; N]; 3], device: &Device) -> Tensor<2, Int> {
    Tensor::from_data(TensorData::new(rows.concat(), [3, N]), device)
}

fn product<const D: usize>(layer: &Linear, x: Tensor<D>) -> Tensor<D> {
    let bias = layer.bias.as_ref().expect("heads have biases").val();
    x.matmul(layer.weight.val().unsqueeze()) + bias.unsqueeze()
}

fn counting() -> CrossEntropyConfig {
    CrossEntropyConfig::new().with_ignored_target(Some(IGNORED_TARGET))
}

fn numbers(loss: &CrossEntropy) -> [f64; 2] {
    [&loss.nll_sum, &loss.n_targets].map(|sum| sum.to_data().iter::<f64>().sum())
}

/// The loss and the number of targets of rows of scores, written out.
fn expected_loss(scores: Tensor<2>, targets: &[i64]) -> [f64; 2] {
    let [_, n_classes] = scores.dims();
    let logs: Vec<f64> = log_softmax(scores, 1).into_data().iter::<f64>().collect();
    let counted = targets.iter().enumerate().filter(|(_, t)| **t >= 0);
    let losses: Vec<f64> = counted
        .map(|(row, target)| -logs[row * n_classes + *target as usize])
        .collect();
    [losses.iter().sum(), losses.len() as f64]
}

fn assert_losses(loss: &CrossEntropy, expected: [f64; 2]) {
    let [nll_sum, n_targets] = numbers(loss);
    assert!((nll_sum - expected[0]).abs() < 1e-12 * expected[0].abs());
    assert_eq!(n_targets, expected[1]);
}

#[test]
fn a_class_is_read_from_one_position() {
    let device = device();
    let model = classifier(&device);
    let tokens = random_tokens([5, 7], VOCAB_SIZE, 1, &device);
    let types = random_tokens([5, 7], 2, 2, &device);
    let hidden =
        model
            .encoder
            .hidden_states(tokens.clone(), Some(types.clone()), BatchData::new(), None);
    let read: Tensor<2> = hidden
        .slice(s![.., POSITION..POSITION + 1, ..])
        .squeeze_dim(1);
    let expected = product(&model.head.classes, product(&model.head.dense, read).tanh());
    let scores = model.scores(tokens, Some(types), BatchData::new(), None);
    assert_close(scores, expected, 1e-12);
}

#[test]
fn dropout_of_the_head_is_a_function_of_the_key() {
    let device = device();
    let model = classifier(&device);
    let hidden = random([40, 12], 3, burn::tensor::DType::F64, &device);
    let scores = |key: Option<u64>| model.head.forward(hidden.clone(), key.map(RandomKey::new));
    let [plain, one, again, other] = [None, Some(1), Some(1), Some(2)].map(scores);
    assert_close(again, one.clone(), 0.0);
    for other in [plain, other] {
        let difference = (one.clone() - other).abs().mean().into_data();
        assert!(difference.iter::<f64>().sum::<f64>() > 0.1);
    }
}

#[test]
fn the_loss_of_a_class_is_its_cross_entropy() {
    let device = device();
    let model = classifier(&device);
    let (tokens, data) = padded(&ROWS, &device);
    let classes = [3, IGNORED_TARGET, 1];
    let scores = model.scores(tokens.clone(), None, data.clone(), None);
    let batch = TokenBatch {
        data,
        ..TokenBatch::new(tokens, targets(classes.map(|class| [class]), &device))
    };
    let loss = model.loss(batch, &counting()).cross_entropy;
    assert_losses(&loss, expected_loss(scores, &classes));
}

/// The same head reads whatever position has a target.
#[test]
fn parts_of_a_sequence_have_classes() {
    let device = device();
    let model = classifier(&device);
    let (tokens, data) = padded(&ROWS, &device);
    let mut classes = [[IGNORED_TARGET; 6]; 3];
    let asked = [(0, 0, 3), (0, 4, 1), (1, 2, 0), (2, 1, 2)];
    let mut expected = [0.0; 2];
    for (row, position, class) in asked {
        classes[row][position] = class;
        let hidden = (model.encoder).hidden_states(tokens.clone(), None, data.clone(), None);
        let read = hidden.slice(s![row..row + 1, position..position + 1, ..]);
        let scores = model.head.forward(read.squeeze_dim(1), None);
        let [nll_sum, n_targets] = expected_loss(scores, &[class]);
        expected = [expected[0] + nll_sum, expected[1] + n_targets];
    }
    let batch = TokenBatch {
        data,
        ..TokenBatch::new(tokens, targets(classes, &device))
    };
    assert_losses(&model.loss(batch, &counting()).cross_entropy, expected);
}

#[test]
fn padding_changes_no_class() {
    let device = device();
    let model = classifier(&device);
    let (tokens, data) = padded(&ROWS, &device);
    let all = model.scores(tokens, None, data, None);
    for (i, row) in ROWS.iter().enumerate() {
        let (alone, _) = padded(&[row], &device);
        let alone = model.scores(alone, None, BatchData::new(), None);
        assert_close(all.clone().slice(s![i..i + 1, ..]), alone, 1e-12);
    }
}

/// What a window cannot reach, a global position can.
#[test]
fn a_global_position_sees_all() {
    let device = device();
    let window = Window::one_sided(1);
    let longformer = LayerAttention::Longformer {
        window,
        dilations: None,
        global: Global::First(1),
        causal: false,
    };
    let local = LayerAttention::pattern(emberlm_core::Pattern::window(window));
    let reaches = |layer: LayerAttention| {
        let encoder = encoder().with_layers(Some(vec![layer.clone(), layer]));
        let config = SequenceClassifierConfig::new(encoder, 4);
        let model = with_random_parameters(config.init(&device));
        let scores = |last: i64| {
            let (tokens, _) = padded(&[&[1, 2, 3, 4, 5, last]], &device);
            model.scores(tokens, None, BatchData::new(), None)
        };
        let difference = (scores(6) - scores(8)).abs().sum().into_data();
        difference.iter::<f64>().sum::<f64>()
    };
    assert!(reaches(longformer) > 1e-3);
    assert_eq!(reaches(local), 0.0);
}

/// The encoder in front of a head is the one that the config makes by itself.
#[test]
fn the_encoder_is_initialised_as_alone() {
    let device = device();
    let alone = encoder().with_masked_head(false).with_seed(5).init(&device);
    let alone = parameters_by_name(&alone);
    let in_front = |parameters: BTreeMap<String, TensorData>| -> BTreeMap<String, TensorData> {
        let parameters = parameters.into_iter();
        parameters
            .filter_map(|(name, data)| Some((name.strip_prefix("encoder.")?.to_owned(), data)))
            .collect()
    };
    let encoder = encoder().with_pooler(true).with_seed(5);
    let classifier = SequenceClassifierConfig::new(encoder.clone(), 4).init(&device);
    let span_answer = SpanAnswerConfig::new(encoder).init(&device);
    assert!(in_front(parameters_by_name(&classifier)) == alone);
    assert!(in_front(parameters_by_name(&span_answer)) == alone);
}

fn assert_all_have_gradients<M: Module + LossModel>(model: &M, targets: Tensor<2, Int>) {
    let (tokens, data) = padded(&ROWS, &targets.device());
    let batch = TokenBatch {
        data,
        dropout_key: Some(RandomKey::new(1)),
        ..TokenBatch::new(tokens, targets)
    };
    let gradients = model
        .loss(batch, &counting())
        .cross_entropy
        .nll_sum
        .backward();
    let gradients = gradients_by_name(model, &gradients);
    let parameters = parameters_by_name(model);
    assert!(gradients.keys().eq(parameters.keys()), "{gradients:?}");
    // No query tells keys apart by what is added to all their scores.
    let without = |name: &str| name.ends_with("key.bias");
    for (name, gradient) in gradients.iter().filter(|(name, _)| !without(name)) {
        assert!(gradient.iter::<f64>().any(|g| g != 0.0), "{name}");
    }
}

#[test]
fn all_parameters_have_gradients() {
    let device = device().autodiff();
    assert_all_have_gradients(&classifier(&device), targets([[3], [0], [1]], &device));
    let spans = targets([[1, 4], [0, 0], [2, 3]], &device);
    assert_all_have_gradients(&span_answer(&device), spans);
}

#[test]
fn a_span_has_a_beginning_and_an_end() {
    let device = device();
    let model = span_answer(&device);
    let tokens = random_tokens([2, 7], VOCAB_SIZE, 1, &device);
    let types = random_tokens([2, 7], 2, 2, &device);
    let hidden =
        model
            .encoder
            .hidden_states(tokens.clone(), Some(types.clone()), BatchData::new(), None);
    let both = product(&model.ends, hidden);
    let scores = model.scores(tokens, Some(types), BatchData::new(), None);
    let expected = |i: usize| both.clone().slice(s![.., .., i..i + 1]).squeeze_dim::<2>(2);
    assert_close(scores.start(), expected(0), 1e-12);
    assert_close(scores.end(), expected(1), 1e-12);
}

#[test]
fn padding_has_no_probability_and_changes_no_span() {
    let device = device();
    let model = span_answer(&device);
    let (tokens, data) = padded(&ROWS, &device);
    let all = model.scores(tokens, None, data, None);
    let best = all.best_spans(30, 6);
    for (i, row) in ROWS.iter().enumerate() {
        let n = row.len();
        let (tokens, _) = padded(&[row], &device);
        let alone = model.scores(tokens, None, BatchData::new(), None);
        for (all, alone) in [(all.start(), alone.start()), (all.end(), alone.end())] {
            let probabilities = softmax(all, 1).slice(s![i..i + 1, ..]);
            assert_close(
                probabilities.clone().slice(s![.., ..n]),
                softmax(alone, 1),
                1e-12,
            );
            let rest = probabilities.slice(s![.., n..]).into_data();
            assert!(rest.iter::<f64>().all(|p| p == 0.0));
        }
        // All of them: of the padding there is none.
        assert_eq!(best[i].len(), n * (n + 1) / 2);
        assert!(best[i].iter().all(|span| span.end < n));
    }
}

#[test]
fn the_loss_of_a_span_is_the_mean_of_both_ends() {
    let device = device();
    let model = span_answer(&device);
    let (tokens, data) = padded(&ROWS, &device);
    let scores = model.scores(tokens.clone(), None, data.clone(), None);
    let spans = [[1, 4], [IGNORED_TARGET; 2], [2, 3]];
    let [start, end] = [0, 1].map(|i| spans.map(|span| span[i]));
    let start = expected_loss(scores.start(), &start);
    let end = expected_loss(scores.end(), &end);
    let batch = TokenBatch {
        data,
        ..TokenBatch::new(tokens, targets(spans, &device))
    };
    let loss = model.loss(batch, &counting()).cross_entropy;
    assert_losses(&loss, [start[0] + end[0], 4.0]);
    let mean: f64 = loss.mean().into_data().iter::<f64>().sum();
    let expected = (start[0] / 2.0 + end[0] / 2.0) / 2.0;
    assert!((mean - expected).abs() < 1e-12 * expected);
}

#[test]
fn the_best_spans_are_those_of_all_pairs() {
    let device = device();
    let model = span_answer(&device);
    let tokens = random_tokens([3, 11], VOCAB_SIZE, 4, &device);
    let scores = model.scores(tokens, None, BatchData::new(), None);
    let [starts, ends] = [scores.start(), scores.end()].map(|side| {
        let side: Vec<f64> = side.into_data().iter::<f64>().collect();
        side
    });
    for (n_best, max_length) in [(1, 11), (5, 3), (100, 2), (7, usize::MAX), (0, 4), (4, 0)] {
        let best = scores.best_spans(n_best, max_length);
        assert_eq!(best.len(), 3);
        for (row, best) in best.iter().enumerate() {
            let mut all = Vec::new();
            for start in 0..11 {
                for end in start..11 {
                    let score = starts[row * 11 + start] + ends[row * 11 + end];
                    if end - start < max_length {
                        all.push(AnswerSpan { start, end, score });
                    }
                }
            }
            all.sort_by(|a, b| b.score.partial_cmp(&a.score).expect("finite"));
            all.truncate(n_best);
            assert_eq!(*best, all);
        }
    }
}

#[test]
fn what_no_sequence_reaches_is_refused() {
    let longformer = |dilation, global| LayerAttention::Longformer {
        window: Window::one_sided(2),
        dilations: Some(vec![1, dilation, 1]),
        global: Global::Positions(global),
        causal: false,
    };
    let layers = |layer| {
        let config = EncoderConfig::new(VOCAB_SIZE, 1, 12, 3);
        config.with_layers(Some(vec![layer]))
    };
    layers(longformer(511, vec![0, 511])).validate().unwrap();
    let source = EncoderDecoderConfig::new(VOCAB_SIZE, 1, 1, 12, 3)
        .with_positions(PositionsConfig::Learned { max_seq_length: 9 })
        .with_encoder_layers(Some(vec![longformer(2, vec![9])]));
    let decoder = DecoderConfig::new(VOCAB_SIZE, 1, 12, 3)
        .with_positions(PositionsConfig::Learned { max_seq_length: 9 });
    for (result, words) in [
        (
            layers(longformer(1, vec![0, 512])).validate(),
            "layers: global.positions holds position 512, but the sequence has 512 positions",
        ),
        (
            layers(longformer(512, vec![0])).validate(),
            "layers: dilated.dilation 512 leaves a query no key but its own",
        ),
        (
            EncoderConfig::new(VOCAB_SIZE, 1, 12, 3)
                .with_pattern("window:2 | global-keys:600".parse().unwrap())
                .validate(),
            "pattern: global.positions holds position 600",
        ),
        (source.validate(), "global.positions holds position 9"),
        (
            decoder
                .with_pattern(Some("causal & dilated:2:9".parse().unwrap()))
                .validate(),
            "pattern: dilated.dilation 9 leaves",
        ),
    ] {
        let error = result.expect_err(words).to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn bad_configs_name_the_field() {
    let classifier = || SequenceClassifierConfig::new(encoder(), 4);
    let errors = [
        SequenceClassifierConfig::new(encoder(), 0).validate(),
        classifier().with_position(512).validate(),
        classifier().with_head_dropout(Some(1.0)).validate(),
        SequenceClassifierConfig::new(encoder().with_dropout(-0.5), 4).validate(),
        SpanAnswerConfig::new(EncoderConfig::new(VOCAB_SIZE, 0, 12, 3)).validate(),
    ];
    let fields = [
        "n_classes",
        "position",
        "head_dropout",
        "dropout",
        "n_layers",
    ];
    for (error, field) in errors.into_iter().zip(fields) {
        let error = error.expect_err("it is invalid").to_string();
        assert!(error.starts_with(field), "{error}");
    }
    // Where positions know no limit, any can be read.
    let rotary = PositionsConfig::Sinusoidal;
    let config = SequenceClassifierConfig::new(encoder().with_positions(rotary), 4);
    assert_eq!(config.with_position(512).validate(), Ok(()));
}

#[test]
#[should_panic(expected = "seq_length: position 2 is read, the sequence has 2")]
fn a_sequence_that_ends_before_the_position_is_refused() {
    let device = device();
    let tokens = random_tokens([1, 2], VOCAB_SIZE, 1, &device);
    classifier(&device).scores(tokens, None, BatchData::new(), None);
}

#[test]
#[should_panic(expected = "targets: a sequence of 6 has 1 class or 6, got 2")]
fn two_classes_are_refused() {
    let device = device();
    let (tokens, _) = padded(&ROWS, &device);
    let batch = TokenBatch::new(tokens, targets([[0, 1]; 3], &device));
    classifier(&device).loss(batch, &counting());
}

#[test]
#[should_panic(expected = "targets: a span has a beginning and an end, got 1")]
fn half_a_span_is_refused() {
    let device = device();
    let (tokens, _) = padded(&ROWS, &device);
    let batch = TokenBatch::new(tokens, targets([[0]; 3], &device));
    span_answer(&device).loss(batch, &counting());
}
