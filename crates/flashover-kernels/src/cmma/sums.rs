//! What is done to single elements of sums: in shared memory, in the place of a tile of scores, a few columns at a time.

use cubecl::prelude::*;

use super::config::CmmaTile;
use super::products::{Sums, accumulate, reload, store};
use super::tile::{E4, LANES, V4, pitch, score_pitch};

/// This unit's row of the tile: one of its plane's, which [`CmmaTile::row_units`] neighbours share.
#[cube]
pub(crate) fn own_row(#[comptime] tile: CmmaTile) -> u32 {
    UNIT_POS_Y * comptime!(tile.plane_rows() as u32) + UNIT_POS_X / comptime!(tile.row_units() as u32)
}

/// Which of the units that share its row this one is.
#[cube]
pub(crate) fn own_part(#[comptime] tile: CmmaTile) -> u32 {
    UNIT_POS_X % comptime!(tile.row_units() as u32)
}

/// Where this unit's scores stand, in vectors: every [`CmmaTile::row_units`]th from here on is its own.
#[cube]
pub(crate) fn own_scores(#[comptime] tile: CmmaTile) -> usize {
    (own_row(tile) * comptime!((score_pitch(tile.cols) / LANES) as u32) + own_part(tile)) as usize
}

/// Likewise in the tile of weights.
#[cube]
pub(crate) fn own_weights(#[comptime] tile: CmmaTile) -> usize {
    (own_row(tile) * comptime!((pitch(tile.cols) / LANES) as u32) + own_part(tile)) as usize
}

/// Column in the tile of the first of this unit's scores of vector `x`.
#[cube]
pub(crate) fn own_column(#[comptime] x: usize, #[comptime] tile: CmmaTile) -> u32 {
    (own_part(tile) + comptime!((x * tile.row_units()) as u32)) * comptime!(LANES as u32)
}

/// The sum over the units that share a row.
#[cube]
pub(crate) fn row_sum(x: f32, #[comptime] tile: CmmaTile) -> f32 {
    let mut sum = x;
    #[unroll]
    for step in 0..comptime!(tile.row_units().ilog2() as usize) {
        sum += plane_shuffle_xor(sum, comptime!(1u32 << step));
    }
    sum
}

/// The maximum over the units that share a row.
#[cube]
pub(crate) fn row_maximum(x: f32, #[comptime] tile: CmmaTile) -> f32 {
    let mut top = x;
    #[unroll]
    for step in 0..comptime!(tile.row_units().ilog2() as usize) {
        top = max(top, plane_shuffle_xor(top, comptime!(1u32 << step)));
    }
    top
}

/// Matrices of `dim` elements that one round through the tile of scores takes.
const fn round(number: usize, dim: usize, tile: CmmaTile) -> usize {
    let rest = dim - number * tile.cols;
    (if rest < tile.cols { rest } else { tile.cols }) / tile.edge
}

/// Puts round `number` of this plane's sums into the tile of scores, and multiplies this unit's row of them.
#[cube]
fn spread(
    sums: &Sums,
    scores: &mut Shared<[V4]>,
    factor: f32,
    #[comptime] number: usize,
    #[comptime] dim: usize,
    #[comptime] tile: CmmaTile,
) {
    let edge = comptime!(tile.edge);
    let (rows, wide) = comptime!((tile.plane_rows() / edge, dim / edge));
    let first = UNIT_POS_Y as usize * comptime!(tile.plane_rows());
    // Everyone of the plane is done with what stands there.
    sync_plane();
    #[unroll]
    for r in 0..rows {
        #[unroll]
        for c in 0..comptime!(round(number, dim, tile)) {
            let at = (first + comptime!(r * edge)) * comptime!(score_pitch(tile.cols)) + comptime!(c * edge);
            store(scores, at, sums.index(comptime!(r * wide + number * (tile.cols / edge) + c)), tile);
        }
    }
    sync_plane();
    let own = own_scores(tile);
    #[unroll]
    for x in 0..comptime!(tile.row_vectors()) {
        let at = own + comptime!(x * tile.row_units());
        scores[at] *= V4::new(factor);
    }
    sync_plane();
}

