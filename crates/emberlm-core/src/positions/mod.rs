//! Position schemes, one a file.

mod alibi;
mod learned;
mod long_rope;
mod relative;
mod rotary;
mod rotary_scaling;
mod sinusoidal;
mod yarn;

pub use alibi::alibi_slopes;
pub use learned::{LearnedPositions, LearnedPositionsConfig};
pub use long_rope::LongRopeScaling;
pub use relative::{RelativeBias, RelativeBiasConfig, relative_bucket};
pub use rotary::{RotaryConfig, RotaryLayout};
pub use rotary_scaling::RotaryScaling;
pub use sinusoidal::sinusoidal_positions;
pub use yarn::YarnScaling;
