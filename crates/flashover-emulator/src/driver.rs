//! The driver API: the functions of `cuda.h` that cudarc and CubeCL call, under their names in `libcuda.so`. CUDA
//! Driver API, 13.0.
//!
//! Whatever is asked for is done in the calling thread before the function returns, so that streams and events have
//! nothing to wait for. A pointer that a caller hands over is null or valid, as the API asks; a handle that nobody gave
//! is refused. What a real driver would answer with a number alone is also explained on the standard error stream.

mod copy;
mod device;
mod handle;
mod module;
mod status;
mod stream;
mod tensor;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Held by whoever uses the device's memory or runs a kernel.
static DEVICE: Mutex<()> = Mutex::new(());

fn device() -> MutexGuard<'static, ()> {
    DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
