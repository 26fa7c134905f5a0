//! Plans from what other libraries keep: dense booleans, compressed block rows, and padded arrays of indices.

use std::ops::Range;

use super::bitmaps::Dictionary;
use super::lists::BlockLists;
use super::{BlockPlan, PlanOptions, TileSize};
use crate::mask::error::sorted_rows;
use crate::mask::primitive::Plane;
use crate::mask::spans::Span;
use crate::mask::{Extent, Mask, MaskError};

/// Names of the lists in messages.
const FULL: &str = "full blocks";
const PARTIAL: &str = "partial blocks";

/// Blocks in compressed rows: the key tiles of row `r` are `indices[indptr[r] .. indptr[r + 1]]`, ascending, with
/// `r = (b · heads + h) · query tiles + i` (the index arrays of SciPy's BSR, and of FlashInfer).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bsr<'a> {
    /// Start of each row in `indices`, and the end of the last.
    pub indptr: &'a [u32],
    /// Key tiles.
    pub indices: &'a [u32],
}

impl Bsr<'_> {
    /// The key tiles of a row; an array without rows lists nothing.
    fn row(&self, row: usize) -> &[u32] {
        match (self.indptr.get(row), self.indptr.get(row + 1)) {
            (Some(&start), Some(&end)) => &self.indices[start as usize..end as usize],
            _ => &[],
        }
    }

    fn check(&self, what: &'static str, rows: usize, tiles: u32) -> Result<(), MaskError> {
        if self.indptr.is_empty() && self.indices.is_empty() {
            return Ok(());
        }
        sorted_rows(what, self.indptr, self.indices, rows, tiles)
    }
}

/// Blocks in padded rows: the key tiles of row `r` are the first `counts[r]` of `indices[r · width ..]`, ascending,
/// with rows as in [`Bsr`]; no rows at all list nothing (`kv_num_blocks` and `kv_indices` of FlexAttention's BlockMask).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Padded {
    /// Blocks of each row.
    pub counts: Vec<u32>,
    /// Key tiles, and padding behind them.
    pub indices: Vec<u32>,
    /// Indices of a row with its padding.
    pub width: usize,
}

impl Padded {
    fn compressed(&self, what: &'static str) -> Result<(Vec<u32>, Vec<u32>), MaskError> {
        let (expected, found) = (self.counts.len() * self.width, self.indices.len());
        if expected != found {
            return Err(MaskError::ArrayLength { what, expected, found });
        }
        if self.counts.is_empty() {
            return Ok((vec![], vec![]));
        }
        let (mut indptr, mut indices) = (vec![0], Vec::new());
        for (row, &found) in self.counts.iter().enumerate() {
            let listed = &self.indices[row * self.width..][..self.width];
            let Some(listed) = listed.get(..found as usize) else {
                return Err(MaskError::Count { what, row, limit: self.width, found });
            };
            indices.extend_from_slice(listed);
            indptr.push(indices.len() as u32);
        }
        Ok((indptr, indices))
    }
}

impl BlockPlan {
    /// The plan of dense booleans `[B, H, Sq, Skv]` in row-major order, `true` attending: exact, and the same as that of
    /// [`Mask::from_dense`].
    pub fn from_dense(shape: [u32; 4], visible: &[bool], tile: TileSize) -> Result<Self, MaskError> {
        let [batch, heads, seq_q, seq_kv] = shape;
        let mask = Mask::from_dense(shape, visible)?;
        BlockPlan::new(&mask, Extent { batch, heads, seq_q, seq_kv }, tile)
    }

