//! The steps of a backward in one pass under a plan, listed before it: for every key tile the query tiles that it visits, Full
//! and Partial together in ascending order, and when it is the key tile's turn at each.
//!
//! Who takes part must be known to all alike: a tile is visited where the plan lists it and position and key lengths reach
//! it. Both sides ask the closed forms of a walk without a plan, [`reach_keys`] and [`reach_queries`], which agree on
//! every tile. That takes searches in the plan's lists, for all steps at once in a launch of its own: in the cube that
//! waits for a step they would cost more than the step.
//!
//! A list is lines of four words: one with the number of steps, then one a step. Without turns there is for each key head also a line a key tile, which
//! says which one is dealt out as which: those that most blocks list come first.

use cubecl::prelude::*;

use super::element::{Head, Numbers, head_of};
use super::ptx::{load_global_16, value_of};
use super::tile_shape::TileShape;
use super::walk::{
    Step, Walk, list_keys, list_queries, no_walk, place_of, plane_of, reach_keys, reach_queries, tile_is_full,
};
use crate::block_plan::flat::{block_count, block_word, header};

/// What stands behind the last entry of a list.
const NOTHING: u32 = u32::MAX;

/// Words of a line.
pub(crate) const LINE: usize = 4;

/// Lists of steps in a buffer: where the first starts, how many lines those of a batch element take, and where the orders of key tiles start. In
/// lines.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Lists {
    pub at: u32,
    pub each: u32,
    pub orders: u32,
}

/// Writes the lists, a cube for each key tile of the plan's heads in each batch element; unless `ordered` turns are 0, and there are orders of
/// key tiles.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn list_steps_kernel<E: Float>(
    scratch: &[u32],
    lines: &mut [Vector<u32, Const<4>>],
    n: Numbers,
    lists: Lists,
    #[comptime] with_bias: bool,
    #[comptime] ordered: bool,
    #[comptime] tile: TileShape,
    #[define(E)] _dtype: ElemType,
) {
    let columns = n.seq_kv.div_ceil(comptime!(tile.rows as u32));
    let heads = scratch[n.plan_at + header::HEADS];
    let (plane, j) = (CUBE_POS as u32 / columns, CUBE_POS as u32 % columns);
    let batch = plane / heads;
    // The grid may have more cubes.
    if batch < n.batch {
        let at = head_of::<E>(batch, plane % heads, scratch, ComptimeOption::new_None(), n, false);
        let j0 = j * comptime!(tile.rows as u32);
        let column = column(j0, at, scratch, n, tile);
        let first = list_of(j0, at, lists, scratch, n, tile) as usize;
        if UNIT_POS == 0 {
            let mut line = Vector::<u32, Const<4>>::new(0u32);
            line.insert(0usize, column.steps);
            lines[first] = line;
        }
        let mut e = UNIT_POS;
        while e < column.candidates {
            let listed = listed_step(e, column, j0, at, scratch, n, with_bias, ordered, tile);
            if listed.exists {
                let mut line = Vector::<u32, Const<4>>::new(0u32);
                line.insert(0usize, listed.i0);
                line.insert(1usize, listed.bits);
                line.insert(2usize, listed.turn_and_full);
                lines[first + 1 + listed.index as usize] = line;
            }
            e += CUBE_DIM;
        }
        if comptime!(!ordered) {
            let rank = rank_of(j, at, scratch, n, tile);
            if UNIT_POS == 0 {
                let mut line = Vector::<u32, Const<4>>::new(0u32);
                line.insert(0usize, j);
                lines[order_line(rank, at, lists, scratch, n, tile) as usize] = line;
            }
        }
    }
}

/// The line that says which key tile of a head's, or of its key head's, is dealt out as number `rank`.
#[cube]
fn order_line(rank: u32, at: Head, lists: Lists, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) -> u32 {
    lists.orders + plane_of(at, scratch, n) * n.seq_kv.div_ceil(comptime!(tile.rows as u32)) + rank
}

