//! `cross_entropy` and `projected_cross_entropy`.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use emberlm_core::{
    CrossEntropy, CrossEntropyConfig,
    operators::{
        Implementation, Projection, cross_entropy, cross_entropy_by, projected_cross_entropy,
        projected_cross_entropy_by,
    },
};
use emberlm_testkit::{assert_close, device, random, random_tokens, same_cases};
use proptest::prelude::*;

use crate::common::{
    N_ROWS, Pass, WIDTHS, check, check_all, check_bits, check_sixteen_bits, numbers,
};

/// A target that is no class.
const IGNORED: i64 = -100;

/// What besides scores goes into a loss.
#[derive(Debug, Clone, Copy)]
struct Options {
    smoothing: f64,
    /// Every third target is ignored.
    ignored: bool,
    weights: bool,
    /// Which of the two sums is used.
    nll: bool,
    z: bool,
}

const PLAIN: Options = Options {
    smoothing: 0.0,
    ignored: false,
    weights: false,
    nll: true,
    z: false,
};

const EVERYTHING: Options = Options {
    smoothing: 0.1,
    ignored: true,
    weights: true,
    nll: true,
    z: true,
};

/// All of them, two at a time.
const OPTIONS: [Options; 7] = [
    PLAIN,
    Options { z: true, ..PLAIN },
    Options {
        smoothing: 0.1,
        ..PLAIN
    },
    Options {
        ignored: true,
        z: true,
        ..PLAIN
    },
    Options {
        weights: true,
        smoothing: 0.3,
        ..PLAIN
    },
    Options {
        nll: false,
        ..EVERYTHING
    },
    EVERYTHING,
];

impl Options {
    fn config(self) -> CrossEntropyConfig {
        CrossEntropyConfig::new()
            .with_label_smoothing(self.smoothing)
            .with_ignored_target(self.ignored.then_some(IGNORED))
    }

    /// Targets and weights.
    fn rows(
        self,
        pass: &mut Pass,
        n_rows: usize,
        vocab_size: usize,
    ) -> (Tensor<1, Int>, Option<Tensor<1>>) {
        let targets = pass.tokens([1, n_rows], vocab_size).reshape([n_rows]);
        let targets = match self.ignored {
            // Not the first, so that something is left.
            true => {
                let row = Tensor::<1, Int>::arange(0..n_rows as i64, &targets.device());
                targets.mask_fill(row.remainder_scalar(3).equal_scalar(1), IGNORED)
            }
            false => targets,
        };
        let weights = self
            .weights
            .then(|| pass.constant_of([n_rows], |i, x| if i == 0 { 0.5 } else { x.abs() }));
        (targets, weights)
    }

    fn take(self, pass: &mut Pass, loss: CrossEntropy) {
        if self.nll {
            pass.positive_sum("nll", loss.nll_sum);
        }
        if self.z {
            pass.positive_sum("z", loss.z_sum);
        }
        pass.positive_sum("number of targets", loss.n_targets);
    }
}

/// The loss of scores, which are `value` of an index and a random number.
fn scores(
    pass: &mut Pass,
    [n_rows, vocab_size]: [usize; 2],
    options: Options,
    value: impl Fn(usize, f64) -> f64,
) {
    let logits = pass.leaf_of("logits", [n_rows, vocab_size], value);
    let (targets, weights) = options.rows(pass, n_rows, vocab_size);
    let loss = cross_entropy_by(pass.by, &options.config(), logits, targets, weights);
    options.take(pass, loss);
}

/// Which table, and how it lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Table {
    Rows,
    Columns,
    /// A table of rows, transposed.
    TransposedRows,
}

const TABLES: [Table; 3] = [Table::Rows, Table::Columns, Table::TransposedRows];

/// The loss of hidden states.
fn hidden(
    pass: &mut Pass,
    [n_rows, width, vocab_size]: [usize; 3],
    table: Table,
    options: Options,
) {
    let hidden = pass.leaf("hidden", [n_rows, width]);
    let projection = match table {
        Table::Rows => Projection::Rows(pass.leaf("table", [vocab_size, width])),
        Table::Columns => Projection::Columns(pass.leaf("table", [width, vocab_size])),
        Table::TransposedRows => {
            Projection::Columns(pass.leaf("table", [vocab_size, width]).transpose())
        }
    };
    assert_eq!(projection.vocab_size(), vocab_size);
    let (targets, weights) = options.rows(pass, n_rows, vocab_size);
    let config = options.config();
    let loss = projected_cross_entropy_by(pass.by, &config, hidden, &projection, targets, weights);
    options.take(pass, loss);
}

