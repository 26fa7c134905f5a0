//! Sums in registers become rows of a tensor.

use cubecl::prelude::*;

use super::config::{COLS, MmaTile, ROWS, WARP};
use super::ptx::{Sums, store_global_2, store_global_16, store_shared, store_shared_8};
use super::tile::{DEPTH, PIECE, PIECE_LEN, piece_len, pitch};
use crate::family::ptx::{global_address, load_shared_16, pack};
use crate::family::rounding::lost;
use crate::problem::Element;

/// Writes `acc · factor`, rounded, to rows `row ..` of a contiguous tensor whose first row of this head is `first`, and of which
/// the head has `rows`: through this warp's rows of shared memory from `at` on, in 16-byte pieces, where rows are whole numbers
/// of them. `factor` has one for each row of this lane. With `rest` not the numbers but what rounding takes from them. The caller
/// sees to it that nobody uses that memory.
#[cube]
pub(crate) fn store_rows<E: Float>(
    acc: &Array<Sums>,
    factor: &Array<f32>,
    out: &mut [E],
    first: usize,
    row: u32,
    rows: u32,
    at: u32,
    width: u32,
    #[comptime] dim: usize,
    #[comptime] rest: bool,
    #[comptime] tile: MmaTile,
    #[comptime] element: Element,
) {
    let (blocks, value_blocks) = comptime!((tile.blocks, dim / COLS));
    let lane = UNIT_POS % comptime!(WARP as u32);
    let warp_row = UNIT_POS / comptime!(WARP as u32) * comptime!((blocks * ROWS) as u32);
    let (bytes, pitch, piece_len) = comptime!((element.bytes(), pitch(dim, element), piece_len(element)));
    let whole = width.is_multiple_of(comptime!(piece_len as u32));
    if whole {
        let at = at + warp_row * comptime!(pitch as u32);
        let to = at + lane / 4 * comptime!(pitch as u32) + lane % 4 * comptime!(2 * bytes as u32);
        #[unroll]
        for x in 0..comptime!(blocks * value_blocks) {
            #[unroll]
            for half in 0..2usize {
                let factor = factor[comptime!(x / value_blocks * 2 + half)];
                let low = acc[x].extract(comptime!(2 * half)) * factor;
                let high = acc[x].extract(comptime!(2 * half + 1)) * factor;
                let below = comptime!(x / value_blocks * ROWS + half * 8);
                let offset = comptime!(below * pitch + x % value_blocks * COLS * bytes);
                if comptime!(element == Element::F32) {
                    store_shared_8(to, offset, u32::reinterpret(low), u32::reinterpret(high));
                } else {
                    store_shared(to, offset, rounded(low, high, rest, element));
                }
            }
        }
        sync_plane();
        let start = global_address::<E>(&*out);
        let per_row = width / comptime!(piece_len as u32);
        let mut e = lane;
        while e < per_row * comptime!((blocks * ROWS) as u32) {
            let (r, piece) = (e / per_row, e % per_row);
            let i = row + warp_row + r;
            if i < rows {
                let from = at + r * comptime!(pitch as u32) + piece * comptime!(PIECE as u32);
                let bytes = (first + i as usize) as u64 * u64::cast_from(width * comptime!(bytes as u32))
                    + u64::cast_from(piece) * comptime!(PIECE as u64);
                store_global_16(start + bytes, load_shared_16(from, 0usize));
            }
            e += comptime!(WARP as u32);
        }
    } else {
        #[unroll]
        for x in 0..comptime!(blocks * value_blocks) {
            #[unroll]
            for z in 0..4usize {
                let below = comptime!((x / value_blocks * ROWS + z / 2 * 8) as u32);
                let i = row + warp_row + lane / 4 + below;
                let d = lane % 4 * 2 + comptime!((x % value_blocks * COLS + z % 2) as u32);
                if i < rows && d < width {
                    let y = acc[x].extract(z) * factor[comptime!(x / value_blocks * 2 + z / 2)];
                    let to = (first + i as usize) * width as usize + d as usize;
                    if rest {
                        let lost = rounded(y, 0.0f32, rest, element);
                        store_global_2(global_address::<E>(&*out) + to as u64 * 2u64, lost);
                    } else {
                        out[to] = E::cast_from(y);
                    }
                }
            }
        }
    }
}

