//! Routers by name: choices and weights against their definitions, and what they refuse.
//! `fixtures/routers/generate.py` made the numbers.

use burn::tensor::{DType, Tensor, TensorData};
use emberlm_core::RandomKey;
use emberlm_moe::{
    BiasUpdate, Chance, Choice, Draws, Gates, GroupScore, Groups, Method, MixtureOfExpertsConfig,
    RouterConfig, RouterInput, Routing, Scoring,
};
use emberlm_testkit::{Fixture, assert_gradients_match, device, load_parameters, random};

use crate::common::{
    check, check_data, experts_of, layer_that_gives_weights, load, numbers, router_of_logits, rows,
    sorted, spread, tensor,
};

pub(crate) const N_TOKENS: usize = 24;
pub(crate) const N_EXPERTS: usize = 8;
pub(crate) const TOLERANCE: f64 = 1e-12;

pub(crate) fn chance(chance: Chance<'_>) -> RouterInput<'_> {
    RouterInput {
        chance,
        ..RouterInput::default()
    }
}

fn training() -> Chance<'static> {
    Chance::Key(RandomKey::new(7))
}

pub(crate) fn integer(fixture: &Fixture, name: &str) -> usize {
    fixture.data(name).iter::<i64>().next().unwrap() as usize
}

/// Choices in their order, and weights.
#[track_caller]
fn check_routing(fixture: &Fixture, name: &str, routing: &Routing) {
    let indices = fixture.data(&format!("{name}.indices"));
    assert_eq!(experts_of(&routing.choices), rows(&indices), "{name}");
    let weights = spread(
        &indices,
        &fixture.data(&format!("{name}.weights")),
        N_EXPERTS,
    );
    check_data(name, &routing.gates.to_data(), &weights, TOLERANCE);
}

/// The logits are the input.
fn route_logits(fixture: &Fixture, config: &RouterConfig, input: &RouterInput<'_>) -> Routing {
    let device = device();
    let logits = fixture.tensor("in.logits", DType::F64, &device);
    router_of_logits(config, &device).forward(logits, input)
}

#[test]
fn groups_by_every_rule() {
    let fixture = load("routers/groups");
    for (scoring, scores) in [(Scoring::Softmax, "softmax"), (Scoring::Sigmoid, "sigmoid")] {
        for (case, k, n_chosen) in [("k4_of_2", 4, 2), ("k4_of_1", 4, 1), ("k6_of_2", 6, 2)] {
            for (rule, score) in [
                ("none", None),
                ("maximum", Some(GroupScore::Maximum)),
                ("megatron", Some(GroupScore::ShareOfTopK)),
                ("best_two", Some(GroupScore::BestTwo)),
            ] {
                let config = RouterConfig::mixtral(16, 16, k)
                    .with_scoring(scoring)
                    .with_gates(Gates::Scores)
                    .with_groups(score.map(|score| Groups::new(4, n_chosen, score)));
                let routing = route_logits(&fixture, &config, &RouterInput::default());
                check(
                    &fixture,
                    &format!("scores.{scores}"),
                    &routing.scores,
                    TOLERANCE,
                );
                let expected = rows(&fixture.data(&format!("{case}.{scores}.{rule}")));
                assert_eq!(
                    sorted(experts_of(&routing.choices)),
                    expected,
                    "{case} {scores} {rule}"
                );
                let mask = routing.choices.mask(&device(), DType::F64);
                let weights = routing.scores.clone() * mask;
                assert_eq!(numbers(&routing.gates), numbers(&weights));
            }
            // The sum of a whole group is that of four experts.
            let whole = rows(&fixture.data(&format!("k4_of_1.{scores}.sum")));
            assert_eq!(
                whole,
                rows(&fixture.data(&format!("k4_of_1.{scores}.megatron")))
            );
        }
    }
}

