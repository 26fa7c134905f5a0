//! Reading the flat buffer as a kernel does.

use super::super::flat::{FORMAT, header};
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

/// The same in the single loop that the layout describes.
fn walk_in_one_loop(words: &[u32], starts: usize, row: usize) -> Vec<(u32, Option<u32>)> {
    let at = words[starts] as usize + 2 * row;
    let [full, partial, end] = [0, 1, 2].map(|n| words[at + n]);
    let count = partial - full;
    let block = |n: u32| {
        if n < count {
            (words[(full + n) as usize], None)
        } else {
            let at = (partial + 2 * (n - count)) as usize;
            (words[at], Some(words[at + 1]))
        }
    };
    (0..count + (end - partial) / 2).map(block).collect()
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
            assert_eq!(one_loop.iter().filter(|block| block.1.is_none()).count(), blocks.full.len());
            lengths.push(blocks.len());
        }
        assert!(lengths.is_sorted_by(|a, b| a >= b), "longest first: {lengths:?}");
        let mut order = words[words[order] as usize..][..rows].to_vec();
        order.sort_unstable();
        assert!(order.into_iter().eq(0..rows as u32), "every row once");
    }
}
