//! The gradient of the parameters of a user's score function: `dparameter_n = Σ ds_ij · ∂value/∂parameter` over the scores
//! that read it.
//!
//! Which scores those are only the function knows, so nobody can own a parameter and gather. Instead every unit has sums of its
//! own for all parameters, in the scratch buffer, and adds to them what it finds in its pieces of the tiles; then each
//! parameter's sums are added up. Both in a fixed order. Query tiles are dealt to as many cubes as the sums have room for
//! ([`Reductions`](super::Reductions)), however long the sequences are.

use cubecl::prelude::*;

use super::gradient::{Towards, operand_rows, score_gradients, statistics, two_products};
use super::parameters::sum_of_units;
use super::tile::{LANES, PIECE, TileConfig, V4, is_hidden, unit_place};
use crate::family::element::{Numbers, head_of};
use crate::family::score_function::function_parameter;
use crate::family::walk::{Side, key_step, key_walk};
use crate::score::ScoreCode;

/// Every `parts`-th query tile of all heads. Sum `p` of unit `u` of a part stands at
/// `parameter_partials_at + (part · parameters + p) · units + u`, so that neighbouring units write to neighbouring words.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn parameter_gradient_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    d_o: &Tensor<E>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &mut [u32],
    parts: u32,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] function: ScoreCode,
    #[comptime] tile: TileConfig,
    #[define(E)] _dtype: ElemType,
) {
    let bq = comptime!(tile.rows() as u32);
    let part = CUBE_POS as u32;
    if part >= parts {
        terminate!();
    }
    let units = comptime!(tile.units());
    let sums = n.parameter_partials_at + part as usize * n.parameters as usize * units + UNIT_POS as usize;
    for p in 0..n.parameters {
        scratch[sums + p as usize * units] = u32::reinterpret(0.0f32);
    }

    let mut stage = Shared::<[V4]>::new_slice(tile.stage_len());
    let (ty, tx) = unit_place(tile);
    let mut s = Array::<f32>::new(PIECE);
    let mut dp = Array::<f32>::new(PIECE);
    let query_tiles = n.seq_q.div_ceil(bq);
    let all = n.batch * n.heads_q * query_tiles;
    let mut item = part;
    while item < all {
        let (head, i0) = (item / query_tiles, item % query_tiles * bq);
        let (b, h) = (head / n.heads_q, head % n.heads_q);
        let rows = operand_rows::<E>(q, k, v, d_o, b, h, n);
        let at = head_of::<E>(b, h, &*scratch, bias, n, with_bias);
        let stats = statistics(i0 + ty, tile.row_units, at, &*scratch, n);
        let walk = key_walk(i0, at, &*scratch, n, tile.shape());
        for t in 0..walk.steps {
            // A function may hide by −∞, as a bias may: no tile is full.
            let step = key_step(walk, t, i0, at, &*scratch, n, true, tile.shape());
            if !step.empty {
                let j0 = step.j0;
                two_products::<E>(q, k, v, d_o, rows, i0, j0, &mut s, &mut dp, &mut stage, tile);
                score_gradients::<E>(
                    &mut s,
                    &mut dp,
                    &stats,
                    i0 + ty,
                    j0 + tx,
                    step,
                    at,
                    &*scratch,
                    bias,
                    n,
                    Towards::Parameter,
                    false,
                    Side::Queries,
                    with_bias,
                    comptime!(Some(function)),
                    tile,
                );
                for e in 0..PIECE {
                    if !is_hidden(dp[e]) {
                        let i = i0 + ty + (e % LANES * tile.row_units) as u32;
                        let j = j0 + tx + (e / LANES * tile.col_units) as u32;
                        let p = function_parameter(i, j, at, n, function);
                        if p < n.parameters {
                            let place = sums + p as usize * units;
                            scratch[place] = u32::reinterpret(f32::reinterpret(scratch[place]) + dp[e]);
                        }
                    }
                }
            }
        }
        item += parts;
    }
}

/// The sums of all units of all parts, parameter by parameter. A cube a parameter: every unit adds its stride of them, then
/// the first one adds the units up.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn parameter_sum_kernel(
    scratch: &[u32],
    gradient: &mut [f32],
    parts: u32,
    n: Numbers,
    #[comptime] tile_units: usize,
    #[comptime] units: usize,
) {
    let p = CUBE_POS;
    if p >= n.parameters as usize {
        terminate!();
    }
    let mut sum = 0.0f32;
    let mut x = UNIT_POS as usize;
    while x < parts as usize * tile_units {
        let (part, unit) = (x / tile_units, x % tile_units);
        let place = n.parameter_partials_at + (part * n.parameters as usize + p) * tile_units + unit;
        sum += f32::reinterpret(scratch[place]);
        x += units;
    }
    let total = sum_of_units(sum, units);
    if UNIT_POS == 0 {
        gradient[p] = total;
    }
}
