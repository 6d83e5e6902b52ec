//! Position schemes against those of Hugging Face's transformers, also beyond the trained length, and gradients against
//! differences. `fixtures/positions/generate.py` made the numbers.

use burn::tensor::{DType, Tensor};
use emberlm_core::{
    InvalidConfig, LearnedPositionsConfig, Lengths, LongRopeScaling, RelativeBias,
    RelativeBiasConfig, RotaryConfig, RotaryLayout, RotaryScaling, YarnScaling, alibi_slopes,
    operators::rotate, relative_bucket,
};
use emberlm_testkit::{
    Fixture, assert_close, assert_gradients_match, device, gradients_by_name, load_parameters,
    random, to_f64,
};

const D_HEAD: usize = 16;
const TRAINED: usize = 32;
/// Rows of the inputs, at the end of a sequence.
const N_ROWS: usize = 3;
/// f64 on both sides; angles of positions up to 200.
const TOLERANCE: f64 = 1e-13;

fn fixture(file: &str) -> Fixture {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/positions");
    Fixture::load(format!("{path}/{file}"))
}

fn numbers(fixture: &Fixture, name: &str) -> Vec<f64> {
    fixture.data(name).iter::<f64>().collect()
}

/// Asserts that each number differs from the expected one by at most the tolerance of itself.
#[track_caller]
fn assert_each_close(actual: &[f64], expected: &[f64], case: &str) {
    assert_eq!(actual.len(), expected.len(), "{case}");
    for (i, (a, e)) in actual.iter().zip(expected).enumerate() {
        let close = (a - e).abs() <= TOLERANCE * e.abs();
        assert!(close, "{case}, number {i}: {a:e}, expected {e:e}");
    }
}

fn rotary() -> RotaryConfig {
    RotaryConfig::new(D_HEAD).with_theta(1000.0)
}

fn yarn() -> YarnScaling {
    YarnScaling::new(8.0, TRAINED)
}

fn long_rope() -> LongRopeScaling {
    let short = vec![1.0, 1.05, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5];
    let long = vec![1.0, 1.5, 2.25, 4.0, 7.5, 12.0, 20.0, 33.0];
    LongRopeScaling::new(short, long, TRAINED, 8.0)
}

fn dynamic() -> RotaryScaling {
    RotaryScaling::DynamicNtk {
        factor: 2.5,
        original_max_positions: TRAINED,
    }
}

fn llama3() -> RotaryScaling {
    RotaryScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 0.5,
        high_freq_factor: 3.0,
        original_max_positions: TRAINED,
    }
}

/// The cases of `rotary.safetensors`.
fn cases() -> Vec<(&'static str, RotaryConfig)> {
    let scaled = |scaling| rotary().with_scaling(scaling);
    let yarn_of = |yarn| scaled(RotaryScaling::Yarn(yarn));
    let half = |config: RotaryConfig| config.with_d_rotary(Some(D_HEAD / 2));
    let linear = RotaryScaling::Linear { factor: 4.0 };
    vec![
        ("linear", scaled(linear.clone())),
        ("dynamic", scaled(dynamic())),
        ("yarn", yarn_of(yarn())),
        (
            "yarn_wide",
            yarn_of(yarn().with_beta_fast(6.0).with_beta_slow(0.25)),
        ),
        (
            "yarn_exact",
            yarn_of(
                yarn()
                    .with_beta_fast(4.0)
                    .with_beta_slow(0.5)
                    .with_truncate(false),
            ),
        ),
        (
            "yarn_factor",
            yarn_of(yarn().with_attention_factor(Some(0.75))),
        ),
        (
            "yarn_mscale",
            yarn_of(
                yarn()
                    .with_mscale(Some(0.707))
                    .with_mscale_all_dim(Some(1.0)),
            ),
        ),
        (
            "yarn_mscale_alone",
            yarn_of(yarn().with_mscale(Some(0.707))),
        ),
        ("longrope", scaled(RotaryScaling::LongRope(long_rope()))),
        (
            "longrope_factor",
            scaled(RotaryScaling::LongRope(
                long_rope().with_attention_factor(Some(1.2)),
            )),
        ),
        ("llama3", scaled(llama3())),
        (
            "proportional",
            scaled(RotaryScaling::Proportional {
                proportion: 0.4,
                factor: 2.0,
            }),
        ),
        ("partial_linear", half(scaled(linear))),
        ("partial_dynamic", half(scaled(dynamic()))),
        ("partial_yarn", half(yarn_of(yarn()))),
        ("neox", rotary().with_d_rotary(Some(D_HEAD / 4))),
        ("neox_whole", rotary()),
        (
            "gptj",
            RotaryConfig::new(D_HEAD)
                .with_d_rotary(Some(6))
                .with_layout(RotaryLayout::Interleaved),
        ),
    ]
}

