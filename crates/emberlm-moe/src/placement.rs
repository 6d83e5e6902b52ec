//! Where experts compute.

use burn::tensor::Tensor;
use emberlm_core::{RandomKey, operators::Implementation};

use crate::Experts;

/// Where experts compute: what lies between the rows that were gathered for them and their outputs.
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
        experts.forward(rows, group_sizes, dropout_key)
    }
}

/// [`Local`], with the products by a given implementation.
#[derive(Debug, Clone, Copy)]
pub struct LocalBy(pub Implementation);

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
}
