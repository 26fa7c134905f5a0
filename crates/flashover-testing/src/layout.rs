//! How a tensor lies in memory.

use crate::data::Rng;

/// How a `[B, H, S, D]` tensor lies in memory: rows of `D` elements, with NaN before and after each that nobody may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Layout {
    /// Heads lie within positions, as a projection leaves them: stored `[B, S, H, D]`.
    pub heads_inner: bool,
    /// Elements before each row: of what else was projected with it.
    pub before: usize,
    /// Elements after each row.
    pub after: usize,
}

impl Layout {
    /// Any: rows at multiples of 16 bytes (in 16-bit elements) or not, with gaps or without.
    pub fn random(rng: &mut Rng) -> Self {
        let gap = |rng: &mut Rng| [0, 0, 8, 3][rng.below(4)];
        Layout { heads_inner: rng.chance(0.5), before: gap(rng), after: gap(rng) }
    }

    /// The elements of a `[B, H, S, D]` tensor as they lie, and the shape of all of them, gaps included: `[B, H, S, width]`, or
    /// `[B, S, H, width]` where heads are within positions.
    pub fn stored(self, data: &[f64], [b, h, s, d]: [usize; 4]) -> (Vec<f64>, [usize; 4]) {
        let Layout { heads_inner, before, after } = self;
        let width = before + d + after;
        let mut stored = vec![f64::NAN; b * h * s * width];
        for (n, row) in data.chunks_exact(d).enumerate() {
            let (bh, i) = (n / s, n % s);
            let at = if heads_inner { (bh / h * s + i) * h + bh % h } else { n };
            stored[at * width + before..][..d].copy_from_slice(row);
        }
        (stored, if heads_inner { [b, s, h, width] } else { [b, h, s, width] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_lie_where_they_are_told() {
        let data: Vec<f64> = (0..2 * 2 * 3).map(f64::from).collect();
        let stored = |layout: Layout| {
            let (stored, shape) = layout.stored(&data, [1, 2, 3, 2]);
            (stored.iter().map(|x| if x.is_nan() { -1 } else { *x as i32 }).collect::<Vec<_>>(), shape)
        };
        assert_eq!(stored(Layout::default()), ((0..12).collect(), [1, 2, 3, 2]));
        let gaps = stored(Layout { before: 1, ..Layout::default() });
        assert_eq!(gaps, (vec![-1, 0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1, 8, 9, -1, 10, 11], [1, 2, 3, 3]));
        let inner = stored(Layout { heads_inner: true, after: 1, ..Layout::default() });
        assert_eq!(inner, (vec![0, 1, -1, 6, 7, -1, 2, 3, -1, 8, 9, -1, 4, 5, -1, 10, 11, -1], [1, 3, 2, 3]));
    }
}
