//! The attention modules against the formula, and the laws they keep.

use std::sync::Arc;

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor, TensorData},
};
use emberlm_attention::{
    AttendOptions, GroupedQueryAttention, GroupedQueryAttentionConfig, Implementation,
    MultiHeadAttention, MultiHeadAttentionConfig, ScoreCap, attend_by,
};
use emberlm_core::{
    BatchData, BlockSizes, Context, CrossMixer, InvalidConfig, Lengths, Pattern, RandomKey,
    RotaryConfig, RotaryLayout, Schedule, SequenceMixer,
};
use emberlm_testkit::{
    assert_close, assert_gradients_match, device, laws, load_parameters, parameters_by_name,
    random, to_f64,
};

const BATCH: usize = 2;
const D_HEAD: usize = 5;
const D_VALUE: usize = 4;

/// The formula, one number at a time: `softmax(cap(q k / sqrt(d))) v`.
fn definition(
    [query, key, value]: [&Tensor<4>; 3],
    visible: impl Fn(usize, usize, usize) -> bool,
    cap: impl Fn(f64) -> f64,
) -> Tensor<4> {
    let numbers = |t: &Tensor<4>| -> Vec<f64> { t.to_data().iter::<f64>().collect() };
    let (q, k, v) = (numbers(query), numbers(key), numbers(value));
    let [_, n_heads, query_length, _] = query.dims();
    let [_, n_kv_heads, key_length, _] = key.dims();
    let mut out = Vec::new();
    for batch in 0..BATCH {
        for head in 0..n_heads {
            let kv = batch * n_kv_heads + head / (n_heads / n_kv_heads);
            for i in 0..query_length {
                let row = ((batch * n_heads + head) * query_length + i) * D_HEAD;
                let weights: Vec<f64> = (0..key_length)
                    .map(|j| {
                        let column = (kv * key_length + j) * D_HEAD;
                        let score: f64 = (0..D_HEAD).map(|c| q[row + c] * k[column + c]).sum();
                        let score = cap(score / (D_HEAD as f64).sqrt());
                        if visible(batch, i, j) {
                            score.exp()
                        } else {
                            0.0
                        }
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                for c in 0..D_VALUE {
                    let sum: f64 = (0..key_length)
                        .map(|j| weights[j] * v[(kv * key_length + j) * D_VALUE + c])
                        .sum();
                    out.push(if total > 0.0 { sum / total } else { 0.0 });
                }
            }
        }
    }
    let shape = [BATCH, n_heads, query_length, D_VALUE];
    Tensor::from_data(TensorData::new(out, shape), (&query.device(), DType::F64))
}

fn inputs(
    n_heads: usize,
    n_kv_heads: usize,
    query_length: usize,
    key_length: usize,
    device: &Device,
) -> [Tensor<4>; 3] {
    let scaled = |shape, seed| random(shape, seed, DType::F64, device) * 2.0;
    [
        scaled([BATCH, n_heads, query_length, D_HEAD], 1),
        scaled([BATCH, n_kv_heads, key_length, D_HEAD], 2),
        scaled([BATCH, n_kv_heads, key_length, D_VALUE], 3),
    ]
}

const IMPLEMENTATIONS: [Implementation; 3] = [
    Implementation::Reference,
    Implementation::Portable,
    Implementation::Native,
];

fn schedule(pattern: &Pattern, lengths: Lengths, data: &BatchData) -> Arc<Schedule> {
    let lengths = lengths.with_batch_size(BATCH);
    Arc::new(Schedule::compile(pattern, &lengths, &BlockSizes::default(), data).unwrap())
}

/// Asserts that every implementation gives what the formula gives.
fn assert_is_formula(
    inputs: &[Tensor<4>; 3],
    schedule: &Arc<Schedule>,
    options: &AttendOptions,
    visible: impl Fn(usize, usize, usize) -> bool,
    cap: impl Fn(f64) -> f64,
) {
    let [q, k, v] = inputs;
    let expected = definition([q, k, v], visible, cap);
    for implementation in IMPLEMENTATIONS {
        let [q, k, v] = inputs.clone();
        let output = attend_by(implementation, q, k, v, schedule, options);
        assert_close(output, expected.clone(), 1e-12);
    }
}

#[test]
fn is_its_formula_for_any_lengths_and_groups() {
    let device = device();
    let options = AttendOptions::default();
    for (n_heads, n_kv_heads) in [(3, 3), (6, 2), (4, 1)] {
        for (query_length, first) in [(1, 0), (7, 0), (1, 6), (3, 4), (33, 32), (70, 0)] {
            let key_length = first + query_length;
            let inputs = inputs(n_heads, n_kv_heads, query_length, key_length, &device);
            let lengths = Lengths::new(query_length, key_length).with_first_position(first);
            let compile = |pattern| schedule(&pattern, lengths, &BatchData::new());
            let full = compile(Pattern::full());
            assert_is_formula(&inputs, &full, &options, |_, _, _| true, |s| s);
            let causal = compile(Pattern::causal());
            assert_is_formula(&inputs, &causal, &options, |_, i, j| j <= first + i, |s| s);
        }
    }
}

#[test]
fn caps_the_scores() {
    let inputs = inputs(2, 2, 4, 4, &device());
    let options = AttendOptions {
        cap: ScoreCap::Tanh(0.7),
        ..AttendOptions::default()
    };
    let full = schedule(&Pattern::full(), Lengths::square(4), &BatchData::new());
    let cap = |s: f64| 0.7 * (s / 0.7).tanh();
    assert_is_formula(&inputs, &full, &options, |_, _, _| true, cap);
}

/// Padding that leaves the first query of the second sequence without any key.
const PADDING: [[bool; 3]; 2] = [[false, true, false], [true, false, true]];

fn with_an_empty_row() -> Arc<Schedule> {
    let data = BatchData::new().with_hidden_keys(PADDING.map(Vec::from).to_vec());
    schedule(&Pattern::causal(), Lengths::square(3), &data)
}

#[test]
fn a_query_without_keys_gets_zeros_and_no_gradient() {
    let options = AttendOptions::default();
    let schedule = with_an_empty_row();
    let inputs = inputs(2, 1, 3, 3, &device());
    let visible = |b: usize, i: usize, j: usize| j <= i && !PADDING[b][j];
    assert_is_formula(&inputs, &schedule, &options, visible, |s| s);

    let device = device().autodiff();
    for implementation in IMPLEMENTATIONS {
        let [q, k, v] = self::inputs(2, 1, 3, 3, &device);
        let q = q.require_grad();
        let out = attend_by(implementation, q.clone(), k, v, &schedule, &options);
        let gradient = q.grad(&out.sum().backward()).expect("depends on the query");
        let gradient: Vec<f64> = gradient.to_data().iter::<f64>().collect();
        assert!(gradient.iter().all(|g| g.is_finite()));
        // [batch 1, head 0, query 0] and [batch 1, head 1, query 0] see nothing.
        for head in [2, 3] {
            let row = head * 3 * D_HEAD;
            assert!(gradient[row..row + D_HEAD].iter().all(|g| *g == 0.0));
        }
    }
}

#[test]
fn gradients_of_query_key_and_value() {
    let device = device().autodiff();
    let schedule = with_an_empty_row();
    let options = AttendOptions {
        cap: ScoreCap::Tanh(5.0),
        ..AttendOptions::default()
    };
    for implementation in IMPLEMENTATIONS {
        for chosen in 0..3 {
            let inputs = inputs(2, 1, 3, 3, &device);
            assert_gradients_match(inputs[chosen].clone(), |x| {
                let mut inputs = inputs.clone();
                inputs[chosen] = x;
                let [q, k, v] = inputs;
                attend_by(implementation, q, k, v, &schedule, &options)
            });
        }
    }
}

#[test]
fn dropout_acts_on_the_weights_and_only_with_a_key() {
    let inputs = inputs(2, 2, 6, 6, &device());
    let full = schedule(&Pattern::full(), Lengths::square(6), &BatchData::new());
    for implementation in IMPLEMENTATIONS {
        let attend = |dropout, dropout_key| {
            let [q, k, v] = inputs.clone();
            let options = AttendOptions {
                dropout,
                dropout_key,
                ..AttendOptions::default()
            };
            attend_by(implementation, q, k, v, &full, &options)
        };
        let plain = attend(0.0, None);
        assert_close(attend(0.5, None), plain.clone(), 0.0);
        let key = Some(RandomKey::new(1));
        let dropped = attend(0.5, key);
        assert_close(attend(0.5, key), dropped.clone(), 0.0);
        assert!(!dropped.all_close(plain, None, None));
    }
}

fn multi_head(device: &Device) -> MultiHeadAttention {
    MultiHeadAttentionConfig::new(12, 3)
        .with_pattern(Pattern::causal())
        .init(device)
}

fn grouped_query(layout: RotaryLayout, device: &Device) -> GroupedQueryAttention {
    GroupedQueryAttentionConfig::new(12, 4)
        .with_n_kv_heads(Some(2))
        .with_d_head(Some(6))
        .with_rotary(Some(RotaryConfig::new(6).with_layout(layout)))
        .with_pattern(Pattern::causal())
        .init(device)
}

/// Self-attention over the whole sequence.
fn whole<M: SequenceMixer>(mixer: &M, x: Tensor<3>) -> Tensor<3> {
    let [_, seq_length, _] = x.dims();
    mixer.forward(x, &Context::new(Lengths::square(seq_length)))
}

fn keeps_the_laws<M: SequenceMixer + Module>(make: impl Fn(&Device) -> M) {
    let device = device();
    let mixer = make(&device.clone().autodiff());
    laws::causal([2, 7, 12], &device.clone().autodiff(), |x| whole(&mixer, x));
    let mixer = make(&device);
    let mut cache = mixer.new_cache(7);
    laws::cached_equals_full(
        random([2, 7, 12], 3, DType::F32, &device),
        |x| whole(&mixer, x),
        |x, position| {
            if position == 0 {
                cache = mixer.new_cache(7);
            }
            let [_, length, _] = x.dims();
            let lengths = Lengths::new(length, position + length).with_first_position(position);
            mixer.forward_cached(x, &Context::new(lengths), &mut cache)
        },
    );
}

#[test]
fn multi_head_keeps_the_laws() {
    keeps_the_laws(multi_head);
}

#[test]
fn grouped_query_keeps_the_laws() {
    keeps_the_laws(|device| grouped_query(RotaryLayout::HalfSplit, device));
    keeps_the_laws(|device| grouped_query(RotaryLayout::Interleaved, device));
}

#[test]
#[should_panic(expected = "largest difference")]
fn the_causal_law_catches_full_attention() {
    let device = device().autodiff();
    let attention = MultiHeadAttentionConfig::new(12, 3).init(&device);
    laws::causal([2, 5, 12], &device, |x| whole(&attention, x));
}

#[test]
fn as_many_key_value_heads_as_heads_is_multi_head_attention() {
    let device = device();
    let multi_head = multi_head(&device);
    let values = parameters_by_name(&multi_head);
    let grouped = GroupedQueryAttentionConfig::new(12, 3)
        .with_bias(true)
        .with_pattern(Pattern::causal())
        .init(&device);
    let grouped = load_parameters(grouped, |name| values[name].clone());
    let x = random([2, 7, 12], 1, DType::F32, &device);
    assert_close(whole(&grouped, x.clone()), whole(&multi_head, x), 0.0);
}

#[test]
fn cross_attention_reads_another_sequence_and_caches_it() {
    let device = device().autodiff();
    let attention = MultiHeadAttentionConfig::new(12, 3)
        .with_d_source(Some(5))
        .init(&device);
    let attention = to_f64(attention);
    let x = random([2, 3, 12], 1, DType::F64, &device);
    let source = random([2, 4, 5], 2, DType::F64, &device);
    let context = Context::new(Lengths::new(3, 4));
    let cross = |x: Tensor<3>, source: Tensor<3>| {
        attention.forward_cross(x, &attention.project_source(source), &context)
    };
    let cache = attention.project_source(source.clone());
    let once = attention.forward_cross(x.clone(), &cache, &context);
    assert_close(once, cross(x.clone(), source.clone()), 0.0);
    assert_gradients_match(source.clone(), |source| cross(x.clone(), source));
    assert_gradients_match(x, |x| cross(x, source.clone()));
}

#[test]
fn selected_rows_of_a_source_are_those_rows() {
    let device = device();
    let attention = MultiHeadAttentionConfig::new(12, 3).init(&device);
    let x = random([3, 2, 12], 1, DType::F32, &device);
    let source = random([2, 4, 12], 2, DType::F32, &device);
    let context = Context::new(Lengths::new(2, 4));
    let mut cache = attention.project_source(source.clone());
    cache.select(&[1, 0, 1]);
    assert_eq!(cache.batch_size(), 3);
    let rows = [1, 0, 1].map(|row| source.clone().narrow(0, row, 1));
    assert_close(
        attention.forward_cross(x.clone(), &cache, &context),
        {
            let source = Tensor::cat(rows.to_vec(), 0);
            attention.forward_cross(x, &attention.project_source(source), &context)
        },
        1e-6,
    );
}

#[test]
fn configs_that_do_not_fit_are_refused() {
    assert!(matches!(
        MultiHeadAttentionConfig::new(10, 3).validate(),
        Err(InvalidConfig::HeadWidth {
            d_model: 10,
            n_heads: 3
        })
    ));
    assert!(matches!(
        MultiHeadAttentionConfig::new(10, 0).validate(),
        Err(InvalidConfig::Zero { field: "n_heads" })
    ));
    let grouped = GroupedQueryAttentionConfig::new(12, 4);
    assert!(matches!(
        grouped.clone().with_n_kv_heads(Some(3)).validate(),
        Err(InvalidConfig::KeyValueHeads { .. })
    ));
    let other_width = grouped.with_rotary(Some(RotaryConfig::new(4)));
    assert!(matches!(
        other_width.validate(),
        Err(InvalidConfig::Range { .. })
    ));
    assert!(matches!(
        MultiHeadAttentionConfig::new(12, 4)
            .with_pattern(Pattern::PerHead(Vec::new()))
            .validate(),
        Err(InvalidConfig::Pattern {
            field: "pattern",
            ..
        })
    ));
}

#[test]
#[should_panic(expected = "pattern:")]
fn a_pattern_that_does_not_fit_the_heads_panics() {
    let device = device();
    let pattern = Pattern::per_head(vec![Pattern::causal(), Pattern::full()]);
    let attention = MultiHeadAttentionConfig::new(12, 3)
        .with_pattern(pattern)
        .init(&device);
    whole(&attention, random([2, 5, 12], 1, DType::F32, &device));
}
