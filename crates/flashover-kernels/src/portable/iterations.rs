//! How often a unit goes around its loops, at most.
//!
//! Mesa's software GPU ends every loop of a unit once all of them together have run 65,535 times (`lp_bld_limits.h`, seen
//! in 22.3.6 by `flashover`'s test `limits::loops_end_when_they_should`): a longer walk stops early, and its sums are
//! wrong without a word. So such a walk is refused.

use super::reductions::{Reductions, bias_terms};
use super::tile::{LANES, PIECE, STEP, TileConfig};
use crate::family::launcher::SUM_UNITS;
use crate::mask::Band;
use crate::operands::Wanted;
use crate::problem::Problem;

/// An upper bound over the kernels of forward and backward, every gradient wanted. Where loops over registers are unrolled
/// it counts them as well.
pub(super) fn iterations(problem: &Problem, tile: TileConfig) -> usize {
    let Problem { batch, heads_q, seq_q, seq_kv, head_dim, value_dim, .. } = *problem;
    let (scores_d, scores_v) = (of_scores(head_dim, tile), of_scores(value_dim, tile));
    let (values_d, values_v) = (of_values(head_dim, tile), of_values(value_dim, tile));
    let keys = key_tiles(problem, tile);
    let forward = keys * (1 + scores_d + 2 * PIECE + tile.col_units + 2 * values_v);
    let gradient = 1 + scores_d + scores_v + 2 * PIECE;
    let of_queries = keys * (gradient + values_d);
    let of_keys = problem.group() * (1 + query_tiles(problem, tile) * (gradient + values_d + values_v));
    let wanted = Wanted { bias: true, alibi_slopes: true, score_parameters: true, ..Wanted::default() };
    let Reductions { slope_partials, bias_parts, bias_rows, parameter_parts, .. } =
        Reductions::of(problem, wanted, tile);
    let of_bias = problem.bias.filter(|_| bias_parts > 0).map_or(0, |shape| {
        let row = if shape[3] == 1 { seq_kv.div_ceil(tile.cols()) } else { 1 };
        let terms = bias_terms(problem, shape, tile.rows()).div_ceil(bias_parts);
        terms * (1 + row * (1 + gradient)) + bias_parts + PIECE
    });
    let of_rows = problem
        .bias
        .filter(|_| bias_rows)
        .map_or(0, |shape| bias_terms(problem, shape, 1).div_ceil(SUM_UNITS) + SUM_UNITS);
    let of_parameters = problem.score.filter(|_| parameter_parts > 0).map_or(0, |score| {
        let query_tiles = (batch * heads_q * seq_q.div_ceil(tile.rows())).div_ceil(parameter_parts);
        let cleared_and_summed = score.parameters + (parameter_parts * tile.units()).div_ceil(SUM_UNITS);
        cleared_and_summed + query_tiles * (1 + keys * (gradient + PIECE))
    });
    let sums = batch * seq_q.max(slope_partials / (batch * heads_q).max(1)).div_ceil(SUM_UNITS) + SUM_UNITS;
    // What is done once: accumulators that are cleared, rows that are stored, sums that are shared.
    let once = 2 * LANES * (tile.chunks(head_dim) + tile.chunks(value_dim)) + 4 * tile.units();
    forward.max(of_queries).max(of_keys).max(of_bias).max(of_rows).max(of_parameters).max(sums)
        + once
        + of_plan(problem, tile)
}

/// What a plan adds: it may list tiles that position hides, which are stepped over, and the bias's gradient looks each tile
/// up in two lists.
fn of_plan(problem: &Problem, tile: TileConfig) -> usize {
    let Some(plan) = problem.plan else { return 0 };
    let kernel_tiles =
        |length: usize, of_plan: u32| length.div_ceil(of_plan as usize) * (of_plan as usize).div_ceil(tile.cols());
    let listed =
        kernel_tiles(problem.seq_kv, plan.tile.bk) + problem.group() * kernel_tiles(problem.seq_q, plan.tile.bq);
    let looked_up = problem.bias.map_or(0, |_| problem.seq_kv.div_ceil(tile.cols()) * 2 * usize::BITS as usize);
    listed + looked_up
}

/// Key tiles that a query tile walks at most.
fn key_tiles(problem: &Problem, tile: TileConfig) -> usize {
    let sinks = (problem.band.sinks as usize).div_ceil(tile.cols());
    problem.seq_kv.div_ceil(tile.cols()).min(window_tiles(problem, tile) + sinks)
}

/// Query tiles that a key tile walks at most.
fn query_tiles(problem: &Problem, tile: TileConfig) -> usize {
    let all = problem.seq_q.div_ceil(tile.cols());
    if problem.band.sinks > 0 { all } else { all.min(window_tiles(problem, tile)) }
}

/// Tiles of `tile.cols()` that the window of `tile.rows()` neighbours touches at most.
fn window_tiles(problem: &Problem, tile: TileConfig) -> usize {
    let Band { causal, left, right, .. } = problem.band;
    // The sums are far from overflow: an unbounded side is 2³⁰.
    let reach = left as usize + if causal { 0 } else { right as usize };
    (reach + tile.rows()).div_ceil(tile.cols()) + 1
}

/// Iterations of `product_scores`: a chunk loads both operands and multiplies in steps.
fn of_scores(dim: usize, tile: TileConfig) -> usize {
    let TileConfig { row_units, col_units, depth, .. } = tile;
    let loads = (row_units * depth).div_ceil(tile.units()) + (col_units * depth).div_ceil(tile.units());
    dim.div_ceil(depth) * (1 + loads + depth / STEP)
}

/// Iterations of `product_values`: a chunk loads a tile and multiplies in steps.
fn of_values(dim: usize, tile: TileConfig) -> usize {
    let loads = (tile.cols() * tile.col_units).div_ceil(tile.units());
    dim.div_ceil(tile.cols()) * (1 + loads + tile.cols() / STEP)
}