/// The lengths of `CASE.LENGTH.WHAT` in the file.
fn lengths_of(fixture: &Fixture, case: &str, what: &str) -> Vec<usize> {
    let names = fixture.names(&format!("{case}."));
    let suffix = format!(".{what}");
    let lengths = names.iter().filter_map(|name| name.strip_suffix(&suffix));
    lengths.map(|length| length.parse().unwrap()).collect()
}

#[test]
fn every_case_of_the_file_is_tested() {
    let fixture = fixture("rotary.safetensors");
    let names = fixture.names("");
    let mut in_file: Vec<&str> = names
        .iter()
        .map(|name| name.split('.').next().unwrap())
        .filter(|case| *case != "in")
        .collect();
    in_file.dedup();
    let mut here: Vec<&str> = cases().into_iter().map(|(name, _)| name).collect();
    here.sort_unstable();
    assert_eq!(here, in_file);
}

#[test]
fn frequencies_and_attention_factors() {
    let fixture = fixture("rotary.safetensors");
    for (case, config) in cases() {
        config.validate().unwrap();
        // GPT-J's are part of its table of angles alone.
        if case == "gptj" {
            continue;
        }
        let lengths = lengths_of(&fixture, case, "frequencies");
        assert!(lengths.iter().any(|length| *length > TRAINED));
        for length in lengths {
            let expected = numbers(&fixture, &format!("{case}.{length}.frequencies"));
            assert_each_close(
                &config.frequencies(length),
                &expected,
                &format!("{case}, length {length}"),
            );
        }
        let expected = numbers(&fixture, &format!("{case}.attention_factor"));
        assert_each_close(&[config.attention_factor()], &expected, case);
    }
}

#[test]
fn rotated_queries_and_keys() {
    let fixture = fixture("rotary.safetensors");
    let device = device();
    let tensor = |name: &str| fixture.tensor::<4>(name, DType::F64, &device);
    for (case, config) in cases() {
        let lengths = lengths_of(&fixture, case, "query");
        assert_eq!(lengths.len(), 2, "{case}");
        for length in lengths {
            let inputs = [tensor("in.query"), tensor("in.key")];
            let [query, key] = config.forward_all(inputs, length - N_ROWS);
            for (what, actual) in [("query", query), ("key", key)] {
                assert_close(
                    actual,
                    tensor(&format!("{case}.{length}.{what}")),
                    TOLERANCE,
                );
            }
        }
    }
}

#[test]
fn a_part_of_a_sequence_has_the_angles_of_its_length() {
    let x = random([1, 2, 40, D_HEAD], 1, DType::F64, &device());
    for (case, config) in cases() {
        let whole = config.forward(x.clone(), 0);
        // Row 39 alone ends a sequence of 40; rows 0 to 9 of it have to be told its length.
        let last = config.forward(x.clone().narrow(2, 39, 1), 39);
        assert_close(last, whole.clone().narrow(2, 39, 1), TOLERANCE);
        let first = x.clone().narrow(2, 0, 10);
        let [told] = rotate([first.clone()], &config.rotation(0, 40));
        assert_close(told.clone(), whole.narrow(2, 0, 10), TOLERANCE);
        let alone = config.forward(first, 0);
        let same = alone.all_close(told, Some(0.0), Some(1e-9));
        assert_eq!(same, !config.scaling.changes_with_length(), "{case}");
    }
}

#[test]
fn rotary_gradients_of_all_cases() {
    let device = device().autodiff();
    for (_, config) in cases() {
        let x = random([1, 1, 3, D_HEAD], 1, DType::F64, &device);
        assert_gradients_match(x, |x| config.forward(x, 38));
    }
}

