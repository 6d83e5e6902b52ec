//! Positions, losses, norms and blocks against their definitions, gradients included.

use burn::{
    module::Module,
    tensor::{DType, Device, Int, Tensor, TensorData},
};
use emberlm_core::{
    Activation, Context, CrossEntropyConfig, FeedForward, FeedForwardConfig, FeedForwardOutput,
    InvalidConfig, KvCache, Lengths, NormConfig, NormPlacement, ResidualBlockConfig, RotaryConfig,
    RotaryLayout, SequenceMixer,
};
use emberlm_testkit::{assert_close, assert_gradients_match, device, random, to_f64};

fn rotary(layout: RotaryLayout) -> RotaryConfig {
    RotaryConfig::new(6).with_theta(100.0).with_layout(layout)
}

#[test]
fn rotary_turns_each_pair_by_its_angle() {
    let x = random([2, 3, 5, 6], 1, DType::F64, &device());
    for layout in [RotaryLayout::Interleaved, RotaryLayout::HalfSplit] {
        let y = rotary(layout).forward(x.clone(), 4);
        let (x, y): (Vec<f64>, Vec<f64>) = (
            x.to_data().iter::<f64>().collect(),
            y.to_data().iter::<f64>().collect(),
        );
        for row in 0..2 * 3 * 5 {
            let position = (4 + row % 5) as f64;
            for pair in 0..3 {
                let (a, b) = match layout {
                    RotaryLayout::Interleaved => (2 * pair, 2 * pair + 1),
                    RotaryLayout::HalfSplit => (pair, pair + 3),
                };
                let (a, b) = (row * 6 + a, row * 6 + b);
                let (sin, cos) = (position * 100f64.powf(-(pair as f64) / 3.0)).sin_cos();
                assert!((y[a] - (x[a] * cos - x[b] * sin)).abs() < 1e-14);
                assert!((y[b] - (x[b] * cos + x[a] * sin)).abs() < 1e-14);
            }
        }
    }
}

#[test]
fn rotary_scores_depend_on_the_distance_alone() {
    let [query, key] = [1, 2].map(|seed| random([1, 1, 1, 6], seed, DType::F64, &device()));
    let score = |layout, q, k| {
        let rotary = rotary(layout);
        (rotary.forward(query.clone(), q) * rotary.forward(key.clone(), k)).sum()
    };
    for layout in [RotaryLayout::Interleaved, RotaryLayout::HalfSplit] {
        assert_close(score(layout, 9, 5), score(layout, 104, 100), 1e-12);
    }
}

#[test]
fn rotary_gradients() {
    let device = device().autodiff();
    for layout in [RotaryLayout::Interleaved, RotaryLayout::HalfSplit] {
        let x = random([1, 2, 3, 6], 1, DType::F64, &device);
        assert_gradients_match(x, |x| rotary(layout).forward(x, 7));
    }
}

#[test]
fn rotary_refuses_odd_widths() {
    assert!(matches!(
        RotaryConfig::new(5).validate(),
        Err(InvalidConfig::OddWidth { value: 5, .. })
    ));
}

/// The formula of the cross-entropy, one target at a time.
fn cross_entropy(logits: &[f64], target: usize, smoothing: f64) -> (f64, f64) {
    let log_z = logits.iter().map(|x| x.exp()).sum::<f64>().ln();
    let mean = logits.iter().map(|x| log_z - x).sum::<f64>() / logits.len() as f64;
    let nll = (1.0 - smoothing) * (log_z - logits[target]) + smoothing * mean;
    (nll, log_z * log_z)
}

#[test]
fn cross_entropy_is_its_formula() {
    let device = device();
    let logits = random([5, 7], 1, DType::F64, &device) * 3.0;
    let rows: Vec<f64> = logits.to_data().iter::<f64>().collect();
    for smoothing in [0.0, 0.1] {
        for ignored in [None, Some(-100)] {
            let mut targets = [3i32, 0, 6, 2, 2];
            if ignored.is_some() {
                targets[1] = -100;
                targets[4] = -100;
            }
            let (mut nll, mut z, mut n) = (0.0, 0.0, 0.0);
            for (row, target) in rows.chunks(7).zip(targets) {
                if target >= 0 {
                    let (a, b) = cross_entropy(row, target as usize, smoothing);
                    (nll, z, n) = (nll + a, z + b, n + 1.0);
                }
            }
            let loss = CrossEntropyConfig::new()
                .with_label_smoothing(smoothing)
                .with_ignored_target(ignored)
                .forward(
                    logits.clone(),
                    Tensor::<1, Int>::from_ints(targets, &device),
                );
            let close = |actual: Tensor<1>, expected: f64| {
                let expected =
                    Tensor::from_data(TensorData::from([expected]), (&device, DType::F64));
                assert_close(actual, expected, 1e-12);
            };
            close(loss.nll_sum.clone(), nll);
            close(loss.z_sum.clone(), z);
            close(loss.n_targets.clone(), n);
            close(loss.mean(), nll / n);
            close(loss.mean_z(), z / n);
        }
    }
}

#[test]
fn cross_entropy_gradients() {
    let device = device().autodiff();
    let targets = Tensor::<1, Int>::from_ints([1, -1, 4], &device);
    let config = CrossEntropyConfig::new()
        .with_label_smoothing(0.1)
        .with_ignored_target(Some(-1));
    assert_gradients_match(random([3, 5], 1, DType::F64, &device), |logits| {
        let loss = config.forward(logits, targets.clone());
        loss.mean() + loss.mean_z() * 0.01
    });
}