#[test]
fn scores_at_odd_sizes() {
    for n_rows in N_ROWS {
        for vocab_size in WIDTHS {
            if vocab_size == 1 || n_rows * vocab_size > 100_000 {
                continue;
            }
            for options in OPTIONS {
                let case = format!("{n_rows} x {vocab_size}, {options:?}");
                check(&case, |pass| {
                    scores(pass, [n_rows, vocab_size], options, |_, x| 4.0 * x)
                });
            }
        }
    }
}

/// One class is certain: what is left of its loss and gradient is rounding.
#[test]
fn one_class() {
    let device = device().autodiff();
    for (dtype, limit) in [(DType::F32, 1e-7), (DType::F64, 1e-15)] {
        for smoothing in [0.0, 0.1] {
            let logits = random([5, 1], 1, dtype, &device).require_grad();
            let targets = Tensor::<1, Int>::zeros([5], &device);
            let config = CrossEntropyConfig::new().with_label_smoothing(smoothing);
            let loss = cross_entropy(&config, logits.clone(), targets, None);
            let gradients = (loss.nll_sum.clone() + loss.z_sum.clone() * 0.0).backward();
            let gradient = numbers(logits.grad(&gradients).unwrap());
            assert!(gradient.iter().all(|g| g.abs() <= limit), "{gradient:?}");
            assert_eq!(numbers(loss.nll_sum), [0.0]);
            let squares = logits.clone().inner().square().sum();
            assert_close(loss.z_sum.inner(), squares, 1e-6);
        }
    }
}

#[test]
fn hidden_states_at_odd_sizes() {
    for sizes in [
        [1, 1, 3],
        [3, 17, 8],
        [17, 3, 33],
        [33, 65, 16],
        [17, 8, 300],
        [1000, 5, 17],
    ] {
        for table in TABLES {
            for options in OPTIONS {
                let case = format!("{sizes:?} {table:?}, {options:?}");
                check(&case, |pass| hidden(pass, sizes, table, options));
            }
        }
    }
}

#[test]
fn gradients_are_slopes() {
    for options in OPTIONS {
        check_all(&format!("scores, {options:?}"), |pass| {
            scores(pass, [5, 7], options, |_, x| 3.0 * x);
        });
        for table in TABLES {
            check_all(&format!("hidden states, {table:?}, {options:?}"), |pass| {
                hidden(pass, [5, 3, 7], table, options);
            });
        }
    }
}

/// More scores than a chunk holds: three chunks, of which the last is shorter.
#[test]
fn several_chunks() {
    let options = Options {
        smoothing: 0.0,
        ..EVERYTHING
    };
    check("chunks", |pass| {
        hidden(pass, [35, 3, 270_000], Table::Rows, options)
    });
}

#[test]
fn large_scores() {
    for vocab_size in [3, 17, 1000] {
        for options in OPTIONS {
            let case = |what| format!("{what}, {vocab_size} classes, {options:?}");
            let dims = [17, vocab_size];
            check(&case("up to 30"), |pass| {
                scores(pass, dims, options, |_, x| 30.0 * x)
            });
            check(&case("up to 1e4"), |pass| {
                scores(pass, dims, options, |_, x| 1e4 * x)
            });
            check(&case("around 100"), |pass| {
                scores(pass, dims, options, |_, x| 100.0 + x)
            });
            check(&case("around -1e4"), |pass| {
                scores(pass, dims, options, |_, x| x - 1e4)
            });
            // The class of the highest score is not the target's in most rows, but in some.
            check(&case("one high"), |pass| {
                scores(
                    pass,
                    dims,
                    options,
                    |i, x| if i % 5 == 0 { 20.0 } else { x },
                );
            });
        }
    }
}

fn tensors(device: &Device) -> (Tensor<2>, Tensor<1, Int>) {
    let targets = random_tokens([1, 5], 7, 2, device).reshape([5]);
    (random([5, 7], 1, DType::F32, device), targets)
}

