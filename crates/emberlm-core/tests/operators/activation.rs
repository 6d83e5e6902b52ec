//! `activate` and `gate`.

use burn::{
    nn::SwiGluConfig,
    tensor::{DType, Tensor, TensorData},
};
use emberlm_core::{
    Activation,
    operators::{Implementation, activate, activate_by, gate, gate_by, linears},
};
use emberlm_testkit::{device, largest_difference, random, same_cases};
use proptest::prelude::*;

use crate::common::{Pass, check, check_all, check_bits, check_sixteen_bits, numbers, sizes};

const ACTIVATIONS: [Activation; 5] = [
    Activation::Relu,
    Activation::SquaredRelu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
];

/// `f(x + bias)` of numbers up to `largest`.
fn plain(pass: &mut Pass, f: Activation, dims: [usize; 2], largest: f64, bias: bool) {
    let x = pass.leaf_of("x", dims, |_, x| largest * x);
    let bias = bias.then(|| pass.leaf("bias", [dims[1]]));
    let y = activate_by(pass.by, f, x, bias);
    pass.output("y", y);
}

/// `f(gate + gate bias) (up + up bias)`.
fn gated(pass: &mut Pass, f: Activation, dims: [usize; 2], largest: f64, bias: bool) {
    let gate = pass.leaf_of("gate", dims, |_, x| largest * x);
    let up = pass.leaf("up", dims);
    let biases = bias.then(|| ["gate bias", "up bias"].map(|name| pass.leaf(name, [dims[1]])));
    let y = gate_by(pass.by, f, gate, up, biases);
    pass.output("y", y);
}

#[test]
fn all_functions_at_odd_sizes() {
    for dims in sizes() {
        for f in ACTIVATIONS {
            for bias in [false, true] {
                let case = |what| format!("{what} {f:?} {dims:?}, bias {bias}");
                check(&case("activate"), |pass| plain(pass, f, dims, 3.0, bias));
                check(&case("gate"), |pass| gated(pass, f, dims, 3.0, bias));
            }
        }
    }
}

#[test]
fn gradients_are_slopes() {
    for f in ACTIVATIONS {
        for bias in [false, true] {
            check_all(&format!("activate {f:?}"), |pass| {
                plain(pass, f, [3, 5], 2.0, bias)
            });
            check_all(&format!("gate {f:?}"), |pass| {
                gated(pass, f, [3, 5], 2.0, bias)
            });
        }
    }
}

/// From where the functions are straight lines to where they are zero.
#[test]
fn numbers_of_all_magnitudes() {
    for largest in [1e-15, 1e-6, 0.1, 1.0, 10.0, 30.0, 100.0, 1e4, 1e10] {
        for f in ACTIVATIONS {
            let case = |what| format!("{what} {f:?} up to {largest:e}");
            check(&case("activate"), |pass| {
                plain(pass, f, [17, 33], largest, false)
            });
            check(&case("gate"), |pass| {
                gated(pass, f, [17, 33], largest, false)
            });
        }
    }
}

#[test]
fn special_numbers() {
    let device = device();
    let special = [f64::NAN, f64::INFINITY, 0.0, -0.0, 1e30, -1e30, 1e-40];
    for dtype in [DType::F32, DType::F64] {
        for f in ACTIVATIONS {
            let run = |by| {
                // In a whole vector and behind it.
                let special = TensorData::new(special.repeat(5), [35]);
                let x = Tensor::<1>::from_data(special, (&device, dtype));
                numbers(activate_by(by, f, x, None))
            };
            let (expected, got) = (run(Implementation::Reference), run(Implementation::Native));
            for (expected, got) in expected.into_iter().zip(got) {
                let same = expected == got || (expected.is_nan() && got.is_nan());
                let small = (expected - got).abs() < 1e-40;
                assert!(
                    same || small,
                    "{f:?}, {dtype:?}: {got}, expected {expected}"
                );
            }
        }
    }
}

#[test]
fn any_number_of_axes_and_strides() {
    fn of<const D: usize>(dims: [usize; D]) {
        check(&format!("gate of {dims:?}"), |pass| {
            let biases = ["gate bias", "up bias"].map(|name| pass.leaf(name, [dims[D - 1]]));
            let [gate, up] = ["gate", "up"].map(|name| pass.leaf(name, dims));
            let y = gate_by(pass.by, Activation::Silu, gate, up, Some(biases));
            pass.output("y", y);
        });
        check(&format!("activate of {dims:?}"), |pass| {
            let x = pass.leaf("x", dims);
            let y = activate_by(pass.by, Activation::Gelu, x, None);
            pass.output("y", y);
        });
    }
    of([3]);
    of([4, 3]);
    of([2, 4, 3]);
    of([2, 1, 4, 3]);
    of([2, 3, 1, 4, 3]);
    check("strided", |pass| {
        let gate = pass.leaf("gate", [17, 5]).transpose();
        let up = pass.leaf("up", [5, 20]).narrow(1, 2, 17);
        let y = gate_by(pass.by, Activation::Gelu, gate, up, None);
        pass.output("y", y.transpose());
    });
    check("the two halves of one product", |pass| {
        let x = pass.leaf("x", [5, 34]);
        let (gate, up) = (x.clone().narrow(1, 0, 17), x.narrow(1, 17, 17));
        let y = gate_by(pass.by, Activation::Silu, gate, up, None);
        pass.output("y", y);
    });
}

