//! All implementations of `attend` against the definition in f64: outputs, log-sum-exps and all gradients.

use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor, TensorData};
use emberlm_attention::{
    AttendOptions, Implementation, ScoreCap, attend, attend_by, attend_with_log_sum_exp,
};
use emberlm_core::{
    BatchData, BlockSizes, Blockwise, Fixed, Global, Lengths, Part, Pattern, RandomBlocks,
    RandomKey, Schedule, Strided, Window,
};
use emberlm_testkit::{assert_close, device, largest_difference, random, same_cases};
use proptest::prelude::*;

const IMPLEMENTATIONS: [Implementation; 3] = [
    Implementation::Reference,
    Implementation::Portable,
    Implementation::Native,
];

/// One attention: sizes, pattern, options.
#[derive(Debug, Clone)]
struct Case {
    pattern: Pattern,
    data: BatchData,
    query_length: usize,
    key_length: usize,
    first_position: usize,
    batch_size: usize,
    n_heads: usize,
    n_kv_heads: usize,
    d_head: usize,
    d_value: usize,
    cap: ScoreCap,
    alibi: bool,
    /// Batch rows and heads of the bias.
    bias: Option<[usize; 2]>,
    sinks: bool,
    dropout: f64,
    scale: Option<f64>,
}

/// Sinks over which a largest magnitude is taken. The gradient of one is a single sum over all queries, and now and
/// then almost nothing is left of such a sum, against which any rounding is large.
const N_SINKS: usize = 4;

impl Case {
    fn new(pattern: Pattern, length: usize) -> Self {
        Self {
            pattern,
            data: BatchData::new(),
            query_length: length,
            key_length: length,
            first_position: 0,
            batch_size: 2,
            n_heads: 4,
            n_kv_heads: 2,
            d_head: 8,
            d_value: 11,
            cap: ScoreCap::None,
            alibi: false,
            bias: None,
            sinks: false,
            dropout: 0.0,
            scale: None,
        }
    }

    fn schedule(&self) -> Arc<Schedule> {
        let lengths = Lengths::new(self.query_length, self.key_length)
            .with_first_position(self.first_position)
            .with_batch_size(self.batch_size)
            .with_n_heads(self.n_heads);
        let schedule =
            Schedule::compile(&self.pattern, &lengths, &BlockSizes::default(), &self.data);
        Arc::new(schedule.unwrap())
    }

    /// Output, log-sum-exp (zero where it is infinite) and the gradients of query, key, value, bias and sinks, these
    /// of [`N_SINKS`] at least: with fewer heads, of several inputs.
    fn run(&self, implementation: Implementation, dtype: DType) -> Vec<TensorData> {
        let mut results = self.run_with(0, implementation, dtype);
        if self.sinks {
            let mut sinks: Vec<f64> = Vec::new();
            for inputs in 0..N_SINKS.div_ceil(self.n_heads) as u64 {
                let results = self.run_with(100 * inputs, implementation, dtype);
                sinks.extend(
                    results
                        .last()
                        .expect("the gradient of the sinks")
                        .iter::<f64>(),
                );
            }
            results.pop();
            let n_sinks = sinks.len();
            results.push(TensorData::new(sinks, [n_sinks]));
        }
        results
    }