#[test]
fn sinkhorn_in_training() {
    let fixture = load("routers/routers");
    for (k, name) in [(2, "sinkhorn"), (1, "sinkhorn_top_1")] {
        let config = RouterConfig::sinkhorn(N_EXPERTS, N_EXPERTS, k);
        for by in [training(), Chance::Given(&Draws::default())] {
            let routing = route_logits(&fixture, &config, &chance(by));
            check_routing(&fixture, name, &routing);
        }
        // Else the best are chosen, with the same scores.
        let routing = route_logits(&fixture, &config, &RouterInput::default());
        let plain = RouterConfig {
            method: Method::TopK { k },
            ..config
        };
        let plain = route_logits(&fixture, &plain, &RouterInput::default());
        assert_eq!(routing.choices, plain.choices);
        assert_eq!(numbers(&routing.gates), numbers(&plain.gates));
    }
}

/// What is padding takes no part in Sinkhorn's normalisation, whatever it holds.
#[test]
fn sinkhorn_does_not_see_padding() {
    let fixture = load("routers/routers");
    let device = device();
    let logits: Tensor<2> = fixture.tensor("in.logits", DType::F64, &device);
    let other = tensor(vec![50.0; 3 * N_EXPERTS], [3, N_EXPERTS], &device);
    let longer = Tensor::cat(vec![other, logits], 0);
    let padding: Vec<bool> = (0..N_TOKENS + 3).map(|token| token < 3).collect();
    let router = router_of_logits(&RouterConfig::sinkhorn(N_EXPERTS, N_EXPERTS, 2), &device);
    let input = RouterInput {
        padding: Some(&padding),
        ..chance(training())
    };
    let experts = experts_of(&router.forward(longer, &input).choices);
    assert!(experts[..3].concat().is_empty());
    assert_eq!(experts[3..], rows(&fixture.data("sinkhorn.indices")));
}

#[test]
fn noisy_top_k() {
    let fixture = load("routers/routers");
    let device = device();
    let draws = Draws {
        normal: Some(fixture.tensor("noisy.noise", DType::F64, &device)),
        ..Draws::default()
    };
    let x = ["in.logits", "noisy.noise_logits"]
        .map(|name| fixture.tensor::<2>(name, DType::F64, &device));
    let x = Tensor::cat(x.to_vec(), 1);
    let config = RouterConfig::noisy_top_k(2 * N_EXPERTS, N_EXPERTS, 2);
    let router = router_of_logits(&config, &device);
    let routing = router.forward(x.clone(), &chance(Chance::Given(&draws)));
    check(
        &fixture,
        "noisy.scores",
        routing.logits.as_ref().unwrap(),
        TOLERANCE,
    );
    check_routing(&fixture, "noisy", &routing);

    // Outside training there is no noise.
    let logits = |chance_of| {
        let routing = router.forward(x.clone(), &chance(chance_of));
        numbers(&routing.logits.unwrap())
    };
    let clean: Vec<f64> = fixture.data("in.logits").iter::<f64>().collect();
    assert_eq!(logits(Chance::Off), clean);
    let drawn = logits(training());
    assert_ne!(drawn, clean);
    assert_eq!(logits(training()), drawn);
}

/// Noise whose size has zero weights, as Shazeer et al. begin: `softplus'(0)` is a half.
#[test]
fn noise_has_its_gradient_at_zero() {
    let device = device().autodiff();
    let config = RouterConfig::noisy_top_k(2 * N_EXPERTS, N_EXPERTS, 2);
    let router = router_of_logits(&config, &device);
    let normal = random([3, N_EXPERTS], 1, DType::F64, &device);
    let draws = Draws {
        normal: Some(normal),
        ..Draws::default()
    };
    let logits = random([3, N_EXPERTS], 2, DType::F64, &device);
    for at in [0.0, -30.0, 40.0] {
        let sizes = logits.zeros_like() + at;
        assert_gradients_match(sizes, |sizes| {
            let x = Tensor::cat(vec![logits.clone(), sizes], 1);
            let routing = router.forward(x, &chance(Chance::Given(&draws)));
            routing.logits.unwrap()
        });
    }
}

