//! What every mixture keeps, whatever its router.

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use emberlm_core::{
    Activation, Context, FeedForward, FeedForwardOutput, RandomKey, operators::Implementation,
};
use emberlm_moe::{
    BalanceLoss, Capacity, CapacityScope, CapacitySize, Choice, Choices, Dispatch, DropPriority,
    Experts, GroupScore, GroupedLinear, Groups, LocalBy, Method, MixtureOfExperts,
    MixtureOfExpertsConfig, Placement, RouterConfig, Scoring, SharedExpertConfig,
};
use emberlm_testkit::{
    assert_close, assert_gradients_match, device, laws, load_parameters, random, random_tokens,
    same_cases,
};
use proptest::{collection::vec, prelude::*};

use crate::common::{experts_of, numbers, sequences};

pub(crate) const D_MODEL: usize = 12;
pub(crate) const N_EXPERTS: usize = 5;
pub(crate) const VOCAB_SIZE: usize = 9;
pub(crate) const TOLERANCE: f64 = 1e-12;

/// Routers of every kind, whose tokens do not depend on each other.
pub(crate) fn independent() -> Vec<RouterConfig> {
    let top_k = |k| RouterConfig::mixtral(D_MODEL, N_EXPERTS, k);
    let six = RouterConfig::deepseek_v3(D_MODEL, 6, 2, 2.5);
    vec![
        top_k(2),
        top_k(N_EXPERTS),
        RouterConfig::switch(D_MODEL, N_EXPERTS),
        RouterConfig::noisy_top_k(D_MODEL, N_EXPERTS, 2),
        RouterConfig::gshard(D_MODEL, N_EXPERTS),
        RouterConfig::deepseek_v2(D_MODEL, N_EXPERTS, 3, 1.5),
        six.with_groups(Some(Groups::new(3, 2, GroupScore::BestTwo))),
        top_k(2).with_scoring(Scoring::SqrtSoftplus),
        RouterConfig::hash(D_MODEL, N_EXPERTS, 2, VOCAB_SIZE),
    ]
}

pub(crate) fn all_routers() -> Vec<RouterConfig> {
    let others = [
        RouterConfig::sinkhorn(D_MODEL, N_EXPERTS, 2),
        RouterConfig::sinkhorn(D_MODEL, N_EXPERTS, 1),
        RouterConfig::expert_choice(D_MODEL, N_EXPERTS, 2.0),
    ];
    independent().into_iter().chain(others).collect()
}

pub(crate) fn layer(router: RouterConfig) -> MixtureOfExpertsConfig {
    MixtureOfExpertsConfig::new(router, 7)
}

pub(crate) fn training(context: Context) -> Context {
    context.with_dropout_key(Some(RandomKey::new(3)))
}

/// The module with random numbers for parameters, so that equal seeds make equal layers.
fn made(
    config: &MixtureOfExpertsConfig,
    seed: u64,
    dtype: DType,
    device: &Device,
) -> MixtureOfExperts {
    let mut seed = 100 * seed;
    load_parameters(config.init(device), |name| {
        seed += 1;
        let n_experts = config.router.n_experts;
        let (d_model, d_ff) = (config.router.d_model, config.d_ff);
        let d_shared = config.shared.map_or(0, |shared| shared.d_ff);
        let shape = match name {
            "router.gate.weight" | "router.noise.weight" => vec![d_model, n_experts],
            "router.correction_bias" => vec![n_experts],
            "experts.gate.weight" | "experts.up.weight" => vec![n_experts, d_model, d_ff],
            "experts.down.weight" => vec![n_experts, d_ff, d_model],
            "experts.gate.bias" | "experts.up.bias" => vec![n_experts, d_ff],
            "experts.down.bias" => vec![n_experts, d_model],
            "shared.layer.gate.weight" | "shared.layer.up.weight" => vec![d_model, d_shared],
            "shared.layer.down.weight" => vec![d_shared, d_model],
            "shared.layer.gate.bias" | "shared.layer.up.bias" => vec![d_shared],
            "shared.layer.down.bias" => vec![d_model],
            "shared.gate.weight" => vec![d_model, 1],
            other => panic!("a parameter {other}"),
        };
        let n = shape.iter().product();
        let values: Tensor<1> = random([n], seed, DType::F64, &emberlm_testkit::device());
        TensorData::new(numbers(&values), shape).convert_dtype(dtype)
    })
}