/// The loss of hidden states is that of their scores.
#[test]
fn hidden_states_and_scores_agree() {
    let device = device().autodiff();
    let config = EVERYTHING.config();
    let run = |projected: Option<Table>| {
        let hidden = random([50, 17], 1, DType::F32, &device).require_grad();
        let table = random([300, 17], 2, DType::F32, &device).require_grad();
        let targets = random_tokens([1, 50], 300, 3, &device).reshape([50]);
        let loss = match projected {
            None => {
                let logits = hidden.clone().matmul(table.clone().transpose());
                cross_entropy_by(Implementation::Reference, &config, logits, targets, None)
            }
            Some(kind) => {
                let projection = match kind {
                    Table::Rows => Projection::Rows(table.clone()),
                    _ => Projection::Columns(table.clone().transpose()),
                };
                projected_cross_entropy(&config, hidden.clone(), &projection, targets, None)
            }
        };
        let sums = Tensor::cat(
            vec![loss.nll_sum.clone(), loss.z_sum.clone(), loss.n_targets],
            0,
        );
        let gradients = (loss.nll_sum + loss.z_sum * 0.1).backward();
        let gradients = [&hidden, &table].map(|x| x.grad(&gradients).unwrap());
        (sums.inner(), gradients)
    };
    let (expected, expected_gradients) = run(None);
    for kind in [Table::Rows, Table::TransposedRows] {
        let (sums, gradients) = run(Some(kind));
        assert_close(sums, expected.clone(), 1e-6);
        for (gradient, expected) in gradients.into_iter().zip(expected_gradients.clone()) {
            assert_close(gradient, expected, 1e-6);
        }
    }
}

#[test]
fn all_targets_ignored() {
    let config = EVERYTHING.config();
    let device = device().autodiff();
    for by in [
        Implementation::Reference,
        Implementation::Portable,
        Implementation::Native,
    ] {
        let hidden = random([5, 3], 1, DType::F32, &device).require_grad();
        let table = random([7, 3], 2, DType::F32, &device).require_grad();
        let logits = random([5, 7], 3, DType::F32, &device).require_grad();
        let targets = Tensor::<1, Int>::full([5], IGNORED, &device);
        let projection = Projection::Rows(table.clone());
        let given = cross_entropy_by(by, &config, logits.clone(), targets.clone(), None);
        let projected =
            projected_cross_entropy_by(by, &config, hidden.clone(), &projection, targets, None);
        for loss in [&given, &projected] {
            for sum in [&loss.nll_sum, &loss.z_sum, &loss.n_targets] {
                assert_eq!(numbers(sum.clone()), [0.0], "{by:?}");
            }
        }
        let sum = given.nll_sum + given.z_sum + projected.nll_sum + projected.z_sum;
        let gradients = sum.backward();
        for leaf in [hidden, table, logits] {
            let gradient = numbers(leaf.grad(&gradients).unwrap());
            assert!(gradient.iter().all(|g| *g == 0.0), "{by:?}: {gradient:?}");
        }
    }
}

/// The classes of the highest and the lowest number are classes; a score of minus infinity has no share.
#[test]
fn a_class_that_cannot_be() {
    let device = device().autodiff();
    for n_classes in [4, 16, 17] {
        let [without, with] = [n_classes, n_classes + 1].map(|n| {
            let logits = random([1, n_classes], 1, DType::F64, &device).require_grad();
            let padded = match n == n_classes {
                true => logits.clone(),
                false => {
                    let bad = Tensor::full([1, 1], f64::NEG_INFINITY, (&device, DType::F64));
                    Tensor::cat(vec![logits.clone(), bad], 1)
                }
            };
            let targets = Tensor::<1, Int>::from_ints([n_classes as i32 - 1], &device);
            let loss = cross_entropy(&CrossEntropyConfig::new(), padded, targets, None);
            let gradients = (loss.nll_sum.clone() + loss.z_sum).backward();
            (loss.nll_sum.inner(), logits.grad(&gradients).unwrap())
        });
        assert_close(with.0, without.0, 1e-14);
        assert_close(with.1, without.1, 1e-14);
    }
}

