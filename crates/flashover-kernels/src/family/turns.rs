//! Which key tile a cube of a backward in one pass owns, and when it is its turn to add to the dq of a query tile.

use cubecl::prelude::*;

use super::element::{Head, Numbers, head_of};
use super::listed::{Listing, Lists, listing, next_listed, no_listing, steps_listed};
use super::tile_shape::TileShape;
use super::walk::{Step, Walk, key_walk, no_walk, query_band_step, query_walk};

/// What a cube owns: a tile of keys, and the query heads that share them.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct KeyTile {
    pub batch: u32,
    pub key_head: u32,
    /// The first query head of the group, and how many there are.
    pub first_head: u32,
    pub group: u32,
    pub tile: u32,
    pub j0: u32,
    /// Of the first head: position and key lengths are the same for all.
    pub at: Head,
    /// The query tiles that see it, in each of the heads; not under a plan.
    pub walk: Walk,
    pub exists: bool,
}

/// The key tile of a ticket: in sections of `section` heads, which are worked on side by side, the last tiles of all of them
/// first. Cubes of a head then start as far apart as they must follow each other.
#[cube]
pub(crate) fn key_tile<E: Float>(
    ticket: u32,
    section: u32,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
) -> KeyTile {
    let heads = n.batch * n.heads_kv;
    let tiles = n.seq_kv.div_ceil(comptime!(shape.rows as u32));
    let (first, rest) = (ticket / (section * tiles) * section, ticket % (section * tiles));
    // The grid may have more cubes than there are tiles.
    let exists = first < heads;
    let wide = select(exists, min(section, heads - first), 1u32);
    let head = select(exists, first + rest % wide, 0u32);
    let tile = select(exists, tiles - 1 - rest / wide, 0u32);
    let (batch, key_head) = (head / n.heads_kv, head % n.heads_kv);
    let group = n.heads_q / n.heads_kv;
    let first_head = key_head * group;
    let j0 = tile * comptime!(shape.rows as u32);
    let at = head_of::<E>(batch, first_head, scratch, bias, n, with_bias);
    let walk = if comptime!(listed) { no_walk() } else { query_walk(j0, at, scratch, n, shape) };
    KeyTile { batch, key_head, first_head, group, tile, j0, at, walk, exists }
}

/// How many steps a key tile takes under a plan, in all heads of the group. `lines` is where the buffer of the lists starts.
#[cube]
pub(crate) fn all_steps_listed<E: Float>(
    owned: KeyTile,
    lines: u64,
    lists: Lists,
    scratch: &[u32],
    n: Numbers,
    #[comptime] shape: TileShape,
) -> u32 {
    let mut steps = 0u32;
    for g in 0..owned.group {
        let at = listed_head::<E>(owned, owned.first_head + g, scratch, n);
        steps += steps_listed(lines, owned.j0, at, lists, scratch, n, shape);
    }
    steps
}

/// A head of the group as a plan asks for it.
#[cube]
pub(crate) fn listed_head<E: Float>(owned: KeyTile, head: u32, scratch: &[u32], n: Numbers) -> Head {
    head_of::<E>(owned.batch, head, scratch, ComptimeOption::new_None(), n, false)
}

/// Where query tile `m`, of `bq` queries, of a head stands among all query tiles.
#[cube]
pub(crate) fn place_of(owned: KeyTile, head: u32, m: u32, n: Numbers, #[comptime] bq: usize) -> u32 {
    (owned.batch * n.heads_q + head) * n.seq_q.div_ceil(comptime!(bq as u32)) + m
}

/// Without a plan, how many cubes add to query tile `m` before this one: those whose keys come later, and the visible sinks last.
#[cube]
pub(crate) fn turn_of(owned: KeyTile, m: u32, scratch: &[u32], n: Numbers, #[comptime] shape: TileShape) -> u32 {
    let walk: Walk = key_walk(m * comptime!(shape.cols as u32), owned.at, scratch, n, comptime!(shape.turned()));
    let band_end = walk.first + walk.steps - walk.sink_tiles;
    select(owned.tile < walk.sink_tiles, walk.steps, band_end) - 1 - owned.tile
}

/// The query tiles of a head that a cube works on, in ascending order.
#[derive(CubeType)]
pub(crate) struct QueryTiles {
    /// Under a plan.
    listing: Listing,
    /// How many came before, without one.
    t: u32,
    /// How many cubes add to the one that was taken last before this one.
    pub turn: u32,
}

/// `lines` is where the buffer of the lists starts.
#[cube]
pub(crate) fn query_tiles(
    owned: KeyTile,
    at: Head,
    lines: u64,
    lists: Lists,
    scratch: &[u32],
    n: Numbers,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
) -> QueryTiles {
    if comptime!(listed) {
        let listing = listing(lines, owned.j0, at, lists, scratch, n, shape);
        QueryTiles { listing, t: 0u32.runtime(), turn: 0u32.runtime() }
    } else {
        QueryTiles { listing: no_listing(), t: 0u32.runtime(), turn: 0u32.runtime() }
    }
}

/// The next of them, or one that is `empty`.
#[cube]
pub(crate) fn next_query_tile(
    tiles: &mut QueryTiles,
    owned: KeyTile,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
) -> Step {
    if comptime!(listed) {
        let next = next_listed(&mut tiles.listing, owned.j0, n);
        tiles.turn = next.turn;
        next.step
    } else {
        let mut step = query_band_step(owned.walk, tiles.t, owned.j0, owned.at, n, with_bias, shape);
        step.empty = tiles.t >= owned.walk.steps;
        tiles.t += 1;
        step
    }
}
