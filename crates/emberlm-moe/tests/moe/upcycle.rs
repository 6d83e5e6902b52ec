//! Mixtures that are made of a dense layer.

use burn::tensor::{DType, Device};
use emberlm_core::{Activation, DenseLayer, FeedForward, FeedForwardConfig};
use emberlm_moe::{
    Capacity, CapacitySize, Gates, MixtureOfExpertsConfig, RouterConfig, SharedExpertConfig,
    UpcycleError,
};
use emberlm_testkit::{assert_close, device, random, to_f64};

use crate::common::sequences;
use crate::laws::{D_MODEL, N_EXPERTS, TOLERANCE, VOCAB_SIZE, layer, with_tokens};

fn dense(gated: bool, bias: bool, activation: Activation, device: &Device) -> DenseLayer {
    let config = FeedForwardConfig::new(D_MODEL, 7)
        .with_bias(bias)
        .with_activation(activation);
    to_f64(config.init_dense(gated, device))
}

#[test]
fn an_upcycled_layer_is_the_dense_one() {
    let device = device().autodiff();
    let x = random([2, 7, D_MODEL], 2, DType::F64, &device);
    let routers = [
        RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2),
        RouterConfig::noisy_top_k(D_MODEL, N_EXPERTS, 3),
        RouterConfig::gshard(D_MODEL, N_EXPERTS),
        RouterConfig::deepseek_v3(D_MODEL, N_EXPERTS, 2, 1.0),
        RouterConfig::hash(D_MODEL, N_EXPERTS, 2, VOCAB_SIZE),
    ];
    for router in routers {
        for (gated, bias, activation) in [
            (true, false, Activation::Silu),
            (false, false, Activation::Gelu),
            (true, true, Activation::GeluTanh),
            (false, true, Activation::Relu),
        ] {
            let dense = dense(gated, bias, activation, &device);
            let moe = layer(router.clone())
                .with_gated(gated)
                .with_bias(bias)
                .with_activation(activation)
                .upcycle(&dense)
                .unwrap();
            let context = with_tokens(sequences(7), [2, 7]);
            let output = moe.forward(x.clone(), &context).hidden;
            let expected = dense.forward(x.clone(), &context).hidden;
            assert_close(output.clone(), expected, TOLERANCE);
            // The experts are parameters of their own, of which each has its gradient.
            let gradients = output.sum().backward();
            let gradients = emberlm_testkit::gradients_by_name(&moe, &gradients);
            assert!(gradients.contains_key("experts.down.weight"));
        }
    }
}

#[test]
fn not_every_layer_can_be_upcycled() {
    let device = device();
    let silu = |gated, bias| dense(gated, bias, Activation::Silu, &device);
    let mixtral = || RouterConfig::mixtral(D_MODEL, N_EXPERTS, 2);
    let config = || layer(mixtral());
    let refused = |config: MixtureOfExpertsConfig, dense: &DenseLayer| {
        config.upcycle(dense).expect_err("it is refused")
    };
    let gated = silu(true, false);
    assert!(config().upcycle(&gated).is_ok());

    assert_eq!(refused(config(), &silu(false, false)), UpcycleError::Gate);
    assert_eq!(
        refused(config().with_gated(false), &gated),
        UpcycleError::Gate
    );
    assert_eq!(refused(config(), &silu(true, true)), UpcycleError::Bias);
    assert_eq!(
        refused(config().with_bias(true), &gated),
        UpcycleError::Bias
    );
    assert_eq!(
        refused(MixtureOfExpertsConfig::new(mixtral(), 8), &gated),
        UpcycleError::Sizes {
            dense: [D_MODEL, 7],
            experts: [D_MODEL, 8],
        }
    );
    assert_eq!(
        refused(config().with_activation(Activation::Gelu), &gated),
        UpcycleError::Activation {
            dense: Activation::Silu,
            experts: Activation::Gelu,
        }
    );
    let in_evaluation = Capacity::new(CapacitySize::Factor(1.0)).with_in_evaluation(true);
    let expert_choice = RouterConfig::expert_choice(D_MODEL, N_EXPERTS, 2.0);
    for config in [
        layer(mixtral().with_gates(Gates::Scores)),
        layer(mixtral().with_scale(2.5)),
        layer(expert_choice.with_gates(Gates::Renormalised)),
        config().with_shared(Some(SharedExpertConfig::new(3))),
        config().with_capacity(Some(in_evaluation)),
    ] {
        let error = refused(config, &gated);
        assert_eq!(error, UpcycleError::Weights);
        assert!(error.to_string().starts_with("router: "));
    }
}
