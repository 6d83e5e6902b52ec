//! `grouped_matmul`, `grouped_matmuls`, `combine` and `experts`, which is all of them.

use burn::tensor::{DType, Device, Tensor};
use emberlm_core::{
    Activation,
    operators::{
        ExpertRows, ExpertWeights, Implementation, combine_by, experts_by, grouped_matmul,
        grouped_matmuls_by,
    },
};
use emberlm_testkit::{device, random};

use crate::common::{
    Pass, check, check_all, check_bits, check_f64, check_long_sums, check_sixteen_bits,
};

/// One product, or two of the same rows.
fn groups(pass: &mut Pass, [d_input, d_output]: [usize; 2], sizes: &[usize], bias: bool) {
    let n_groups = sizes.len();
    let x = pass.leaf("x", [sizes.iter().sum(), d_input]);
    let names = [["weight 0", "bias 0"], ["weight 1", "bias 1"]];
    let projections = [0, 1].map(|i| {
        let width = d_output + i;
        let weight = pass.leaf(names[i][0], [n_groups, d_input, width]);
        let bias = bias.then(|| pass.leaf(names[i][1], [n_groups, width]));
        (weight, bias)
    });
    let [first, second] = grouped_matmuls_by(pass.by, x, projections, sizes);
    pass.output("first", first);
    pass.output("second", second);
}

/// Rows of random targets, of which some have none.
fn rows_of_targets(pass: &mut Pass, [n_rows, width, n_targets]: [usize; 3]) {
    let x = pass.leaf("x", [n_rows, width]);
    let weights = pass.leaf("weights", [n_rows]);
    let targets: Vec<usize> = (0..n_rows).map(|row| row * row * 7 % n_targets).collect();
    pass.output("y", combine_by(pass.by, x, weights, &targets, n_targets));
}

/// The whole way through experts, with and without a gate.
fn through_experts(
    pass: &mut Pass,
    [n_tokens, d_model, d_ff]: [usize; 3],
    group_sizes: &[usize],
    activation: Activation,
    gated: bool,
) {
    let (n_experts, n_rows) = (group_sizes.len(), group_sizes.iter().sum());
    let x = pass.leaf("x", [n_tokens, d_model]);
    let weights = pass.leaf("weights", [n_rows]);
    let layers = ExpertWeights {
        gate: gated.then(|| pass.leaf("gate", [n_experts, d_model, d_ff])),
        up: pass.leaf("up", [n_experts, d_model, d_ff]),
        down: pass.leaf("down", [n_experts, d_ff, d_model]),
    };
    let tokens: Vec<usize> = (0..n_rows).map(|row| row * row * 7 % n_tokens).collect();
    let tokens = &tokens;
    let rows = ExpertRows {
        tokens,
        group_sizes,
    };
    let y = experts_by(pass.by, x, weights, rows, layers, activation);
    pass.output("y", y);
}

const SIZES: [&[usize]; 6] = [
    &[1],
    &[0, 3, 0, 1],
    &[5, 0, 17, 2],
    &[33, 1, 1, 64, 0],
    // More groups than are worked on one after the other.
    &[3, 0, 5, 1, 2, 9, 1, 1, 4, 8, 2, 0, 7, 1, 3, 3, 2, 1, 6, 1],
    &[700, 300],
];

#[test]
fn groups_at_odd_sizes() {
    for sizes in SIZES {
        for widths in [[1, 1], [3, 17], [17, 8], [65, 31]] {
            for bias in [false, true] {
                check_long_sums(&format!("{sizes:?} {widths:?}, bias {bias}"), |pass| {
                    groups(pass, widths, sizes, bias);
                });
            }
        }
    }
}

#[test]
fn experts_at_odd_sizes() {
    for sizes in &SIZES[..5] {
        for widths in [[1, 1, 1], [5, 3, 17], [40, 17, 8], [9, 65, 31]] {
            for gated in [false, true] {
                check(&format!("{sizes:?} {widths:?}, gated {gated}"), |pass| {
                    through_experts(pass, widths, sizes, Activation::Silu, gated);
                });
            }
        }
    }
    // More rows, inner width and columns than are worked on at once.
    for gated in [false, true] {
        check_f64(&format!("several units, gated {gated}"), |pass| {
            through_experts(
                pass,
                [300, 150, 530],
                &[130, 20],
                Activation::GeluTanh,
                gated,
            );
        });
        let sizes = [1100, 129, 70, 20, 1, 0];
        check_f64(&format!("several parts, gated {gated}"), |pass| {
            through_experts(pass, [50, 10, 1030], &sizes, Activation::GeluTanh, gated);
        });
    }
}

