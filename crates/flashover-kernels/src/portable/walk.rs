//! Which tiles a cube walks: the reach of the window and the visible sinks, in constant time.

use cubecl::prelude::*;

use super::element::{Numbers, position};
use super::tile::TileConfig;
use crate::mask::{band_tile_empty, band_tile_full};

/// The key tiles of a query tile: `0 .. sink_tiles`, then `window_tiles` from `window_first` on.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct KeyTiles {
    pub sink_tiles: u32,
    pub window_first: u32,
    pub window_tiles: u32,
}

/// The key tiles that queries `i0 .. i0 + bq` can see, of the first `keys` keys. Every other tile is empty.
#[cube]
pub(crate) fn key_tiles(i0: u32, keys: i32, n: Numbers, #[comptime] tile: TileConfig) -> KeyTiles {
    let bk = comptime!(tile.cols() as i32);
    let a0 = position(i0, n);
    let a1 = position(min(i0 + comptime!(tile.rows() as u32), n.seq_q) - 1, n);
    let sink_keys = max(min(min(n.sinks, a1 + n.ahead + 1), keys), 0i32);
    let sink_tiles = (sink_keys + bk - 1) / bk;
    let first_key = max(a0 - n.left, 0i32);
    let last_key = min(a1 + min(n.right, n.ahead), keys - 1);
    let first = max(first_key / bk, sink_tiles);
    let mut tiles = 0i32;
    if first_key <= last_key {
        tiles = max(last_key / bk + 1 - first, 0i32);
    }
    KeyTiles { sink_tiles: sink_tiles as u32, window_first: first as u32, window_tiles: tiles as u32 }
}

/// The query tiles that can see keys `j0 .. j0 + bk`: `first .. end`, empty if none.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct QueryTiles {
    pub first: u32,
    pub end: u32,
}

/// The tiles of `tile.cols()` queries that can see `tile.rows()` keys from `j0` on, of the first `keys` keys.
#[cube]
pub(crate) fn query_tiles(j0: u32, keys: i32, n: Numbers, #[comptime] tile: TileConfig) -> QueryTiles {
    let bq = comptime!(tile.cols() as i32);
    let j0 = j0 as i32;
    let j1 = min(j0 + comptime!(tile.rows() as i32), keys) - 1;
    let shift = position(0u32, n);
    // A sink is seen by everything behind it, whatever the window.
    let sink = j0 < n.sinks;
    let reach = select(sink, n.ahead, min(n.right, n.ahead));
    let first_query = max(j0 - reach - shift, 0i32);
    let all = n.seq_q as i32 - 1;
    let last_query = select(sink, all, min(j1 + n.left - shift, all));
    let mut tiles = QueryTiles { first: 0u32, end: 0u32 };
    if j0 < keys && first_query <= last_query {
        tiles.first = (first_query / bq) as u32;
        tiles.end = (last_query / bq + 1) as u32;
    }
    tiles
}

/// Whether each of `bq` queries from `i0` on sees each of `bk` keys from `j0` on, so that no element need be tested.
#[cube]
pub(crate) fn tile_is_full(
    i0: u32,
    #[comptime] bq: usize,
    j0: u32,
    #[comptime] bk: usize,
    keys: i32,
    n: Numbers,
    #[comptime] with_bias: bool,
) -> bool {
    let j1 = j0 as i32 + comptime!(bk as i32 - 1);
    let i1 = i0 + comptime!(bq as u32 - 1);
    let mut full = i1 < n.seq_q && j1 < keys && n.mask_at == 0;
    // A bias may hide by −∞.
    if with_bias {
        full = false;
    }
    full && band_tile_full(position(i0, n), position(i1, n), j0 as i32, j1, n.ahead, n.left, n.right, n.sinks)
}

/// Whether no query of the tile sees any key of it, as far as position and key lengths tell.
#[cube]
pub(crate) fn tile_is_empty(
    i0: u32,
    #[comptime] bq: usize,
    j0: u32,
    #[comptime] bk: usize,
    keys: i32,
    n: Numbers,
) -> bool {
    let j1 = min(j0 as i32 + comptime!(bk as i32), keys) - 1;
    let i1 = min(i0 + comptime!(bq as u32), n.seq_q) - 1;
    j0 as i32 >= keys
        || band_tile_empty(position(i0, n), position(i1, n), j0 as i32, j1, n.ahead, n.left, n.right, n.sinks)
}
