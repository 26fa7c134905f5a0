//! Block plans: which tiles of keys each tile of queries visits, and back.
//!
//! A [`BlockPlan`] lists, for each query tile, the key tiles with anything visible, Full and Partial apart, and the
//! transpose for gradients of keys and values. It is host data of the size of the lists, and of a bitmap for each
//! *distinct* Partial tile, so every kernel has one way to evaluate any mask: load a bit.
//!
//! - Rows are `(plane · query tiles + query tile)`, columns `(plane · key tiles + key tile)`, where
//!   `plane = b · heads + h`, and [`batch`](BlockPlan::batch) or [`heads`](BlockPlan::heads) is 1 if one plan serves
//!   all batch elements or heads.
//! - A Full tile has all of its keys inside the tensors, so a kernel need not test keys. Its queries may reach past
//!   `Sq`: a kernel neither reads nor stores those.
//! - The bits of points outside the tensors are 0. A tile that the end of the keys cuts off is therefore Partial.
//! - [`flat`] describes the one buffer that a kernel reads.
//! - A query tile may list nothing: its rows are `o = 0`, `lse = −∞`.
//!
//! # Memory
//! 8 bytes for each Full and 16 for each Partial block with both directions, 12 for each row and column, and
//! `4 · bq · ⌈bk / 32⌉` for each distinct Partial tile (2 KiB at 128 × 128). At worst every tile is Partial and
//! distinct: a bit a point, `Sq · Skv / 8` bytes a plane. [`PlanOptions::max_bitmap_bytes`] refuses that before it
//! happens.

mod bitmaps;
mod build;
#[allow(missing_docs)] // CubeCL's macros generate public items without docs; ours have theirs.
pub mod flat;
mod import;
mod lists;
pub mod picture;
mod refine;
mod stored;
#[cfg(test)]
mod tests;

use std::fmt;
use std::ops::Range;

use serde::{Deserialize, Serialize};

pub use self::import::{Bsr, Padded};
use self::lists::BlockLists;
pub use self::lists::Blocks;
use crate::mask::error::{at_most, broadcasts};
use crate::mask::{Extent, Mask, MaskError};
use crate::problem::Problem;

/// Queries and keys of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TileSize {
    /// Queries.
    pub bq: u32,
    /// Keys.
    pub bk: u32,
}

impl TileSize {
    /// Most queries or keys of a tile.
    pub const MAX: u32 = 4096;

    /// Words of a row of a bitmap.
    pub fn row_words(&self) -> usize {
        self.bk.div_ceil(32) as usize
    }

    /// Words of a bitmap.
    pub fn bitmap_words(&self) -> usize {
        self.bq as usize * self.row_words()
    }

    /// Tiles of queries.
    pub fn query_tiles(&self, extent: Extent) -> u32 {
        extent.seq_q.div_ceil(self.bq)
    }

    /// Tiles of keys.
    pub fn key_tiles(&self, extent: Extent) -> u32 {
        extent.seq_kv.div_ceil(self.bk)
    }

    /// Queries of tile `i`.
    pub fn queries(&self, extent: Extent, i: u32) -> Range<u32> {
        i * self.bq..((i + 1) * self.bq).min(extent.seq_q)
    }

    /// Keys of tile `j`.
    pub fn keys(&self, extent: Extent, j: u32) -> Range<u32> {
        j * self.bk..((j + 1) * self.bk).min(extent.seq_kv)
    }

    /// Checks the size, and that the tiles of an extent can be counted.
    fn check(&self, extent: Extent) -> Result<(), MaskError> {
        extent.validate()?;
        for (what, found) in [("queries of a tile", self.bq), ("keys of a tile", self.bk)] {
            if found == 0 {
                return Err(MaskError::TooSmall { what, limit: 1, found });
            }
            at_most(what, TileSize::MAX, found)?;
        }
        let tiles = u64::from(self.query_tiles(extent).max(self.key_tiles(extent)).max(1));
        let found = (extent.planes() as u64).saturating_mul(tiles);
        let limit = lists::MAX_BLOCKS as u64;
        if found > limit { Err(MaskError::TooLarge { what: "rows of tiles", limit, found }) } else { Ok(()) }
    }
}

/// What a problem knows of its plan: enough to choose a kernel, to lay out memory, and to say what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlanShape {
    /// Queries and keys of a tile.
    pub tile: TileSize,
    /// Words of the plan in [`flat`] form.
    pub words: usize,
    /// Points of the listed tiles that the plan shows, over all batch elements and query heads.
    pub points: u64,
    /// Batch elements and heads with lists of their own.
    pub planes: [usize; 2],
    /// Words of all columns' lists in [`flat`] form.
    pub column_words: usize,
}

