//! Mixtures of experts: against Hugging Face's blocks, published losses and routers, and by laws.

mod blocks;
mod capacity;
mod capacity_laws;
mod common;
mod configs;
mod laws;
mod losses;
mod padding;
mod routers;
mod upcycle;