#[test]
fn not_a_number_and_infinity_pass_through() {
    let device = device().autodiff();
    for bad in [f32::NAN, f32::INFINITY] {
        for (vocab_size, at) in [(7, 0), (7, 6), (32, 3), (33, 32)] {
            let row = 2;
            let spoiled = |i: usize| i == row * vocab_size + at;
            let mask: Vec<bool> = (0..5 * vocab_size).map(spoiled).collect();
            let mask = Tensor::from_data(TensorData::new(mask, [5, vocab_size]), &device);
            let logits = random([5, vocab_size], 1, DType::F32, &device);
            let logits = logits.mask_fill(mask, bad).require_grad();
            let targets = Tensor::<1, Int>::from_ints([1, 2, 3, 4, 5], &device);
            for smoothing in [0.0, 0.1] {
                let config = CrossEntropyConfig::new().with_label_smoothing(smoothing);
                let loss = cross_entropy(&config, logits.clone(), targets.clone(), None);
                let gradients = (loss.nll_sum.clone() + loss.z_sum.clone()).backward();
                for sum in [loss.nll_sum, loss.z_sum] {
                    let sum = numbers(sum)[0];
                    assert!(!sum.is_finite(), "{bad} at {at} of {vocab_size}: {sum}");
                }
                let gradient = numbers(logits.grad(&gradients).unwrap());
                for (i, row_gradient) in gradient.chunks_exact(vocab_size).enumerate() {
                    let right = match i == row {
                        true => row_gradient.iter().any(|g| g.is_nan()),
                        false => row_gradient.iter().all(|g| g.is_finite()),
                    };
                    assert!(right, "{bad} at {at} of {vocab_size}: {row_gradient:?}");
                }
            }
            // A row that does not count may be anything.
            let ignoring = CrossEntropyConfig::new().with_ignored_target(Some(3));
            let loss = cross_entropy(&ignoring, logits.clone(), targets, None);
            let gradients = (loss.nll_sum.clone() + loss.z_sum.clone()).backward();
            for sum in [loss.nll_sum, loss.z_sum] {
                assert!(numbers(sum)[0].is_finite());
            }
            let gradient = numbers(logits.grad(&gradients).unwrap());
            assert!(gradient.iter().all(|g| g.is_finite()));
        }
        // Through a projection.
        let mut values = numbers(random([5, 3], 1, DType::F64, &device));
        values[7] = f64::from(bad);
        let data = TensorData::new(values, [5, 3]);
        let hidden = Tensor::<2>::from_data(data, (&device, DType::F32)).require_grad();
        let table = random([33, 3], 2, DType::F32, &device).require_grad();
        let targets = Tensor::<1, Int>::from_ints([1, 2, 3, 4, 5], &device);
        let projection = Projection::Rows(table.clone());
        let config = CrossEntropyConfig::new();
        let loss = projected_cross_entropy(&config, hidden.clone(), &projection, targets, None);
        let gradients = loss.nll_sum.clone().backward();
        assert!(!numbers(loss.nll_sum)[0].is_finite());
        let gradient = numbers(hidden.grad(&gradients).unwrap());
        assert!(gradient[6..9].iter().all(|g| g.is_nan()));
        assert!(
            gradient[..6]
                .iter()
                .chain(&gradient[9..])
                .all(|g| g.is_finite())
        );
        let gradient = numbers(table.grad(&gradients).unwrap());
        assert!(gradient.iter().any(|g| g.is_nan()));
    }
}

#[test]
fn inputs_without_a_gradient() {
    for wanted in [0, 1] {
        check(&format!("wanted {wanted}"), |pass| {
            let mut input = |name, dims: [usize; 2], i: usize| match wanted == i {
                true => pass.leaf(name, dims),
                false => pass.constant_of(dims, |_, x| x),
            };
            let (hidden, table) = (input("hidden", [5, 3], 0), input("table", [7, 3], 1));
            let (targets, weights) = EVERYTHING.rows(pass, 5, 7);
            let projection = Projection::Rows(table);
            let config = EVERYTHING.config();
            let loss =
                projected_cross_entropy_by(pass.by, &config, hidden, &projection, targets, weights);
            EVERYTHING.take(pass, loss);
        });
    }
}

/// The scores of the model's last layer have strides of their own.
#[test]
fn any_strides() {
    check("transposed scores", |pass| {
        let logits = pass.leaf("logits", [17, 5]).transpose();
        let (targets, weights) = EVERYTHING.rows(pass, 5, 17);
        let loss = cross_entropy_by(pass.by, &EVERYTHING.config(), logits, targets, weights);
        EVERYTHING.take(pass, loss);
    });
    check("a part of the hidden states", |pass| {
        let hidden = pass.leaf("hidden", [9, 8]).narrow(0, 2, 5).narrow(1, 3, 4);
        let projection = Projection::Columns(pass.leaf("table", [4, 20]).narrow(1, 2, 17));
        let (targets, weights) = EVERYTHING.rows(pass, 5, 17);
        let config = EVERYTHING.config();
        let loss =
            projected_cross_entropy_by(pass.by, &config, hidden, &projection, targets, weights);
        EVERYTHING.take(pass, loss);
    });
}