/// Without autodiff nothing is kept for a backward pass.
#[test]
fn experts_without_autodiff_are_the_same() {
    let sizes = &[1100, 70, 0, 40, 1];
    let n_rows = sizes.iter().sum();
    let (n_tokens, d_model, d_ff) = (50, 24, 1030);
    let tokens: Vec<usize> = (0..n_rows).map(|row| row * row * 7 % n_tokens).collect();
    let of = |device: &Device, gated: bool| {
        let weight = |dims, seed| random(dims, seed, DType::F32, device);
        let layers = ExpertWeights {
            gate: gated.then(|| weight([5, d_model, d_ff], 1)),
            up: weight([5, d_model, d_ff], 2),
            down: weight([5, d_ff, d_model], 3),
        };
        let rows = ExpertRows {
            tokens: &tokens,
            group_sizes: sizes,
        };
        let x = random([n_tokens, d_model], 4, DType::F32, device);
        let weights = random([n_rows], 5, DType::F32, device);
        let by = Implementation::Native;
        let y = experts_by(by, x, weights, rows, layers, Activation::Silu);
        y.into_data().iter::<f32>().collect::<Vec<_>>()
    };
    for gated in [false, true] {
        let (plain, tracked) = (of(&device(), gated), of(&device().autodiff(), gated));
        assert_eq!(plain, tracked, "{gated}");
    }
}

#[test]
fn gradients_are_slopes() {
    for gated in [false, true] {
        check_all("experts", |pass| {
            through_experts(pass, [3, 5, 4], &[2, 0, 3, 1], Activation::Silu, gated);
        });
    }
    for bias in [false, true] {
        check_all("groups", |pass| groups(pass, [5, 3], &[2, 0, 3, 1], bias));
    }
    check_all("combine", |pass| rows_of_targets(pass, [7, 3, 5]));
}

#[test]
fn rows_go_to_their_targets() {
    for sizes in [
        [1, 1, 1],
        [3, 17, 5],
        [33, 8, 3],
        [1000, 65, 400],
        [5, 1, 9],
    ] {
        check(&format!("combine {sizes:?}"), |pass| {
            rows_of_targets(pass, sizes)
        });
    }
}

#[test]
fn the_number_of_threads_does_not_show() {
    check_bits("groups", |pass| groups(pass, [65, 33], SIZES[4], true));
    check_bits("combine", |pass| rows_of_targets(pass, [1000, 65, 400]));
    check_bits("experts", |pass| {
        through_experts(pass, [300, 150, 530], &[130, 20, 7], Activation::Silu, true);
    });
    // The fewer threads there are, the more often outputs are added up.
    check_bits("many experts", |pass| {
        through_experts(pass, [90, 1300, 3], &[130; 16], Activation::Silu, true);
    });
}

/// What needs no gradient is left out, and the others are as before.
#[test]
fn experts_of_which_some_are_frozen() {
    let device = device().autodiff();
    let (sizes, [n_tokens, d_model, d_ff]) = (&[3, 0, 140], [20, 6, 5]);
    let n_rows: usize = sizes.iter().sum();
    let tokens: Vec<usize> = (0..n_rows).map(|row| row % n_tokens).collect();
    let of = |wanted: [bool; 5]| {
        let weight = |i: usize, dims: [usize; 3]| {
            let tensor = random(dims, i as u64, DType::F64, &device);
            if wanted[i] {
                tensor.require_grad()
            } else {
                tensor
            }
        };
        let x = weight(0, [1, n_tokens, d_model]);
        let of_rows = weight(1, [1, 1, n_rows]);
        let gate = weight(2, [3, d_model, d_ff]);
        let up = weight(3, [3, d_model, d_ff]);
        let down = weight(4, [3, d_ff, d_model]);
        let layers = ExpertWeights {
            gate: Some(gate.clone()),
            up: up.clone(),
            down: down.clone(),
        };
        let rows = ExpertRows {
            tokens: &tokens,
            group_sizes: sizes,
        };
        let y = experts_by(
            Implementation::Native,
            x.clone().squeeze_dim(0),
            of_rows.clone().reshape([n_rows]),
            rows,
            layers,
            Activation::Silu,
        );
        let gradients = y.powi_scalar(2).sum().backward();
        [x, of_rows, gate, up, down].map(|leaf| leaf.grad(&gradients).map(|d| d.into_data()))
    };
    let all = of([true; 5]);
    assert!(all.iter().all(Option::is_some));
    for i in 0..5 {
        let mut wanted = [false; 5];
        wanted[i] = true;
        let found = of(wanted);
        for (j, (found, all)) in found.iter().zip(&all).enumerate() {
            let expected = if i == j { all.as_ref() } else { None };
            assert_eq!(found.as_ref(), expected, "input {j} where {i} is wanted");
        }
    }
}

