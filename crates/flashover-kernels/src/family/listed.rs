//! A plan's lists in one ascending order, Full and Partial tiles together, and how many tiles come after one: for cubes
//! that take turns at a tile.
//!
//! Who takes part must be known to all alike: a tile is visited where the plan lists it and position and key lengths reach
//! it. Both sides ask the closed forms of a walk without a plan, [`reach_keys`] and [`reach_queries`], which agree on
//! every tile.

use cubecl::prelude::*;

use super::element::{Head, Numbers};
use super::tile_shape::TileShape;
use super::walk::{Step, Walk, list_keys, list_queries, no_step, no_walk, place_of, reach_keys, tile_is_full};

/// What stands behind the last entry of a list.
const NOTHING: u32 = u32::MAX;

/// Where a walk along lists stands.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Place {
    /// The next Full and the next Partial block, as offsets into the plan.
    full: u32,
    partial: u32,
    /// The next tile of the kernel in the first of the two.
    part: u32,
}

/// A walk down the query tiles that see a key tile.
#[derive(CubeType)]
pub(crate) struct Column {
    lists: Walk,
    place: Place,
    /// The query tile where position ends it.
    end: u32,
}

/// The start of a walk down the query tiles of a head for keys from `j0` on, of which position and key lengths leave those of
/// `reach`.
#[cube]
pub(crate) fn column(
    j0: u32,
    reach: Walk,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] tile: TileShape,
) -> Column {
    let mut lists = no_walk();
    list_queries(&mut lists, j0, at, scratch, n, tile);
    let place = first_from(reach.first, lists, scratch, n);
    Column { lists, place, end: reach.first + reach.steps }
}

/// The next step of a walk, or one that is `empty` where it has ended.
#[cube]
pub(crate) fn next_step(
    column: &mut Column,
    j0: u32,
    keys: i32,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] tile: TileShape,
) -> Step {
    let per = column.lists.per;
    let full = entry(column.place.full, column.lists.partial, scratch, n);
    let partial = entry(column.place.partial, lists_end(column.lists), scratch, n);
    let block = min(full, partial);
    let i = block * per + column.place.part;
    let mut step = no_step(i * comptime!(tile.cols as u32));
    if block != comptime!(NOTHING) && i < column.end {
        let mut bits = 0usize;
        if partial < full {
            let rows = column.place.part * comptime!(tile.cols as u32);
            let bitmap = scratch[n.plan_at + column.place.partial as usize + 1];
            bits = n.plan_at + (bitmap + column.lists.own + rows * column.lists.row_words) as usize;
        }
        step.j0 = j0;
        step.full = bits == 0 && tile_is_full(step.i0, tile.cols, j0, tile.rows, keys, n, with_bias);
        step.empty = false;
        step.bits = bits;
        step.row_words = column.lists.row_words;
        column.place.part += 1;
        if column.place.part == per {
            column.place.part = 0u32;
            if partial < full {
                column.place.partial += 2;
            } else {
                column.place.full += 1;
            }
        }
    }
    step
}

/// How many query tiles of a head such a walk has.
#[cube]
pub(crate) fn column_steps(
    j0: u32,
    reach: Walk,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] tile: TileShape,
) -> u32 {
    let mut lists = no_walk();
    list_queries(&mut lists, j0, at, scratch, n, tile);
    listed_before(reach.first + reach.steps, lists, scratch, n) - listed_before(reach.first, lists, scratch, n)
}

/// How many key tiles after key tile `j` queries from `i0` on see: of the visible sinks, and of the window behind them.
#[cube]
pub(crate) fn keys_after(j: u32, i0: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) -> u32 {
    let mut lists = no_walk();
    list_keys(&mut lists, i0, at, scratch, n, tile);
    let mut reach = no_walk();
    reach_keys(&mut reach, i0, at, n, tile);
    let end = reach.first + reach.steps - reach.sink_tiles;
    let sink = j < reach.sink_tiles;
    let stretch = select(sink, reach.sink_tiles, end);
    let mut after = listed_before(stretch, lists, scratch, n) - listed_before(j + 1, lists, scratch, n);
    if sink {
        after += listed_before(end, lists, scratch, n) - listed_before(reach.first, lists, scratch, n);
    }
    after
}

/// How many tiles before tile `x` are listed.
#[cube]
fn listed_before(x: u32, lists: Walk, scratch: &[u32], n: Numbers) -> u32 {
    let place = first_from(x, lists, scratch, n);
    (place.full - lists.full + (place.partial - lists.partial) / 2u32) * lists.per + place.part
}

/// The first listed tile from `x` on.
#[cube]
fn first_from(x: u32, lists: Walk, scratch: &[u32], n: Numbers) -> Place {
    let (block, part) = (x / lists.per, x % lists.per);
    let end = lists_end(lists);
    let full = lists.full + entries_below(block, lists.full, lists.partial - lists.full, 1u32, scratch, n);
    let partial =
        lists.partial + 2u32 * entries_below(block, lists.partial, (end - lists.partial) / 2u32, 2u32, scratch, n);
    let mut place = Place { full, partial, part: 0u32 };
    if part > 0 {
        let next = min(entry(full, lists.partial, scratch, n), entry(partial, end, scratch, n));
        place.part = select(next == block, part, 0u32);
    }
    place
}

/// Number of entries of an ascending list that are below `wanted`: often none or all.
#[cube]
fn entries_below(wanted: u32, list: u32, count: u32, stride: u32, scratch: &[u32], n: Numbers) -> u32 {
    let mut below = 0u32;
    if wanted > 0 && count > 0 {
        let last = count - 1;
        below = count;
        if scratch[n.plan_at + (list + last * stride) as usize] >= wanted {
            below = place_of(wanted, list, last, stride, scratch, n);
        }
    }
    below
}

/// A list's entry, or [`NOTHING`] behind its end.
#[cube]
fn entry(at: u32, end: u32, scratch: &[u32], n: Numbers) -> u32 {
    let mut tile = comptime!(NOTHING).runtime();
    if at < end {
        tile = scratch[n.plan_at + at as usize];
    }
    tile
}

/// Where the Partial blocks of lists end.
#[cube]
fn lists_end(lists: Walk) -> u32 {
    lists.partial + 2u32 * (lists.steps / lists.per - (lists.partial - lists.full))
}
