//! Fused attention for Burn: forward and backward, on the CPU and on any CubeCL GPU.

mod backend;
mod boundary;
mod error;
mod explain;
mod options;
mod sparse;
mod top_k;

#[cfg(feature = "autodiff")]
mod autodiff;
#[cfg(any(feature = "ndarray", feature = "tch", feature = "remote"))]
mod chunked;
#[cfg(feature = "cubecl-backend")]
mod cube;
#[cfg(feature = "flex")]
mod flex;

pub mod module;
pub mod nn;

use burn::tensor::Tensor;

pub use backend::{AttentionBackend, Extras, InputGradients, MaybeBool, MaybeFloat, MaybeInt, Plan};
pub use error::AttentionError;
pub use explain::{Explanation, Step, explain};
pub use flashover_kernels as kernels;
pub use flashover_kernels::problem::Precision;
pub use options::AttentionOptions;
pub use sparse::SparsePlan;
pub use top_k::TopK;

/// The vector instructions that the native CPU path uses on this machine: `avx512`, `avx2`, `neon`, `scalar`, …
#[cfg(feature = "flex")]
pub fn flex_simd() -> &'static str {
    flex::simd_name()
}

/// Attention `softmax(f(q·kᵀ · scale)) · v`, fused: the scores are never stored.
///
/// `q` is `[B, Hq, Sq, D]`, `k` `[B, Hkv, Skv, D]`, `v` `[B, Hkv, Skv, Dv]`, the result `[B, Hq, Sq, Dv]`, all of one
/// dtype (f32, f16, bf16; f64 on the CPU). `Hq` is a multiple of `Hkv`; `D` and `Dv` go from 1 to 256; strides are free.
/// A query that sees no key gives zeros. On an autodiff device the result is differentiable in q, k, v and the bias,
/// slopes and sinks of the options.
///
/// # Errors
///
/// [`AttentionError`], before anything is launched, if shapes, dtypes, devices or options do not fit.
pub fn attention(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &AttentionOptions,
) -> Result<Tensor<4>, AttentionError> {
    Ok(boundary::Prepared::new(q, k, v, options)?.forward())
}

/// [`attention`] with the log-sum-exp of each row's scores: f32 `[B, Hq, Sq]`, natural logarithm, before dropout, a
/// learned sink included; −∞ for a row that sees nothing. Both results are differentiable.
///
/// # Errors
///
/// As [`attention`].
pub fn attention_with_lse(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    options: &AttentionOptions,
) -> Result<(Tensor<4>, Tensor<3>), AttentionError> {
    Ok(boundary::Prepared::new(q, k, v, options)?.forward_lse())
}

/// Runs the code blocks of the README as tests.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;

/// And those of the page on score functions.
#[cfg(doctest)]
#[doc = include_str!("../../../docs/scores.md")]
struct Scores;