/// A random layer in f64.
pub(crate) fn random_layer(config: &MixtureOfExpertsConfig, device: &Device) -> MixtureOfExperts {
    made(config, 1, DType::F64, device)
}

pub(crate) fn with_tokens(context: Context, [batch_size, seq_length]: [usize; 2]) -> Context {
    let tokens = random_tokens([batch_size, seq_length], VOCAB_SIZE, 5, &device());
    context.with_tokens(Some(tokens))
}

/// One of the side-by-side linear layers, by itself.
fn one_linear(layer: &GroupedLinear, expert: usize, x: Tensor<2>) -> Tensor<2> {
    let weight = layer.weight.val().narrow(0, expert, 1).squeeze_dim::<2>(0);
    let y = x.matmul(weight);
    match &layer.bias {
        Some(bias) => y + bias.val().narrow(0, expert, 1),
        None => y,
    }
}

/// An expert by its formula.
fn one_expert(experts: &Experts, expert: usize, activation: Activation, x: Tensor<2>) -> Tensor<2> {
    let up = one_linear(&experts.up, expert, x.clone());
    let inner = match &experts.gate {
        Some(gate) => activation.forward(one_linear(gate, expert, x)) * up,
        None => activation.forward(up),
    };
    one_linear(&experts.down, expert, inner)
}

/// The sum over all experts of all tokens' weights times outputs: what the layer is without shared experts.
fn by_formula(layer: &MixtureOfExperts, x: &Tensor<3>, context: &Context) -> Tensor<3> {
    let [batch_size, seq_length, d_model] = x.dims();
    let gates = layer.route(x.clone(), context).gates;
    let rows = x.clone().reshape([batch_size * seq_length, d_model]);
    let outputs = (0..layer.experts.n_experts()).map(|expert| {
        let y = one_expert(
            &layer.experts,
            expert,
            layer.config().activation,
            rows.clone(),
        );
        y * gates.clone().narrow(1, expert, 1)
    });
    let sum = outputs.reduce(|a, b| a + b).unwrap();
    sum.reshape([batch_size, seq_length, d_model])
}

/// The gradients of the input and the router, of an output that is weighted.
pub(crate) fn gradients(layer: &MixtureOfExperts, x: &Tensor<3>, y: Tensor<3>) -> Vec<TensorData> {
    let weights = random(y.dims(), 77, DType::F64, &y.device());
    let gradients = (y * weights).sum().backward();
    let by_name = emberlm_testkit::gradients_by_name(layer, &gradients);
    let of_x = x.grad(&gradients).unwrap().into_data();
    by_name.into_values().chain([of_x]).collect()
}

#[test]
fn the_layer_is_its_formula() {
    let device = device().autodiff();
    for router in all_routers() {
        for (gated, bias, activation) in [
            (true, false, Activation::Silu),
            (false, true, Activation::Gelu),
            (true, true, Activation::GeluTanh),
        ] {
            let config = layer(router.clone())
                .with_gated(gated)
                .with_bias(bias)
                .with_activation(activation);
            let moe = random_layer(&config, &device);
            let x = random([2, 7, D_MODEL], 2, DType::F64, &device).require_grad();
            for context in [sequences(7), training(sequences(7))] {
                let context = with_tokens(context, [2, 7]);
                let expected = by_formula(&moe, &x, &context);
                let output = moe.forward(x.clone(), &context).hidden;
                assert_close(output.clone(), expected.clone(), TOLERANCE);
                let ours = gradients(&moe, &x, output);
                let theirs = gradients(&moe, &x, expected);
                assert_eq!(ours.len(), theirs.len());
                for (ours, theirs) in ours.iter().zip(&theirs) {
                    let difference = emberlm_testkit::largest_difference(ours, theirs);
                    assert!(difference <= TOLERANCE, "{difference:e}: {router:?}");
                }
            }
        }
    }
}

