//! `linear` and `linears`.

use burn::{
    nn::LinearConfig,
    tensor::{DType, Tensor},
};
use emberlm_core::operators::{linear, linear_by, linears, linears_by, project, project_all};
use emberlm_testkit::{
    assert_close, device, gradients_by_name, largest_difference, random, same_cases,
};
use proptest::prelude::*;

use crate::common::{
    N_ROWS, Pass, WIDTHS, check, check_all, check_bits, check_long_sums, check_sixteen_bits,
};

/// A projection of `[n_rows, d_input]`.
fn one(pass: &mut Pass, [n_rows, d_input, d_output]: [usize; 3], bias: bool) {
    let x = pass.leaf("x", [n_rows, d_input]);
    let weight = pass.leaf("weight", [d_input, d_output]);
    let bias = bias.then(|| pass.leaf("bias", [d_output]));
    let y = linear_by(pass.by, x, weight, bias);
    pass.output("y", y);
}

/// Three projections, of which some have a bias and some are used.
fn three(
    pass: &mut Pass,
    [n_rows, d_input]: [usize; 2],
    widths: [usize; 3],
    has_bias: [bool; 3],
    used: [bool; 3],
) {
    let x = pass.leaf("x", [n_rows, d_input]);
    let names = [
        ["weight 0", "bias 0"],
        ["weight 1", "bias 1"],
        ["weight 2", "bias 2"],
    ];
    let projections = [0, 1, 2].map(|i| {
        let weight = pass.leaf(names[i][0], [d_input, widths[i]]);
        let bias = has_bias[i].then(|| pass.leaf(names[i][1], [widths[i]]));
        (weight, bias)
    });
    let outputs = linears_by(pass.by, x, projections);
    for ((y, name), used) in outputs.into_iter().zip(["y 0", "y 1", "y 2"]).zip(used) {
        if used {
            pass.output(name, y);
        }
    }
}

#[test]
fn one_projection_at_odd_sizes() {
    for n_rows in N_ROWS {
        for (i, d_input) in WIDTHS.into_iter().enumerate() {
            // Each width comes as an input and as an output, with another each time.
            let d_output = WIDTHS[(3 * i + n_rows) % WIDTHS.len()];
            if n_rows * d_input * d_output > 10_000_000 {
                continue;
            }
            for bias in [false, true] {
                let sizes = [n_rows, d_input, d_output];
                check_long_sums(&format!("linear {sizes:?}, bias {bias}"), |pass| {
                    one(pass, sizes, bias);
                });
            }
        }
    }
}

#[test]
fn gradients_are_slopes() {
    for sizes in [[1, 1, 1], [3, 17, 5], [17, 3, 33]] {
        for bias in [false, true] {
            check_all(&format!("linear {sizes:?}"), |pass| one(pass, sizes, bias));
        }
    }
    check_all("linears", |pass| {
        three(pass, [5, 7], [3, 17, 1], [true, false, true], [true; 3])
    });
}

#[test]
fn several_projections() {
    for (sizes, widths) in [
        ([1, 1], [1, 3, 17]),
        ([3, 17], [8, 1, 33]),
        ([17, 31], [64, 16, 16]),
        ([1000, 17], [17, 3, 65]),
        ([33, 1000], [5, 9, 1]),
    ] {
        for has_bias in [[false; 3], [true; 3], [false, true, false]] {
            check_long_sums(
                &format!("linears {sizes:?} {widths:?} {has_bias:?}"),
                |pass| {
                    three(pass, sizes, widths, has_bias, [true; 3]);
                },
            );
        }
    }
}

#[test]
fn outputs_that_are_not_used() {
    for used in [
        [true, false, false],
        [false, true, false],
        [false, false, true],
        [true, false, true],
    ] {
        for has_bias in [[false; 3], [true; 3]] {
            check_all(&format!("linears, used {used:?}"), |pass| {
                three(pass, [5, 7], [3, 17, 4], has_bias, used);
            });
        }
    }
}

/// The step of a tensor that was computed takes its gradient, even if that is none.
#[test]
fn computed_parameters_of_an_output_that_is_not_used() {
    check_all("an unused transposed weight", |pass| {
        let x = pass.leaf("x", [5, 7]);
        let used = pass.leaf("used", [7, 3]);
        let unused = pass.leaf("unused", [4, 7]).transpose();
        let bias = pass.leaf("bias", [4]) * 2.0;
        let [y, _] = linears_by(pass.by, x, [(used, None), (unused, Some(bias))]);
        pass.output("y", y);
    });
}

#[test]
fn two_projections() {
    check_all("two linears", |pass| {
        let x = pass.leaf("x", [5, 7]);
        let a = (pass.leaf("a", [7, 3]), None);
        let b = (pass.leaf("b", [7, 9]), Some(pass.leaf("bias", [9])));
        let [y, z] = linears_by(pass.by, x, [a, b]);
        pass.output("y", y);
        pass.output("z", z);
    });
}

