//! What stays of the choices where experts take so many: against definitions.
//! `fixtures/routers/generate.py` made the numbers.

use burn::tensor::{DType, Tensor};
use emberlm_moe::{
    Capacity, CapacitySize, Chance, DropPriority, Local, MixtureOfExpertsConfig, Renormalisation,
    RouterConfig, RouterInput,
};
use emberlm_testkit::{Fixture, device};

use crate::common::{
    check, check_data, layer_that_gives_weights, load, numbers, sequences, spread,
};
use crate::routers::{N_EXPERTS, N_TOKENS, TOLERANCE, chance, gshard_draws, integer};

/// The weights that are left when choices are dropped.
fn weights_left(
    fixture: &Fixture,
    router: RouterConfig,
    capacity: Capacity,
    input: &RouterInput<'_>,
) -> Tensor<2> {
    let device = device();
    let capacity = capacity.with_in_evaluation(true);
    let config = MixtureOfExpertsConfig::new(router, 1).with_capacity(Some(capacity));
    let layer = layer_that_gives_weights(config, &device);
    let logits: Tensor<2> = fixture.tensor("in.logits", DType::F64, &device);
    let routing = layer.router.forward(logits.clone(), input);
    let n_chosen = routing.choices.all().len() as u64;
    let x = logits.unsqueeze_dim(0);
    let output = layer.forward_routed(x, routing, &sequences(N_TOKENS), &Local);
    let weights: Tensor<2> = output.hidden.clone().squeeze_dim(0);
    let n_left = numbers(&weights)
        .iter()
        .filter(|weight| **weight > 0.0)
        .count() as u64;
    assert_eq!(output.statistics().unwrap().n_dropped, n_chosen - n_left);
    weights
}

#[test]
fn first_choices_have_places_before_second_ones() {
    let fixture = load("routers/routers");
    let n_places = integer(&fixture, "gshard_capacity.n_places");
    let capacity =
        Capacity::new(CapacitySize::Tokens(n_places)).with_priority(DropPriority::FirstChoices);
    let draws = gshard_draws(&fixture);
    let weights = |capacity| {
        let router = RouterConfig::gshard(N_EXPERTS, N_EXPERTS);
        weights_left(&fixture, router, capacity, &chance(Chance::Given(&draws))).to_data()
    };
    let of_file = |name: &str| {
        spread(
            &fixture.data("gshard.indices"),
            &fixture.data(name),
            N_EXPERTS,
        )
    };
    let ours = weights(capacity);
    check_data(
        "gshard_mesh",
        &ours,
        &of_file("gshard_mesh.weights"),
        TOLERANCE,
    );
    // In the paper what chance refuses takes a place all the same.
    let paper = emberlm_testkit::largest_difference(&ours, &of_file("gshard_capacity.weights"));
    assert!(paper > 0.1, "{paper:e}");
    // In the order of tokens others stay.
    let by_position = weights(capacity.with_priority(DropPriority::Position));
    assert!(emberlm_testkit::largest_difference(&by_position, &ours) > 0.1);
}

#[test]
fn choices_are_dropped_by_position_or_by_probability() {
    let fixture = load("routers/routers");
    let n_places = integer(&fixture, "drop.n_places");
    for (name, priority) in [
        ("drop_position", DropPriority::Position),
        ("drop_probability", DropPriority::Probability),
    ] {
        let capacity = Capacity::new(CapacitySize::Tokens(n_places))
            .with_priority(priority)
            .with_renormalisation(Renormalisation::AfterDropping);
        let router = RouterConfig::mixtral(N_EXPERTS, N_EXPERTS, 2);
        let left =
            |router, capacity| weights_left(&fixture, router, capacity, &RouterInput::default());
        let weights = left(router.clone(), capacity);
        check(&fixture, &format!("{name}.weights"), &weights, TOLERANCE);
        // The weights of a token sum to one, or there are none.
        let sums = numbers(&weights.sum_dim(1));
        assert!(
            sums.iter()
                .all(|sum| *sum == 0.0 || (sum - 1.0).abs() < TOLERANCE)
        );

        // Weights that are renormalised before lack what is dropped.
        let before = capacity.with_renormalisation(Renormalisation::BeforeDropping);
        let weights = left(router.clone(), before);
        let sums = numbers(&weights.sum_dim(1));
        assert!(sums.iter().any(|sum| *sum > 0.0 && *sum < 0.99));
    }
}

#[test]
fn capacity_is_counted() {
    let factor = |factor| Capacity::new(CapacitySize::Factor(factor));
    assert_eq!(factor(1.0).of_expert(24, 2.0, 8, 0), 6);
    // Rounded up.
    assert_eq!(factor(1.25).of_expert(24, 2.0, 8, 0), 8);
    assert_eq!(factor(1.0).of_expert(3, 1.0, 8, 0), 1);
    assert_eq!(factor(1.0).with_minimum(4).of_expert(3, 1.0, 8, 0), 4);
    assert_eq!(
        Capacity::new(CapacitySize::Tokens(5)).of_expert(1000, 2.0, 8, 0),
        5
    );
    let schedule = Capacity::new(CapacitySize::Schedule {
        first: 1.0,
        last: 2.0,
        steps: 10,
    });
    let at = |step| schedule.of_expert(80, 1.0, 8, step);
    assert_eq!([0, 1, 5, 10, 1000].map(at), [10, 11, 15, 20, 20]);
}
