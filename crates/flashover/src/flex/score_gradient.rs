//! Gradient of the parameters of a user's score function: `Σ ds · ∂value/∂parameter` over the scores that read each.
//!
//! Any score may read any parameter, so a task, some blocks of queries, has sums of its own for all of them, in f64. How many
//! tasks there are is decided by the problem alone, and their sums are added in their order: the same bits on any number of
//! threads. Two products a tile, once more.

use flashover_kernels::mask::TileKind;
use flashover_kernels::problem::Problem;
use pulp::{Arch, Simd, WithSimd};

use super::context::{Context, Tile};
use super::parallel;
use super::real::{Float, Real};
use super::sweep::{BK, BQ, KeyScratch, KeyTile, RowGradients, Saved, TileScratch, gradient_tile};

/// Queries of a unit of work: several blocks share the packing of a key tile.
const QUERIES: usize = 4 * BQ;

/// Tasks at most.
const TASKS: usize = 64;

/// Sums that all tasks have together at most, while one has less: 32 MiB.
const SUMS: usize = 1 << 22;

/// Bytes of all tasks' sums.
pub(super) fn sum_bytes(problem: &Problem) -> usize {
    let parameters = problem.score.map_or(0, |score| score.parameters);
    tasks(problem, parameters) * parameters * size_of::<f64>()
}

fn tasks(problem: &Problem, parameters: usize) -> usize {
    let room = (SUMS / parameters.max(1)).clamp(1, TASKS);
    room.min(problem.batch * problem.heads_q * problem.seq_q.div_ceil(QUERIES))
}

/// Fills `gradient`, which holds zeros.
pub(super) fn compute<T: Float>(context: &Context<'_, T>, saved: &Saved<'_, T>, gradient: &mut [f32]) {
    let problem = context.problem;
    let (count, parameters) = (tasks(problem, gradient.len()), gradient.len());
    let mut sums = vec![0.0; count * parameters];
    let arch = Arch::new();
    let work = problem.batch * problem.heads_q * problem.seq_q * problem.seq_kv * problem.head_dim;
    parallel::for_each(
        sums.chunks_mut(parameters).enumerate(),
        work,
        || (KeyScratch::new(problem), TileScratch::new(problem), Vec::new()),
        |(keys, tile, walk), (task, sums)| {
            let per_head = problem.seq_q.div_ceil(QUERIES);
            for item in (task..problem.batch * problem.heads_q * per_head).step_by(count) {
                let (head, i0) = (item / per_head, item % per_head * QUERIES);
                arch.dispatch(Blocks { context, saved, keys, tile, walk, head, i0, sums: &mut *sums });
            }
        },
    );
    for (p, gradient) in gradient.iter_mut().enumerate() {
        *gradient = sums.iter().skip(p).step_by(parameters).sum::<f64>() as f32;
    }
}

/// The blocks of [`QUERIES`] queries of a head.
struct Blocks<'s, 'a, T: Float> {
    context: &'s Context<'a, T>,
    saved: &'s Saved<'a, T>,
    keys: &'s mut KeyScratch<T::Compute>,
    tile: &'s mut TileScratch<T::Compute>,
    walk: &'s mut Vec<(Tile, TileKind)>,
    head: usize,
    i0: usize,
    /// One for each parameter, added to.
    sums: &'s mut [f64],
}

impl<T: Float> WithSimd for Blocks<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Blocks { context, saved, keys: key_scratch, tile: tile_scratch, walk, head, i0, sums } = self;
        let problem = context.problem;
        let (b, h) = (head / problem.heads_q, head % problem.heads_q);
        let queries = i0..(i0 + QUERIES).min(problem.seq_q);
        let end = context.keys_seen(b, queries.end - 1);
        let mut next = 0;
        while next < end {
            let j0 = next;
            next = context.end_of_keys(j0, BK, end);
            let first = Tile { b, h, i0, rows: 0, j0, keys: next - j0, bitmap: None };
            walk.clear();
            context.list_queries(&first, &queries, BQ, walk);
            if walk.is_empty() {
                continue;
            }
            let keys = KeyTile::load(context, key_scratch, (b, h / problem.group()), (j0, first.keys), true);
            for &(tile, kind) in walk.iter() {
                let add = |i: usize, _: &[T::Compute], row: RowGradients<'_, T::Compute>| {
                    for (p, term) in context.parameters_of_row(&tile, i).zip(row.parameter) {
                        // What is hidden may read a parameter that does not exist.
                        if let Some(sum) = sums.get_mut(p) {
                            *sum += term.to_f64();
                        }
                    }
                };
                gradient_tile(simd, context, saved, &keys, (&tile, kind), tile_scratch, true, add);
            }
        }
    }
}