/// Which key tile is dealt out as number `rank` of the key head whose first query head is `at`; the buffer starts at `lines`.
#[cube]
pub(crate) fn ranked_tile(
    rank: u32,
    at: Head,
    lines: u64,
    lists: Lists,
    scratch: &[u32],
    n: Numbers,
    #[comptime] tile: TileShape,
) -> u32 {
    load_global_16(lines + order_line(rank, at, lists, scratch, n, tile) as u64 * 16u64).extract(0usize)
}

/// How many key tiles of a head come before key tile `j`: those that more blocks list, and of as many those before it. By all units of a
/// cube of two planes; unit 0 has the sum.
#[cube]
fn rank_of(j: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) -> u32 {
    let tiles = n.seq_kv.div_ceil(comptime!(tile.rows as u32));
    let own = blocks_of(j, at, scratch, n, tile);
    let mut before = 0u32;
    let mut other = UNIT_POS;
    while other < tiles {
        let blocks = blocks_of(other, at, scratch, n, tile);
        before += u32::cast_from(blocks > own || (blocks == own && other < j));
        other += CUBE_DIM;
    }
    let mut sums = Shared::<[u32]>::new_slice(2usize);
    let mut distance = 16u32;
    while distance > 0 {
        before += plane_shuffle_xor(before, distance);
        distance /= 2u32;
    }
    if UNIT_POS.is_multiple_of(32u32) {
        sums[(UNIT_POS / 32) as usize] = before;
    }
    sync_cube();
    sums[0] + sums[1]
}

/// How many blocks list a key tile, in all heads that the plan has for its key head, of which `at` is one.
#[cube]
fn blocks_of(j: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) -> u32 {
    let columns = scratch[n.plan_at + header::KEY_TILES];
    let group = select(scratch[n.plan_at + header::HEADS] == 1, 1u32, n.heads_q / n.heads_kv);
    let starts = n.plan_at + scratch[n.plan_at + header::COLUMN_STARTS] as usize;
    let column = j * comptime!(tile.rows as u32) / scratch[n.plan_at + header::BK];
    let first = plane_of(at, scratch, n) / group * group;
    let mut blocks = 0u32;
    for plane in first..first + group {
        let here = starts + 2 * (plane * columns + column) as usize;
        blocks += block_count(scratch[here], scratch[here + 1], scratch[here + 2]);
    }
    blocks
}

/// What all steps of a key tile have in common.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Column {
    lists: Walk,
    reach: Walk,
    /// Listed query tiles, those of them that are out of reach at the start, and those in reach.
    candidates: u32,
    before: u32,
    steps: u32,
}

#[cube]
fn column(j0: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) -> Column {
    let mut reach = no_walk();
    reach_queries(&mut reach, j0, at, n, tile);
    let mut lists = no_walk();
    list_queries(&mut lists, j0, at, scratch, n, tile);
    let mut candidates = 0u32;
    let mut before = 0u32;
    let mut steps = 0u32;
    if reach.steps > 0 {
        candidates = lists.steps;
        before = listed_before(reach.first, lists, scratch, n);
        steps = listed_before(reach.first + reach.steps, lists, scratch, n) - before;
    }
    Column { lists, reach, candidates, before, steps }
}

/// A step and its place among the key tile's.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Listed {
    exists: bool,
    index: u32,
    /// The first query, where the plan's bits start counted from the plan, or 0, and twice the turn, plus 1 if nothing is hidden.
    i0: u32,
    bits: u32,
    turn_and_full: u32,
}

