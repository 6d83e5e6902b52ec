//! Language-model building blocks for [Burn](https://burn.dev): one crate for a Burn project to depend on.
//!
//! ```
//! use burn::tensor::{Device, Int, Tensor};
//! use emberlm::prelude::*;
//!
//! let device = Device::flex();
//! let model = DecoderConfig::new(256, 2, 64, 4).init(&device); // vocabulary, layers, width, heads
//! let prompt: Vec<u32> = b"It is a truth".iter().map(|byte| u32::from(*byte)).collect();
//! let generator = Generator::new(&model, &prompt, 8, SamplingConfig::default(), &device)?;
//! assert_eq!(generator.count(), 8);
//! # Ok::<(), emberlm::core::GenerationError>(())
//! ```
//!
//! The modules are the crates of the workspace, re-exported. The features choose Burn's backends: `flex` (default),
//! `ndarray`, `wgpu`, `vulkan`, `metal`, `webgpu`, `cuda`, `rocm`. They only add: the device is chosen at run time.

pub use emberlm_attention as attention;
pub use emberlm_core as core;
pub use emberlm_kernels as kernels;
pub use emberlm_models as models;
pub use emberlm_moe as moe;
pub use emberlm_text as text;
pub use emberlm_training as training;

/// What most programs use.
pub mod prelude {
    pub use emberlm_attention::{
        AttendOptions, GroupedQueryAttentionConfig, MultiHeadAttentionConfig, attend,
    };
    pub use emberlm_core::{
        CachedModel, CausalModel, Context, CrossEntropyConfig, FeedForward, FeedForwardConfig,
        Generator, Lengths, Pattern, SamplingConfig, Schedule, SequenceMixer, Window,
    };
    pub use emberlm_models::{Decoder, DecoderConfig, load_decoder};
    pub use emberlm_training::{Trainer, TrainingConfig};
}
