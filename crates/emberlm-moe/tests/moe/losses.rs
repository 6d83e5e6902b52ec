//! Balance losses and the other losses of a router: values and gradients, with padding and over layers.
//! `fixtures/losses/generate.py` made the numbers.

use std::sync::Arc;

use burn::tensor::{DType, Device, Gradients, Tensor, TensorData};
use emberlm_core::{AuxiliaryKind, AuxiliaryLoss, BatchData, FeedForward, LayerLoss, OverLayers};
use emberlm_moe::{
    BalanceLoss, Chance, Counting, Draws, Method, MixtureOfExpertsConfig, RouterConfig,
    RouterInput, Routing, Scoring, importance_loss, load_loss, z_loss,
};
use emberlm_testkit::{Fixture, device, random};

use crate::common::{
    check, check_data, layer_that_gives_weights, load, numbers, router_of_logits, sequences, tensor,
};

const N_LAYERS: usize = 2;
const BATCH_SIZE: usize = 2;
const SEQ_LENGTH: usize = 12;
const N_EXPERTS: usize = 8;
const N_TOKENS: usize = BATCH_SIZE * SEQ_LENGTH;
const TOLERANCE: f64 = 1e-12;
/// Of squared coefficients of variation: ours add 1e-10 to a mean square that is from 5 to 50 here.
const TOLERANCE_CV: f64 = 1e-10;
const ALL: [BalanceLoss; 7] = [
    BalanceLoss::Switch,
    BalanceLoss::HuggingFaceMixtral,
    BalanceLoss::HuggingFaceSwitch,
    BalanceLoss::GShard,
    BalanceLoss::MegaBlocks,
    BalanceLoss::Sequence,
    BalanceLoss::GlobalBatch,
];

fn top_k(k: usize) -> RouterConfig {
    RouterConfig::mixtral(N_EXPERTS, N_EXPERTS, k)
}

fn counting(seq_length: usize) -> Counting<'static> {
    Counting {
        seq_length,
        earlier: None,
    }
}

fn value(loss: &AuxiliaryLoss) -> f64 {
    loss.loss.value().into_scalar()
}

fn of_routing(loss: BalanceLoss, routing: &Routing, seq_length: usize) -> f64 {
    value(&loss.forward(routing, &counting(seq_length)))
}

fn over_layers(losses: &[AuxiliaryLoss]) -> Tensor<1> {
    AuxiliaryLoss::over_layers(losses, losses[0].kind).unwrap()
}

fn numbers_close(a: f64, b: f64) -> bool {
    (a - b).abs() <= TOLERANCE * b.abs()
}

/// The fixture's layers, with or without padding.
struct Layers {
    fixture: Fixture,
    /// What the names of its values begin with.
    prefix: &'static str,
    padding: Option<Vec<bool>>,
    logits: Tensor<4>,
}

impl Layers {
    fn both() -> [Self; 2] {
        ["", "masked."].map(|prefix| {
            let fixture = load("losses/losses");
            let padding = fixture.data("in.padding");
            let padding: Vec<bool> = padding.iter::<i64>().map(|padding| padding == 1).collect();
            let device = device().autodiff();
            Self {
                logits: fixture
                    .tensor("in.logits", DType::F64, &device)
                    .require_grad(),
                padding: (!prefix.is_empty()).then_some(padding),
                prefix,
                fixture,
            }
        })
    }

    fn routings(&self, config: &RouterConfig) -> Vec<Routing> {
        let router = router_of_logits(config, &self.logits.device());
        let of_layer = |layer| {
            let logits = self.logits.clone().narrow(0, layer, 1);
            let input = RouterInput {
                padding: self.padding.as_deref(),
                ..RouterInput::default()
            };
            router.forward(logits.reshape([N_TOKENS, N_EXPERTS]), &input)
        };
        (0..N_LAYERS).map(of_layer).collect()
    }

    /// Compares values with those of a name, and the gradient of their sum.
    fn check(&self, name: &str, values: Tensor<1>) -> Gradients {
        let tolerance = match name {
            "importance" | "load" => TOLERANCE_CV,
            _ => TOLERANCE,
        };
        let name = format!("{}{name}", self.prefix);
        let expected = self.fixture.data(&format!("{name}.value"));
        let n = expected.num_elements();
        let flat = TensorData::new(expected.iter::<f64>().collect::<Vec<_>>(), [n]);
        check_data(&name, &values.to_data(), &flat, tolerance);
        let gradients = values.sum().backward();
        let gradient = self.logits.grad(&gradients).unwrap();
        check(&self.fixture, &format!("{name}.grad"), &gradient, tolerance);
        gradients
    }

