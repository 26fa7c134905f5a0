//! Which tiles a cube works on and which ones it walks: those that a block plan lists, or the reach of the window and the
//! visible sinks, in constant time.
//!
//! A plan's tiles are multiples of the kernel's, so a kernel tile lies in one tile of the plan. Position hides what it
//! hides under a plan too: such tiles are skipped.

use cubecl::prelude::*;

use super::element::{Head, Numbers, position};
use super::tile_shape::TileShape;
use crate::block_plan::flat::{block_count, block_word, header};
use crate::mask::{band_tile_empty, band_tile_full};

/// Which way a tile lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Side {
    /// Rows are queries, columns are keys.
    Queries,
    /// Rows are keys, columns are queries.
    Keys,
}

/// What a cube owns: a head, counted over the batch, and one of its tiles of rows.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Work {
    pub head: u32,
    pub tile: u32,
    /// Whether there is such a tile.
    pub exists: bool,
}

/// What a cube owns of `heads` heads a batch element and `seq` rows each. Without a plan the last query tiles, which are
/// the longest under causal order, go first; with one, the rows or columns for which it lists most
/// blocks, for one head after another where they share them.
#[cube]
pub(crate) fn work_of(
    cube: usize,
    heads: u32,
    seq: u32,
    scratch: &[u32],
    n: Numbers,
    #[comptime] side: Side,
    #[comptime] tile: TileShape,
) -> Work {
    let rows = comptime!(tile.rows as u32);
    let all_heads = n.batch * heads;
    let mut tiles = seq.div_ceil(rows);
    let mut row_of_plan = 0u32;
    if n.plan_at != 0 {
        // The last tile of the plan may have rows past the end.
        let (size, count) = comptime!(match side {
            Side::Queries => (header::BQ, header::QUERY_TILES),
            Side::Keys => (header::BK, header::KEY_TILES),
        });
        row_of_plan = scratch[n.plan_at + size] / rows;
        tiles = scratch[n.plan_at + count] * row_of_plan;
    }
    let mut work = Work { head: (cube / tiles as usize) as u32, tile: (cube % tiles as usize) as u32, exists: false };
    if comptime!(side == Side::Queries) {
        work.tile = tiles - 1 - work.tile;
    }
    work.exists = work.head < all_heads;
    if n.plan_at != 0 {
        let planes_heads = scratch[n.plan_at + header::HEADS];
        // Key heads that are shared by query heads with lists of their own have no order.
        if work.exists && (planes_heads == 1 || planes_heads == heads) {
            let order = comptime!(match side {
                Side::Queries => header::ROW_ORDER,
                Side::Keys => header::COLUMN_ORDER,
            });
            let units = (scratch[n.plan_at + header::BATCH] * planes_heads) as usize * tiles as usize;
            let (copy, unit) = ((cube / units) as u32, (cube % units) as u32);
            let first = n.plan_at + scratch[n.plan_at + order] as usize;
            let row = scratch[first + (unit / row_of_plan) as usize];
            let plan_tiles = tiles / row_of_plan;
            let (plane, heads_alike) = (row / plan_tiles, heads / planes_heads);
            let b = plane / planes_heads + copy / heads_alike;
            let h = plane % planes_heads + copy % heads_alike;
            work.head = b * heads + h;
            work.tile = row % plan_tiles * row_of_plan + unit % row_of_plan;
        }
        work.exists = work.exists && work.tile * rows < seq;
    }
    work
}

/// [`work_of`] for queries of `heads_q` heads a batch element, without a plan in sections of `section` heads: all last tiles of a
/// section, then all before them, so that those that run at one time are about as long, and their keys and values few
/// enough for a cache.
#[cube]
pub(crate) fn sectioned_work(
    cube: usize,
    heads_q: u32,
    section: u32,
    scratch: &[u32],
    n: Numbers,
    #[comptime] tile: TileShape,
) -> Work {
    let mut work = Work { head: 0u32, tile: 0u32, exists: false };
    if n.plan_at != 0 {
        let found = work_of(cube, heads_q, n.seq_q, scratch, n, Side::Queries, tile);
        work.head = found.head;
        work.tile = found.tile;
        work.exists = found.exists;
    } else {
        let (cube, heads) = (cube as u32, n.batch * heads_q);
        let tiles = n.seq_q.div_ceil(comptime!(tile.rows as u32));
        let first = cube / (section * tiles) * section;
        let (wide, rest) = (min(section, heads - first), cube % (section * tiles));
        work.head = first + rest % wide;
        work.tile = tiles - 1 - rest / wide;
        work.exists = first < heads;
    }
    work
}

