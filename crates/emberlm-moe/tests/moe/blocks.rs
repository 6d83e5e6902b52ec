//! Hugging Face's blocks alone: outputs, routes and every gradient. `fixtures/blocks/generate.py` made the numbers.

use burn::tensor::{DType, TensorData};
use emberlm_core::{Activation, FeedForward};
use emberlm_moe::{
    Capacity, CapacityScope, CapacitySize, Gates, GroupScore, Groups, MixtureOfExpertsConfig,
    RouterConfig, SharedExpertConfig,
};
use emberlm_testkit::{Fixture, device, gradients_by_name, load_parameters, parameters_by_name};

use crate::common::{check, check_data, experts_of, load, rows, sequences, sorted, spread};

const SEQ_LENGTH: usize = 12;
const D_MODEL: usize = 16;
const D_FF: usize = 10;
const N_EXPERTS: usize = 8;

/// A parameter of ours from those of the block (`part` is `param`), or its gradient (`grad`): a linear layer has its
/// weight the other way round, and a gate lies above what it gates.
fn of_block(fixture: &Fixture, part: &str, name: &str) -> TensorData {
    let device = device();
    let file = fixture.names(&format!("{part}."));
    let is_switch = file.iter().any(|name| name.starts_with("router."));
    let read = |name: &str| {
        let name = format!("{part}.{name}");
        fixture.tensor::<2>(&name, DType::F64, &device).transpose()
    };
    let linear = |name: &str| read(&format!("{name}.weight")).into_data();
    let stacked = |name: &str| {
        let name = format!("{part}.experts.{name}");
        fixture
            .tensor::<3>(&name, DType::F64, &device)
            .swap_dims(1, 2)
    };
    let side_by_side = |name: &str| {
        let of_expert = |expert| read(&format!("experts.expert_{expert}.{name}.weight"));
        let all = (0..N_EXPERTS).map(|expert| of_expert(expert).unsqueeze_dim::<3>(0));
        burn::tensor::Tensor::cat(all.collect(), 0).into_data()
    };
    match (name, is_switch) {
        ("router.gate.weight", true) => linear("router.classifier"),
        ("router.gate.weight", false) => linear("gate"),
        ("router.correction_bias", _) => {
            fixture.data(&format!("{part}.gate.e_score_correction_bias"))
        }
        ("experts.up.weight", true) => side_by_side("wi"),
        ("experts.down.weight", true) => side_by_side("wo"),
        ("experts.gate.weight", _) => stacked("gate_up_proj").narrow(2, 0, D_FF).into_data(),
        ("experts.up.weight", false) => stacked("gate_up_proj").narrow(2, D_FF, D_FF).into_data(),
        ("experts.down.weight", false) => stacked("down_proj").into_data(),
        ("shared.layer.gate.weight", _) => linear("shared_experts.gate_proj"),
        ("shared.layer.up.weight", _) => linear("shared_experts.up_proj"),
        ("shared.layer.down.weight", _) => linear("shared_experts.down_proj"),
        (other, _) => panic!("{other} is nothing of the block"),
    }
}

