//! The device a program runs on: named on the command line, or the best of those compiled in.

use std::panic;

use burn::tensor::{Device, DeviceType};
use thiserror::Error;

/// Why there is no such device.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum DeviceError {
    /// The backend is unknown or its feature is off.
    #[error("device {asked} is not compiled in: use {}, or build with --features NAME", compiled.join(", "))]
    NotCompiled {
        /// What was asked for.
        asked: String,
        /// What there is.
        compiled: Vec<&'static str>,
    },
    /// The part behind the colon is no number.
    #[error("device {asked}: write NAME or NAME:NUMBER, for example {example}")]
    Syntax {
        /// What was asked for.
        asked: String,
        /// What is meant.
        example: String,
    },
    /// The backend is there, the device is not.
    #[error(
        "device {asked} does not exist: this machine has {found} {backend} device(s), numbered from 0"
    )]
    Missing {
        /// What was asked for.
        asked: String,
        /// Its backend.
        backend: &'static str,
        /// How many there are.
        found: usize,
    },
    /// No program without a backend.
    #[error("no backend is compiled in: build with --features flex")]
    None,
}

/// A backend that is compiled in, in order of preference.
struct Backend {
    name: &'static str,
    devices: fn() -> Vec<Device>,
}

fn compiled_backends() -> Vec<Backend> {
    vec![
        #[cfg(feature = "cuda")]
        Backend {
            name: "cuda",
            devices: || Device::enumerate(DeviceType::Cuda).into_vec(),
        },
        #[cfg(feature = "rocm")]
        Backend {
            name: "rocm",
            devices: || Device::enumerate(DeviceType::Rocm).into_vec(),
        },
        #[cfg(feature = "metal")]
        Backend {
            name: "metal",
            devices: || Device::enumerate(DeviceType::Metal).into_vec(),
        },
        #[cfg(feature = "vulkan")]
        Backend {
            name: "vulkan",
            devices: || Device::enumerate(DeviceType::Vulkan).into_vec(),
        },
        #[cfg(feature = "webgpu")]
        Backend {
            name: "webgpu",
            devices: || Device::enumerate(DeviceType::WebGpu).into_vec(),
        },
        #[cfg(feature = "wgpu")]
        Backend {
            name: "wgpu",
            devices: || Device::enumerate(DeviceType::Wgpu).into_vec(),
        },
        #[cfg(feature = "ndarray")]
        Backend {
            name: "ndarray",
            devices: || Device::enumerate(DeviceType::NdArray).into_vec(),
        },
        #[cfg(feature = "flex")]
        Backend {
            name: "flex",
            devices: || Device::enumerate(DeviceType::Flex).into_vec(),
        },
    ]
}

/// Finds `NAME` or `NAME:NUMBER` among the backends compiled in; without a name, the first of: a GPU whose feature
/// is on, ndarray, flex. Returns the full name and the device.
///
/// # Errors
///
/// A backend that is not compiled in, or a device that this machine does not have.
pub fn choose_device(asked: Option<&str>) -> Result<(String, Device), DeviceError> {
    let backends = compiled_backends();
    let first = backends.first().ok_or(DeviceError::None)?;
    let asked = asked.unwrap_or(first.name);
    let (name, number) = match asked.split_once(':') {
        None => (asked, None),
        Some((name, number)) => (name, Some(number)),
    };
    let Some(backend) = backends.iter().find(|backend| backend.name == name) else {
        return Err(DeviceError::NotCompiled {
            asked: asked.to_owned(),
            compiled: backends.iter().map(|backend| backend.name).collect(),
        });
    };
    let number: usize = match number.map(str::parse) {
        None => 0,
        Some(Ok(number)) => number,
        Some(Err(_)) => {
            return Err(DeviceError::Syntax {
                asked: asked.to_owned(),
                example: format!("{name}:0"),
            });
        }
    };
    let mut devices = enumerate(backend);
    if number >= devices.len() {
        return Err(DeviceError::Missing {
            asked: asked.to_owned(),
            backend: backend.name,
            found: devices.len(),
        });
    }
    let full_name = if devices.len() > 1 || asked.contains(':') {
        format!("{name}:{number}")
    } else {
        name.to_owned()
    };
    Ok((full_name, devices.swap_remove(number)))
}

/// The devices of a backend; none where its driver is missing, which some backends report by a panic.
fn enumerate(backend: &Backend) -> Vec<Device> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let devices = panic::catch_unwind(backend.devices);
    panic::set_hook(hook);
    devices.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_the_devices_there_are() {
        let (name, _) = choose_device(Some("flex")).expect("flex is compiled in");
        assert_eq!(name, "flex");
        let error = choose_device(Some("tpu")).expect_err("no such backend");
        assert!(
            error.to_string().contains("tpu is not compiled in: use"),
            "{error}"
        );
        let error = choose_device(Some("flex:7")).expect_err("there is one CPU device");
        assert!(
            error.to_string().contains("flex:7 does not exist"),
            "{error}"
        );
        let error = choose_device(Some("flex:x")).expect_err("no number");
        assert!(error.to_string().contains("flex:0"), "{error}");
    }
}
