//! Where experts compute.

use burn::tensor::Tensor;
use emberlm_core::{
    RandomKey,
    operators::{Implementation, experts_by},
};

use crate::{Dispatch, Experts};

/// Where experts compute: what lies between the rows that were gathered for them and their outputs, or, where gathering and
/// adding up are part of it, between the tokens and their sums.
///
/// Law: whatever the place, the output is that of [`Local`].
pub trait Placement {
    /// # Shapes
    ///
    /// - `rows`, output: `[n_rows, d_model]`, the rows of an expert together, as many as its `group_sizes` says
    fn run(
        &self,
        experts: &Experts,
        rows: Tensor<2>,
        group_sizes: &[usize],
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2>;

    /// From tokens to the weighted sums of what their experts make of them: [`Dispatch::gather`], [`run`](Self::run) and
    /// [`Dispatch::combine`].
    ///
    /// # Shapes
    ///
    /// - `x`, output: `[n_tokens, d_model]`
    /// - `gates`: `[n_tokens, n_experts]`
    fn mix(
        &self,
        experts: &Experts,
        x: Tensor<2>,
        dispatch: &Dispatch,
        gates: Tensor<2>,
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        by_rows(self, experts, x, dispatch, gates, dropout_key)
    }
}

fn by_rows(
    place: &(impl Placement + ?Sized),
    experts: &Experts,
    x: Tensor<2>,
    dispatch: &Dispatch,
    gates: Tensor<2>,
    dropout_key: Option<RandomKey>,
) -> Tensor<2> {
    let rows = dispatch.gather(x);
    let rows = place.run(experts, rows, dispatch.group_sizes(), dropout_key);
    dispatch.combine(rows, gates)
}

/// All experts on the device of the rows.
#[derive(Debug, Clone, Copy)]
pub struct Local;

impl Placement for Local {
    fn run(
        &self,
        experts: &Experts,
        rows: Tensor<2>,
        group_sizes: &[usize],
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        LocalBy::fastest(&rows).run(experts, rows, group_sizes, dropout_key)
    }

    fn mix(
        &self,
        experts: &Experts,
        x: Tensor<2>,
        dispatch: &Dispatch,
        gates: Tensor<2>,
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        LocalBy::fastest(&x).mix(experts, x, dispatch, gates, dropout_key)
    }
}

/// [`Local`], with the products by a given implementation.
#[derive(Debug, Clone, Copy)]
pub struct LocalBy(pub Implementation);

impl LocalBy {
    fn fastest(x: &Tensor<2>) -> Self {
        Self(Implementation::of(&x.device()))
    }
}

impl Placement for LocalBy {
    fn run(
        &self,
        experts: &Experts,
        rows: Tensor<2>,
        group_sizes: &[usize],
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        experts.forward_by(self.0, rows, group_sizes, dropout_key)
    }

    fn mix(
        &self,
        experts: &Experts,
        x: Tensor<2>,
        dispatch: &Dispatch,
        gates: Tensor<2>,
        dropout_key: Option<RandomKey>,
    ) -> Tensor<2> {
        let fused = match dropout_key.is_some() && experts.drops() {
            true => None,
            false => experts.weights(),
        };
        let Some(weights) = fused else {
            return by_rows(self, experts, x, dispatch, gates, dropout_key);
        };
        let of_rows = dispatch.weights(gates).cast(x.dtype());
        let activation = experts.activation();
        experts_by(self.0, x, of_rows, dispatch.rows(), weights, activation)
    }
}
