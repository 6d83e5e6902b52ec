//! `grouped_matmul`, `grouped_matmuls` and `combine`.

use burn::tensor::{DType, Tensor};
use emberlm_core::operators::{Implementation, combine_by, grouped_matmul, grouped_matmuls_by};
use emberlm_testkit::{device, random};

use crate::common::{Pass, check, check_all, check_bits, check_long_sums, check_sixteen_bits};

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
fn gradients_are_slopes() {
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
}

#[test]
fn sixteen_bits() {
    check_sixteen_bits("groups", 0.5, |pass| groups(pass, [17, 8], SIZES[2], true));
    check_sixteen_bits("combine", 0.5, |pass| rows_of_targets(pass, [33, 8, 3]));
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