    /// The same for the inputs that are drawn from `first_seed` on.
    fn run_with(
        &self,
        first_seed: u64,
        implementation: Implementation,
        dtype: DType,
    ) -> Vec<TensorData> {
        let device = device().autodiff();
        let leaf =
            |shape, seed| random::<4>(shape, first_seed + seed, dtype, &device).require_grad();
        let Self {
            batch_size,
            n_heads,
            n_kv_heads,
            query_length,
            key_length,
            d_head,
            d_value,
            ..
        } = *self;
        let query = leaf([batch_size, n_heads, query_length, d_head], 1);
        let key = leaf([batch_size, n_kv_heads, key_length, d_head], 2);
        let value = leaf([batch_size, n_kv_heads, key_length, d_value], 3);
        let bias = self
            .bias
            .map(|[b, h]| leaf([b, h, query_length, key_length], 4));
        let sinks = self
            .sinks
            .then(|| random::<1>([n_heads], first_seed + 5, dtype, &device).require_grad());
        let options = AttendOptions {
            scale: self.scale,
            cap: self.cap,
            alibi: self
                .alibi
                .then(|| (1..=n_heads).map(|head| 0.5 / head as f64).collect()),
            bias: bias.clone(),
            sinks: sinks.clone(),
            dropout: self.dropout,
            dropout_key: Some(RandomKey::new(6)),
        };
        let (output, lse) = attend_with_log_sum_exp(
            implementation,
            query.clone(),
            key.clone(),
            value.clone(),
            &self.schedule(),
            &options,
        );
        let lse = lse.clone().mask_fill(lse.is_inf(), 0.0);
        let weigh = |seed, shape| random(shape, seed, dtype, &device);
        let loss = (output.clone() * weigh(7, output.dims())).sum()
            + (lse.clone() * random::<3>(lse.dims(), 8, dtype, &device)).sum();
        let gradients = loss.backward();
        let mut results = vec![output.into_data(), lse.into_data()];
        for tensor in [Some(query), Some(key), Some(value), bias]
            .into_iter()
            .flatten()
        {
            // Without any visible pair there may be no gradient, which is one of zeros.
            let gradient = tensor.grad(&gradients);
            results.push(
                gradient
                    .unwrap_or_else(|| tensor.zeros_like().inner())
                    .into_data(),
            );
        }
        results.extend(sinks.map(|sinks| sinks.grad(&gradients).unwrap().into_data()));
        results
    }

    /// The bars: 1e-11 in f64; in f32 the larger of 1e-5 and the definition's own error.
    fn check(&self) {
        let expected = self.run(Implementation::Reference, DType::F64);
        let definition = self.run(Implementation::Reference, DType::F32);
        let names = [
            "output",
            "log-sum-exp",
            "query",
            "key",
            "value",
            "bias or sinks",
            "sinks",
        ];
        for implementation in [Implementation::Portable, Implementation::Native] {
            let f64 = self.run(implementation, DType::F64);
            let f32 = self.run(implementation, DType::F32);
            for (i, expected) in expected.iter().enumerate() {
                let error = largest_difference(&f64[i], expected);
                assert!(
                    error <= 1e-11,
                    "{implementation:?}, f64, {}: {error:e} in {self:?}",
                    names[i]
                );
                let error = largest_difference(&f32[i], expected);
                let limit = largest_difference(&definition[i], expected).max(1e-5);
                assert!(
                    error <= limit,
                    "{implementation:?}, f32, {}: {error:e}, the definition {limit:e} in {self:?}",
                    names[i]
                );
            }
        }
    }
}

fn patterns(length: usize) -> Vec<Pattern> {
    let mut patterns = vec![
        Pattern::full(),
        Pattern::causal(),
        Pattern::window(Window::one_sided(20)),
        Pattern::causal() & Pattern::window(Window::one_sided(70)),
        Pattern::dilated(Window::one_sided(5), 3),
        Pattern::strided(Strided::merged(9)),
        Pattern::fixed(Fixed::merged(16, 3)),
        Pattern::blockwise(Blockwise::new(48)),
        Pattern::random(RandomBlocks::everywhere(16, 2)),
        Pattern::window(Window::one_sided(6)) | Pattern::global(vec![0]),
        Pattern::prefix(5) | Pattern::causal(),
        Pattern::causal() & (Pattern::window(Window::one_sided(8)) | Pattern::sinks(2)),
        !Pattern::causal(),
        Pattern::per_head(vec![
            Pattern::causal(),
            Pattern::full(),
            Pattern::window(Window::one_sided(3)),
            Pattern::strided(Strided::column(7)),
        ]),
    ];
    if length > 40 {
        patterns.push(Pattern::window(Window::one_sided(6)) | Pattern::global(vec![3, 17, 40]));
    }
    patterns
}

