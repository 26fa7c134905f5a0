//! What is done once a query row of the one-pass backward, before the tiles and after them.

use cubecl::prelude::*;

use super::config::{Compiled, ROWS, WARP};
use super::one_pass_launch::OnePass;
use super::ptx::{Fragment, all_lanes_sum, store_global_16};
use super::tile::PIECE_LEN;
use crate::family::element::{Numbers, is_minus_infinity};
use crate::family::ptx::{global_address, pack};
use crate::family::rounding::restored;

/// `delta = Σ do ∘ o − dlse` (FlashAttention-2, Algorithm 2, line 4), with `o` as it was before it was rounded, added to the `−dlse` that
/// the scratch buffer holds; and zeros where cubes count. One warp a row; a row that saw nothing keeps what it has.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn delta_kernel<E: Float>(
    o: &[u16],
    rest: &[u16],
    d_o: &Tensor<E>,
    scratch: &mut [u32],
    turns: &mut [u32],
    n: Numbers,
    rows: usize,
    counters: usize,
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < counters {
        turns[ABSOLUTE_POS] = 0u32;
    }
    let (row, lane) = (ABSOLUTE_POS / WARP, ABSOLUTE_POS % WARP);
    // A warp is in or out as a whole.
    if row < rows {
        let (head, i) = (row / n.seq_q as usize, row % n.seq_q as usize);
        let (b, h) = (head / n.heads_q as usize, head % n.heads_q as usize);
        let from = b * d_o.stride(0) + h * d_o.stride(1) + i * d_o.stride(2);
        let (own, width) = (row * n.value_dim as usize, n.value_dim as usize);
        let mut sum = 0.0f32;
        let mut d = lane;
        while d < width {
            let (x, _) = restored(u32::cast_from(o[own + d]), u32::cast_from(rest[own + d]), c.element);
            sum += x * f32::cast_from(d_o[from + d * d_o.stride(3)]);
            d += WARP;
        }
        let sum = all_lanes_sum(sum);
        if lane == 0 {
            if !is_minus_infinity(f32::reinterpret(scratch[n.lse_at + row])) {
                let minus_dlse = f32::reinterpret(scratch[n.delta_at + row]);
                scratch[n.delta_at + row] = u32::reinterpret(minus_dlse + sum);
            }
        }
    }
}

/// Rows of dq from the f32 sums. For every query tile, 8 elements of the head dimension and warp these lie as a lane holds them: vector
/// `4 · g + t` has elements `2 · t` and the next of queries `g` and `g + 8`. A unit takes 8 elements of two rows.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn finish_kernel<E: Float>(
    sums: &[Vector<f32, Const<4>>],
    turns: &[u32],
    dq: &mut [E],
    n: Numbers,
    units: usize,
    #[comptime] of: OnePass,
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    if ABSOLUTE_POS < units {
        let (warps, blocks) = comptime!((c.tile.warps, of.blocks()));
        let g = ABSOLUTE_POS % 8;
        let warp = ABSOLUTE_POS / 8 % warps;
        let x = ABSOLUTE_POS / comptime!(8 * warps) % blocks;
        let place = ABSOLUTE_POS / comptime!(8 * warps * blocks);
        let tiles = n.seq_q.div_ceil(comptime!(c.tile.cols as u32)) as usize;
        let (head, i0) = (place / tiles, (place % tiles * c.tile.cols) as u32);
        // Nobody has written where nobody came by.
        let seen = turns[place + 1] > 0;
        let (half_of_queries, part) = (warp % 2, warp / 2);
        let from = ((place * blocks + x) * warps + warp) * WARP + g * 4;
        let (block, x) = (x / comptime!(2 * of.pairs()), x % comptime!(2 * of.pairs()));
        let first = (part * comptime!(2 * of.pairs()) + x) as u32 * comptime!(PIECE_LEN as u32);
        let mut factor = 1.0f32;
        if comptime!(!c.options) {
            factor = n.scale;
        }
        let mut fours = Array::<Vector<f32, Const<4>>>::new(4usize);
        #[unroll]
        for t in 0..4usize {
            fours[t] = Vector::<f32, Const<4>>::new(0.0f32);
            if seen {
                fours[t] = sums[from + t];
            }
        }
        #[unroll]
        for half in 0..2usize {
            let i = i0 + ((half_of_queries * comptime!(of.query_blocks()) + block) * ROWS + g + 8 * half) as u32;
            let to = (head * n.seq_q as usize + i as usize) * n.head_dim as usize + first as usize;
            if i < n.seq_q && first < n.head_dim {
                if n.head_dim.is_multiple_of(comptime!(PIECE_LEN as u32)) {
                    let mut line = Fragment::new(0u32);
                    #[unroll]
                    for t in 0..4usize {
                        let low = fours[t].extract(comptime!(2 * half)) * factor;
                        let high = fours[t].extract(comptime!(2 * half + 1)) * factor;
                        line.insert(t, pack(low, high, c.element));
                    }
                    store_global_16(global_address::<E>(&*dq) + to as u64 * 2u64, line);
                } else {
                    #[unroll]
                    for e in 0..8usize {
                        if first + comptime!(e as u32) < n.head_dim {
                            let y = fours[comptime!(e / 2)].extract(comptime!(2 * half + e % 2));
                            dq[to + e] = E::cast_from(y * factor);
                        }
                    }
                }
            }
        }
    }
}