#[test]
fn feed_forward_gradients() {
    let device = device().autodiff();
    let config = FeedForwardConfig::new(3, 5);
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
        let config = config.clone().with_activation(activation);
        let plain = to_f64(config.init(&device));
        let gated = to_f64(config.init_gated(&device));
        let x = random([2, 2, 3], 1, DType::F64, &device);
        assert_gradients_match(x.clone(), |x| {
            plain.forward(x, &Context::new(Lengths::square(3))).hidden
        });
        assert_gradients_match(x, |x| {
            gated.forward(x, &Context::new(Lengths::square(3))).hidden
        });
    }
}

#[test]
fn norms_are_their_formulas() {
    let device = device();
    let x = random([3, 8], 1, DType::F64, &device);
    let rows: Vec<f64> = x.to_data().iter::<f64>().collect();
    let check = |config: NormConfig, f: fn(&[f64]) -> (f64, f64)| {
        let norm = to_f64(config.init(8, &device));
        let expected: Vec<f64> = rows
            .chunks(8)
            .flat_map(|row| {
                let (shift, scale) = f(row);
                row.iter().map(move |x| (x - shift) / scale)
            })
            .collect();
        let expected = Tensor::from_data(TensorData::new(expected, [3, 8]), (&device, DType::F64));
        assert_close(norm.forward(x.clone()), expected, 1e-12);
    };
    let mean = |row: &[f64]| row.iter().sum::<f64>() / 8.0;
    assert!(
        mean(&rows[..8]).abs() > 1e-3,
        "a mean of zero would hide the shift"
    );
    check(NormConfig::Rms { epsilon: 0.1 }, |row| {
        (
            0.0,
            (row.iter().map(|x| x * x).sum::<f64>() / 8.0 + 0.1).sqrt(),
        )
    });
    let layer = NormConfig::Layer {
        epsilon: 0.1,
        bias: true,
    };
    check(layer, |row| {
        let mean = row.iter().sum::<f64>() / 8.0;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 8.0;
        (mean, (variance + 0.1).sqrt())
    });
}

/// A mixer whose output is easy to write down: twice the input.
#[derive(Module, Debug)]
struct Twice;

impl SequenceMixer for Twice {
    type Cache = ();

    fn forward(&self, x: Tensor<3>, _context: &Context) -> Tensor<3> {
        x * 2.0
    }

    fn forward_cached(&self, x: Tensor<3>, _context: &Context, (): &mut ()) -> Tensor<3> {
        x * 2.0
    }

    fn new_cache(&self, _capacity: usize) {}
}

/// A feed-forward layer likewise: the square.
#[derive(Module, Debug)]
struct Square;

impl FeedForward for Square {
    fn forward(&self, x: Tensor<3>, _context: &Context) -> FeedForwardOutput {
        (x.clone() * x).into()
    }
}

#[test]
fn residual_blocks_put_the_norm_where_the_config_says() {
    let device = device();
    let x = random([2, 3, 4], 1, DType::F32, &device);
    let config = ResidualBlockConfig::new(4);
    let norm = config.norm.init(4, &device);
    let context = Context::new(Lengths::square(3));

    let pre = config
        .init(Twice, Square, &device)
        .forward(x.clone(), &context);
    let h = x.clone() + norm.forward(x.clone()) * 2.0;
    let expected = h.clone() + norm.forward(h).square();
    assert_close(pre, expected, 1e-6);

    let block = config
        .with_placement(NormPlacement::Post)
        .init(Twice, Square, &device);
    let h = norm.forward(x.clone() * 3.0);
    let expected = norm.forward(h.clone() + h.square());
    assert_close(block.forward(x.clone(), &context), expected.clone(), 1e-6);
    assert_close(block.forward_cached(x, &context, &mut ()), expected, 1e-6);
}

#[test]
#[should_panic(expected = "exceed the capacity of 4")]
fn a_full_cache_says_so() {
    let new = Tensor::<4>::zeros([1, 1, 3, 2], &Device::flex());
    let mut cache = KvCache::new(4);
    cache.append(new.clone(), new.clone());
    cache.append(new.clone(), new);
}

#[test]
fn selected_rows_of_a_cache_are_those_rows() {
    let device = device();
    let part = |seed, batch_size| random([batch_size, 2, 1, 2], seed, DType::F32, &device);
    let mut cache = KvCache::new(3);
    cache.select(&[4, 4]);
    assert_eq!(cache.batch_size(), None);
    cache.append(part(1, 3), part(2, 3));
    cache.select(&[2, 0, 2, 1]);
    assert_eq!((cache.batch_size(), cache.len()), (Some(4), 1));
    let (keys, values) = cache.append(part(3, 4), part(4, 4));
    let selected = |x: Tensor<4>| {
        let rows = [2, 0, 2, 1].map(|row| x.clone().narrow(0, row, 1));
        Tensor::cat(rows.to_vec(), 0)
    };
    let expected = |first, second| Tensor::cat(vec![selected(part(first, 3)), part(second, 4)], 2);
    assert_close(keys, expected(1, 3), 0.0);
    assert_close(values, expected(2, 4), 0.0);
}

#[test]
fn a_truncated_cache_goes_on_from_there() {
    let device = device();
    let part = |seed| random([1, 2, 3, 2], seed, DType::F32, &device);
    let mut cache = KvCache::new(8);
    cache.append(part(1), part(2));
    cache.append(part(3), part(4));
    cache.truncate(3);
    let (keys, values) = cache.append(part(5), part(6));
    assert_close(keys, Tensor::cat(vec![part(1), part(5)], 2), 0.0);
    assert_close(values, Tensor::cat(vec![part(2), part(6)], 2), 0.0);
}
