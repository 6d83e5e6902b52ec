//! Attention layers with each position scheme against those of Hugging Face's transformers, outputs and gradients, and
//! the laws they keep. `fixtures/positions/generate.py` made the numbers.

use std::collections::BTreeMap;

use burn::{
    module::Module,
    tensor::{DType, Device, Tensor, TensorData, s},
};
use emberlm_attention::{
    GroupedQueryAttention, GroupedQueryAttentionConfig, MultiHeadAttention,
    MultiHeadAttentionConfig,
};
use emberlm_core::{
    Context, InvalidConfig, Lengths, LongRopeScaling, Pattern, RelativeBias, RelativeBiasConfig,
    RotaryConfig, RotaryLayout, RotaryScaling, SequenceMixer, YarnScaling, alibi_slopes,
};
use emberlm_testkit::{
    Fixture, assert_close, device, gradients_by_name, largest_difference, laws, load_parameters,
    random, to_f64,
};

/// The trained length of the cases; their sequences have seven positions.
const TRAINED: usize = 4;
const TOLERANCE: f64 = 1e-12;

/// A case of the file.
struct Case {
    file: Fixture,
    name: &'static str,
    /// Whose inputs and parameters it has.
    inputs_of: &'static str,
}

impl Case {
    fn new(name: &'static str, inputs_of: &'static str) -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/positions");
        Self {
            file: Fixture::load(format!("{path}/attention.safetensors")),
            name,
            inputs_of,
        }
    }

    fn input(&self, name: &str) -> Tensor<3> {
        let device = device().autodiff();
        let name = format!("{}.in.{name}", self.inputs_of);
        self.file.tensor(&name, DType::F64, &device)
    }

    fn load<M: Module>(&self, module: M, prefix: &str) -> M {
        load_parameters(module, |name| {
            self.file
                .data(&format!("{}.param.{prefix}{name}", self.inputs_of))
        })
    }

    fn compare(&self, what: &str, actual: &TensorData) {
        let expected = self.file.data(&format!("{}.{what}", self.name));
        let difference = largest_difference(actual, &expected);
        let name = self.name;
        assert!(difference <= TOLERANCE, "{name}, {what}: {difference:e}");
    }

    /// Compares output and gradients, also those of T5's table.
    fn check<M: SequenceMixer + Module>(&self, mixer: M, relative: Option<&RelativeBias>) {
        let mixer = self.load(mixer, "");
        let relative = relative.map(|relative| self.load(relative.clone(), "relative."));
        let x = self.input("x").require_grad();
        let lengths = Lengths::square(x.dims()[1]);
        let bias = relative.as_ref().map(|relative| relative.forward(&lengths));
        let y = mixer.forward(x.clone(), &Context::new(lengths).with_bias(bias));
        self.compare("out.y", &y.to_data());

        let gradients = (y * self.input("cotangent")).sum().backward();
        let of_x = x.grad(&gradients).expect("the output depends on the input");
        self.compare("grad.x", &of_x.into_data());
        let mut ours: BTreeMap<String, TensorData> = gradients_by_name(&mixer, &gradients);
        if let Some(relative) = &relative {
            let table = gradients_by_name(relative, &gradients);
            ours.extend(table.into_iter().map(|(k, v)| (format!("relative.{k}"), v)));
        }
        let mut names = self.file.names(&format!("{}.grad.", self.name));
        names.retain(|name| name != "x");
        assert_eq!(ours.keys().cloned().collect::<Vec<_>>(), names);
        for (name, gradient) in &ours {
            self.compare(&format!("grad.{name}"), gradient);
        }
    }
}

fn rotary(scaling: RotaryScaling) -> RotaryConfig {
    RotaryConfig::new(6).with_theta(100.0).with_scaling(scaling)
}

