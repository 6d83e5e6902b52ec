//! `layer_norm`, `rms_norm` and `add_norm`.

use burn::{
    nn::{LayerNormConfig, RmsNormConfig},
    tensor::{DType, Tensor},
};
use emberlm_core::{
    NormConfig,
    operators::{
        Implementation, NormParameters, add_norm, add_norm_by, layer_norm, norm_by, rms_norm,
    },
};
use emberlm_testkit::{device, largest_difference, random, same_cases};
use proptest::prelude::*;

use crate::common::{
    Pass, check, check_all, check_bits, check_differences, check_sixteen_bits, numbers, sizes,
};

/// A norm without its tensors.
#[derive(Debug, Clone, Copy)]
struct Kind {
    centered: bool,
    shift: bool,
    epsilon: f64,
}

const LAYER: Kind = Kind {
    centered: true,
    shift: true,
    epsilon: 1e-5,
};

const KINDS: [Kind; 4] = [
    LAYER,
    Kind {
        shift: false,
        ..LAYER
    },
    Kind {
        centered: false,
        shift: false,
        ..LAYER
    },
    Kind {
        centered: false,
        ..LAYER
    },
];

impl Kind {
    fn parameters(self, pass: &mut Pass, width: usize) -> NormParameters {
        NormParameters {
            centered: self.centered,
            epsilon: self.epsilon,
            scale: pass.leaf("scale", [width]),
            shift: self.shift.then(|| pass.leaf("shift", [width])),
        }
    }
}

fn plain(pass: &mut Pass, kind: Kind, dims: [usize; 2], value: impl Fn(usize, f64) -> f64) {
    let x = pass.leaf_of("x", dims, value);
    let parameters = kind.parameters(pass, dims[1]);
    let y = norm_by(pass.by, x, &parameters);
    pass.output("y", y);
}

/// Which outputs go into the loss.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Used {
    Sum,
    Normed,
    Both,
}

fn residual(
    pass: &mut Pass,
    kind: Kind,
    dims: [usize; 2],
    used: Used,
    value: impl Fn(usize, f64) -> f64,
) {
    let x = pass.leaf_of("x", dims, value);
    let y = pass.leaf("y", dims);
    let parameters = kind.parameters(pass, dims[1]);
    let (sum, normed) = add_norm_by(pass.by, x, y, &parameters);
    if used != Used::Normed {
        pass.output("sum", sum);
    }
    if used != Used::Sum {
        pass.output("normed", normed);
    }
}

#[test]
fn all_kinds_at_odd_sizes() {
    for dims in sizes() {
        for mut kind in KINDS {
            if dims[1] == 1 {
                // A gradient of one component is what epsilon leaves of it.
                kind.epsilon = 0.3;
            }
            check(&format!("norm {dims:?} {kind:?}"), |pass| {
                plain(pass, kind, dims, |_, x| x)
            });
            check(&format!("add_norm {dims:?} {kind:?}"), |pass| {
                residual(pass, kind, dims, Used::Both, |_, x| x);
            });
        }
    }
}

#[test]
fn gradients_are_slopes() {
    for kind in KINDS {
        let kind = Kind {
            epsilon: 0.01,
            ..kind
        };
        check_all(&format!("norm {kind:?}"), |pass| {
            plain(pass, kind, [3, 17], |_, x| x)
        });
        for used in [Used::Sum, Used::Normed, Used::Both] {
            check_all(&format!("add_norm {kind:?} {used:?}"), |pass| {
                residual(pass, kind, [3, 5], used, |_, x| x);
            });
        }
    }
}

#[test]
fn one_of_the_two_outputs() {
    for used in [Used::Sum, Used::Normed] {
        for kind in KINDS {
            for dims in [[1, 3], [3, 17], [17, 33], [1000, 17]] {
                check(&format!("add_norm {dims:?} {kind:?} {used:?}"), |pass| {
                    residual(pass, kind, dims, used, |_, x| x);
                });
            }
        }
    }
}

