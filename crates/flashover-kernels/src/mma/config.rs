//! Tiles, and what of a problem is compiled into a kernel.

use super::tile::{PIECE_LEN, padded, pitch};
use crate::block_plan::TileSize;
use crate::device::DeviceTensor;
use crate::family::tile_shape::TileShape;
use crate::problem::{Element, Problem};

/// Rows of one matrix instruction.
pub(crate) const ROWS: usize = 16;

/// Columns of one matrix instruction.
pub(crate) const COLS: usize = 8;

/// Units of a warp.
pub(crate) const WARP: usize = 32;

/// Tiles of rows that are loaded ahead.
pub(crate) const STAGES: usize = 2;

/// Sizes of a cube's tile, known when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MmaConfig {
    /// Warps of a cube, one above the other.
    pub warps: usize,
    /// Blocks of 16 rows of a warp: a block of the other operand is read from shared memory once for all of them.
    pub blocks: usize,
    /// Columns of the tile.
    pub cols: usize,
}

impl MmaConfig {
    /// 128×64: for head dimensions up to 128.
    pub const LARGE: MmaConfig = MmaConfig { warps: 4, blocks: 2, cols: 64 };
    /// 64×32: head dimensions whose sums take half the registers for one block of rows.
    pub const DEEP: MmaConfig = MmaConfig { warps: 4, blocks: 1, cols: 32 };
    /// 64×64: few queries, or a plan of small tiles.
    pub const SMALL: MmaConfig = MmaConfig { warps: 4, blocks: 1, cols: 64 };

    /// Rows of the tile.
    pub const fn rows(&self) -> usize {
        self.warps * self.blocks * ROWS
    }

    /// Units of a cube.
    pub const fn units(&self) -> usize {
        self.warps * WARP
    }

    /// Rows and columns.
    pub(crate) const fn shape(&self) -> TileShape {
        TileShape { rows: self.rows(), cols: self.cols }
    }

    /// Whether a tile of a plan consists of whole tiles, whichever way they lie.
    pub const fn divides(&self, plan: TileSize) -> bool {
        self.shape().divides(plan)
    }

    /// Shared memory in bytes of the cube that takes most.
    pub fn shared_bytes(&self, problem: &Problem) -> usize {
        self.forward_shared_bytes(problem)
    }

    /// Shared memory of a forward's cube in bytes: the queries, whose place the output takes, and the stages of keys and values.
    pub(crate) fn forward_shared_bytes(&self, problem: &Problem) -> usize {
        let (k, v) = (pitch(padded(problem.head_dim)), pitch(padded(problem.value_dim)));
        self.rows() * k.max(v) + STAGES * self.cols * (k + v)
    }
}

impl core::fmt::Display for MmaConfig {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "tile {}x{}, {} warps", self.rows(), self.cols, self.warps)
    }
}

/// What of a problem and its tensors is compiled in, because it costs registers or changes how memory is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Compiled {
    pub tile: MmaConfig,
    pub element: Element,
    /// Padded dimensions.
    pub head_dim: usize,
    pub value_dim: usize,
    /// Whether rows are read in 16-byte pieces.
    pub q_pieces: bool,
    pub k_pieces: bool,
    pub v_pieces: bool,
    /// Likewise the gradient of the output.
    pub do_pieces: bool,
    /// Whether a score is more than a product by a positive scale, or its probability is dropped.
    pub options: bool,
}

impl Compiled {
    pub fn of(problem: &Problem, tile: MmaConfig, [q, k, v]: [&DeviceTensor; 3], do_: Option<&DeviceTensor>) -> Self {
        let Problem { element, head_dim, value_dim, scale, softcap, alibi, dropout, .. } = *problem;
        Compiled {
            tile,
            element,
            head_dim: padded(head_dim),
            value_dim: padded(value_dim),
            q_pieces: in_pieces(q),
            k_pieces: in_pieces(k),
            v_pieces: in_pieces(v),
            do_pieces: do_.is_none_or(in_pieces),
            // Folded into the exponent, the scale must keep the order of scores.
            options: softcap.is_some()
                || alibi
                || problem.bias.is_some()
                || dropout.is_some()
                || scale as f32 <= f32::MIN_POSITIVE,
        }
    }
}

/// Whether every row of a `[B, H, S, D]` tensor is a whole number of aligned 16-byte pieces.
pub(crate) fn in_pieces(tensor: &DeviceTensor) -> bool {
    let outer = tensor.shape.iter().zip(&tensor.strides).take(3);
    let aligned = outer.into_iter().all(|(&size, &stride)| size <= 1 || stride.is_multiple_of(PIECE_LEN));
    let offset = tensor.handle.offset_start.unwrap_or(0) as usize;
    let neighbours = tensor.strides[3] == 1 || tensor.shape[3] == 1;
    aligned
        && neighbours
        && tensor.shape[3].is_multiple_of(PIECE_LEN)
        && offset.is_multiple_of(super::tile::PIECE)
}
