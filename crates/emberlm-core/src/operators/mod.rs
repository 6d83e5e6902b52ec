//! The fused operators of the layers: each one file, with its definition, its kernels and its backward pass.
//!
//! Every operator is a function on tensors that computes the same on every backend. On the CPU backends it runs fused
//! kernels, forward and backward; elsewhere tensor operations. [`Implementation`] says which, and the functions
//! that end in `_by` take it from the caller.
//!
//! | function | what |
//! |---|---|
//! | [`linear`], [`linears`] | one product, or several of one input; [`project`], [`project_all`] for burn-nn's layers |
//! | [`layer_norm`], [`rms_norm`], [`add_norm`] | normalisation, after the addition of a residual too |
//! | [`activate`], [`gate`] | activations, plain and gated |
//! | [`grouped_matmul`], [`grouped_matmuls`] | groups of rows, each with a matrix of its own: experts |
//! | [`experts`] | the whole way of tokens through experts and back |
//! | [`combine`] | weighted rows back to where they came from: the outputs of experts |
//! | [`rotate`] | rotary positions |
//! | [`embed`] | rows of a table, with positions |
//! | [`cross_entropy`], [`projected_cross_entropy`] | the loss from scores, or from hidden states without holding the scores |
//! | [`adamw`], [`sum_of_squares`] | the optimizer's step, and what clipping needs |
//! | [`add_dropped`] | dropout and the addition of a residual |

#![allow(
    unsafe_code,
    reason = "kernels read and write whole vectors by pointers, and threads write disjoint rows of one result"
)]

mod activation;
mod adamw;
mod combine;
mod cross_entropy;
mod dropout;
mod embedding;
mod experts;
mod grouped_matmul;
mod linear;
mod norm;
mod rotary;

use burn::{
    backend::DispatchTensor,
    tensor::{Device, Int, Tensor, TensorData},
};
use emberlm_kernels::{Real, each_vector, is_host, kernel, rows};

pub use activation::{activate, activate_by, gate, gate_by};
pub use adamw::{AdamWStep, adamw, adamw_by, sum_of_squares, sum_of_squares_by};
pub use combine::{combine, combine_by};
pub use cross_entropy::{
    Projection, cross_entropy, cross_entropy_by, projected_cross_entropy,
    projected_cross_entropy_by,
};
pub(crate) use dropout::dropout_by;
pub use dropout::{add_dropped, add_dropped_by};
pub use embedding::{embed, embed_by};
pub use experts::{ExpertRows, ExpertWeights, experts, experts_by};
pub use grouped_matmul::{grouped_matmul, grouped_matmuls, grouped_matmuls_by};
pub use linear::{linear, linear_by, linears, linears_by, project, project_all};
pub use norm::{NormParameters, add_norm, add_norm_by, layer_norm, norm_by, rms_norm};
pub use rotary::{Rotation, rotate, rotate_by};

/// Which code computes an operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implementation {
    /// The definition in plain tensor operations.
    Reference,
    /// Tensor operations that every device runs well; the definition where that is so already.
    Portable,
    /// Fused kernels, for the CPU backends.
    Native,
}

impl Implementation {
    /// The fastest that the device has.
    pub fn of(device: &Device) -> Self {
        match is_host(device) {
            true => Self::Native,
            false => Self::Portable,
        }
    }
}

/// The rows along the last axis as one matrix, whatever the number of axes.
fn rows_of<const D: usize>(x: Tensor<D>) -> DispatchTensor {
    let dims = x.dims();
    let n_rows = dims[..D - 1].iter().product();
    x.reshape([n_rows, dims[D - 1]]).into_dispatch()
}

/// At most four axes, as operators take them, and back.
fn on_rows<const D: usize>(x: Tensor<D>, f: impl FnOnce(Tensor<4>) -> Tensor<4>) -> Tensor<D> {
    let dims = x.dims();
    let width = dims[D - 1];
    let n_rows = dims[..D - 1].iter().product();
    let y = f(x.reshape([1, 1, n_rows, width]));
    let mut dims = dims;
    dims[D - 1] = y.dims()[3];
    y.reshape(dims)
}

kernel! {
    /// Adds rows to one.
    fn add_rows_to<'a, R: Real>(simd: S, rows: &'a [R], sum: &'a mut [R]) -> () {
        for row in rows.chunks_exact(sum.len().max(1)) {
            each_vector!(R, S, sum.len(), |j, n| {
                // Safety: both slices have `n` elements from `j` on.
                unsafe {
                    let to = sum.as_mut_ptr().add(j);
                    let total = R::vadd(
                        simd,
                        R::load_some(simd, to, n),
                        R::load_some(simd, row.as_ptr().add(j), n),
                    );
                    R::store_some(simd, to, total, n);
                }
            });
        }
    }
}

/// The sum of all rows, in an order that depends on their number alone.
fn sum_of_rows<R: Real>(elements: &[R], width: usize) -> Vec<R> {
    let n_rows = elements.len() / width.max(1);
    let sum = |range: std::ops::Range<usize>| {
        let mut sum = vec![R::default(); width];
        add_rows_to(&elements[range.start * width..range.end * width], &mut sum);
        sum
    };
    rows::sum_ranges(n_rows, width, sum, add).unwrap_or_else(|| vec![R::default(); width])
}

/// Places along an axis, as operations of Burn take them.
pub(crate) fn indices(places: &[usize], device: &Device) -> Tensor<1, Int> {
    let places: Vec<i64> = places.iter().map(|place| *place as i64).collect();
    let n = places.len();
    Tensor::from_data(TensorData::new(places, [n]), device)
}

/// `a + b`, element by element.
fn add<R: Real>(mut a: Vec<R>, b: Vec<R>) -> Vec<R> {
    for (a, b) in a.iter_mut().zip(b) {
        *a += b;
    }
    a
}
