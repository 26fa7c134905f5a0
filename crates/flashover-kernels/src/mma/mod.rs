//! The kernels for the tensor cores of NVIDIA GPUs from sm80 on: `mma.sync`, `ldmatrix` and `cp.async`.
//!
//! f16 and bf16 operands, and f32 where the problem's [`Precision`](crate::problem::Precision) lets a product be three of tf32; sums and softmax
//! in f32. The instructions are inline PTX: what lies in which register of which lane
//! is the kernels' own business, and addresses are computed once. No float atomics: results are the same bits every time.

// Operands, strides, tiles and flags: a kernel has many arguments, and naming bundles of them would not make it clearer.
#![allow(clippy::too_many_arguments)]
// A comptime `if` around a run-time one removes its body; the two conditions joined would not.
#![allow(clippy::collapsible_if)]

mod backward_keys;
mod backward_queries;
mod checks;
mod config;
mod forward;
mod forward_plain;
mod gradient;
mod launch;
mod one_pass;
mod one_pass_launch;
mod one_pass_rows;
mod products;
mod ptx;
mod scores;
mod steps;
mod store;
mod tf32;
mod tile;

pub use checks::check_limits;
pub use config::{MmaConfig, MmaTile};
pub use launch::{backward, forward};
pub(crate) use one_pass_launch::ROW_UNITS;
pub use one_pass_launch::{OnePass, backward_one_pass};
