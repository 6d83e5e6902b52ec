//! How fused operators compute on the CPU: vectors of any width, tiles of matrix products, and the memory of tensors.
//!
//! This crate knows no model. It is the one home of `unsafe` in the workspace, together with the `native` files of the
//! crates that use it. Instructions are chosen at run time: AVX2, AVX-512 or NEON where the machine has them, else
//! scalar code ([`pulp`]).
//!
//! | module | what |
//! |---|---|
//! | [`Real`] | what `f32` and `f64` offer as vectors of any width, with [`Real::vexp`] |
//! | [`Stored`] | the element types of tensors, and the `Real` that each is computed in |
//! | [`tile`] | the product of two small matrices in private memory |
//! | [`Shared`] | a slice that several threads write |
//! | [`HostBackend`] | the elements of a tensor of a CPU backend, in place, and tensors made of elements |

#![allow(
    unsafe_code,
    reason = "tiles are addressed by pointers: bounds checks in the innermost loops cost a third of the speed"
)]

mod host;
mod real;
mod shared;
mod stored;
pub mod tile;

pub use host::{HostBackend, View};
pub use real::{Real, lanes};
pub use shared::Shared;
pub use stored::Stored;
