//! `embed`.

use burn::tensor::{DType, Int, Tensor};
use emberlm_core::operators::{embed, embed_by};
use emberlm_testkit::{device, random, same_cases};
use proptest::prelude::*;

use crate::common::{
    N_ROWS, Pass, WIDTHS, check, check_all, check_bits, check_sixteen_bits, numbers,
};

/// Tokens `[batch_size, seq_length]` of a table; positions from the given one on, of `seq_length + 5`.
fn lookup(
    pass: &mut Pass,
    [vocab_size, width]: [usize; 2],
    tokens: [usize; 2],
    first_position: Option<usize>,
) {
    let table = pass.leaf("table", [vocab_size, width]);
    let [_, seq_length] = tokens;
    let tokens = pass.tokens(tokens, vocab_size);
    let positions =
        first_position.map(|first| (pass.leaf("positions", [seq_length + 5, width]), first));
    let y = embed_by(pass.by, table, tokens, positions);
    pass.output("y", y);
}

#[test]
fn odd_sizes() {
    for vocab_size in N_ROWS {
        for width in WIDTHS {
            for (tokens, first_position) in [([1, 1], None), ([2, 7], Some(3)), ([3, 60], Some(0))]
            {
                let case = format!("{vocab_size} x {width}, {tokens:?} from {first_position:?}");
                check(&case, |pass| {
                    lookup(pass, [vocab_size, width], tokens, first_position)
                });
            }
        }
    }
}

#[test]
fn gradients_are_slopes() {
    for first_position in [None, Some(0), Some(5)] {
        check_all(&format!("from {first_position:?}"), |pass| {
            lookup(pass, [4, 3], [2, 5], first_position);
        });
    }
}

#[test]
fn repeated_tokens_add_up_and_others_get_zeros() {
    let device = device().autodiff();
    let table = random([5, 3], 1, DType::F32, &device).require_grad();
    let positions = random([6, 3], 2, DType::F32, &device).require_grad();
    let tokens = Tensor::<2, Int>::from_ints([[4, 1, 4], [4, 1, 4]], &device);
    let y = embed(table.clone(), tokens, Some((positions.clone(), 2)));
    let gradients = y.sum().backward();
    let rows = |sums: &[f64]| -> Vec<f64> { sums.iter().flat_map(|sum| [*sum; 3]).collect() };
    assert_eq!(
        numbers(table.grad(&gradients).unwrap()),
        rows(&[0.0, 2.0, 0.0, 0.0, 4.0])
    );
    assert_eq!(
        numbers(positions.grad(&gradients).unwrap()),
        rows(&[0.0, 0.0, 2.0, 2.0, 2.0, 0.0])
    );
}

#[test]
fn any_strides() {
    check("a transposed table", |pass| {
        let table = pass.leaf("table", [17, 5]).transpose();
        let positions = pass.leaf("positions", [17, 9]).transpose();
        let tokens = pass.tokens([2, 7], 5);
        let y = embed_by(pass.by, table, tokens, Some((positions, 1)));
        pass.output("y", y.swap_dims(0, 2));
    });
}

#[test]
fn one_of_two_gradients() {
    for wanted in [0, 1] {
        check(&format!("wanted {wanted}"), |pass| {
            let mut input = |name, i: usize| match wanted == i {
                true => pass.leaf(name, [7, 3]),
                false => pass.constant_of([7, 3], |_, x| x),
            };
            let (table, positions) = (input("table", 0), input("positions", 1));
            let tokens = pass.tokens([2, 5], 7);
            let y = embed_by(pass.by, table, tokens, Some((positions, 2)));
            pass.output("y", y);
        });
    }
}

#[test]
fn no_tokens() {
    let device = device();
    let tokens = Tensor::<2, Int>::zeros([2, 0], &device);
    let y = embed(Tensor::ones([5, 3], &device), tokens, None);
    assert_eq!(y.dims(), [2, 0, 3]);
}

#[test]
fn sixteen_bits() {
    check_sixteen_bits("embed", 0.5, |pass| lookup(pass, [7, 17], [3, 60], Some(2)));
}

#[test]
fn bits_are_always_the_same() {
    check_bits("embed", |pass| lookup(pass, [700, 65], [3, 300], Some(2)));
}

proptest! {
    #![proptest_config(same_cases(4))]

    #[test]
    fn any_shape(
        table in (1..40_usize, 1..70_usize),
        tokens in (1..4_usize, 1..30_usize),
        first_position in prop::option::of(0..6_usize),
    ) {
        check(&format!("{table:?} {tokens:?} {first_position:?}"), |pass| {
            lookup(pass, table.into(), tokens.into(), first_position);
        });
    }
}

#[test]
#[should_panic(expected = "token 3 is 5, the table has 5 rows")]
fn a_token_past_the_table() {
    let device = device();
    let tokens = Tensor::<2, Int>::from_ints([[0, 4], [1, 5]], &device);
    embed(Tensor::ones([5, 3], &device), tokens, None);
}

#[test]
#[should_panic(expected = "token 1 is -1, the table has 5 rows")]
fn a_token_before_the_table() {
    let device = device();
    let tokens = Tensor::<2, Int>::from_ints([[0, -1]], &device);
    embed(Tensor::ones([5, 3], &device), tokens, None);
}

#[test]
#[should_panic(expected = "sequence length: position 7 is past the 6 learned ones")]
fn a_position_past_the_last() {
    let device = device();
    let tokens = Tensor::<2, Int>::zeros([1, 4], &device);
    let positions = Tensor::ones([6, 3], &device);
    embed(Tensor::ones([5, 3], &device), tokens, Some((positions, 3)));
}

#[test]
#[should_panic(expected = "width: the positions have 4 components, the table 3")]
fn positions_are_as_wide_as_the_table() {
    let device = device();
    let tokens = Tensor::<2, Int>::zeros([1, 2], &device);
    let positions = Tensor::ones([6, 4], &device);
    embed(Tensor::ones([5, 3], &device), tokens, Some((positions, 0)));
}