fn check_block(file: &str, config: MixtureOfExpertsConfig) {
    let fixture = load(&format!("blocks/{file}"));
    let device = device().autodiff();
    let context = sequences(SEQ_LENGTH);
    for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 1e-4)] {
        let layer = load_parameters(config.init(&device), |name| {
            of_block(&fixture, "param", name).convert_dtype(dtype)
        });
        let parameters = parameters_by_name(&layer);
        let n_ours: usize = parameters.values().map(TensorData::num_elements).sum();
        let theirs = fixture.names("param.").into_iter();
        let n_theirs = theirs.map(|name| fixture.data(&format!("param.{name}")).num_elements());
        assert_eq!(n_ours, n_theirs.sum::<usize>(), "numbers of the block");

        let x = fixture
            .tensor::<3>("in.hidden", dtype, &device)
            .require_grad();
        let routing = layer.route(x.clone(), &context);
        check(
            &fixture,
            "extra.logits",
            routing.logits.as_ref().unwrap(),
            tolerance,
        );
        let indices = fixture.data("extra.indices");
        assert_eq!(sorted(experts_of(&routing.choices)), sorted(rows(&indices)));
        let weights = spread(&indices, &fixture.data("extra.weights"), N_EXPERTS);
        check_data(
            "extra.weights",
            &routing.gates.to_data(),
            &weights,
            tolerance,
        );

        let output = layer.forward(x.clone(), &context);
        check(&fixture, "out.hidden", &output.hidden, tolerance);
        assert!(output.losses.is_empty());
        let statistics = output.statistics().unwrap().clone();
        assert_eq!(statistics.load, routing.choices.load());
        if config.capacity.is_some() {
            let kept: i64 = fixture.data("extra.dispatch").iter::<i64>().sum();
            assert_eq!(statistics.n_choices() - statistics.n_dropped, kept as u64);
        }

        let cotangent = fixture.tensor::<3>("ct.hidden", dtype, &device);
        let gradients = (output.hidden * cotangent).sum().backward();
        check(
            &fixture,
            "grad.hidden",
            &x.grad(&gradients).unwrap(),
            tolerance,
        );
        let gradients = gradients_by_name(&layer, &gradients);
        for name in parameters.keys() {
            if name == "router.correction_bias" {
                assert!(!gradients.contains_key(name), "{name} has a gradient");
                continue;
            }
            let gradient = &gradients[name];
            check_data(name, gradient, &of_block(&fixture, "grad", name), tolerance);
            if name.starts_with("experts.") {
                let values: Vec<f64> = gradient.iter::<f64>().collect();
                let of_experts = values.chunks(values.len() / N_EXPERTS);
                for (of_expert, load) in of_experts.zip(&statistics.load) {
                    let is_zero = of_expert.iter().all(|value| *value == 0.0);
                    assert_eq!(is_zero, *load == 0, "{name}");
                }
            }
        }
    }
}

fn mixtral() -> RouterConfig {
    RouterConfig::mixtral(D_MODEL, N_EXPERTS, 3)
}

#[test]
fn mixtral_block() {
    check_block("mixtral", MixtureOfExpertsConfig::new(mixtral(), D_FF));
}

#[test]
#[should_panic(expected = "extra.weights")]
fn not_renormalised_it_is_another_block() {
    let router = mixtral().with_gates(Gates::Scores);
    check_block("mixtral", MixtureOfExpertsConfig::new(router, D_FF));
}

fn switch(capacity: usize) -> MixtureOfExpertsConfig {
    // Jitter is off outside training.
    let capacity = Capacity::new(CapacitySize::Tokens(capacity))
        .with_scope(CapacityScope::Sequence)
        .with_in_evaluation(true);
    MixtureOfExpertsConfig::new(RouterConfig::switch(D_MODEL, N_EXPERTS), D_FF)
        .with_activation(Activation::Relu)
        .with_gated(false)
        .with_capacity(Some(capacity))
}

#[test]
fn switch_block() {
    check_block("switch", switch(SEQ_LENGTH));
}

#[test]
fn switch_block_that_drops_tokens() {
    check_block("switch_drop", switch(2));
}

#[test]
#[should_panic(expected = "out.hidden")]
fn sequences_that_compete_are_another_block() {
    let mut config = switch(2);
    config.capacity = config
        .capacity
        .map(|capacity| capacity.with_scope(CapacityScope::Batch));
    check_block("switch_drop", config);
}

fn deepseek(router: RouterConfig, n_shared: usize) -> MixtureOfExpertsConfig {
    MixtureOfExpertsConfig::new(router, D_FF)
        .with_shared(Some(SharedExpertConfig::new(n_shared * D_FF)))
}

#[test]
fn deepseek_v2_block() {
    let greedy = RouterConfig::deepseek_v2(D_MODEL, N_EXPERTS, 3, 1.0);
    check_block("deepseek_v2_greedy", deepseek(greedy, 1));
}

#[test]
fn deepseek_v2_block_with_groups() {
    let limited = RouterConfig::deepseek_v2(D_MODEL, N_EXPERTS, 3, 2.5)
        .with_groups(Some(Groups::new(4, 2, GroupScore::Maximum)));
    check_block("deepseek_v2_group", deepseek(limited, 2));
}

fn deepseek_v3() -> RouterConfig {
    RouterConfig::deepseek_v3(D_MODEL, N_EXPERTS, 3, 2.5)
}

#[test]
fn deepseek_v3_block() {
    let limited = deepseek_v3().with_groups(Some(Groups::new(2, 1, GroupScore::BestTwo)));
    check_block("deepseek_v3", deepseek(limited, 2));
}

#[test]
fn deepseek_v3_block_without_groups_and_renormalisation() {
    let plain = deepseek_v3().with_gates(Gates::Scores);
    check_block("deepseek_v3_plain", deepseek(plain, 1));
}