    /// One value a layer.
    fn check_each(&self, name: &str, losses: &[AuxiliaryLoss]) -> Gradients {
        let values: Vec<_> = losses.iter().map(|loss| loss.loss.value()).collect();
        self.check(name, Tensor::cat(values, 0))
    }

    fn losses(&self, loss: BalanceLoss, config: &RouterConfig) -> Vec<AuxiliaryLoss> {
        let routings = self.routings(config);
        let of = |routing| loss.forward(routing, &counting(SEQ_LENGTH));
        routings.iter().map(of).collect()
    }
}

#[test]
fn losses_of_one_layer() {
    for layers in Layers::both() {
        for (name, loss, config) in [
            ("switch", BalanceLoss::Switch, top_k(2)),
            ("switch_top_1", BalanceLoss::Switch, top_k(1)),
            ("gshard_paper", BalanceLoss::GShard, top_k(2)),
            // For one choice a token.
            ("gshard", BalanceLoss::Switch, top_k(1)),
            ("gshard", BalanceLoss::MegaBlocks, top_k(1)),
            ("gshard", BalanceLoss::HuggingFaceMixtral, top_k(1)),
            ("sequence", BalanceLoss::Sequence, top_k(2)),
            (
                "sequence_sigmoid",
                BalanceLoss::Sequence,
                top_k(2).with_scoring(Scoring::Sigmoid),
            ),
        ] {
            layers.check_each(name, &layers.losses(loss, &config));
        }
        let e_squared = (N_EXPERTS * N_EXPERTS) as f64;
        let gshard = layers.losses(BalanceLoss::GShard, &top_k(2));
        let values: Vec<_> = gshard
            .iter()
            .map(|loss| loss.loss.value() * e_squared)
            .collect();
        layers.check("gshard", Tensor::cat(values, 0));
    }
}

#[test]
fn losses_over_layers() {
    for layers in Layers::both() {
        let of = |loss| over_layers(&layers.losses(loss, &top_k(2)));
        layers.check("megablocks", of(BalanceLoss::MegaBlocks));
        layers.check("hugging_face_mixtral", of(BalanceLoss::HuggingFaceMixtral));
        if layers.padding.is_none() {
            // There padding counts always.
            layers.check("hugging_face_switch", of(BalanceLoss::HuggingFaceSwitch));
        }
        // All others are added.
        for (name, loss) in [
            ("switch", BalanceLoss::Switch),
            ("gshard_paper", BalanceLoss::GShard),
            ("sequence", BalanceLoss::Sequence),
        ] {
            let expected = layers
                .fixture
                .data(&format!("{}{name}.value", layers.prefix));
            let sum: f64 = expected.iter::<f64>().sum();
            let actual: f64 = of(loss).into_scalar();
            assert!(numbers_close(actual, sum), "{name}");
        }
    }
}

#[test]
fn z_losses() {
    for layers in Layers::both() {
        let losses = || {
            let routings = layers.routings(&top_k(2));
            let losses = routings.iter().map(|routing| z_loss(routing).unwrap());
            losses.collect::<Vec<_>>()
        };
        layers.check_each("z", &losses());
        if layers.padding.is_none() {
            let mean = over_layers(&losses()) * 0.5;
            layers.check("hugging_face_switch_z", mean);
        }
    }
}

#[test]
fn importance_losses() {
    for layers in Layers::both() {
        // Without noise; by the softmax of the chosen logits, or the renormalised softmax of all, which is the same.
        let noisy = RouterConfig::noisy_top_k(N_EXPERTS, N_EXPERTS, 2);
        let plain = RouterConfig {
            method: Method::TopK { k: 2 },
            ..noisy
        };
        for config in [plain, top_k(2)] {
            let routings = layers.routings(&config);
            let losses: Vec<_> = routings.iter().map(importance_loss).collect();
            layers.check_each("importance", &losses);
        }
    }
}

