//! The gradient of one tile of scores, in the registers of a warp.
//!
//! ```text
//! p  = exp(s − lse)
//! dp = mult ∘ (do · vᵀ)              mult: dropout, the same as in the forward
//! ds = p ∘ (dp − delta)              FlashAttention-2, Algorithm 2, lines 11 to 14; of the last score function's value
//! ```

use cubecl::prelude::*;

use super::config::{COLS, Compiled};
use super::forward::LOG2_E;
use super::ptx::{Sums, load_shared_floats};
use super::scores::{hide, query_and_key};
use crate::family::element::{
    Head, Numbers, after_dropout, is_minus_infinity, row_hash, score, score_derivative, sees, where_kept,
};
use crate::family::ptx::exp2;
use crate::family::score_function::{function_derivative, with_function};
use crate::family::walk::{Side, Step};

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

/// Where rows are keys: products become probabilities after dropout, not grown, and `dp` becomes `ds`. `row` is this lane's first
/// key, `column` its first query in the tile; `statistics` is where the log-sum-exp of that query stands in shared memory, those of
/// all queries before their deltas, `deltas` bytes on.
#[cube]
pub(crate) fn differentiate<E: Float>(
    s: &mut Array<Sums>,
    dp: &mut Array<Sums>,
    row: u32,
    column: u32,
    statistics: u32,
    head: u32,
    step: Step,
    at: Head,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] with_dp: bool,
    #[comptime] deltas: usize,
    #[comptime] c: Compiled,
) {
    let (blocks, col_blocks) = comptime!((c.tile.blocks, c.tile.cols / COLS));
    let unit = n.scale * LOG2_E;
    let column = step.i0 + column;
    if comptime!(!c.options) {
        if !step.full {
            hide(s, dp, row, column, step, at, scratch, n, with_dp, Side::Keys, c);
        }
    }
    #[unroll]
    for col in 0..col_blocks {
        let lse = load_shared_floats(statistics, comptime!(4 * COLS * col));
        let delta = load_shared_floats(statistics, comptime!(4 * COLS * col + deltas));
        #[unroll]
        for lane in 0..2usize {
            let i = column + comptime!((COLS * col + lane) as u32);
            let mut hash = 0u32;
            if comptime!(c.options) {
                hash = row_hash(head, i, n);
            }
            let stats = row_of(lse.extract(lane), delta.extract(lane), hash, n);
            let minus = -(stats.lse * LOG2_E);
            #[unroll]
            for half in 0..comptime!(2 * blocks) {
                let x = comptime!(half / 2 * col_blocks + col);
                let z = comptime!(half % 2 * 2 + lane);
                let (mut p, mut ds) = (s[x], dp[x]);
                if comptime!(c.options) {
                    let (i, j) = query_and_key(row, column, x, z, Side::Keys, c);
                    let (product, gradient) = (s[x].extract(z), dp[x].extract(z));
                    let (weight, gradient) = element_with_options::<E>(
                        product, gradient, i, j, stats, step, true, at, scratch, bias, n, with_bias, c,
                    );
                    p.insert(z, where_kept(weight, hash, j, n));
                    ds.insert(z, gradient);
                } else {
                    let weight = exp2(fma(s[x].extract(z), unit, minus));
                    p.insert(z, weight);
                    ds.insert(z, weight * (dp[x].extract(z) - stats.delta));
                }
                s[x] = p;
                dp[x] = ds;
            }
        }
    }
}
