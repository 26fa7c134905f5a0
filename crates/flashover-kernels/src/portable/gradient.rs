//! The gradient of one tile of scores: what every kernel of the backward computes before it multiplies.
//!
//! ```text
//! p  = exp(s − lse) · norm           norm: what the rounding of lse took, see `delta`
//! dp = mult ∘ (do · vᵀ)              mult: dropout, the same as in the forward
//! ds = p ∘ (dp − delta)              FlashAttention-2, Algorithm 2, lines 11 to 14; of the last score function's value
//! ```

use cubecl::prelude::*;

use super::tile::{HIDDEN, LANES, PIECE, Rows, TileConfig, V4, head_rows, product_scores};
use crate::family::element::{
    Head, Numbers, after_dropout, is_minus_infinity, position, row_hash, score, score_derivative, sees,
};
use crate::family::score_function::{function_derivative, function_parameter_derivative, with_function};
use crate::family::walk::{Side, Step};
use crate::score::{Alibi, Position, ScoreCode, ScoreFunction};

/// What the gradient of a score is taken on to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Towards {
    /// The product `q·k`.
    Product,
    /// The bias, and what else is added to a score.
    Bias,
    /// The parameter that a user's function read for it.
    Parameter,
}

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

/// The rows of a query head's operands, and of its key head's.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct OperandRows {
    q: Rows,
    pub k: Rows,
    v: Rows,
    d_o: Rows,
}

/// The rows for query head `h` of batch element `b`.
#[cube]
pub(crate) fn operand_rows<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    d_o: &Tensor<E>,
    b: u32,
    h: u32,
    n: Numbers,
) -> OperandRows {
    let kv = h / (n.heads_q / n.heads_kv);
    OperandRows {
        q: head_rows::<E>(q, b, h, n.seq_q, n.head_dim),
        k: head_rows::<E>(k, b, kv, n.seq_kv, n.head_dim),
        v: head_rows::<E>(v, b, kv, n.seq_kv, n.value_dim),
        d_o: head_rows::<E>(d_o, b, h, n.seq_q, n.value_dim),
    }
}

/// `s = q · kᵀ` and `dp = do · vᵀ` of the tile whose rows are the queries from `i0` on and whose columns are the keys from
/// `j0` on. Every kernel that sums along queries takes them here, so that all get the same bits.
#[cube]
pub(crate) fn two_products<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    d_o: &Tensor<E>,
    rows: OperandRows,
    i0: u32,
    j0: u32,
    s: &mut Array<f32>,
    dp: &mut Array<f32>,
    stage: &mut Shared<[V4]>,
    #[comptime] tile: TileConfig,
) {
    product_scores::<E>(q, rows.q, i0, k, rows.k, j0, s, stage, tile);
    product_scores::<E>(d_o, rows.d_o, i0, v, rows.v, j0, dp, stage, tile);
}

/// Turns products into probabilities and gradients, in place: `s` from `q·k` to `p · mult`, `dp` from `do·v` to the gradient
/// that is asked for. Hidden elements become [`HIDDEN`] in both.
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
    #[comptime] towards: Towards,
    #[comptime] with_slopes: bool,
    #[comptime] side: Side,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
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
            let before = score::<E>(s[e], i, j, at, bias, n, with_bias);
            let value = with_function(before, i, j, at, scratch, n, function);
            // A score of −∞ is as good as hidden; in full tiles its weight 0 will do.
            if full || !is_minus_infinity(value) {
                let weight = select(dead, 0.0f32, (value - lse).exp() * stats.norm[x]);
                let mut d = weight * (after_dropout(dp[e], stats.hash[x], j, n) - stats.delta[x]);
                if comptime!(function.is_some()) {
                    let code = comptime!(function.unwrap());
                    if comptime!(towards == Towards::Parameter) {
                        d *= function_parameter_derivative(before, i, j, at, scratch, n, code);
                    } else {
                        d *= function_derivative(before, i, j, at, scratch, n, code);
                    }
                }
                if with_slopes {
                    let place = Position { batch: at.batch, head: at.head, a: position(i, n), j: j as i32 };
                    slope += d * Alibi::parameter_derivative(before, place, at.slope);
                }
                p = after_dropout(weight, stats.hash[x], j, n);
                ds = d;
                if comptime!(towards == Towards::Product) {
                    ds = d * score_derivative(s[e], i, j, at, n);
                }
            }
        }
        s[e] = p;
        dp[e] = ds;
    }
    slope
}
