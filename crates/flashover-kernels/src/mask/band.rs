//! What a query may see by position: causal order, a window around it, always-visible first keys.

use std::ops::Range;

use cubecl::prelude::*;
use serde::{Deserialize, Serialize};

use super::fingerprint::Fingerprint;
use super::primitive::{Plane, Primitive, Reach, push_offset};
use super::spans::{Span, Spans};
use crate::problem::ProblemError;

/// A window side that reaches everything. Far beyond any sequence, and still free of overflow in i32 sums.
pub const UNBOUNDED: u32 = 1 << 30;

/// Visibility by position alone. The default sees everything.
///
/// Query at `a` sees key `j` when `(j ≤ a or not causal) and (j < sinks or a − left ≤ j ≤ a + right)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Band {
    /// Whether keys after the query are hidden.
    pub causal: bool,
    /// Keys before the query that the window reaches, itself not counted; [`UNBOUNDED`] for all.
    pub left: u32,
    /// Keys after the query that the window reaches; [`UNBOUNDED`] for all.
    pub right: u32,
    /// First keys that are visible outside the window (StreamingLLM's sinks). They bypass the window only.
    pub sinks: u32,
}

impl Default for Band {
    fn default() -> Self {
        Band { causal: false, left: UNBOUNDED, right: UNBOUNDED, sinks: 0 }
    }
}

/// How a tile of queries and keys lies in a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum TileKind {
    /// No query of the tile sees any of its keys: skip it.
    Empty,
    /// Every query sees every key: no per-element test is needed.
    Full,
    /// Anything else: test each element.
    Partial,
}

impl Band {
    /// Bottom-right aligned causal order.
    pub fn causal() -> Self {
        Band { causal: true, ..Band::default() }
    }

    /// Whether any key is hidden by position for some lengths.
    pub fn is_unbounded(&self) -> bool {
        !self.causal && self.left == UNBOUNDED && self.right == UNBOUNDED
    }

    pub(crate) fn validate(&self) -> Result<(), ProblemError> {
        for (what, found) in [("window left", self.left), ("window right", self.right), ("visible sinks", self.sinks)] {
            if found > UNBOUNDED {
                return Err(ProblemError::WindowTooLarge { what, limit: UNBOUNDED, found });
            }
        }
        Ok(())
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        out.words(&[u32::from(self.causal), self.left, self.right, self.sinks]);
    }

    /// The same facts as the scalars that kernels take: `(ahead, left, right, sinks)`, see [`band_allows()`].
    pub fn scalars(&self) -> (i32, i32, i32, i32) {
        let ahead = if self.causal { 0 } else { UNBOUNDED as i32 };
        (ahead, self.left as i32, self.right as i32, self.sinks as i32)
    }

    /// Whether the query at `a` sees key `j`.
    pub fn allows(&self, a: i32, j: i32) -> bool {
        let (ahead, left, right, sinks) = self.scalars();
        band_allows(a, j, ahead, left, right, sinks)
    }

    /// Kind of the tile of queries at positions `a0 ..= a1` and keys `j0 ..= j1`, exact, in constant time.
    pub fn classify(&self, a0: i32, a1: i32, j0: i32, j1: i32) -> TileKind {
        let (ahead, left, right, sinks) = self.scalars();
        if band_tile_full(a0, a1, j0, j1, ahead, left, right, sinks) {
            TileKind::Full
        } else if band_tile_empty(a0, a1, j0, j1, ahead, left, right, sinks) {
            TileKind::Empty
        } else {
            TileKind::Partial
        }
    }
}

/// A band over given lengths.
pub(crate) struct BoundBand {
    pub band: Band,
    /// `Skv − Sq`.
    pub shift: i32,
}

impl BoundBand {
    /// First and last position of `queries`.
    fn positions(&self, queries: &Range<u32>) -> (i64, i64) {
        (queries.start as i64 + self.shift as i64, queries.end as i64 - 1 + self.shift as i64)
    }

    /// `(ahead, left, right, sinks)`.
    fn scalars(&self) -> (i64, i64, i64, i64) {
        let (ahead, left, right, sinks) = self.band.scalars();
        (ahead.into(), left.into(), right.into(), sinks.into())
    }
}

impl Primitive for BoundBand {
    fn allows(&self, _: Plane, i: u32, j: u32) -> bool {
        self.band.allows(i as i32 + self.shift, j as i32)
    }

    fn reach(&self, _: Plane, queries: Range<u32>, keys: Span) -> Reach {
        let (a0, a1) = self.positions(&queries);
        let (ahead, left, right, sinks) = self.scalars();
        let mut reach = Reach::default();
        // The windows of consecutive queries overlap, so together they reach one span of keys.
        reach.any.push(0, sinks.min(a1 + ahead + 1), keys);
        let mut window = Spans::none();
        window.push(a0 - left, a1 + right.min(ahead) + 1, keys);
        reach.any = reach.any.union(&window);
        // What all see lies in the window of the first and of the last, or among the sinks.
        let end = a0 + ahead + 1;
        reach.all.push(0, sinks.min(end), keys);
        let mut window = Spans::none();
        window.push(a1 - left, (a0 + right + 1).min(end), keys);
        reach.all = reach.all.union(&window);
        reach
    }

