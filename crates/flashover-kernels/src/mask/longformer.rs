//! Longformer (Beltagy et al., arXiv 2004.05150, section 3.1): a symmetric window and global tokens.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::band::UNBOUNDED;
use super::error::{MaskError, at_most};
use super::fingerprint::Fingerprint;
use super::primitive::{Plane, Primitive, Reach, push_offset};
use super::spans::{Span, Spans};

/// The query at `a` sees keys within `window` of it and the global tokens; global tokens see everything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Longformer {
    /// Keys on each side that the window reaches.
    pub window: u32,
    /// Positions of the global tokens on the key axis, in any order.
    pub global: Vec<u32>,
}

impl Longformer {
    pub(super) fn bind(&self, shift: i32) -> Result<BoundLongformer, MaskError> {
        at_most("longformer window", UNBOUNDED, self.window)?;
        for &token in &self.global {
            at_most("longformer global token", UNBOUNDED, token)?;
        }
        let tokens = self.global.iter().map(|&start| Span { start, end: start + 1 }).collect();
        let global = Spans::from_unsorted(tokens, Span { start: 0, end: u32::MAX });
        Ok(BoundLongformer { window: self.window.into(), global, shift: shift.into() })
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        out.word(self.window);
        out.list(&self.global);
    }
}

/// [`Longformer`] over given lengths.
pub(super) struct BoundLongformer {
    window: i64,
    global: Spans,
    shift: i64,
}

impl BoundLongformer {
    /// The span of global tokens that holds `position`, if any.
    fn global_at(&self, position: i64) -> Option<Span> {
        let spans = self.global.as_slice();
        let after = spans.partition_point(|span| (span.end as i64) <= position);
        spans.get(after).filter(|span| span.start as i64 <= position).copied()
    }

    /// The global tokens among `tokens`.
    fn global_in(&self, tokens: Span) -> Spans {
        let spans = self.global.as_slice();
        let first = spans.partition_point(|span| span.end <= tokens.start);
        let mut seen = Spans::none();
        for span in spans[first..].iter().take_while(|span| span.start < tokens.end) {
            seen.push(span.start as i64, span.end as i64, tokens);
        }
        seen
    }

    /// First and last position of `a0 ..= a1` that is not global.
    fn local(&self, mut a0: i64, mut a1: i64) -> Option<(i64, i64)> {
        // Spans of global tokens do not touch, so one step leaves them.
        if let Some(span) = self.global_at(a0) {
            a0 = span.end as i64;
        }
        if let Some(span) = self.global_at(a1) {
            a1 = span.start as i64 - 1;
        }
        (a0 <= a1).then_some((a0, a1))
    }

    fn positions(&self, queries: &Range<u32>) -> (i64, i64) {
        (queries.start as i64 + self.shift, queries.end as i64 - 1 + self.shift)
    }
}

impl Primitive for BoundLongformer {
    fn allows(&self, _: Plane, i: u32, j: u32) -> bool {
        let a = i as i64 + self.shift;
        (a - j as i64).abs() <= self.window || self.global_at(a).is_some() || self.global_at(j.into()).is_some()
    }

    fn reach(&self, _: Plane, queries: Range<u32>, keys: Span) -> Reach {
        let (a0, a1) = self.positions(&queries);
        let Some((local0, local1)) = self.local(a0, a1) else {
            return Reach::same(Spans::all(keys));
        };
        let global = self.global_in(keys);
        let mut window = Spans::none();
        // What all local queries see: the windows move in step, so the outermost two decide.
        window.push(local1 - self.window, local0 + self.window + 1, keys);
        let all = window.union(&global);
        let lowest = Span { start: a0.max(0) as u32, end: (a1 + 1).max(0) as u32 };
        if !self.global_in(lowest).is_empty() {
            return Reach { any: Spans::all(keys), all };
        }
        let mut window = Spans::none();
        window.push(a0 - self.window, a1 + self.window + 1, keys);
        Reach { any: window.union(&global), all }
    }

    /// The window's bounds and the global tokens of both sides, relative to the tile.
    fn signature(&self, _: Plane, queries: Range<u32>, keys: Span, out: &mut Vec<u32>) -> bool {
        let (a0, a1) = self.positions(&queries);
        let (rows, columns) = ((queries.end - queries.start) as i64, (keys.end - keys.start) as i64);
        let offset = a0 - keys.start as i64;
        push_offset(out, offset - self.window, -rows, columns);
        push_offset(out, offset + self.window, -rows, columns);
        let own = Span { start: a0.max(0) as u32, end: (a1 + 1).max(0) as u32 };
        for (side, first) in [(own, a0), (keys, keys.start as i64)] {
            let global = self.global_in(side);
            out.push(global.as_slice().len() as u32);
            for span in global.as_slice() {
                out.extend([(span.start as i64 - first) as u32, (span.end as i64 - first) as u32]);
            }
        }
        true
    }
}