/// With the noise that is given, and by both the logits and the size of the noise.
#[test]
fn load_losses() {
    for layers in Layers::both() {
        let device = layers.logits.device();
        let fixture = &layers.fixture;
        let sizes = fixture
            .tensor::<4>("in.noise_logits", DType::F64, &device)
            .require_grad();
        let normal = fixture.tensor::<4>("in.noise", DType::F64, &device);
        let router = router_of_logits(
            &RouterConfig::noisy_top_k(2 * N_EXPERTS, N_EXPERTS, 2),
            &device,
        );
        let of_layer = |x: &Tensor<4>, layer| {
            let x = x.clone().narrow(0, layer, 1);
            x.reshape([N_TOKENS, N_EXPERTS])
        };
        let losses: Vec<AuxiliaryLoss> = (0..N_LAYERS)
            .map(|layer| {
                let x = [&layers.logits, &sizes].map(|x| of_layer(x, layer));
                let draws = Draws {
                    normal: Some(of_layer(&normal, layer)),
                    ..Draws::default()
                };
                let input = RouterInput {
                    padding: layers.padding.as_deref(),
                    chance: Chance::Given(&draws),
                    ..RouterInput::default()
                };
                let routing = router.forward(Tensor::cat(x.to_vec(), 1), &input);
                load_loss(&routing).unwrap()
            })
            .collect();
        let gradients = layers.check_each("load", &losses);
        let name = format!("{}load.grad_noise_logits", layers.prefix);
        check(
            fixture,
            &name,
            &sizes.grad(&gradients).unwrap(),
            TOLERANCE_CV,
        );
    }
}

/// The sequences are the micro-batches of a step.
#[test]
fn micro_batches_know_the_load_of_earlier_ones() {
    for layers in Layers::both() {
        let router = router_of_logits(&top_k(2), &layers.logits.device());
        let padding = layers.padding.as_ref();
        let route = |layer, row| {
            let logits = layers.logits.clone().narrow(0, layer, 1).narrow(1, row, 1);
            let input = RouterInput {
                padding: padding.map(|padding| &padding[row * SEQ_LENGTH..][..SEQ_LENGTH]),
                ..RouterInput::default()
            };
            router.forward(logits.reshape([SEQ_LENGTH, N_EXPERTS]), &input)
        };
        let mut values = Vec::new();
        for layer in 0..N_LAYERS {
            let routings = [0, 1].map(|row| route(layer, row));
            for row in 0..BATCH_SIZE {
                let other = routings[1 - row].choices.load();
                let counting = Counting {
                    seq_length: SEQ_LENGTH,
                    earlier: Some(&other),
                };
                let loss = BalanceLoss::GlobalBatch.forward(&routings[row], &counting);
                values.push(loss.loss.value());
            }
        }
        layers.check("global_batch", Tensor::cat(values, 0));
    }
}

/// Random logits of sequences that all have the same favourites.
fn random_routing(config: &RouterConfig, n_tokens: usize, seed: u64, device: &Device) -> Routing {
    let n_experts = config.n_experts;
    let favourites = random([1, n_experts], seed + 1000, DType::F64, device);
    let logits = random([n_tokens, n_experts], seed, DType::F64, device) * 3.0 + favourites * 2.0;
    router_of_logits(config, device).forward(logits, &RouterInput::default())
}

/// Factors between losses of one layer.
#[test]
fn losses_that_are_one_another() {
    let device = device();
    for (seed, n_experts, k) in [(1, 5, 1), (2, 5, 3), (3, 9, 2), (4, 4, 4)] {
        let config = RouterConfig::mixtral(n_experts, n_experts, k);
        let routing = random_routing(&config, 14, seed, &device);
        let of = |loss, seq_length| of_routing(loss, &routing, seq_length);
        let same = |a: f64, b: f64| assert!(numbers_close(a, b), "{a}, {b}: {n_experts}, {k}");
        let switch = of(BalanceLoss::Switch, 7);
        same(of(BalanceLoss::HuggingFaceMixtral, 7), k as f64 * switch);
        same(of(BalanceLoss::MegaBlocks, 7), switch);
        same(of(BalanceLoss::GlobalBatch, 7), switch);
        // A batch that is one sequence.
        same(of(BalanceLoss::Sequence, 14), switch);
        let first = of(BalanceLoss::HuggingFaceSwitch, 14);
        same(
            first,
            (n_experts * n_experts) as f64 * of(BalanceLoss::GShard, 7),
        );
        if k == 1 {
            same(first, switch);
            same(
                of(BalanceLoss::HuggingFaceSwitch, 7),
                of(BalanceLoss::Sequence, 7),
            );
        }
    }
}

