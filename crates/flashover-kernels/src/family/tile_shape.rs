//! Rows and columns of a kernel's tile.

use crate::block_plan::TileSize;

/// A kernel's tile: rows are the side that a cube owns, columns the side that it walks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct TileShape {
    pub rows: usize,
    pub cols: usize,
}

impl TileShape {
    /// The same tile from the other side.
    pub const fn turned(self) -> Self {
        TileShape { rows: self.cols, cols: self.rows }
    }

    /// Whether a tile of a plan consists of whole tiles, whichever way they lie.
    pub const fn divides(&self, plan: TileSize) -> bool {
        let (bq, bk) = (plan.bq as usize, plan.bk as usize);
        let whole = bq.is_multiple_of(self.rows) && bk.is_multiple_of(self.rows);
        whole && bq.is_multiple_of(self.cols) && bk.is_multiple_of(self.cols)
    }
}
