//! What the unit that copies tells the others.
//!
//! Of a **work** what it is and the number of its steps: a line of shared memory, written once all have taken leave of the work
//! before. Of a **step** under a plan: a line, written before the barrier of the step's queries is arrived at. Consumers read it after
//! they waited there, the units that add after they waited for the consumers. So only one unit reads the list of steps.

use cubecl::prelude::*;

use super::backward_config::HopperBackwardConfig;
use super::ptx::uniform;
use crate::block_plan::flat::header;
use crate::family::element::Numbers;
use crate::family::ptx::{load_shared_16, store_shared_16};
use crate::family::walk::Step;

/// Words of a line.
pub(crate) const LINE: usize = 4;

/// A work as all are told: of a key tile also which one it is, and under a plan its steps.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Told {
    pub kind: u32,
    /// Of which key head, or the number of the query tiles whose dq is ended.
    pub number: u32,
    pub tile: u32,
    pub ascending: bool,
    pub steps: u32,
}

/// Writes the line of a work.
#[cube]
pub(crate) fn tell_work(line_at: u32, told: Told) {
    let mut line = Vector::<u32, Const<4>>::new(0u32);
    line.insert(0usize, told.kind);
    line.insert(1usize, told.number);
    line.insert(2usize, 2 * told.tile + u32::cast_from(told.ascending));
    line.insert(3usize, told.steps);
    store_shared_16(line_at, 0usize, line);
}

/// The work of a line.
#[cube]
pub(crate) fn told_work(line_at: u32) -> Told {
    let line = load_shared_16(line_at, 0usize);
    let tile = line.extract(2usize);
    Told {
        kind: line.extract(0usize),
        number: line.extract(1usize),
        tile: tile / 2u32,
        ascending: tile % 2u32 == 1,
        steps: line.extract(3usize),
    }
}

/// Where the lines of steps start, behind that of the work.
#[cube]
pub(crate) fn step_lines(told: u32) -> u32 {
    told + comptime!(4 * LINE as u32)
}

/// Lines, which steps use in turn. A step is told of when the consumers are done with the one two before, for which they
/// had to wait until the one four before had been added: a line that is written again has been read by all.
pub(crate) const LINES: usize = 4;

/// Where the line of a step stands.
#[cube]
fn line_of(lines: u32, step: u32) -> u32 {
    lines + step % comptime!(LINES as u32) * comptime!((4 * LINE) as u32)
}

/// Writes the line of the cube's `number`th step, of query head `head`; `turn` as in
/// [`turn_of`](crate::family::turns::turn_of).
#[cube]
pub(crate) fn tell_step(lines: u32, number: u32, step: Step, head: u32, turn: u32, n: Numbers) {
    let mut line = Vector::<u32, Const<4>>::new(0u32);
    line.insert(0usize, step.i0);
    line.insert(1usize, head);
    // A plan's bits do not start where the plan does.
    line.insert(2usize, select(step.bits != 0, (step.bits - n.plan_at) as u32, 0u32));
    line.insert(3usize, 2 * turn + select(step.full, 1u32, 0u32));
    store_shared_16(line_of(lines, number), 0usize, line);
}

/// A step as the consumers are told, and its query head.
#[cube]
pub(crate) fn told_step(lines: u32, number: u32, j0: u32, scratch: &[u32], n: Numbers) -> (Step, u32) {
    let line = load_shared_16(line_of(lines, number), 0usize);
    let from_plan = uniform(line.extract(2usize));
    let bits = select(from_plan != 0, n.plan_at + from_plan as usize, 0usize);
    let full = uniform(line.extract(3usize)) % 2 == 1;
    let row_words = scratch[n.plan_at + header::ROW_WORDS];
    (Step { i0: line.extract(0usize), j0, full, empty: false, bits, row_words }, line.extract(1usize))
}

/// A query tile to add to and the turn to wait for.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Due {
    pub head: u32,
    /// The query tile of the head.
    pub m: u32,
    pub turn: u32,
}

/// What a step's adder is told.
#[cube]
pub(crate) fn told_due(lines: u32, number: u32, #[comptime] cfg: HopperBackwardConfig) -> Due {
    let line = load_shared_16(line_of(lines, number), 0usize);
    let m = line.extract(0usize) / comptime!(cfg.bq as u32);
    Due { head: line.extract(1usize), m, turn: line.extract(3usize) / 2u32 }
}