/// [`store_rows`] where two warps share 32 rows and each has half the elements of them, and with one factor: through the shared memory
/// of the whole tile, that the caller's cube is done with.
#[cube]
pub(crate) fn store_halves<E: Float>(
    acc: &Array<Sums>,
    factor: f32,
    out: &mut [E],
    first: usize,
    row: u32,
    rows: u32,
    at: u32,
    width: u32,
    #[comptime] dim: usize,
    #[comptime] tile: MmaTile,
    #[comptime] element: Element,
) {
    let (warp, lane) = (UNIT_POS / comptime!(WARP as u32), UNIT_POS % comptime!(WARP as u32));
    let warp_row = warp / 2 * comptime!(2 * ROWS as u32) + lane / 4;
    // The second warp's last blocks may lie past the end.
    let (col_blocks, pitch) = comptime!((2 * (dim / DEPTH).div_ceil(2), pitch(dim, element)));
    let first_block = warp % 2 * comptime!(col_blocks as u32);
    if width.is_multiple_of(comptime!(PIECE_LEN as u32)) {
        let to = at + warp_row * comptime!(pitch as u32) + first_block * comptime!(PIECE as u32) + lane % 4 * 4;
        #[unroll]
        for x in 0..comptime!(2 * col_blocks) {
            if first_block + comptime!((x % col_blocks) as u32) < comptime!((dim / COLS) as u32) {
                #[unroll]
                for half in 0..2usize {
                    let low = acc[x].extract(comptime!(2 * half)) * factor;
                    let high = acc[x].extract(comptime!(2 * half + 1)) * factor;
                    let down = comptime!(x / col_blocks * ROWS + half * 8);
                    let offset = comptime!(down * pitch + x % col_blocks * PIECE);
                    store_shared(to, offset, pack(low, high, element));
                }
            }
        }
        sync_cube();
        let start = global_address::<E>(&*out);
        let per_row = width / comptime!(PIECE_LEN as u32);
        let mut e = UNIT_POS;
        while e < per_row * comptime!(tile.rows() as u32) {
            let (r, piece) = (e / per_row, e % per_row);
            if row + r < rows {
                let from = at + r * comptime!(pitch as u32) + piece * comptime!(PIECE as u32);
                let bytes = (first + (row + r) as usize) as u64 * u64::cast_from(width * 2)
                    + u64::cast_from(piece) * comptime!(PIECE as u64);
                store_global_16(start + bytes, load_shared_16(from, 0usize));
            }
            e += comptime!(tile.units() as u32);
        }
    } else {
        #[unroll]
        for x in 0..comptime!(2 * col_blocks) {
            #[unroll]
            for z in 0..4usize {
                let i = row + warp_row + comptime!((x / col_blocks * ROWS + z / 2 * 8) as u32);
                let block = first_block + comptime!((x % col_blocks) as u32);
                let d = block * comptime!(COLS as u32) + lane % 4 * 2 + comptime!((z % 2) as u32);
                if i < rows && d < width {
                    out[(first + i as usize) * width as usize + d as usize] = E::cast_from(acc[x].extract(z) * factor);
                }
            }
        }
    }
}

/// Two floats rounded to a register, or what rounding takes from them.
#[cube]
fn rounded(low: f32, high: f32, #[comptime] rest: bool, #[comptime] element: Element) -> u32 {
    let mut pair = pack(low, high, element);
    if rest {
        pair = lost(low, high, pair, element);
    }
    pair
}