/// Multiplies every row of this plane's sums by the factor of its units. The tile of scores is free before and after.
#[cube]
pub(crate) fn scale_rows(
    sums: &mut Sums,
    scores: &mut Shared<[V4]>,
    factor: f32,
    #[comptime] dim: usize,
    #[comptime] tile: CmmaTile,
) {
    let edge = comptime!(tile.edge);
    let (rows, wide) = comptime!((tile.plane_rows() / edge, dim / edge));
    let first = UNIT_POS_Y as usize * comptime!(tile.plane_rows());
    #[unroll]
    for number in 0..comptime!(dim.div_ceil(tile.cols)) {
        spread(&*sums, scores, factor, number, dim, tile);
        #[unroll]
        for r in 0..rows {
            #[unroll]
            for c in 0..comptime!(round(number, dim, tile)) {
                let at = (first + comptime!(r * edge)) * comptime!(score_pitch(tile.cols)) + comptime!(c * edge);
                let x = comptime!(r * wide + number * (tile.cols / edge) + c);
                reload(sums.index_mut(x), &*scores, at, tile);
            }
        }
    }
}

/// Writes this plane's sums, each row times the factor of its units, to the rows of a contiguous tensor: the tile's first row is
/// `first` of it, and `left` of the tile's rows exist. Infinite or absent sums of a row whose factor is 0 become 0.
#[cube]
pub(crate) fn store_rows<E: Float>(
    sums: &Sums,
    scores: &mut Shared<[V4]>,
    factor: f32,
    out: &mut [E],
    first: usize,
    left: u32,
    dim: u32,
    #[comptime] padded: usize,
    #[comptime] tile: CmmaTile,
) {
    let per_row = comptime!((tile.cols / LANES) as u32);
    let units = comptime!((tile.plane_rows() * tile.cols / LANES / tile.plane) as u32);
    #[unroll]
    for number in 0..comptime!(padded.div_ceil(tile.cols)) {
        spread(sums, scores, factor, number, padded, tile);
        for pass in 0..units {
            let e = pass * comptime!(tile.plane as u32) + UNIT_POS_X;
            let row = UNIT_POS_Y * comptime!(tile.plane_rows() as u32) + e / per_row;
            let d = e % per_row * comptime!(LANES as u32) + comptime!((number * tile.cols) as u32);
            if row < left {
                let x = scores[(row * comptime!((score_pitch(tile.cols) / LANES) as u32) + e % per_row) as usize];
                let to = (first + row as usize) * dim as usize + d as usize;
                #[unroll]
                for lane in 0..LANES {
                    if d + comptime!(lane as u32) < dim {
                        out[to + lane] = E::cast_from(x.extract(lane));
                    }
                }
            }
        }
    }
}

/// `sums += w · walked`, where `w` are this plane's rows of a tile of scores: rounded, and, if `twice`, also what rounding took from
/// them.
#[cube]
pub(crate) fn accumulate_scores<E: Float>(
    sums: &Sums,
    scores: &Shared<[V4]>,
    weights: &mut Shared<[E4<E>]>,
    walked: &Shared<[E4<E>]>,
    #[comptime] walked_at: usize,
    #[comptime] dim: usize,
    #[comptime] twice: bool,
    #[comptime] tile: CmmaTile,
) {
    let (from, to) = (own_scores(tile), own_weights(tile));
    #[unroll]
    for part in 0..comptime!(if twice { 2usize } else { 1 }) {
        #[unroll]
        for x in 0..comptime!(tile.row_vectors()) {
            let step = comptime!(x * tile.row_units());
            let exact = scores[from + step];
            let mut rounded = E4::<E>::cast_from(exact);
            if comptime!(part == 1) {
                rounded = E4::<E>::cast_from(exact - V4::cast_from(rounded));
            }
            weights[to + step] = rounded;
        }
        sync_plane();
        accumulate::<E>(sums, &*weights, walked, walked_at, dim, tile);
        sync_plane();
    }
}
