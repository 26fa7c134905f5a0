//! A plan of a mask, in time of the blocks that it lists.

use super::bitmaps::Dictionary;
use super::lists::BlockLists;
use super::{BlockPlan, PlanOptions, TileSize};
use crate::mask::primitive::{Plane, Reach};
use crate::mask::spans::Span;
use crate::mask::{BoundMask, Extent, Mask, MaskError};

impl BlockPlan {
    /// The plan of a mask, with [`PlanOptions::default`]. See [`with_options`](Self::with_options).
    pub fn new(mask: &Mask, extent: Extent, tile: TileSize) -> Result<Self, MaskError> {
        BlockPlan::with_options(mask, extent, tile, PlanOptions::default())
    }

    /// The plan of a mask: one for all batch elements or heads where the mask does not tell them apart.
    ///
    /// No tile with a visible point is missing, and no Full tile has a hidden one. Where masks are combined, a Partial
    /// tile may turn out to be Empty or Full: [`refine`](Self::refine) settles that.
    ///
    /// Each row of tiles asks the mask once for the keys that any and that all of its queries see, and takes time of
    /// the blocks it lists. Dense masks look at all of their words, and functions are called for every point of
    /// Partial tiles.
    ///
    /// # Errors
    /// [`Mask::bind`]'s; a tile without queries or keys, or with more than [`TileSize::MAX`]; more than 2²⁸ blocks;
    /// bitmaps beyond [`PlanOptions::max_bitmap_bytes`].
    pub fn with_options(mask: &Mask, extent: Extent, tile: TileSize, options: PlanOptions) -> Result<Self, MaskError> {
        let bound = mask.bind(extent)?;
        let batch = if mask.varies_by_batch() { extent.batch } else { 1 };
        let heads = if mask.varies_by_head() { extent.heads } else { 1 };
        let planes = Extent { batch, heads, ..extent };
        tile.check(planes)?;
        let mut dictionary = Dictionary::new(tile, options.max_bitmap_bytes);
        let mut rows = BlockLists::with_capacity(planes.planes() * tile.query_tiles(extent) as usize);
        for b in 0..batch {
            for h in 0..heads {
                for i in 0..tile.query_tiles(extent) {
                    list_row(&bound, Plane { b, h }, tile, i, &mut dictionary, &mut rows)?;
                }
            }
        }
        Ok(BlockPlan::assemble(planes, tile, Some(mask.fingerprint()), rows, dictionary.finish()))
    }
}

/// Adds the key tiles of query tile `i`.
fn list_row(
    mask: &BoundMask,
    plane: Plane,
    tile: TileSize,
    i: u32,
    dictionary: &mut Dictionary,
    rows: &mut BlockLists,
) -> Result<(), MaskError> {
    let extent = mask.extent();
    let queries = tile.queries(extent, i);
    if extent.seq_kv > 0 {
        let reach = mask.reach(plane, queries.clone(), Span { start: 0, end: extent.seq_kv });
        let mut full = FullTiles::new(&reach, tile.bk);
        for j in visible_tiles(&reach, tile.bk) {
            if full.contains(j) {
                rows.full.push(j);
            } else {
                let keys = tile.keys(extent, j);
                let keys = Span { start: keys.start, end: keys.end };
                rows.push_partial(j, dictionary.of_mask(mask, plane, queries.clone(), keys)?);
            }
        }
    }
    rows.end_row()
}

/// Key tiles with a key that some query sees, ascending.
fn visible_tiles(reach: &Reach, bk: u32) -> impl Iterator<Item = u32> {
    let mut next = 0;
    reach.any.as_slice().iter().flat_map(move |span| {
        // Two spans may touch the same tile.
        let tiles = next.max(span.start / bk)..(span.end - 1) / bk + 1;
        next = tiles.end;
        tiles
    })
}

/// Key tiles that all queries see whole: a tile cut off by the end of the keys is none of them.
struct FullTiles<'a> {
    rest: &'a [Span],
    bk: u32,
}

impl<'a> FullTiles<'a> {
    fn new(reach: &'a Reach, bk: u32) -> Self {
        FullTiles { rest: reach.all.as_slice(), bk }
    }

    /// Whether the tile is one of them; asked in ascending order.
    fn contains(&mut self, j: u32) -> bool {
        let (start, end) = (j * self.bk, (j + 1) * self.bk);
        while self.rest.first().is_some_and(|span| span.end < end) {
            self.rest = &self.rest[1..];
        }
        self.rest.first().is_some_and(|span| span.start <= start)
    }
}
