//! What flashover's tests and benchmarks share: problems, their inputs, the f64 oracle, and how far a result may be
//! from it. Nothing but the bridge knows Burn or a device; every tensor is a contiguous row-major `Vec`.
//!
//! | module | holds |
//! |---|---|
//! | `bridge` | with the feature `burn`: a case as Burn tensors, and attention through the public entry |
//! | [`data`] | a case, and its deterministic random inputs |
//! | [`oracle`] | attention and its gradients, naive, in f64, written from the contract alone |
//! | [`naive`] | what a framework without fused attention computes in the problem's own element type |
//! | [`tolerance`] | the error budget: 2 × the error of [`naive`] against [`oracle`] + 1e-5, per tensor |
//! | [`grid`] | the grid of cases: all pairs of its factors, and all of it |
//! | [`layout`] | how a tensor lies in memory |
//! | [`score`] | score functions of a user's, and the same in f64 |
//! | [`sparse`] | random masks for block plans, and the dense problem that says the same |
//! | [`strategy`] | random problems for proptest, and a count of which options met |

#[cfg(feature = "burn")]
pub mod bridge;
pub mod data;
pub mod grid;
mod head;
pub mod layout;
mod matmul;
pub mod naive;
pub mod oracle;
mod parallel;
#[allow(missing_docs)] // CubeCL's macros generate public items without docs.
pub mod score;
#[cfg(test)]
mod small;
pub mod sparse;
pub mod strategy;
pub mod tolerance;
