//! Rows of an operand in shared memory, and how they get there and into fragments.
//!
//! A row is padded to whole multiples of 16 elements, which the products run over, and 16 bytes more: the number of 16-byte
//! pieces between rows is then odd, so that the eight rows that a load of a matrix touches lie in different banks. With
//! elements of f32 it is one more than a multiple of four, so that what a warp reads of every second of eight rows does too.

use cubecl::prelude::*;

use super::ptx::{Fragment, copy_async};
use crate::family::ptx::{global_address, pack, store_shared_16};
use crate::problem::Element;

/// Bytes of the largest access to memory.
pub(crate) const PIECE: usize = 16;

/// Elements of 16 bits of such an access.
pub(crate) const PIECE_LEN: usize = 8;

/// Elements of 16 bits along the inner dimension of one matrix instruction; of tf32 it takes half as many.
pub(crate) const DEPTH: usize = 16;

/// A dimension as the kernels multiply it.
pub(crate) const fn padded(dim: usize) -> usize {
    dim.next_multiple_of(DEPTH)
}

/// Bytes between rows of `dim` elements (padded) in shared memory.
pub(crate) const fn pitch(dim: usize, element: Element) -> usize {
    dim * element.bytes() + PIECE
}

/// Elements of the largest access to memory.
pub(crate) const fn piece_len(element: Element) -> usize {
    PIECE / element.bytes()
}

/// The rows of one head in a tensor.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Rows {
    /// Address of the first row.
    pub address: u64,
    /// Index of its first element.
    pub base: usize,
    pub row_stride: usize,
    pub col_stride: usize,
    /// Rows that exist.
    pub rows: u32,
    /// Elements of a row.
    pub dim: u32,
}

/// The rows of head `head` of batch element `batch` of a `[B, H, S, D]` tensor.
#[cube]
pub(crate) fn head_rows<E: Float>(tensor: &Tensor<E>, batch: u32, head: u32, rows: u32, dim: u32) -> Rows {
    let bytes = E::size();
    let base = batch as usize * tensor.stride(0) + head as usize * tensor.stride(1);
    Rows {
        address: global_address::<E>(tensor.as_slice()) + base as u64 * comptime!(bytes as u64),
        base,
        row_stride: tensor.stride(2),
        col_stride: tensor.stride(3),
        rows,
        dim,
    }
}

/// Starts loading `rows` rows of `dim` elements (padded) from row `row` on to `to`; zeros where the tensor has none. In 16-byte
/// pieces if `pieces`, else element by element, which needs no alignment, and is done when this returns.
#[cube]
pub(crate) fn load_rows<E: Float>(
    tensor: &Tensor<E>,
    from: Rows,
    row: u32,
    to: u32,
    #[comptime] rows: usize,
    #[comptime] dim: usize,
    #[comptime] pieces: bool,
    #[comptime] units: usize,
    #[comptime] element: Element,
) {
    let (bytes, piece_len) = comptime!((element.bytes(), piece_len(element)));
    let per_row = comptime!(dim / piece_len);
    let passes = comptime!((rows * per_row).div_ceil(units));
    if comptime!(units.is_multiple_of(per_row)) {
        // A unit keeps its column, and walks down in steps known when the kernel is compiled.
        let down = comptime!(units / per_row);
        let (r, column) = (UNIT_POS / comptime!(per_row as u32), UNIT_POS % comptime!(per_row as u32));
        let to = to + r * comptime!(pitch(dim, element) as u32) + column * comptime!(PIECE as u32);
        let exists = select(column * comptime!(piece_len as u32) < from.dim, from.rows, 0u32);
        let step = from.row_stride as u64 * comptime!((bytes * down) as u64);
        let mut address = from.address
            + (row + r) as u64 * (from.row_stride as u64 * comptime!(bytes as u64))
            + column as u64 * comptime!(PIECE as u64);
        #[unroll]
        for pass in 0..passes {
            let here = row + r + comptime!((pass * down) as u32);
            let below = r + comptime!((pass * down) as u32);
            if comptime!((pass + 1) * down <= rows) || below < comptime!(rows as u32) {
                let offset = comptime!(pass * down * pitch(dim, element));
                load_piece::<E>(tensor, from, here, column, to, offset, address, here < exists, pieces, element);
            }
            address += step;
        }
    } else {
        #[unroll]
        for pass in 0..passes {
            let e = UNIT_POS + comptime!((pass * units) as u32);
            let (r, column) = (e / comptime!(per_row as u32), e % comptime!(per_row as u32));
            if e < comptime!((rows * per_row) as u32) {
                let to = to + r * comptime!(pitch(dim, element) as u32) + column * comptime!(PIECE as u32);
                let valid = row + r < from.rows && column * comptime!(piece_len as u32) < from.dim;
                let address = from.address
                    + (row + r) as u64 * (from.row_stride as u64 * comptime!(bytes as u64))
                    + column as u64 * comptime!(PIECE as u64);
                load_piece::<E>(tensor, from, row + r, column, to, 0usize, address, valid, pieces, element);
            }
        }
    }
}

