//! Padding: it goes nowhere, and changes nothing.

use burn::tensor::{DType, Device, Tensor};
use emberlm_core::{BatchData, Context, FeedForward};
use emberlm_moe::RouterConfig;
use emberlm_testkit::{assert_close, device, random};

use crate::common::{numbers, sequences};
use crate::laws::{
    D_MODEL, N_EXPERTS, TOLERANCE, all_routers, independent, layer, random_layer, training,
    with_all_losses, with_tokens,
};

/// Two sequences, of which the second begins with two tokens of padding; those hold `value`.
fn padded(value: f64, device: &Device) -> (Tensor<3>, Context) {
    let hidden = vec![vec![false; 5], vec![true, true, false, false, false]];
    let context = sequences(5).with_data(2, BatchData::new().with_hidden_keys(hidden));
    let x = random([2, 5, D_MODEL], 2, DType::F64, device);
    let there = Tensor::full([1, 2, D_MODEL], value, (device, DType::F64));
    let x = x.slice_assign([1..2, 0..2, 0..D_MODEL], there);
    (x, with_tokens(context, [2, 5]))
}

#[test]
fn padding_goes_nowhere_and_changes_nothing() {
    let device = device();
    for router in all_routers() {
        let config = with_all_losses(layer(router.clone()));
        let moe = random_layer(&config, &device);
        let of = |value, is_training: bool| {
            let (x, context) = padded(value, &device);
            let context = if is_training {
                training(context)
            } else {
                context
            };
            let output = moe.forward(x, &context);
            let losses = output
                .losses
                .iter()
                .map(|loss| loss.loss.value().into_scalar::<f64>());
            (
                numbers(&output.hidden),
                losses.collect::<Vec<_>>(),
                output.statistics().unwrap().clone(),
            )
        };
        for is_training in [false, true] {
            let (hidden, losses, statistics) = of(0.3, is_training);
            let of_padding = &hidden[5 * D_MODEL..7 * D_MODEL];
            assert!(of_padding.iter().all(|value| *value == 0.0), "{router:?}");
            assert_eq!(statistics.n_tokens, 8);
            assert!(losses.iter().all(|loss| loss.is_finite()));
            assert_eq!(
                of(-2.0, is_training),
                (hidden, losses, statistics),
                "{router:?}"
            );
        }
        // Where there is nothing else either.
        let nothing = BatchData::new().with_hidden_keys(vec![vec![true; 5]; 2]);
        let (x, context) = padded(1.0, &device);
        let output = moe.forward(x, &training(context.with_data(2, nothing)));
        assert!(numbers(&output.hidden).iter().all(|value| *value == 0.0));
        let sums = output
            .losses
            .iter()
            .map(|loss| loss.loss.value().into_scalar::<f64>());
        assert_eq!(sums.sum::<f64>(), 0.0, "{router:?}");
    }
}

/// What is left without the padding is what there is beside it.
#[test]
fn padding_is_as_nothing() {
    let device = device();
    for router in independent() {
        let moe = random_layer(&layer(router.clone()), &device);
        let (x, context) = padded(0.3, &device);
        let output = moe.forward(x.clone(), &context);
        let tokens = context.tokens.unwrap().slice([1..2, 2..5]);
        let short = sequences(3).with_tokens(Some(tokens));
        let row = moe.forward(x.slice([1..2, 2..5]), &short);
        assert_close(output.hidden.slice([1..2, 2..5]), row.hidden, TOLERANCE);
    }
}

#[test]
fn padding_may_be_routed() {
    let device = device();
    let config = layer(RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2)).with_route_padding(true);
    let moe = random_layer(&config, &device);
    let (x, context) = padded(0.3, &device);
    let output = moe.forward(x.clone(), &context);
    assert_eq!(output.statistics().unwrap().n_tokens, 10);
    assert_close(
        output.hidden,
        moe.forward(x, &sequences(5)).hidden,
        TOLERANCE,
    );
}