#[test]
fn impossible_rotary_configs_are_refused() {
    let refused = |config: RotaryConfig, expected: &str| {
        let field = match config.validate().unwrap_err() {
            InvalidConfig::Zero { field }
            | InvalidConfig::Range { field, .. }
            | InvalidConfig::OddWidth { field, .. } => field,
            other => panic!("{other}"),
        };
        assert_eq!(field, expected, "{config:?}");
    };
    let scaled = |scaling| rotary().with_scaling(scaling);
    let yarn_of = |yarn| scaled(RotaryScaling::Yarn(yarn));
    let long_rope_of = |long_rope| scaled(RotaryScaling::LongRope(long_rope));
    refused(RotaryConfig::new(0), "d_head");
    refused(rotary().with_theta(0.0), "theta");
    refused(rotary().with_d_rotary(Some(0)), "d_rotary");
    refused(rotary().with_d_rotary(Some(5)), "d_rotary");
    refused(rotary().with_d_rotary(Some(D_HEAD + 2)), "d_rotary");
    refused(scaled(dynamic()).with_d_rotary(Some(2)), "d_rotary");
    for factor in [0.5, f64::NAN, f64::INFINITY] {
        refused(scaled(RotaryScaling::Linear { factor }), "scaling.factor");
    }
    let proportional = |proportion| RotaryScaling::Proportional {
        proportion,
        factor: 1.0,
    };
    refused(scaled(proportional(0.0)), "scaling.proportion");
    refused(scaled(proportional(1.5)), "scaling.proportion");
    let llama3 = |low, high| RotaryScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_positions: TRAINED,
    };
    refused(scaled(llama3(0.0, 4.0)), "scaling.low_freq_factor");
    refused(scaled(llama3(4.0, 4.0)), "scaling.high_freq_factor");
    refused(
        yarn_of(YarnScaling::new(8.0, 0)),
        "scaling.original_max_positions",
    );
    refused(yarn_of(yarn()).with_theta(1.0), "theta");
    refused(yarn_of(yarn().with_beta_slow(0.0)), "scaling.beta_slow");
    refused(yarn_of(yarn().with_beta_fast(0.5)), "scaling.beta_fast");
    refused(
        yarn_of(yarn().with_attention_factor(Some(0.0))),
        "scaling.attention_factor",
    );
    refused(
        yarn_of(yarn().with_mscale(Some(f64::NAN))),
        "scaling.mscale",
    );
    let mut short = long_rope();
    short.short_factors.pop();
    refused(long_rope_of(short), "scaling.short_factors");
    let mut zero = long_rope();
    zero.long_factors[3] = 0.0;
    refused(long_rope_of(zero), "scaling.long_factors");
    let one = LongRopeScaling {
        original_max_positions: 1,
        ..long_rope()
    };
    refused(long_rope_of(one), "scaling.original_max_positions");
}

#[test]
fn rotary_configs_are_data() {
    for (_, config) in cases() {
        let json = serde_json::to_string(&config).unwrap();
        let again: RotaryConfig = serde_json::from_str(&json).unwrap();
        assert_eq!(again, config);
    }
}

#[test]
fn slopes_of_bloom_and_mpt() {
    let fixture = fixture("tables.safetensors");
    for n_heads in 1..=20 {
        for model in ["bloom", "mpt"] {
            let case = format!("{model}.{n_heads}");
            let expected = numbers(&fixture, &case);
            assert_each_close(&alibi_slopes(n_heads), &expected, &case);
        }
    }
}

#[test]
#[should_panic(expected = "n_heads: ALiBi needs at least one head")]
fn no_heads_have_no_slopes() {
    alibi_slopes(0);
}

#[test]
fn buckets_of_t5() {
    let fixture = fixture("tables.safetensors");
    let cases = fixture.names("bucket.");
    assert_eq!(cases.len(), 12);
    for case in cases {
        let mut words = case.split('.');
        let bidirectional = words.next() == Some("both");
        let [n_buckets, max_distance] = [(); 2].map(|()| words.next().unwrap().parse().unwrap());
        let runs = fixture.data(&format!("bucket.{case}"));
        let runs: Vec<i64> = runs.iter::<i64>().collect();
        let begins: Vec<i64> = runs.iter().copied().step_by(2).collect();
        let ends = begins.iter().skip(1).copied().chain([3001]);
        for ((begin, end), expected) in begins.iter().zip(ends).zip(runs.iter().skip(1).step_by(2))
        {
            for position in *begin..end {
                let bucket = relative_bucket(position, bidirectional, n_buckets, max_distance);
                assert_eq!(bucket as i64, *expected, "{case}, position {position}");
            }
        }
    }
}

#[test]
fn the_farthest_positions_have_the_last_buckets() {
    for far in [i64::MIN, -100_000_000_000] {
        assert_eq!(relative_bucket(far, true, 32, 128), 15);
        assert_eq!(relative_bucket(far, false, 32, 128), 31);
    }
    assert_eq!(relative_bucket(i64::MAX, true, 32, 128), 31);
    assert_eq!(relative_bucket(i64::MAX, false, 32, 128), 0);
}

const KINDS: [(&str, bool); 2] = [("both", true), ("causal", false)];

