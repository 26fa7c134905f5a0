//! What is done once a query row of the backward, before the tiles.

use cubecl::prelude::*;

use super::backward_config::HopperBackwardConfig;
use crate::family::element::{Numbers, is_minus_infinity, row_hash};
use crate::family::ptx::unpack;
use crate::family::rounding::restored;

/// `−lse` and `delta` of each query tile, side by side, padded to whole tiles, `lse` in logarithms of base 2 where products are all
/// that scores are made of; elsewhere also the hash for dropout: a row that does not exist
/// or sees nothing has −∞ and 0, so that all its weights are 0. And zeros where cubes count.
///
/// `delta = Σ do ∘ o − dlse` (FlashAttention-2, Algorithm 2, line 4), with `o` as it was before it was rounded: rounding does not
/// cancel in `dp − delta`. Eight units a padded row; `do_batch`, `do_head` and `do_row` are strides in lines.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn statistics_kernel(
    o: &[Vector<u32, Const<4>>],
    rest: &[Vector<u32, Const<4>>],
    d_o: &[Vector<u32, Const<4>>],
    lse: &Tensor<f32>,
    dlse: ComptimeOption<&Tensor<f32>>,
    statistics: &mut [f32],
    turns: &mut [u32],
    n: Numbers,
    do_batch: usize,
    do_head: usize,
    do_row: usize,
    rows: usize,
    #[comptime] with_dlse: bool,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let (unit, lane) = (ABSOLUTE_POS / 8, ABSOLUTE_POS % 8);
    let tiles = n.seq_q.div_ceil(comptime!(cfg.bq as u32)) as usize;
    let (tile, r) = (unit / cfg.bq, unit % cfg.bq);
    let (head, i) = (tile / tiles, tile % tiles * cfg.bq + r);
    let (b, h) = (head / n.heads_q as usize, head % n.heads_q as usize);
    let mut sum = 0.0f32;
    let exists = unit < rows && i < n.seq_q as usize;
    if exists {
        let lines = (n.value_dim / 8) as usize;
        let own = (head * n.seq_q as usize + i) * lines;
        let from = b * do_batch + h * do_head + i * do_row;
        let mut line = lane;
        while line < lines {
            let (x, y, g) = (o[own + line], rest[own + line], d_o[from + line]);
            #[unroll]
            for z in 0..4usize {
                let (x0, x1) = restored(x.extract(z), y.extract(z), cfg.element);
                let (g0, g1) = unpack(g.extract(z), cfg.element);
                sum += g0 * x0 + g1 * x1;
            }
            line += 8;
        }
    }
    let sum = sum + plane_shuffle_xor(sum, 1u32);
    let sum = sum + plane_shuffle_xor(sum, 2u32);
    let sum = sum + plane_shuffle_xor(sum, 4u32);
    if unit < rows && lane == 0 {
        let mut minus_lse = n.minus_infinity;
        let mut delta = 0.0f32;
        if exists {
            let row_lse = lse[b * lse.stride(0) + h * lse.stride(1) + i * lse.stride(2)];
            if !is_minus_infinity(row_lse) {
                minus_lse = -row_lse;
                if comptime!(cfg.plain) {
                    minus_lse = -(row_lse * comptime!(core::f32::consts::LOG2_E));
                }
                delta = sum;
                if with_dlse {
                    let dlse = dlse.unwrap();
                    delta -= dlse[b * dlse.stride(0) + h * dlse.stride(1) + i * dlse.stride(2)];
                }
            }
        }
        let first = tile * comptime!(cfg.statistics() * cfg.bq);
        statistics[first + r] = minus_lse;
        statistics[first + cfg.bq + r] = delta;
        if comptime!(!cfg.plain) {
            statistics[first + comptime!(2 * cfg.bq) + r] = f32::reinterpret(row_hash(head as u32, i as u32, n));
        }
        if r < cfg.counters() {
            turns[tile * cfg.counters() + r + 1] = 0u32;
        }
        if unit == 0 {
            turns[0] = 0u32;
        }
        // There are no more key heads than query rows.
        if unit < (n.batch * n.heads_kv) as usize {
            turns[rows / cfg.bq * cfg.counters() + unit + 1] = 0u32;
        }
    }
}