/// They look alike where nothing tells them apart.
#[test]
fn losses_that_differ() {
    let device = device();
    let routing = random_routing(&top_k(2), 14, 5, &device);
    let of = |loss| of_routing(loss, &routing, 7);
    let differ = |a: f64, b: f64| assert!((a - b).abs() > 1e-3 * b.abs(), "{a}, {b}");
    // By sequences or by the batch.
    differ(of(BalanceLoss::Sequence), of(BalanceLoss::Switch));
    // All choices or the first.
    differ(
        of(BalanceLoss::HuggingFaceSwitch),
        of(BalanceLoss::Sequence),
    );
    differ(64.0 * of(BalanceLoss::GShard), of(BalanceLoss::Switch));

    let [layers, masked] = Layers::both();
    // Two layers counted together are neither the mean nor the sum of each.
    let losses = layers.losses(BalanceLoss::HuggingFaceMixtral, &top_k(2));
    let together: f64 = over_layers(&losses).into_scalar();
    let sum: f64 = losses.iter().map(value).sum();
    differ(together, sum);
    differ(together, sum / 2.0);
    // The mean over micro-batches is the batch's where all have as many tokens.
    let mean = |layers: &Layers| {
        let values = layers
            .fixture
            .data(&format!("{}global_batch.value", layers.prefix));
        let values: Vec<f64> = values.iter::<f64>().collect();
        (values[0] + values[1]) / 2.0
    };
    let switch = |layers: &Layers| value(&layers.losses(BalanceLoss::Switch, &top_k(2))[0]);
    assert!(numbers_close(mean(&layers), switch(&layers)));
    differ(mean(&masked), switch(&masked));
}

/// What the table of the losses says.
#[test]
fn losses_at_balance() {
    let (n_experts, k) = (4, 2);
    let config = RouterConfig::mixtral(n_experts, n_experts, k);
    // Each sequence has every rotation of the same logits.
    let of_token = |token: usize| (0..n_experts).map(move |e| ((e + token) % n_experts) as f64);
    let logits: Vec<f64> = (0..2 * n_experts).flat_map(of_token).collect();
    let device = device();
    let logits = tensor(logits, [2 * n_experts, n_experts], &device);
    let router = router_of_logits(&config, &device);
    let routing = router.forward(logits, &RouterInput::default());
    assert_eq!(routing.choices.load(), [4; 4]);
    for loss in ALL {
        let expected = match loss {
            BalanceLoss::HuggingFaceMixtral => k as f64,
            BalanceLoss::GShard => 1.0 / (n_experts * n_experts) as f64,
            _ => 1.0,
        };
        let actual = of_routing(loss, &routing, n_experts);
        assert!(numbers_close(actual, expected), "{loss:?}: {actual}");
    }
    assert!(value(&importance_loss(&routing)) < 1e-20);
}

#[test]
fn large_logits_do_not_overflow() {
    let device = device().autodiff();
    let router = RouterConfig::mixtral(2, 2, 1).init(&device);
    let weight = Tensor::<2>::eye(2, &device.clone().inner());
    let router = emberlm_testkit::load_parameters(router, |_| weight.to_data());
    let x = Tensor::<2>::from_floats([[1000.0, 0.0], [-1000.0, -1000.0]], &device).require_grad();
    let loss = z_loss(&router.forward(x.clone(), &RouterInput::default())).unwrap();
    let loss = loss.loss.value();
    let expected = (1e6 + (-1000.0 + 2f64.ln()).powi(2)) / 2.0;
    let actual: f32 = loss.clone().into_scalar();
    assert!((f64::from(actual) - expected).abs() < 1.0, "{actual}");
    let gradient = x.grad(&loss.backward()).unwrap();
    let expected = [1000.0, 0.0, -499.65, -499.65];
    for (actual, expected) in numbers(&gradient).into_iter().zip(expected) {
        assert!((actual - expected).abs() < 0.01, "{actual}, {expected}");
    }
}

