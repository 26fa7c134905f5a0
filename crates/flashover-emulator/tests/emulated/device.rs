//! The device that all tests run on.

use cubecl::client::Client;
use flashover_emulator::DEVICE_NAME;
use flashover_kernels::device::{DeviceLimits, poison_new_tensors};

/// A client of the emulated device, on which new tensors start as NaN; of a real one if `FLASHOVER_GPU` is set
/// (scripts/gpu-sanitize).
///
/// # Panics
/// When the first CUDA device is not the one that was asked for: nothing else tells which of them a test was about.
pub fn client() -> Client {
    let client = cubecl::Device::Cuda(Default::default()).client();
    let found = &client.properties().identity.name;
    let asked = if std::env::var_os("FLASHOVER_GPU").is_some() { "a GPU" } else { "the emulated device" };
    assert!((found == DEVICE_NAME) == (asked != "a GPU"), "expected {asked}, got {found:?}: see scripts/test-emulated");
    poison_new_tensors();
    client
}

#[test]
fn it_is_the_one_asked_for_and_has_what_every_family_needs() {
    let limits = DeviceLimits::of(&client());
    assert!(limits.ptx && limits.wgmma && limits.async_copies && limits.matrix_tf32, "{limits:?}");
    assert!(!limits.matrix_elements.is_empty() && !limits.cooperative.is_empty(), "{limits:?}");
}
