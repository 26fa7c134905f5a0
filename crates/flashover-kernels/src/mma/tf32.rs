//! The two shapes of product for elements of f32: each product of two elements as three of tf32.
//!
//! ```text
//! x = big + small          big: x rounded to the 11 bits of tf32; small: the rest, of which an instruction takes the first 11
//! x · y ≈ big · big + big · small + small · big
//! ```
//!
//! Ootomo and Yokota, arXiv 2203.03341. Instructions cut their sums instead of rounding them, which over a long row would be a drift to
//! 0: so they add up short stretches, from 0, and f32 additions the stretches. What small parts give is summed apart from the
//! rest. Where an element is infinite its small part is NaN: that sum is left out, and the big parts alone say ±∞ or NaN.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, MmaTile, ROWS};
use super::ptx::{Fragment, Sums, load_matrix, load_shared, mma_tf32};
use super::tile::{DEPTH, PIECE, pitch};
use crate::family::ptx::value_of;
use crate::problem::Element;

/// Elements along the inner dimension of one matrix instruction.
const STEP: usize = DEPTH / 2;

/// [`product`](super::products::product) of elements of f32.
#[cube]
pub(crate) fn product_tf32(s: &mut Array<Sums>, a: u32, b: u32, #[comptime] dim: usize, #[comptime] tile: MmaTile) {
    let (blocks, col_blocks, pitch) = comptime!((tile.blocks, tile.cols / COLS, pitch(dim, Element::F32)));
    let mut small = Array::<Sums>::new(comptime!(blocks * col_blocks));
    #[unroll]
    for x in 0..comptime!(blocks * col_blocks) {
        s[x] = Sums::new(0.0f32);
        small[x] = Sums::new(0.0f32);
    }
    #[unroll]
    for d in 0..comptime!(dim / DEPTH) {
        let mut big_rows = Array::<Fragment>::new(comptime!(2 * blocks));
        let mut small_rows = Array::<Fragment>::new(comptime!(2 * blocks));
        #[unroll]
        for x in 0..comptime!(2 * blocks) {
            let at = comptime!(x / 2 * ROWS * pitch + 2 * PIECE * (2 * d + x % 2));
            let rows = load_matrix(a, at);
            big_rows[x] = big_parts(rows);
            small_rows[x] = small_parts(rows, big_rows[x]);
        }
        #[unroll]
        for pair in 0..comptime!(col_blocks / 2) {
            let mut big = Array::<Sums>::new(comptime!(2 * blocks));
            #[unroll]
            for x in 0..comptime!(2 * blocks) {
                big[x] = Sums::new(0.0f32);
            }
            #[unroll]
            for half in 0..2usize {
                let at = comptime!(pair * 2 * COLS * pitch + 2 * PIECE * (2 * d + half));
                let columns = load_matrix(b, at);
                let big_columns = big_parts(columns);
                let small_columns = small_parts(columns, big_columns);
                #[unroll]
                for x in 0..comptime!(2 * blocks) {
                    let (block, side) = comptime!((x / 2, x % 2));
                    let (row, to) = comptime!((2 * block + half, block * col_blocks + 2 * pair + side));
                    let (b0, b1) =
                        (big_columns.extract(comptime!(2 * side)), big_columns.extract(comptime!(2 * side + 1)));
                    let (s0, s1) =
                        (small_columns.extract(comptime!(2 * side)), small_columns.extract(comptime!(2 * side + 1)));
                    small[to] = mma_tf32(small_rows[row], b0, b1, small[to]);
                    big[x] = mma_tf32(big_rows[row], b0, b1, big[x]);
                    small[to] = mma_tf32(big_rows[row], s0, s1, small[to]);
                }
            }
            #[unroll]
            for x in 0..comptime!(2 * blocks) {
                let to = comptime!(x / 2 * col_blocks + 2 * pair + x % 2);
                s[to] += big[x];
            }
        }
    }
    #[unroll]
    for x in 0..comptime!(blocks * col_blocks) {
        s[x] += without_nan(small[x]);
    }
}

