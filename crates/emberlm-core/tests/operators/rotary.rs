//! `rotate`.

use burn::tensor::Tensor;
use emberlm_core::{
    RotaryLayout,
    operators::{Rotation, rotate, rotate_by},
};
use emberlm_testkit::{device, same_cases};
use proptest::prelude::*;

use crate::common::{Pass, check, check_all, check_bits, check_sixteen_bits, numbers};

const LAYOUTS: [RotaryLayout; 2] = [RotaryLayout::HalfSplit, RotaryLayout::Interleaved];

fn rotation(layout: RotaryLayout, n_pairs: usize, first_position: usize) -> Rotation {
    let frequency = |i: usize| 100f64.powf(-(i as f64) / n_pairs as f64);
    Rotation {
        frequencies: (0..n_pairs).map(frequency).collect(),
        layout,
        first_position,
        attention_factor: 1.0,
    }
}

/// As YaRN has it.
fn with_factor(rotation: Rotation) -> Rotation {
    Rotation {
        attention_factor: 1.3,
        ..rotation
    }
}

fn one(pass: &mut Pass, dims: [usize; 4], rotation: &Rotation) {
    let x = pass.leaf("x", dims);
    let [y] = rotate_by(pass.by, [x], rotation);
    assert_eq!(y.dims(), dims);
    pass.output("y", y);
}

#[test]
fn all_widths_and_numbers_of_pairs() {
    for layout in LAYOUTS {
        for d_head in [1, 2, 3, 7, 8, 15, 16, 17, 32, 33, 64, 65, 128] {
            for n_pairs in [0, 1, d_head / 4, d_head / 2] {
                if 2 * n_pairs > d_head {
                    continue;
                }
                let plain = rotation(layout, n_pairs, 3);
                for rotation in [plain.clone(), with_factor(plain)] {
                    let factor = rotation.attention_factor;
                    let case = format!("{layout:?}, {n_pairs} pairs of {d_head} times {factor}");
                    check(&case, |pass| one(pass, [2, 3, 5, d_head], &rotation));
                }
            }
        }
    }
}

#[test]
fn all_lengths_and_positions() {
    for layout in LAYOUTS {
        for seq_length in [1, 3, 17, 1000] {
            for first_position in [0, 1, 4097] {
                let rotation = rotation(layout, 3, first_position);
                let case = format!("{layout:?}, length {seq_length} from {first_position}");
                check(&case, |pass| one(pass, [1, 2, seq_length, 7], &rotation));
            }
        }
    }
}

#[test]
fn gradients_are_slopes() {
    for layout in LAYOUTS {
        // The last turns 4 of 9 components.
        for (dims, n_pairs) in [
            ([1, 1, 1, 1], 0),
            ([2, 3, 5, 6], 3),
            ([1, 2, 3, 7], 3),
            ([1, 2, 3, 9], 2),
        ] {
            let plain = rotation(layout, n_pairs, 7);
            for rotation in [plain.clone(), with_factor(plain)] {
                check_all(&format!("{dims:?} {rotation:?}"), |pass| {
                    one(pass, dims, &rotation)
                });
            }
        }
    }
}

/// Queries of a whole sequence and keys of another length and number of heads, all or some of them used.
fn several(pass: &mut Pass, rotation: &Rotation, used: [bool; 3]) {
    let queries = pass.leaf("queries", [2, 4, 5, 10]);
    let keys = pass.leaf("keys", [2, 1, 9, 8]);
    // As heads come out of a projection.
    let others = pass.leaf("others", [2, 3, 2, 9]).swap_dims(1, 2);
    let outputs = rotate_by(pass.by, [queries, keys, others], rotation);
    for ((output, name), used) in outputs.into_iter().zip(["q", "k", "o"]).zip(used) {
        if used {
            pass.output(name, output);
        }
    }
}

#[test]
fn several_inputs() {
    for layout in LAYOUTS {
        let rotation = with_factor(rotation(layout, 4, 2));
        for used in [
            [true; 3],
            [true, false, false],
            [false, true, false],
            [false, true, true],
        ] {
            check_all(&format!("{layout:?}, used {used:?}"), |pass| {
                several(pass, &rotation, used)
            });
        }
    }
}

#[test]
fn lengths_and_angles_are_kept() {
    for layout in LAYOUTS {
        let there = rotation(layout, 4, 9);
        let x = emberlm_testkit::random([1, 2, 3, 9], 1, burn::tensor::DType::F64, &device());
        let [y] = rotate([x.clone()], &there);
        let norm = |x: Tensor<4>| numbers(x.clone() * x).iter().sum::<f64>();
        assert!((norm(x.clone()) / norm(y.clone()) - 1.0).abs() < 1e-14);
        // Turning by no angle changes nothing.
        let nowhere = Rotation {
            frequencies: vec![0.0; 4],
            ..there
        };
        let [same] = rotate([x.clone()], &nowhere);
        assert_eq!(same.into_data(), x.clone().into_data());
        // A factor is one of the turned components, which are the first eight.
        let doubled = Rotation {
            attention_factor: 2.0,
            ..nowhere
        };
        let [twice] = rotate([x.clone()], &doubled);
        let expected = Tensor::cat(vec![x.clone().narrow(3, 0, 8) * 2.0, x.narrow(3, 8, 1)], 3);
        assert_eq!(twice.into_data(), expected.into_data());
    }
}

#[test]
fn no_rows() {
    let x = || Tensor::<4>::ones([2, 3, 0, 8], &device());
    let [a, b] = rotate([x(), x()], &rotation(RotaryLayout::HalfSplit, 4, 0));
    assert_eq!([a.dims(), b.dims()], [[2, 3, 0, 8]; 2]);
}

#[test]
fn sixteen_bits() {
    for layout in LAYOUTS {
        let rotation = with_factor(rotation(layout, 4, 2));
        check_sixteen_bits(&format!("{layout:?}"), 0.5, |pass| {
            several(pass, &rotation, [true; 3])
        });
    }
}

#[test]
fn bits_are_always_the_same() {
    for layout in LAYOUTS {
        let rotation = with_factor(rotation(layout, 16, 2));
        check_bits(&format!("{layout:?}"), |pass| {
            one(pass, [3, 4, 100, 33], &rotation)
        });
    }
}

proptest! {
    #![proptest_config(same_cases(4))]

    #[test]
    fn any_shape(
        (batch_size, n_heads, seq_length, d_head) in (1..4_usize, 1..6_usize, 1..30_usize, 1..70_usize),
        pairs in any::<prop::sample::Index>(),
        first_position in 0..5000_usize,
        layout in prop::sample::select(&LAYOUTS),
        attention_factor in prop::sample::select(&[1.0, 0.7, 1.3]),
    ) {
        let rotation = Rotation {
            attention_factor,
            ..rotation(layout, pairs.index(d_head / 2 + 1), first_position)
        };
        let dims = [batch_size, n_heads, seq_length, d_head];
        check(&format!("{dims:?} {rotation:?}"), |pass| one(pass, dims, &rotation));
    }
}

#[test]
#[should_panic(expected = "d_head: 8 components are to be turned, the input has 7")]
fn more_pairs_than_components() {
    let x = Tensor::<4>::ones([1, 1, 2, 7], &device());
    rotate([x], &rotation(RotaryLayout::HalfSplit, 4, 0));
}
