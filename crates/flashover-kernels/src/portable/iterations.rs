//! How often a unit goes around its loops, at most.
//!
//! Mesa's software GPU ends every loop of a unit once all of them together have run 65,535 times (`lp_bld_limits.h`, seen
//! in 22.3.6 by `flashover`'s test `limits::loops_end_when_they_should`): a longer walk stops early, and its sums are
//! wrong without a word. So such a walk is refused.

use super::launch::SUM_UNITS;
use super::reductions::Reductions;
use super::tile::{LANES, PIECE, STEP, TileConfig};
use crate::mask::UNBOUNDED;
use crate::operands::Wanted;
use crate::problem::Problem;

/// An upper bound over the kernels of forward and backward, every gradient wanted. Where loops over registers are unrolled
/// it counts them as well.
pub(super) fn iterations(problem: &Problem, tile: TileConfig) -> usize {
    let Problem { batch, heads_q, heads_kv, head_dim, value_dim, .. } = *problem;
    let count = Counts { tile };
    let (scores_d, scores_v) = (count.scores(head_dim), count.scores(value_dim));
    let (values_d, values_v) = (count.values(head_dim), count.values(value_dim));
    let keys = key_tiles(problem, tile);
    let forward = keys * (1 + scores_d + 2 * PIECE + tile.col_units + 2 * values_v);
    let gradient = 1 + scores_d + scores_v + 2 * PIECE;
    let of_queries = keys * (gradient + values_d);
    let of_keys = (heads_q / heads_kv.max(1)) * (1 + query_tiles(problem, tile) * (gradient + values_d + values_v));
    let wanted = Wanted { bias: true, alibi_slopes: true, ..Wanted::default() };
    let Reductions { slope_partials, bias_parts } = Reductions::of(problem, wanted, tile);
    let of_bias = problem.bias.map_or(0, |[b, h, queries, keys]| {
        let blocks = if queries == 1 { problem.seq_q.div_ceil(tile.rows()) } else { 1 };
        let terms = (batch / b.max(1)) * (heads_q / h.max(1)) * blocks;
        let row = if keys == 1 { problem.seq_kv.div_ceil(tile.cols()) } else { 1 };
        terms.div_ceil(bias_parts.max(1)) * (1 + row * (1 + gradient)) + bias_parts + PIECE
    });
    let sums = batch * problem.seq_q.max(slope_partials / (batch * heads_q).max(1)).div_ceil(SUM_UNITS) + SUM_UNITS;
    // What is done once: accumulators that are cleared, rows that are stored, sums that are shared.
    let once = 2 * LANES * (tile.chunks(head_dim) + tile.chunks(value_dim)) + 4 * tile.units();
    forward.max(of_queries).max(of_keys).max(of_bias).max(sums) + once + of_plan(problem, tile)
}

/// What a plan adds: it may list tiles that position hides, which are stepped over, and the bias's gradient looks each tile
/// up in two lists.
fn of_plan(problem: &Problem, tile: TileConfig) -> usize {
    let Some(plan) = problem.plan else { return 0 };
    let kernel_tiles =
        |length: usize, of_plan: u32| length.div_ceil(of_plan as usize) * (of_plan as usize).div_ceil(tile.cols());
    let group = problem.heads_q / problem.heads_kv.max(1);
    let listed = kernel_tiles(problem.seq_kv, plan.tile.bk) + group * kernel_tiles(problem.seq_q, plan.tile.bq);
    let looked_up = problem.bias.map_or(0, |_| problem.seq_kv.div_ceil(tile.cols()) * 2 * usize::BITS as usize);
    listed + looked_up
}

/// Key tiles that a query tile walks at most.
fn key_tiles(problem: &Problem, tile: TileConfig) -> usize {
    let band = problem.band;
    let window = reach(band.left) + if band.causal { 0 } else { reach(band.right) } + tile.rows();
    let sinks = (band.sinks as usize).div_ceil(tile.cols());
    problem.seq_kv.div_ceil(tile.cols()).min(window.div_ceil(tile.cols()) + 1 + sinks)
}

/// Query tiles that a key tile walks at most.
fn query_tiles(problem: &Problem, tile: TileConfig) -> usize {
    let band = problem.band;
    let all = problem.seq_q.div_ceil(tile.cols());
    let window = reach(band.left) + if band.causal { 0 } else { reach(band.right) } + tile.rows();
    if band.sinks > 0 { all } else { all.min(window.div_ceil(tile.cols()) + 1) }
}

fn reach(keys: u32) -> usize {
    if keys == UNBOUNDED { usize::MAX / 4 } else { keys as usize }
}

/// Counts of the two products.
struct Counts {
    tile: TileConfig,
}

impl Counts {
    /// Of `product_scores`: a chunk loads both operands and multiplies in steps.
    fn scores(&self, dim: usize) -> usize {
        let TileConfig { row_units, col_units, depth, .. } = self.tile;
        let loads = (row_units * depth).div_ceil(self.tile.units()) + (col_units * depth).div_ceil(self.tile.units());
        dim.div_ceil(depth) * (1 + loads + depth / STEP)
    }

    /// Of `product_values`: a chunk loads a tile and multiplies in steps.
    fn values(&self, dim: usize) -> usize {
        let tile = self.tile;
        let loads = (tile.cols() * tile.col_units).div_ceil(tile.units());
        dim.div_ceil(tile.cols()) * (1 + loads + tile.cols() / STEP)
    }
}