#[test]
fn shared_experts_are_added() {
    let device = device();
    for (gated, gate) in [(true, false), (true, true), (false, true)] {
        let shared = SharedExpertConfig::new(9).with_gate(gate);
        let config = layer(RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2))
            .with_gated(gated)
            .with_shared(Some(shared));
        let moe = random_layer(&config, &device);
        let x = random([2, 7, D_MODEL], 2, DType::F64, &device);
        let context = sequences(7);
        let shared = moe.shared.as_ref().unwrap();
        let mut y = shared.layer.forward(x.clone(), &context).hidden;
        if let Some(gate) = &shared.gate {
            let weight = gate.weight.val().unsqueeze_dim(0);
            let size = (x.clone().matmul(weight) * -1.0).exp() + 1.0;
            y = y / size;
        }
        let expected = by_formula(&moe, &x, &context) + y;
        assert_close(moe.forward(x, &context).hidden, expected, TOLERANCE);
    }
}

/// All experts, alike.
#[test]
fn a_router_without_weights_takes_the_mean() {
    let device = device();
    let config = layer(RouterConfig::mixtral(D_MODEL, N_EXPERTS, N_EXPERTS));
    let mut moe = random_layer(&config, &device);
    let gate = moe.router.gate.take().unwrap();
    moe.router.gate = Some(load_parameters(gate, |_| {
        TensorData::new(vec![0f64; D_MODEL * N_EXPERTS], [D_MODEL, N_EXPERTS])
    }));
    let x = random([1, 6, D_MODEL], 2, DType::F64, &device);
    let rows: Tensor<2> = x.clone().squeeze_dim(0);
    let outputs = (0..N_EXPERTS)
        .map(|expert| one_expert(&moe.experts, expert, Activation::Silu, rows.clone()));
    let mean = outputs.reduce(|a, b| a + b).unwrap() / N_EXPERTS as f64;
    assert_close(
        moe.forward(x, &sequences(6)).hidden,
        mean.unsqueeze_dim(0),
        TOLERANCE,
    );
}

#[test]
fn gradients_are_slopes() {
    let device = device().autodiff();
    for router in all_routers() {
        let config = layer(router)
            .with_activation(Activation::Gelu)
            .with_bias(true)
            .with_shared(Some(SharedExpertConfig::new(4).with_gate(true)));
        let moe = random_layer(&config, &device);
        let x = random([2, 3, D_MODEL], 2, DType::F64, &device);
        for context in [sequences(3), training(sequences(3))] {
            let context = with_tokens(context, [2, 3]);
            assert_gradients_match(x.clone(), |x| moe.forward(x, &context).hidden);
        }
    }
}

/// Of the sums of all losses but the load's, which the fixtures have.
#[test]
fn losses_have_their_slopes() {
    let device = device().autodiff();
    for router in [
        RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2),
        RouterConfig::deepseek_v3(D_MODEL, N_EXPERTS, 2, 2.5),
    ] {
        for balance in [
            BalanceLoss::Switch,
            BalanceLoss::HuggingFaceSwitch,
            BalanceLoss::Sequence,
        ] {
            let config = with_all_losses(layer(router.clone())).with_balance(Some(balance));
            let moe = random_layer(&config, &device);
            let x = random([2, 3, D_MODEL], 2, DType::F64, &device);
            assert_gradients_match(x, |x| {
                let losses = moe.forward(x, &sequences(3)).losses;
                Tensor::cat(losses.iter().map(|loss| loss.loss.value()).collect(), 0)
            });
        }
    }
}

fn random_choices() -> impl Strategy<Value = Choices> {
    (0..9usize, 1..7usize).prop_flat_map(|(n_tokens, n_experts)| {
        vec(vec(any::<bool>(), n_experts), n_tokens).prop_map(move |chosen| {
            let mut all = Vec::new();
            for (token, chosen) in (0..).zip(&chosen) {
                let experts = (0..).zip(chosen).filter(|(_, chosen)| **chosen);
                all.extend((0..).zip(experts).map(|(rank, (expert, _))| Choice {
                    token,
                    expert,
                    rank,
                }));
            }
            // In an order that is not theirs.
            Choices::new(n_tokens, n_experts, all.into_iter().rev().collect())
        })
    })
}

