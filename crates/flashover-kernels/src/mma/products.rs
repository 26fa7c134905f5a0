//! The two shapes of product: of two tiles in shared memory, and of a tile in registers with one in shared memory.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, MmaTile, ROWS};
use super::one_pass_launch::OnePass;
use super::ptx::{Fragment, Sums, load_matrix, load_matrix_transposed, mma};
use super::tf32::{accumulate_tf32, product_tf32};
use super::tile::{DEPTH, PIECE, pitch};
use crate::family::ptx::{pack, unpack};
use crate::problem::Element;

/// `s = a · bᵀ` over `dim` elements: this warp's rows of `a` at [`row_place`](super::tile::row_place), the columns of the tile at
/// [`column_place`](super::tile::column_place) of `b`.
#[cube]
pub(crate) fn product(
    s: &mut Array<Sums>,
    a: u32,
    b: u32,
    #[comptime] dim: usize,
    #[comptime] tile: MmaTile,
    #[comptime] element: Element,
) {
    if comptime!(element == Element::F32) {
        product_tf32(s, a, b, dim, tile);
    } else {
        product_of_halves(s, a, b, dim, tile, element);
    }
}

/// [`product`] of elements of 16 bits.
#[cube]
fn product_of_halves(
    s: &mut Array<Sums>,
    a: u32,
    b: u32,
    #[comptime] dim: usize,
    #[comptime] tile: MmaTile,
    #[comptime] element: Element,
) {
    let pitch = comptime!(pitch(dim, element));
    let (blocks, col_blocks) = comptime!((tile.blocks, tile.cols / COLS));
    #[unroll]
    for x in 0..comptime!(blocks * col_blocks) {
        s[x] = Sums::new(0.0f32);
    }
    #[unroll]
    for d in 0..comptime!(dim / DEPTH) {
        let mut rows = Array::<Fragment>::new(blocks);
        #[unroll]
        for block in 0..blocks {
            rows[block] = load_matrix(a, comptime!(block * ROWS * pitch + 2 * DEPTH * d));
        }
        #[unroll]
        for pair in 0..comptime!(col_blocks / 2) {
            let columns = load_matrix(b, comptime!(pair * 2 * COLS * pitch + 2 * DEPTH * d));
            #[unroll]
            for block in 0..blocks {
                let x = comptime!(block * col_blocks + 2 * pair);
                s[x] = mma(rows[block], columns.extract(0usize), columns.extract(1usize), s[x], element);
                s[x + 1] = mma(rows[block], columns.extract(2usize), columns.extract(3usize), s[x + 1], element);
            }
        }
    }
}

/// `acc += weights · b`: the columns of `weights`, rounded, are the rows of `b`, at [`depth_place`](super::tile::depth_place). With
/// few keys, what rounding takes is multiplied too.
#[cube]
pub(crate) fn accumulate(
    acc: &mut Array<Sums>,
    weights: &Array<Sums>,
    b: u32,
    #[comptime] dim: usize,
    #[comptime] c: Compiled,
) {
    if comptime!(c.element == Element::F32) {
        accumulate_tf32(acc, weights, b, dim, c);
    } else {
        accumulate_halves(acc, weights, b, dim, c);
    }
}

/// [`accumulate`] of elements of 16 bits.
#[cube]
fn accumulate_halves(
    acc: &mut Array<Sums>,
    weights: &Array<Sums>,
    b: u32,
    #[comptime] dim: usize,
    #[comptime] c: Compiled,
) {
    let pitch = comptime!(pitch(dim, c.element));
    let (blocks, col_blocks, value_blocks) = comptime!((c.tile.blocks, c.tile.cols / COLS, dim / COLS));
    #[unroll]
    for depth in 0..comptime!(c.tile.cols / DEPTH) {
        let mut rows = Array::<Fragment>::new(blocks);
        let mut rests = Array::<Fragment>::new(blocks);
        #[unroll]
        for block in 0..blocks {
            let mut packed = Fragment::new(0u32);
            let mut rest = Fragment::new(0u32);
            #[unroll]
            for y in 0..4usize {
                let sums = weights[comptime!(block * col_blocks + 2 * depth + y / 2)];
                let (low, high) = (sums.extract(comptime!(y % 2 * 2)), sums.extract(comptime!(y % 2 * 2 + 1)));
                let pair = pack(low, high, c.element);
                packed.insert(y, pair);
                if comptime!(c.few_keys) {
                    let (rounded_low, rounded_high) = unpack(pair, c.element);
                    rest.insert(y, pack(low - rounded_low, high - rounded_high, c.element));
                }
            }
            rows[block] = packed;
            rests[block] = rest;
        }
        #[unroll]
        for pair in 0..comptime!(value_blocks / 2) {
            let values = load_matrix_transposed(b, comptime!(depth * DEPTH * pitch + pair * 2 * PIECE));
            #[unroll]
            for block in 0..blocks {
                let x = comptime!(block * value_blocks + 2 * pair);
                acc[x] = mma(rows[block], values.extract(0usize), values.extract(1usize), acc[x], c.element);
                acc[x + 1] = mma(rows[block], values.extract(2usize), values.extract(3usize), acc[x + 1], c.element);
                if comptime!(c.few_keys) {
                    acc[x] = mma(rests[block], values.extract(0usize), values.extract(1usize), acc[x], c.element);
                    acc[x + 1] =
                        mma(rests[block], values.extract(2usize), values.extract(3usize), acc[x + 1], c.element);
                }
            }
        }
    }
}

