//! Which key tile a cube of a backward in one pass owns, and when it is its turn to add to the dq of a query tile.

use cubecl::prelude::*;

use super::element::{Head, Numbers, head_of};
use super::listed::{Column, column, column_steps, keys_after, next_step, no_column};
use super::tile_shape::TileShape;
use super::walk::{Step, Walk, key_walk, no_walk, query_band_step, query_walk, reach_queries};

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
    /// The query tiles that see it, in each of the heads; under a plan those that position and key lengths leave.
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
    let walk = seen_from(j0, at, scratch, n, shape, listed);
    KeyTile { batch, key_head, first_head, group, tile, j0, at, walk, exists }
}

#[cube]
fn seen_from(
    j0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
) -> Walk {
    if comptime!(listed) {
        let mut reach = no_walk();
        reach_queries(&mut reach, j0, at, n, shape);
        reach
    } else {
        query_walk(j0, at, scratch, n, shape)
    }
}

/// How many steps a key tile takes under a plan, in all heads of the group.
#[cube]
pub(crate) fn listed_steps<E: Float>(owned: KeyTile, scratch: &[u32], n: Numbers, #[comptime] shape: TileShape) -> u32 {
    let mut steps = 0u32;
    if owned.walk.steps > 0 {
        for g in 0..owned.group {
            let at = listed_head::<E>(owned, owned.first_head + g, scratch, n);
            steps += column_steps(owned.j0, owned.walk, at, scratch, n, shape);
        }
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
    column: Column,
    /// How many came before, without one.
    t: u32,
}

#[cube]
pub(crate) fn query_tiles(
    owned: KeyTile,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
) -> QueryTiles {
    if comptime!(listed) {
        QueryTiles { column: column(owned.j0, owned.walk, at, scratch, n, shape), t: 0u32.runtime() }
    } else {
        QueryTiles { column: no_column(), t: 0u32.runtime() }
    }
}

/// The next of them, or one that is `empty`.
#[cube]
pub(crate) fn next_query_tile(
    tiles: &mut QueryTiles,
    owned: KeyTile,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
) -> Step {
    if comptime!(listed) {
        next_step(&mut tiles.column, owned.j0, owned.at.keys, scratch, n, with_bias, shape)
    } else {
        let mut step = query_band_step(owned.walk, tiles.t, owned.j0, owned.at, n, with_bias, shape);
        step.empty = tiles.t >= owned.walk.steps;
        tiles.t += 1;
        step
    }
}

/// How many cubes add to the query tile from `i0` on before this one.
#[cube]
pub(crate) fn turn_at(
    owned: KeyTile,
    i0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
) -> u32 {
    if comptime!(listed) {
        keys_after(owned.tile, i0, at, scratch, n, comptime!(shape.turned()))
    } else {
        turn_of(owned, i0 / comptime!(shape.cols as u32), scratch, n, shape)
    }
}
