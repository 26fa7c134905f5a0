//! From products to scores, in the registers of a warp: what hides, and what else shapes them.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, ROWS};
use super::ptx::Sums;
use crate::family::element::{Head, Numbers, in_reach, reach_of, score, sees};
use crate::family::score_function::with_function;
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

/// Turns products into scores, the user's function last. `row` and `column` are this lane's first of the tile: a query and a key if the tile lies on the
/// side of queries, else the other way round.
#[cube]
pub(crate) fn all_scores<E: Float>(
    s: &mut Array<Sums>,
    row: u32,
    column: u32,
    at: Head,
    scratch: &[u32],
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
                let x = score::<E>(products.extract(z), i, j, at, bias, n, with_bias);
                scores.insert(z, with_function(x, i, j, at, scratch, n, c.function));
            }
        }
        s[x] = scores;
    }
}

/// Hides what is hidden: its score becomes −∞, so that its probability is 0, and its `dp`, if there is one, 0. `row` and `column`
/// as in [`all_scores`].
#[cube]
pub(crate) fn hide(
    s: &mut Array<Sums>,
    dp: &mut Array<Sums>,
    row: u32,
    column: u32,
    step: Step,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_dp: bool,
    #[comptime] side: Side,
    #[comptime] c: Compiled,
) {
    let col_blocks = comptime!(c.tile.cols / COLS);
    if n.mask_at != 0 || step.bits != 0 {
        #[unroll]
        for x in 0..comptime!(c.tile.blocks * col_blocks) {
            #[unroll]
            for z in 0..4usize {
                let (i, j) = query_and_key(row, column, x, z, side, c);
                if !sees(i, j, step, at, scratch, n) {
                    hide_one(s, dp, x, z, n, with_dp);
                }
            }
        }
    } else {
        hide_out_of_reach(s, dp, row, column, at, n, with_dp, side, c);
    }
}

/// [`hide`] where no dense mask and no plan's bits touch the tile.
#[cube]
pub(crate) fn hide_out_of_reach(
    s: &mut Array<Sums>,
    dp: &mut Array<Sums>,
    row: u32,
    column: u32,
    at: Head,
    n: Numbers,
    #[comptime] with_dp: bool,
    #[comptime] side: Side,
    #[comptime] c: Compiled,
) {
    let col_blocks = comptime!(c.tile.cols / COLS);
    // Position and key lengths leave each query a few spans of keys.
    let (rows, columns) = comptime!((2 * c.tile.blocks, 2 * col_blocks));
    let (queries, keys) = comptime!(match side {
        Side::Queries => (rows, columns),
        Side::Keys => (columns, rows),
    });
    #[unroll]
    for query in 0..queries {
        let (x, z) = comptime!(element(query, 0, side, col_blocks));
        let reach = reach_of(query_and_key(row, column, x, z, side, c).0, at, n);
        #[unroll]
        for key in 0..keys {
            let (x, z) = comptime!(element(query, key, side, col_blocks));
            if !in_reach(query_and_key(row, column, x, z, side, c).1, reach) {
                hide_one(s, dp, x, z, n, with_dp);
            }
        }
    }
}

/// Hides an element.
#[cube]
fn hide_one(
    s: &mut Array<Sums>,
    dp: &mut Array<Sums>,
    #[comptime] x: usize,
    #[comptime] z: usize,
    n: Numbers,
    #[comptime] with_dp: bool,
) {
    let mut scores = s[x];
    scores.insert(z, n.minus_infinity);
    s[x] = scores;
    if with_dp {
        let mut gradients = dp[x];
        gradients.insert(z, 0.0f32);
        dp[x] = gradients;
    }
}

/// Block and element of a lane's `query`-th query and `key`-th key.
const fn element(query: usize, key: usize, side: Side, col_blocks: usize) -> (usize, usize) {
    let (row, column) = match side {
        Side::Queries => (query, key),
        Side::Keys => (key, query),
    };
    (row / 2 * col_blocks + column / 2, row % 2 * 2 + column % 2)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_and_keys_enumerate_every_element_once() {
        for side in [Side::Queries, Side::Keys] {
            for (blocks, col_blocks) in [(1, 4), (2, 4), (1, 8), (2, 8)] {
                let (rows, columns) = (2 * blocks, 2 * col_blocks);
                let (queries, keys) = if side == Side::Queries { (rows, columns) } else { (columns, rows) };
                let mut seen = vec![0; 4 * blocks * col_blocks];
                for (query, key) in (0..queries).flat_map(|query| (0..keys).map(move |key| (query, key))) {
                    let (x, z) = element(query, key, side, col_blocks);
                    seen[4 * x + z] += 1;
                    // All elements of a query lie in one row or one column of the tile.
                    let (first_x, first_z) = element(query, 0, side, col_blocks);
                    let (here, first) = (place(x, z, col_blocks), place(first_x, first_z, col_blocks));
                    assert!(if side == Side::Queries { here.0 == first.0 } else { here.1 == first.1 });
                }
                assert!(seen.iter().all(|&times| times == 1), "{side:?} {blocks} {col_blocks}: {seen:?}");
            }
        }
    }
}
