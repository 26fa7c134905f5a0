//! What the cubes of a backward do one after another: key tiles, and the ends of dq of heads whose key tiles are done.
//!
//! Heads are worked on in sections, side by side. The ends of a section's heads come some sections later: by then
//! nobody waits for key tiles that others still work on, and the sums still lie in the second-level cache. Those of the last sections
//! come last, and keep multiprocessors busy while others have key tiles left. A launch of its own would read all sums from memory.

use cubecl::prelude::*;

use super::backward_config::HopperBackwardConfig;
use super::bulk::turn_wait;
use super::config::{PIECE, WARPGROUP};
use crate::family::element::Numbers;
use crate::family::ptx::{load_global_4, load_global_16, pack};
use crate::family::tile_shape::TileShape;

/// Query tiles whose dq is ended at a time.
const ENDED: u32 = 8;

/// Units that a thread ends at a time: so many loads are in flight.
const TOGETHER: usize = 2;

/// Threads that end dq.
const THREADS: u32 = 2 * WARPGROUP as u32;

/// Units of a cube that add to dq.
pub(crate) const ADDERS: u32 = 2;

/// What a work is.
pub(crate) mod kind {
    pub(crate) const NOTHING: u32 = 0;
    pub(crate) const KEYS: u32 = 1;
    pub(crate) const END: u32 = 2;
}

/// A work: of [`kind::KEYS`] the number of its key tile in the order in which they are [dealt](crate::family::turns::dealt), of [`kind::END`] that of
/// its query tiles.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Work {
    pub kind: u32,
    pub number: u32,
}

/// Query tiles of a key head's query heads, and works that end them.
#[cube]
fn ends_of_head(n: Numbers, #[comptime] shape: TileShape) -> (u32, u32) {
    let places = n.heads_q / n.heads_kv * n.seq_q.div_ceil(comptime!(shape.cols as u32));
    (places, places.div_ceil(comptime!(ENDED)))
}

/// Sections that lie between the key tiles of a section, of `tiles` tiles, and the ends of its dq: under a plan without turns so many that all
/// `cubes` have taken another key tile since. Elsewhere all ends come last: cubes that take turns follow each other closely, and who ends dq
/// between them keeps those behind it waiting; and without a plan there is so much else to do that ends do not matter.
pub(crate) fn lag(tiles: usize, cubes: usize, cfg: HopperBackwardConfig) -> u32 {
    if cfg.listed && cfg.unordered { cubes.div_ceil(tiles) as u32 } else { u32::MAX }
}

/// The work of a ticket, where `section` heads are worked on side by side, and the ends of a section come `lag` sections after it.
#[cube]
pub(crate) fn work_of(ticket: u32, section: u32, lag: u32, n: Numbers, #[comptime] shape: TileShape) -> Work {
    let heads = n.batch * n.heads_kv;
    let tiles = n.seq_kv.div_ceil(comptime!(shape.rows as u32));
    let (_, ends) = ends_of_head(n, shape);
    let (keys_each, ends_each) = (section * tiles, section * ends);
    let sections = heads.div_ceil(section);
    let ahead = min(lag, sections);
    // The ends that come between key tiles, and all that comes before the others.
    let between = (sections - ahead) * ends_each;
    let before = heads * tiles + between;
    let mut kind = comptime!(kind::KEYS).runtime();
    let mut number = ticket;
    if ticket >= before {
        kind = comptime!(kind::END).runtime();
        number = between + ticket - before;
        if number >= heads * ends {
            kind = comptime!(kind::NOTHING).runtime();
        }
    } else if ticket >= ahead * keys_each {
        let behind = ticket - ahead * keys_each;
        let (round, rest) = (behind / (keys_each + ends_each), behind % (keys_each + ends_each));
        let keys = min(section, heads - (ahead + round) * section) * tiles;
        if rest < keys {
            number = (ahead + round) * keys_each + rest;
        } else {
            kind = comptime!(kind::END).runtime();
            number = round * ends_each + rest - keys;
        }
    }
    Work { kind, number }
}

/// The counter of units that have added all of a key tile of a head, behind those of query tiles.
#[cube]
pub(crate) fn done_at(counters: u64, head: u32, n: Numbers, #[comptime] cfg: HopperBackwardConfig) -> u64 {
    let places = n.batch * n.heads_q * n.seq_q.div_ceil(comptime!(cfg.bq as u32));
    counter_at(counters, places, head, cfg)
}

/// The counter of who has come by at a query tile, of one of the units that add to it.
#[cube]
pub(crate) fn counter_at(counters: u64, place: u32, adder: u32, #[comptime] cfg: HopperBackwardConfig) -> u64 {
    counters + (place as u64 * comptime!(cfg.counters() as u64) + adder as u64 + 1u64) * 4u64
}