proptest! {
    #![proptest_config(same_cases(1))]

    /// No choice is lost or doubled, and rows that fill up count for nothing.
    #[test]
    fn tokens_go_to_their_experts_and_back(choices in random_choices(), more in 0..4usize) {
        let device = device();
        let load = choices.load();
        let most = load.iter().max().copied().unwrap_or(0) as usize;
        let expected: Vec<[u32; 2]> = {
            let mut all: Vec<_> = choices.all().iter().map(|choice| [choice.expert, choice.token]).collect();
            all.sort_unstable();
            all
        };
        for rows in [None, Some(most + more)] {
            let dispatch = Dispatch::new(&choices, rows);
            let sizes = dispatch.group_sizes();
            prop_assert_eq!(sizes.len(), choices.n_experts());
            let mut found = Vec::new();
            let mut first = 0;
            for (expert, (size, load)) in sizes.iter().zip(&load).enumerate() {
                prop_assert_eq!(*size, rows.unwrap_or(*load as usize));
                let of_expert = &dispatch.tokens()[first..first + *load as usize];
                found.extend(of_expert.iter().map(|token| [expert as u32, *token as u32]));
                first += size;
            }
            prop_assert_eq!(&found, &expected);
            prop_assert_eq!(first, dispatch.tokens().len());
            if choices.all().is_empty() {
                continue;
            }
            let x = random([choices.n_tokens(), 3], 1, DType::F64, &device);
            let gates = choices.mask(&device, DType::F64);
            let times = gates.clone().sum_dim(1);
            let back = dispatch.combine(dispatch.gather(x.clone()), gates);
            let expected = x * times;
            prop_assert!(numbers(&(back - expected)).iter().all(|difference| difference.abs() < 1e-14));
        }
    }
}

#[test]
#[should_panic(expected = "rows_per_expert: expert 1 has 2 choices, and 1 rows")]
fn rows_hold_all_choices() {
    let choice = |token| Choice {
        token,
        expert: 1,
        rank: 0,
    };
    Dispatch::new(&Choices::new(2, 3, vec![choice(0), choice(1)]), Some(1));
}

/// Tokens in another order give the outputs in that order, where nothing is dropped.
#[test]
fn the_order_of_tokens_does_not_show() {
    let device = device();
    let n = 11;
    let order: Vec<i64> = (0..n as i64).map(|i| i * 4 % n as i64).collect();
    let order = Tensor::<1, Int>::from_data(TensorData::new(order, [n]), &device);
    for router in all_routers() {
        let moe = random_layer(&layer(router), &device);
        let x = random([1, n, D_MODEL], 2, DType::F64, &device);
        let context = with_tokens(sequences(n), [1, n]);
        let tokens = context.tokens.clone().unwrap();
        let reordered = sequences(n).with_tokens(Some(tokens.select(1, order.clone())));
        let y = moe.forward(x.clone(), &context).hidden;
        let other = moe.forward(x.select(1, order.clone()), &reordered).hidden;
        assert_close(other, y.select(1, order.clone()), TOLERANCE);
    }
}

fn keeps_causality(config: &MixtureOfExpertsConfig, context: &Context) {
    let device = device().autodiff();
    let moe = made(config, 1, DType::F32, &device);
    laws::causal([2, 6, D_MODEL], &device, |x| moe.forward(x, context).hidden);
}

