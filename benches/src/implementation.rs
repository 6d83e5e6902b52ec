//! Which implementation of an operator is timed, as an option says it.

use burn::tensor::Device;
use clap::ValueEnum;
use emberlm::{core::operators::Implementation, kernels::is_host};

/// An implementation by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImplementationChoice {
    /// The definition
    Reference,
    /// Tensor operations that any device has
    Portable,
    /// Fused kernels, for the CPU backends
    Native,
}

impl ImplementationChoice {
    /// The implementation that was asked for, or the fastest that the device has.
    ///
    /// # Errors
    ///
    /// Fused kernels for a device that is no CPU backend.
    pub fn resolve(asked: Option<Self>, device: &Device) -> Result<Implementation, String> {
        Ok(match asked {
            None => Implementation::of(device),
            Some(Self::Reference) => Implementation::Reference,
            Some(Self::Portable) => Implementation::Portable,
            Some(Self::Native) if is_host(device) => Implementation::Native,
            Some(Self::Native) => {
                return Err(
                    "--implementation native: the device is no CPU backend, give portable or reference"
                        .into(),
                );
            }
        })
    }
}
