//! Making a plan exact.

use super::BlockPlan;
use super::lists::BlockLists;
use crate::mask::TileKind;

impl BlockPlan {
    /// Whether every Partial tile has a visible and a hidden point (or is cut off by the end of the keys).
    pub fn is_exact(&self) -> bool {
        let ones = self.ones();
        (0..self.rows.rows()).all(|row| {
            let bitmaps = self.rows.row(row).bitmaps;
            bitmaps.iter().all(|&bitmap| self.kind(row, ones[bitmap as usize]) == TileKind::Partial)
        })
    }

    /// Drops Partial tiles without a visible point, makes Full what has no hidden one, and forgets bitmaps that no
    /// tile needs any more.
    ///
    /// The points of Partial tiles were visited when the plan was built, because kernels need their bitmaps; so this
    /// takes time of the listed blocks.
    pub fn refine(self) -> Self {
        if self.is_exact() {
            return self;
        }
        let ones = self.ones();
        let mut renumbered = vec![None; ones.len()];
        let mut bitmaps = Vec::new();
        let mut rows = BlockLists::with_capacity(self.rows.rows());
        for row in 0..self.rows.rows() {
            let blocks = self.rows.row(row);
            let mut full = blocks.full.to_vec();
            for (&tile, &bitmap) in blocks.partial.iter().zip(blocks.bitmaps) {
                match self.kind(row, ones[bitmap as usize]) {
                    TileKind::Empty => {}
                    TileKind::Full => full.push(tile),
                    TileKind::Partial => {
                        let kept = *renumbered[bitmap as usize].get_or_insert_with(|| {
                            let id = bitmaps.len() / self.tile.bitmap_words();
                            bitmaps.extend_from_slice(self.bitmap(bitmap));
                            id as u32
                        });
                        rows.push_partial(tile, kept);
                    }
                }
            }
            full.sort_unstable();
            rows.full.append(&mut full);
            rows.end_row().expect("a refined plan lists no more blocks than before");
        }
        BlockPlan::assemble(self.extent, self.tile, self.fingerprint, rows, bitmaps)
    }

    /// What a tile of the row is whose bitmap has so many ones.
    fn kind(&self, row: usize, ones: u32) -> TileKind {
        let queries = self.tile.queries(self.extent, row as u32 % self.query_tiles()).len() as u32;
        // A tile that is cut off has bits of 0 and never gets here.
        if ones == queries * self.tile.bk {
            TileKind::Full
        } else if ones == 0 {
            TileKind::Empty
        } else {
            TileKind::Partial
        }
    }
}