#[test]
fn any_strides() {
    for sizes in [[1, 3, 17], [17, 33, 5], [33, 8, 16], [200, 65, 17]] {
        let [n_rows, d_input, d_output] = sizes;
        check(&format!("transposed weight {sizes:?}"), |pass| {
            let x = pass.leaf("x", [n_rows, d_input]);
            let weight = pass.leaf("weight", [d_output, d_input]).transpose();
            let bias = pass.leaf("bias", [d_output]);
            let y = linear_by(pass.by, x, weight, Some(bias));
            pass.output("y", y);
        });
        check(&format!("transposed x {sizes:?}"), |pass| {
            let x = pass.leaf("x", [d_input, n_rows]).transpose();
            let weight = pass.leaf("weight", [d_input, d_output]);
            let y = linear_by(pass.by, x, weight, None);
            pass.output("y", y);
        });
        check(&format!("swapped axes of x {sizes:?}"), |pass| {
            let x = pass.leaf("x", [n_rows, 3, d_input]).swap_dims(0, 1);
            let weight = pass.leaf("weight", [d_input, d_output]);
            let y = linear_by(pass.by, x, weight, None);
            pass.output("y", y);
        });
        check(
            &format!("a part of x and of the weight {sizes:?}"),
            |pass| {
                let x = pass.leaf("x", [n_rows, d_input + 5]).narrow(1, 3, d_input);
                let weight = pass.leaf("weight", [d_input + 2, d_output + 4]);
                let weight = weight.narrow(0, 1, d_input).narrow(1, 3, d_output);
                let y = linear_by(pass.by, x, weight, None);
                pass.output("y", y);
            },
        );
        check(&format!("a repeated row {sizes:?}"), |pass| {
            let x = pass.leaf("x", [1, d_input]).expand([n_rows, d_input]);
            let weight = pass.leaf("weight", [d_input, d_output]);
            let y = linear_by(pass.by, x, weight, None);
            // Not as it is: its gradient has strides of its own then.
            pass.output("y", y.transpose());
        });
    }
}

#[test]
fn any_number_of_axes() {
    fn of<const D: usize>(dims: [usize; D]) {
        check_all(&format!("linear of {dims:?}"), |pass| {
            let x = pass.leaf("x", dims);
            let weight = pass.leaf("weight", [dims[D - 1], 5]);
            let bias = pass.leaf("bias", [5]);
            let y = linear_by(pass.by, x, weight, Some(bias));
            assert_eq!(y.dims()[..D - 1], dims[..D - 1]);
            pass.output("y", y);
        });
    }
    of([3]);
    of([4, 3]);
    of([2, 4, 3]);
    of([2, 1, 4, 3]);
    of([2, 3, 1, 4, 3]);
}

#[test]
fn parameters_without_a_gradient() {
    check("only x", |pass| {
        let x = pass.leaf("x", [5, 7]);
        let (weight, bias) = (
            pass.constant_of([7, 3], |_, x| x),
            pass.constant_of([3], |_, x| x),
        );
        let y = linear_by(pass.by, x, weight, Some(bias));
        pass.output("y", y);
    });
    check("only the weight", |pass| {
        let x = pass.constant_of([5, 7], |_, x| x);
        let weight = pass.leaf("weight", [7, 3]);
        let y = linear_by(pass.by, x, weight, None);
        pass.output("y", y);
    });
    check("only the bias", |pass| {
        let x = pass.constant_of([5, 7], |_, x| x);
        let weight = pass.constant_of([7, 3], |_, x| x);
        let bias = pass.leaf("bias", [3]);
        let y = linear_by(pass.by, x, weight, Some(bias));
        pass.output("y", y);
    });
    check("the second of two", |pass| {
        let x = pass.leaf("x", [5, 7]);
        let frozen = pass.constant_of([7, 3], |_, x| x);
        let trained = pass.leaf("weight", [7, 4]);
        let [y, z] = linears_by(pass.by, x, [(frozen, None), (trained, None)]);
        pass.output("y", y);
        pass.output("z", z);
    });
}

#[test]
fn one_weight_twice() {
    check("a shared weight", |pass| {
        let x = pass.leaf("x", [5, 7]);
        let weight = pass.leaf("weight", [7, 3]);
        let [y, z] = linears_by(pass.by, x, [(weight.clone(), None), (weight, None)]);
        pass.output("y", y);
        pass.output("z", z);
    });
}