pub(crate) fn gshard_draws(fixture: &Fixture) -> Draws {
    Draws {
        uniform: Some(fixture.data("gshard.uniform").iter::<f64>().collect()),
        ..Draws::default()
    }
}

#[test]
fn gshard_takes_second_experts_by_chance() {
    let fixture = load("routers/routers");
    let config = RouterConfig::gshard(N_EXPERTS, N_EXPERTS);
    let draws = gshard_draws(&fixture);
    let routing = route_logits(&fixture, &config, &chance(Chance::Given(&draws)));
    let indices = fixture.data("gshard.indices");
    let weights = spread(&indices, &fixture.data("gshard.weights"), N_EXPERTS);
    check_data("gshard", &routing.gates.to_data(), &weights, TOLERANCE);
    let accepted = fixture.data("gshard.weights");
    let accepted: Vec<f64> = accepted.iter::<f64>().collect();
    let expected = rows(&indices)
        .into_iter()
        .zip(accepted.chunks(2))
        .map(|(experts, weights)| {
            let there = experts
                .into_iter()
                .zip(weights)
                .filter(|(_, weight)| **weight > 0.0);
            there.map(|(expert, _)| expert).collect::<Vec<_>>()
        });
    assert_eq!(experts_of(&routing.choices), expected.collect::<Vec<_>>());

    // Outside training both are taken.
    let routing = route_logits(&fixture, &config, &RouterInput::default());
    assert_eq!(experts_of(&routing.choices), rows(&indices));
}

/// Each second expert is taken as often as its gate says: a token, thousands of times.
#[test]
fn chance_is_as_likely_as_the_gate_says() {
    let device = device();
    let n = 20_000;
    let logits = Tensor::<2>::from_data(
        TensorData::new(vec![0.0, -2.0], [1, 2]),
        (&device, DType::F64),
    );
    let second = 1.0 / (1.0 + 2f64.exp());
    for threshold in [0.5, 0.2] {
        let config = RouterConfig::new(2, 2, Method::RandomSecond { threshold });
        let router = router_of_logits(&config, &device);
        let routing = router.forward(logits.clone().repeat_dim(0, n), &chance(training()));
        let share = routing.choices.load()[1] as f64 / n as f64;
        let expected = (second / threshold).min(1.0);
        // Five standard errors.
        let limit = 5.0 * (expected * (1.0 - expected) / n as f64).sqrt();
        assert!(
            (share - expected).abs() <= limit,
            "{share}, expected {expected}"
        );
    }
}

#[test]
fn experts_take_their_tokens() {
    let fixture = load("routers/routers");
    let config = RouterConfig::expert_choice(N_EXPERTS, N_EXPERTS, 2.0);
    let routing = route_logits(&fixture, &config, &RouterInput::default());
    let tokens = rows(&fixture.data("expert_choice.indices"));
    assert_eq!(routing.choices.load(), [tokens[0].len() as u64; N_EXPERTS]);
    let mut of_experts = vec![Vec::new(); N_EXPERTS];
    for choice in routing.choices.all() {
        of_experts[choice.expert as usize].push(choice.token as usize);
    }
    assert_eq!(sorted(of_experts), sorted(tokens));
    let weights = fixture.data("expert_choice.weights");
    let of_experts = spread(&fixture.data("expert_choice.indices"), &weights, N_TOKENS);
    let gates = routing.gates.transpose();
    check_data("expert_choice", &gates.to_data(), &of_experts, TOLERANCE);
}