#[test]
fn every_pattern_at_odd_lengths() {
    for length in [1, 2, 63, 65, 200, 1000] {
        for pattern in patterns(length) {
            let mut case = Case::new(pattern, length);
            if length == 1000 {
                // The definition takes seconds there.
                case.batch_size = 1;
            }
            case.check();
        }
    }
}

/// Queries that stand in one part, in several, or in none.
#[test]
fn queries_of_some_parts() {
    let scattered = || Global::Positions(vec![3, 70, 150]);
    for pattern in [
        Pattern::window(Window::one_sided(6)) | Pattern::GlobalQueries(scattered()),
        Pattern::GlobalQueries(scattered()),
        Pattern::window(Window::one_sided(6)) | Pattern::Global(scattered()),
    ] {
        for sinks in [false, true] {
            let mut case = Case::new(pattern.clone(), 200);
            case.sinks = sinks;
            let schedule = case.schedule();
            let mut orders = schedule.parts().iter().filter_map(Part::query_order);
            assert!(orders.any(|order| order.len() < 200), "{pattern}");
            case.check();
        }
    }
}

/// Where each key stands in one block of keys, its gradient is written at once; zero if no query sees it.
#[test]
fn keys_of_one_block() {
    for length in [65, 200] {
        let hidden = [
            vec![false; length],
            (0..length).map(|key| key >= 64).collect(),
        ];
        for pattern in [
            Pattern::causal(),
            Pattern::window(Window::one_sided(20)),
            Pattern::dilated(Window::one_sided(5), 3),
            Pattern::strided(Strided::column(9)),
        ] {
            for data in [
                BatchData::new(),
                BatchData::new().with_hidden_keys(hidden.to_vec()),
            ] {
                let mut case = Case::new(pattern.clone(), length);
                case.n_kv_heads = case.n_heads;
                case.data = data;
                case.check();
            }
        }
    }
}

/// Tasks use memory again: what a head that is not a number leaves there must not reach the next one.
#[test]
fn a_head_leaves_nothing_for_the_next() {
    let device = device().autodiff();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1);
    pool.build().expect("one thread").install(|| {
        for pattern in [Pattern::causal(), Pattern::dilated(Window::one_sided(5), 3)] {
            let schedule = compile(&pattern, 70);
            let [query, key, value] = inputs(70, &device).map(|input| {
                // Batch row 0 is not a number.
                let spoiled = input.zeros_like().div_scalar(0.0);
                Tensor::cat(vec![spoiled, input], 0).require_grad()
            });
            let leaves = [query.clone(), key.clone(), value.clone()];
            let (native, options) = (Implementation::Native, AttendOptions::default());
            let output = attend_by(native, query, key, value, &schedule, &options);
            let gradients = output.clone().sum().backward();
            let grads = leaves.map(|leaf| leaf.grad(&gradients).expect("a leaf's"));
            for result in grads.into_iter().chain([output.inner()]) {
                let [spoiled, clean] = [0, 1].map(|row| result.clone().narrow(0, row, 1));
                assert!(spoiled.into_data().iter::<f32>().any(f32::is_nan));
                assert!(clean.into_data().iter::<f32>().all(f32::is_finite));
            }
        }
    });
}

