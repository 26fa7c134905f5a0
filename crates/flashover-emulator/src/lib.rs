//! A CUDA driver without a GPU. It has one device, an emulated NVIDIA sm_90, and interprets the PTX that NVRTC makes,
//! so that the kernels for tensor cores run in tests on any machine. Built for tests alone: it is slow, and publishes
//! nothing.
//!
//! `scripts/test-emulated` builds it as a shared library, links it as `libcuda.so` in a folder of its own, and runs the
//! tests with that folder in `LD_LIBRARY_PATH`, where cudarc finds it as it would find the real driver.
//!
//! | module | holds |
//! |---|---|
//! | [`driver`] | the functions of `cuda.h`: device, streams, events, copies, modules, launches |
//! | [`memory`] | what is allocated on the device |
//! | [`tensor_map`] | descriptors of the copy engine, and the boxes that it copies |
//! | `ptx` | PTX as data |
//! | [`machine`] | what runs it |
//!
//! | variable | means |
//! |---|---|
//! | `FLASHOVER_EMULATOR_CC` | the compute capability, `90` or `80`; `90` by default |
//! | `FLASHOVER_EMULATOR_SMS` | how many multiprocessors the device has; 4 by default |
//! | `FLASHOVER_EMULATOR_DUMP` | a folder that every module's PTX is written to |

pub mod driver;
pub mod machine;
pub mod memory;
mod ptx;
pub mod tensor_map;

/// What the device says that it is.
pub const DEVICE_NAME: &str = "flashover emulator";
