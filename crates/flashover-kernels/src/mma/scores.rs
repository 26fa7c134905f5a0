//! From products to scores, in the registers of a warp: what hides, and what else shapes them.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, ROWS};
use super::ptx::Sums;
use crate::family::element::{Head, Numbers, score, sees};
use crate::family::walk::{Side, Step};

/// Rows and columns of element `z` of block of sums `x` within a warp's part of a tile, less this lane's own. Blocks are
/// counted along the columns first.
pub(crate) const fn place(x: usize, z: usize, col_blocks: usize) -> (usize, usize) {
    (x / col_blocks * ROWS + z / 2 * 8, x % col_blocks * COLS + z % 2)
}

/// Which of a lane's rows, counted over its blocks and their halves, an element stands in.
pub(crate) const fn row_index(x: usize, z: usize, col_blocks: usize) -> usize {
    place(x, z, col_blocks).0 / 8
}

/// Turns products into scores. `row` and `column` are this lane's first of the tile: a query and a key if the tile lies on the
/// side of queries, else the other way round.
#[cube]
pub(crate) fn all_scores<E: Float>(
    s: &mut Array<Sums>,
    row: u32,
    column: u32,
    at: Head,
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] side: Side,
    #[comptime] c: Compiled,
) {
    let col_blocks = comptime!(c.tile.cols / COLS);
    #[unroll]
    for x in 0..comptime!(c.tile.blocks * col_blocks) {
        let products = s[x];
        let mut scores = Sums::new(0.0f32);
        #[unroll]
        for z in 0..4usize {
            let (i, j) = query_and_key(row, column, x, z, side, c);
            // A bias has no element outside the scores.
            if !with_bias || (i < n.seq_q && j < n.seq_kv) {
                scores.insert(z, score::<E>(products.extract(z), i, j, at, bias, n, with_bias));
            }
        }
        s[x] = scores;
    }
}

/// Makes −∞ of the scores that are hidden. `row` and `column` as in [`all_scores`].
#[cube]
pub(crate) fn hide(
    s: &mut Array<Sums>,
    row: u32,
    column: u32,
    step: Step,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] side: Side,
    #[comptime] c: Compiled,
) {
    let col_blocks = comptime!(c.tile.cols / COLS);
    #[unroll]
    for x in 0..comptime!(c.tile.blocks * col_blocks) {
        let mut scores = s[x];
        #[unroll]
        for z in 0..4usize {
            let (i, j) = query_and_key(row, column, x, z, side, c);
            if !sees(i, j, step, at, scratch, n) {
                scores.insert(z, n.minus_infinity);
            }
        }
        s[x] = scores;
    }
}

/// The query and the key of an element.
#[cube]
pub(crate) fn query_and_key(
    row: u32,
    column: u32,
    #[comptime] x: usize,
    #[comptime] z: usize,
    #[comptime] side: Side,
    #[comptime] c: Compiled,
) -> (u32, u32) {
    let (down, across) = comptime!(place(x, z, c.tile.cols / COLS));
    let (row, column) = (row + comptime!(down as u32), column + comptime!(across as u32));
    match side {
        Side::Queries => (row, column),
        Side::Keys => (column, row),
    }
}