/// [`accumulate`](super::products::accumulate) of elements of f32, `b` at [`depth_place`](super::tile::depth_place). A lane's columns of
/// `weights`, two next to each other in each block, are rows `t` and `t + 4` of the depth: the order of a sum's terms is free.
#[cube]
pub(crate) fn accumulate_tf32(
    acc: &mut Array<Sums>,
    weights: &Array<Sums>,
    b: u32,
    #[comptime] dim: usize,
    #[comptime] c: Compiled,
) {
    let (blocks, depths, value_blocks) = comptime!((c.tile.blocks, c.tile.cols / STEP, dim / COLS));
    let pitch = comptime!(pitch(dim, Element::F32));
    let mut big_rows = Array::<Fragment>::new(comptime!(blocks * depths));
    let mut small_rows = Array::<Fragment>::new(comptime!(blocks * depths));
    #[unroll]
    for x in 0..comptime!(blocks * depths) {
        let sums = weights[x];
        let mut rows = Fragment::new(0u32);
        // (g, 2t) and (g + 8, 2t) before (g, 2t + 1) and (g + 8, 2t + 1)
        #[unroll]
        for y in 0..4usize {
            rows.insert(y, u32::reinterpret(sums.extract(comptime!(y % 2 * 2 + y / 2))));
        }
        big_rows[x] = big_parts(rows);
        small_rows[x] = small_parts(rows, big_rows[x]);
    }
    #[unroll]
    for pair in 0..comptime!(value_blocks / 2) {
        let mut big = Array::<Sums>::new(comptime!(2 * blocks));
        let mut small = Array::<Sums>::new(comptime!(2 * blocks));
        #[unroll]
        for x in 0..comptime!(2 * blocks) {
            big[x] = Sums::new(0.0f32);
            small[x] = Sums::new(0.0f32);
        }
        #[unroll]
        for depth in 0..depths {
            #[unroll]
            for side in 0..2usize {
                let at = comptime!(depth * STEP * pitch + (2 * pair + side) * COLS * size_of::<f32>());
                let (first, second) = (load_shared(b, at), load_shared(b, comptime!(at + pitch)));
                let (b0, b1) = (big_part(first), big_part(second));
                let (s0, s1) = (small_part(first, b0), small_part(second, b1));
                #[unroll]
                for block in 0..blocks {
                    let (row, x) = comptime!((block * depths + depth, 2 * block + side));
                    small[x] = mma_tf32(small_rows[row], b0, b1, small[x]);
                    big[x] = mma_tf32(big_rows[row], b0, b1, big[x]);
                    small[x] = mma_tf32(big_rows[row], s0, s1, small[x]);
                }
            }
        }
        #[unroll]
        for x in 0..comptime!(2 * blocks) {
            let to = comptime!(x / 2 * value_blocks + 2 * pair + x % 2);
            acc[to] += big[x] + without_nan(small[x]);
        }
    }
}

/// A float rounded to tf32, halves away from 0.
#[cube]
fn big_part(x: u32) -> u32 {
    (x + 0x1000u32) & 0xffff_e000u32
}

/// What rounding to `big` left of a float, exact in f32.
#[cube]
fn small_part(x: u32, big: u32) -> u32 {
    u32::reinterpret(f32::reinterpret(x) - f32::reinterpret(big))
}

/// [`big_part`] of four floats.
#[cube]
fn big_parts(x: Fragment) -> Fragment {
    let mut big = Fragment::new(0u32);
    #[unroll]
    for y in 0..4usize {
        big.insert(y, big_part(x.extract(y)));
    }
    big
}

/// [`small_part`] of four floats.
#[cube]
fn small_parts(x: Fragment, big: Fragment) -> Fragment {
    let mut small = Fragment::new(0u32);
    #[unroll]
    for y in 0..4usize {
        small.insert(y, small_part(x.extract(y), big.extract(y)));
    }
    small
}

/// Sums with a finite number in the place of each NaN: the big parts' is then infinite or NaN, and stays so.
#[cube]
fn without_nan(x: Sums) -> Sums {
    let mut y = Sums::new(0.0f32);
    #[unroll]
    for z in 0..4usize {
        let here = value_of::<f32>(x.extract(z));
        let out: f32;
        // A maximum with one NaN is the other number: here the lowest.
        gpu_asm!("max.f32 {out}, {here}, 0fFF7FFFFF;", out = out(_) out, here = in(_) here, options(pure, nomem));
        y.insert(z, out);
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(x: f32) -> (f32, f32) {
        let big = f32::from_bits(big_part(x.to_bits()));
        (big, x - big)
    }

    #[test]
    fn parts_add_up_and_are_rounded() {
        for n in 0..100_000u32 {
            let x = f32::from_bits(0x3f80_0000 | n.wrapping_mul(2_654_435_761) >> 9);
            for x in [x, -x * 1e-20, x * 3e20] {
                let (big, small) = parts(x);
                assert_eq!(big.to_bits() % 0x2000, 0, "{x}");
                assert_eq!(big + small, x);
                // Half a unit of the last of 11 bits, of which there are 2¹⁰ to the power of two below.
                assert!(small.abs() <= big.abs() / 2048.0, "{x}: {big} and {small}");
            }
        }
        assert_eq!(parts(0.0), (0.0, 0.0));
        assert_eq!(parts(1.0), (1.0, 0.0));
        let (big, small) = parts(f32::NEG_INFINITY);
        assert!(big == f32::NEG_INFINITY && small.is_nan());
        assert!(parts(f32::NAN).0.is_nan());
    }
}
