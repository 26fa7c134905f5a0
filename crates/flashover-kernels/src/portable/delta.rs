//! `delta` from the scores.
//!
//! `delta = Σ_j p_ij · mult_ij · dp_ij` equals `rowsum(do ∘ o)` (FlashAttention, Appendix B.2, eq. 4), but only for the exact
//! `o`. The rounding of the saved one does not cancel in `dp − delta`: a query that sees one key has the exact gradient 0,
//! and `do ∘ o` would miss it by the rounding of `o`. So the row sum is taken again, from the same products in the same
//! order as the kernels that use it: two products a tile. It is a sum over visible keys, and 0 where there is none.
//!
//! `lse` was rounded as well, to half a unit in its last place: `p = exp(s − lse)` of a row is off by a common factor, up to
//! 4·10⁻⁶ where scores reach 64. The same walk sums `p` itself, and `norm` is what makes it 1.

use cubecl::prelude::*;

use super::gradient::{operand_rows, statistics, two_products};
use super::tile::{LANES, PIECE, TileConfig, V4, share_sum, unit_place};
use crate::family::element::{Numbers, after_dropout, head_of, is_minus_infinity, score, sees};
use crate::family::score_function::with_function;
use crate::family::walk::{Side, key_step, key_walk, work_of};
use crate::score::ScoreCode;

/// Adds the row sums to the `delta` of the scratch buffer, which holds `−dlse`, and writes `norm`. One cube a query tile and
/// head.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn delta_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    d_o: &Tensor<E>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &mut [u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] tile: TileConfig,
    #[define(E)] _dtype: ElemType,
) {
    let bq = comptime!(tile.rows() as u32);
    let work = work_of(CUBE_POS, n.heads_q, n.seq_q, &*scratch, n, Side::Queries, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, i0) = (work.head, work.tile * bq);
    let (b, h) = (head / n.heads_q, head % n.heads_q);
    let rows = operand_rows::<E>(q, k, v, d_o, b, h, n);

    let mut weights = Shared::<[V4]>::new_slice(tile.weights_len());
    let mut stage = Shared::<[V4]>::new_slice(tile.stage_len());
    let (ty, tx) = unit_place(tile);
    let mut s = Array::<f32>::new(PIECE);
    let mut dp = Array::<f32>::new(PIECE);
    // This unit's columns only, until the end.
    let mut masses = Array::<f32>::new(LANES); // Σ p
    let mut sums = Array::<f32>::new(LANES); // Σ p · mult · dp
    let at = head_of::<E>(b, h, &*scratch, bias, n, with_bias);
    let stats = statistics(i0 + ty, tile.row_units, at, &*scratch, n);
    #[unroll]
    for r in 0..LANES {
        masses[r] = 0.0f32;
        sums[r] = 0.0f32;
    }

    let hides = comptime!(with_bias || function.is_some());
    let walk = key_walk(i0, at, &*scratch, n, tile.shape());
    for t in 0..walk.steps {
        let step = key_step(walk, t, i0, at, &*scratch, n, hides, tile.shape());
        if !step.empty {
            let (j0, full) = (step.j0, step.full);
            two_products::<E>(q, k, v, d_o, rows, i0, j0, &mut s, &mut dp, &mut stage, tile);
            #[unroll(tile.unroll)]
            for e in 0..PIECE {
                let (r, c) = (e % LANES, e / LANES);
                let i = i0 + ty + (r * tile.row_units) as u32;
                let j = j0 + tx + (c * tile.col_units) as u32;
                let dead = is_minus_infinity(stats.lse[r]);
                if full || (!dead && sees(i, j, step, at, &*scratch, n)) {
                    let value = score::<E>(s[e], i, j, at, bias, n, with_bias);
                    let value = with_function(value, i, j, at, &*scratch, n, function);
                    if full || !is_minus_infinity(value) {
                        let weight = select(dead, 0.0f32, (value - stats.lse[r]).exp());
                        masses[r] += weight;
                        sums[r] += weight * after_dropout(dp[e], stats.hash[r], j, n);
                    }
                }
            }
        }
    }
    share_sum(&mut masses, &mut weights, tile);
    share_sum(&mut sums, &mut weights, tile);
    #[unroll]
    for r in 0..LANES {
        let i = i0 + ty + comptime!((r * tile.row_units) as u32);
        if tx == 0 && i < n.seq_q && !is_minus_infinity(stats.lse[r]) {
            let row = head as usize * n.seq_q as usize + i as usize;
            let mut mass = masses[r];
            if n.sinks_at != 0 {
                mass += (f32::reinterpret(scratch[n.sinks_at + h as usize]) - stats.lse[r]).exp();
            }
            let minus_dlse = f32::reinterpret(scratch[n.delta_at + row]);
            scratch[n.delta_at + row] = u32::reinterpret(minus_dlse + sums[r] / mass);
            scratch[n.norm_at + row] = u32::reinterpret(1.0f32 / mass);
        }
    }
}
