//! What a primitive mask tells about a row of queries, and what follows from it.
//!
//! A primitive answers one question exactly, without visiting points: of some consecutive queries, which keys does any
//! of them see, and which do all of them see ([`Reach`])? Both are sets of keys, and everything else follows:
//!
//! - a tile is Empty if no key of it is in `any`, Full if all are in `all`, and Partial otherwise: exact;
//! - `any` and `all` of `!m` are the complements of `all` and `any` of `m`: exact;
//! - `all` of `m & n` and `any` of `m | n` are the intersection and the union: exact;
//! - `any` of `m & n` lies in the intersection, and `all` of `m | n` contains the union: conservative, and exact for a
//!   single query, where `any = all`.
//!
//! Sets of keys lose less than Empty, Full and Partial would: a tile half of which one operand shows and half the
//! other is Full in their union.

use std::ops::Range;

use super::spans::{Span, Spans};

/// One batch element and query head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Plane {
    pub b: u32,
    pub h: u32,
}

/// Keys that consecutive queries see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Keys that at least one of the queries sees.
    pub any: Spans,
    /// Keys that all of the queries see.
    pub all: Spans,
}

impl Reach {
    /// All queries see the same keys.
    pub(crate) fn same(keys: Spans) -> Self {
        Reach { any: keys.clone(), all: keys }
    }
}

/// A mask without operands, bound to the lengths that it is asked about.
///
/// Ranges of queries are not empty. `keys` is the part of the keys that is asked for: answers are clipped to it.
pub(crate) trait Primitive: Send + Sync {
    /// Whether query `i` sees key `j`.
    fn allows(&self, plane: Plane, i: u32, j: u32) -> bool;

    /// What `queries` see of `keys`.
    fn reach(&self, plane: Plane, queries: Range<u32>, keys: Span) -> Reach;

    /// The end of the queries from `i` on that all see the same keys.
    fn group_end(&self, _plane: Plane, i: u32) -> u32 {
        i + 1
    }

    /// Words that determine the tile's bits, given its size: equal words, equal bits. `false` if the primitive has
    /// none, and the bits must be visited.
    fn signature(&self, plane: Plane, queries: Range<u32>, keys: Span, out: &mut Vec<u32>) -> bool {
        let mut i = queries.start;
        while i < queries.end {
            let end = self.group_end(plane, i).min(queries.end);
            let seen = self.reach(plane, i..i + 1, keys).any;
            out.extend([end - queries.start, seen.as_slice().len() as u32]);
            out.extend(seen.as_slice().iter().flat_map(|span| [span.start - keys.start, span.end - keys.start]));
            i = end;
        }
        true
    }

    /// Sets the bits of the points that are visible, in rows of `keys.len().div_ceil(32)` words.
    fn bits(&self, plane: Plane, queries: Range<u32>, keys: Span, out: &mut [u32]) {
        let words = (keys.end - keys.start).div_ceil(32) as usize;
        let mut i = queries.start;
        while i < queries.end {
            let end = self.group_end(plane, i).min(queries.end);
            let seen = self.reach(plane, i..i + 1, keys).any;
            for row in i - queries.start..end - queries.start {
                let row = &mut out[row as usize * words..][..words];
                for span in seen.as_slice() {
                    set_bits(row, span.start - keys.start, span.end - keys.start);
                }
            }
            i = end;
        }
    }
}

/// Sets bits `start .. end` of a row, lowest bit first.
pub(crate) fn set_bits(row: &mut [u32], start: u32, end: u32) {
    let mut at = start;
    while at < end {
        let (word, bit) = (at / 32, at % 32);
        let count = (32 - bit).min(end - at);
        row[word as usize] |= (u32::MAX >> (32 - count)) << bit;
        at += count;
    }
}

/// Adds an offset to a signature, clamped where it stops making a difference.
pub(crate) fn push_offset(out: &mut Vec<u32>, offset: i64, low: i64, high: i64) {
    out.push(offset.clamp(low, high) as i32 as u32);
}

/// A mask that sees everything or nothing.
pub(crate) struct Constant(pub bool);

impl Primitive for Constant {
    fn allows(&self, _: Plane, _: u32, _: u32) -> bool {
        self.0
    }

    fn reach(&self, _: Plane, _: Range<u32>, keys: Span) -> Reach {
        Reach::same(if self.0 { Spans::all(keys) } else { Spans::none() })
    }

    fn group_end(&self, _: Plane, _: u32) -> u32 {
        u32::MAX
    }
}

/// The first `keys` keys, for every query.
pub(crate) struct FirstKeys(pub u32);

impl Primitive for FirstKeys {
    fn allows(&self, _: Plane, _: u32, j: u32) -> bool {
        j < self.0
    }

    fn reach(&self, _: Plane, _: Range<u32>, keys: Span) -> Reach {
        let mut seen = Spans::none();
        seen.push(0, self.0 as i64, keys);
        Reach::same(seen)
    }

    fn group_end(&self, _: Plane, _: u32) -> u32 {
        u32::MAX
    }
}
