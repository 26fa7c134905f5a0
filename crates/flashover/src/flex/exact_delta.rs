//! `delta = Σ_j p · dp`, from the scores again, for element types that round `o` when they store it.
//!
//! `rowsum(do ∘ o)` is the same sum, but a rounded `o` leaves an error in every score of the row alike: it does not cancel
//! in gradients that sum along rows (of a bias, of slopes, of sinks), nor where few keys are seen. Two products a tile.

use flashover_kernels::mask::TileKind;
use pulp::{Arch, Simd, WithSimd};

use super::context::{Context, Tile};
use super::parallel;
use super::real::{Float, Real};
use super::sweep::{BK, BQ, KeyScratch, KeyTile, Saved, TileScratch, gradient_tile};
use super::tiles::sum;
use super::view::View;

/// Queries of a task: several blocks share the packing of a key tile.
const QUERIES: usize = 4 * BQ;

/// `delta [B, Hq, Sq]`, less `dlse`.
pub(super) fn compute<T: Float>(
    context: &Context<'_, T>,
    do_: View<'_, T>,
    lse: &[T::Compute],
    dlse: Option<&[f32]>,
) -> Vec<T::Compute> {
    let problem = context.problem;
    let zeros = vec![T::Compute::default(); problem.batch * problem.heads_q * problem.seq_q];
    let mut delta = zeros.clone();
    let saved = Saved { do_, lse, delta: &zeros };
    let heads = delta.chunks_mut(problem.seq_q).enumerate();
    let tasks = heads.flat_map(|(head, delta)| {
        delta.chunks_mut(QUERIES).enumerate().map(move |(block, delta)| (head, block * QUERIES, delta))
    });
    let tasks: Vec<_> = tasks.collect();
    let work = zeros.len() * problem.seq_kv * problem.head_dim;
    let arch = Arch::new();
    let scratch = || (KeyScratch::new(problem), TileScratch::new(problem));
    parallel::for_each(tasks.into_iter(), work, scratch, |(keys, tile), (head, i0, delta)| {
        arch.dispatch(Block { context, saved: &saved, keys, tile, head, i0, delta: &mut *delta });
        if let Some(dlse) = dlse {
            let dlse = &dlse[head * problem.seq_q + i0..];
            for (delta, &dlse) in delta.iter_mut().zip(dlse) {
                *delta = *delta - T::Compute::from_f64(f64::from(dlse));
            }
        }
    });
    delta
}

/// At most [`QUERIES`] queries of a head.
struct Block<'s, 'a, T: Float> {
    context: &'s Context<'a, T>,
    saved: &'s Saved<'a, T>,
    keys: &'s mut KeyScratch<T::Compute>,
    tile: &'s mut TileScratch<T::Compute>,
    head: usize,
    i0: usize,
    delta: &'s mut [T::Compute],
}

impl<T: Float> WithSimd for Block<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Block { context, saved, keys: key_scratch, tile: tile_scratch, head, i0, delta } = self;
        let (b, h) = (head / context.problem.heads_q, head % context.problem.heads_q);
        let mut sums = [0.0f64; QUERIES];
        let end = context.keys_seen(b, i0 + delta.len() - 1);
        for j0 in (0..end).step_by(BK) {
            let kv = (b, h / context.problem.group());
            let first = Tile { b, h, i0, rows: 0, j0, keys: BK.min(end - j0) };
            let keys = KeyTile::load(context, key_scratch, kv, (j0, first.keys), true);
            for start in (0..delta.len()).step_by(BQ) {
                let tile = Tile { i0: i0 + start, rows: BQ.min(delta.len() - start), ..first };
                let kind = context.classify(&tile);
                if kind == TileKind::Empty {
                    continue;
                }
                // With delta 0, ds is p · dp.
                let add = |i: usize, ds: &mut [T::Compute]| sums[i - i0] += sum(ds);
                gradient_tile(simd, context, saved, &keys, (&tile, kind), tile_scratch, true, add);
            }
        }
        for (delta, sum) in delta.iter_mut().zip(sums) {
            *delta = T::Compute::from_f64(sum);
        }
    }
}
