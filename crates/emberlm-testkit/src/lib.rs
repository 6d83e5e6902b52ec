//! What the tests of the workspace share: the device under test, fixtures, comparisons, gradient checks, and the
//! laws that every variant must keep. It knows Burn and nothing of EmberLM.

mod cases;
mod close;
mod fixture;
mod gradients;
pub mod laws;
mod parameters;
mod random;

pub use cases::same_cases;
pub use close::{assert_close, largest_difference};
pub use fixture::Fixture;
pub use gradients::assert_gradients_match;
pub use parameters::{
    gradients_by_name, load_parameters, optimizer_gradients_by_name, parameters_by_name, to_f64,
};
pub use random::{random, random_tokens};

use burn::tensor::Device;

/// The device that the tests run on: flex, or ndarray where its feature is on.
pub fn device() -> Device {
    #[cfg(feature = "ndarray")]
    {
        burn::tensor::Device::enumerate(burn::tensor::DeviceType::NdArray)
            .into_vec()
            .swap_remove(0)
    }
    #[cfg(not(feature = "ndarray"))]
    {
        Device::flex()
    }
}