#[test]
fn jitter_is_on_the_input_in_training() {
    let fixture = load("routers/routers");
    let device = device();
    let factors = fixture.tensor("jitter.factor", DType::F64, &device);
    let draws = Draws {
        jitter: Some(factors),
        ..Draws::default()
    };
    let weight = fixture
        .tensor::<2>("jitter.router", DType::F64, &device)
        .transpose();
    let config = RouterConfig::switch(16, N_EXPERTS).with_jitter(0.1);
    let router = load_parameters(config.init(&device), |_| weight.to_data());
    let x: Tensor<2> = fixture.tensor("jitter.hidden", DType::F64, &device);
    let routing = router.forward(x, &chance(Chance::Given(&draws)));
    check(
        &fixture,
        "jitter.logits",
        routing.logits.as_ref().unwrap(),
        TOLERANCE,
    );
    check_routing(&fixture, "jitter", &routing);

    // Drawn by a key, the factors are within their bounds, and all differ.
    let config = RouterConfig::switch(N_EXPERTS, N_EXPERTS).with_jitter(0.1);
    let ones = tensor(
        vec![1.0; N_TOKENS * N_EXPERTS],
        [N_TOKENS, N_EXPERTS],
        &device,
    );
    let router = router_of_logits(&config, &device);
    let factors = |chance_of| {
        let routing = router.forward(ones.clone(), &chance(chance_of));
        numbers(&routing.logits.unwrap())
    };
    assert_eq!(factors(Chance::Off), vec![1.0; N_TOKENS * N_EXPERTS]);
    let drawn = factors(training());
    assert_eq!(drawn, factors(training()));
    assert_ne!(drawn, factors(Chance::Key(RandomKey::new(8))));
    let (least, most) = drawn
        .iter()
        .fold((f64::MAX, f64::MIN), |(least, most), factor| {
            (factor.min(least), factor.max(most))
        });
    assert!(
        (0.9..0.91).contains(&least) && (1.09..=1.1).contains(&most),
        "{least}, {most}"
    );
}

#[test]
fn the_bias_is_moved_towards_balance() {
    let fixture = load("routers/routers");
    let device = device();
    let load: Vec<u64> = fixture
        .data("bias.counts")
        .iter::<f64>()
        .map(|n| n as u64)
        .collect();
    let config = RouterConfig::deepseek_v3(N_EXPERTS, N_EXPERTS, 2, 1.0);
    for (name, recentred) in [("bias.after", false), ("bias.recentred", true)] {
        let mut layer = layer_that_gives_weights(
            MixtureOfExpertsConfig::new(config.clone(), 1).with_bias_update(BiasUpdate {
                rate: 1e-3,
                recentred,
            }),
            &device,
        );
        layer.router = load_parameters(layer.router, |name| match name {
            "correction_bias" => fixture.data("bias.before"),
            _ => TensorData::new(vec![0f64; N_EXPERTS * N_EXPERTS], [N_EXPERTS; 2]),
        });
        let statistics = emberlm_core::RoutingStatistics {
            load: load.clone(),
            ..Default::default()
        };
        layer.after_step(&statistics);
        let bias = layer.router.correction_bias.as_ref().unwrap().val();
        check(&fixture, name, &bias, TOLERANCE);
        assert!(!bias.is_require_grad());
    }
}

/// The bias alone brings a router that prefers few experts to balance, and stays out of the weights.
#[test]
fn the_bias_balances() {
    let device = device();
    let favourites = Tensor::<2>::from_floats([[2.0, 1.0, 0.0, -1.0]], &device).cast(DType::F64);
    let logits = random([512, 4], 3, DType::F64, &device) * 1.5 + favourites;
    let config = RouterConfig::deepseek_v3(4, 4, 1, 1.0).with_gates(Gates::Scores);
    let mut router = router_of_logits(&config, &device);
    let route =
        |router: &emberlm_moe::Router| router.forward(logits.clone(), &RouterInput::default());
    assert!(route(&router).statistics.max_violation() > 1.0);
    for _ in 0..300 {
        let load = route(&router).choices.load();
        router.balance(&load, 2e-3, false);
    }
    let routing = route(&router);
    let violation = routing.statistics.max_violation();
    assert!(violation < 0.1, "{violation}");
    let weights = routing.scores.clone() * routing.choices.mask(&device, DType::F64);
    assert_eq!(numbers(&routing.gates), numbers(&weights));
}

