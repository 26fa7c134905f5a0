//! The gradient of one tile of scores, in shared memory.
//!
//! ```text
//! p  = exp(s − lse)
//! dp = mult ∘ (do · vᵀ)              mult: dropout, the same as in the forward
//! ds = p ∘ (dp − delta)              FlashAttention-2, Algorithm 2, lines 11 to 14; of the last score function's value
//! ```

use cubecl::prelude::*;

use super::config::Compiled;
use crate::family::element::{
    Head, Numbers, Reach, after_dropout, in_reach, is_minus_infinity, score, score_derivative, sees,
};
use crate::family::score_function::{function_derivative, with_function};
use crate::family::walk::Step;

/// What is known of a query.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Row {
    /// Log-sum-exp.
    pub lse: f32,
    pub delta: f32,
    /// Hash for dropout.
    pub hash: u32,
}

/// Whether query `i`, whose reach is given, sees key `j` of a tile.
#[cube]
pub(crate) fn shows(i: u32, j: u32, reach: Reach, step: Step, at: Head, scratch: &[u32], n: Numbers) -> bool {
    let mut seen = step.full;
    if !seen {
        // Position and key lengths leave a query a few spans of keys.
        if n.mask_at == 0 && step.bits == 0 {
            seen = in_reach(j, reach);
        } else {
            seen = sees(i, j, step, at, scratch, n);
        }
    }
    seen
}

/// `(p, ds)` of query `i` and key `j`, `seen` or not, from their products, `p` before dropout, `ds` for the last score function's value, or for the
/// product, if `of_product` (less the scale, where there are no options). Both are 0 where hidden.
#[cube]
pub(crate) fn element<E: Float>(
    product: f32,
    dp: f32,
    i: u32,
    j: u32,
    row: Row,
    seen: bool,
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
    // A query that saw nothing has no gradients, whatever impossible keys left in its sums.
    if seen && !is_minus_infinity(row.lse) {
        if comptime!(!c.options) {
            p = (product * n.scale - row.lse).exp();
            ds = p * (dp - row.delta);
        } else {
            let before = score::<E>(product, i, j, at, bias, n, with_bias);
            let value = with_function(before, i, j, at, scratch, n, c.function);
            // A score of −∞ is as good as hidden.
            if !is_minus_infinity(value) {
                p = (value - row.lse).exp();
                ds = p * (after_dropout(dp, row.hash, j, n) - row.delta);
                if of_product {
                    ds *= score_derivative(product, i, j, at, n);
                    if comptime!(c.function.is_some()) {
                        ds *= function_derivative(before, i, j, at, scratch, n, comptime!(c.function.unwrap()));
                    }
                }
            }
        }
    }
    (p, ds)
}
