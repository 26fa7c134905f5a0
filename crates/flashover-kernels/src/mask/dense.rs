//! A mask given point by point.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::Extent;
use super::error::{MaskError, broadcasts};
use super::fingerprint::Fingerprint;
use super::primitive::{Plane, Primitive, Reach};
use super::spans::{Span, Spans};

/// Booleans `[B, H, Sq, Skv]`, a bit each; `B` and `H` may be 1 for all batch elements or heads.
///
/// The one primitive with nothing but points: telling a row of tiles takes a look at all of its words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DenseMask {
    shape: [u32; 4],
    /// Rows of `⌈Skv / 32⌉` words, lowest bit first.
    words: Vec<u32>,
}

impl DenseMask {
    /// Packs booleans in row-major order.
    pub(super) fn new(shape: [u32; 4], visible: &[bool]) -> Result<Self, MaskError> {
        let expected = shape.iter().map(|&n| n as usize).product();
        if visible.len() != expected {
            return Err(MaskError::DenseLength { shape, unit: "booleans", expected, found: visible.len() });
        }
        let mut words = Vec::new();
        for row in visible.chunks_exact(shape[3].max(1) as usize) {
            words.extend(row.chunks(32).map(|bits| (0..).zip(bits).fold(0, |w, (n, &bit)| w | u32::from(bit) << n)));
        }
        Ok(DenseMask { shape, words })
    }

    /// `[B, H, Sq, Skv]`.
    pub fn shape(&self) -> [u32; 4] {
        self.shape
    }

    pub(super) fn bind(&self, extent: Extent) -> Result<&Self, MaskError> {
        let [batch, heads, seq_q, seq_kv] = self.shape;
        broadcasts("from_dense", "batch", extent.batch, batch as usize)?;
        broadcasts("from_dense", "heads", extent.heads, heads as usize)?;
        if (seq_q, seq_kv) != (extent.seq_q, extent.seq_kv) {
            let (expected, found) = ([extent.seq_q, extent.seq_kv], [seq_q, seq_kv]);
            return Err(MaskError::Lengths { what: "from_dense", expected, found });
        }
        let expected = self.shape[..3].iter().map(|&n| n as usize).product::<usize>() * seq_kv.div_ceil(32) as usize;
        if self.words.len() != expected {
            let (unit, found) = ("words", self.words.len());
            return Err(MaskError::DenseLength { shape: self.shape, unit, expected, found });
        }
        Ok(self)
    }

    pub(super) fn fingerprint(&self, out: &mut Fingerprint) {
        out.words(&self.shape);
        out.list(&self.words);
    }

    fn row(&self, plane: Plane, i: u32) -> &[u32] {
        let [batch, heads, seq_q, seq_kv] = self.shape.map(|n| n as usize);
        let b = if batch == 1 { 0 } else { plane.b as usize };
        let h = if heads == 1 { 0 } else { plane.h as usize };
        let words = seq_kv.div_ceil(32);
        &self.words[((b * heads + h) * seq_q + i as usize) * words..][..words]
    }
}

/// The keys of `keys` whose bits are set in `row`, whose first word holds keys from `first` on.
fn spans_of(row: &[u32], first: u32, keys: Span) -> Spans {
    let mut seen = Spans::none();
    for (word, base) in row.iter().zip((first..).step_by(32)) {
        let mut rest = *word;
        while rest != 0 {
            let start = rest.trailing_zeros();
            let length = (rest >> start).trailing_ones();
            seen.push((base + start) as i64, (base + start + length) as i64, keys);
            rest = if start + length == 32 { 0 } else { rest >> (start + length) << (start + length) };
        }
    }
    seen
}

impl Primitive for &DenseMask {
    fn allows(&self, plane: Plane, i: u32, j: u32) -> bool {
        self.row(plane, i)[j as usize / 32] >> (j % 32) & 1 == 1
    }

    fn reach(&self, plane: Plane, queries: Range<u32>, keys: Span) -> Reach {
        let words = (keys.start / 32) as usize..keys.end.div_ceil(32) as usize;
        let mut any = vec![0; words.len()];
        let mut all = vec![u32::MAX; words.len()];
        for i in queries {
            for ((any, all), &word) in any.iter_mut().zip(&mut all).zip(&self.row(plane, i)[words.clone()]) {
                *any |= word;
                *all &= word;
            }
        }
        let first = keys.start / 32 * 32;
        Reach { any: spans_of(&any, first, keys), all: spans_of(&all, first, keys) }
    }

    fn signature(&self, _: Plane, _: Range<u32>, _: Span, _: &mut Vec<u32>) -> bool {
        false
    }
}
