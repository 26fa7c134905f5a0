//! Problems of several tiles a side, no larger than that takes: instructions are interpreted.

use flashover_kernels::dropout::Dropout;
use flashover_kernels::mask::{Band, UNBOUNDED};
use flashover_kernels::problem::{Element, Problem};
use flashover_testing::data::Case;

/// Head dimension of queries and keys, and of values, that most problems have.
pub const DIMS: [usize; 2] = [64, 64];

/// `[B, Hq, Hkv]`, `[Sq, Skv]` and `[D, Dv]`.
pub fn plain(
    [batch, heads_q, heads_kv]: [usize; 3],
    [seq_q, seq_kv]: [usize; 2],
    [dim, value_dim]: [usize; 2],
    element: Element,
) -> Problem {
    let q = [batch, heads_q, seq_q, dim];
    let v = [batch, heads_kv, seq_kv, value_dim];
    Problem::new(q, [batch, heads_kv, seq_kv, dim], v, element).expect("the shapes are sound")
}

/// The options, each by itself or with few others, of problems that compile to as few kernels as they can.
pub fn options(element: Element) -> Vec<Case> {
    // Two query heads that share a key head; not so few queries that the Hopper forward would pack them into one tile.
    let of = |seq_kv: usize| plain([2, 2, 1], [200, seq_kv], DIMS, element);
    let problems = [
        // Queries 0 to 49 see nothing.
        Problem { band: Band::causal(), key_lengths: true, ..of(150) },
        // Tiles between the visible sinks and the window that no query of a tile sees.
        Problem { band: Band { causal: true, left: 60, right: UNBOUNDED, sinks: 2 }, ..of(410) },
        Problem { mask: Some([2, 1, 200, 210]), ..of(210) },
        Problem { band: Band { causal: false, left: 50, right: 20, sinks: 0 }, softcap: Some(2.0), ..of(210) },
        Problem { alibi: true, learned_sinks: true, key_lengths: true, ..of(150) },
        Problem { dropout: Some(Dropout { probability: 0.3, seed: 5 }), band: Band::causal(), ..of(210) },
        Problem { bias: Some([1, 2, 1, 150]), mask: Some([2, 1, 200, 150]), ..of(150) },
        // Scores so far apart that the running maximum of many rows grows from tile to tile.
        Problem { scale: 4.0, ..of(210) },
        Problem { scale: -0.3, ..of(150) },
    ];
    // Every other loss depends on the log-sum-exp.
    let case = |(problem, seed): (Problem, u64)| Case { problem, seed, lse_gradient: seed.is_multiple_of(2) };
    problems.into_iter().zip(0..).map(case).collect()
}

/// A problem with two unequal heads of unequal dimensions, in which tiles are full, partial and empty.
pub fn of_dims(dims: [usize; 2], element: Element) -> Case {
    let band = Band { causal: true, left: 120, right: UNBOUNDED, sinks: 0 };
    Case::new(Problem { band, ..plain([1, 2, 1], [200, 280], dims, element) }, 7)
}

/// Little to see: no keys, no queries, one query, queries before the first key, fewer keys than a matrix has rows.
pub fn nearly_nothing(element: Element) -> Vec<Case> {
    let of = |lengths: [usize; 2]| plain([2, 2, 1], lengths, DIMS, element);
    let problems = [
        Problem { learned_sinks: true, ..of([200, 0]) },
        Problem { learned_sinks: true, ..of([0, 150]) },
        of([1, 150]),
        Problem { band: Band::causal(), ..of([200, 20]) },
        Problem { band: Band::causal(), ..of([200, 5]) },
    ];
    problems.into_iter().zip(20..).map(|(problem, seed)| Case::new(problem, seed)).collect()
}
