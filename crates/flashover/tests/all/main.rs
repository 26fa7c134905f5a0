//! One test binary for everything that needs Burn.

mod bad_input;
mod devices;
mod differentiation;
mod drop_in;
#[cfg(all(feature = "fusion", feature = "cubecl-backend"))]
mod fusion;
mod grid;
#[cfg(all(feature = "webgpu", not(any(feature = "vulkan", feature = "metal"))))]
mod limits;
mod nn;
mod non_finite;
mod properties;
mod random;
mod scores;
mod small;
mod sparse;
