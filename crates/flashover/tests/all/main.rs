//! One test binary for everything that needs Burn.

mod bad_input;
mod devices;
mod differentiation;
mod drop_in;
mod grid;
mod nn;
mod non_finite;
mod properties;