#[test]
fn a_layer_gives_what_its_config_says() {
    let device = device();
    let config = MixtureOfExpertsConfig::new(top_k(2), 3);
    let kinds = |config: &MixtureOfExpertsConfig| {
        let layer = config.init(&device);
        let x = random([2, 6, N_EXPERTS], 1, DType::F32, &device);
        let losses = layer.forward(x, &sequences(6)).losses;
        losses.iter().map(|loss| loss.kind).collect::<Vec<_>>()
    };
    assert!(kinds(&config).is_empty());
    let all = config
        .with_balance(Some(BalanceLoss::Switch))
        .with_z_loss(true)
        .with_importance(true);
    let three = [
        AuxiliaryKind::Balance,
        AuxiliaryKind::RouterZ,
        AuxiliaryKind::Importance,
    ];
    assert_eq!(kinds(&all), three);
    let noisy = RouterConfig::noisy_top_k(N_EXPERTS, N_EXPERTS, 2);
    let all_kinds = [&three[..], &[AuxiliaryKind::Load]].concat();
    let with_router = |router| MixtureOfExpertsConfig {
        router,
        ..all.clone()
    };
    assert_eq!(kinds(&with_router(noisy)), all_kinds);
    // All experts are taken: their load is no matter of chance.
    let every = RouterConfig::noisy_top_k(N_EXPERTS, N_EXPERTS, N_EXPERTS);
    assert_eq!(kinds(&with_router(every)), three);
}

/// The layer hands on the length of the sequences, the padding and the earlier load.
#[test]
fn a_layer_counts_as_it_is_told() {
    let [_, masked] = Layers::both();
    let device = masked.logits.device();
    let shape = [BATCH_SIZE, SEQ_LENGTH, N_EXPERTS];
    let x = masked.logits.clone().narrow(0, 0, 1).reshape(shape);
    let padding = masked.padding.as_ref().unwrap();
    let hidden = padding.chunks(SEQ_LENGTH).map(<[bool]>::to_vec).collect();
    let data = BatchData::new().with_hidden_keys(hidden);
    let context = sequences(SEQ_LENGTH).with_data(BATCH_SIZE, data);
    let config = MixtureOfExpertsConfig::new(top_k(2), 1);
    let of = |config: &MixtureOfExpertsConfig, context: &_| {
        let layer = layer_that_gives_weights(config.clone(), &device);
        value(&layer.forward(x.clone(), context).losses[0])
    };
    let file = |name: &str| -> f64 {
        let values = masked.fixture.data(&format!("{name}.value"));
        values.iter::<f64>().next().unwrap()
    };
    for (name, loss) in [
        ("switch", BalanceLoss::Switch),
        ("sequence", BalanceLoss::Sequence),
    ] {
        let config = config.clone().with_balance(Some(loss));
        let masked = file(&format!("masked.{name}"));
        assert!(numbers_close(of(&config, &context), masked), "{name}");
        let config = config.with_route_padding(true);
        assert!(numbers_close(of(&config, &context), file(name)), "{name}");
    }
    let global = config.with_balance(Some(BalanceLoss::GlobalBatch));
    let alone = of(&global, &context);
    assert!(numbers_close(alone, file("masked.switch")));
    let busy: Arc<[u64]> = [100, 0, 0, 0, 0, 0, 0, 0].into();
    let mut later = context;
    later.earlier_load = Some(busy);
    let after = of(&global, &later);
    assert!((after - alone).abs() > 1e-3);
}

#[test]
fn kinds_are_kept_apart_over_layers() {
    let device = device();
    let loss = |kind, over_layers, value| AuxiliaryLoss {
        kind,
        over_layers,
        loss: LayerLoss::Value(tensor(vec![value], [1], &device)),
    };
    let losses = [
        loss(AuxiliaryKind::RouterZ, OverLayers::Sum, 1.0),
        loss(AuxiliaryKind::Balance, OverLayers::Mean, 10.0),
        loss(AuxiliaryKind::RouterZ, OverLayers::Sum, 2.0),
        loss(AuxiliaryKind::Balance, OverLayers::Mean, 30.0),
    ];
    let of = |kind| {
        let one = AuxiliaryLoss::over_layers(&losses, kind)?;
        Some(one.into_scalar::<f64>())
    };
    assert_eq!(of(AuxiliaryKind::RouterZ), Some(3.0));
    assert_eq!(of(AuxiliaryKind::Balance), Some(20.0));
    assert_eq!(of(AuxiliaryKind::Importance), None);
}

#[test]
#[should_panic(expected = "seq_length: 5 does not divide 14 tokens")]
fn sequences_have_one_length() {
    let routing = random_routing(&top_k(2), 14, 1, &device());
    of_routing(BalanceLoss::Sequence, &routing, 5);
}

#[test]
#[should_panic(expected = "earlier: load of another number of experts")]
fn the_earlier_load_is_of_the_same_experts() {
    let routing = random_routing(&top_k(2), 14, 1, &device());
    let counting = Counting {
        seq_length: 7,
        earlier: Some(&[1, 2, 3]),
    };
    BalanceLoss::GlobalBatch.forward(&routing, &counting);
}
