//! What the programs that measure share: inputs, timing, training steps, what the process uses.

mod implementation;
mod inputs;
mod pass;
mod step;
mod times;
mod usage;

pub use implementation::ImplementationChoice;
pub use inputs::{check_size, uniform};
pub use pass::Pass;
pub use step::{random_batch, train_step};
pub use times::{Times, median, time};
pub use usage::{MemoryRise, cpu_seconds, peak_resident_bytes};