    /// The plan that lists the given blocks, which are taken at their word: `full` ones are visible whole, in `partial`
    /// ones the mask decides, and what is not listed is hidden whatever the mask says.
    ///
    /// `extent` has the batch elements and heads that the arrays have rows for, 1 where they are shared. Either array
    /// may be left empty (no `indptr` at all).
    ///
    /// # Errors
    /// Starts and indices that do not fit the rows and tiles, that are unsorted, or that are listed twice; partial
    /// blocks without a mask; what [`Mask::bind`] finds; and those of [`BlockPlan::with_options`].
    pub fn from_bsr(
        extent: Extent,
        tile: TileSize,
        full: Bsr,
        partial: Bsr,
        mask: Option<&Mask>,
        options: PlanOptions,
    ) -> Result<Self, MaskError> {
        tile.check(extent)?;
        check_lists(extent, tile, full, partial)?;
        let bound = mask.map(|mask| mask.bind(extent)).transpose()?;
        let mut dictionary = Dictionary::new(tile, options.max_bitmap_bytes);
        let row_count = extent.planes() * tile.query_tiles(extent) as usize;
        let mut rows = BlockLists::with_capacity(row_count);
        for row in 0..row_count {
            let (plane, queries) = row_of(extent, tile, row);
            let mut cut_off = None;
            for &j in full.row(row) {
                match tile.keys(extent, j) {
                    keys if keys.len() as u32 == tile.bk => rows.full.push(j),
                    keys => cut_off = Some((j, dictionary.of_visible(queries.len() as u32, keys.len() as u32)?)),
                }
            }
            for &j in partial.row(row) {
                let found = partial.indices.len();
                let mask = bound.as_ref().ok_or(MaskError::PartialWithoutMask { found })?;
                let Range { start, end } = tile.keys(extent, j);
                rows.push_partial(j, dictionary.of_mask(mask, plane, queries.clone(), Span { start, end })?);
            }
            // Only the last key tile can be cut off, so it comes after every other.
            if let Some((j, bitmap)) = cut_off {
                rows.push_partial(j, bitmap);
            }
            rows.end_row()?;
        }
        Ok(BlockPlan::assemble(extent, tile, mask.map(Mask::fingerprint), rows, dictionary.finish()))
    }

    /// [`from_bsr`](Self::from_bsr) of padded arrays.
    pub fn from_padded(
        extent: Extent,
        tile: TileSize,
        full: &Padded,
        partial: &Padded,
        mask: Option<&Mask>,
        options: PlanOptions,
    ) -> Result<Self, MaskError> {
        let (full_ptr, full) = full.compressed(FULL)?;
        let (partial_ptr, partial) = partial.compressed(PARTIAL)?;
        let full = Bsr { indptr: &full_ptr, indices: &full };
        let partial = Bsr { indptr: &partial_ptr, indices: &partial };
        BlockPlan::from_bsr(extent, tile, full, partial, mask, options)
    }

    /// The Full and the Partial key tiles of every row.
    pub fn to_bsr(&self) -> (Bsr<'_>, Bsr<'_>) {
        let BlockLists { full_starts, full, partial_starts, partial, .. } = &self.rows;
        (Bsr { indptr: full_starts, indices: full }, Bsr { indptr: partial_starts, indices: partial })
    }

    /// The same in padded arrays as wide as there are key tiles, the padding being 0.
    pub fn to_padded(&self) -> (Padded, Padded) {
        let width = self.key_tiles() as usize;
        let padded = |bsr: Bsr| {
            let mut out = Padded { counts: vec![], indices: vec![], width };
            for row in 0..self.rows.rows() {
                let listed = bsr.row(row);
                out.counts.push(listed.len() as u32);
                out.indices.extend_from_slice(listed);
                out.indices.resize((row + 1) * width, 0);
            }
            out
        };
        let (full, partial) = self.to_bsr();
        (padded(full), padded(partial))
    }
}

/// Batch element, head and queries of a row.
fn row_of(extent: Extent, tile: TileSize, row: usize) -> (Plane, Range<u32>) {
    let tiles = tile.query_tiles(extent);
    let plane = row as u32 / tiles;
    (Plane { b: plane / extent.heads, h: plane % extent.heads }, tile.queries(extent, row as u32 % tiles))
}

/// Checks that both lists fit the tiles and have no block in common.
pub(super) fn check_lists(extent: Extent, tile: TileSize, full: Bsr, partial: Bsr) -> Result<(), MaskError> {
    let rows = extent.planes() * tile.query_tiles(extent) as usize;
    full.check(FULL, rows, tile.key_tiles(extent))?;
    partial.check(PARTIAL, rows, tile.key_tiles(extent))?;
    for row in 0..rows {
        if let Some(&found) = full.row(row).iter().find(|j| partial.row(row).binary_search(j).is_ok()) {
            return Err(MaskError::BothKinds { row, found });
        }
    }
    Ok(())
}
