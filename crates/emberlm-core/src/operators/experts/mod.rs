//! The experts of a mixture: from tokens to the weighted sums of what experts make of them.

mod native;
mod products;
mod units;

use burn::tensor::Tensor;
use emberlm_kernels::run_one;

use super::{
    Implementation,
    activation::{activate_by, gate_by},
    combine::combine_by,
    grouped_matmuls_by, indices,
};
use crate::Activation;

/// Which token stands in which row, the rows of an expert together.
#[derive(Debug, Clone, Copy)]
pub struct ExpertRows<'a> {
    /// Of each row, the token.
    pub tokens: &'a [usize],
    /// Number of rows of each expert.
    pub group_sizes: &'a [usize],
}

/// The weights of experts without biases.
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    /// `[n_experts, d_model, d_ff]`, if the experts have a gate.
    pub gate: Option<Tensor<3>>,
    /// `[n_experts, d_model, d_ff]`
    pub up: Tensor<3>,
    /// `[n_experts, d_ff, d_model]`
    pub down: Tensor<3>,
}

/// `y_t = sum of w_i down_e(f(gate_e(x_t)) * up_e(x_t))` over the rows `i` of token `t`, each of its expert `e`; without a
/// gate `down_e(f(up_e(x_t)))`; zero for a token without a row.
///
/// Shazeer et al. 2017, <https://arxiv.org/abs/1701.06538>, equation 1. It is [`embed`](super::embed),
/// [`grouped_matmuls`](super::grouped_matmuls), [`gate`](super::gate) and [`combine`](super::combine) in one: on the CPU
/// backends the rows that go into experts are held a few experts at a time, and so are those that come out where they are
/// many.
///
/// # Shapes
///
/// - `x`, output: `[n_tokens, d_model]`
/// - `weights`: `[n_rows]`
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use emberlm_core::{Activation, operators::{ExpertRows, ExpertWeights, experts}};
///
/// let device = Device::flex();
/// let x = Tensor::<2>::from_floats([[1.0], [2.0]], &device);
/// let weights = Tensor::<1>::from_floats([1.0, 0.5, 0.5], &device);
/// let rows = ExpertRows { tokens: &[0, 1, 1], group_sizes: &[2, 1] };
/// let layers = ExpertWeights {
///     gate: None,
///     up: Tensor::from_floats([[[1.0]], [[10.0]]], &device),
///     down: Tensor::ones([2, 1, 1], &device),
/// };
/// let y: Vec<f32> = experts(x, weights, rows, layers, Activation::Relu).into_data().iter::<f32>().collect();
/// assert_eq!(y, [1.0, 11.0]);
/// ```
///
/// # Panics
///
/// If the numbers of rows, weights and tokens differ, a token is not below `n_tokens`, or shapes disagree; the message
/// names what.
pub fn experts(
    x: Tensor<2>,
    weights: Tensor<1>,
    rows: ExpertRows<'_>,
    layers: ExpertWeights,
    activation: Activation,
) -> Tensor<2> {
    let implementation = Implementation::of(&x.device());
    experts_by(implementation, x, weights, rows, layers, activation)
}

/// [`experts`] by a given implementation.
///
/// # Panics
///
/// As [`experts`].
pub fn experts_by(
    implementation: Implementation,
    x: Tensor<2>,
    weights: Tensor<1>,
    rows: ExpertRows<'_>,
    layers: ExpertWeights,
    activation: Activation,
) -> Tensor<2> {
    check(&x, &weights, rows, &layers);
    let [n_tokens, _] = x.dims();
    if implementation != Implementation::Native {
        let indices = indices(rows.tokens, &x.device());
        let by = |x, weights| grouped_matmuls_by(implementation, x, weights, rows.group_sizes);
        let x = x.select(0, indices);
        let inner = match layers.gate {
            Some(of_gate) => {
                let projections = [(of_gate, None), (layers.up, None)];
                let [gate, up] =
                    grouped_matmuls_by(implementation, x, projections, rows.group_sizes);
                gate_by(implementation, activation, gate, up, None)
            }
            None => {
                let [up] = by(x, [(layers.up, None)]);
                activate_by(implementation, activation, up, None)
            }
        };
        let [outputs] = by(inner, [(layers.down, None)]);
        return combine_by(implementation, outputs, weights, rows.tokens, n_tokens);
    }
    let operator = native::Experts::new(activation, rows, n_tokens, layers.gate.is_some());
    let inputs = [x.into_dispatch(), weights.into_dispatch()].into_iter();
    let layers = [layers.gate, Some(layers.up), Some(layers.down)];
    let layers = layers.into_iter().flatten().map(Tensor::into_dispatch);
    run_one(operator, inputs.chain(layers))
}

fn check(x: &Tensor<2>, weights: &Tensor<1>, rows: ExpertRows<'_>, layers: &ExpertWeights) {
    let ([n_tokens, d_model], [n_weights]) = (x.dims(), weights.dims());
    let n_rows = rows.tokens.len();
    assert_eq!(
        n_weights, n_rows,
        "n_rows: there are {n_rows}, and {n_weights} weights"
    );
    let n_in_groups: usize = rows.group_sizes.iter().sum();
    assert_eq!(
        n_in_groups, n_rows,
        "group_sizes: the groups have {n_in_groups} rows, there are {n_rows}"
    );
    if let Some(token) = rows.tokens.iter().find(|token| **token >= n_tokens) {
        panic!("tokens: {token} is not below {n_tokens}");
    }
    let [n_experts, _, d_ff] = layers.up.dims();
    assert_eq!(
        n_experts,
        rows.group_sizes.len(),
        "n_experts: there are weights of {n_experts}, and {} sizes",
        rows.group_sizes.len()
    );
    let into = [n_experts, d_model, d_ff];
    for (name, dims, expected) in [
        ("up", layers.up.dims(), into),
        (
            "gate",
            layers.gate.as_ref().map_or(into, Tensor::dims),
            into,
        ),
        ("down", layers.down.dims(), [n_experts, d_ff, d_model]),
    ] {
        assert_eq!(
            dims, expected,
            "{name}: the shape is {dims:?}, not {expected:?}"
        );
    }
}