/// Rows of dq from the f32 sums of some query tiles, by all threads of the consumers, once all key tiles of their head are done.
///
/// Sums lie as the threads of a warpgroup hold them: for every 64 elements of the head dimension and
/// every 8 queries 128 vectors of four floats, vector `32 · w + 4 · g + c` being elements `16 · w + g` and 8 further of
/// queries `2 · c` and the next. A unit is 16 elements of two rows.
#[cube]
pub(crate) fn end_queries(
    number: u32,
    counters: u64,
    sums: u64,
    dq: &mut [Vector<u32, Const<4>>],
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let (places, ends) = ends_of_head(n, comptime!(cfg.shape()));
    let (head, part) = (number / ends, number % ends);
    let first = head * places + part * comptime!(ENDED);
    let each = comptime!(cfg.dq_elements() as u32 / 32);
    let units = min(comptime!(ENDED), places - part * comptime!(ENDED)) * each;
    let tiles = n.seq_kv.div_ceil(comptime!(cfg.bk() as u32));
    turn_wait(done_at(counters, head, n, cfg), tiles * comptime!(ADDERS));
    // Behind the warpgroup that copies there are as many.
    let mut unit = UNIT_POS % comptime!(THREADS);
    while unit < units {
        let mut fours = Array::<Vector<u32, Const<4>>>::new(comptime!(8 * TOGETHER));
        let mut seen = Array::<u32>::new(TOGETHER);
        #[unroll]
        for x in 0..TOGETHER {
            // One that does not exist is read twice.
            let own = min(unit + comptime!(x as u32 * THREADS), units - 1);
            let place = first + own / each;
            seen[x] = load_global_4(counter_at(counters, place, 0u32, cfg));
            let (block, vector) = (own % each / 16, own / 4 % 4 * 32 + own % 4);
            let at = sums + ((place * (each / 16) + block) as u64 * 128u64 + vector as u64) * 16u64;
            #[unroll]
            for g in 0..8usize {
                fours[comptime!(8 * x + g)] = load_global_16(at + comptime!(64 * g as u64));
            }
        }
        #[unroll]
        for x in 0..TOGETHER {
            let own = unit + comptime!(x as u32 * THREADS);
            if own < units {
                // Nobody has written where nobody came by.
                end_unit(&fours, comptime!(8 * x), seen[x] > 0, first + own / each, own % each, dq, n, cfg);
            }
        }
        unit += comptime!(TOGETHER as u32 * THREADS);
    }
}

/// Writes a unit, whose sums are eight vectors from `at` on, or zeros where nobody has `seen` the query tile, which is number `place`
/// of all.
#[cube]
fn end_unit(
    fours: &Array<Vector<u32, Const<4>>>,
    #[comptime] at: usize,
    seen: bool,
    place: u32,
    unit: u32,
    dq: &mut [Vector<u32, Const<4>>],
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let tiles = n.seq_q.div_ceil(comptime!(cfg.bq as u32));
    let eights = comptime!(cfg.bq as u32 / 8);
    let (c, w, block) = (unit % 4, unit / 4 % 4, unit / 16);
    let (eight, piece) = (block % eights, block / eights);
    let factor = select(seen, n.scale, 0.0f32);
    #[unroll]
    for r in 0..2usize {
        let i = place % tiles * comptime!(cfg.bq as u32) + eight * 8 + c * 2 + comptime!(r as u32);
        #[unroll]
        for half in 0..2usize {
            let mut line = Vector::<u32, Const<4>>::new(0u32);
            #[unroll]
            for y in 0..4usize {
                let z = comptime!(2 * half + r);
                let low = f32::reinterpret(fours[comptime!(at + 2 * y)].extract(z));
                let high = f32::reinterpret(fours[comptime!(at + 2 * y + 1)].extract(z));
                let pair = pack(low * factor, high * factor, cfg.element);
                line.insert(y, select(seen, pair, 0u32));
            }
            let group = piece * comptime!((PIECE / 8) as u32) + w * 2 + comptime!(half as u32);
            if i < n.seq_q && group * 8 < n.head_dim {
                let row = place as usize / tiles as usize * n.seq_q as usize + i as usize;
                dq[row * (n.head_dim / 8) as usize + group as usize] = line;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::family::listed::tests::numbers;
    use crate::mask::{Band, Extent};

    const SHAPE: TileShape = TileShape { rows: 128, cols: 64 };

    /// Each key tile and each end has one ticket, and a head's ends come after its key tiles.
    #[test]
    fn every_work_has_a_ticket() {
        for (heads, group) in [(1, 1), (3, 1), (7, 4), (16, 2)] {
            for (seq_q, seq_kv) in [(1, 1), (100, 700), (1500, 300), (640, 640)] {
                for (section, lag) in (1..=heads).flat_map(|section| (1..5).map(move |lag| (section, lag))) {
                    let extent = Extent { batch: 1, heads, seq_q, seq_kv };
                    let n = Numbers { heads_q: heads * group, ..numbers(extent, Band::default()) };
                    let (tiles, (places, ends)) = (seq_kv.div_ceil(128), ends_of_head(n, SHAPE));
                    assert_eq!(places, group * seq_q.div_ceil(64));
                    let (mut keys, mut ended) = (0, vec![false; (heads * ends) as usize]);
                    for ticket in 0..heads * (tiles + ends) {
                        let Work { kind, number } = work_of(ticket, section, lag, n, SHAPE);
                        if kind == kind::KEYS {
                            assert_eq!(number, keys, "{ticket}");
                            keys += 1;
                        } else {
                            assert_eq!(kind, kind::END, "{ticket}");
                            assert!(!std::mem::replace(&mut ended[number as usize], true), "{ticket}");
                            let before = ((number / ends / section + lag) * section).min(heads) * tiles;
                            assert!(keys >= before, "{ticket}: {keys} key tiles before, of {before}");
                        }
                    }
                    assert_eq!(keys, heads * tiles);
                    for more in 0..300 {
                        assert_eq!(work_of(heads * (tiles + ends) + more, section, lag, n, SHAPE).kind, kind::NOTHING);
                    }
                }
            }
        }
    }
}
