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

/// A walk of nothing.
#[cube]
pub(crate) fn no_column() -> Column {
    Column { lists: no_walk(), place: Place { full: 0u32, partial: 0u32, part: 0u32 }, end: 0u32 }
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
    let exists = block != comptime!(NOTHING);
    let i = select(exists, block, 0u32) * per + column.place.part;
    let mut step = no_step(i * comptime!(tile.cols as u32));
    if exists && i < column.end {
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

#[cfg(test)]
mod tests {
    use super::super::walk::reach_queries;
    use super::*;
    use crate::block_plan::{BlockPlan, TileSize};
    use crate::mask::{Band, Extent, Mask, UNBOUNDED};

    const BQ: usize = 4;
    const BK: usize = 8;
    const OF_KEYS: TileShape = TileShape { rows: BK, cols: BQ };
    const OF_QUERIES: TileShape = TileShape { rows: BQ, cols: BK };

    fn numbers(extent: Extent, band: Band) -> Numbers {
        let (ahead, left, right, sinks) = band.scalars();
        Numbers {
            batch: extent.batch,
            heads_q: extent.heads,
            heads_kv: extent.heads,
            seq_q: extent.seq_q,
            seq_kv: extent.seq_kv,
            head_dim: 8,
            value_dim: 8,
            scale: 1.0,
            softcap: 0.0,
            ahead,
            left,
            right,
            sinks,
            seed_low: 0,
            seed_high: 0,
            threshold: 0,
            factor: 1.0,
            minus_infinity: f32::NEG_INFINITY,
            lse_at: 0,
            delta_at: 0,
            norm_at: 0,
            slopes_at: 0,
            sinks_at: 0,
            lengths_at: 0,
            slope_partials_at: 0,
            bias_partials_at: 0,
            parameters_at: 0,
            parameters: 0,
            parameter_partials_at: 0,
            plan_at: 1,
            mask_at: 0,
            mask_batch: 0,
            mask_head: 0,
            mask_query: 0,
            mask_key: 1,
        }
    }

    /// The query tiles of a column, as a cube walks them; asserts what else a step says.
    fn walked(plan: &BlockPlan, tile: TileSize, j: u32, at: Head, scratch: &[u32], n: Numbers) -> Vec<u32> {
        let (j0, full) = (j * BK as u32, plan.column(at.batch, at.head, j * BK as u32 / tile.bk).full);
        let mut reach = no_walk();
        reach_queries(&mut reach, j0, at, n, OF_KEYS);
        let steps = if reach.steps == 0 { 0 } else { column_steps(j0, reach, at, scratch, n, OF_KEYS) };
        let mut walk = column(j0, reach, at, scratch, n, OF_KEYS);
        let mut tiles = Vec::new();
        loop {
            let step = next_step(&mut walk, j0, at.keys, scratch, n, false, OF_KEYS);
            if step.empty {
                break;
            }
            assert_eq!(step.bits == 0, full.contains(&(step.i0 / tile.bq)), "column {j}, queries from {}", step.i0);
            tiles.push(step.i0 / BQ as u32);
        }
        assert_eq!(tiles.len(), steps as usize, "column {j}");
        tiles
    }

    /// Every tile that is listed and in reach is visited, in ascending order, and a cube's turn at a query tile is the
    /// number of visitors whose keys come later.
    #[test]
    fn turns_count_the_visitors_after_a_key_tile() {
        let scattered = |b: u32, h: u32, i: u32, j: u32| !(i / 9 + j / 7 + b + 2 * h).is_multiple_of(3) && i % 11 != 4;
        let scattered = Mask::function("listed_scattered", scattered).unwrap();
        let blocks = |_: u32, h: u32, i: u32, j: u32| (i / 12 * 5 + j / 16 * 3 + h) % 4 < 2;
        let blocks = Mask::function("listed_blocks", blocks).unwrap();
        let mut visits = 0;
        for mask in [Mask::Everything, Mask::Nothing, Mask::causal(), Mask::window(9, 20), scattered, blocks] {
            for (bq, bk) in [(4, 8), (8, 8), (12, 16), (4, 24)] {
                for (seq_q, seq_kv) in [(41, 83), (83, 41), (48, 48), (1, 90)] {
                    let (extent, tile) = (Extent { batch: 2, heads: 2, seq_q, seq_kv }, TileSize { bq, bk });
                    let plan = BlockPlan::new(&mask, extent, tile).unwrap().refine();
                    let scratch: Vec<u32> = core::iter::once(0).chain(plan.to_words()).collect();
                    for (causal, left, right, sinks) in [
                        (false, UNBOUNDED, UNBOUNDED, 0),
                        (true, UNBOUNDED, UNBOUNDED, 0),
                        (true, 10, UNBOUNDED, 11),
                        (false, 3, 5, 30),
                    ] {
                        let n = numbers(extent, Band { causal, left, right, sinks });
                        for keys in [seq_kv as i32, 30, 1, 0] {
                            for head in 0..2 {
                                let at = Head { batch: 1, head, keys, slope: 0.0, mask_at: 0, bias_at: 0 };
                                visits += check_head(&plan, tile, at, &scratch, n);
                            }
                        }
                    }
                }
            }
        }
        assert!(visits > 10_000, "{visits}");
    }

    fn check_head(plan: &BlockPlan, tile: TileSize, at: Head, scratch: &[u32], n: Numbers) -> usize {
        let key_tiles = n.seq_kv.div_ceil(BK as u32);
        let columns: Vec<Vec<u32>> = (0..key_tiles).map(|j| walked(plan, tile, j, at, scratch, n)).collect();
        let mut visits = 0;
        for i in 0..n.seq_q.div_ceil(BQ as u32) {
            let i0 = i * BQ as u32;
            let row = plan.row(at.batch, at.head, i0 / tile.bq);
            let mut reach = no_walk();
            reach_keys(&mut reach, i0, at, n, OF_QUERIES);
            let expected = |j: &u32| {
                let block = j * BK as u32 / tile.bk;
                let listed = row.full.contains(&block) || row.partial.contains(&block);
                let band = *j >= reach.first && *j < reach.first + reach.steps - reach.sink_tiles;
                listed && (*j < reach.sink_tiles || band)
            };
            let expected: Vec<u32> = (0..key_tiles).filter(expected).collect();
            let visitors: Vec<u32> = (0..key_tiles).filter(|&j| columns[j as usize].contains(&i)).collect();
            assert_eq!(visitors, expected, "queries from {i0} of {at:?}", at = (at.batch, at.head, at.keys));
            for (x, &j) in visitors.iter().enumerate() {
                let after = (visitors.len() - 1 - x) as u32;
                assert_eq!(keys_after(j, i0, at, scratch, n, OF_QUERIES), after, "key tile {j}, queries from {i0}");
            }
            visits += visitors.len();
        }
        for column in &columns {
            assert!(column.is_sorted_by(|a, b| a < b), "{column:?}");
        }
        visits
    }
}
