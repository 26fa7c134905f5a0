//! The gradient of one tile of scores: what every kernel of the backward computes before it multiplies.
//!
//! ```text
//! p  = exp(s − lse) · norm           norm: what the rounding of lse took, see `delta`
//! dp = mult ∘ (do · vᵀ)              mult: dropout, the same as in the forward
//! ds = p ∘ (dp − delta)              FlashAttention-2, Algorithm 2, lines 11 to 14
//! ```

use cubecl::prelude::*;

use super::element::{Head, Numbers, after_dropout, position, row_hash, score, score_derivative, sees};
use super::tile::{HIDDEN, LANES, PIECE, TileConfig, is_minus_infinity};
use super::walk::{Side, Step};
use crate::score::{Alibi, Position, ScoreFunction};

/// What the forward left of this unit's four queries.
#[derive(CubeType)]
pub(crate) struct Statistics {
    pub lse: Array<f32>,
    pub delta: Array<f32>,
    /// Factor that makes the probabilities of a query sum to 1.
    pub norm: Array<f32>,
    /// Hash of the query for dropout.
    pub hash: Array<u32>,
}

/// Reads the statistics of queries `i0`, `i0 + step`, `i0 + 2·step`, `i0 + 3·step`.
#[cube]
pub(crate) fn statistics(i0: u32, #[comptime] step: usize, at: Head, scratch: &[u32], n: Numbers) -> Statistics {
    let mut lse = Array::<f32>::new(LANES);
    let mut delta = Array::<f32>::new(LANES);
    let mut norm = Array::<f32>::new(LANES);
    let mut hash = Array::<u32>::new(LANES);
    let head = at.batch * n.heads_q + at.head;
    #[unroll]
    for x in 0..LANES {
        let i = i0 + comptime!((x * step) as u32);
        lse[x] = n.minus_infinity;
        delta[x] = 0.0f32;
        norm[x] = 1.0f32;
        if i < n.seq_q {
            let row = head as usize * n.seq_q as usize + i as usize;
            lse[x] = f32::reinterpret(scratch[n.lse_at + row]);
            delta[x] = f32::reinterpret(scratch[n.delta_at + row]);
            norm[x] = f32::reinterpret(scratch[n.norm_at + row]);
        }
        hash[x] = row_hash(head, i, n);
    }
    Statistics { lse, delta, norm, hash }
}

/// Turns products into probabilities and gradients, in place: `s` from `q·k` to `p · mult`, `dp` from `do·v` to `ds`, or
/// to the gradient of the product `q·k` if `of_product`. Hidden elements become [`HIDDEN`] in both.
///
/// `i` and `j` are this unit's first query and key. Returns the unit's share of the slope's gradient, 0
/// unless `with_slopes`.
#[cube]
pub(crate) fn score_gradients<E: Float>(
    s: &mut Array<f32>,
    dp: &mut Array<f32>,
    stats: &Statistics,
    i: u32,
    j: u32,
    step: Step,
    at: Head,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] of_product: bool,
    #[comptime] with_slopes: bool,
    #[comptime] side: Side,
    #[comptime] with_bias: bool,
    #[comptime] tile: TileConfig,
) -> f32 {
    let mut slope = 0.0f32;
    let full = step.full;
    #[unroll(tile.unroll)]
    for e in 0..PIECE {
        let (r, c) = (e % LANES, e / LANES);
        let (down, across) = ((r * tile.row_units) as u32, (c * tile.col_units) as u32);
        let (x, i, j) = match comptime!(side) {
            Side::Queries => (r, i + down, j + across),
            Side::Keys => (c, i + across, j + down),
        };
        let mut p = HIDDEN.runtime();
        let mut ds = HIDDEN.runtime();
        let lse = stats.lse[x];
        let dead = is_minus_infinity(lse);
        if full || (!dead && sees(i, j, step, at, scratch, n)) {
            let value = score::<E>(s[e], i, j, at, bias, n, with_bias);
            // A score of −∞ is as good as hidden; in full tiles its weight 0 will do.
            if full || !is_minus_infinity(value) {
                let weight = select(dead, 0.0f32, (value - lse).exp() * stats.norm[x]);
                let d = weight * (after_dropout(dp[e], stats.hash[x], j, n) - stats.delta[x]);
                if with_slopes {
                    let place = Position { batch: at.batch, head: at.head, a: position(i, n), j: j as i32 };
                    slope += d * Alibi::parameter_derivative(value, place, at.slope);
                }
                p = after_dropout(weight, stats.hash[x], j, n);
                ds = d;
                if of_product {
                    ds = d * score_derivative(s[e], i, j, at, n);
                }
            }
        }
        s[e] = p;
        dp[e] = ds;
    }
    slope
}
