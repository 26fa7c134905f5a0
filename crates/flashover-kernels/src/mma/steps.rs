//! The tiles that a cube walks, on either side, less those that turn out to be empty.

use cubecl::prelude::*;

use super::config::Compiled;
use crate::family::element::{Head, Numbers};
use crate::family::walk::{Side, Step, Walk, key_step, query_step};

/// Tile `t` of a walk of keys for queries from `own` on, or of queries for keys from `own` on.
#[cube]
pub(crate) fn step_at(
    walk: Walk,
    t: u32,
    own: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] side: Side,
    #[comptime] c: Compiled,
) -> Step {
    match side {
        Side::Queries => key_step(walk, t, own, at, scratch, n, with_bias, c.tile.shape()),
        Side::Keys => query_step(walk, t, own, at, scratch, n, with_bias, c.tile.shape()),
    }
}

/// The first step from `t` on that is not empty. Without a plan a walk meets no empty tile.
#[cube]
pub(crate) fn visible_from(
    walk: Walk,
    t: u32,
    own: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] side: Side,
    #[comptime] c: Compiled,
) -> u32 {
    let mut t = t;
    if n.plan_at != 0 {
        let mut empty = true.runtime();
        while empty && t < walk.steps {
            empty = step_at(walk, t, own, at, scratch, n, with_bias, side, c).empty;
            if empty {
                t += 1;
            }
        }
    }
    t
}

/// A step to be filled in by [`follow`].
#[cube]
pub(crate) fn no_step() -> Step {
    Step {
        i0: 0u32.runtime(),
        j0: 0u32.runtime(),
        full: false.runtime(),
        empty: false.runtime(),
        bits: 0usize.runtime(),
        row_words: 0u32.runtime(),
    }
}

/// `step` becomes `other`.
#[cube]
pub(crate) fn follow(step: &mut Step, other: Step) {
    step.i0 = other.i0;
    step.j0 = other.j0;
    step.full = other.full;
    step.empty = other.empty;
    step.bits = other.bits;
    step.row_words = other.row_words;
}