/// The tiles that a cube walks.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Walk {
    pub steps: u32,
    /// Without a plan: tiles `0 .. sink_tiles`, then those from `first` on.
    pub sink_tiles: u32,
    pub first: u32,
    /// With a plan: where its Full and its Partial blocks are listed.
    pub(super) full: u32,
    pub(super) partial: u32,
    /// Tiles of the kernel in one of the plan.
    pub(super) per: u32,
    /// Where the cube's own rows start in a bitmap, in words or rows of words, and words of a row.
    pub(super) own: u32,
    pub(super) row_words: u32,
}

/// One tile of a walk: queries from `i0` on and keys from `j0` on.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Step {
    pub i0: u32,
    pub j0: u32,
    /// Every query sees every key, and all of them exist.
    pub full: bool,
    /// Position and key lengths hide all of it.
    pub empty: bool,
    /// The word of the scratch buffer that the plan's bits of the tile start in; 0 where it hides nothing.
    pub bits: usize,
    pub row_words: u32,
}

/// A walk of no steps.
#[cube]
pub(crate) fn no_walk() -> Walk {
    Walk {
        steps: 0u32,
        sink_tiles: 0u32,
        first: 0u32,
        full: 0u32,
        partial: 0u32,
        per: 1u32,
        own: 0u32,
        row_words: 0u32,
    }
}

/// A step that is nowhere, for a variable to start as.
#[cube]
pub(crate) fn no_step(i0: u32) -> Step {
    Step { i0, j0: 0u32, full: false, empty: true, bits: 0usize, row_words: 0u32 }
}

/// The key tiles that queries `i0 .. i0 + bq` can see. Every other tile is empty.
#[cube]
pub(crate) fn key_walk(i0: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) -> Walk {
    let mut walk = no_walk();
    if n.plan_at != 0 {
        list_keys(&mut walk, i0, at, scratch, n, tile);
    } else {
        reach_keys(&mut walk, i0, at, n, tile);
    }
    walk
}

/// The key tiles that the plan lists for queries from `i0` on.
#[cube]
pub(super) fn list_keys(walk: &mut Walk, i0: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) {
    let bq = scratch[n.plan_at + header::BQ];
    let row = plane_of(at, scratch, n) * scratch[n.plan_at + header::QUERY_TILES] + i0 / bq;
    walk.per = scratch[n.plan_at + header::BK] / comptime!(tile.cols as u32);
    walk.row_words = scratch[n.plan_at + header::ROW_WORDS];
    walk.own = i0 % bq * walk.row_words;
    read_starts(walk, header::ROW_STARTS, row, scratch, n);
}

/// The key tiles that position and key lengths let queries from `i0` on see.
#[cube]
pub(super) fn reach_keys(walk: &mut Walk, i0: u32, at: Head, n: Numbers, #[comptime] tile: TileShape) {
    let bk = comptime!(tile.cols as i32);
    let a0 = position(i0, n);
    let a1 = position(min(i0 + comptime!(tile.rows as u32), n.seq_q) - 1, n);
    let sink_keys = max(min(min(n.sinks, a1 + n.ahead + 1), at.keys), 0i32);
    let sink_tiles = (sink_keys + bk - 1) / bk;
    let first_key = max(a0 - n.left, 0i32);
    let last_key = min(a1 + min(n.right, n.ahead), at.keys - 1);
    let first = max(first_key / bk, sink_tiles);
    let mut tiles = 0i32;
    if first_key <= last_key {
        tiles = max(last_key / bk + 1 - first, 0i32);
    }
    walk.sink_tiles = sink_tiles as u32;
    walk.first = first as u32;
    walk.steps = (sink_tiles + tiles) as u32;
}

/// Tile `t` of [`key_walk`].
#[cube]
pub(crate) fn key_step(
    walk: Walk,
    t: u32,
    i0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] tile: TileShape,
) -> Step {
    let mut j = select(t < walk.sink_tiles, t, t - walk.sink_tiles + walk.first);
    let mut bits = 0usize;
    if n.plan_at != 0 {
        let block = block_word(t / walk.per, walk.full, walk.partial);
        let (word, part) = (n.plan_at + block as usize, t % walk.per);
        j = scratch[word] * walk.per + part;
        if block >= walk.partial {
            bits = n.plan_at + (scratch[word + 1] + walk.own + part * comptime!(tile.cols as u32) / 32u32) as usize;
        }
    }
    step(i0, tile.rows, j * comptime!(tile.cols as u32), tile.cols, bits, walk.row_words, at, n, with_bias)
}