#[test]
fn epsilons_and_magnitudes() {
    for epsilon in [1e-12, 1e-8, 1e-2, 1.0, 100.0] {
        for magnitude in [1e-3, 1.0, 1e3] {
            for kind in KINDS {
                let kind = Kind { epsilon, ..kind };
                check(&format!("{kind:?}, numbers up to {magnitude:e}"), |pass| {
                    plain(pass, kind, [17, 33], |_, x| magnitude * x);
                });
            }
        }
    }
}

/// The variance of some rows is zero.
#[test]
fn rows_of_equal_numbers() {
    for epsilon in [1e-12, 1e-5, 0.1] {
        for kind in KINDS {
            let kind = Kind { epsilon, ..kind };
            for width in [3, 16, 17, 1000] {
                let value = |i: usize, x: f64| match i / width % 3 {
                    0 => 0.1,
                    1 => 0.0,
                    _ => x,
                };
                let case = format!("{kind:?}, rows of {width} equal numbers");
                check(&case, |pass| plain(pass, kind, [9, width], value));
            }
        }
    }
}

/// The mean is far larger than the deviations from it.
#[test]
fn large_means() {
    for mean in [100.0, -1e3, 1e4] {
        for kind in KINDS {
            if kind.centered && mean == 1e4 {
                // Below.
                continue;
            }
            for dims in [[17, 33], [5, 384], [3, 1000]] {
                let case = format!("{kind:?} {dims:?}, mean {mean}");
                check(&case, |pass| plain(pass, kind, dims, |_, x| mean + x));
            }
        }
    }
    check_differences("layer norm, mean 100", |pass| {
        plain(pass, LAYER, [5, 17], |_, x| 100.0 + x);
    });
}

/// The definition loses digits of its own in such means, even in f64. So it gets the deviations, which is the same.
#[test]
fn very_large_means() {
    for mean in [100.0, -1e3, 1e4, -1e6] {
        for dims in [[17, 33], [5, 384], [3, 1000], [1000, 17]] {
            check(&format!("{dims:?}, mean {mean}"), |pass| {
                let x = pass.leaf_of("x", dims, |_, x| mean + x);
                // The sum of the two is exact: its rounding would be larger than all else.
                let y = pass.leaf_of("y", dims, |_, x| (16.0 * x).round() / 16.0);
                let parameters = LAYER.parameters(pass, dims[1]);
                let deviations = |x: Tensor<2>| match pass.by {
                    Implementation::Native => x,
                    _ => x - mean,
                };
                let normed = norm_by(pass.by, deviations(x.clone()), &parameters);
                let (sum, sum_normed) = match pass.by {
                    Implementation::Native => add_norm_by(pass.by, x, y, &parameters),
                    _ => {
                        let sum = x + y;
                        (sum.clone(), norm_by(pass.by, deviations(sum), &parameters))
                    }
                };
                pass.output("normed", normed);
                pass.output("sum", sum);
                pass.output("normed sum", sum_normed);
            });
        }
    }
}

#[test]
fn any_number_of_axes_and_strides() {
    fn of<const D: usize>(dims: [usize; D]) {
        check(&format!("norm of {dims:?}"), |pass| {
            let x = pass.leaf("x", dims);
            let parameters = LAYER.parameters(pass, dims[D - 1]);
            let y = norm_by(pass.by, x, &parameters);
            pass.output("y", y);
        });
        check(&format!("add_norm of {dims:?}"), |pass| {
            let [x, y] = ["x", "y"].map(|name| pass.leaf(name, dims));
            let parameters = LAYER.parameters(pass, dims[D - 1]);
            let (sum, normed) = add_norm_by(pass.by, x, y, &parameters);
            pass.output("sum", sum);
            pass.output("normed", normed);
        });
    }
    of([5]);
    of([4, 5]);
    of([2, 4, 5]);
    of([2, 1, 4, 5]);
    of([2, 3, 1, 4, 5]);
    check("strided", |pass| {
        let x = pass.leaf("x", [17, 5]).transpose();
        let y = pass.leaf("y", [5, 20]).narrow(1, 2, 17);
        let parameters = LAYER.parameters(pass, 17);
        let (sum, normed) = add_norm_by(pass.by, x, y, &parameters);
        pass.output("sum", sum.transpose());
        pass.output("normed", normed.transpose());
    });
}

