//! What configurations refuse, by the name of the field, and that they are data.

use emberlm_core::InvalidConfig;
use emberlm_moe::{
    BiasUpdate, Capacity, CapacitySize, DropPriority, GroupScore, Groups, Method,
    MixtureOfExpertsConfig, RouterConfig, SharedExpertConfig,
};
use emberlm_testkit::device;
#[track_caller]
fn refused(result: Result<(), InvalidConfig>, field: &str) {
    let words = result.unwrap_err().to_string();
    assert!(words.starts_with(field), "{words}, not {field}");
}

#[test]
fn what_is_refused_is_named() {
    let nan = f64::NAN;
    let router = |method| RouterConfig::new(16, 8, method);
    let top_k = |k| router(Method::TopK { k });
    let groups = |n_groups, n_chosen, score| {
        top_k(4).with_groups(Some(Groups::new(n_groups, n_chosen, score)))
    };
    let hash = |k, vocab_size| {
        router(Method::Hash {
            k,
            vocab_size,
            seed: 0,
        })
    };
    for (config, field) in [
        (RouterConfig::mixtral(0, 8, 2), "d_model"),
        (RouterConfig::mixtral(16, 0, 2), "n_experts"),
        (top_k(0), "k "),
        (top_k(9), "k "),
        (router(Method::NoisyTopK { k: 9 }), "k "),
        (router(Method::Sinkhorn { k: 0 }), "k "),
        (hash(9, 10), "k "),
        (hash(2, 0), "vocab_size"),
        (hash(2, 10).with_jitter(0.1), "jitter"),
        (RouterConfig::gshard(16, 1), "k "),
        (RouterConfig::expert_choice(16, 8, 0.0), "capacity_factor"),
        (RouterConfig::expert_choice(16, 8, 8.5), "capacity_factor"),
        (RouterConfig::expert_choice(16, 8, nan), "capacity_factor"),
        (router(Method::RandomSecond { threshold: 0.0 }), "threshold"),
        (router(Method::RandomSecond { threshold: 1.5 }), "threshold"),
        (router(Method::RandomSecond { threshold: nan }), "threshold"),
        (top_k(2).with_scale(0.0), "scale"),
        (top_k(2).with_scale(f64::INFINITY), "scale"),
        (top_k(2).with_jitter(-0.1), "jitter"),
        (top_k(2).with_jitter(nan), "jitter"),
        (groups(0, 1, GroupScore::Maximum), "groups.n_groups"),
        (groups(3, 1, GroupScore::Maximum), "groups.n_groups"),
        (groups(2, 0, GroupScore::Maximum), "groups.n_chosen"),
        (groups(2, 3, GroupScore::Maximum), "groups.n_chosen"),
        // Two groups of one expert, for four.
        (groups(8, 2, GroupScore::Maximum), "groups.n_chosen"),
        // Groups of one expert have no two.
        (groups(8, 4, GroupScore::BestTwo), "groups.score"),
        // A fifth of four.
        (groups(8, 5, GroupScore::ShareOfTopK), "groups.score"),
        (
            RouterConfig::gshard(16, 8).with_groups(Some(Groups::new(2, 1, GroupScore::Maximum))),
            "groups",
        ),
        (
            RouterConfig::noisy_top_k(16, 8, 2).with_correction_bias(true),
            "correction_bias",
        ),
    ] {
        refused(config.validate(), field);
        refused(MixtureOfExpertsConfig::new(config, 4).validate(), field);
    }

    let layer = MixtureOfExpertsConfig::new(top_k(2), 4);
    let capacity = |size| layer.clone().with_capacity(Some(Capacity::new(size)));
    let schedule = |first, last| CapacitySize::Schedule {
        first,
        last,
        steps: 10,
    };
    let bias_update = |rate| {
        layer
            .clone()
            .with_bias_update(BiasUpdate::new().with_rate(rate))
    };
    for (config, field) in [
        (MixtureOfExpertsConfig::new(top_k(2), 0), "d_ff"),
        (layer.clone().with_dropout(1.0), "dropout"),
        (
            layer.clone().with_shared(Some(SharedExpertConfig::new(0))),
            "shared.d_ff",
        ),
        (capacity(CapacitySize::Tokens(0)), "capacity.size"),
        (capacity(CapacitySize::Factor(0.0)), "capacity.size"),
        (capacity(CapacitySize::Factor(nan)), "capacity.size"),
        (capacity(schedule(1.0, -1.0)), "capacity.size"),
        (capacity(schedule(f64::INFINITY, 1.0)), "capacity.size"),
        (bias_update(-1e-3), "bias_update.rate"),
        (bias_update(nan), "bias_update.rate"),
    ] {
        refused(config.validate(), field);
        refused(config.validate_causal(), field);
    }
}

#[test]
#[should_panic(expected = "k must be at most n_experts, got 9")]
fn init_panics_with_the_same_words() {
    RouterConfig::mixtral(16, 8, 9).init(&device());
}

#[test]
fn a_decoder_does_not_look_ahead() {
    let layer = |router| MixtureOfExpertsConfig::new(router, 4);
    let allowed = |router: RouterConfig| layer(router.with_allow_leak(true));
    for router in [
        RouterConfig::expert_choice(16, 8, 2.0),
        RouterConfig::sinkhorn(16, 8, 2),
    ] {
        refused(layer(router.clone()).validate_causal(), "router.method");
        assert_eq!(layer(router.clone()).validate(), Ok(()));
        assert_eq!(allowed(router).validate_causal(), Ok(()));
    }
    let top_k = |k| RouterConfig::mixtral(16, 8, k);
    let with_priority = |config: MixtureOfExpertsConfig, priority| {
        let capacity = Capacity::new(CapacitySize::Factor(1.0)).with_priority(priority);
        config.with_capacity(Some(capacity))
    };
    let first = DropPriority::FirstChoices;
    for (router, priority) in [
        (top_k(2), first),
        (RouterConfig::gshard(16, 8), first),
        (top_k(1), DropPriority::Probability),
    ] {
        let config = with_priority(layer(router.clone()), priority);
        refused(config.validate_causal(), "capacity.priority");
        assert_eq!(config.validate(), Ok(()));
        let config = with_priority(allowed(router), priority);
        assert_eq!(config.validate_causal(), Ok(()));
    }
    for (router, priority) in [
        (top_k(1), first),
        (top_k(2), DropPriority::Position),
        (RouterConfig::hash(16, 8, 2, 10), DropPriority::Position),
        (RouterConfig::noisy_top_k(16, 8, 2), DropPriority::Position),
    ] {
        assert_eq!(
            with_priority(layer(router), priority).validate_causal(),
            Ok(())
        );
    }
}

#[test]
fn configs_are_data() {
    let config = MixtureOfExpertsConfig::new(RouterConfig::gshard(16, 8), 4)
        .with_capacity(Some(Capacity::new(CapacitySize::Factor(1.25))));
    let json = serde_json::to_string(&config).unwrap();
    let again: MixtureOfExpertsConfig = serde_json::from_str(&json).unwrap();
    assert_eq!(serde_json::to_string(&again).unwrap(), json);
    assert_eq!(again.router, config.router);
    assert_eq!(again.capacity, config.capacity);
}