#[test]
fn no_rows() {
    let device = device();
    let targets = || Tensor::<1, Int>::zeros([0], &device);
    let config = CrossEntropyConfig::new();
    let given = cross_entropy(&config, Tensor::ones([0, 3], &device), targets(), None);
    let projection = Projection::Rows(Tensor::ones([3, 2], &device));
    let hidden = Tensor::ones([0, 2], &device);
    let projected = projected_cross_entropy(&config, hidden, &projection, targets(), None);
    for loss in [given, projected] {
        for sum in [loss.nll_sum, loss.z_sum, loss.n_targets] {
            assert_eq!(numbers(sum), [0.0]);
        }
    }
}

#[test]
fn sixteen_bits() {
    for options in OPTIONS {
        check_sixteen_bits(&format!("scores, {options:?}"), 0.5, |pass| {
            scores(pass, [17, 33], options, |_, x| 4.0 * x);
        });
        for table in TABLES {
            check_sixteen_bits(
                &format!("hidden states, {table:?}, {options:?}"),
                0.5,
                |pass| {
                    hidden(pass, [17, 5, 33], table, options);
                },
            );
        }
    }
}

#[test]
fn bits_are_always_the_same() {
    check_bits("scores", |pass| {
        scores(pass, [100, 1000], EVERYTHING, |_, x| 4.0 * x)
    });
    for table in TABLES {
        check_bits(&format!("{table:?}"), |pass| {
            hidden(pass, [200, 33, 300], table, EVERYTHING)
        });
    }
}

prop_compose! {
    fn any_options()(
        smoothing in prop::sample::select(&[0.0, 0.1, 0.5]),
        ignored in any::<bool>(),
        weights in any::<bool>(),
        z in any::<bool>(),
    ) -> Options {
        Options { smoothing, ignored, weights, nll: true, z }
    }
}

proptest! {
    #![proptest_config(same_cases(4))]

    #[test]
    fn any_scores(
        dims in (1..60_usize, 2..70_usize),
        options in any_options(),
        largest in prop::sample::select(&[1.0, 5.0, 50.0]),
    ) {
        check(&format!("{dims:?} {options:?} up to {largest}"), |pass| {
            scores(pass, dims.into(), options, |_, x| largest * x);
        });
    }

    #[test]
    fn any_hidden_states(
        sizes in (1..60_usize, 1..40_usize, 2..70_usize),
        table in prop::sample::select(&TABLES),
        options in any_options(),
    ) {
        check(&format!("{sizes:?} {table:?} {options:?}"), |pass| {
            hidden(pass, sizes.into(), table, options);
        });
    }
}

#[test]
#[should_panic(expected = "target 1 is 7, the vocabulary has 7 classes")]
fn a_target_past_the_last_class() {
    let device = device();
    let (logits, _) = tensors(&device);
    let targets = Tensor::<1, Int>::from_ints([0, 7, 1, 2, 3], &device);
    cross_entropy(&CrossEntropyConfig::new(), logits, targets, None);
}

#[test]
#[should_panic(expected = "target 4 is -100, the vocabulary has 7 classes")]
fn a_target_that_nobody_ignores() {
    let device = device();
    let targets = Tensor::<1, Int>::from_ints([0, 6, 1, 2, -100], &device);
    let projection = Projection::Rows(Tensor::ones([7, 3], &device));
    let hidden = Tensor::ones([5, 3], &device);
    projected_cross_entropy(
        &CrossEntropyConfig::new(),
        hidden,
        &projection,
        targets,
        None,
    );
}

#[test]
#[should_panic(expected = "n_tokens: 4 rows of scores, 5 targets")]
fn as_many_targets_as_rows() {
    let (logits, targets) = tensors(&device());
    cross_entropy(
        &CrossEntropyConfig::new(),
        logits.narrow(0, 0, 4),
        targets,
        None,
    );
}

#[test]
#[should_panic(expected = "n_tokens: 5 rows of scores, 6 weights")]
fn as_many_weights_as_rows() {
    let device = device();
    let (logits, targets) = tensors(&device);
    let weights = Tensor::ones([6], &device);
    cross_entropy(&CrossEntropyConfig::new(), logits, targets, Some(weights));
}

#[test]
#[should_panic(expected = "d_model: the projection takes 4 components, the hidden states have 7")]
fn hidden_states_are_as_wide_as_the_table() {
    let device = device();
    let (hidden, targets) = tensors(&device);
    let projection = Projection::Columns(Tensor::ones([4, 9], &device));
    projected_cross_entropy(
        &CrossEntropyConfig::new(),
        hidden,
        &projection,
        targets,
        None,
    );
}
