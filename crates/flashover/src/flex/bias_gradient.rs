//! Gradient of a bias that is broadcast: `dbias[b′, h′, i′, j′] = Σ ds` over the dimensions it is broadcast along.
//!
//! A task owns some elements of the bias and walks, in a fixed order, every tile of scores that reads them, computing
//! p and ds anew (two products a tile). Sums stand in one tile of f64. So nothing of size N×N is kept and no two tasks
//! write to one place.

use std::ops::Range;

use flashover_kernels::mask::TileKind;
use flashover_kernels::problem::Problem;
use pulp::{Arch, Simd, WithSimd};

use super::context::{Context, Tile};
use super::parallel;
use super::real::{Float, Real};
use super::sweep::{BK, BQ, KeyScratch, KeyTile, RowGradients, Saved, TileScratch, gradient_tile};

/// Fills `gradient`, which has the shape of the bias and holds zeros.
pub(super) fn compute<T: Float>(context: &Context<'_, T>, saved: &Saved<'_, T>, gradient: &mut [T]) {
    let problem = context.problem;
    let [batch, heads, queries, keys] = problem.bias.unwrap_or_default();
    // Pieces of the result are contiguous: blocks of rows, or parts of the only row.
    let (rows, columns) = if queries > 1 { (BQ, keys) } else { (1, BK.min(keys)) };
    let all = |range: usize, full: usize, at: usize| if range == full { at..at + 1 } else { 0..full };
    let mut tasks = Vec::new();
    for (head, gradient) in gradient.chunks_mut(queries * keys).enumerate() {
        for (n, out) in gradient.chunks_mut(rows * columns).enumerate() {
            let queries = if queries > 1 { n * BQ..problem.seq_q.min((n + 1) * BQ) } else { 0..problem.seq_q };
            let keys = if rows == 1 && keys > 1 { n * BK..keys.min((n + 1) * BK) } else { 0..problem.seq_kv };
            let b = all(batch, problem.batch, head / heads);
            let h = all(heads, problem.heads_q, head % heads);
            tasks.push(Task { b, h, queries, keys, out });
        }
    }
    let arch = Arch::new();
    let work = problem.batch * problem.heads_q * problem.seq_q * problem.seq_kv * problem.head_dim;
    parallel::for_each(
        tasks.into_iter(),
        work,
        || Scratch::new(problem),
        |scratch, task| {
            arch.dispatch(Run { context, saved, scratch, task });
        },
    );
}

/// Some elements of the bias and the scores that read them.
struct Task<'x, T> {
    b: Range<usize>,
    h: Range<usize>,
    queries: Range<usize>,
    keys: Range<usize>,
    out: &'x mut [T],
}

struct Scratch<R> {
    keys: KeyScratch<R>,
    tile: TileScratch<R>,
    /// Sums over the broadcast dimensions, `[BQ, BK]`; one row, or one column, if queries, or keys, are among them.
    sums: Vec<f64>,
    row: Vec<R>,
    walk: Vec<(Tile, TileKind)>,
}

impl<R: Real> Scratch<R> {
    fn new(problem: &Problem) -> Self {
        Scratch {
            keys: KeyScratch::new(problem),
            tile: TileScratch::new(problem),
            sums: vec![0.0; BQ * BK],
            row: vec![R::default(); BK],
            walk: Vec::new(),
        }
    }
}

struct Run<'s, 'a, T: Float> {
    context: &'s Context<'a, T>,
    saved: &'s Saved<'a, T>,
    scratch: &'s mut Scratch<T::Compute>,
    task: Task<'s, T>,
}

impl<T: Float> WithSimd for Run<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Run { context, saved, scratch, task } = self;
        let Task { b, h, queries, keys, out } = task;
        let [_, _, bias_queries, bias_keys] = context.problem.bias.unwrap_or_default();
        let Scratch { keys: key_scratch, tile: tile_scratch, sums, row, walk } = scratch;
        // One f64 for each element of the piece that this key tile reaches.
        let (rows, whole_row) = (if bias_queries > 1 { queries.len() } else { 1 }, bias_keys > 1);
        sums.fill(0.0);
        let mut next = keys.start;
        while next < keys.end {
            let j0 = next;
            next = context.end_of_keys(j0, BK, keys.end);
            for b in b.clone() {
                let end = next.min(context.keys(b));
                for h in h.clone() {
                    if j0 >= end {
                        continue;
                    }
                    let tile = Tile { b, h, i0: 0, rows: 0, j0, keys: end - j0, bitmap: None };
                    walk.clear();
                    context.list_queries(&tile, &queries, BQ, walk);
                    if walk.is_empty() {
                        continue;
                    }
                    let kv = (b, h / context.problem.group());
                    let keys = KeyTile::load(context, key_scratch, kv, (j0, tile.keys), true);
                    for &(tile, kind) in walk.iter() {
                        let add = |i: usize, _: &[T::Compute], row: RowGradients<'_, T::Compute>| {
                            let ds = row.score;
                            let r = if rows > 1 { i - queries.start } else { 0 };
                            let sums = &mut sums[r * BK..][..ds.len()];
                            sums.iter_mut().zip(ds).for_each(|(sum, ds)| *sum += ds.to_f64());
                        };
                        gradient_tile(simd, context, saved, &keys, (&tile, kind), tile_scratch, true, add);
                    }
                }
            }
            if whole_row {
                let columns = next - j0;
                for (r, sums) in sums.chunks_exact_mut(BK).take(rows).enumerate() {
                    row.iter_mut().zip(sums.iter()).for_each(|(x, &sum)| *x = T::Compute::from_f64(sum));
                    T::narrow_slice(&row[..columns], &mut out[r * keys.len() + j0 - keys.start..][..columns]);
                    sums.fill(0.0);
                }
            }
        }
        if !whole_row {
            for (out, sums) in out.iter_mut().zip(sums.chunks_exact(BK)) {
                *out = T::narrow(T::Compute::from_f64(sums.iter().sum()));
            }
        }
    }
}