#[test]
fn hashed_experts() {
    let device = device();
    let (vocab_size, n_experts, k) = (500, 8, 3);
    let tokens: Vec<i64> = (0..vocab_size as i64).chain([7, 7, 499]).collect();
    let x = random([tokens.len(), 4], 1, DType::F32, &device);
    let route = |seed| {
        let config = RouterConfig {
            method: Method::Hash {
                k,
                vocab_size,
                seed,
            },
            ..RouterConfig::hash(4, n_experts, k, vocab_size)
        };
        let input = RouterInput {
            tokens: Some(&tokens),
            ..RouterInput::default()
        };
        config.init(&device).forward(x.clone(), &input)
    };
    let routing = route(0);
    assert!(routing.logits.is_none());
    let experts = experts_of(&routing.choices);
    for of_token in sorted(experts.clone()) {
        assert!(
            of_token.windows(2).all(|pair| pair[0] < pair[1]),
            "{of_token:?}"
        );
        assert_eq!(of_token.len(), k);
    }
    let [.., first, second, last] = &experts[..] else {
        panic!("three at the end")
    };
    assert_eq!(
        [first, second, last],
        [&experts[7], &experts[7], &experts[499]]
    );
    // Spread: 188 tokens an expert, with a standard deviation of 11.
    assert!(
        routing
            .statistics
            .load
            .iter()
            .all(|load| load.abs_diff(188) < 55)
    );
    // Each expert is as often the first as any.
    let mut first = vec![0u64; n_experts];
    experts.iter().for_each(|of_token| first[of_token[0]] += 1);
    assert!(first.iter().all(|load| load.abs_diff(62) < 37), "{first:?}");
    for (gate, score) in numbers(&routing.gates).iter().zip(numbers(&routing.scores)) {
        assert_eq!(*gate, score);
        assert!(*gate == 0.0 || (gate - 1.0 / 3.0).abs() < 1e-7);
    }
    assert_eq!(route(0).choices, routing.choices);
    assert_ne!(route(1).choices, routing.choices);
}

#[test]
#[should_panic(expected = "tokens: experts by a hash need them")]
fn a_hash_needs_tokens() {
    let router = RouterConfig::hash(4, 8, 2, 10).init(&device());
    router.forward(Tensor::ones([3, 4], &device()), &RouterInput::default());
}

#[test]
#[should_panic(expected = "token 1 is 10, the table of experts has 10")]
fn a_hash_knows_its_tokens() {
    let router = RouterConfig::hash(4, 8, 2, 10).init(&device());
    let input = RouterInput {
        tokens: Some(&[9, 10, 0]),
        ..RouterInput::default()
    };
    router.forward(Tensor::ones([3, 4], &device()), &input);
}

#[test]
#[should_panic(expected = "padding: of 2 tokens, there are 3")]
fn padding_is_of_the_tokens() {
    let router = RouterConfig::mixtral(4, 8, 2).init(&device());
    let input = RouterInput {
        padding: Some(&[true, false]),
        ..RouterInput::default()
    };
    router.forward(Tensor::ones([3, 4], &device()), &input);
}

