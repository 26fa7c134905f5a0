//! Rows of an operand in shared memory, and how they get there.
//!
//! A row is padded with zeros to whole matrices, which the products run over, and 16 bytes more: the number of 16-byte pieces
//! between rows is then odd, so that eight neighbouring rows lie in different banks.

use cubecl::prelude::*;

use super::config::CmmaTile;

/// Elements of an access to memory: WebGPU's and Vulkan's vectors have no more.
pub(crate) const LANES: usize = 4;

/// Four scores.
pub(crate) type V4 = Vector<f32, Const<4>>;

/// Four elements of an operand, or of a tile of weights.
pub(crate) type E4<E> = Vector<E, Const<4>>;

/// What a dimension is padded to: the edge of the largest matrix.
pub(crate) const EDGE: usize = 16;

/// A dimension as the kernels multiply it.
pub(crate) const fn padded(dim: usize) -> usize {
    dim.next_multiple_of(EDGE)
}

/// Elements between rows of `dim` 16-bit elements in shared memory.
pub(crate) const fn pitch(dim: usize) -> usize {
    dim + 8
}

/// Elements between rows of `cols` f32 scores in shared memory.
pub(crate) const fn score_pitch(cols: usize) -> usize {
    cols + 4
}

/// The rows of one head in a tensor.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Rows {
    /// Index of the first row's first element.
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
pub(crate) fn head_rows<E: Float, N: Size>(
    tensor: &Tensor<Vector<E, N>>,
    batch: u32,
    head: u32,
    rows: u32,
    dim: u32,
) -> Rows {
    Rows {
        base: batch as usize * tensor.stride(0) + head as usize * tensor.stride(1),
        row_stride: tensor.stride(2),
        col_stride: tensor.stride(3),
        rows,
        dim,
    }
}

/// Copies `rows` rows of `dim` elements (padded) from row `row` on to `to[at..]`; zeros where the tensor has none. `N` elements at a
/// time: 4 where every row is a whole number of aligned vectors, else 1, by any strides.
#[cube]
pub(crate) fn load_rows<E: Float, N: Size>(
    tensor: &Tensor<Vector<E, N>>,
    from: Rows,
    row: u32,
    to: &mut Shared<[E4<E>]>,
    #[comptime] at: usize,
    #[comptime] rows: usize,
    #[comptime] dim: usize,
    #[comptime] tile: CmmaTile,
) {
    let per_row = comptime!((dim / LANES) as u32);
    let vectors = comptime!((rows * dim / LANES) as u32);
    let width = N::value();
    for pass in 0..comptime!((rows * dim / LANES).div_ceil(tile.units()) as u32) {
        let e = pass * comptime!(tile.units() as u32) + UNIT_POS;
        if e < vectors {
            let (r, column) = (e / per_row, e % per_row);
            let d = column * comptime!(LANES as u32);
            let mut x = E4::<E>::new(E::from_int(0));
            if row + r < from.rows {
                let start = from.base + (row + r) as usize * from.row_stride;
                if comptime!(width == LANES) {
                    if d < from.dim {
                        x = E4::<E>::cast_from(tensor[(start + d as usize) / comptime!(LANES)]);
                    }
                } else {
                    #[unroll]
                    for lane in 0..LANES {
                        let d = d + comptime!(lane as u32);
                        if d < from.dim {
                            x.insert(lane, tensor[start + d as usize * from.col_stride].extract(0usize));
                        }
                    }
                }
            }
            to[comptime!(at / LANES) + (r * comptime!((pitch(dim) / LANES) as u32) + column) as usize] = x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eight_rows_lie_in_different_banks() {
        for dim in (EDGE..=crate::problem::MAX_HEAD_DIM).step_by(EDGE) {
            for bytes in [2 * pitch(dim), 4 * score_pitch(dim)] {
                assert!((bytes / 16).is_multiple_of(2) != bytes.is_multiple_of(16), "dimension {dim}: {bytes}");
                let mut banks: Vec<_> = (0..8).map(|row| row * bytes / 16 % 8).collect();
                banks.sort();
                assert_eq!(banks, (0..8).collect::<Vec<_>>(), "dimension {dim}");
            }
        }
    }
}