/// The bias of the file's cases.
fn relative_bias(fixture: &Fixture, kind: &str, bidirectional: bool) -> RelativeBias {
    let config = RelativeBiasConfig::new(3)
        .with_n_buckets(10)
        .with_max_distance(7)
        .with_bidirectional(bidirectional);
    load_parameters(config.init(&device().autodiff()), |name| {
        fixture.data(&format!("bias.{kind}.{name}"))
    })
}

#[test]
fn bias_of_t5_and_its_gradient() {
    let fixture = fixture("tables.safetensors");
    let device = device().autodiff();
    for (kind, bidirectional) in KINDS {
        let tensor =
            |what: &str| fixture.tensor::<4>(&format!("bias.{kind}.{what}"), DType::F64, &device);
        let module = relative_bias(&fixture, kind, bidirectional);
        let bias = module.forward(&Lengths::new(5, 9).with_first_position(4));
        assert_close(bias.clone(), tensor("bias"), 0.0);
        let gradients = (bias * tensor("cotangent")).sum().backward();
        let gradients = gradients_by_name(&module, &gradients);
        let expected = fixture.data(&format!("bias.{kind}.grad"));
        let actual = Tensor::<2>::from_data(gradients["weight"].clone(), (&device, DType::F64));
        let expected = Tensor::<2>::from_data(expected, (&device, DType::F64));
        assert_close(actual, expected, 1e-14);
    }
}

#[test]
fn bias_of_a_part_is_a_part_of_the_bias() {
    let fixture = fixture("tables.safetensors");
    for (kind, bidirectional) in KINDS {
        let module = relative_bias(&fixture, kind, bidirectional);
        let whole = module.forward(&Lengths::square(11));
        for (first, n_queries) in [(0, 1), (0, 4), (3, 5), (10, 1)] {
            let lengths = Lengths::new(n_queries, 11).with_first_position(first);
            let expected = whole.clone().narrow(2, first, n_queries);
            assert_eq!(module.forward(&lengths).into_data(), expected.into_data());
        }
    }
}

#[test]
fn gradients_of_the_relative_bias() {
    let device = device().autodiff();
    let config = RelativeBiasConfig::new(2)
        .with_n_buckets(6)
        .with_max_distance(5);
    let module = to_f64(config.init(&device));
    let weight = module.weight.val();
    assert_gradients_match(weight, |weight| {
        let mut module = module.clone();
        module.weight = burn::module::Param::from_tensor(weight);
        module.forward(&Lengths::new(3, 4).with_first_position(1))
    });
}

#[test]
fn impossible_buckets_are_refused() {
    let config = RelativeBiasConfig::new(2);
    let field = |config: RelativeBiasConfig| match config.validate() {
        Err(InvalidConfig::Zero { field } | InvalidConfig::Range { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    config.validate().unwrap();
    assert_eq!(field(RelativeBiasConfig::new(0)), "n_heads");
    assert_eq!(field(config.clone().with_n_buckets(3)), "n_buckets");
    assert_eq!(field(config.clone().with_max_distance(8)), "max_distance");
    let causal = config.with_bidirectional(false);
    assert_eq!(field(causal.clone().with_n_buckets(1)), "n_buckets");
    assert_eq!(field(causal.clone().with_max_distance(16)), "max_distance");
    causal.with_max_distance(17).validate().unwrap();
}

#[test]
#[should_panic(expected = "n_buckets: a direction needs at least two, of 3 it has 1")]
fn too_few_buckets_panic() {
    relative_bucket(1, true, 3, 128);
}

#[test]
#[should_panic(expected = "max_distance: 8 is not above the 8 distances")]
fn too_short_a_distance_panics() {
    relative_bucket(1, true, 32, 8);
}

#[test]
fn learned_positions_of_opt_and_bart() {
    let fixture = fixture("tables.safetensors");
    let device = device();
    let config = LearnedPositionsConfig::new(10, 4).with_offset(2);
    let positions = load_parameters(config.init(&device), |_| fixture.data("learned.weight"));
    assert_eq!(positions.max_seq_length(), 10);
    assert_eq!(positions.row(3), 5);
    for model in ["opt", "bart"] {
        let expected = fixture.tensor::<3>(&format!("learned.{model}"), DType::F64, &device);
        assert_close(positions.forward(3, 4), expected, 0.0);
    }
}

#[test]
#[should_panic(expected = "sequence length: position 11 is past the 10 learned ones")]
fn rows_of_the_offset_are_no_positions() {
    let config = LearnedPositionsConfig::new(10, 4).with_offset(2);
    config.init(&device()).forward(7, 4);
}
