//! The kernels of NVIDIA's Hopper GPUs (sm90): tiles come through the copy engine, products run on `wgmma`.

// Operands, strides, tiles and flags: a kernel has many arguments, and naming bundles of them would not make it clearer.
#![allow(clippy::too_many_arguments)]
// A comptime `if` around a run-time one removes its body; the two conditions joined would not.
#![allow(clippy::collapsible_if)]

mod backward;
mod backward_adds;
mod backward_config;
mod backward_copies;
mod backward_gates;
mod backward_launch;
mod backward_messages;
mod backward_rows;
mod backward_scores;
mod backward_wide;
mod backward_works;
mod bulk;
mod checks;
mod config;
mod forward;
mod launch;
mod messages;
mod place;
mod produce;
mod ptx;
mod ring;
mod rows;
mod sections;
mod store;

pub use backward_config::HopperBackwardConfig;
pub(crate) use backward_launch::ROW_UNITS;
pub use backward_launch::backward;
pub use checks::{check_limits, reads_in_place};
pub use config::HopperConfig;
pub use launch::forward;