/// The scalings of `generate.py`, by name.
fn scalings() -> [(&'static str, RotaryScaling); 6] {
    let yarn = YarnScaling::new(4.0, TRAINED)
        .with_beta_fast(0.6)
        .with_beta_slow(0.1);
    let (short, long) = (vec![1.0, 1.1, 1.2], vec![1.0, 2.0, 3.5]);
    let long_rope = LongRopeScaling::new(short, long, TRAINED, 4.0);
    let dynamic = RotaryScaling::DynamicNtk {
        factor: 2.5,
        original_max_positions: TRAINED,
    };
    let llama3 = RotaryScaling::Llama3 {
        factor: 4.0,
        low_freq_factor: 0.1,
        high_freq_factor: 0.6,
        original_max_positions: TRAINED,
    };
    [
        ("llama", RotaryScaling::None),
        ("llama_linear", RotaryScaling::Linear { factor: 4.0 }),
        ("llama_dynamic", dynamic),
        ("llama_yarn", RotaryScaling::Yarn(yarn)),
        ("llama_longrope", RotaryScaling::LongRope(long_rope)),
        ("llama_llama3", llama3),
    ]
}

fn llama(rotary: RotaryConfig) -> GroupedQueryAttentionConfig {
    GroupedQueryAttentionConfig::new(8, 4)
        .with_n_kv_heads(Some(2))
        .with_d_head(Some(6))
        .with_rotary(Some(rotary))
        .with_pattern(Pattern::causal())
}

#[test]
fn llama_with_every_scaling() {
    let device = device().autodiff();
    for (name, scaling) in scalings() {
        let layer = llama(rotary(scaling)).init(&device);
        Case::new(name, "llama").check(layer, None);
    }
}

#[test]
fn phi_turns_a_part_of_its_heads() {
    let layer = GroupedQueryAttentionConfig::new(12, 2)
        .with_bias(true)
        .with_rotary(Some(rotary(RotaryScaling::None).with_d_rotary(Some(4))))
        .with_pattern(Pattern::causal())
        .init(&device().autodiff());
    Case::new("phi", "phi").check(layer, None);
}

#[test]
fn mpt_has_slopes() {
    let layer = MultiHeadAttentionConfig::new(6, 3)
        .with_bias(false)
        .with_alibi(Some(alibi_slopes(3)))
        .with_pattern(Pattern::causal())
        .init(&device().autodiff());
    Case::new("mpt", "mpt").check(layer, None);
    let grouped = GroupedQueryAttentionConfig::new(6, 3)
        .with_alibi(Some(alibi_slopes(3)))
        .with_pattern(Pattern::causal())
        .init(&device().autodiff());
    Case::new("mpt", "mpt").check(grouped, None);
}

fn t5(d_model: usize, pattern: Pattern) -> GroupedQueryAttentionConfig {
    GroupedQueryAttentionConfig::new(d_model, 3)
        .with_d_head(Some(4))
        .with_scale(Some(1.0))
        .with_pattern(pattern)
}

fn buckets(bidirectional: bool) -> RelativeBiasConfig {
    RelativeBiasConfig::new(3)
        .with_n_buckets(8)
        .with_max_distance(6)
        .with_bidirectional(bidirectional)
}

#[test]
fn t5_has_a_bias_and_no_scale() {
    let device = device().autodiff();
    for (name, bidirectional, pattern) in [
        ("t5_encoder", true, Pattern::full()),
        ("t5_decoder", false, Pattern::causal()),
    ] {
        let layer = t5(6, pattern).init(&device);
        let relative = buckets(bidirectional).init(&device);
        Case::new(name, name).check(layer, Some(&relative));
    }
}

/// A pass in a context that `tell` may add to.
fn pass<M: SequenceMixer>(
    mixer: &M,
    x: Tensor<3>,
    tell: impl Fn(Context, &Device) -> Context,
) -> Tensor<3> {
    let context = Context::new(Lengths::square(x.dims()[1]));
    let context = tell(context, &x.device());
    mixer.forward(x, &context)
}

/// The context of the positions from `first` on.
fn step(x: &Tensor<3>, first: usize) -> Context {
    let [_, length, _] = x.dims();
    Context::new(Lengths::new(length, first + length).with_first_position(first))
}

fn keeps_the_laws<M: SequenceMixer + Module>(
    make: impl Fn(&Device) -> M,
    tell: impl Fn(Context, &Device) -> Context,
) {
    let device = device();
    let mixer = make(&device.clone().autodiff());
    laws::causal([2, 7, 12], &device.clone().autodiff(), |x| {
        pass(&mixer, x, &tell)
    });
    let mixer = make(&device);
    let mut cache = mixer.new_cache(7);
    laws::cached_equals_full(
        random([2, 7, 12], 3, DType::F32, &device),
        |x| pass(&mixer, x, &tell),
        |x, first| {
            if first == 0 {
                cache = mixer.new_cache(7);
            }
            let context = tell(step(&x, first), &device);
            mixer.forward_cached(x, &context, &mut cache)
        },
    );
}

fn nothing(context: Context, _: &Device) -> Context {
    context
}

fn rotating(rotary: RotaryConfig, device: &Device) -> GroupedQueryAttention {
    GroupedQueryAttentionConfig::new(12, 4)
        .with_n_kv_heads(Some(2))
        .with_d_head(Some(6))
        .with_rotary(Some(rotary))
        .with_pattern(Pattern::causal())
        .init(device)
}

/// The scaling, with a trained length of eight where it changes with the length.
fn within_the_trained_length(scaling: RotaryScaling) -> RotaryScaling {
    match scaling {
        RotaryScaling::DynamicNtk { factor, .. } => RotaryScaling::DynamicNtk {
            factor,
            original_max_positions: 8,
        },
        RotaryScaling::LongRope(long_rope) => RotaryScaling::LongRope(LongRopeScaling {
            original_max_positions: 8,
            ..long_rope
        }),
        other => other,
    }
}

#[test]
fn every_scaling_keeps_the_laws() {
    for (_, scaling) in scalings() {
        let config = rotary(within_the_trained_length(scaling));
        keeps_the_laws(|device| rotating(config.clone(), device), nothing);
    }
}

#[test]
fn partial_rotary_keeps_the_laws() {
    for layout in [RotaryLayout::HalfSplit, RotaryLayout::Interleaved] {
        let config = rotary(RotaryScaling::None)
            .with_layout(layout)
            .with_d_rotary(Some(4));
        keeps_the_laws(|device| rotating(config.clone(), device), nothing);
    }
}

#[test]
fn beyond_the_trained_length_a_step_is_the_end_of_a_pass_over_the_sequence_so_far() {
    let device = device();
    let x = random([2, 7, 12], 3, DType::F64, &device);
    for (name, scaling) in scalings() {
        let mixer = to_f64(rotating(rotary(scaling), &device));
        for borders in [vec![0, 7], vec![0, 2, 3, 6, 7], vec![0, 5, 6, 7]] {
            let mut cache = mixer.new_cache(7);
            for ends in borders.windows(2) {
                let (first, end) = (ends[0], ends[1]);
                let part = x.clone().slice(s![.., first..end, ..]);
                let context = step(&part, first);
                let stepped = mixer.forward_cached(part, &context, &mut cache);
                let so_far = x.clone().slice(s![.., 0..end, ..]);
                let expected = pass(&mixer, so_far, nothing).slice(s![.., first.., ..]);
                let difference = largest_difference(&stepped.to_data(), &expected.to_data());
                assert!(difference <= TOLERANCE, "{name}, {first}..{end}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "largest difference")]
fn beyond_the_trained_length_earlier_outputs_are_those_of_their_own_length() {
    let [_, _, (_, dynamic), ..] = scalings();
    keeps_the_laws(|device| rotating(rotary(dynamic.clone()), device), nothing);
}

fn with_slopes(device: &Device) -> MultiHeadAttention {
    MultiHeadAttentionConfig::new(12, 3)
        .with_alibi(Some(alibi_slopes(3)))
        .with_pattern(Pattern::causal())
        .init(device)
}

#[test]
fn alibi_keeps_the_laws() {
    keeps_the_laws(with_slopes, nothing);
}

/// The same table on every device.
fn relative(device: &Device) -> RelativeBias {
    let table = random([8, 3], 5, DType::F32, device).into_data();
    load_parameters(buckets(false).init(device), |_| table.clone())
}

fn with_relative_bias(context: Context, device: &Device) -> Context {
    let bias = relative(device).forward(&context.lengths);
    context.with_bias(Some(bias))
}

#[test]
fn a_relative_bias_keeps_the_laws() {
    keeps_the_laws(
        |device| t5(12, Pattern::causal()).init(device),
        with_relative_bias,
    );
    let multi_head = MultiHeadAttentionConfig::new(12, 3)
        .with_scale(Some(1.0))
        .with_pattern(Pattern::causal());
    keeps_the_laws(|device| multi_head.init(device), with_relative_bias);
}

#[test]
fn layers_share_the_bias_of_a_context() {
    let device = device();
    let x = random([1, 5, 12], 1, DType::F32, &device);
    let layer = t5(12, Pattern::causal()).init(&device);
    let context = with_relative_bias(Context::new(Lengths::square(5)), &device);
    let biased = layer.forward(x.clone(), &context);
    assert_close(
        layer.forward(x.clone(), &context.fold(3)),
        biased.clone(),
        0.0,
    );
    let plain = pass(&layer, x, nothing);
    assert!(!plain.all_close(biased, None, None));
}

#[test]
#[should_panic(expected = "n_heads: the bias has 3, the query 4")]
fn a_bias_for_other_heads_panics() {
    let device = device();
    let layer = rotating(rotary(RotaryScaling::None), &device);
    let x = random([1, 5, 12], 1, DType::F32, &device);
    pass(&layer, x, with_relative_bias);
}

#[test]
fn impossible_scores_are_refused() {
    let field = |result: Result<(), InvalidConfig>| match result {
        Err(InvalidConfig::Range { field, .. }) => field,
        other => panic!("{other:?}"),
    };
    let grouped = GroupedQueryAttentionConfig::new(12, 4).with_n_kv_heads(Some(2));
    let slopes = |slopes| grouped.clone().with_alibi(Some(slopes)).validate();
    slopes(alibi_slopes(4)).unwrap();
    assert_eq!(field(slopes(alibi_slopes(2))), "alibi");
    assert_eq!(field(slopes(vec![1.0, 0.5, f64::NAN, 0.1])), "alibi");
    for scale in [0.0, -1.0, f64::INFINITY] {
        let grouped = grouped.clone().with_scale(Some(scale));
        assert_eq!(field(grouped.validate()), "scale");
        let multi_head = MultiHeadAttentionConfig::new(12, 4).with_scale(Some(scale));
        assert_eq!(field(multi_head.validate()), "scale");
    }
    let multi_head = MultiHeadAttentionConfig::new(12, 4).with_alibi(Some(alibi_slopes(3)));
    assert_eq!(field(multi_head.validate()), "alibi");
}