/// Tile `t` of [`key_walk`] where there is no plan. With `past_end` it may be full though it has rows past the end, as in a plan.
#[cube]
pub(crate) fn band_step(
    walk: Walk,
    t: u32,
    i0: u32,
    at: Head,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] past_end: bool,
    #[comptime] tile: TileShape,
) -> Step {
    let j0 = select(t < walk.sink_tiles, t, t - walk.sink_tiles + walk.first) * comptime!(tile.cols as u32);
    let full = rows_are_full(i0, tile.rows, j0, tile.cols, at.keys, n, with_bias, past_end);
    Step { i0, j0, full, empty: false, bits: 0usize, row_words: 0u32 }
}

/// The query tiles that can see keys `j0 .. j0 + bk`.
#[cube]
pub(crate) fn query_walk(j0: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) -> Walk {
    let mut walk = no_walk();
    if n.plan_at != 0 {
        list_queries(&mut walk, j0, at, scratch, n, tile);
    } else {
        reach_queries(&mut walk, j0, at, n, tile);
    }
    walk
}

/// The query tiles that the plan lists for keys from `j0` on.
#[cube]
pub(super) fn list_queries(
    walk: &mut Walk,
    j0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] tile: TileShape,
) {
    let bk = scratch[n.plan_at + header::BK];
    let column = plane_of(at, scratch, n) * scratch[n.plan_at + header::KEY_TILES] + j0 / bk;
    walk.per = scratch[n.plan_at + header::BQ] / comptime!(tile.cols as u32);
    walk.row_words = scratch[n.plan_at + header::ROW_WORDS];
    walk.own = j0 % bk / 32u32;
    read_starts(walk, header::COLUMN_STARTS, column, scratch, n);
}

/// The query tiles that position and key lengths let see keys from `j0` on.
#[cube]
pub(crate) fn reach_queries(walk: &mut Walk, j0: u32, at: Head, n: Numbers, #[comptime] tile: TileShape) {
    let bq = comptime!(tile.cols as i32);
    let first_row = j0 as i32;
    let last_row = min(first_row + comptime!(tile.rows as i32), at.keys) - 1;
    let shift = position(0u32, n);
    // A sink is seen by everything behind it, whatever the window.
    let sink = first_row < n.sinks;
    let reach = select(sink, n.ahead, min(n.right, n.ahead));
    let first_query = max(first_row - reach - shift, 0i32);
    let all = n.seq_q as i32 - 1;
    let last_query = select(sink, all, min(last_row + n.left - shift, all));
    if first_row < at.keys && first_query <= last_query {
        walk.first = (first_query / bq) as u32;
        walk.steps = (last_query / bq + 1) as u32 - walk.first;
    }
}

/// Query tile `m` and keys from `j0` on where there is no plan.
#[cube]
pub(crate) fn query_band_step(
    m: u32,
    j0: u32,
    at: Head,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] tile: TileShape,
) -> Step {
    let i0 = m * comptime!(tile.cols as u32);
    let full = tile_is_full(i0, tile.cols, j0, tile.rows, at.keys, n, with_bias);
    Step { i0, j0, full, empty: false, bits: 0usize, row_words: 0u32 }
}

/// Tile `t` of [`query_walk`].
#[cube]
pub(crate) fn query_step(
    walk: Walk,
    t: u32,
    j0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] tile: TileShape,
) -> Step {
    let mut i = t + walk.first;
    let mut bits = 0usize;
    if n.plan_at != 0 {
        let block = block_word(t / walk.per, walk.full, walk.partial);
        let (word, part) = (n.plan_at + block as usize, t % walk.per);
        i = scratch[word] * walk.per + part;
        if block >= walk.partial {
            let rows = part * comptime!(tile.cols as u32);
            bits = n.plan_at + (scratch[word + 1] + walk.own + rows * walk.row_words) as usize;
        }
    }
    step(i * comptime!(tile.cols as u32), tile.cols, j0, tile.rows, bits, walk.row_words, at, n, with_bias)
}

/// The tile of queries from `i0` and keys from `j0` on by itself, looked up in the plan if there is one.
#[cube]
pub(crate) fn single_step(
    i0: u32,
    j0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] tile: TileShape,
) -> Step {
    let walk = key_walk(i0, at, scratch, n, tile);
    let mut bits = 0usize;
    let mut listed = true;
    if n.plan_at != 0 {
        let bk = walk.per * comptime!(tile.cols as u32);
        let (j, count) = (j0 / bk, walk.partial - walk.full);
        let full = place_of(j, walk.full, count, 1u32, scratch, n);
        listed = full < count && scratch[n.plan_at + (walk.full + full) as usize] == j;
        if !listed {
            let count = walk.steps / walk.per - count;
            let partial = place_of(j, walk.partial, count, 2u32, scratch, n);
            let word = n.plan_at + (walk.partial + 2u32 * partial) as usize;
            if partial < count {
                listed = scratch[word] == j;
                bits = n.plan_at + (scratch[word + 1] + walk.own + j0 % bk / 32u32) as usize;
            }
        }
    }
    let mut step = step(i0, tile.rows, j0, tile.cols, bits, walk.row_words, at, n, with_bias);
    step.empty = !listed || tile_is_empty(i0, tile.rows, j0, tile.cols, at.keys, n);
    step
}

