//! Position schemes, one a file.

mod learned;
mod rotary;
mod sinusoidal;

pub use learned::{LearnedPositions, LearnedPositionsConfig};
pub use rotary::{RotaryConfig, RotaryLayout};
pub use sinusoidal::sinusoidal_positions;
