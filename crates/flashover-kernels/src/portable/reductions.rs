//! How a backward takes its sums: decided from the problem alone, so that launches and [`cost`](crate::cost) agree.

use super::tile::TileConfig;
use crate::family::scratch::Partials;
use crate::operands::Wanted;
use crate::problem::Problem;

/// Cubes that the bias's gradient is spread over at least, where there is so much to do: a few for each multiprocessor of
/// the largest devices.
const CUBES: usize = 512;

/// Words that the sums of a score function's parameters may take, while one part is more than there is room for: 32 MiB.
const PARAMETER_WORDS: usize = 1 << 23;

/// How a backward takes its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reductions {
    /// Partial sums of the slopes' gradient, one a query tile and head; 0 if it is not wanted.
    pub slope_partials: usize,
    /// Parts that the sum of each element of the bias's gradient is taken in, tile by tile; 0 if it is not.
    pub bias_parts: usize,
    /// Whether the bias's gradient is wanted and a sum over whole rows, which their statistics tell.
    pub bias_rows: bool,
    /// Cubes that take the gradient of the score function's parameters, each unit with sums of its own; 0 if it is not
    /// wanted.
    pub parameter_parts: usize,
    /// Words of all these sums.
    pub parameter_words: usize,
}

impl Reductions {
    pub fn of(problem: &Problem, wanted: Wanted, tile: TileConfig) -> Self {
        let Problem { batch, heads_q, seq_q, seq_kv, .. } = *problem;
        let query_tiles = seq_q.div_ceil(tile.rows());
        let slopes = wanted.alibi_slopes && problem.alibi;
        let bias = problem.bias.filter(|_| wanted.bias && batch * heads_q * seq_q * seq_kv > 0);
        // A user's function comes after the bias, and its derivative differs from key to key.
        let bias_rows = bias.is_some_and(|shape| shape[3] == 1) && problem.score.is_none();
        let bias = bias.filter(|_| !bias_rows);
        let score = problem.score.filter(|_| wanted.score_parameters && batch * heads_q * seq_q * seq_kv > 0);
        let part = score.map_or(0, |score| score.parameters * tile.units());
        let parameter_parts = score.map_or(0, |_| {
            let room = (PARAMETER_WORDS / part).clamp(1, CUBES);
            room.min(batch * heads_q * query_tiles)
        });
        Reductions {
            bias_rows,
            parameter_parts,
            parameter_words: parameter_parts * part,
            slope_partials: if slopes { batch * heads_q * query_tiles } else { 0 },
            bias_parts: bias.map_or(0, |[b, h, queries, keys]| {
                let tiles = b * h * queries.div_ceil(tile.rows()) * keys.div_ceil(tile.cols());
                CUBES.div_ceil(tiles).min(bias_terms(problem, [b, h, queries, keys], tile.rows()))
            }),
        }
    }

    /// Words of the partial sums; none of the bias's if each element is summed at once.
    pub fn partials(&self, problem: &Problem) -> Partials {
        let elements: usize = problem.bias.map_or(0, |shape| shape.iter().product());
        Partials {
            slopes: self.slope_partials,
            bias: if self.bias_parts > 1 { self.bias_parts * elements } else { 0 },
            parameters: self.parameter_words,
        }
    }
}

/// Pieces of `rows` queries whose sums make one element, or one tile of `rows` rows, of the gradient of a bias of this shape.
pub(super) fn bias_terms(problem: &Problem, [b, h, queries, _]: [usize; 4], rows: usize) -> usize {
    let heads = (problem.batch / b) * (problem.heads_q / h);
    heads * if queries == 1 { problem.seq_q.div_ceil(rows) } else { 1 }
}
