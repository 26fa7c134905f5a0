//! What masks over blocks of queries and keys share: one block row of queries sees the same key blocks.

use std::ops::Range;

use super::primitive::{Plane, Primitive, Reach};
use super::spans::{Span, Spans};

/// Key blocks of each block row.
pub(super) trait BlockRows: Send + Sync {
    /// Whether the queries of block `row` see the keys of block `column`.
    fn contains(&self, plane: Plane, row: i64, column: u32) -> bool;

    /// The blocks of `columns` that the queries of block `row` see. Rows before the first key are negative.
    fn row(&self, plane: Plane, row: i64, columns: Span) -> Spans;
}

/// A block pattern over given lengths.
pub(super) struct BoundBlocks<P> {
    pub pattern: P,
    /// Queries and keys of a block.
    pub block: [u32; 2],
    /// What turns the index of a query into what its block counts from.
    pub shift: i64,
}

impl<P: BlockRows> BoundBlocks<P> {
    fn block_row(&self, i: u32) -> i64 {
        (i as i64 + self.shift).div_euclid(self.block[0].into())
    }

    /// The keys of `keys` that the queries of block `row` see.
    fn keys_of(&self, plane: Plane, row: i64, keys: Span) -> Spans {
        let width = self.block[1];
        let columns = Span { start: keys.start / width, end: keys.end.div_ceil(width) };
        let mut seen = Spans::none();
        for blocks in self.pattern.row(plane, row, columns).as_slice() {
            seen.push(blocks.start as i64 * width as i64, blocks.end as i64 * width as i64, keys);
        }
        seen
    }
}

impl<P: BlockRows> Primitive for BoundBlocks<P> {
    fn allows(&self, plane: Plane, i: u32, j: u32) -> bool {
        self.pattern.contains(plane, self.block_row(i), j / self.block[1])
    }

    fn reach(&self, plane: Plane, queries: Range<u32>, keys: Span) -> Reach {
        let (first, last) = (self.block_row(queries.start), self.block_row(queries.end - 1));
        let mut reach = Reach::same(self.keys_of(plane, first, keys));
        for row in first + 1..=last {
            let seen = self.keys_of(plane, row, keys);
            reach.any = reach.any.union(&seen);
            reach.all = reach.all.intersection(&seen);
        }
        reach
    }

    fn group_end(&self, _: Plane, i: u32) -> u32 {
        ((self.block_row(i) + 1) * self.block[0] as i64 - self.shift) as u32
    }
}