#[test]
fn later_tokens_change_nothing() {
    let context = with_tokens(sequences(6), [2, 6]);
    for router in independent() {
        let config = layer(router).with_shared(Some(SharedExpertConfig::new(3)));
        assert_eq!(config.validate_causal(), Ok(()));
        let capacity = Capacity::new(CapacitySize::Factor(0.7)).with_scope(CapacityScope::Sequence);
        let bounded = config.clone().with_capacity(Some(capacity));
        assert_eq!(bounded.validate_causal(), Ok(()));
        for config in [config, bounded] {
            keeps_causality(&config, &context);
            keeps_causality(&config, &training(context.clone()));
        }
    }
    // Sinkhorn's routers look ahead in training alone.
    keeps_causality(
        &layer(RouterConfig::sinkhorn(D_MODEL, N_EXPERTS, 2)),
        &context,
    );
}

#[test]
#[should_panic(expected = "largest difference")]
fn the_causal_law_catches_expert_choice() {
    let router = RouterConfig::expert_choice(D_MODEL, N_EXPERTS, 2.0);
    keeps_causality(&layer(router), &sequences(6));
}

#[test]
#[should_panic(expected = "largest difference")]
fn the_causal_law_catches_sinkhorn_in_training() {
    let router = RouterConfig::sinkhorn(D_MODEL, N_EXPERTS, 2);
    keeps_causality(&layer(router), &training(sequences(6)));
}

fn caught_by_the_causal_law(priority: DropPriority) {
    let capacity = Capacity::new(CapacitySize::Factor(0.7))
        .with_scope(CapacityScope::Sequence)
        .with_priority(priority);
    let config = layer(RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2)).with_capacity(Some(capacity));
    keeps_causality(&config, &training(sequences(6)));
}

#[test]
#[should_panic(expected = "largest difference")]
fn the_causal_law_catches_first_choices() {
    caught_by_the_causal_law(DropPriority::FirstChoices);
}

#[test]
#[should_panic(expected = "largest difference")]
fn the_causal_law_catches_the_largest_probabilities() {
    caught_by_the_causal_law(DropPriority::Probability);
}

/// Without jitter, chance or noise, so that training is evaluation.
pub(crate) fn without_chance() -> [RouterConfig; 4] {
    [
        RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2),
        RouterConfig::switch(D_MODEL, N_EXPERTS).with_jitter(0.0),
        RouterConfig::deepseek_v3(D_MODEL, N_EXPERTS, 3, 2.5),
        RouterConfig::expert_choice(D_MODEL, N_EXPERTS, 2.0),
    ]
}

#[test]
fn more_experts_than_tokens() {
    let device = device().autodiff();
    for router in [
        RouterConfig::mixtral(D_MODEL, 40, 3),
        RouterConfig::deepseek_v3(D_MODEL, 40, 3, 1.0),
        RouterConfig::sinkhorn(D_MODEL, 40, 2),
        RouterConfig::expert_choice(D_MODEL, 40, 1.0),
    ] {
        let moe = random_layer(&layer(router), &device);
        let x = random([1, 2, D_MODEL], 2, DType::F64, &device);
        for context in [sequences(2), training(sequences(2))] {
            let output = moe.forward(x.clone(), &context).hidden;
            assert_close(output, by_formula(&moe, &x, &context), TOLERANCE);
        }
    }
}

pub(crate) fn with_all_losses(config: MixtureOfExpertsConfig) -> MixtureOfExpertsConfig {
    config
        .with_balance(Some(BalanceLoss::Switch))
        .with_z_loss(true)
        .with_importance(true)
}

