//! The points of Partial tiles as bitmaps, equal ones kept once.
//!
//! A structured mask has few distinct tiles: along a diagonal they all look the same. They are recognized by their
//! signature, a few words that each primitive derives from where the tile lies, so that points are visited once for
//! each signature and not once for each tile. Where a mask has no signature (dense masks, functions), every Partial tile
//! is evaluated and recognized by its bits.

use std::collections::HashMap;
use std::ops::Range;

use super::TileSize;
use crate::mask::primitive::{Plane, set_bits};
use crate::mask::spans::Span;
use crate::mask::{BoundMask, MaskError};

/// Bitmaps under construction.
pub(super) struct Dictionary {
    tile: TileSize,
    limit: usize,
    words: Vec<u32>,
    by_signature: HashMap<Vec<u32>, u32>,
    by_bits: HashMap<u64, Vec<u32>>,
    signature: Vec<u32>,
}

impl Dictionary {
    pub(super) fn new(tile: TileSize, limit: usize) -> Self {
        let (by_signature, by_bits) = (HashMap::new(), HashMap::new());
        Dictionary { tile, limit, words: vec![], by_signature, by_bits, signature: vec![] }
    }

    /// The bitmap of a tile of the mask.
    pub(super) fn of_mask(
        &mut self,
        mask: &BoundMask,
        plane: Plane,
        queries: Range<u32>,
        keys: Span,
    ) -> Result<u32, MaskError> {
        self.signature.clear();
        self.signature.extend([queries.len() as u32, keys.end - keys.start]);
        let signed = mask.signature(plane, queries.clone(), keys, &mut self.signature);
        if signed && let Some(&id) = self.by_signature.get(&self.signature) {
            return Ok(id);
        }
        let bits = mask.bits(plane.b, plane.h, queries, keys.start..keys.end);
        let id = self.of_bits(&bits, keys.end - keys.start)?;
        if signed {
            self.by_signature.insert(self.signature.clone(), id);
        }
        Ok(id)
    }

    /// The bitmap of a tile with `rows` queries and `columns` keys in the tensors, all of them visible.
    pub(super) fn of_visible(&mut self, rows: u32, columns: u32) -> Result<u32, MaskError> {
        let mut bits = vec![0; rows as usize * columns.div_ceil(32) as usize];
        for row in bits.chunks_exact_mut(columns.div_ceil(32) as usize) {
            set_bits(row, 0, columns);
        }
        self.of_bits(&bits, columns)
    }

    /// The bitmap with the given bits, in rows of `⌈columns / 32⌉` words; what a tile has beyond is 0.
    pub(super) fn of_bits(&mut self, bits: &[u32], columns: u32) -> Result<u32, MaskError> {
        let (each, width) = (self.tile.bitmap_words(), self.tile.row_words());
        let start = self.words.len();
        self.words.resize(start + each, 0);
        let given = columns.div_ceil(32) as usize;
        for (row, bits) in self.words[start..].chunks_exact_mut(width).zip(bits.chunks_exact(given)) {
            row[..given].copy_from_slice(bits);
        }
        let (known, new) = self.words.split_at(start);
        let same = self.by_bits.entry(hash(new)).or_default();
        if let Some(&id) = same.iter().find(|&&id| &known[id as usize * each..][..each] == new) {
            self.words.truncate(start);
            return Ok(id);
        }
        if size_of_val(self.words.as_slice()) > self.limit {
            return Err(MaskError::Bitmaps { limit: self.limit, each: each * size_of::<u32>() });
        }
        let id = (start / each) as u32;
        same.push(id);
        Ok(id)
    }

    pub(super) fn finish(mut self) -> Vec<u32> {
        self.words.shrink_to_fit();
        self.words
    }
}

/// A hash of bits, good enough to look them up by: collisions are told apart by comparison.
fn hash(words: &[u32]) -> u64 {
    words.iter().fold(0x9e37_79b9_7f4a_7c15, |hash: u64, &word| {
        let mixed = (hash ^ u64::from(word)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed ^ mixed >> 32
    })
}
