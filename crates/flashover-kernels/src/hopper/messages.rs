//! What the producer tells the consumers of a step and of a query tile: a line of shared memory beside each stage, written
//! before the stage's barrier is arrived at and read after it was waited for. So only one thread finds out what comes next,
//! and the consumers neither divide nor look anything up.

use cubecl::prelude::*;

use super::config::HopperConfig;
use super::ptx::uniform;
use crate::family::element::Numbers;
use crate::family::ptx::{load_shared_16, store_shared_16};
use crate::family::walk::Step;

/// Words of a line.
pub(crate) const LINE: usize = 4;

/// What comes after a step: nothing, another of the same query tile, the first of the next.
pub(crate) mod after {
    pub(crate) const NOTHING: u32 = 0;
    pub(crate) const SAME_TILE: u32 = 1;
    pub(crate) const NEXT_TILE: u32 = 2;
}

/// Bits of a step's flags beside the two that tell what comes after it.
const FULL: u32 = 4;
const BITS: u32 = 8;

/// A query tile: its batch element, its head and its first query.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct QueryTile {
    pub batch: u32,
    pub head: u32,
    pub i0: u32,
}

/// A step as its consumers are told.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Told {
    pub step: Step,
    /// One of [`after`].
    pub after: u32,
}

/// Writes the line of a query tile.
#[cube]
pub(crate) fn tell_tile(lines: u32, slot: u32, tile: QueryTile) {
    let mut line = Vector::<u32, Const<4>>::new(1u32);
    line.insert(0usize, tile.batch);
    line.insert(1usize, tile.head);
    line.insert(2usize, tile.i0);
    store_shared_16(lines + slot * comptime!(4 * LINE as u32), 0usize, line);
}

/// Writes the line of the first query tile of a cube that has none.
#[cube]
pub(crate) fn tell_nothing(lines: u32) {
    store_shared_16(lines, 0usize, Vector::<u32, Const<4>>::new(0u32));
}

/// The query tile of a slot, and whether there is one.
#[cube]
pub(crate) fn told_tile(lines: u32, slot: u32) -> (QueryTile, bool) {
    let line = load_shared_16(lines + slot * comptime!(4 * LINE as u32), 0usize);
    let tile = QueryTile {
        batch: uniform(line.extract(0usize)),
        head: uniform(line.extract(1usize)),
        i0: uniform(line.extract(2usize)),
    };
    (tile, uniform(line.extract(3usize)) != 0)
}

/// Writes the line of a step.
#[cube]
pub(crate) fn tell_step(lines: u32, stage: u32, step: Step, after: u32, n: Numbers, #[comptime] cfg: HopperConfig) {
    let mut line = Vector::<u32, Const<4>>::new(0u32);
    let mut flags = after + select(step.full, comptime!(FULL), 0u32);
    if comptime!(cfg.listed) {
        flags += select(step.bits != 0, comptime!(BITS), 0u32);
        line.insert(2usize, (step.bits - n.plan_at) as u32);
        line.insert(3usize, step.row_words);
    }
    line.insert(0usize, step.j0);
    line.insert(1usize, flags);
    store_shared_16(lines + stage * comptime!(4 * LINE as u32), 0usize, line);
}

/// The step of a stage, of the query tile from `i0` on.
#[cube]
pub(crate) fn told_step(lines: u32, stage: u32, i0: u32, n: Numbers, #[comptime] cfg: HopperConfig) -> Told {
    let line = load_shared_16(lines + stage * comptime!(4 * LINE as u32), 0usize);
    let flags = uniform(line.extract(1usize));
    let mut bits = 0usize;
    let mut row_words = 0u32;
    if comptime!(cfg.listed) {
        bits = select(flags & comptime!(BITS) != 0, n.plan_at + line.extract(2usize) as usize, 0usize);
        row_words = line.extract(3usize);
    }
    let full = flags & comptime!(FULL) != 0;
    Told { step: Step { i0, j0: line.extract(0usize), full, empty: false, bits, row_words }, after: flags & 3u32 }
}