/// Every pair of values of two options occurs in one of these cases.
fn pairwise() -> Vec<Case> {
    const N_VALUES: usize = 5;
    let mut cases = Vec::new();
    // An orthogonal array: in columns a, b and a + k b (mod 5) every pair of values occurs once, for each k.
    for a in 0..N_VALUES {
        for b in 0..N_VALUES {
            let column = |k: usize| (a + k * b) % N_VALUES;
            let (length, pattern) = [
                (65, Pattern::causal()),
                (
                    130,
                    Pattern::causal() & Pattern::window(Window::one_sided(40)),
                ),
                (70, Pattern::strided(Strided::merged(8))),
                (
                    67,
                    Pattern::window(Window::one_sided(9)) | Pattern::global(vec![2, 66]),
                ),
                (
                    100,
                    Pattern::random(RandomBlocks::everywhere(16, 1)) & Pattern::documents(),
                ),
            ][a]
                .clone();
            let mut case = Case::new(pattern, length);
            case.data = documents_and_padding(length, case.batch_size);
            [case.n_heads, case.n_kv_heads] = [[4, 4], [4, 2], [4, 1], [6, 3], [1, 1]][b];
            [case.d_head, case.d_value] =
                [[8, 8], [80, 16], [5, 33], [64, 64], [256, 3]][column(1)];
            case.bias = [
                None,
                Some([case.batch_size, case.n_heads]),
                Some([1, case.n_heads]),
                Some([case.batch_size, 1]),
                Some([1, 1]),
            ][column(2)];
            case.cap = [ScoreCap::None, ScoreCap::Tanh(0.7)][column(3) % 2];
            case.scale = [None, Some(0.9)][column(3) / 2 % 2];
            case.sinks = column(4) % 2 == 1;
            case.alibi = column(4) / 2 % 2 == 1;
            case.dropout = [0.0, 0.0, 0.3][column(4) % 3];
            cases.push(case);
        }
    }
    cases
}

/// Three documents in each batch row, and in the second row padding before and after.
fn documents_and_padding(length: usize, batch_size: usize) -> BatchData {
    let documents = (0..batch_size)
        .map(|batch| {
            (0..length)
                .map(|i| ((i + 7 * batch) * 3 / length) as u32)
                .collect()
        })
        .collect();
    let hidden = (0..batch_size)
        .map(|batch| {
            (0..length)
                .map(|i| batch == 1 && (i < 3 || i + 5 > length))
                .collect()
        })
        .collect();
    BatchData::new()
        .with_documents(documents)
        .with_hidden_keys(hidden)
}

#[test]
fn every_pair_of_options() {
    for case in pairwise() {
        case.check();
    }
}

#[test]
fn queries_after_the_first_key() {
    for (query_length, key_length) in [(1, 130), (3, 70), (66, 200)] {
        for pattern in [
            Pattern::causal(),
            Pattern::causal() & Pattern::window(Window::one_sided(50)),
            Pattern::strided(Strided::merged(8)),
        ] {
            let mut case = Case::new(pattern, query_length);
            case.key_length = key_length;
            case.first_position = key_length - query_length;
            case.alibi = true;
            case.check();
        }
    }
}

/// Expressions of the words of a command line, up to three deep.
fn any_pattern() -> impl Strategy<Value = Pattern> {
    const WORDS: &[&str] = &[
        "full",
        "causal",
        "window:7",
        "window:40:3",
        "dilated:4:5",
        "strided:9",
        "strided-column:6",
        "fixed:12:2",
        "blockwise:20",
        "global:0",
        "random:16:1:3",
        "prefix:9",
        "sinks:2",
        "documents",
    ];
    let word = proptest::sample::select(WORDS).prop_map(|word| word.parse().unwrap());
    word.prop_recursive(3, 8, 2, |inner| {
        prop_oneof![
            (inner.clone(), inner.clone()).prop_map(|(a, b): (Pattern, Pattern)| a & b),
            (inner.clone(), inner.clone()).prop_map(|(a, b): (Pattern, Pattern)| a | b),
            inner.prop_map(|a: Pattern| !a),
        ]
    })
}

