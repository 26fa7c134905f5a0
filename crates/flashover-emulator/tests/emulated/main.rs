//! The kernel families for tensor cores on an emulated CUDA device, forward and backward against the f64 oracle, without
//! Burn.
//!
//! They run where `scripts/test-emulated` has put the emulated driver before any other. A filter picks a family:
//! `hopper::`, `tf32::`, `cmma::`, and `mma:: --skip cmma::`. Most of the time goes to NVRTC, a second or more a kernel,
//! so problems share head dimensions and element types wherever those are not what is tested.

mod attention;
mod check;
mod cmma;
mod device;
mod hopper;
mod mma;
mod not_finite;
mod problems;
mod suite;
mod tensors;
mod tf32;
