//! Listed blocks in compressed rows, Full and Partial apart, their transpose, and the order that balances work.

use std::cmp::Reverse;

use crate::mask::MaskError;

/// Most blocks that a plan lists: with four words for each, a flat plan stays far below what u32 offsets reach.
pub(super) const MAX_BLOCKS: usize = 1 << 28;

/// Blocks of one row of tiles: key tiles of a query tile, or in the transpose query tiles of a key tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blocks<'a> {
    /// Tiles whose every point is visible, ascending.
    pub full: &'a [u32],
    /// Tiles of which some points are visible, ascending.
    pub partial: &'a [u32],
    /// The bitmap of each Partial tile.
    pub bitmaps: &'a [u32],
}

impl Blocks<'_> {
    /// Number of listed tiles.
    pub fn len(&self) -> usize {
        self.full.len() + self.partial.len()
    }

    /// Whether no tile is listed.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Compressed rows of blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockLists {
    pub full_starts: Vec<u32>,
    pub full: Vec<u32>,
    pub partial_starts: Vec<u32>,
    pub partial: Vec<u32>,
    pub bitmaps: Vec<u32>,
}

impl BlockLists {
    pub(super) fn with_capacity(rows: usize) -> Self {
        let starts = || {
            let mut starts = Vec::with_capacity(rows + 1);
            starts.push(0);
            starts
        };
        let (full_starts, partial_starts) = (starts(), starts());
        BlockLists { full_starts, full: vec![], partial_starts, partial: vec![], bitmaps: vec![] }
    }

    pub(super) fn push_partial(&mut self, tile: u32, bitmap: u32) {
        self.partial.push(tile);
        self.bitmaps.push(bitmap);
    }

    /// Closes the row that was being filled.
    pub(super) fn end_row(&mut self) -> Result<(), MaskError> {
        let found = self.blocks();
        if found > MAX_BLOCKS {
            let (limit, found) = (MAX_BLOCKS as u64, found as u64);
            return Err(MaskError::TooLarge { what: "listed blocks", limit, found });
        }
        self.full_starts.push(self.full.len() as u32);
        self.partial_starts.push(self.partial.len() as u32);
        Ok(())
    }

    /// Gives back memory that growing left over.
    pub(super) fn shrink(&mut self) {
        self.full.shrink_to_fit();
        self.partial.shrink_to_fit();
        self.bitmaps.shrink_to_fit();
    }

    pub(super) fn rows(&self) -> usize {
        self.full_starts.len() - 1
    }

    pub(super) fn blocks(&self) -> usize {
        self.full.len() + self.partial.len()
    }

    pub(super) fn row(&self, row: usize) -> Blocks<'_> {
        let full = self.full_starts[row] as usize..self.full_starts[row + 1] as usize;
        let partial = self.partial_starts[row] as usize..self.partial_starts[row + 1] as usize;
        Blocks { full: &self.full[full], partial: &self.partial[partial.clone()], bitmaps: &self.bitmaps[partial] }
    }

    /// Blocks of each column, for each of the planes of `rows` rows and `columns` columns that lie one after another.
    pub(super) fn transposed(&self, planes: usize, rows: usize, columns: usize) -> BlockLists {
        let total = planes * columns;
        let (full_starts, full, _) = transpose(&self.full_starts, &self.full, None, rows, columns, total);
        let (partial_starts, partial, bitmaps) =
            transpose(&self.partial_starts, &self.partial, Some(&self.bitmaps), rows, columns, total);
        BlockLists { full_starts, full, partial_starts, partial, bitmaps }
    }

    /// The rows, those with most blocks first, and in their own order where equal.
    pub(super) fn longest_first(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.rows() as u32).collect();
        order.sort_by_key(|&row| Reverse(self.row(row as usize).len()));
        order
    }

    pub(super) fn bytes(&self) -> usize {
        let BlockLists { full_starts, full, partial_starts, partial, bitmaps } = self;
        let lists = [full_starts, full, partial_starts, partial, bitmaps];
        lists.iter().map(|list| size_of_val(list.as_slice())).sum()
    }
}

/// Transposes compressed rows by counting: starts, rows of each column, and what of `values` goes with them.
fn transpose(
    starts: &[u32],
    columns: &[u32],
    values: Option<&[u32]>,
    rows: usize,
    width: usize,
    total: usize,
) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let listed = || {
        starts.windows(2).enumerate().flat_map(move |(row, ends)| {
            let plane = row / rows * width;
            (ends[0]..ends[1]).map(move |n| (row % rows, n as usize, plane + columns[n as usize] as usize))
        })
    };
    let mut ends = vec![0u32; total + 1];
    listed().for_each(|(_, _, column)| ends[column + 1] += 1);
    for column in 0..total {
        ends[column + 1] += ends[column];
    }
    let mut next = ends.clone();
    let mut out = vec![0; columns.len()];
    let mut out_values = vec![0; values.map_or(0, <[u32]>::len)];
    for (row, n, column) in listed() {
        let at = next[column] as usize;
        next[column] += 1;
        out[at] = row as u32;
        if let Some(values) = values {
            out_values[at] = values[n];
        }
    }
    (ends, out, out_values)
}
