//! Sets of keys as sorted, disjoint, half-open spans, with the set operations that combine masks.
//!
//! Structured masks show a row of queries few spans however long the sequence is, so set operations on spans are what
//! keeps the cost of a plan in proportion to the blocks it lists.

/// Keys `start .. end`, not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub start: u32,
    pub end: u32,
}

/// A set of keys. Spans are sorted and neither overlap nor touch.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Spans(Vec<Span>);

impl Spans {
    pub(crate) fn none() -> Self {
        Spans(Vec::new())
    }

    /// The whole of `keys`.
    pub(crate) fn all(keys: Span) -> Self {
        let mut spans = Spans::none();
        spans.push(keys.start as i64, keys.end as i64, keys);
        spans
    }

    pub(crate) fn as_slice(&self) -> &[Span] {
        &self.0
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the set is the whole of `keys`, in which it lies.
    pub(crate) fn is_all(&self, keys: Span) -> bool {
        keys.start >= keys.end || self.0 == [keys]
    }

    /// Adds what of `start .. end` lies in `clip`; spans must come in the order of their starts.
    pub(crate) fn push(&mut self, start: i64, end: i64, clip: Span) {
        let start = start.max(clip.start as i64);
        let end = end.min(clip.end as i64);
        if start >= end {
            return;
        }
        let (start, end) = (start as u32, end as u32);
        match self.0.last_mut() {
            Some(last) if start <= last.end => last.end = last.end.max(end),
            _ => self.0.push(Span { start, end }),
        }
    }

    /// The set of spans that come in any order.
    pub(crate) fn from_unsorted(mut spans: Vec<Span>, clip: Span) -> Self {
        spans.sort_unstable_by_key(|span| span.start);
        let mut out = Spans::none();
        for span in spans {
            out.push(span.start as i64, span.end as i64, clip);
        }
        out
    }

    pub(crate) fn union(&self, other: &Spans) -> Spans {
        if self.is_empty() {
            return other.clone();
        }
        let mut out = Spans(Vec::with_capacity(self.0.len() + other.0.len()));
        let (mut left, mut right) = (self.0.iter().peekable(), other.0.iter().peekable());
        while let Some(span) = match (left.peek(), right.peek()) {
            (Some(l), Some(r)) if l.start <= r.start => left.next(),
            (Some(_), None) => left.next(),
            _ => right.next(),
        } {
            out.push(span.start as i64, span.end as i64, *span);
        }
        out
    }

    pub(crate) fn intersection(&self, other: &Spans) -> Spans {
        let mut out = Vec::new();
        let (mut l, mut r) = (0, 0);
        while let (Some(a), Some(b)) = (self.0.get(l), other.0.get(r)) {
            let (start, end) = (a.start.max(b.start), a.end.min(b.end));
            if start < end {
                out.push(Span { start, end });
            }
            if a.end < b.end {
                l += 1;
            } else {
                r += 1;
            }
        }
        Spans(out)
    }

    /// The keys of `keys` that are not in the set.
    pub(crate) fn complement(&self, keys: Span) -> Spans {
        let mut out = Vec::with_capacity(self.0.len() + 1);
        let mut start = keys.start;
        for span in &self.0 {
            if start < span.start {
                out.push(Span { start, end: span.start });
            }
            start = span.end;
        }
        if start < keys.end {
            out.push(Span { start, end: keys.end });
        }
        Spans(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEYS: Span = Span { start: 3, end: 11 };

    /// Every subset of eight keys, as bits and as spans.
    fn subsets() -> Vec<(u32, Spans)> {
        (0u32..256)
            .map(|bits| {
                let mut spans = Spans::none();
                for key in (0..8i64).filter(|key| bits >> key & 1 == 1) {
                    spans.push(key + 3, key + 4, KEYS);
                }
                (bits, spans)
            })
            .collect()
    }

    fn bits(spans: &Spans) -> u32 {
        assert!(spans.0.iter().all(|s| s.start < s.end));
        assert!(spans.0.windows(2).all(|w| w[0].end < w[1].start), "touching spans are one: {spans:?}");
        spans.0.iter().flat_map(|s| s.start..s.end).fold(0, |bits, key| bits | 1 << (key - 3))
    }

    #[test]
    fn set_operations_are_those_of_bits() {
        let all = subsets();
        for (a, left) in &all {
            assert_eq!(bits(&left.complement(KEYS)), !a & 255);
            assert_eq!(left.is_all(KEYS), *a == 255);
            assert_eq!(left.is_empty(), *a == 0);
            for (b, right) in &all {
                assert_eq!(bits(&left.union(right)), a | b);
                assert_eq!(bits(&left.intersection(right)), a & b);
            }
        }
    }

    #[test]
    fn spans_in_any_order_make_one_set() {
        let span = |start, end| Span { start, end };
        let spans = Spans::from_unsorted(vec![span(8, 20), span(0, 5), span(4, 6), span(6, 7)], KEYS);
        assert_eq!(spans.as_slice(), [span(3, 7), span(8, 11)]);
    }
}
