//! The kernels that run everywhere: shared-memory tiles, no plane or matrix operations.
//!
//! One source for CUDA, ROCm, Vulkan, WebGPU and Metal. A launch binds at most 7 storage buffers, and takes at most 16 KB
//! of shared memory and 256 units, which every WebGPU device grants. Products accumulate, and the softmax runs, in f32.
//! No float atomics: every sum is taken in a fixed order, so results are the same bits every time.

// Operands, strides, tiles and flags: a kernel has many arguments, and naming bundles of them would not make it clearer.
#![allow(clippy::too_many_arguments)]
// A comptime `if` around a run-time one removes its body; the two conditions joined would not.
#![allow(clippy::collapsible_if)]

mod backward;
mod checks;
mod delta;
mod forward;
mod gradient;
mod iterations;
mod launch;
mod parameters;
mod reductions;
mod score_parameters;
mod tile;

pub use checks::check_limits;
pub use launch::{backward, forward};
pub(crate) use launch::{keys_fused, scratch_bytes};
pub(crate) use reductions::Reductions;
pub use tile::TileConfig;
