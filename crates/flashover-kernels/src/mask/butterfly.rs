//! FlashAttention's fixed sparse pattern: the flat block butterfly of Pixelated Butterfly (Chen et al., arXiv
//! 2112.00029, section 3.2), which section 3.3 and appendix D.1 of FlashAttention (arXiv 2205.14135) take over.

use serde::{Deserialize, Serialize};

use super::blocks::{BlockRows, BoundBlocks};
use super::error::{MaskError, at_least, at_most};
use super::fingerprint::Fingerprint;
use super::primitive::Plane;
use super::spans::{Span, Spans};

/// Blocks whose indices are equal or differ in one binary digit: the diagonal, and one block for each power of two,
/// so that a query of `n` blocks sees about `log2 n + 1` of them.
///
/// Blocks are counted over positions on the key axis, as causal order is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Butterfly {
    /// Queries, and keys, of a block.
    pub block: u32,
}

impl Butterfly {
    pub(super) fn bind(&self, shift: i32) -> Result<BoundBlocks<Digits>, MaskError> {
        at_least("butterfly block", 1, self.block)?;
        at_most("butterfly block", super::UNBOUNDED, self.block)?;
        Ok(BoundBlocks { pattern: Digits, block: [self.block; 2], shift: shift.into() })
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        out.word(self.block);
    }
}

/// Pairs of indices that differ in at most one binary digit.
pub(super) struct Digits;

impl BlockRows for Digits {
    fn contains(&self, _: Plane, row: i64, column: u32) -> bool {
        row >= 0 && (row as u32 ^ column).count_ones() <= 1
    }

    fn row(&self, _: Plane, row: i64, columns: Span) -> Spans {
        if row < 0 {
            return Spans::none();
        }
        let row = row as u32;
        let seen = std::iter::once(row).chain((0..31).map(|digit| row ^ 1 << digit));
        Spans::from_unsorted(seen.map(|start| Span { start, end: start + 1 }).collect(), columns)
    }
}