prop_compose! {
    /// Any combination of everything. The number of cases is proptest's: `PROPTEST_CASES` in the environment.
    fn any_case()(
        pattern in any_pattern(),
        length in 1..150_usize,
        first_position in 0..40_usize,
        batch_size in 1..3_usize,
        (n_heads, n_kv_heads) in proptest::sample::select(vec![(1, 1), (2, 1), (4, 2), (3, 3)]),
        d_head in proptest::sample::select(vec![1, 8, 17, 64]),
        d_value in proptest::sample::select(vec![1, 8, 33]),
        cap in prop_oneof![Just(ScoreCap::None), Just(ScoreCap::Tanh(1.5))],
        alibi in any::<bool>(),
        bias in any::<Option<(bool, bool)>>(),
        sinks in any::<bool>(),
        dropout in prop_oneof![Just(0.0), Just(0.4)],
    ) -> Case {
        let key_length = length + first_position;
        let mut case = Case::new(pattern, length);
        case.data = documents_and_padding(key_length, batch_size);
        case.key_length = key_length;
        case.first_position = first_position;
        case.batch_size = batch_size;
        case.n_heads = n_heads;
        case.n_kv_heads = n_kv_heads;
        case.d_head = d_head;
        case.d_value = d_value;
        case.cap = cap;
        case.alibi = alibi;
        case.bias = bias.map(|(batch, heads)| {
            [if batch { batch_size } else { 1 }, if heads { n_heads } else { 1 }]
        });
        case.sinks = sinks;
        case.dropout = dropout;
        case
    }
}

proptest! {
    #![proptest_config(same_cases(4))]

    #[test]
    fn any_combination(case in any_case()) {
        case.check();
    }
}

#[test]
fn long_sequences_and_wide_heads() {
    for (d_head, d_value, length) in [(80, 80, 1000), (256, 8, 300), (8, 256, 300)] {
        let mut case = Case::new(Pattern::causal(), length);
        [case.n_heads, case.n_kv_heads] = [2, 1];
        [case.d_head, case.d_value] = [d_head, d_value];
        case.check();
    }
}

#[test]
#[should_panic(expected = "f64, output")]
fn the_comparison_catches_another_pattern() {
    let right = Case::new(Pattern::causal(), 65);
    let wrong = Case::new(
        Pattern::causal() & Pattern::window(Window::one_sided(60)),
        65,
    );
    let (right, wrong) = (
        right.run(Implementation::Reference, DType::F64),
        wrong.run(Implementation::Native, DType::F64),
    );
    let error = largest_difference(&wrong[0], &right[0]);
    assert!(error <= 1e-11, "f64, output: {error:e}");
}

fn inputs(length: usize, device: &Device) -> [Tensor<4>; 3] {
    [1, 2, 3].map(|seed| random([1, 2, length, 8], seed, DType::F32, device))
}

fn compile(pattern: &Pattern, length: usize) -> Arc<Schedule> {
    let lengths = Lengths::square(length);
    let schedule = Schedule::compile(pattern, &lengths, &BlockSizes::default(), &BatchData::new());
    Arc::new(schedule.unwrap())
}

#[test]
fn not_a_number_and_infinity_pass_through() {
    let device = device();
    let schedule = compile(&Pattern::causal(), 70);
    for bad in [f32::NAN, f32::INFINITY] {
        for implementation in IMPLEMENTATIONS {
            let [query, key, value] = inputs(70, &device);
            let mut data: Vec<f32> = key.to_data().iter::<f32>().collect();
            // Key 30 of the first head, which queries 30 and later see.
            data[30 * 8] = bad;
            let key = Tensor::from_data(TensorData::new(data, key.dims()), &device);
            let output = attend_by(
                implementation,
                query,
                key,
                value,
                &schedule,
                &AttendOptions::default(),
            );
            let output: Vec<f32> = output.into_data().iter::<f32>().collect();
            let of_query = |i: usize| &output[i * 8..(i + 1) * 8];
            assert!(
                of_query(29).iter().all(|x| x.is_finite()),
                "{implementation:?}"
            );
            // An infinite key draws all weight or none, by the sign of the query; NaN takes the row.
            let spoiled = (30..70)
                .filter(|i| of_query(*i).iter().all(|x| x.is_nan()))
                .count();
            let least = if bad.is_nan() { 40 } else { 1 };
            assert!(spoiled >= least, "{implementation:?}: {spoiled} rows");
        }
    }
}

