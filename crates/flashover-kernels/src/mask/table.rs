//! A mask given as a list of visible blocks.

use serde::{Deserialize, Serialize};

use super::Extent;
use super::blocks::{BlockRows, BoundBlocks};
use super::error::{MaskError, at_least, broadcasts, sorted_rows};
use super::fingerprint::Fingerprint;
use super::primitive::Plane;
use super::spans::{Span, Spans};

/// Visible blocks in compressed rows (BSR without data).
///
/// Blocks are counted over the tensors themselves: block row `r` holds queries `r · bq ..`, whatever the lengths. The
/// visible key blocks of block row `r` of batch element `b` and head `h` are
/// `columns[starts[n] .. starts[n + 1]]`, ascending, with `n = (b · heads + h) · ⌈Sq / bq⌉ + r`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockTable {
    /// Queries and keys of a block.
    pub block: [u32; 2],
    /// Batch elements with rows of their own, or 1 for the same rows in all of them.
    pub batch: u32,
    /// Query heads with rows of their own, or 1 for the same rows in all of them.
    pub heads: u32,
    /// Where each block row starts in `columns`, and where the last ends.
    pub starts: Vec<u32>,
    /// Key blocks, ascending in each row.
    pub columns: Vec<u32>,
}

impl BlockTable {
    pub(super) fn bind(&self, extent: Extent) -> Result<BoundBlocks<BoundTable<'_>>, MaskError> {
        at_least("rows of a block", 1, self.block[0])?;
        at_least("columns of a block", 1, self.block[1])?;
        broadcasts("from_blocks", "batch", extent.batch, self.batch as usize)?;
        broadcasts("from_blocks", "heads", extent.heads, self.heads as usize)?;
        let rows = extent.seq_q.div_ceil(self.block[0]);
        let total = self.batch as usize * self.heads as usize * rows as usize;
        sorted_rows("from_blocks", &self.starts, &self.columns, total, extent.seq_kv.div_ceil(self.block[1]))?;
        Ok(BoundBlocks { pattern: BoundTable { table: self, rows }, block: self.block, shift: 0 })
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        out.words(&[self.block[0], self.block[1], self.batch, self.heads]);
        out.list(&self.starts);
        out.list(&self.columns);
    }
}

/// [`BlockTable`] over given lengths.
pub(super) struct BoundTable<'a> {
    table: &'a BlockTable,
    /// Block rows of a head.
    rows: u32,
}

impl BoundTable<'_> {
    fn columns(&self, plane: Plane, row: i64) -> &[u32] {
        let BlockTable { batch, heads, starts, columns, .. } = self.table;
        let b = if *batch == 1 { 0 } else { plane.b } as usize;
        let h = if *heads == 1 { 0 } else { plane.h } as usize;
        let row = (b * *heads as usize + h) * self.rows as usize + row as usize;
        &columns[starts[row] as usize..starts[row + 1] as usize]
    }
}

impl BlockRows for BoundTable<'_> {
    fn contains(&self, plane: Plane, row: i64, column: u32) -> bool {
        self.columns(plane, row).binary_search(&column).is_ok()
    }

    fn row(&self, plane: Plane, row: i64, columns: Span) -> Spans {
        let listed = self.columns(plane, row);
        let first = listed.partition_point(|&column| column < columns.start);
        let mut seen = Spans::none();
        for &column in listed[first..].iter().take_while(|&&column| column < columns.end) {
            seen.push(column as i64, column as i64 + 1, columns);
        }
        seen
    }
}
