//! A plan as one buffer of u32 words, for kernels that can bind few buffers.
//!
//! All offsets count words from the start of the plan, so that it may lie anywhere in a larger buffer: a kernel adds
//! the base at which it finds the plan.
//!
//! ```text
//! words                 content
//! 0 .. 16               header, see [`header`]
//! ROW_STARTS ..         2 · R + 1 offsets, R = batch · heads · query tiles; row r = plane · query tiles + i has
//!                         its Full blocks at  starts[2r] .. starts[2r + 1],      one word a block
//!                         its Partial ones at starts[2r + 1] .. starts[2r + 2],  two words a block
//! COLUMN_STARTS ..      2 · C + 1 offsets, C = batch · heads · key tiles; column c = plane · key tiles + j likewise
//! ROW_ORDER ..          R rows, those with most blocks first
//! COLUMN_ORDER ..       C columns, those with most blocks first
//! (row blocks)          a Full block is the index of its key tile;
//!                       a Partial block is that index and the offset of its bitmap
//! (column blocks)       the same with query tiles; the same bitmaps, not transposed
//! BITMAPS ..            bq rows of ROW_WORDS words each; key c of query r of the tile is visible if bit c mod 32
//!                         (lowest first) of word r · ROW_WORDS + c / 32 is set
//! ```
//!
//! A kernel finds its row in this way (and its column likewise):
//!
//! ```text
//! row     = word[word[ROW_ORDER] + n]          n-th unit of work; or plane · query tiles + i in plain order
//! plane   = row / word[QUERY_TILES]            i = row % word[QUERY_TILES]
//! starts  = word[ROW_STARTS] + 2 · row
//! for at in word[starts] .. word[starts + 1]            { visit tile word[at] without a test }
//! for at in word[starts + 1] .. word[starts + 2] step 2 { visit tile word[at] with bitmap at word[at + 1] }
//! ```
//!
//! A kernel with a single loop over both takes [`block_count()`] and [`block_word()`]; [`bit_word()`] and [`bit_is_set()`]
//! read a bitmap. All four are scalar functions that run in kernels and on the host.
//!
//! A plane serves several batch elements or heads where BATCH or HEADS is 1: their kernels run the same rows.

use cubecl::prelude::*;

use super::lists::BlockLists;
use super::{BlockPlan, PlanShape};

/// Where the words of the header lie.
pub mod header {
    /// Number of this layout, [`FORMAT`](super::FORMAT).
    pub const VERSION: usize = 0;
    /// Queries of a tile.
    pub const BQ: usize = 1;
    /// Keys of a tile.
    pub const BK: usize = 2;
    /// Tiles of queries.
    pub const QUERY_TILES: usize = 3;
    /// Tiles of keys.
    pub const KEY_TILES: usize = 4;
    /// Batch elements with lists of their own.
    pub const BATCH: usize = 5;
    /// Query heads with lists of their own.
    pub const HEADS: usize = 6;
    /// Words of a row of a bitmap.
    pub const ROW_WORDS: usize = 7;
    /// Offset of the row starts.
    pub const ROW_STARTS: usize = 8;
    /// Offset of the column starts.
    pub const COLUMN_STARTS: usize = 9;
    /// Offset of the order of rows.
    pub const ROW_ORDER: usize = 10;
    /// Offset of the order of columns.
    pub const COLUMN_ORDER: usize = 11;
    /// Offset of the bitmaps.
    pub const BITMAPS: usize = 12;
    /// Number of bitmaps.
    pub const BITMAP_COUNT: usize = 13;
    /// Words of the whole plan.
    pub const TOTAL: usize = 14;
    /// Words of the header; the last is not used.
    pub const WORDS: usize = 16;
}

/// Number of blocks of a row whose three starts are `full`, `partial` and `end`.
#[cube]
pub fn block_count(full: u32, partial: u32, end: u32) -> u32 {
    partial - full + (end - partial) / 2u32
}

/// Where block `n` of a row lies, Full blocks first. It is Full if that is before `partial`; otherwise the offset of its
/// bitmap is in the next word.
#[cube]
pub fn block_word(n: u32, full: u32, partial: u32) -> u32 {
    let count = partial - full;
    let mut at = full + n;
    if n >= count {
        at = partial + 2u32 * (n - count);
    }
    at
}