#[test]
fn nothing_to_add() {
    let device = device();
    let ones = |dims: [usize; 2]| Tensor::<2>::ones(dims, &device);
    // Of no components the sum is zero, and the bias is left.
    let y = linear(ones([3, 0]), ones([0, 4]), Some(Tensor::ones([4], &device)));
    assert_close(y, ones([3, 4]), 0.0);
    let y = linear(ones([3, 0]), ones([0, 4]), None);
    assert_close(y, Tensor::zeros([3, 4], &device), 0.0);
    assert_eq!(linear(ones([0, 3]), ones([3, 4]), None).dims(), [0, 4]);
    assert_eq!(linear(ones([3, 4]), ones([4, 0]), None).dims(), [3, 0]);
}

#[test]
fn sixteen_bits() {
    // The products are summed in f32 and rounded once.
    for has_bias in [[false; 3], [true; 3]] {
        check_sixteen_bits("linears", 0.5, |pass| {
            three(pass, [33, 65], [17, 8, 3], has_bias, [true; 3]);
        });
    }
    check_sixteen_bits("transposed weight", 0.5, |pass| {
        let x = pass.leaf("x", [33, 65]);
        let weight = pass.leaf("weight", [17, 65]).transpose();
        let y = linear_by(pass.by, x, weight, None);
        pass.output("y", y);
    });
}

#[test]
fn bits_are_always_the_same() {
    check_bits("linears", |pass| {
        three(pass, [1000, 65], [65, 17, 200], [true; 3], [true; 3]);
    });
    check_bits("long sums", |pass| one(pass, [130, 1000, 65], true));
}

#[test]
fn the_layers_of_burn() {
    let device = device().autodiff();
    let layer = |seed: u64| {
        let layer = LinearConfig::new(17, 9).init(&device);
        let weight = random([17, 9], seed, DType::F32, &device);
        let bias = random([9], seed + 1, DType::F32, &device);
        let mut record = layer;
        record.weight = record.weight.map(|_| weight.require_grad());
        record.bias = record.bias.map(|old| old.map(|_| bias.require_grad()));
        record
    };
    let layers = [layer(1), layer(3)];
    let run = |forward: &dyn Fn(Tensor<3>) -> [Tensor<3>; 2]| {
        let x = random([2, 5, 17], 5, DType::F32, &device).require_grad();
        let [a, b] = forward(x.clone());
        let loss = (a.clone() * b.clone()).sum();
        let gradients = loss.backward();
        let mut results = vec![
            a.into_data(),
            b.into_data(),
            x.grad(&gradients).unwrap().into_data(),
        ];
        for layer in &layers {
            results.extend(gradients_by_name(layer, &gradients).into_values());
        }
        results
    };
    let expected = run(&|x| [layers[0].forward(x.clone()), layers[1].forward(x)]);
    assert_eq!(expected.len(), 7);
    let each = run(&|x| [project(&layers[0], x.clone()), project(&layers[1], x)]);
    let all = run(&|x| project_all([&layers[0], &layers[1]], x));
    for got in [each, all] {
        for (got, expected) in got.iter().zip(&expected) {
            assert!(largest_difference(got, expected) <= 1e-6);
        }
    }
}

proptest! {
    #![proptest_config(same_cases(4))]

    #[test]
    fn any_projections(
        sizes in (1..60_usize, 1..70_usize),
        widths in any::<[prop::sample::Index; 3]>(),
        has_bias in any::<[bool; 3]>(),
        used in 1..8_usize,
    ) {
        let widths = widths.map(|width| 1 + width.index(70));
        let used = [0, 1, 2].map(|i| used >> i & 1 == 1);
        check(&format!("linears {sizes:?} {widths:?} {has_bias:?} {used:?}"), |pass| {
            three(pass, sizes.into(), widths, has_bias, used);
        });
    }
}

#[test]
#[should_panic(expected = "d_input: the input has 3 components, the weight 4")]
fn the_input_is_as_wide_as_the_weight() {
    let device = device();
    linear(
        Tensor::<2>::ones([2, 3], &device),
        Tensor::ones([4, 5], &device),
        None,
    );
}

#[test]
#[should_panic(expected = "d_output: the bias has 4, the weight 5")]
fn the_bias_is_as_wide_as_the_weight() {
    let device = device();
    let [x, weight] = [[2, 3], [3, 5]].map(|dims| Tensor::<2>::ones(dims, &device));
    linear(x, weight, Some(Tensor::ones([4], &device)));
}

#[test]
#[should_panic(expected = "inputs: an operator takes 1 to 7 tensors, got 9")]
fn four_projections_with_a_bias_are_too_many() {
    let device = device().autodiff();
    let projection = || {
        let weight = Tensor::<2>::ones([3, 5], &device);
        (weight.require_grad(), Some(Tensor::ones([5], &device)))
    };
    linears(
        Tensor::<2>::ones([2, 3], &device),
        [(); 4].map(|()| projection()),
    );
}
