//! A plan as it is kept in a file: its rows and bitmaps. What follows from them is derived again, and nothing that a
//! kernel would trust is taken unchecked.

use serde::{Deserialize, Serialize};

use super::import::check_lists;
use super::lists::BlockLists;
use super::{BlockPlan, Bsr, TileSize};
use crate::mask::{Extent, MaskError};

#[derive(Serialize, Deserialize)]
pub(super) struct Stored {
    extent: Extent,
    tile: TileSize,
    fingerprint: Option<u64>,
    full_starts: Vec<u32>,
    full: Vec<u32>,
    partial_starts: Vec<u32>,
    partial: Vec<u32>,
    partial_bitmaps: Vec<u32>,
    bitmaps: Vec<u32>,
}

impl From<BlockPlan> for Stored {
    fn from(plan: BlockPlan) -> Self {
        let BlockLists { full_starts, full, partial_starts, partial, bitmaps } = plan.rows;
        Stored {
            extent: plan.extent,
            tile: plan.tile,
            fingerprint: plan.fingerprint,
            full_starts,
            full,
            partial_starts,
            partial,
            partial_bitmaps: bitmaps,
            bitmaps: plan.bitmaps,
        }
    }
}

impl TryFrom<Stored> for BlockPlan {
    type Error = MaskError;

    fn try_from(stored: Stored) -> Result<Self, MaskError> {
        let Stored { extent, tile, fingerprint, full_starts, full, partial_starts, partial, .. } = stored;
        tile.check(extent)?;
        let lists = |indptr, indices| Bsr { indptr, indices };
        check_lists(extent, tile, lists(&full_starts, &full), lists(&partial_starts, &partial))?;
        let rows = BlockLists { full_starts, full, partial_starts, partial, bitmaps: stored.partial_bitmaps };
        check_bitmaps(extent, tile, &rows, &stored.bitmaps)?;
        Ok(BlockPlan::assemble(extent, tile, fingerprint, rows, stored.bitmaps))
    }
}

/// Checks that every Partial block has a bitmap, and that no tile shows points outside the tensors.
fn check_bitmaps(extent: Extent, tile: TileSize, rows: &BlockLists, bitmaps: &[u32]) -> Result<(), MaskError> {
    let each = tile.bitmap_words();
    let count = bitmaps.len() / each;
    let starts = extent.planes() * tile.query_tiles(extent) as usize + 1;
    for (what, expected, found) in [
        ("row starts of full blocks", starts, rows.full_starts.len()),
        ("row starts of partial blocks", starts, rows.partial_starts.len()),
        ("bitmaps of partial blocks", rows.partial.len(), rows.bitmaps.len()),
        ("words of bitmaps", count * each, bitmaps.len()),
    ] {
        if expected != found {
            return Err(MaskError::ArrayLength { what, expected, found });
        }
    }
    if let Some(&found) = rows.bitmaps.iter().find(|&&bitmap| bitmap as usize >= count) {
        return Err(MaskError::Bitmap { limit: count, found });
    }
    // How many queries and keys each bitmap shows anything of.
    let shown: Vec<(u32, u32)> = bitmaps.chunks_exact(each).map(|words| shown(tile, words)).collect();
    for row in 0..rows.rows() {
        let blocks = rows.row(row);
        let queries = tile.queries(extent, row as u32 % tile.query_tiles(extent)).len() as u32;
        if let Some(&found) = blocks.full.iter().find(|&&j| (tile.keys(extent, j).len() as u32) < tile.bk) {
            return Err(MaskError::CutOff { row, found });
        }
        for (&j, &bitmap) in blocks.partial.iter().zip(blocks.bitmaps) {
            let (rows_shown, columns_shown) = shown[bitmap as usize];
            if rows_shown > queries || columns_shown > tile.keys(extent, j).len() as u32 {
                return Err(MaskError::CutOff { row, found: j });
            }
        }
    }
    Ok(())
}

/// The last query and the last key of a bitmap with a visible point, counted from 1.
fn shown(tile: TileSize, words: &[u32]) -> (u32, u32) {
    let (mut rows, mut columns) = (0, 0);
    for (row, bits) in (1..).zip(words.chunks_exact(tile.row_words())) {
        for (word, base) in bits.iter().zip((0..).step_by(32)) {
            if *word != 0 {
                rows = row;
                columns = columns.max(base + 32 - word.leading_zeros());
            }
        }
    }
    (rows, columns)
}