/// Loads one piece of a row.
#[cube]
fn load_piece<E: Float>(
    tensor: &Tensor<E>,
    from: Rows,
    row: u32,
    column: u32,
    to: u32,
    #[comptime] offset: usize,
    address: u64,
    valid: bool,
    #[comptime] pieces: bool,
    #[comptime] element: Element,
) {
    if pieces {
        copy_async(to, offset, address, valid);
    } else {
        let mut words = Fragment::new(0u32);
        if valid {
            let start = from.base + row as usize * from.row_stride;
            let first = column * comptime!(piece_len(element) as u32);
            if comptime!(element == Element::F32) {
                #[unroll]
                for e in 0..4usize {
                    let d = first + comptime!(e as u32);
                    if d < from.dim {
                        words.insert(e, u32::reinterpret(f32::cast_from(tensor[start + d as usize * from.col_stride])));
                    }
                }
            } else {
                #[unroll]
                for pair in 0..4usize {
                    let d = first + comptime!(2 * pair as u32);
                    let mut low = 0.0f32;
                    let mut high = 0.0f32;
                    if d < from.dim {
                        low = f32::cast_from(tensor[start + d as usize * from.col_stride]);
                    }
                    if d + 1 < from.dim {
                        high = f32::cast_from(tensor[start + (d + 1) as usize * from.col_stride]);
                    }
                    words.insert(pair, pack(low, high, element));
                }
            }
        }
        store_shared_16(to, offset, words);
    }
}

/// Where this lane's row of the A operand from `at` on lies: rows `0 .. 16` of it, columns of the depth.
#[cube]
pub(crate) fn row_place(at: u32, #[comptime] dim: usize, #[comptime] element: Element) -> u32 {
    let lane = UNIT_POS % 32u32;
    at + (lane % 16u32) * comptime!(pitch(dim, element) as u32) + (lane / 16u32) * comptime!(PIECE as u32)
}

/// Where this lane's row of two transposed B operands lies, whose depth is rows from `at` on, and whose columns are columns `0 .. 16`; of
/// f32, where its first element of one lies, whose depth is rows `0, 2, 4, 6` and then `1, 3, 5, 7`.
#[cube]
pub(crate) fn depth_place(at: u32, #[comptime] dim: usize, #[comptime] element: Element) -> u32 {
    if comptime!(element == Element::F32) {
        let lane = UNIT_POS % 32u32;
        at + (lane % 4u32) * comptime!(2 * pitch(dim, element) as u32) + lane / 4u32 * 4u32
    } else {
        row_place(at, dim, element)
    }
}

/// Where this lane's row of two B operands lies, whose columns are rows `0 .. 16` from `at` on, and whose depth is columns.
#[cube]
pub(crate) fn column_place(at: u32, #[comptime] dim: usize, #[comptime] element: Element) -> u32 {
    let lane = UNIT_POS % 32u32;
    let row = lane % 8u32 + lane / 16u32 * 8u32;
    at + row * comptime!(pitch(dim, element) as u32) + (lane / 8u32 % 2u32) * comptime!(PIECE as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_rows_lie_in_different_banks() {
        for dim in (DEPTH..=crate::problem::MAX_HEAD_DIM).step_by(DEPTH) {
            for element in [Element::F16, Element::F32] {
                let mut banks: Vec<_> = (0..8).map(|row| row * pitch(dim, element) / PIECE % 8).collect();
                banks.sort();
                assert_eq!(banks, (0..8).collect::<Vec<_>>(), "dimension {dim} of {element:?}");
            }
        }
    }

    #[test]
    fn floats_of_every_second_row_lie_in_different_banks() {
        for dim in (DEPTH..=crate::problem::MAX_HEAD_DIM).step_by(DEPTH) {
            let lanes = (0..4).flat_map(|t| (0..8).map(move |g| 2 * t * pitch(dim, Element::F32) + 4 * g));
            let mut banks: Vec<_> = lanes.map(|byte| byte / 4 % 32).collect();
            banks.sort();
            assert_eq!(banks, (0..32).collect::<Vec<_>>(), "dimension {dim}");
        }
    }

    #[test]
    fn rows_are_padded_to_whole_instructions() {
        assert_eq!([1, 16, 17, 80, 128, 250, 256].map(padded), [16, 16, 32, 80, 128, 256, 256]);
    }
}