#[test]
fn scores_are_their_formulas() {
    let device = device();
    let logits = [-700.0, -30.0, -1.5, -1e-3, 0.0, 1e-3, 0.7, 30.0, 700.0];
    let x = tensor(logits.to_vec(), [1, logits.len()], &device);
    let of = |scoring: Scoring| numbers(&scoring.forward(x.clone()));
    let close = |actual: f64, expected: f64| {
        let error = (actual - expected).abs();
        assert!(
            error <= 1e-13 * expected.max(1e-300),
            "{actual:e}, {expected:e}"
        );
    };
    for (x, score) in logits.into_iter().zip(of(Scoring::SqrtSoftplus)) {
        let softplus = if x > 40.0 { x } else { x.exp().ln_1p() };
        close(score, softplus.sqrt());
    }
    for (x, score) in logits.into_iter().zip(of(Scoring::Sigmoid)) {
        // It is made by tanh, which is exact beside one.
        let expected = 1.0 / (1.0 + (-x).exp());
        assert!((score - expected).abs() < 1e-15, "{score:e}, {expected:e}");
    }
    let sum: f64 = logits.iter().map(|x| (x - 700.0).exp()).sum();
    for (x, score) in logits.into_iter().zip(of(Scoring::Softmax)) {
        close(score, (x - 700.0).exp() / sum);
    }
}

#[test]
fn scores_have_their_gradients() {
    let device = device().autodiff();
    for scoring in [Scoring::Softmax, Scoring::Sigmoid, Scoring::SqrtSoftplus] {
        let logits = random([3, 5], 1, DType::F64, &device) * 3.0;
        assert_gradients_match(logits.clone(), |x| scoring.forward(x));
        // Where a router begins with zeros.
        assert_gradients_match(logits.zeros_like(), |x| scoring.forward(x));
    }
}

#[test]
fn a_score_of_almost_nothing_has_a_gradient() {
    let device = device().autodiff();
    let logits = Tensor::<2>::from_floats([[-200.0, -90.0, 0.0]], &device).require_grad();
    let gradients = Scoring::SqrtSoftplus
        .forward(logits.clone())
        .sum()
        .backward();
    let gradient = logits.grad(&gradients).expect("it took part");
    let gradient: Vec<f32> = gradient.into_data().iter::<f32>().collect();
    assert_eq!(gradient[0], 0.0);
    assert!(
        gradient.iter().all(|slope| slope.is_finite()) && gradient[2] > 0.2,
        "{gradient:?}"
    );
}