#[test]
fn inputs_without_a_gradient() {
    check("only the scale", |pass| {
        let x = pass.constant_of([5, 17], |_, x| x);
        let mut parameters = LAYER.parameters(pass, 17);
        parameters.shift = Some(pass.constant_of([17], |_, x| x));
        let y = norm_by(pass.by, x, &parameters);
        pass.output("y", y);
    });
    check("only a summand", |pass| {
        let x = pass.constant_of([5, 17], |_, x| x);
        let y = pass.leaf("y", [5, 17]);
        let parameters = NormParameters {
            centered: true,
            epsilon: 1e-5,
            scale: pass.constant_of([17], |_, x| x),
            shift: None,
        };
        let (sum, normed) = add_norm_by(pass.by, x, y, &parameters);
        pass.output("sum", sum);
        pass.output("normed", normed);
    });
    check("computed parameters, only the sum used", |pass| {
        let [x, y] = ["x", "y"].map(|name| pass.leaf(name, [5, 17]));
        let mut parameters = LAYER.parameters(pass, 17);
        parameters.scale = parameters.scale * 2.0;
        let (sum, _) = add_norm_by(pass.by, x, y, &parameters);
        pass.output("sum", sum);
    });
    check("one tensor twice", |pass| {
        let x = pass.leaf("x", [5, 17]);
        let parameters = LAYER.parameters(pass, 17);
        let (sum, normed) = add_norm_by(pass.by, x.clone(), x, &parameters);
        pass.output("sum", sum);
        pass.output("normed", normed);
    });
}