/// Query tile `e` of those that the plan lists, Full ones first. Without order there are no turns.
#[cube]
fn listed_step(
    e: u32,
    column: Column,
    j0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] ordered: bool,
    #[comptime] tile: TileShape,
) -> Listed {
    let lists = column.lists;
    let (block, part) = (e / lists.per, e % lists.per);
    let full_blocks = lists.partial - lists.full;
    let word = n.plan_at + block_word(block, lists.full, lists.partial) as usize;
    let i = scratch[word];
    let m = i * lists.per + part;
    let exists = m >= column.reach.first && m < column.reach.first + column.reach.steps;
    let i0 = m * comptime!(tile.cols as u32);
    let mut index = 0u32;
    let mut bits = 0u32;
    let mut turn_and_full = 0u32;
    if exists {
        let mut below = block;
        if block < full_blocks {
            let partial_blocks = (lists_end(lists) - lists.partial) / 2u32;
            below += entries_below(i, lists.partial, partial_blocks, 2u32, scratch, n);
        } else {
            below = below - full_blocks + entries_below(i, lists.full, full_blocks, 1u32, scratch, n);
            bits = scratch[word + 1] + lists.own + part * comptime!(tile.cols as u32) * lists.row_words;
        }
        index = below * lists.per + part - column.before;
        let full = bits == 0 && tile_is_full(i0, tile.cols, j0, tile.rows, at.keys, n, with_bias);
        if comptime!(ordered) {
            let turn = keys_after(j0 / comptime!(tile.rows as u32), i0, at, scratch, n, comptime!(tile.turned()));
            turn_and_full = 2 * turn + select(full, 1u32, 0u32);
        } else {
            turn_and_full = select(full, 1u32, 0u32);
        }
    }
    Listed { exists, index, i0, bits, turn_and_full }
}

/// The line where the list of a key tile starts. Every block could be a step, and has at least a word in the plan.
#[cube]
pub(super) fn list_of(
    j0: u32,
    at: Head,
    lists: Lists,
    scratch: &[u32],
    n: Numbers,
    #[comptime] tile: TileShape,
) -> u32 {
    let bk = scratch[n.plan_at + header::BK];
    let per = scratch[n.plan_at + header::BQ] / comptime!(tile.cols as u32);
    let plane = plane_of(at, scratch, n);
    let column = plane * scratch[n.plan_at + header::KEY_TILES] + j0 / bk;
    let starts = n.plan_at + scratch[n.plan_at + header::COLUMN_STARTS] as usize;
    let here = scratch[starts + 2 * column as usize];
    let (before, own) = (here - scratch[starts], scratch[starts + 2 * column as usize + 2] - here);
    let tiles = bk / comptime!(tile.rows as u32);
    let blocks = before * tiles + j0 % bk / comptime!(tile.rows as u32) * own;
    let lists_before = plane * n.seq_kv.div_ceil(comptime!(tile.rows as u32)) + j0 / comptime!(tile.rows as u32);
    let copy = select(scratch[n.plan_at + header::BATCH] == 1, at.batch, 0u32);
    lists.at + copy * lists.each + blocks * per + lists_before
}

/// A walk down a list.
#[derive(CubeType)]
pub(crate) struct Listing {
    /// Where the line after the next lies.
    address: u64,
    /// Steps that are still to come.
    pub left: u32,
    row_words: u32,
    /// The next step's.
    line: Vector<u32, Const<4>>,
}

/// A walk of nothing.
#[cube]
pub(crate) fn no_listing() -> Listing {
    let line = Vector::<u32, Const<4>>::new(0u32);
    Listing { address: 0u64.runtime(), left: 0u32.runtime(), row_words: 0u32.runtime(), line }
}

/// The list of a key tile's steps in a head; the buffer starts at `lines`.
#[cube]
pub(crate) fn listing(
    lines: u64,
    j0: u32,
    at: Head,
    lists: Lists,
    scratch: &[u32],
    n: Numbers,
    #[comptime] tile: TileShape,
) -> Listing {
    let first = lines + list_of(j0, at, lists, scratch, n, tile) as u64 * 16u64;
    let left = load_global_16(first).extract(0usize);
    let mut line = Vector::<u32, Const<4>>::new(0u32);
    if left > 0 {
        line = load_global_16(first + 16u64);
    }
    Listing { address: first + 32u64, left, row_words: scratch[n.plan_at + header::ROW_WORDS], line }
}

/// How many steps a key tile takes in a head.
#[cube]
pub(crate) fn steps_listed(
    lines: u64,
    j0: u32,
    at: Head,
    lists: Lists,
    scratch: &[u32],
    n: Numbers,
    #[comptime] tile: TileShape,
) -> u32 {
    load_global_16(lines + list_of(j0, at, lists, scratch, n, tile) as u64 * 16u64).extract(0usize)
}

/// A step, and how many key tiles come before this one at its queries.
#[derive(CubeType)]
pub(crate) struct Next {
    pub step: Step,
    pub turn: u32,
}

