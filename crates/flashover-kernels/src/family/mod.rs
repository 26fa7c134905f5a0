//! What the kernel families share: the numbers of a problem as kernels read them, what becomes of one score, which tiles a
//! cube walks, and the scratch buffer with everything that is not a large operand. A family imports this and no other family.

// Operands, strides, tiles and flags: a kernel has many arguments, and naming bundles of them would not make it clearer.
#![allow(clippy::too_many_arguments)]
// A comptime `if` around a run-time one removes its body; the two conditions joined would not.
#![allow(clippy::collapsible_if)]

pub(crate) mod checks;
pub(crate) mod element;
pub(crate) mod launcher;
pub(crate) mod listed;
pub(crate) mod ptx;
pub(crate) mod rounding;
pub(crate) mod score_function;
pub(crate) mod scratch;
pub(crate) mod tile_shape;
pub(crate) mod turn_buffer;
pub(crate) mod turns;
pub(crate) mod two_passes;
pub(crate) mod walk;

pub use launcher::{BINDINGS, Outputs};