/// The columns of `weights`, rounded, as rows to multiply with: a fragment a depth and block, those of a depth side by side.
#[cube]
pub(crate) fn fragments(
    to: &mut Array<Fragment>,
    weights: &Array<Sums>,
    #[comptime] tile: MmaTile,
    #[comptime] element: Element,
) {
    let (blocks, col_blocks) = comptime!((tile.blocks, tile.cols / COLS));
    #[unroll]
    for x in 0..comptime!(tile.cols / DEPTH * blocks) {
        let mut packed = Fragment::new(0u32);
        #[unroll]
        for y in 0..4usize {
            let sums = weights[comptime!(x % blocks * col_blocks + x / blocks * 2 + y / 2)];
            let (low, high) = (sums.extract(comptime!(y % 2 * 2)), sums.extract(comptime!(y % 2 * 2 + 1)));
            packed.insert(y, pack(low, high, element));
        }
        to[x] = packed;
    }
}

/// `acc += rows · b`: `rows` as of [`fragments`], of `b` so many pairs of blocks from [`row_place`](super::tile::row_place) on, whose rows
/// have `dim` elements.
#[cube]
pub(crate) fn accumulate_fragments(
    acc: &mut Array<Sums>,
    rows: &Array<Fragment>,
    b: u32,
    #[comptime] pairs: usize,
    #[comptime] dim: usize,
    #[comptime] tile: MmaTile,
    #[comptime] element: Element,
) {
    let blocks = comptime!(tile.blocks);
    #[unroll]
    for depth in 0..comptime!(tile.cols / DEPTH) {
        #[unroll]
        for pair in 0..pairs {
            let columns = load_matrix_transposed(b, comptime!(depth * DEPTH * pitch(dim, element) + pair * 2 * PIECE));
            #[unroll]
            for block in 0..blocks {
                let x = comptime!(2 * (block * pairs + pair));
                let row = rows[comptime!(depth * blocks + block)];
                acc[x] = mma(row, columns.extract(0usize), columns.extract(1usize), acc[x], element);
                acc[x + 1] = mma(row, columns.extract(2usize), columns.extract(3usize), acc[x + 1], element);
            }
        }
    }
}

/// `sums = wᵀ · b`: this warp's columns of `w` at [`column_place`](super::tile::column_place), a row of it a key, and of `b` the blocks
/// of the head dimension from pair `first_pair` on at [`row_place`](super::tile::row_place).
#[cube]
pub(crate) fn product_turned(
    sums: &mut Array<Sums>,
    w: u32,
    b: u32,
    first_pair: u32,
    #[comptime] of: OnePass,
    #[comptime] c: Compiled,
) {
    let (blocks, pairs) = comptime!((of.query_blocks(), of.pairs()));
    #[unroll]
    for x in 0..comptime!(of.blocks()) {
        sums[x] = Sums::new(0.0f32);
    }
    #[unroll]
    for depth in 0..comptime!(c.tile.rows() / DEPTH) {
        let mut rows = Array::<Fragment>::new(blocks);
        #[unroll]
        for block in 0..blocks {
            let offset = comptime!(depth * DEPTH * pitch(c.tile.cols, c.element) + block * 2 * PIECE);
            rows[block] = load_matrix_transposed(w, offset);
        }
        #[unroll]
        for pair in 0..pairs {
            // Of the last warps' elements some may lie past the end.
            if comptime!(of.even()) || first_pair + comptime!(pair as u32) < comptime!((c.head_dim / 16) as u32) {
                let offset = comptime!(depth * DEPTH * pitch(c.head_dim, c.element) + pair * 2 * PIECE);
                let columns = load_matrix_transposed(b, offset);
                #[unroll]
                for block in 0..blocks {
                    let x = comptime!(2 * (block * pairs + pair));
                    sums[x] = mma(rows[block], columns.extract(0usize), columns.extract(1usize), sums[x], c.element);
                    sums[x + 1] =
                        mma(rows[block], columns.extract(2usize), columns.extract(3usize), sums[x + 1], c.element);
                }
            }
        }
    }
}