/// Number of entries of an ascending list that are below `wanted`; its entries are `stride` words apart.
#[cube]
pub(super) fn place_of(wanted: u32, list: u32, count: u32, stride: u32, scratch: &[u32], n: Numbers) -> u32 {
    let (mut low, mut high) = (0u32.runtime(), count);
    while low < high {
        let mid = (low + high) / 2u32;
        if scratch[n.plan_at + (list + mid * stride) as usize] < wanted {
            low = mid + 1;
        } else {
            high = mid;
        }
    }
    low
}

/// The lists of the plan that serve a head.
#[cube]
pub(super) fn plane_of(at: Head, scratch: &[u32], n: Numbers) -> u32 {
    let heads = scratch[n.plan_at + header::HEADS];
    let b = select(scratch[n.plan_at + header::BATCH] == 1, 0u32, at.batch);
    b * heads + select(heads == 1, 0u32, at.head)
}

/// Where the blocks of a row or column of the plan are listed.
#[cube]
fn read_starts(walk: &mut Walk, #[comptime] starts: usize, row: u32, scratch: &[u32], n: Numbers) {
    let first = n.plan_at + (scratch[n.plan_at + starts] + 2u32 * row) as usize;
    walk.full = scratch[first];
    walk.partial = scratch[first + 1];
    walk.steps = block_count(walk.full, walk.partial, scratch[first + 2]) * walk.per;
}

/// A tile with the plan's bits of it. Without a plan a walk meets no tile that is empty.
#[cube]
fn step(
    i0: u32,
    #[comptime] bq: usize,
    j0: u32,
    #[comptime] bk: usize,
    bits: usize,
    row_words: u32,
    at: Head,
    n: Numbers,
    #[comptime] with_bias: bool,
) -> Step {
    let full = bits == 0 && tile_is_full(i0, bq, j0, bk, at.keys, n, with_bias);
    let empty = n.plan_at != 0 && tile_is_empty(i0, bq, j0, bk, at.keys, n);
    Step { i0, j0, full, empty, bits, row_words }
}

/// Whether each of `bq` queries from `i0` on sees each of `bk` keys from `j0` on, so that no element need be tested.
#[cube]
pub(super) fn tile_is_full(
    i0: u32,
    #[comptime] bq: usize,
    j0: u32,
    #[comptime] bk: usize,
    keys: i32,
    n: Numbers,
    #[comptime] with_bias: bool,
) -> bool {
    rows_are_full(i0, bq, j0, bk, keys, n, with_bias, false)
}

/// [`tile_is_full`], or, with `past_end`, whether each of the queries that exist sees each key.
#[cube]
fn rows_are_full(
    i0: u32,
    #[comptime] bq: usize,
    j0: u32,
    #[comptime] bk: usize,
    keys: i32,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] past_end: bool,
) -> bool {
    let j1 = j0 as i32 + comptime!(bk as i32 - 1);
    let last = i0 + comptime!(bq as u32 - 1);
    let i1 = if comptime!(past_end) { min(last, n.seq_q - 1) } else { last };
    let mut full = i1 < n.seq_q && j1 < keys && n.mask_at == 0;
    // A bias may hide by −∞.
    if with_bias {
        full = false;
    }
    full && band_tile_full(position(i0, n), position(i1, n), j0 as i32, j1, n.ahead, n.left, n.right, n.sinks)
}

/// Whether no query of the tile sees any key of it, as far as position and key lengths tell.
#[cube]
fn tile_is_empty(i0: u32, #[comptime] bq: usize, j0: u32, #[comptime] bk: usize, keys: i32, n: Numbers) -> bool {
    let j1 = min(j0 as i32 + comptime!(bk as i32), keys) - 1;
    let i1 = min(i0 + comptime!(bq as u32), n.seq_q) - 1;
    j0 as i32 >= keys
        || i0 >= n.seq_q
        || band_tile_empty(position(i0, n), position(i1, n), j0 as i32, j1, n.ahead, n.left, n.right, n.sinks)
}
