//! Choosing a device.

use burn::tensor::Device;

use crate::Result;

/// A device and what to call it.
#[derive(Debug, Clone)]
pub struct Chosen {
    /// The device, without autodiff.
    pub device: Device,
    /// For the reader.
    pub name: String,
}

/// The device called `name`, or the best one of the build: CUDA, Metal, ROCm, Vulkan, WebGPU, … Flex, in this order
/// (Burn's; its environment variable `BURN_DEVICE` overrides it).
///
/// # Errors
///
/// If this program was not built with the device.
pub fn choose(name: Option<&str>) -> Result<Chosen> {
    let device = match name {
        None => Device::default(),
        Some(name) => {
            let built = built();
            let found = built.iter().find(|(known, _)| name.eq_ignore_ascii_case(known));
            let (_, make) = found.ok_or_else(|| {
                let names: Vec<&str> = built.iter().map(|(name, _)| *name).collect();
                format!(
                    "device: expected one of those that this program was built with ({}), got {name}; \
                     others come with a feature of their name: cuda, rocm, metal, vulkan, webgpu",
                    names.join(", ")
                )
            })?;
            make()
        }
    };
    let name = describe(&device);
    Ok(Chosen { device, name })
}

type Make = fn() -> Device;

fn built() -> Vec<(&'static str, Make)> {
    vec![
        #[cfg(feature = "cuda")]
        ("cuda", || Device::cuda(0)),
        #[cfg(feature = "metal")]
        ("metal", || Device::metal(Default::default())),
        #[cfg(feature = "rocm")]
        ("rocm", || Device::rocm(0)),
        #[cfg(feature = "vulkan")]
        ("vulkan", || Device::vulkan(Default::default())),
        #[cfg(feature = "webgpu")]
        ("webgpu", || Device::webgpu(Default::default())),
        #[cfg(feature = "flex")]
        ("flex", Device::flex),
    ]
}

fn describe(device: &Device) -> String {
    let debug = format!("{device:?}");
    let inner = debug.strip_prefix("Device<").and_then(|d| d.strip_suffix('>')).unwrap_or(&debug);
    if inner.starts_with("Flex") {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        return format!("Flex, Burn's CPU backend, {threads} threads");
    }
    #[cfg(any(feature = "cuda", feature = "metal", feature = "rocm", feature = "vulkan", feature = "webgpu"))]
    if let Some(identity) = device.identity() {
        return format!("{} as {inner}", identity.name);
    }
    inner.to_string()
}