/// How a plan is built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanOptions {
    /// Most bytes that the bitmaps of distinct Partial tiles may take; 256 MiB unless changed.
    pub max_bitmap_bytes: usize,
}

impl Default for PlanOptions {
    fn default() -> Self {
        PlanOptions { max_bitmap_bytes: 256 << 20 }
    }
}

/// The tiles that a kernel walks. Reusable as long as mask, lengths and tile size stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "stored::Stored", into = "stored::Stored")]
pub struct BlockPlan {
    /// Lengths, and the batch elements and heads that have lists of their own.
    extent: Extent,
    tile: TileSize,
    fingerprint: Option<u64>,
    rows: BlockLists,
    columns: BlockLists,
    row_order: Vec<u32>,
    column_order: Vec<u32>,
    bitmaps: Vec<u32>,
}

impl BlockPlan {
    /// Derives what follows from the rows.
    fn assemble(
        extent: Extent,
        tile: TileSize,
        fingerprint: Option<u64>,
        mut rows: BlockLists,
        bitmaps: Vec<u32>,
    ) -> Self {
        rows.shrink();
        let columns =
            rows.transposed(extent.planes(), tile.query_tiles(extent) as usize, tile.key_tiles(extent) as usize);
        let (row_order, column_order) = (rows.longest_first(), columns.longest_first());
        BlockPlan { extent, tile, fingerprint, rows, columns, row_order, column_order, bitmaps }
    }

    /// Queries and keys of a tile.
    pub fn tile(&self) -> TileSize {
        self.tile
    }

    /// Batch elements with lists of their own; 1 if all share them.
    pub fn batch(&self) -> u32 {
        self.extent.batch
    }

    /// Query heads with lists of their own; 1 if all share them.
    pub fn heads(&self) -> u32 {
        self.extent.heads
    }

    /// Lengths `[Sq, Skv]`.
    pub fn lengths(&self) -> [u32; 2] {
        [self.extent.seq_q, self.extent.seq_kv]
    }

    /// Tiles of queries.
    pub fn query_tiles(&self) -> u32 {
        self.tile.query_tiles(self.extent)
    }

    /// Tiles of keys.
    pub fn key_tiles(&self) -> u32 {
        self.tile.key_tiles(self.extent)
    }

    /// Which lists serve head `h` of batch element `b`.
    pub fn plane(&self, b: u32, h: u32) -> u32 {
        let b = if self.extent.batch == 1 { 0 } else { b };
        let h = if self.extent.heads == 1 { 0 } else { h };
        b * self.extent.heads + h
    }