#[test]
fn inputs_without_a_gradient() {
    for wanted in 0..4 {
        check(&format!("gate, wanted {wanted}"), |pass| {
            let mut input = |name, i: usize| match wanted == i {
                true => pass.leaf(name, [5, 17]),
                false => pass.constant_of([5, 17], |_, x| x),
            };
            let (gate, up) = (input("gate", 0), input("up", 1));
            let mut bias = |name, i: usize| match wanted == i {
                true => pass.leaf(name, [17]),
                false => pass.constant_of([17], |_, x| x),
            };
            let biases = [bias("gate bias", 2), bias("up bias", 3)];
            let y = gate_by(pass.by, Activation::Silu, gate, up, Some(biases));
            pass.output("y", y);
        });
    }
}

#[test]
fn nothing_at_all() {
    let device = device();
    for dims in [[0, 3], [3, 0]] {
        let x = Tensor::<2>::ones(dims, &device);
        let bias = Tensor::ones([dims[1]], &device);
        assert_eq!(
            activate(Activation::Gelu, x.clone(), Some(bias)).dims(),
            dims
        );
        assert_eq!(gate(Activation::Gelu, x.clone(), x, None).dims(), dims);
    }
}

#[test]
fn sixteen_bits() {
    for f in ACTIVATIONS {
        for bias in [false, true] {
            let case = |what| format!("{what} {f:?}, bias {bias}");
            check_sixteen_bits(&case("activate"), 0.5, |pass| {
                plain(pass, f, [17, 33], 3.0, bias)
            });
            check_sixteen_bits(&case("gate"), 0.5, |pass| {
                gated(pass, f, [17, 33], 3.0, bias)
            });
        }
    }
}

#[test]
fn bits_are_always_the_same() {
    for f in ACTIVATIONS {
        check_bits(&format!("activate {f:?}"), |pass| {
            plain(pass, f, [1000, 65], 3.0, true)
        });
        check_bits(&format!("gate {f:?}"), |pass| {
            gated(pass, f, [1000, 65], 3.0, true)
        });
    }
}

#[test]
fn swiglu_of_burn() {
    let device = device().autodiff();
    let layer = SwiGluConfig::new(17, 33).with_bias(true).init(&device);
    let run = |forward: &dyn Fn(Tensor<2>) -> Tensor<2>| {
        let x = random([5, 17], 1, DType::F32, &device).require_grad();
        let y = forward(x.clone());
        let gradients = (y.clone() * random([5, 33], 2, DType::F32, &device))
            .sum()
            .backward();
        [y.into_data(), x.grad(&gradients).unwrap().into_data()]
    };
    let expected = run(&|x| layer.forward(x));
    let got = run(&|x| {
        let layers = [&layer.linear_inner, &layer.linear_outer];
        let bias = |i: usize| layers[i].bias.as_ref().map(|bias| bias.val());
        let [a, b] = linears(x, layers.map(|layer| (layer.weight.val(), None)));
        let biases = bias(0).zip(bias(1)).map(|(a, b)| [a, b]);
        gate(Activation::Silu, a, b, biases)
    });
    for (got, expected) in got.iter().zip(&expected) {
        assert!(largest_difference(got, expected) <= 1e-6);
    }
}

proptest! {
    #![proptest_config(same_cases(4))]

    #[test]
    fn any_shape(
        dims in (1..60_usize, 1..70_usize),
        f in prop::sample::select(&ACTIVATIONS),
        largest in prop::sample::select(&[0.5, 4.0, 20.0]),
        bias in any::<bool>(),
        is_gate in any::<bool>(),
    ) {
        check(&format!("{f:?} {dims:?} {largest} {bias} {is_gate}"), |pass| match is_gate {
            true => gated(pass, f, dims.into(), largest, bias),
            false => plain(pass, f, dims.into(), largest, bias),
        });
    }
}

#[test]
#[should_panic(expected = "width: the bias has 4 components, the input 3")]
fn the_bias_is_as_wide_as_the_input() {
    let device = device();
    activate(
        Activation::Relu,
        Tensor::<2>::ones([2, 3], &device),
        Some(Tensor::ones([4], &device)),
    );
}

#[test]
#[should_panic(expected = "the shapes of gate and up differ")]
fn gate_and_up_have_one_shape() {
    let device = device();
    let [a, b] = [[2, 3], [3, 2]].map(|dims| Tensor::<2>::ones(dims, &device));
    gate(Activation::Relu, a, b, None);
}

#[test]
#[should_panic(expected = "width: the bias has 2 components, the input 3")]
fn the_second_bias_is_as_wide_as_the_input() {
    let device = device();
    let x = Tensor::<2>::ones([2, 3], &device);
    let biases = [3, 2].map(|n| Tensor::ones([n], &device));
    gate(Activation::Relu, x.clone(), x, Some(biases));
}
