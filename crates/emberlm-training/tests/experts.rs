//! Training of models with experts: their losses, their bias, their figures, and exact continuation.

use burn::{
    module::Param,
    tensor::{DType, Device, Tensor, s},
    train::{InferenceStep, TrainStep},
};
use emberlm_core::{
    AuxiliaryKind, AuxiliaryLoss, CrossEntropyConfig, LossModel, StepSoFar, TokenBatch,
};
use emberlm_models::{Decoder, DecoderConfig, ExpertLayers, FeedForwardLayer};
use emberlm_moe::{BalanceLoss, MixtureOfExperts, MixtureOfExpertsConfig, RouterConfig};
use emberlm_testkit::{
    device, gradients_by_name, largest_difference, optimizer_gradients_by_name, parameters_by_name,
    random_tokens, to_f64,
};
use emberlm_training::{
    AuxiliaryWeights, CheckpointStore, LanguageModel, Session, StepOutput, TrainingConfig,
};

const N_EXPERTS: usize = 4;

fn decoder(balance: Option<BalanceLoss>, bias: bool, device: &Device) -> Decoder {
    let router = RouterConfig::mixtral(12, N_EXPERTS, 2).with_correction_bias(bias);
    let mixture = MixtureOfExpertsConfig::new(router, 8)
        .with_balance(balance)
        .with_z_loss(balance.is_some());
    DecoderConfig::new(32, 2, 12, 3)
        .with_experts(Some(ExpertLayers::new(mixture)))
        .init(device)
}

fn batch(rows: usize, seed: u64, device: &Device) -> TokenBatch {
    let tokens = random_tokens([rows, 9], 32, seed, device);
    TokenBatch::new(
        tokens.clone().slice(s![.., 0..8]),
        tokens.slice(s![.., 1..9]),
    )
}

fn rows(batch: &TokenBatch, range: std::ops::Range<usize>) -> TokenBatch {
    TokenBatch::new(
        batch.inputs.clone().slice(s![range.clone(), ..]),
        batch.targets.clone().slice(s![range, ..]),
    )
}

fn mixture(model: &LanguageModel<Decoder>, layer: usize) -> &MixtureOfExperts {
    match &model.model.stack.blocks[layer].feed_forward {
        FeedForwardLayer::Experts(experts) => experts,
        FeedForwardLayer::Dense(_) => panic!("the layer has no experts"),
    }
}

fn value(x: Tensor<1>) -> f64 {
    x.into_data()
        .convert_dtype(DType::F64)
        .iter::<f64>()
        .next()
        .expect("one number")
}

#[test]
fn the_gradient_is_that_of_the_weighted_sum() {
    let device = device().autodiff();
    let weights = AuxiliaryWeights::new()
        .with_balance(0.3)
        .with_router_z(0.05);
    let model = LanguageModel::new(decoder(Some(BalanceLoss::Switch), false, &device), 0.0, 0.0);
    let model = to_f64(model.with_auxiliary(weights));
    let batch = batch(3, 1, &device);
    let step = TrainStep::step(&model, batch.clone());

    let loss = model.model.loss(batch, &CrossEntropyConfig::new());
    let of = |kind| {
        let losses = loss.routing.iter().flat_map(|layer| &layer.losses);
        AuxiliaryLoss::over_layers(losses, kind).expect("the model has it")
    };
    let [balance, z] = [AuxiliaryKind::Balance, AuxiliaryKind::RouterZ].map(of);
    assert!(
        (step.item.auxiliary(AuxiliaryKind::Balance).unwrap() - value(balance.clone())).abs()
            < 1e-12
    );
    assert!(
        (step.item.auxiliary(AuxiliaryKind::RouterZ).unwrap() - value(z.clone())).abs() < 1e-12
    );
    // Two layers, each near 1 where the load is balanced.
    assert!((1.5..4.0).contains(&value(balance.clone())));
    let n_targets = 3.0 * 8.0;
    let total = loss.cross_entropy.nll_sum + (balance * 0.3 + z * 0.05) * n_targets;
    let expected = gradients_by_name(&model, &total.backward());
    let ours = optimizer_gradients_by_name(&model, &step.grads);
    assert_eq!(ours.len(), expected.len());
    for (name, ours) in ours {
        let difference = largest_difference(&ours, &expected[&name]);
        assert!(difference < 1e-10, "{name}: {difference:e}");
    }
}

