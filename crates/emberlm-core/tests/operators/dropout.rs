//! `dropout` and `add_dropped`.

use burn::tensor::{DType, Tensor, TensorData};
use emberlm_core::{
    RandomKey, dropout,
    operators::{Implementation, add_dropped, add_dropped_by},
};
use emberlm_testkit::{device, random, same_cases};
use proptest::prelude::*;

use crate::common::{Pass, check, check_all, check_bits, check_sixteen_bits, numbers, sizes};

const IMPLEMENTATIONS: [Implementation; 3] = [
    Implementation::Reference,
    Implementation::Portable,
    Implementation::Native,
];

fn key() -> Option<RandomKey> {
    Some(RandomKey::new(7))
}

fn residual<const D: usize>(pass: &mut Pass, dims: [usize; D], rate: f64) {
    let [x, y] = ["x", "y"].map(|name| pass.leaf(name, dims));
    let sum = add_dropped_by(pass.by, x, y, rate, key());
    assert_eq!(sum.dims(), dims);
    pass.output("sum", sum);
}

#[test]
fn odd_sizes_and_rates() {
    for dims in sizes() {
        for rate in [0.0, 0.1, 0.9] {
            check(&format!("{dims:?}, rate {rate}"), |pass| {
                residual(pass, dims, rate)
            });
        }
    }
    check("one axis", |pass| residual(pass, [17], 0.5));
    check("five axes", |pass| residual(pass, [2, 3, 1, 4, 3], 0.5));
}

#[test]
fn gradients_are_slopes() {
    for rate in [0.0, 0.4] {
        check_all(&format!("rate {rate}"), |pass| {
            residual(pass, [3, 17], rate)
        });
    }
}

#[test]
fn the_mask_is_that_of_the_key() {
    let device = device().autodiff();
    for (dtype, rate) in [(DType::F32, 0.1), (DType::F32, 0.5), (DType::F64, 0.3)] {
        for n in [1, 17, 40_000] {
            let random_key = RandomKey::new(7);
            let expected = TensorData::new(
                (0..n)
                    .map(|i| match random_key.uniform(i) < rate {
                        true => 0.0,
                        false => 1.0 / (1.0 - rate),
                    })
                    .collect::<Vec<f64>>(),
                [n as usize],
            );
            let expected = expected.convert_dtype(dtype);
            let ones = Tensor::<1>::ones([n as usize], (&device, dtype)).require_grad();
            for by in IMPLEMENTATIONS {
                let zeros = ones.zeros_like().require_grad();
                let sum = add_dropped_by(by, zeros.clone(), ones.clone(), rate, key());
                assert_eq!(sum.to_data(), expected, "{by:?}");
                let gradients = sum.sum().backward();
                // The same mask on the way back, and none for the residual.
                assert_eq!(
                    ones.grad(&gradients).unwrap().into_data(),
                    expected,
                    "{by:?}"
                );
                let d_residual = zeros.grad(&gradients).unwrap().into_data();
                assert_eq!(d_residual, ones.to_data(), "{by:?}");
            }
            let alone = dropout(ones.clone(), rate, key());
            assert_eq!(alone.to_data(), expected);
            let gradients = alone.sum().backward();
            assert_eq!(ones.grad(&gradients).unwrap().into_data(), expected);
        }
    }
}

#[test]
fn what_is_dropped_is_zero_whatever_it_was() {
    let device = device().autodiff();
    let n = 100;
    let kept: Vec<bool> = numbers(dropout(Tensor::<1>::ones([n], &device), 0.5, key()))
        .into_iter()
        .map(|factor| factor != 0.0)
        .collect();
    for bad in [f32::INFINITY, f32::NAN] {
        for by in IMPLEMENTATIONS {
            let x = Tensor::<1>::full([n], bad, &device).require_grad();
            let sum = add_dropped_by(by, x.zeros_like(), x.clone(), 0.5, key());
            // What comes back may be infinite as well.
            let gradients = (sum.clone() * bad).sum().backward();
            for got in [numbers(sum), numbers(x.grad(&gradients).unwrap())] {
                for (got, kept) in got.into_iter().zip(&kept) {
                    let right = if *kept { !got.is_finite() } else { got == 0.0 };
                    assert!(right, "{by:?}: {got} of {bad}, kept: {kept}");
                }
            }
        }
    }
}

#[test]
fn nothing_is_dropped_without_a_key() {
    let device = device();
    let [x, y] = [1, 2].map(|seed| random([3, 5], seed, DType::F32, &device));
    let sum = (x.clone() + y.clone()).into_data();
    for (rate, key) in [(0.5, None), (0.0, key())] {
        assert_eq!(
            add_dropped(x.clone(), y.clone(), rate, key).into_data(),
            sum
        );
        assert_eq!(dropout(x.clone(), rate, key).into_data(), x.to_data());
    }
}

#[test]
fn any_strides() {
    check("strided", |pass| {
        let x = pass.leaf("x", [17, 5]).transpose();
        let y = pass.leaf("y", [5, 20]).narrow(1, 2, 17);
        let sum = add_dropped_by(pass.by, x, y, 0.3, key());
        pass.output("sum", sum.transpose());
    });
    check("only the residual", |pass| {
        let x = pass.leaf("x", [5, 17]);
        let y = pass.constant_of([5, 17], |_, x| x);
        let sum = add_dropped_by(pass.by, x, y, 0.3, key());
        pass.output("sum", sum);
    });
    check("only the branch", |pass| {
        let x = pass.constant_of([5, 17], |_, x| x);
        let y = pass.leaf("y", [5, 17]);
        let sum = add_dropped_by(pass.by, x, y, 0.3, key());
        pass.output("sum", sum);
    });
}

#[test]
fn sixteen_bits() {
    check_sixteen_bits("add_dropped", 0.5, |pass| residual(pass, [17, 33], 0.3));
}

#[test]
fn bits_are_always_the_same() {
    check_bits("add_dropped", |pass| residual(pass, [1000, 65], 0.3));
}

proptest! {
    #![proptest_config(same_cases(4))]

    #[test]
    fn any_shape(dims in (1..60_usize, 1..70_usize), rate in 0.0..0.95_f64) {
        check(&format!("{dims:?}, rate {rate}"), |pass| {
            residual(pass, <[usize; 2]>::from(dims), rate);
        });
    }
}

#[test]
#[should_panic(expected = "dropout rate must be at least 0 and below 1, got 1")]
fn everything_is_not_dropped() {
    dropout(Tensor::<1>::ones([2], &device()), 1.0, key());
}

#[test]
#[should_panic(expected = "the shapes of the two summands differ")]
fn summands_have_one_shape() {
    let [x, y] = [[2, 3], [3, 2]].map(|dims| Tensor::<2>::ones(dims, &device()));
    add_dropped(x, y, 0.5, key());
}