/// The next step of a walk, `empty` where it has ended.
#[cube]
pub(crate) fn next_listed(listing: &mut Listing, j0: u32, n: Numbers) -> Next {
    // Not another name for what is read next.
    let line = value_of::<Vector<u32, Const<4>>>(listing.line);
    let empty = listing.left == 0;
    if !empty {
        listing.left -= 1;
        // Asked for a step ahead.
        if listing.left > 0 {
            listing.line = load_global_16(listing.address);
            listing.address += 16u64;
        }
    }
    let from_plan = line.extract(1usize);
    let bits = select(from_plan != 0, n.plan_at + from_plan as usize, 0usize);
    let (flags, row_words) = (line.extract(2usize), listing.row_words);
    let step = Step { i0: line.extract(0usize), j0, full: flags % 2 == 1, empty, bits, row_words };
    Next { step, turn: flags / 2u32 }
}

/// How many key tiles after key tile `j` queries from `i0` on see: of the visible sinks, and of the window behind them.
#[cube]
fn keys_after(j: u32, i0: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] tile: TileShape) -> u32 {
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
    let (block, part) = (x / lists.per, x % lists.per);
    let end = lists_end(lists);
    let full = entries_below(block, lists.full, lists.partial - lists.full, 1u32, scratch, n);
    let partial = entries_below(block, lists.partial, (end - lists.partial) / 2u32, 2u32, scratch, n);
    let mut tiles = (full + partial) * lists.per;
    if part > 0 {
        let next_full = entry(lists.full + full, lists.partial, scratch, n);
        let next_partial = entry(lists.partial + 2u32 * partial, end, scratch, n);
        tiles += select(min(next_full, next_partial) == block, part, 0u32);
    }
    tiles
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
pub mod tests {
    use super::*;
    use crate::block_plan::{BlockPlan, TileSize};
    use crate::mask::{Band, Extent, Mask, UNBOUNDED};

    const BQ: usize = 4;
    const BK: usize = 8;
    const OF_KEYS: TileShape = TileShape { rows: BK, cols: BQ };
    const OF_QUERIES: TileShape = TileShape { rows: BQ, cols: BK };

    pub fn numbers(extent: Extent, band: Band) -> Numbers {
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

    /// The query tiles of a key tile's list, with the turn at each; asserts what else a step says.
    fn walked(plan: &BlockPlan, tile: TileSize, j: u32, at: Head, scratch: &[u32], n: Numbers) -> Vec<(u32, u32)> {
        let (j0, full) = (j * BK as u32, plan.column(at.batch, at.head, j * BK as u32 / tile.bk).full);
        let column = column(j0, at, scratch, n, OF_KEYS);
        let mut tiles = vec![None; column.steps as usize];
        for e in 0..column.candidates {
            let step = listed_step(e, column, j0, at, scratch, n, false, true, OF_KEYS);
            if step.exists {
                let from_plan = step.bits == 0;
                assert_eq!(from_plan, full.contains(&(step.i0 / tile.bq)), "column {j}, queries from {}", step.i0);
                let taken = tiles[step.index as usize].replace((step.i0 / BQ as u32, step.turn_and_full / 2));
                assert_eq!(taken, None, "column {j}, queries from {}", step.i0);
            }
        }
        tiles.into_iter().map(|tile| tile.expect("a list has no gap")).collect()
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
        let columns: Vec<Vec<(u32, u32)>> = (0..key_tiles).map(|j| walked(plan, tile, j, at, scratch, n)).collect();
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
            let visitors: Vec<u32> =
                (0..key_tiles).filter(|&j| columns[j as usize].iter().any(|step| step.0 == i)).collect();
            assert_eq!(visitors, expected, "queries from {i0} of {at:?}", at = (at.batch, at.head, at.keys));
            for (x, &j) in visitors.iter().enumerate() {
                let after = (visitors.len() - 1 - x) as u32;
                assert!(columns[j as usize].contains(&(i, after)), "key tile {j}, queries from {i0}");
            }
            visits += visitors.len();
        }
        for column in &columns {
            assert!(column.is_sorted_by(|a, b| a < b), "{column:?}");
        }
        visits
    }
}