    /// Key tiles of query tile `i`.
    pub fn row(&self, b: u32, h: u32, i: u32) -> Blocks<'_> {
        self.rows.row((self.plane(b, h) * self.query_tiles() + i) as usize)
    }

    /// Query tiles of key tile `j`.
    pub fn column(&self, b: u32, h: u32, j: u32) -> Blocks<'_> {
        self.columns.row((self.plane(b, h) * self.key_tiles() + j) as usize)
    }

    /// Rows of all planes (`plane · query tiles + i`), those with most blocks first. Units of work that are handed out
    /// in this order end at about the same time, because the last ones to start are the shortest.
    pub fn row_order(&self) -> &[u32] {
        &self.row_order
    }

    /// Columns of all planes (`plane · key tiles + j`), those with most blocks first.
    pub fn column_order(&self) -> &[u32] {
        &self.column_order
    }

    /// The points of a Partial tile: [`TileSize::row_words`] words for each query, lowest bit first.
    pub fn bitmap(&self, bitmap: u32) -> &[u32] {
        let each = self.tile.bitmap_words();
        &self.bitmaps[bitmap as usize * each..][..each]
    }

    /// Number of distinct bitmaps.
    pub fn bitmap_count(&self) -> usize {
        self.bitmaps.len() / self.tile.bitmap_words()
    }

    /// Full and Partial blocks that are listed, over all planes.
    pub fn block_counts(&self) -> (usize, usize) {
        (self.rows.full.len(), self.rows.partial.len())
    }

    /// Listed blocks as a fraction of all; 0 if there are none.
    pub fn density(&self) -> f64 {
        let all = self.extent.planes() as f64 * self.query_tiles() as f64 * self.key_tiles() as f64;
        if all == 0.0 { 0.0 } else { self.rows.blocks() as f64 / all }
    }

    /// Visible points, over all planes.
    pub fn points(&self) -> u64 {
        let ones = self.ones();
        let tiles = self.query_tiles() as usize;
        let row = |row: usize| {
            let queries = self.tile.queries(self.extent, (row % tiles) as u32).len() as u64;
            let blocks = self.rows.row(row);
            let partial: u64 = blocks.bitmaps.iter().map(|&bitmap| u64::from(ones[bitmap as usize])).sum();
            blocks.full.len() as u64 * queries * u64::from(self.tile.bk) + partial
        };
        (0..self.rows.rows()).map(row).sum()
    }

    /// Visible points as a fraction of all; 0 if there are none. Exact, refined or not.
    pub fn point_density(&self) -> f64 {
        let Extent { seq_q, seq_kv, .. } = self.extent;
        let all = self.extent.planes() as f64 * seq_q as f64 * seq_kv as f64;
        if all == 0.0 { 0.0 } else { self.points() as f64 / all }
    }

    /// Bytes of the plan on the host.
    pub fn bytes(&self) -> usize {
        let orders = self.row_order.len() + self.column_order.len() + self.bitmaps.len();
        self.rows.bytes() + self.columns.bytes() + orders * size_of::<u32>()
    }

    /// [`Mask::fingerprint`] of the mask that the plan was made from; `None` if it was imported without one.
    pub fn fingerprint(&self) -> Option<u64> {
        self.fingerprint
    }

    /// Checks that the plan serves a problem: its lengths, its batch and its query heads.
    pub fn check_problem(&self, problem: &Problem) -> Result<(), MaskError> {
        let extent = Extent::from(problem);
        let (expected, found) = ([extent.seq_q, extent.seq_kv], self.lengths());
        if expected != found {
            return Err(MaskError::Lengths { what: "plan", expected, found });
        }
        broadcasts("plan", "batch", extent.batch, self.batch() as usize)?;
        broadcasts("plan", "heads", extent.heads, self.heads() as usize)
    }

    /// Checks that the plan is for tiles of a kernel.
    pub fn check_tile(&self, tile: TileSize) -> Result<(), MaskError> {
        let (expected, found) = ([tile.bq, tile.bk], [self.tile.bq, self.tile.bk]);
        if expected == found { Ok(()) } else { Err(MaskError::TileSize { expected, found }) }
    }

    /// Checks that the plan was made from a mask.
    pub fn check_mask(&self, mask: &Mask) -> Result<(), MaskError> {
        let (expected, found) = (mask.fingerprint(), self.fingerprint);
        if found == Some(expected) { Ok(()) } else { Err(MaskError::AnotherMask { expected, found }) }
    }

    /// Every point of query `i`, a boolean a key, `true` where it is visible.
    pub fn query(&self, b: u32, h: u32, i: u32) -> Vec<bool> {
        let mut out = vec![false; self.extent.seq_kv as usize];
        let blocks = self.row(b, h, i / self.tile.bq);
        let keys = |j: u32| self.tile.keys(self.extent, j);
        for &j in blocks.full {
            out[keys(j).start as usize..keys(j).end as usize].fill(true);
        }
        let width = self.tile.row_words();
        for (&j, &bitmap) in blocks.partial.iter().zip(blocks.bitmaps) {
            let row = &self.bitmap(bitmap)[(i % self.tile.bq) as usize * width..][..width];
            for (c, key) in (0..).zip(keys(j)) {
                out[key as usize] = flat::bit_is_set(row[c as usize / 32], c);
            }
        }
        out
    }

    /// Visible points of each bitmap.
    fn ones(&self) -> Vec<u32> {
        let each = self.tile.bitmap_words();
        self.bitmaps.chunks_exact(each).map(|words| words.iter().map(|word| word.count_ones()).sum()).collect()
    }
}

impl fmt::Display for BlockPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BlockPlan { extent, tile, .. } = self;
        let (full, partial) = self.block_counts();
        write!(
            f,
            "{}×{} planes of {}×{} tiles ({}×{}): {full} full and {partial} partial blocks, {} bitmaps, {:.2} % of the \
             blocks and {:.2} % of the points, {:.2} MB",
            extent.batch,
            extent.heads,
            self.query_tiles(),
            self.key_tiles(),
            tile.bq,
            tile.bk,
            self.bitmap_count(),
            100.0 * self.density(),
            100.0 * self.point_density(),
            self.bytes() as f64 / 1e6,
        )
    }
}
