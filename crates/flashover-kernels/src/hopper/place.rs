//! Which queries of which heads the two rows of a thread are. Where heads are packed, a query tile holds the same few queries
//! of each of them, one head after the other, as the copy engine brings them in one box.

use cubecl::prelude::*;

use super::bulk::fence_shared;
use super::config::{HopperConfig, PIECE, ROWS};
use super::messages::QueryTile;
use crate::family::element::{Head, Numbers, head_of};
use crate::family::ptx::store_shared_16;

/// Where a thread stands in a query tile.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Place {
    /// Its first row as a query; the other is 8 further.
    pub i: u32,
    /// The other row as a query where heads are packed: it may be of another head.
    pub other: u32,
    /// Its first column in each group of 8; the other is the next.
    pub column: u32,
    /// Whether heads are packed.
    #[cube(comptime)]
    pub packed: bool,
}

/// Row `r` of a thread as a query.
#[cube]
pub(crate) fn query_at(place: Place, #[comptime] r: usize) -> u32 {
    if comptime!(place.packed && r == 1) { place.other } else { place.i + comptime!(8 * r as u32) }
}

/// Where a thread stands in a query tile. A row of no query is one past the end.
#[cube]
pub(crate) fn place_in(tile: QueryTile, n: Numbers, #[comptime] cfg: HopperConfig) -> Place {
    if comptime!(cfg.packed == 1) {
        let i = tile.i0 + UNIT_POS / 32 * 16 - comptime!(ROWS as u32) + UNIT_POS % 32 / 4;
        Place { i, other: 0u32, column: UNIT_POS % 4 * 2, packed: false }
    } else {
        let (i, other) = (packed_query(tile, 0u32, n, cfg), packed_query(tile, 8u32, n, cfg));
        Place { i, other, column: UNIT_POS % 4 * 2, packed: true }
    }
}

/// The row `further` rows behind a thread's first, counted from the tile's first.
#[cube]
fn tile_row(further: u32) -> u32 {
    further + UNIT_POS / 32 * 16 + UNIT_POS % 32 / 4 - comptime!(ROWS as u32)
}

#[cube]
fn packed_query(tile: QueryTile, further: u32, n: Numbers, #[comptime] cfg: HopperConfig) -> u32 {
    let row = tile_row(further);
    let i = tile.i0 + row % comptime!(cfg.bq() as u32);
    // The last rows are of no head where the heads do not divide the rows.
    if comptime!(cfg.boxed_rows() < cfg.rows()) {
        select(row < comptime!(cfg.boxed_rows() as u32), i, n.seq_q)
    } else {
        i
    }
}

/// The head of the row `further` rows behind a thread's first; some head of the tile for a row of none.
#[cube]
pub(crate) fn head_in(tile: QueryTile, further: u32, #[comptime] cfg: HopperConfig) -> u32 {
    if comptime!(cfg.packed == 1) {
        tile.head
    } else {
        tile.head + min(tile_row(further) / comptime!(cfg.bq() as u32), comptime!(cfg.packed as u32 - 1))
    }
}

/// The heads of a thread's two rows, of one batch element.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Heads {
    pub first: Head,
    pub other: Head,
}

/// The head of row `r`.
#[cube]
pub(crate) fn head_at(heads: Heads, #[comptime] r: usize) -> Head {
    if comptime!(r == 0) { heads.first } else { heads.other }
}

/// Looks up what the heads of a thread's two rows need. Only where options are told apart by head (`plain` kernels do not)
/// are they more than one.
#[cube]
pub(crate) fn heads_in<E: Float>(
    tile: QueryTile,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperConfig,
) -> Heads {
    if comptime!(cfg.packed == 1 || cfg.plain) {
        let at = head_of::<E>(tile.batch, tile.head, scratch, bias, n, with_bias);
        Heads { first: at, other: at }
    } else {
        let first = head_of::<E>(tile.batch, head_in(tile, 0u32, cfg), scratch, bias, n, with_bias);
        let other = head_of::<E>(tile.batch, head_in(tile, 8u32, cfg), scratch, bias, n, with_bias);
        Heads { first, other }
    }
}

/// Zeroes the rows of the query buffers, which start at `queries`, that are of no head and that no copy fills: the scores of what
/// shared memory held before might be NaN, and with them rows of the same warp would be rescaled in every step.
#[cube]
pub(crate) fn clear_rows(queries: u32, #[comptime] cfg: HopperConfig) {
    let [q_len, _, _] = comptime!(cfg.elements());
    let (filled, piece) = comptime!((cfg.boxed_rows() * 2 * PIECE, cfg.rows() * 2 * PIECE));
    #[unroll]
    for x in 0..comptime!(2 * q_len * cfg.query_buffers() / piece) {
        let mut at = comptime!((x * piece + filled) as u32) + UNIT_POS * 16;
        while at < comptime!(((x + 1) * piece) as u32) {
            store_shared_16(queries + at, 0usize, Vector::<u32, Const<4>>::new(0u32));
            at += comptime!(16 * cfg.units() as u32);
        }
    }
    fence_shared();
}