/// A bad number spoils its row and no other.
#[test]
fn not_a_number_and_infinity_stay_in_their_row() {
    let device = device().autodiff();
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for width in [5, 16, 17] {
            for at in [0, width - 1] {
                let x = random([3, width], 1, DType::F32, &device);
                let mask = (0..3 * width).map(|i| i == width + at).collect::<Vec<_>>();
                let mask = burn::tensor::TensorData::new(mask, [3, width]);
                let x = x
                    .mask_fill(Tensor::from_data(mask, &device), bad)
                    .require_grad();
                let y = layer_norm(x.clone(), Tensor::ones([width], &device), None, 1e-5);
                let gradients = (y.clone() * y.clone()).sum().backward();
                for rows in [numbers(y), numbers(x.grad(&gradients).unwrap())] {
                    for (i, row) in rows.chunks_exact(width).enumerate() {
                        let spoiled = row.iter().all(|x| x.is_nan());
                        let finite = row.iter().all(|x| x.is_finite());
                        let right = if i == 1 { spoiled } else { finite };
                        assert!(right, "{bad} at {at} of {width}: row {i} is {row:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn no_rows() {
    let device = device();
    let y = layer_norm(
        Tensor::<2>::ones([0, 3], &device),
        Tensor::ones([3], &device),
        None,
        1e-5,
    );
    assert_eq!(y.dims(), [0, 3]);
}

#[test]
fn sixteen_bits() {
    for kind in KINDS {
        check_sixteen_bits(&format!("norm {kind:?}"), 0.5, |pass| {
            plain(pass, kind, [17, 33], |_, x| x);
        });
        // The backward pass reads the sum as it was rounded.
        check_sixteen_bits(&format!("add_norm {kind:?}"), 1.0, |pass| {
            residual(pass, kind, [17, 33], Used::Both, |_, x| x);
        });
    }
}

#[test]
fn bits_are_always_the_same() {
    for kind in KINDS {
        check_bits(&format!("norm {kind:?}"), |pass| {
            plain(pass, kind, [1000, 65], |_, x| x)
        });
        check_bits(&format!("add_norm {kind:?}"), |pass| {
            residual(pass, kind, [1000, 65], Used::Both, |_, x| x);
        });
    }
}

#[test]
fn the_layers_of_burn() {
    let device = device().autodiff();
    let gamma = random([17], 1, DType::F32, &device);
    let beta = random([17], 2, DType::F32, &device);
    let run = |forward: &dyn Fn(Tensor<3>) -> Tensor<3>| {
        let x = random([2, 5, 17], 3, DType::F32, &device).require_grad();
        let y = forward(x.clone());
        let weights = random([2, 5, 17], 4, DType::F32, &device);
        let gradients = (y.clone() * weights).sum().backward();
        [y.into_data(), x.grad(&gradients).unwrap().into_data()]
    };
    let same = |expected: [_; 2], got: [_; 2]| {
        for (got, expected) in got.iter().zip(&expected) {
            assert!(largest_difference(got, expected) <= 1e-6);
        }
    };
    for bias in [false, true] {
        let mut theirs = LayerNormConfig::new(17).with_bias(bias).init(&device);
        theirs.gamma = theirs.gamma.map(|_| gamma.clone());
        theirs.beta = theirs.beta.map(|old| old.map(|_| beta.clone()));
        let shift = bias.then(|| beta.clone());
        let expected = run(&|x| theirs.forward(x));
        same(
            expected,
            run(&|x| layer_norm(x, gamma.clone(), shift.clone(), 1e-5)),
        );
    }
    let mut theirs = RmsNormConfig::new(17).init(&device);
    theirs.gamma = theirs.gamma.map(|_| gamma.clone());
    let expected = run(&|x| theirs.forward(x));
    same(expected, run(&|x| rms_norm(x, gamma.clone(), 1e-5)));

    // The modules as they are made.
    let layer = NormConfig::Layer {
        epsilon: 1e-5,
        bias: true,
    }
    .init(17, &device);
    let theirs = LayerNormConfig::new(17).init(&device);
    same(run(&|x| theirs.forward(x)), run(&|x| layer.forward(x)));
    let rms = NormConfig::Rms { epsilon: 1e-5 }.init(17, &device);
    let theirs = RmsNormConfig::new(17).init(&device);
    same(run(&|x| theirs.forward(x)), run(&|x| rms.forward(x)));
}

proptest! {
    #![proptest_config(same_cases(4))]

    #[test]
    fn any_shape(
        // With two components a layer norm's gradient is nothing but rounding.
        (n_rows, width) in (1..60_usize, 3..70_usize),
        centered in any::<bool>(),
        shift in any::<bool>(),
        epsilon in prop::sample::select(&[1e-6, 1e-2]),
        used in prop::sample::select(&[None, Some(Used::Sum), Some(Used::Normed), Some(Used::Both)]),
    ) {
        let kind = Kind { centered, shift, epsilon };
        let dims = [n_rows, width];
        check(&format!("{kind:?} {dims:?} {used:?}"), |pass| match used {
            None => plain(pass, kind, dims, |_, x| x),
            Some(used) => residual(pass, kind, dims, used, |_, x| x),
        });
    }
}

#[test]
#[should_panic(expected = "width: a norm needs at least one component")]
fn no_components() {
    let device = device();
    rms_norm(
        Tensor::<2>::ones([2, 0], &device),
        Tensor::ones([0], &device),
        1e-5,
    );
}

#[test]
#[should_panic(expected = "width: the scale has 4 components, the input 3")]
fn the_scale_is_as_wide_as_the_input() {
    let device = device();
    rms_norm(
        Tensor::<2>::ones([2, 3], &device),
        Tensor::ones([4], &device),
        1e-5,
    );
}

#[test]
#[should_panic(expected = "width: the shift has 2 components, the input 3")]
fn the_shift_is_as_wide_as_the_input() {
    let device = device();
    let [scale, shift] = [3, 2].map(|n| Tensor::<1>::ones([n], &device));
    layer_norm(Tensor::<2>::ones([2, 3], &device), scale, Some(shift), 1e-5);
}

#[test]
#[should_panic(expected = "the shapes of the two summands differ")]
fn summands_have_one_shape() {
    let device = device();
    let parameters = NormParameters {
        centered: true,
        epsilon: 1e-5,
        scale: Tensor::ones([3], &device),
        shift: None,
    };
    let [x, y] = [[2, 3], [1, 3]].map(|dims| Tensor::<2>::ones(dims, &device));
    add_norm(x, y, &parameters);
}