#[test]
fn sixteen_bits() {
    check_sixteen_bits("groups", 0.5, |pass| groups(pass, [17, 8], SIZES[2], true));
    check_sixteen_bits("combine", 0.5, |pass| rows_of_targets(pass, [33, 8, 3]));
    check_sixteen_bits("experts", 0.5, |pass| {
        through_experts(pass, [20, 17, 8], SIZES[2], Activation::Relu, true);
    });
}

#[test]
fn groups_that_are_all_empty() {
    let device = device();
    let weight = random([3, 4, 5], 1, DType::F32, &device);
    for by in [
        Implementation::Reference,
        Implementation::Portable,
        Implementation::Native,
    ] {
        let x = Tensor::zeros([0, 4], &device);
        let [y] = grouped_matmuls_by(by, x, [(weight.clone(), None)], &[0, 0, 0]);
        assert_eq!(y.dims(), [0, 5]);
        let layers = ExpertWeights {
            gate: None,
            up: weight.clone(),
            down: weight.clone().transpose(),
        };
        let (x, rows) = (
            Tensor::ones([2, 4], &device),
            ExpertRows {
                tokens: &[],
                group_sizes: &[0, 0, 0],
            },
        );
        let none = Tensor::zeros([0], &device);
        let y = experts_by(by, x, none, rows, layers, Activation::Relu);
        assert_eq!(y.to_data().iter::<f32>().collect::<Vec<_>>(), [0.0; 8]);
    }
}

/// Without inner elements nothing comes out, and no gradient comes back.
#[test]
fn experts_without_an_inner_width() {
    for gated in [false, true] {
        let device = device().autodiff();
        let weight = |dims: [usize; 3]| Tensor::<3>::zeros(dims, &device).require_grad();
        let (up, down) = (weight([2, 4, 0]), weight([2, 0, 4]));
        let layers = ExpertWeights {
            gate: gated.then(|| weight([2, 4, 0])),
            up,
            down: down.clone(),
        };
        let rows = ExpertRows {
            tokens: &[0, 1, 0],
            group_sizes: &[2, 1],
        };
        let x = random([2, 4], 1, DType::F32, &device).require_grad();
        let weights = Tensor::<1>::ones([3], &device);
        let by = Implementation::Native;
        let y = experts_by(by, x.clone(), weights, rows, layers, Activation::Relu);
        let zeros = |of: Tensor<2>| of.into_data().iter::<f32>().all(|x| x == 0.0);
        assert!(zeros(y.clone()));
        let gradients = y.sum().backward();
        assert!(zeros(x.grad(&gradients).unwrap()));
        assert_eq!(down.grad(&gradients).unwrap().dims(), [2, 0, 4]);
    }
}

#[test]
#[should_panic(expected = "group_sizes: the groups have 4 rows, the input 3")]
fn the_sizes_of_the_groups_are_those_of_the_rows() {
    let x = Tensor::zeros([3, 2], &device());
    grouped_matmul(x, Tensor::zeros([2, 2, 2], &device()), None, &[1, 3]);
}

#[test]
#[should_panic(expected = "d_input: the input has 3 components, the weight 2")]
fn the_widths_must_agree() {
    let x = Tensor::zeros([4, 3], &device());
    grouped_matmul(x, Tensor::zeros([2, 2, 2], &device()), None, &[1, 3]);
}

#[test]
#[should_panic(expected = "targets: 5 is not below 5")]
fn targets_are_in_range() {
    let x = Tensor::zeros([2, 3], &device());
    let weights = Tensor::zeros([2], &device());
    combine_by(Implementation::Native, x, weights, &[0, 5], 5);
}

#[test]
#[should_panic(expected = "down: the shape is [1, 3, 3], not [1, 3, 2]")]
fn the_weights_of_experts_must_agree() {
    let device = device();
    let layers = ExpertWeights {
        gate: None,
        up: Tensor::zeros([1, 2, 3], &device),
        down: Tensor::zeros([1, 3, 3], &device),
    };
    let rows = ExpertRows {
        tokens: &[0],
        group_sizes: &[1],
    };
    let (x, weights) = (Tensor::zeros([1, 2], &device), Tensor::ones([1], &device));
    experts_by(
        Implementation::Native,
        x,
        weights,
        rows,
        layers,
        Activation::Relu,
    );
}
