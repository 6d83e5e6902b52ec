//! How fused operators compute on the CPU: vectors of any width, tiles of matrix products, and the memory of tensors.
//!
//! This crate knows no model. It is the one home of `unsafe` in the workspace, together with the fused operators of the
//! crates that use it. Instructions are chosen at run time: AVX2, AVX-512 or NEON where the machine has them, else
//! scalar code ([`pulp`]).
//!
//! | item | what |
//! |---|---|
//! | [`Operator`], [`run`] | a forward and a backward pass, and Burn's operator made of them |
//! | [`View`], [`Array`] | the elements of a tensor in place, and those of a tensor to be |
//! | [`Real`] | what `f32` and `f64` offer as vectors of any width, with [`Real::vexp`] |
//! | [`math`] | activations of vectors with their derivatives |
//! | [`Stored`] | the element types of tensors, and the `Real` that each is computed in |
//! | [`kernel!`], [`each_vector!`] | a function that runs on vectors, and a loop over them |
//! | [`rows`] | rows shared among threads, with sums that do not depend on their number |
//! | [`matrix`] | products of whole matrices, and of rows that stand anywhere |
//! | [`tile`] | the product of two small matrices in private memory |
//! | [`Buffer`], [`Shared`] | memory for a result, and a slice that several threads write |
//! | [`Scratch`] | private memory of tasks, used again by one after another |
//! | [`keep_freed_memory`] | a setting of the C library that training wants |
//!
//! A new operator is one file in the crate that wants it: see [`Operator`] for a whole small one.

#![allow(
    unsafe_code,
    reason = "tiles are addressed by pointers: bounds checks in the innermost loops cost a third of the speed"
)]

mod buffer;
mod host;
mod kernel;
pub mod math;
pub mod matrix;
mod memory;
mod operator;
mod real;
pub mod rows;
mod rows_product;
mod scratch;
mod shared;
mod stored;
pub mod tile;

pub use buffer::Buffer;
pub use host::{HostBackend, View, is_host};
pub use memory::{give_back_freed_memory, keep_freed_memory};
pub use operator::{Array, Gradient, Operator, Pass, run, run_one};
#[doc(hidden)]
pub use pulp;
pub use real::{Real, lanes};
pub use scratch::Scratch;
pub use shared::Shared;
pub use stored::Stored;