#[test]
fn a_transposed_view_is_read_where_it_lies() {
    let device = device();
    let schedule = compile(&Pattern::causal(), 70);
    let views = [1, 2, 3].map(|seed| {
        let rows = random::<4>([1, 70, 2, 8], seed, DType::F32, &device);
        rows.swap_dims(1, 2)
    });
    let copies = views.clone().map(|view| {
        let dims = view.dims();
        Tensor::<4>::from_data(
            TensorData::new(view.into_data().iter::<f32>().collect(), dims),
            &device,
        )
    });
    let run = |[query, key, value]: [Tensor<4>; 3]| {
        attend(query, key, value, &schedule, &AttendOptions::default())
    };
    assert_eq!(run(views).into_data(), run(copies).into_data());
}

/// Scores that are as low as floats go, or negative infinity, are scores: only hidden keys are not seen.
#[test]
fn very_low_scores_are_not_hidden_ones() {
    let device = device();
    let schedule = compile(&Pattern::causal(), 3);
    let one = |value| TensorData::new(vec![value; 3], [1, 1, 3, 1]);
    let value = TensorData::new(vec![1.0_f32, 2.0, 4.0], [1, 1, 3, 1]);
    for implementation in IMPLEMENTATIONS {
        let run = |bias: f32, sinks: Option<f32>| -> Vec<f32> {
            // Key 0 gets the bias: query 0 sees nothing else.
            let bias = [bias, 0.0, 0.0].repeat(3);
            let options = AttendOptions {
                bias: Some(Tensor::from_data(
                    TensorData::new(bias, [1, 1, 3, 3]),
                    &device,
                )),
                sinks: sinks.map(|sink| Tensor::from_floats([sink], &device)),
                ..AttendOptions::default()
            };
            let tensor = |data: TensorData| Tensor::<4>::from_data(data, &device);
            let (query, key) = (tensor(one(0.0_f32)), tensor(one(0.0_f32)));
            let output = attend_by(
                implementation,
                query,
                key,
                tensor(value.clone()),
                &schedule,
                &options,
            );
            output.into_data().iter::<f32>().collect()
        };
        assert_eq!(run(f32::MIN, None), [1.0, 2.0, 3.0], "{implementation:?}");
        assert_eq!(
            run(f32::NEG_INFINITY, None),
            [0.0, 2.0, 3.0],
            "{implementation:?}"
        );
        assert_eq!(
            run(0.0, Some(f32::NEG_INFINITY))[0],
            1.0,
            "{implementation:?}"
        );
    }
}

/// What comes from behind for a query that sees no key reaches nothing, even if it is not a number.
#[test]
fn the_gradient_of_an_empty_row_stays_there() {
    let device = device().autodiff();
    let data = BatchData::new().with_hidden_keys(vec![vec![true, false, false]]);
    let schedule = Schedule::compile(
        &Pattern::causal(),
        &Lengths::square(3),
        &BlockSizes::default(),
        &data,
    );
    let schedule = Arc::new(schedule.unwrap());
    for implementation in IMPLEMENTATIONS {
        let [query, key, value] = inputs(3, &device).map(|input| input.require_grad());
        let (output, lse) = attend_with_log_sum_exp(
            implementation,
            query.clone(),
            key.clone(),
            value.clone(),
            &schedule,
            &AttendOptions::default(),
        );
        // e^-inf is zero, and its derivative times the infinite weight is no number.
        let weight = lse
            .clone()
            .mask_fill(lse.clone().is_inf(), f64::INFINITY)
            .detach();
        let gradients = (output.sum() + (lse.exp() * weight).sum()).backward();
        for input in [query, key, value] {
            let gradient = input.grad(&gradients).unwrap().into_data();
            assert!(
                gradient.iter::<f32>().all(|g| g.is_finite()),
                "{implementation:?}"
            );
        }
    }
}

