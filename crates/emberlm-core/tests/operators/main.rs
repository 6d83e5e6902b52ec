//! All implementations of the fused operators against their definitions in f64: outputs and all gradients.
//!
//! `cargo test --release --workspace --test operators -- --nocapture` prints the largest errors.

mod common;
mod memory;

mod activation;
mod cross_entropy;
mod dropout;
mod embedding;
mod grouped;
mod linear;
mod norm;
mod rotary;
