//! The kernels for cooperative matrices, which CubeCL offers wherever a device reports them: Vulkan, ROCm, Metal, CUDA.
//!
//! f16 and bf16 operands, sums and softmax in f32. Which unit of a plane holds which element of a matrix is the device's secret, so
//! whatever is done to single elements is done in shared memory: scores go there, probabilities come from there. Sums stay in
//! registers, and pass through shared memory only where a row's maximum outgrew them. One source without inline instructions.
//! A launch binds at most 7 storage buffers. No float atomics: results are the same bits every time.

// Operands, strides, tiles and flags: a kernel has many arguments, and naming bundles of them would not make it clearer.
#![allow(clippy::too_many_arguments)]
// A comptime `if` around a run-time one removes its body; the two conditions joined would not.
#![allow(clippy::collapsible_if)]

mod backward_keys;
mod backward_queries;
mod checks;
mod config;
mod forward;
mod gradient;
mod launch;
#[cfg(all(test, feature = "compilers"))]
mod offline_tests;
mod products;
mod sums;
mod tile;

pub use checks::check_limits;
pub use config::{CmmaConfig, CmmaTile};
pub use launch::{backward, forward};