/// Where the bit of key `c` of query `r` of a tile lies, both counted from the tile's first.
#[cube]
pub fn bit_word(bitmap: u32, row_words: u32, r: u32, c: u32) -> u32 {
    bitmap + r * row_words + c / 32u32
}

/// Whether key `c` of the tile is visible, by the word of [`bit_word()`].
#[cube]
pub fn bit_is_set(word: u32, c: u32) -> bool {
    (word >> (c % 32u32)) & 1u32 == 1u32
}

/// Number of the layout that [`BlockPlan::to_words`] writes.
pub const FORMAT: u32 = 1;

impl BlockPlan {
    /// The plan as one buffer; the module's page describes it.
    pub fn to_words(&self) -> Vec<u32> {
        let total = self.flat_words();
        let mut words = Vec::with_capacity(total);
        words.resize(header::WORDS, 0);
        let row_starts = words.len();
        let column_starts = row_starts + 2 * self.rows.rows() + 1;
        let row_order = column_starts + 2 * self.columns.rows() + 1;
        let column_order = row_order + self.row_order.len();
        let row_blocks = column_order + self.column_order.len();
        let column_blocks = row_blocks + block_words(&self.rows);
        let bitmaps = column_blocks + block_words(&self.columns);
        push_starts(&self.rows, row_blocks, &mut words);
        push_starts(&self.columns, column_blocks, &mut words);
        words.extend_from_slice(&self.row_order);
        words.extend_from_slice(&self.column_order);
        let each = self.tile.bitmap_words();
        push_blocks(&self.rows, bitmaps, each, &mut words);
        push_blocks(&self.columns, bitmaps, each, &mut words);
        words.extend_from_slice(&self.bitmaps);
        for (at, value) in [
            (header::VERSION, FORMAT as usize),
            (header::BQ, self.tile.bq as usize),
            (header::BK, self.tile.bk as usize),
            (header::QUERY_TILES, self.query_tiles() as usize),
            (header::KEY_TILES, self.key_tiles() as usize),
            (header::BATCH, self.batch() as usize),
            (header::HEADS, self.heads() as usize),
            (header::ROW_WORDS, self.tile.row_words()),
            (header::ROW_STARTS, row_starts),
            (header::COLUMN_STARTS, column_starts),
            (header::ROW_ORDER, row_order),
            (header::COLUMN_ORDER, column_order),
            (header::BITMAPS, bitmaps),
            (header::BITMAP_COUNT, self.bitmap_count()),
            (header::TOTAL, total),
        ] {
            words[at] = value as u32;
        }
        words
    }

    /// What a problem of `batch` elements and `heads_q` query heads knows of the plan, of whose visible [points](Self::points) there
    /// are `points`.
    pub fn shape(&self, points: u64, [batch, heads_q]: [usize; 2]) -> PlanShape {
        let planes = [self.batch(), self.heads()].map(|n| n as usize);
        let copies = batch / planes[0].max(1) * (heads_q / planes[1].max(1));
        PlanShape {
            tile: self.tile(),
            words: self.flat_words(),
            points: points * copies as u64,
            planes,
            column_words: block_words(&self.columns),
        }
    }

    /// Words of [`to_words`](Self::to_words).
    pub fn flat_words(&self) -> usize {
        let lists = |lists: &BlockLists| 2 * lists.rows() + 1 + lists.rows() + block_words(lists);
        header::WORDS + lists(&self.rows) + lists(&self.columns) + self.bitmaps.len()
    }
}

fn block_words(lists: &BlockLists) -> usize {
    lists.full.len() + 2 * lists.partial.len()
}

fn push_starts(lists: &BlockLists, first: usize, words: &mut Vec<u32>) {
    let mut at = first as u32;
    for row in 0..lists.rows() {
        let blocks = lists.row(row);
        words.push(at);
        at += blocks.full.len() as u32;
        words.push(at);
        at += 2 * blocks.partial.len() as u32;
    }
    words.push(at);
}

fn push_blocks(lists: &BlockLists, bitmaps: usize, each: usize, words: &mut Vec<u32>) {
    for row in 0..lists.rows() {
        let blocks = lists.row(row);
        words.extend_from_slice(blocks.full);
        for (&tile, &bitmap) in blocks.partial.iter().zip(blocks.bitmaps) {
            words.extend([tile, (bitmaps + bitmap as usize * each) as u32]);
        }
    }
}
