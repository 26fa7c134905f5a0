//! The gradient of one tile of scores, in the registers of a warp.
//!
//! ```text
//! p  = exp(s − lse)
//! dp = mult ∘ (do · vᵀ)              mult: dropout, the same as in the forward
//! ds = p ∘ (dp − delta)              FlashAttention-2, Algorithm 2, lines 11 to 14; of the last score function's value
//! ```

use cubecl::prelude::*;

use super::config::Compiled;
use super::forward::LOG2_E;
use crate::family::element::{Head, Numbers, after_dropout, is_minus_infinity, score, score_derivative, sees};
use crate::family::ptx::exp2;
use crate::family::score_function::{function_derivative, with_function};
use crate::family::walk::Step;

/// What is known of a query.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Row {
    /// Log-sum-exp in natural units; +∞ for a query that saw nothing, so that all its probabilities are 0.
    pub lse: f32,
    pub delta: f32,
    /// Hash for dropout.
    pub hash: u32,
}

/// What the scratch buffer holds of a query, as the kernels use it.
#[cube]
pub(crate) fn row_of(lse: f32, delta: f32, hash: u32, n: Numbers) -> Row {
    Row { lse: select(is_minus_infinity(lse), -n.minus_infinity, lse), delta, hash }
}

/// Turns a product into a probability, before dropout, and a gradient: `(p, ds)`, `ds` for the last score function's value, or for the product, if
/// `of_product`. Hidden elements become 0. Only for problems with options.
#[cube]
pub(crate) fn element_with_options<E: Float>(
    product: f32,
    dp: f32,
    i: u32,
    j: u32,
    row: Row,
    step: Step,
    of_product: bool,
    at: Head,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] c: Compiled,
) -> (f32, f32) {
    let mut p = 0.0f32;
    let mut ds = 0.0f32;
    if step.full || sees(i, j, step, at, scratch, n) {
        let before = score::<E>(product, i, j, at, bias, n, with_bias);
        let value = with_function(before, i, j, at, scratch, n, c.function);
        p = exp2((value - row.lse) * LOG2_E);
        ds = p * (after_dropout(dp, row.hash, j, n) - row.delta);
        if of_product {
            ds *= score_derivative(product, i, j, at, n);
            if comptime!(c.function.is_some()) {
                let d = function_derivative(before, i, j, at, scratch, n, comptime!(c.function.unwrap()));
                // A score of −∞ is as good as hidden, whatever its derivative is.
                ds *= select(is_minus_infinity(value), 0.0f32, d);
            }
        }
    }
    (p, ds)
}
