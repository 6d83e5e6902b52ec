//! What every mixture with a capacity keeps.

use burn::tensor::{DType, TensorData};
use emberlm_core::{Context, FeedForward, StepSoFar};
use emberlm_moe::{Capacity, CapacityScope, CapacitySize, DropPriority, RouterConfig};
use emberlm_testkit::{assert_close, device, random};

use crate::common::sequences;
use crate::laws::{
    D_MODEL, N_EXPERTS, TOLERANCE, gradients, layer, random_layer, training, without_chance,
};

#[test]
fn a_large_capacity_drops_nothing() {
    let device = device();
    let x = random([2, 7, D_MODEL], 2, DType::F64, &device);
    for router in without_chance() {
        let config = layer(router);
        let dropless = random_layer(&config, &device).forward(x.clone(), &sequences(7));
        for scope in [CapacityScope::Batch, CapacityScope::Sequence] {
            for padded in [false, true] {
                let capacity = Capacity::new(CapacitySize::Factor(1000.0))
                    .with_scope(scope)
                    .with_padded(padded);
                let bounded = config.clone().with_capacity(Some(capacity));
                let bounded = random_layer(&bounded, &device);
                let output = bounded.forward(x.clone(), &training(sequences(7)));
                assert_close(output.hidden.clone(), dropless.hidden.clone(), TOLERANCE);
                assert_eq!(output.statistics(), dropless.statistics());
            }
        }
    }
}

/// Rows that fill up change neither outputs nor gradients, and what is dropped adds nothing.
#[test]
fn padded_groups_are_as_groups_of_any_length() {
    let device = device().autodiff();
    for router in without_chance() {
        for scope in [CapacityScope::Batch, CapacityScope::Sequence] {
            for priority in [
                DropPriority::Position,
                DropPriority::FirstChoices,
                DropPriority::Probability,
            ] {
                let of = |padded| {
                    let capacity = Capacity::new(CapacitySize::Factor(0.6))
                        .with_scope(scope)
                        .with_priority(priority)
                        .with_padded(padded);
                    let config = layer(router.clone()).with_bias(true);
                    let moe = random_layer(&config.with_capacity(Some(capacity)), &device);
                    let x = random([2, 7, D_MODEL], 2, DType::F64, &device).require_grad();
                    let output = moe.forward(x.clone(), &training(sequences(7)));
                    let statistics = output.statistics().cloned();
                    let hidden = output.hidden;
                    let gradients = gradients(&moe, &x, hidden.clone());
                    (hidden.into_data(), statistics, gradients)
                };
                let (hidden, statistics, gradients) = of(false);
                let (padded_hidden, padded_statistics, padded_gradients) = of(true);
                assert!(statistics.as_ref().unwrap().n_dropped > 0);
                assert_eq!(statistics, padded_statistics);
                let close = |a: &TensorData, b: &TensorData| {
                    let difference = emberlm_testkit::largest_difference(a, b);
                    assert!(difference <= TOLERANCE, "{difference:e}");
                };
                close(&padded_hidden, &hidden);
                for (a, b) in padded_gradients.iter().zip(&gradients) {
                    close(a, b);
                }
            }
        }
    }
}

/// A schedule goes by the steps that the context counts.
#[test]
fn capacity_follows_its_schedule() {
    let device = device();
    let capacity = Capacity::new(CapacitySize::Schedule {
        first: 0.2,
        last: 5.0,
        steps: 100,
    });
    let config = layer(RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2)).with_capacity(Some(capacity));
    let moe = random_layer(&config, &device);
    let x = random([2, 10, D_MODEL], 2, DType::F64, &device);
    let dropped = |context: Context| {
        let output = moe.forward(x.clone(), &context);
        output.statistics().unwrap().n_dropped
    };
    let at = |step| {
        let so_far = StepSoFar {
            step,
            ..StepSoFar::default()
        };
        dropped(training(sequences(10)).with_so_far(so_far))
    };
    let [early, later, end] = [0, 20, 100].map(at);
    assert!(
        early > later && later > end && end == 0,
        "{early} {later} {end}"
    );
    // Two of 40 choices an expert.
    assert_eq!(early, 40 - 2 * N_EXPERTS as u64);
    assert_eq!(dropped(sequences(10)), 0);
}
