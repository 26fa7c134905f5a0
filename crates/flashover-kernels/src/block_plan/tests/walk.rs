//! Reading the flat buffer as a kernel does.

use super::super::flat::{FORMAT, bit_is_set, bit_word, block_count, block_word, header};
use super::super::*;

/// The Full blocks and the Partial ones with the words of their bitmaps, of a row or column.
type Walk = (Vec<u32>, Vec<(u32, Vec<u32>)>);

fn walk(words: &[u32], starts: usize, row: usize) -> Walk {
    let at = words[starts] as usize + 2 * row;
    let [full, partial, end] = [0, 1, 2].map(|n| words[at + n] as usize);
    let each = (words[header::BQ] * words[header::ROW_WORDS]) as usize;
    let bitmap = |at: u32| words[at as usize..at as usize + each].to_vec();
    let blocks = (partial..end).step_by(2).map(|at| (words[at], bitmap(words[at + 1])));
    (words[full..partial].to_vec(), blocks.collect())
}

/// The same in the single loop that kernels run: each block with the offset of its bitmap, if it is Partial.
fn walk_in_one_loop(words: &[u32], starts: usize, row: usize) -> Vec<(u32, Option<u32>)> {
    let at = words[starts] as usize + 2 * row;
    let [full, partial, end] = [0, 1, 2].map(|n| words[at + n]);
    let block = |n: u32| {
        let at = block_word(n, full, partial);
        (words[at as usize], (at >= partial).then(|| words[at as usize + 1]))
    };
    (0..block_count(full, partial, end)).map(block).collect()
}

/// The bits of a bitmap, in the words that the plan keeps.
fn read_bits(words: &[u32], bitmap: u32, tile: TileSize) -> Vec<u32> {
    let width = words[header::ROW_WORDS];
    let mut out = vec![0; tile.bitmap_words()];
    for (r, c) in (0..tile.bq).flat_map(|r| (0..tile.bk).map(move |c| (r, c))) {
        if bit_is_set(words[bit_word(bitmap, width, r, c) as usize], c) {
            out[(r * width + c / 32) as usize] |= 1 << (c % 32);
        }
    }
    out
}

/// Checks that the flat buffer of a plan says what the plan says.
pub(super) fn check(plan: &BlockPlan) {
    let words = plan.to_words();
    assert_eq!(words.len(), plan.flat_words());
    for (at, expected) in [
        (header::VERSION, FORMAT),
        (header::BQ, plan.tile().bq),
        (header::BK, plan.tile().bk),
        (header::QUERY_TILES, plan.query_tiles()),
        (header::KEY_TILES, plan.key_tiles()),
        (header::BATCH, plan.batch()),
        (header::HEADS, plan.heads()),
        (header::ROW_WORDS, plan.tile().row_words() as u32),
        (header::BITMAP_COUNT, plan.bitmap_count() as u32),
        (header::TOTAL, words.len() as u32),
    ] {
        assert_eq!(words[at], expected, "word {at} of the header");
    }
    assert_eq!(words[header::BITMAPS] as usize + plan.bitmaps.len(), words.len());
    for (starts, order, tiles, by_row) in [
        (header::ROW_STARTS, header::ROW_ORDER, plan.query_tiles(), true),
        (header::COLUMN_STARTS, header::COLUMN_ORDER, plan.key_tiles(), false),
    ] {
        let rows = (plan.batch() * plan.heads() * tiles) as usize;
        let mut lengths = Vec::new();
        for n in 0..rows {
            let row = words[words[order] as usize + n];
            let (plane, tile) = (row / tiles, row % tiles);
            let (b, h) = (plane / plan.heads(), plane % plan.heads());
            let blocks = if by_row { plan.row(b, h, tile) } else { plan.column(b, h, tile) };
            let (full, partial) = walk(&words, starts, row as usize);
            assert_eq!(full, blocks.full);
            let bitmaps = blocks.bitmaps.iter().map(|&bitmap| plan.bitmap(bitmap).to_vec());
            assert_eq!(partial, blocks.partial.iter().copied().zip(bitmaps).collect::<Vec<_>>());
            let one_loop = walk_in_one_loop(&words, starts, row as usize);
            let listed: Vec<u32> = one_loop.iter().map(|block| block.0).collect();
            assert_eq!(listed, [blocks.full, blocks.partial].concat());
            let offsets: Vec<u32> = one_loop.iter().filter_map(|block| block.1).collect();
            assert_eq!(offsets.len(), blocks.partial.len());
            for (&offset, &bitmap) in offsets.iter().zip(blocks.bitmaps) {
                assert_eq!(read_bits(&words, offset, plan.tile()), plan.bitmap(bitmap));
            }
            lengths.push(blocks.len());
        }
        assert!(lengths.is_sorted_by(|a, b| a >= b), "longest first: {lengths:?}");
        let mut order = words[words[order] as usize..][..rows].to_vec();
        order.sort_unstable();
        assert!(order.into_iter().eq(0..rows as u32), "every row once");
    }
}
