//! Which key tile a cube of a backward in one pass owns, the query tiles that it visits, and when it is its turn to add to the dq
//! of one.
//!
//! The cubes of a head come by a query tile in the order in which they start, so that none waits for one that has not started; visible
//! sinks, who visit all queries and would keep all who visit a window waiting, start last. There are two orders:
//!
//! - **Descending:** key tiles from the last to the first, each visits its queries from the first to the last. Under causal order those
//!   that visit fewest start first, and each comes by long after the one before it: nobody waits.
//! - **Ascending:** key tiles from the first to the last, each visits its queries from the last to the first. Under causal order those
//!   that visit most start first, and all begin at the same query tile: they follow each other at the distance of an addition.
//!
//! What is given out last should be short, so the last section of heads is ascending. Before it that would make short
//! cubes wait where a step is as long as two additions or less (docs/measurements.md has the times). Where nobody takes turns
//! all sections are ascending; under a plan all are descending, since there nothing says which key tiles are sinks, and the first ones may be.
//! Under a plan without turns those that visit most start first, as the [lists](super::listed) say.

use cubecl::prelude::*;

use super::element::{Head, Numbers, head_of};
use super::listed::{Listing, Lists, listing, next_listed, no_listing, steps_listed};
use super::tile_shape::TileShape;
use super::walk::{Step, Walk, no_walk, query_band_step, reach_keys, reach_queries};

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
    /// In which order the key tiles of the head start.
    pub ascending: bool,
}

/// A key tile as it is dealt out: which of all key heads, the how many-th of that head, and which one that is.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Dealt {
    pub head: u32,
    pub rank: u32,
    pub tile: u32,
    pub ascending: bool,
    pub exists: bool,
}

/// The key tile of a ticket, if there is one: in sections of `section` heads, which are worked on side by side, tile by tile of all of them.
/// Cubes of a head then start as far apart as they must follow each other.
#[cube]
pub(crate) fn dealt(
    ticket: u32,
    section: u32,
    n: Numbers,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
    #[comptime] unordered: bool,
) -> Dealt {
    let heads = n.batch * n.heads_kv;
    let tiles = n.seq_kv.div_ceil(comptime!(shape.rows as u32));
    let (first, rest) = (ticket / (section * tiles) * section, ticket % (section * tiles));
    // Whoever finds no tile left has drawn a ticket too many.
    let exists = ticket < heads * tiles;
    let wide = select(exists, min(section, max(heads, first) - first), 1u32);
    let head = select(exists, first + rest % wide, 0u32);
    let rank = select(exists, rest / wide, 0u32);
    let ascending = comptime!(!listed) && (comptime!(unordered) || first + section >= heads);
    Dealt { head, rank, tile: tile_of_rank(rank, ascending, tiles, n, shape), ascending, exists }
}

/// Key tile `tile` of a head of all key heads, which start in ascending order or not.
#[cube]
pub(crate) fn key_tile<E: Float>(
    head: u32,
    tile: u32,
    ascending: bool,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] shape: TileShape,
    #[comptime] listed: bool,
) -> KeyTile {
    let (batch, key_head) = (head / n.heads_kv, head % n.heads_kv);
    let group = n.heads_q / n.heads_kv;
    let first_head = key_head * group;
    let j0 = tile * comptime!(shape.rows as u32);
    let at = head_of::<E>(batch, first_head, scratch, bias, n, with_bias);
    let mut walk = no_walk();
    if comptime!(!listed) {
        reach_queries(&mut walk, j0, at, n, shape);
    }
    KeyTile { batch, key_head, first_head, group, tile, j0, at, walk, ascending }
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

/// Key tiles that may be visible as sinks.
#[cube]
fn sinks_of(tiles: u32, n: Numbers, #[comptime] shape: TileShape) -> u32 {
    min(max(n.sinks, 0i32) as u32, tiles * comptime!(shape.rows as u32)).div_ceil(comptime!(shape.rows as u32))
}

/// The key tile of a head that is given out as number `rank`.
#[cube]
fn tile_of_rank(rank: u32, ascending: bool, tiles: u32, n: Numbers, #[comptime] shape: TileShape) -> u32 {
    select(ascending, (rank + sinks_of(tiles, n, shape)) % tiles, tiles - 1 - rank % tiles)
}

/// Without a plan, query tile `t` of those that a key tile visits.
#[cube]
pub(crate) fn query_tile_at(owned: KeyTile, t: u32) -> u32 {
    owned.walk.first + select(owned.ascending, owned.walk.steps - 1 - t, t)
}

/// Without a plan, how many cubes add to query tile `m` before this one: those given out before it that visit it.
#[cube]
pub(crate) fn turn_of(owned: KeyTile, m: u32, n: Numbers, #[comptime] shape: TileShape) -> u32 {
    let mut seen = no_walk();
    reach_keys(&mut seen, m * comptime!(shape.cols as u32), owned.at, n, comptime!(shape.turned()));
    let end = seen.first + seen.steps - seen.sink_tiles;
    if owned.ascending {
        let sinks = sinks_of(n.seq_kv.div_ceil(comptime!(shape.rows as u32)), n, shape);
        let band = max(seen.first, sinks);
        if owned.tile < sinks {
            // Between sinks and band there may be a gap.
            let gap = select(owned.tile < seen.sink_tiles, 0u32, seen.first - seen.sink_tiles);
            max(end, band) - band + owned.tile - gap
        } else {
            owned.tile - band
        }
    } else {
        select(owned.tile < seen.sink_tiles, seen.steps, end) - 1 - owned.tile
    }
}

/// The query tiles of a head that a cube works on.
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
        let m = query_tile_at(owned, tiles.t);
        let mut step = query_band_step(m, owned.j0, owned.at, n, with_bias, shape);
        step.empty = tiles.t >= owned.walk.steps;
        tiles.t += 1;
        step
    }
}

