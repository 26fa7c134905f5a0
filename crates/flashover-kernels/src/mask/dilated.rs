//! Every d-th key around a query: dilated windows (Longformer, Beltagy et al., arXiv 2004.05150, section 3.1) and the
//! strided pattern of Sparse Transformers (Child et al., arXiv 1904.10509, section 4.2).

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::band::UNBOUNDED;
use super::error::{MaskError, at_least, at_most};
use super::fingerprint::Fingerprint;
use super::primitive::{Plane, Primitive, Reach, push_offset};
use super::spans::{Span, Spans};

/// The query at `a` sees keys `a + t · dilation` for `−left ≤ t ≤ right`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dilated {
    /// Keys before the query that it sees, itself not counted; [`UNBOUNDED`] for all.
    pub left: u32,
    /// Keys after the query that it sees; [`UNBOUNDED`] for all.
    pub right: u32,
    /// Distance between two keys that it sees; 1 is a plain window.
    pub dilation: u32,
}

impl Dilated {
    pub(super) fn bind(&self, shift: i32) -> Result<BoundDilated, MaskError> {
        at_least("dilation", 1, self.dilation)?;
        for (what, found) in [("dilated left", self.left), ("dilated right", self.right), ("dilation", self.dilation)] {
            at_most(what, UNBOUNDED, found)?;
        }
        Ok(BoundDilated {
            left: self.left.into(),
            right: self.right.into(),
            dilation: self.dilation.into(),
            shift: shift.into(),
        })
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        out.words(&[self.left, self.right, self.dilation]);
    }
}

/// [`Dilated`] over given lengths.
pub(super) struct BoundDilated {
    left: i64,
    right: i64,
    dilation: i64,
    shift: i64,
}

impl BoundDilated {
    /// Keys that some of the queries at `a0 ..= a1` see.
    fn any(&self, a0: i64, a1: i64, keys: Span) -> Spans {
        let BoundDilated { left, right, dilation, .. } = *self;
        let mut seen = Spans::none();
        if dilation <= a1 - a0 + 1 {
            // The keys of consecutive queries leave no gap.
            seen.push(a0 - left * dilation, a1 + right * dilation + 1, keys);
            return seen;
        }
        let first = (keys.start as i64 - a1).div_euclid(dilation).max(-left);
        let last = (keys.end as i64 - 1 - a0).div_euclid(dilation).min(right);
        for t in first..=last {
            seen.push(a0 + t * dilation, a1 + t * dilation + 1, keys);
        }
        seen
    }
}

impl Primitive for BoundDilated {
    fn allows(&self, _: Plane, i: u32, j: u32) -> bool {
        let offset = j as i64 - (i as i64 + self.shift);
        let steps = offset / self.dilation;
        offset % self.dilation == 0 && -self.left <= steps && steps <= self.right
    }

    fn reach(&self, _: Plane, queries: Range<u32>, keys: Span) -> Reach {
        let (a0, a1) = (queries.start as i64 + self.shift, queries.end as i64 - 1 + self.shift);
        let any = self.any(a0, a1, keys);
        if a0 == a1 {
            return Reach::same(any);
        }
        // The distances to two neighbours are not both multiples, unless of 1.
        let mut all = Spans::none();
        if self.dilation == 1 {
            all.push(a1 - self.left, a0 + self.right + 1, keys);
        }
        Reach { any, all }
    }

    /// The phase, and the window's bounds relative to the tile, clamped where they leave it.
    fn signature(&self, _: Plane, queries: Range<u32>, keys: Span, out: &mut Vec<u32>) -> bool {
        let BoundDilated { left, right, dilation, shift } = *self;
        let (rows, columns) = ((queries.end - queries.start) as i64, (keys.end - keys.start) as i64);
        let offset = queries.start as i64 + shift - keys.start as i64;
        out.push(offset.rem_euclid(dilation) as u32);
        push_offset(out, offset - left * dilation, -rows, columns);
        push_offset(out, offset + right * dilation, -rows, columns);
        true
    }
}
