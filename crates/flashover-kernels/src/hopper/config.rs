//! Tiles of the Hopper kernels.

use crate::family::tile_shape::TileShape;

/// Elements of a row of a piece: 128 bytes, the width that the copy engine swizzles.
pub(crate) const PIECE: usize = 64;

/// Threads of a warpgroup.
pub(crate) const WARPGROUP: usize = 128;

/// Rows of a warpgroup's products.
pub(crate) const ROWS: usize = 64;

/// Shape of a forward: known when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HopperConfig {
    /// Warpgroups that compute, of 64 queries each.
    pub consumers: usize,
    /// Keys of a tile.
    pub bk: usize,
    /// Head dimension of queries and keys, padded to what a product takes.
    pub head_dim: usize,
    /// Head dimension of values, likewise.
    pub value_dim: usize,
    /// Tiles of keys, and of values, in flight.
    pub stages: usize,
    /// Whether only position and length hide and only the scale changes a score: what else there is costs registers.
    pub plain: bool,
    /// Whether a block plan lists the tiles.
    pub listed: bool,
    pub flags: u32,
}

impl HopperConfig {
    /// Queries of a tile.
    pub const fn bq(&self) -> usize {
        self.consumers * ROWS
    }

    pub(crate) const fn shape(&self) -> TileShape {
        TileShape { rows: self.bq(), cols: self.bk }
    }

    /// Pieces of a row of `dim` elements.
    pub(crate) const fn pieces(dim: usize) -> usize {
        dim.div_ceil(PIECE)
    }

    /// Units of a cube: the consumers and the producer.
    pub const fn units(&self) -> usize {
        (self.consumers + 1) * WARPGROUP
    }

    /// Elements of the query tile, of a key tile and of a value tile in shared memory.
    pub(crate) const fn elements(&self) -> [usize; 3] {
        let (d, dv) = (Self::pieces(self.head_dim) * PIECE, Self::pieces(self.value_dim) * PIECE);
        [self.bq() * d, self.bk * d, self.bk * dv]
    }

    /// Shared memory of a cube in bytes, barriers included.
    pub const fn shared_bytes(&self) -> usize {
        let [q, k, v] = self.elements();
        (q + self.stages * (k + v)) * size_of::<u16>() + (2 + 4 * self.stages) * size_of::<u64>()
    }

    /// Registers a thread of the consumers, and of the producer, once they are dealt out: 65,536 in all.
    pub(crate) const fn registers(&self) -> (u32, u32) {
        match self.consumers {
            1 => (240, 24),
            2 => (240, 24),
            _ => (160, 32),
        }
    }
}

impl core::fmt::Display for HopperConfig {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let HopperConfig { consumers, bk, head_dim, value_dim, stages, .. } = self;
        write!(f, "tile {}x{bk}, {consumers} warpgroups, {stages} stages, head {head_dim}, values {value_dim}", self.bq())
    }
}

impl HopperConfig {
    /// Registers, in powers of 2 as vectors want them, of a thread's scores, output and packed weights.
    pub(crate) const fn lanes(&self) -> [usize; 3] {
        [
            (self.bk / 2).next_power_of_two(),
            (self.value_dim / 2).next_power_of_two(),
            (self.bk / 4).next_power_of_two(),
        ]
    }
}
