//! Which key tile a cube of the one-pass backward owns, and when it is its turn to add to a query tile.

use cubecl::prelude::*;

use crate::family::element::{Head, Numbers, head_of};
use crate::family::tile_shape::TileShape;
use crate::family::walk::{Walk, key_walk, query_walk};

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
    /// The query tiles that see it, in each of the heads.
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
    let walk = query_walk(j0, at, scratch, n, shape);
    KeyTile { batch, key_head, first_head, group, tile, j0, at, walk, exists }
}

/// Where query tile `m`, of `bq` queries, of a head stands among all query tiles.
#[cube]
pub(crate) fn place_of(owned: KeyTile, head: u32, m: u32, n: Numbers, #[comptime] bq: usize) -> u32 {
    (owned.batch * n.heads_q + head) * n.seq_q.div_ceil(comptime!(bq as u32)) + m
}

/// How many cubes add to query tile `m` before this one: those whose keys come later, and the visible sinks last.
#[cube]
pub(crate) fn turn_of(owned: KeyTile, m: u32, scratch: &[u32], n: Numbers, #[comptime] shape: TileShape) -> u32 {
    let turned = comptime!(TileShape { rows: shape.cols, cols: shape.rows });
    let walk: Walk = key_walk(m * comptime!(shape.cols as u32), owned.at, scratch, n, turned);
    let band_end = walk.first + walk.steps - walk.sink_tiles;
    select(owned.tile < walk.sink_tiles, walk.steps, band_end) - 1 - owned.tile
}