/// The share of each expert is that of the whole step, as far as it has gone; the probabilities are the micro-batch's.
#[test]
fn the_loss_of_the_global_batch_knows_the_micro_batches_before() {
    let device = device();
    let model = to_f64(LanguageModel::new(
        decoder(Some(BalanceLoss::GlobalBatch), false, &device),
        0.0,
        0.0,
    ));
    let whole = batch(4, 2, &device);
    let [first, second] = [rows(&whole, 0..2), rows(&whole, 2..4)];
    let alone = InferenceStep::step(&model, second.clone());
    let before = InferenceStep::step(&model, first);
    let loads = before
        .routing
        .iter()
        .map(|(layer, routing)| (*layer, routing.load.clone().into()));
    let told = TokenBatch {
        so_far: StepSoFar {
            step: 0,
            loads: loads.collect::<Vec<_>>().into(),
        },
        ..second
    };
    let after = InferenceStep::step(&model, told);
    assert_eq!(after.routing, alone.routing);
    let balance = |output: &StepOutput| output.auxiliary(AuxiliaryKind::Balance).unwrap();
    assert!((balance(&after) - balance(&alone)).abs() > 1e-6);
    // All choices of both are those of the whole batch.
    let mut both = before;
    both.add(&after);
    let all = InferenceStep::step(&model, whole);
    assert_eq!(
        both.routing
            .iter()
            .map(|(_, of)| &of.load)
            .collect::<Vec<_>>(),
        all.routing
            .iter()
            .map(|(_, of)| &of.load)
            .collect::<Vec<_>>()
    );
}

fn config(accumulation: usize) -> TrainingConfig {
    TrainingConfig::new(20, 4, 8).with_accumulation(accumulation)
}

fn steps(
    session: &mut Session<LanguageModel<Decoder>>,
    config: &TrainingConfig,
    n: u64,
    device: &Device,
) -> Vec<StepOutput> {
    let mut outputs = Vec::new();
    for _ in 0..n {
        let whole = batch(4, 100 + session.counters.step, device);
        let size = 4 / config.accumulation;
        let micro = (0..config.accumulation).map(|i| Ok(rows(&whole, i * size..(i + 1) * size)));
        let mut micro = micro.collect::<Vec<_>>().into_iter();
        outputs.push(session.step(config, &mut micro).expect("in memory").0);
    }
    outputs
}

#[test]
fn the_bias_moves_once_a_step_by_the_load_of_all_its_micro_batches() {
    let device = device();
    let autodiff = device.clone().autodiff();
    for accumulation in [1, 2] {
        let config = config(accumulation);
        let model = LanguageModel::with_config(decoder(None, true, &autodiff), &config);
        let mut session = Session::new(model, &config);
        let bias = |session: &Session<LanguageModel<Decoder>>, layer| -> Vec<f32> {
            let bias = mixture(&session.model, layer)
                .router
                .correction_bias
                .as_ref();
            let bias = bias.map(Param::val).expect("it has one");
            bias.into_data().iter::<f32>().collect()
        };
        assert_eq!(bias(&session, 0), [0.0; N_EXPERTS]);
        let output = steps(&mut session, &config, 1, &autodiff).remove(0);
        assert_eq!(output.routing.len(), 2);
        for (layer, routing) in &output.routing {
            assert_eq!(routing.n_choices(), 4 * 8 * 2);
            let expected = routing
                .load
                .iter()
                .map(|load| 1e-3 * (16.0 - *load as f32).signum());
            let expected = expected
                .zip(&routing.load)
                .map(|(step, load)| if *load == 16 { 0.0 } else { step });
            assert_eq!(bias(&session, *layer), expected.collect::<Vec<_>>());
        }
        // Validation leaves it alone.
        let before = bias(&session, 0);
        InferenceStep::step(&session.model, batch(4, 7, &autodiff));
        assert_eq!(bias(&session, 0), before);
    }
}

#[test]
fn a_restored_run_goes_on_with_its_bias() {
    let device = device().autodiff();
    let config = config(2);
    let new = || {
        let model = LanguageModel::with_config(decoder(None, true, &device), &config);
        Session::new(model, &config)
    };
    let mut never_stopped = new();
    steps(&mut never_stopped, &config, 8, &device);

    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut store = CheckpointStore::open(folder.path()).expect("a folder");
    let mut stopped = new();
    steps(&mut stopped, &config, 5, &device);
    stopped.save(&mut store, None).expect("writable");
    let loaded = store
        .reader()
        .load_newest()
        .expect("readable")
        .expect("there is one");
    let mut restored = new()
        .restore(&loaded.checkpoint, folder.path())
        .expect("of the same model");
    steps(&mut restored, &config, 3, &device);
    assert_eq!(
        parameters_by_name(&restored.model),
        parameters_by_name(&never_stopped.model)
    );
}
