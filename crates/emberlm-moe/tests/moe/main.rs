//! Mixtures of experts: against Hugging Face's blocks, published losses and routers, and by laws.

mod blocks;
mod common;
mod laws;
mod losses;
mod routers;
