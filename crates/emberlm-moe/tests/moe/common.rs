//! What the modules share.

use burn::tensor::{DType, Device, Tensor, TensorData};
use emberlm_core::{Activation, Context, Lengths};
use emberlm_moe::{
    Choices, Experts, ExpertsConfig, MixtureOfExperts, MixtureOfExpertsConfig, Router, RouterConfig,
};
use emberlm_testkit::{Fixture, largest_difference, load_parameters};

pub(crate) fn load(path: &str) -> Fixture {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    Fixture::load(format!("{root}/{path}.safetensors"))
}

/// The elements of a tensor.
pub(crate) fn numbers<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    tensor.to_data().iter::<f64>().collect()
}

pub(crate) fn sequences(seq_length: usize) -> Context {
    Context::new(Lengths::square(seq_length))
}

#[track_caller]
pub(crate) fn check_data(name: &str, actual: &TensorData, expected: &TensorData, tolerance: f64) {
    let difference = largest_difference(actual, expected);
    assert!(
        difference <= tolerance,
        "{name}: largest difference {difference:e}"
    );
}

#[track_caller]
pub(crate) fn check<const D: usize>(
    fixture: &Fixture,
    name: &str,
    actual: &Tensor<D>,
    tolerance: f64,
) {
    check_data(name, &actual.to_data(), &fixture.data(name), tolerance);
}

/// Weights of the chosen experts, `[n_tokens, k]`, as `[n_tokens, n_experts]`.
pub(crate) fn spread(indices: &TensorData, weights: &TensorData, n_experts: usize) -> TensorData {
    let [n_tokens, k] = indices.shape()[..] else {
        panic!("two axes")
    };
    let mut all = vec![0f64; n_tokens * n_experts];
    let chosen = indices.iter::<i64>().zip(weights.iter::<f64>());
    for (i, (expert, weight)) in chosen.enumerate() {
        all[i / k * n_experts + expert as usize] = weight;
    }
    TensorData::new(all, [n_tokens, n_experts])
}

/// The experts of each token, in the order of their ranks.
pub(crate) fn experts_of(choices: &Choices) -> Vec<Vec<usize>> {
    let mut experts = vec![Vec::new(); choices.n_tokens()];
    for choice in choices.all() {
        let of_token = &mut experts[choice.token as usize];
        assert_eq!(
            choice.rank as usize,
            of_token.len(),
            "ranks follow each other"
        );
        of_token.push(choice.expert as usize);
    }
    experts
}

/// `[n_tokens, k]` indices as lists.
pub(crate) fn rows(indices: &TensorData) -> Vec<Vec<usize>> {
    let k = indices.shape()[1];
    let indices: Vec<usize> = indices
        .iter::<i64>()
        .map(|expert| expert as usize)
        .collect();
    indices.chunks(k).map(<[usize]>::to_vec).collect()
}

pub(crate) fn sorted(mut lists: Vec<Vec<usize>>) -> Vec<Vec<usize>> {
    lists.iter_mut().for_each(|list| list.sort_unstable());
    lists
}

/// A matrix with ones at `[first + i, i]`: it takes the components from `first` on.
fn taking(first: usize, dims: [usize; 2]) -> TensorData {
    let [n_rows, n_columns] = dims;
    let ones = (0..n_rows * n_columns).map(|i| i / n_columns == first + i % n_columns);
    TensorData::new(ones.map(f64::from).collect::<Vec<_>>(), dims)
}

/// A router in f64 whose logits are its input. If it has noise, the logits are the first `n_experts` components, and the
/// size of the noise, before its softplus, are the others.
pub(crate) fn router_of_logits(config: &RouterConfig, device: &Device) -> Router {
    let dims = [config.d_model, config.n_experts];
    load_parameters(config.init(device), |name| match name {
        "gate.weight" => taking(0, dims),
        "noise.weight" => taking(config.n_experts, dims),
        "correction_bias" => TensorData::new(vec![0f64; dims[1]], [dims[1]]),
        other => panic!("a parameter {other}"),
    })
}

/// Experts in f64 that give `[0, .., 1, .., 0]` with the one at their own place, whatever their input is.
fn experts_that_name_themselves(n_experts: usize, device: &Device) -> Experts {
    let config = ExpertsConfig::new(n_experts, n_experts, 1)
        .with_activation(Activation::Relu)
        .with_gated(false)
        .with_bias(true);
    load_parameters(config.init(device), |name| match name {
        "down.bias" => taking(0, [n_experts, n_experts]),
        "up.weight" => {
            TensorData::new(vec![0f64; n_experts * n_experts], [n_experts, n_experts, 1])
        }
        "up.bias" => TensorData::new(vec![0f64; n_experts], [n_experts, 1]),
        "down.weight" => {
            TensorData::new(vec![0f64; n_experts * n_experts], [n_experts, 1, n_experts])
        }
        other => panic!("a parameter {other}"),
    })
}

/// A layer in f64 whose logits are its input, and whose output is the weights of the experts that are not dropped.
pub(crate) fn layer_that_gives_weights(
    config: MixtureOfExpertsConfig,
    device: &Device,
) -> MixtureOfExperts {
    let n_experts = config.router.n_experts;
    assert_eq!(config.router.d_model, n_experts);
    let mut layer = config.init(device);
    layer.router = router_of_logits(&config.router, device);
    layer.experts = experts_that_name_themselves(n_experts, device);
    layer
}

/// A tensor in f64.
pub(crate) fn tensor<const D: usize>(
    values: Vec<f64>,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F64))
}