/// Weights of every kind, in every method, by the choices and the scores.
#[test]
fn weights_are_their_formulas() {
    let device = device();
    let fixture = load("routers/routers");
    for gates in [Gates::Scores, Gates::Renormalised, Gates::SoftmaxOfChosen] {
        for scoring in [Scoring::Softmax, Scoring::Sigmoid, Scoring::SqrtSoftplus] {
            let config = RouterConfig::mixtral(N_EXPERTS, N_EXPERTS, 3)
                .with_gates(gates)
                .with_scoring(scoring)
                .with_scale(2.5);
            let routing = route_logits(&fixture, &config, &RouterInput::default());
            let scores = numbers(&routing.scores);
            let logits: Vec<f64> = numbers(routing.logits.as_ref().unwrap());
            let mut expected = vec![0.0; N_TOKENS * N_EXPERTS];
            for (token, experts) in experts_of(&routing.choices).into_iter().enumerate() {
                let place = |expert: &usize| token * N_EXPERTS + expert;
                let weight = |expert: &usize| match gates {
                    Gates::SoftmaxOfChosen => logits[place(expert)].exp(),
                    _ => scores[place(expert)],
                };
                let sum: f64 = match gates {
                    Gates::Scores => 1.0,
                    _ => experts.iter().map(weight).sum(),
                };
                for expert in &experts {
                    expected[place(expert)] = 2.5 * weight(expert) / sum;
                }
            }
            let expected = tensor(expected, [N_TOKENS, N_EXPERTS], &device).into_data();
            check_data("weights", &routing.gates.to_data(), &expected, 1e-12);
            let sums = numbers(&routing.probabilities().sum_dim(1));
            assert!(sums.iter().all(|sum| (sum - 1.0).abs() < 1e-12));
        }
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    let device = device();
    let zeros = || Tensor::<2>::zeros([3, 8], &device);
    let first = |k: usize| vec![(0..k).collect::<Vec<_>>(); 3];
    for config in [
        RouterConfig::mixtral(8, 8, 3),
        RouterConfig::deepseek_v3(8, 8, 3, 1.0),
        RouterConfig::noisy_top_k(8, 8, 3),
        RouterConfig::sinkhorn(8, 8, 3),
        RouterConfig::deepseek_v2(8, 8, 3, 1.0).with_groups(Some(Groups::new(
            4,
            2,
            GroupScore::BestTwo,
        ))),
    ] {
        let router = config.init(&device);
        let routing = router.forward(zeros(), &RouterInput::default());
        assert_eq!(experts_of(&routing.choices), first(3), "{config:?}");
    }
    let router = RouterConfig::gshard(8, 8).init(&device);
    let routing = router.forward(zeros(), &RouterInput::default());
    assert_eq!(experts_of(&routing.choices), first(2));
    // Experts prefer the first tokens: two of three, for four of eight in the mean.
    let router = RouterConfig::expert_choice(8, 8, 6.0).init(&device);
    let routing = router.forward(zeros(), &RouterInput::default());
    let all: Vec<usize> = (0..8).collect();
    assert_eq!(experts_of(&routing.choices), [all.clone(), all, vec![]]);
}

#[test]
fn what_is_no_number_is_counted() {
    let device = device();
    let nan = f64::NAN;
    let logits = vec![0.5, 0.1, 0.2, nan, 0.1, 0.2, 0.3, 0.9, 0.1, nan, nan, nan];
    let logits = tensor(logits, [4, 3], &device);
    for config in [
        RouterConfig::mixtral(3, 3, 2),
        RouterConfig::switch(3, 3),
        RouterConfig::deepseek_v3(3, 3, 2, 1.0),
        RouterConfig::gshard(3, 3),
        RouterConfig::noisy_top_k(3, 3, 1),
        RouterConfig::sinkhorn(3, 3, 1),
        RouterConfig::expert_choice(3, 3, 1.0),
    ] {
        // Of an identity, a product with a component that is no number is none everywhere.
        let mut router = router_of_logits(&config, &device);
        router.noise = None;
        for chance_of in [Chance::Off, training()] {
            let routing = router.forward(logits.clone(), &chance(chance_of));
            assert_eq!(routing.statistics.n_not_finite, 2, "{config:?}");
            assert_eq!(routing.statistics.n_tokens, 4);
            assert!(routing.statistics.entropy_sum.is_finite());
            let gates = numbers(&routing.gates);
            for (token, gates) in gates.chunks(3).enumerate() {
                let none = gates.iter().all(|gate| gate.is_nan());
                let some = gates.iter().all(|gate| gate.is_finite());
                let expected = [false, true, false, true][token];
                assert!(
                    none == expected && some != expected,
                    "{token}: {gates:?}, {config:?}"
                );
            }
        }
    }
}

#[test]
fn statistics_count() {
    let device = device();
    let router = router_of_logits(&RouterConfig::mixtral(4, 4, 1), &device);
    let large = 1000.0;
    // Undecided, decided, undecided between two, padding.
    let logits = vec![
        0.0, 0.0, 0.0, 0.0, 0.0, large, 0.0, 0.0, 0.0, 0.0, large, large, large, 0.0, 0.0, 0.0,
    ];
    let padding = [false, false, false, true];
    let input = RouterInput {
        padding: Some(&padding),
        ..RouterInput::default()
    };
    let routing = router.forward(tensor(logits, [4, 4], &device), &input);
    let statistics = routing.statistics;
    assert_eq!(statistics.load, [1, 1, 1, 0]);
    assert_eq!(statistics.n_tokens, 3);
    assert_eq!(statistics.n_not_finite, 0);
    let entropy = 4f64.ln() + 2f64.ln();
    assert!((statistics.entropy_sum - entropy).abs() < 1e-12);
    let all = routing.choices.all();
    let choice = |token, expert| Choice {
        token,
        expert,
        rank: 0,
    };
    assert_eq!(all, [choice(0, 0), choice(1, 1), choice(2, 2)]);
}
