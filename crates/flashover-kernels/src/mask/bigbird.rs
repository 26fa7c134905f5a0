//! BigBird (Zaheer et al., arXiv 2007.14062, sections 2 and appendix D): global blocks, a window of blocks, and random
//! blocks.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Extent;
use super::blocks::{BlockRows, BoundBlocks};
use super::error::{MaskError, at_least, at_most};
use super::fingerprint::Fingerprint;
use super::primitive::Plane;
use super::spans::{Span, Spans};
use crate::dropout::mix;

/// The query block at `r` sees the global blocks, the blocks within `window` of it, and `random` blocks of its own.
/// Global query blocks see everything.
///
/// Blocks are counted over positions on the key axis, as causal order is. Random blocks may coincide with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BigBird {
    /// Queries, and keys, of a block.
    pub block: u32,
    /// First blocks, which see everything and which everything sees.
    pub global: u32,
    /// Blocks on each side that a block sees besides itself.
    pub window: u32,
    /// Random blocks that a block sees, all different.
    pub random: u32,
    /// Seed of the random blocks. Heads that are to differ take masks of different seeds.
    pub seed: u64,
}

impl BigBird {
    pub(super) fn bind(&self, extent: Extent) -> Result<BoundBlocks<BoundBigBird>, MaskError> {
        at_least("bigbird block", 1, self.block)?;
        for (what, found) in [
            ("bigbird block", self.block),
            ("bigbird global blocks", self.global),
            ("bigbird window", self.window),
            ("bigbird random blocks", self.random),
        ] {
            at_most(what, super::UNBOUNDED, found)?;
        }
        let pattern = BoundBigBird { shape: *self, columns: extent.seq_kv.div_ceil(self.block) };
        Ok(BoundBlocks { pattern, block: [self.block; 2], shift: extent.shift().into() })
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        let BigBird { block, global, window, random, seed } = *self;
        out.words(&[block, global, window, random, seed as u32, (seed >> 32) as u32]);
    }
}

/// [`BigBird`] over given lengths.
pub(super) struct BoundBigBird {
    shape: BigBird,
    /// Blocks of keys.
    columns: u32,
}

impl BoundBigBird {
    /// The random blocks of a row: Floyd's sample of distinct numbers (Bentley and Floyd, "A Sample of Brilliance",
    /// 1987), one hash a number.
    fn random(&self, row: i64) -> BTreeSet<u32> {
        let BigBird { random, seed, .. } = self.shape;
        let row = mix(mix(row as u32 ^ seed as u32) ^ (seed >> 32) as u32);
        let mut drawn = BTreeSet::new();
        for last in self.columns.saturating_sub(random)..self.columns {
            let number = mix(row ^ mix(last)) % (last + 1);
            if !drawn.insert(number) {
                drawn.insert(last);
            }
        }
        drawn
    }

    fn is_global(&self, row: i64) -> bool {
        row < self.shape.global as i64
    }
}

impl BlockRows for BoundBigBird {
    fn contains(&self, _: Plane, row: i64, column: u32) -> bool {
        self.is_global(row)
            || column < self.shape.global
            || (row - column as i64).abs() <= self.shape.window as i64
            || self.random(row).contains(&column)
    }

    fn row(&self, _: Plane, row: i64, columns: Span) -> Spans {
        if self.is_global(row) {
            return Spans::all(columns);
        }
        let mut blocks: Vec<Span> = self.random(row).into_iter().map(|start| Span { start, end: start + 1 }).collect();
        blocks.push(Span { start: 0, end: self.shape.global });
        let window = self.shape.window as i64;
        let (start, end) = ((row - window).max(0), (row + window + 1).max(0));
        blocks.push(Span { start: start as u32, end: end as u32 });
        Spans::from_unsorted(blocks, columns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_blocks_are_distinct_and_spread() {
        let shape = BigBird { block: 4, global: 0, window: 0, random: 5, seed: 7 };
        let pattern = BoundBigBird { shape, columns: 40 };
        let mut hits = [0; 40];
        for row in 0..400 {
            let drawn = pattern.random(row);
            drawn.iter().for_each(|&column| hits[column as usize] += 1);
            assert_eq!(drawn.len(), 5);
        }
        // 50 hits each are expected, with a standard deviation below 7.
        assert!(hits.iter().all(|&n| (20..=80).contains(&n)), "{hits:?}");
        let other = BoundBigBird { shape: BigBird { seed: 8, ..shape }, columns: 40 };
        assert!((0..400).any(|row| other.random(row) != pattern.random(row)));
    }

    #[test]
    fn more_random_blocks_than_blocks_are_all_of_them() {
        let shape = BigBird { block: 4, global: 0, window: 0, random: 9, seed: 7 };
        let pattern = BoundBigBird { shape, columns: 6 };
        let columns = Span { start: 0, end: 6 };
        assert!(pattern.row(Plane { b: 0, h: 0 }, 3, columns).is_all(columns));
    }
}