#[test]
fn an_empty_batch_is_no_matter() {
    let device = device().autodiff();
    let capacity = Capacity::new(CapacitySize::Factor(1.0)).with_padded(true);
    for router in all_routers() {
        for balance in [BalanceLoss::Switch, BalanceLoss::Sequence] {
            let plain = with_all_losses(layer(router.clone())).with_balance(Some(balance));
            let shared = plain.clone().with_shared(Some(SharedExpertConfig::new(3)));
            for config in [shared.with_capacity(Some(capacity)), plain] {
                let moe = random_layer(&config, &device);
                for dims in [[0, 5, D_MODEL], [2, 0, D_MODEL]] {
                    let tokens = Tensor::<2, Int>::zeros([dims[0], dims[1]], &device);
                    let context = sequences(dims[1]).with_tokens(Some(tokens));
                    for context in [context.clone(), training(context)] {
                        let x = Tensor::zeros(dims, (&device, DType::F64));
                        let output = moe.forward(x, &context);
                        assert_eq!(output.hidden.dims(), dims);
                        let statistics = output.statistics().unwrap().clone();
                        assert_eq!(statistics.n_tokens, 0);
                        assert_eq!(statistics.load, vec![0; config.router.n_experts]);
                        for loss in output.losses {
                            let value: f64 = loss.loss.value().into_scalar();
                            assert_eq!(value, 0.0, "{:?}, {router:?}", loss.kind);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn what_is_no_number_stays_where_it_is() {
    let device = device();
    for router in independent() {
        // A hash does not look at the hidden states, its experts do.
        let is_hash = matches!(router.method, Method::Hash { .. });
        let moe = random_layer(&layer(router), &device);
        let x = random([2, 5, D_MODEL], 2, DType::F64, &device);
        let context = with_tokens(sequences(5), [2, 5]);
        let clean = numbers(&moe.forward(x.clone(), &context).hidden);
        let nan = Tensor::full([1, 1, 1], f64::NAN, (&device, DType::F64));
        let x = x.slice_assign([1..2, 2..3, 4..5], nan);
        let output = moe.forward(x, &context);
        let statistics = output.statistics().unwrap().clone();
        assert_eq!(statistics.n_not_finite, u64::from(!is_hash));
        let hidden = numbers(&output.hidden);
        for (token, hidden) in hidden.chunks(D_MODEL).enumerate() {
            match token {
                7 => assert!(hidden.iter().all(|value| value.is_nan())),
                _ => assert_eq!(hidden, &clean[token * D_MODEL..][..D_MODEL]),
            }
        }
    }
}

/// The experts in two halves, each by itself.
struct InHalves;

impl Placement for InHalves {
    fn run(
        &self,
        experts: &Experts,
        rows: Tensor<2>,
        group_sizes: &[usize],
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        let [n_rows, _] = rows.dims();
        let (first, second) = group_sizes.split_at(2);
        let n: usize = first.iter().sum();
        let none = |n| vec![0; n];
        let halves = [
            (0, n, [first.to_vec(), none(second.len())].concat()),
            (n, n_rows - n, [none(first.len()), second.to_vec()].concat()),
        ];
        let parts = halves.map(|(start, n, sizes)| {
            experts.forward(rows.clone().narrow(0, start, n), &sizes, dropout_key)
        });
        Tensor::cat(parts.to_vec(), 0)
    }
}

#[test]
fn the_place_of_the_experts_does_not_show() {
    let device = device();
    let config = layer(RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2)).with_bias(true);
    let moe = random_layer(&config, &device);
    let x = random([2, 30, D_MODEL], 2, DType::F64, &device);
    let context = sequences(30);
    let expected = moe.forward(x.clone(), &context);
    let check = |output: FeedForwardOutput| {
        assert_close(output.hidden.clone(), expected.hidden.clone(), TOLERANCE);
        assert_eq!(output.statistics(), expected.statistics());
    };
    for implementation in [
        Implementation::Reference,
        Implementation::Portable,
        Implementation::Native,
    ] {
        check(moe.forward_placed(x.clone(), &context, &LocalBy(implementation)));
    }
    check(moe.forward_placed(x, &context, &InHalves));
}

/// Choices are made of logits by Burn's product as they are by ours.
#[test]
fn other_products_make_the_same_choices() {
    let device = device();
    let router = RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2);
    let moe = made(&layer(router), 1, DType::F32, &device);
    let x = random([1, 200, D_MODEL], 2, DType::F32, &device);
    let choices = moe.route(x.clone(), &sequences(200)).choices;
    let weight = moe.router.gate.as_ref().unwrap().weight.val();
    let logits = x.squeeze_dim::<2>(0).matmul(weight);
    let logits = numbers(&logits);
    for (logits, experts) in logits.chunks(N_EXPERTS).zip(experts_of(&choices)) {
        let mut order: Vec<usize> = (0..N_EXPERTS).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
        assert_eq!(order[..2], experts);
    }
}

#[test]
#[cfg(not(feature = "ndarray"))]
fn routers_compute_in_single_precision_at_least() {
    let device = device();
    for router in independent() {
        let config = layer(router).with_z_loss(true);
        for (dtype, tolerance) in [(DType::BF16, 0.02), (DType::F16, 0.002)] {
            // In f32 first: routers may keep their weights in it.
            let wide = made(&config, 1, DType::F32, &device);
            let x = random([2, 7, D_MODEL], 2, dtype, &device);
            let context = with_tokens(sequences(7), [2, 7]);
            let expected = wide.route(x.clone().cast(DType::F32), &context);
            let routing = wide.route(x.clone(), &context);
            assert_eq!(routing.gates.dtype(), DType::F32);
            assert_eq!(routing.choices, expected.choices);
            assert_eq!(numbers(&routing.gates), numbers(&expected.gates));

            let narrow = made(&config, 1, dtype, &device);
            let routing = narrow.route(x.clone(), &context);
            let logits = routing.logits.map(|logits| logits.dtype());
            assert!(logits.is_none_or(|dtype| dtype == DType::F32));
            let output = narrow.forward(x.clone(), &context);
            assert_eq!(output.hidden.dtype(), dtype);
            // The same weights, in f32.
            let rounded = load_parameters(narrow.clone(), |name| {
                let parameters = emberlm_testkit::parameters_by_name(&narrow);
                parameters[name].clone().convert_dtype(DType::F32)
            });
            let expected = rounded.forward(x.cast(DType::F32), &context);
            let hidden = output.hidden.clone().cast(DType::F32);
            assert_close(hidden, expected.hidden.clone(), tolerance);
            assert_eq!(output.statistics(), expected.statistics());
            for (ours, theirs) in output.losses.iter().zip(&expected.losses) {
                assert_eq!(ours.loss.value().dtype(), DType::F32);
                assert_close(ours.loss.value(), theirs.loss.value(), 1e-6);
            }
        }
    }
}

#[test]
fn chance_is_drawn_in_training_alone_and_by_the_key() {
    let device = device();
    for router in [
        RouterConfig::switch(D_MODEL, N_EXPERTS),
        RouterConfig::noisy_top_k(D_MODEL, N_EXPERTS, 2),
        RouterConfig::gshard(D_MODEL, N_EXPERTS),
    ] {
        let moe = random_layer(&layer(router.clone()), &device);
        let x = random([2, 20, D_MODEL], 2, DType::F64, &device);
        let of = |key: Option<u64>| {
            let context = sequences(20).with_dropout_key(key.map(RandomKey::new));
            numbers(&moe.forward(x.clone(), &context).hidden)
        };
        assert_eq!(of(None), of(None));
        assert_eq!(of(Some(1)), of(Some(1)));
        assert_ne!(of(Some(1)), of(Some(2)), "{router:?}");
        assert_ne!(of(Some(1)), of(None), "{router:?}");
    }
    // Dropout inside of the experts.
    let router = RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2);
    let config = layer(router);
    let x = random([2, 20, D_MODEL], 2, DType::F64, &device);
    let of = |dropout, context: &Context| {
        let moe = random_layer(&config.clone().with_dropout(dropout), &device);
        numbers(&moe.forward(x.clone(), context).hidden)
    };
    let plain = of(0.0, &sequences(20));
    assert_eq!(of(0.4, &sequences(20)), plain);
    assert_ne!(of(0.4, &training(sequences(20))), plain);
    assert_eq!(of(0.0, &training(sequences(20))), plain);
}

#[test]
#[should_panic(expected = "routing: of 3 tokens, there are 4")]
fn a_routing_is_of_its_tokens() {
    let device = device();
    let moe = layer(RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2)).init(&device);
    let x = |n| Tensor::ones([1, n, D_MODEL], &device);
    let routing = moe.route(x(3), &sequences(3));
    moe.forward_routed(x(4), routing, &sequences(4), &emberlm_moe::Local);
}
