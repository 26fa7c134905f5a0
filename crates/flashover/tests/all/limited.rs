//! A GPU that has no more than what every WebGPU device grants: eight storage buffers (CubeCL takes one of them), 16 KB
//! of shared memory, 256 units. A software GPU offers more, and kernels that need more would pass on it unnoticed.
//!
//! The limits are taken off the adapter and not only off the device, because CubeCL asks the adapter how many units a
//! cube may have, and Burn's own kernels size themselves by the answer.

use std::sync::OnceLock;

use burn::tensor::Device;
use burn::tensor::wgpu::WgpuSetup;
use burn::tensor::wgpu::wgpu::{
    self,
    hal::{Instance as _, api::Vulkan},
};
use cubecl::future::block_on;

/// The device, made at the first call and the same for all tests of the process.
pub fn limited() -> Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let make = || Device::wgpu_options().setup(setup()).init().expect("CubeCL takes the device");
    DEVICE.get_or_init(make).clone()
}

fn setup() -> WgpuSetup {
    let backend = wgpu::Backend::Vulkan;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: backend.into(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    // SAFETY: the instance lives as long as the setup, which holds a handle to it.
    let vulkan = unsafe { instance.as_hal::<Vulkan>() }.expect("an instance on Vulkan");
    // SAFETY: there is no surface, so none that could be of another instance.
    let adapters = unsafe { vulkan.enumerate_adapters(None) };
    let mut exposed = adapters.into_iter().next().expect("a Vulkan driver, a software one if need be");
    let limits = &mut exposed.capabilities.limits;
    *limits = limits.clone().or_worse_values_from(&wgpu::Limits::defaults());
    // SAFETY: the adapter is one of this instance's own, and its limits only became worse.
    let adapter = unsafe { instance.create_adapter_from_hal::<Vulkan>(exposed) };
    let (device, queue) = block_on(adapter.request_device(&wgpu::DeviceDescriptor {
        // As CubeCL asks for them: all that the adapter has, but for what its own documentation warns of.
        required_features: adapter.features().difference(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS),
        required_limits: adapter.limits(),
        // SAFETY: the same experimental features that CubeCL turns on for its devices; no test uses one by hand.
        experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
        ..Default::default()
    }))
    .expect("the adapter grants its own limits");
    WgpuSetup { instance, adapter, device, queue, backend }
}