#[cfg(not(feature = "ndarray"))]
#[test]
fn distances_and_empty_rows_of_sixteen_bit_floats() {
    let device = device();
    let length = 600;
    let hidden = (0..length).map(|i| i < 3).collect();
    let data = BatchData::new().with_hidden_keys(vec![hidden]);
    // Two parts, in both of which the first queries see nothing.
    let pattern = Pattern::strided(Strided::merged(9));
    let schedule = Schedule::compile(
        &pattern,
        &Lengths::square(length),
        &BlockSizes::default(),
        &data,
    );
    let schedule = Arc::new(schedule.unwrap());
    assert!(schedule.parts().len() > 1);
    let options = AttendOptions {
        alibi: Some(vec![0.5, 0.25]),
        ..AttendOptions::default()
    };
    for dtype in [DType::F16, DType::BF16] {
        let rounded = inputs(length, &device).map(|x| x.cast(dtype));
        let [query, key, value] = rounded.clone().map(|x| x.cast(DType::F32));
        let exact = attend_by(
            Implementation::Reference,
            query,
            key,
            value,
            &schedule,
            &options,
        );
        for implementation in IMPLEMENTATIONS {
            let [query, key, value] = rounded.clone();
            let output = attend_by(implementation, query, key, value, &schedule, &options);
            // Scores up to some tens, in 8 digits: a weight may be wrong by a tenth.
            let limit = if dtype == DType::F16 { 2e-2 } else { 2e-1 };
            assert_close(output.cast(DType::F32), exact.clone(), limit);
        }
    }
}

#[test]
fn schedules_of_other_blocks_are_taken() {
    let device = device();
    let blocks = BlockSizes { query: 16, key: 32 };
    let lengths = Lengths::square(70);
    let schedule = Schedule::compile(&Pattern::causal(), &lengths, &blocks, &BatchData::new());
    let [query, key, value] = inputs(70, &device);
    let options = AttendOptions::default();
    let expected = attend(
        query.clone(),
        key.clone(),
        value.clone(),
        &compile(&Pattern::causal(), 70),
        &options,
    );
    let output = attend(query, key, value, &Arc::new(schedule.unwrap()), &options);
    assert_close(output, expected, 1e-6);
}

#[test]
fn equal_calls_give_equal_bits() {
    let case = Case::new(
        Pattern::causal() & Pattern::window(Window::one_sided(90)),
        300,
    );
    let first = case.run(Implementation::Native, DType::F32);
    for _ in 0..5 {
        assert_eq!(case.run(Implementation::Native, DType::F32), first);
    }
}

#[test]
#[should_panic(expected = "key_length: the key has 64, the schedule 65")]
fn lengths_that_disagree_panic() {
    let [query, key, value] = inputs(64, &device());
    let schedule = compile(&Pattern::causal(), 65);
    let query = Tensor::cat(vec![query.clone(), query.narrow(2, 0, 1)], 2);
    attend(query, key, value, &schedule, &AttendOptions::default());
}

#[cfg(not(feature = "ndarray"))]
#[test]
fn sixteen_bit_floats_are_summed_as_f32() {
    let device = device();
    let schedule = compile(&Pattern::causal(), 200);
    for dtype in [DType::F16, DType::BF16] {
        let rounded = inputs(200, &device).map(|x| x.cast(dtype));
        let [query, key, value] = rounded.clone();
        let output = attend(query, key, value, &schedule, &AttendOptions::default());
        assert_eq!(output.dtype(), dtype);
        let [query, key, value] = rounded.map(|x| x.cast(DType::F32));
        let expected = attend_by(
            Implementation::Reference,
            query,
            key,
            value,
            &schedule,
            &AttendOptions::default(),
        );
        // Half a unit of the last place of the output: 2^-12 and 2^-9 of it.
        let limit = if dtype == DType::F16 { 2.5e-4 } else { 2e-3 };
        assert_close(output.cast(DType::F32), expected, limit);
    }
}