    /// The bounds relative to the tile, clamped where they leave it.
    fn signature(&self, _: Plane, queries: Range<u32>, keys: Span, out: &mut Vec<u32>) -> bool {
        let (a0, _) = self.positions(&queries);
        let (ahead, left, right, sinks) = self.scalars();
        let (rows, columns) = ((queries.end - queries.start) as i64, (keys.end - keys.start) as i64);
        let offset = a0 - keys.start as i64;
        push_offset(out, offset + ahead, -rows, columns);
        push_offset(out, offset - left, -rows, columns);
        push_offset(out, offset + right, -rows, columns);
        push_offset(out, sinks - keys.start as i64, 0, columns);
        true
    }
}

/// Whether the query at `a` sees key `j`: causal order, then the window, which sinks bypass.
///
/// `ahead` is 0 under causal order and [`UNBOUNDED`] otherwise.
#[cube]
pub fn band_allows(a: i32, j: i32, ahead: i32, left: i32, right: i32, sinks: i32) -> bool {
    let in_window = j >= a - left && j <= a + right;
    j <= a + ahead && (in_window || j < sinks)
}

/// The keys that the query at `a` sees, of `keys` that exist: those from the first of the three on and before the second,
/// and those before the third. What [`band_allows()`] says key by key, for who asks about many.
#[cube]
pub fn band_keys(a: i32, keys: i32, ahead: i32, left: i32, right: i32, sinks: i32) -> (i32, i32, i32) {
    let end = min(a + min(right, ahead) + 1, keys);
    (a - left, end, min(min(sinks, a + ahead + 1), keys))
}

/// Whether every query of the tile sees every key of it. Bounds are inclusive.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn band_tile_full(a0: i32, a1: i32, j0: i32, j1: i32, ahead: i32, left: i32, right: i32, sinks: i32) -> bool {
    // Keys from `sinks` on must lie in the window of every query; the ones before need not.
    let windowed = max(j0, sinks);
    let in_window = windowed > j1 || (windowed >= a1 - left && j1 <= a0 + right);
    j1 <= a0 + ahead && in_window
}

/// Whether no query of the tile sees any key of it. Bounds are inclusive.
#[cube]
#[allow(clippy::too_many_arguments)]
pub fn band_tile_empty(a0: i32, a1: i32, j0: i32, j1: i32, ahead: i32, left: i32, right: i32, sinks: i32) -> bool {
    // The windows of consecutive queries overlap, so together they reach one interval of keys.
    let sink_hit = j0 < sinks && j0 <= a1 + ahead;
    let reach = min(right, ahead);
    let window_hit = j0 <= a1 + reach && j1 >= a0 - left;
    !(sink_hit || window_hit)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dense(band: &Band, a: std::ops::RangeInclusive<i32>, j: std::ops::RangeInclusive<i32>) -> TileKind {
        let seen: Vec<bool> = a.flat_map(|a| j.clone().map(move |j| (a, j))).map(|(a, j)| band.allows(a, j)).collect();
        match (seen.iter().any(|&s| s), seen.iter().all(|&s| s)) {
            (false, _) => TileKind::Empty,
            (_, true) => TileKind::Full,
            _ => TileKind::Partial,
        }
    }

    #[test]
    fn keys_are_those_that_are_allowed() {
        for causal in [false, true] {
            for left in [0, 2, UNBOUNDED] {
                for right in [0, 3, UNBOUNDED] {
                    for sinks in [0, 1, 4, 20] {
                        for keys in [0, 5, 12] {
                            let band = Band { causal, left, right, sinks };
                            let (ahead, left, right, sinks) = band.scalars();
                            for a in -5..15 {
                                let (start, end, first) = band_keys(a, keys, ahead, left, right, sinks);
                                for j in 0..12 {
                                    let seen = j < keys && band.allows(a, j);
                                    assert_eq!(j >= start && j < end || j < first, seen, "{band:?} {a} {j} of {keys}");
                                }
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_are_classified_as_their_points_say() {
        let mut kinds = [0usize; 3];
        for causal in [false, true] {
            for left in [0, 1, 3, 7, UNBOUNDED] {
                for right in [0, 2, 5, UNBOUNDED] {
                    for sinks in [0, 1, 4, 9] {
                        let band = Band { causal, left, right, sinks };
                        for a0 in -6..14 {
                            for (rows, keys) in [(1, 1), (4, 4), (3, 5), (8, 2)] {
                                for j0 in (0..16).step_by(keys as usize) {
                                    let (a1, j1) = (a0 + rows - 1, j0 + keys - 1);
                                    let kind = band.classify(a0, a1, j0, j1);
                                    assert_eq!(
                                        kind,
                                        dense(&band, a0..=a1, j0..=j1),
                                        "{band:?} {a0}..={a1} {j0}..={j1}"
                                    );
                                    kinds[kind as usize] += 1;
                                }
                            }
                        }
                    }
                }
            }
        }
        assert!(kinds.iter().all(|&n| n > 1000), "every kind occurs often: {kinds:?}");
    }

    #[test]
    fn a_sink_bypasses_the_window_and_not_the_causal_order() {
        let band = Band { causal: true, left: 1, right: 0, sinks: 4 };
        assert!(band.allows(9, 0) && band.allows(9, 3) && !band.allows(9, 4) && band.allows(9, 8));
        assert!(!band.allows(2, 3));
    }
}