#[cfg(test)]
mod tests {
    use super::super::listed::tests::numbers;
    use super::*;
    use crate::mask::{Band, Extent, UNBOUNDED};

    const SHAPE: TileShape = TileShape { rows: 8, cols: 4 };

    /// The key tiles of a head in the order of their tickets.
    fn given_out(n: Numbers, keys: i32, ascending: bool) -> Vec<KeyTile> {
        let tiles = n.seq_kv.div_ceil(SHAPE.rows as u32);
        let at = Head { batch: 0, head: 0, keys, slope: 0.0, mask_at: 0, bias_at: 0 };
        let owned = |rank| {
            let tile = tile_of_rank(rank, ascending, tiles, n, SHAPE);
            let j0 = tile * SHAPE.rows as u32;
            let mut walk = no_walk();
            reach_queries(&mut walk, j0, at, n, SHAPE);
            KeyTile { batch: 0, key_head: 0, first_head: 0, group: 1, tile, j0, at, walk, ascending }
        };
        (0..tiles).map(owned).collect()
    }

    fn visited(owned: KeyTile) -> Vec<u32> {
        (0..owned.walk.steps).map(|t| query_tile_at(owned, t)).collect()
    }

    /// So no cube waits for one that has not started, and none is passed over.
    #[test]
    fn turns_follow_tickets() {
        let mut visits = 0;
        for (seq_q, seq_kv) in [(41, 83), (83, 41), (48, 48), (1, 90), (90, 1), (64, 200)] {
            for (causal, left, right, sinks) in [
                (false, UNBOUNDED, UNBOUNDED, 0),
                (true, UNBOUNDED, UNBOUNDED, 0),
                (true, 10, UNBOUNDED, 0),
                (true, 10, UNBOUNDED, 11),
                (false, 3, 5, 30),
                (false, 20, 0, 1),
                (true, UNBOUNDED, UNBOUNDED, 9),
                (true, 6, UNBOUNDED, 500),
            ] {
                let extent = Extent { batch: 1, heads: 1, seq_q, seq_kv };
                let n = numbers(extent, Band { causal, left, right, sinks });
                for (keys, ascending) in
                    [seq_kv as i32, seq_kv as i32 / 2, 1, 0].map(|keys| [(keys, false), (keys, true)]).concat()
                {
                    let tiles = given_out(n, keys, ascending);
                    for m in 0..seq_q.div_ceil(SHAPE.cols as u32) {
                        let visitors = tiles.iter().filter(|&&owned| visited(owned).contains(&m));
                        for (turn, &owned) in visitors.enumerate() {
                            let context = (seq_q, seq_kv, causal, left, right, sinks, keys, ascending, m, owned.tile);
                            assert_eq!(turn_of(owned, m, n, SHAPE), turn as u32, "{context:?}");
                            visits += 1;
                        }
                    }
                }
            }
        }
        assert!(visits > 8000, "{visits}");
    }

    /// Tickets that are left over get none, wherever the last section ends.
    #[test]
    fn every_key_tile_is_dealt_once() {
        for (heads, section) in [(5, 2), (16, 5), (3, 3), (4, 1), (7, 6)] {
            let extent = Extent { batch: 1, heads, seq_q: 41, seq_kv: 83 };
            let n = numbers(extent, Band { causal: true, ..Band::default() });
            let tiles = n.seq_kv.div_ceil(SHAPE.rows as u32);
            let mut taken = vec![false; (heads * tiles) as usize];
            for ticket in 0..heads * tiles + 200 {
                let Dealt { head, tile, exists, .. } = dealt(ticket, section, n, SHAPE, false, false);
                assert_eq!(exists, ticket < heads * tiles, "{ticket}");
                if exists {
                    assert!(!core::mem::replace(&mut taken[(head * tiles + tile) as usize], true), "{ticket}");
                }
            }
        }
    }

    #[test]
    fn who_visits_most_starts_first_and_sinks_last() {
        let extent = Extent { batch: 1, heads: 1, seq_q: 96, seq_kv: 96 };
        let causal = Band { causal: true, ..Band::default() };
        let tiles = |band: Band, ascending| given_out(numbers(extent, band), 96, ascending);
        let steps = |tiles: &[KeyTile]| tiles.iter().map(|tile| tile.walk.steps).collect::<Vec<u32>>();
        assert_eq!(steps(&tiles(causal, true)), [24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2]);
        assert_eq!(steps(&tiles(causal, false)), [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24]);
        let window = Band { left: 7, sinks: 3, ..causal };
        assert_eq!(steps(&tiles(window, true)), [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 2, 24]);
        assert_eq!(steps(&tiles(window, false)), [2, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 24]);
        assert_eq!(visited(tiles(window, true)[0]), [5, 4, 3, 2]);
        assert_eq!(visited(tiles(window, false)[1]), [20, 21, 22, 23]);
    }
}
