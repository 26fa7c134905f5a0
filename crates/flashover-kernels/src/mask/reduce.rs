//! Which masks are a band, so that kernels can walk them without a plan.

use super::{Band, Mask, UNBOUNDED};

impl Mask {
    /// The band that sees the same points at all lengths, where one is found: causal order, windows and sinks, and what
    /// `&` makes of them and `|` of a window and sinks. `None` says nothing.
    pub fn as_band(&self) -> Option<Band> {
        let band = match self {
            Mask::Everything => Band::default(),
            Mask::Band(band) => *band,
            Mask::SlidingWindow { keys } => Band { left: keys.checked_sub(1)?, right: 0, ..Band::default() },
            Mask::And(l, r) => both(l.as_band()?, r.as_band()?)?,
            Mask::Or(l, r) => match (&**l, &**r) {
                (window, Mask::Sinks { keys }) | (Mask::Sinks { keys }, window) => or_sinks(window.as_band()?, *keys)?,
                _ => return None,
            },
            _ => return None,
        };
        band.validate().ok().map(|()| band)
    }
}

/// What two bands both see.
fn both(l: Band, r: Band) -> Option<Band> {
    // Sinks bypass the window, so without one they change nothing.
    let windowless = |band: Band| band.left == UNBOUNDED && band.right == UNBOUNDED;
    let sinks = match (windowless(l), windowless(r)) {
        (true, _) => r.sinks,
        (_, true) => l.sinks,
        // (W₁ ∪ S) ∩ (W₂ ∪ S) = (W₁ ∩ W₂) ∪ S
        _ if l.sinks == r.sinks => l.sinks,
        _ => return None,
    };
    let (left, right) = (l.left.min(r.left), l.right.min(r.right));
    Some(Band { causal: l.causal || r.causal, left, right, sinks })
}

/// What a band or the first `keys` keys show.
fn or_sinks(band: Band, keys: u32) -> Option<Band> {
    if !band.causal {
        return Some(Band { sinks: band.sinks.max(keys), ..band });
    }
    // Causal order is a window that ends at the query; but not for sinks that the band hides by it.
    let hidden_sinks = band.sinks > 0 && band.left != UNBOUNDED;
    (!hidden_sinks).then_some(Band { causal: false, left: band.left, right: 0, sinks: keys })
}

#[cfg(test)]
mod tests {
    use super::super::Extent;
    use super::super::tests::random::{Random, primitive};
    use super::*;

    fn expression(depth: u32, extent: Extent, r: &mut Random) -> Mask {
        if depth == 0 {
            let families =
                ["causal", "window", "sliding window", "sinks", "prefix_lm", "band", "everything or nothing"];
            return primitive(families[r.within(0, 6) as usize], extent, r);
        }
        let (left, right) = (expression(depth - 1, extent, r), expression(depth - 1, extent, r));
        if r.chance(50) { left & right } else { left | right }
    }

    #[test]
    fn a_band_sees_what_its_mask_sees() {
        let mut r = Random(3);
        let mut found = 0;
        for n in 0..6000 {
            let extent = Extent { batch: 1, heads: 1, seq_q: r.within(1, 12), seq_kv: r.within(1, 12) };
            let mask = expression(n % 3, extent, &mut r);
            let Some(band) = mask.as_band() else { continue };
            found += 1;
            let (bound, reduced) = (mask.bind(extent).unwrap(), Mask::Band(band));
            let reduced = reduced.bind(extent).unwrap();
            for (i, j) in (0..extent.seq_q).flat_map(|i| (0..extent.seq_kv).map(move |j| (i, j))) {
                assert_eq!(reduced.allows(0, 0, i, j), bound.allows(0, 0, i, j), "{mask:?} is not {band:?}: {i} {j}");
            }
        }
        assert!(found > 2000, "{found}");
    }

    #[test]
    fn usual_masks_are_bands() {
        let streaming = Mask::causal() & (Mask::sliding_window(64) | Mask::sinks(4));
        assert_eq!(streaming.as_band(), Some(Band { causal: true, left: 63, right: 0, sinks: 4 }));
        assert_eq!((Mask::causal() | Mask::sinks(9)).as_band(), Mask::prefix_lm(9).as_band());
        assert_eq!((Mask::window(5, 5) & Mask::window(9, 2)).as_band(), Mask::window(5, 2).as_band());
        for other in [Mask::sinks(3), !Mask::causal(), Mask::sliding_window(0), Mask::butterfly(4), Mask::Nothing] {
            assert_eq!(other.as_band(), None, "{other:?}");
        }
    }
}
