//! `delta = Σ_j p · mult · dp` and `norm = 1 / Σ_j p`, from the scores again.
//!
//! `rowsum(do ∘ o)` is the same sum (FlashAttention, Appendix B.2, eq. 4), but a rounded `o` leaves an error in every score
//! of the row alike: it does not cancel in gradients that sum along rows (of a bias, of slopes, of sinks), nor where few
//! keys are seen. The rounding of `lse` puts a common factor on the row's probabilities, up to 4·10⁻⁶ where scores reach
//! 64, which `norm` takes away. Two products a tile.

use flashover_kernels::mask::TileKind;
use pulp::{Arch, Simd, WithSimd};

use super::context::{Context, Tile};
use super::parallel;
use super::real::{Float, Real};
use super::sweep::{BK, BQ, KeyScratch, KeyTile, RowGradients, Saved, TileScratch, gradient_tile};
use super::tiles::sum;
use super::view::View;

/// Queries of a task without a plan: several blocks share the packing of a key tile.
const QUERIES: usize = 4 * BQ;

/// Both of every query, `[B, Hq, Sq]`.
pub(super) struct RowSums<R> {
    /// Less `dlse`.
    pub delta: Vec<R>,
    /// 1 for a query that sees nothing.
    pub norm: Vec<R>,
}

/// The sums of the problem's rows.
pub(super) fn compute<T: Float>(
    context: &Context<'_, T>,
    do_: View<'_, T>,
    lse: &[T::Compute],
    dlse: Option<&[f32]>,
) -> RowSums<T::Compute> {
    let problem = context.problem;
    let rows = problem.batch * problem.heads_q * problem.seq_q;
    // With these, ds is p · mult · dp, and p not yet divided by its sum.
    let (zeros, ones) = (vec![T::Compute::default(); rows], vec![T::Compute::from_f64(1.0); rows]);
    let saved = Saved { do_, lse, delta: &zeros, norm: &ones };
    let (mut delta, mut norm) = (zeros.clone(), ones.clone());
    let heads = delta.chunks_mut(problem.seq_q).zip(norm.chunks_mut(problem.seq_q)).enumerate();
    let queries = context.task_queries(QUERIES);
    let tasks = heads.flat_map(|(head, (delta, norm))| {
        let blocks = delta.chunks_mut(queries).zip(norm.chunks_mut(queries)).enumerate();
        blocks.map(move |(block, (delta, norm))| (head, block * queries, delta, norm))
    });
    let tasks: Vec<_> = tasks.collect();
    let work = rows * problem.seq_kv * problem.head_dim;
    let arch = Arch::new();
    let scratch = || (KeyScratch::new(problem), TileScratch::new(problem), Vec::new(), Vec::new());
    parallel::for_each(tasks.into_iter(), work, scratch, |(keys, tile, walk, sums), (head, i0, delta, norm)| {
        sums.clear();
        sums.resize(delta.len(), Sums::default());
        arch.dispatch(Block { context, saved: &saved, keys, tile, walk, head, i0, sums: &mut *sums });
        let first = head * problem.seq_q + i0;
        let sink = context.sinks.map(|sinks| sinks[head % problem.heads_q].to_f64());
        for (r, (sums, (delta, norm))) in sums.iter().zip(delta.iter_mut().zip(norm)).enumerate() {
            let (lse, dlse) = (lse[first + r], dlse.map_or(0.0, |dlse| f64::from(dlse[first + r])));
            let mass = match sink {
                _ if lse == T::Compute::NEG_INFINITY => 1.0,
                Some(sink) => sums.mass + (sink - lse.to_f64()).exp(),
                None => sums.mass,
            };
            *delta = T::Compute::from_f64(sums.delta / mass - dlse);
            *norm = T::Compute::from_f64(1.0 / mass);
        }
    });
    RowSums { delta, norm }
}

/// Sums of one query's row.
#[derive(Clone, Copy, Default)]
struct Sums {
    /// Of p.
    mass: f64,
    /// Of p · mult · dp.
    delta: f64,
}

/// Some queries of a head.
struct Block<'s, 'a, T: Float> {
    context: &'s Context<'a, T>,
    saved: &'s Saved<'a, T>,
    keys: &'s mut KeyScratch<T::Compute>,
    tile: &'s mut TileScratch<T::Compute>,
    walk: &'s mut Vec<(Tile, TileKind)>,
    head: usize,
    i0: usize,
    /// Of each query, added to.
    sums: &'s mut [Sums],
}

impl<T: Float> WithSimd for Block<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Block { context, saved, keys: key_scratch, tile: tile_scratch, walk, head, i0, sums } = self;
        let (b, h) = (head / context.problem.heads_q, head % context.problem.heads_q);
        let end = context.keys_seen(b, i0 + sums.len() - 1);
        let mut next = 0;
        while next < end {
            let j0 = next;
            next = context.end_of_keys(j0, BK, end);
            let kv = (b, h / context.problem.group());
            let first = Tile { b, h, i0, rows: 0, j0, keys: next - j0, bitmap: None };
            walk.clear();
            context.list_queries(&first, &(i0..i0 + sums.len()), BQ, walk);
            if walk.is_empty() {
                continue;
            }
            let keys = KeyTile::load(context, key_scratch, kv, (j0, first.keys), true);
            for &(tile, kind) in walk.iter() {
                let add = |i: usize, p: &[T::Compute], row: RowGradients<'_, T::Compute>| {
                    let sums = &mut sums[i - i0];
                    sums.mass += sum(p);
                    sums.delta += sum(row.value);
                };
                gradient_tile(simd, context, saved, &keys, (&tile, kind), tile_scratch, true, add);
            }
        }
    }
}
