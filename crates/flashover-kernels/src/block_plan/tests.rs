//! Plans against the points of their masks.

mod large;
mod messages;
mod walk;

use super::*;
use crate::mask::tests::random::{Random, expression};
use crate::mask::{BoundMask, TileKind};

const CASES: usize = 500;

/// A mask over at least 8 × 8 tiles.
struct Case {
    mask: Mask,
    extent: Extent,
    tile: TileSize,
}

/// What a plan must say of each tile, row by row: by its points, and Partial where the end of the keys cuts a tile off.
fn kinds(bound: &BoundMask, extent: Extent, tile: TileSize) -> Vec<TileKind> {
    let mut kinds = Vec::new();
    for (b, h) in (0..extent.batch).flat_map(|b| (0..extent.heads).map(move |h| (b, h))) {
        for (i, j) in tiles(extent, tile) {
            let (queries, keys) = (tile.queries(extent, i), tile.keys(extent, j));
            let all = queries.len() as u32 * tile.bk;
            let points = queries.flat_map(|i| keys.clone().map(move |j| (i, j)));
            kinds.push(match points.filter(|&(i, j)| bound.allows(b, h, i, j)).count() as u32 {
                0 => TileKind::Empty,
                seen if seen == all => TileKind::Full,
                _ => TileKind::Partial,
            });
        }
    }
    kinds
}

fn tiles(extent: Extent, tile: TileSize) -> impl Iterator<Item = (u32, u32)> {
    (0..tile.query_tiles(extent)).flat_map(move |i| (0..tile.key_tiles(extent)).map(move |j| (i, j)))
}

/// What a plan says of each tile.
fn planned(plan: &BlockPlan, extent: Extent) -> Vec<TileKind> {
    let mut kinds = Vec::new();
    for (b, h) in (0..extent.batch).flat_map(|b| (0..extent.heads).map(move |h| (b, h))) {
        kinds.extend(tiles(extent, plan.tile()).map(|(i, j)| kind_of(plan.row(b, h, i), j)));
    }
    kinds
}

fn kind_of(blocks: Blocks, tile: u32) -> TileKind {
    match (blocks.full.contains(&tile), blocks.partial.contains(&tile)) {
        (false, false) => TileKind::Empty,
        (true, false) => TileKind::Full,
        (false, true) => TileKind::Partial,
        _ => panic!("{tile} is in both lists"),
    }
}

/// Random combinations of which at least a fifth of the tiles is of each kind.
fn cases() -> impl Iterator<Item = (Case, Vec<TileKind>)> {
    let mut r = Random(2205_14135);
    std::iter::repeat_with(move || {
        let tile = TileSize { bq: r.within(1, 9), bk: [r.within(1, 9), r.within(30, 40)][usize::from(r.chance(10))] };
        let seq_q = r.within(7 * tile.bq + 1, 11 * tile.bq);
        let seq_kv = r.within(7 * tile.bk + 1, 11 * tile.bk);
        let many = r.chance(20);
        let [batch, heads] = [(); 2].map(|()| if many { r.within(1, 2) } else { 1 });
        let extent = Extent { batch, heads, seq_q, seq_kv };
        let depth = r.within(1, 4);
        Case { mask: expression(depth, extent, &mut r), extent, tile }
    })
    .filter_map(|case| {
        let bound = case.mask.bind(case.extent).unwrap();
        let kinds = kinds(&bound, case.extent, case.tile);
        let enough = |kind| kinds.iter().filter(|&&k| k == kind).count() * 5 >= kinds.len();
        let all = [TileKind::Empty, TileKind::Full, TileKind::Partial].into_iter().all(enough);
        drop(bound);
        all.then_some((case, kinds))
    })
    .take(CASES)
}

#[test]
fn plans_of_random_combinations_miss_nothing_and_are_exact_once_refined() {
    let (mut settled, mut total, mut inexact) = (0, 0, 0);
    for (Case { mask, extent, tile }, kinds) in cases() {
        let plan = BlockPlan::new(&mask, extent, tile).unwrap();
        let context = format!("{mask:?} {extent:?} {tile:?}");
        assert!(plan.query_tiles() >= 8 && plan.key_tiles() >= 8, "{context}");
        for (&found, &kind) in planned(&plan, extent).iter().zip(&kinds) {
            assert!(found == kind || found == TileKind::Partial, "{found:?} is {kind:?}: {context}");
            settled += usize::from(found == kind);
            total += 1;
        }
        inexact += usize::from(!plan.is_exact());
        check_bitmaps(&plan, &mask, extent);
        check_transpose(&plan);
        walk::check(&plan);
        let points = plan.points();
        let refined = plan.refine();
        assert_eq!(planned(&refined, extent), kinds, "{context}");
        assert!(refined.is_exact());
        assert_eq!(refined.points(), points, "{context}");
        check_bitmaps(&refined, &mask, extent);
        check_transpose(&refined);
        check_densities(&refined, &mask, extent);
        walk::check(&refined);
        check_copies(&refined, &mask);
    }
    assert!(settled * 100 > total * 85, "{settled} of {total} tiles are settled by structure");
    assert!(inexact > CASES / 10, "refining has something to do: {inexact}");
}

/// Every bit of every Partial tile is the point it stands for, and 0 outside the tensors.
fn check_bitmaps(plan: &BlockPlan, mask: &Mask, extent: Extent) {
    let bound = mask.bind(extent).unwrap();
    let tile = plan.tile();
    for (b, h) in (0..extent.batch).flat_map(|b| (0..extent.heads).map(move |h| (b, h))) {
        for i in 0..plan.query_tiles() {
            let blocks = plan.row(b, h, i);
            for (&j, &bitmap) in blocks.partial.iter().zip(blocks.bitmaps) {
                let words = plan.bitmap(bitmap);
                for (row, bits) in (i * tile.bq..).zip(words.chunks_exact(tile.row_words())) {
                    for column in 0..32 * tile.row_words() as u32 {
                        let key = j * tile.bk + column;
                        let inside = row < extent.seq_q && column < tile.bk && key < extent.seq_kv;
                        let expected = inside && bound.allows(b, h, row, key);
                        let bit = bits[column as usize / 32] >> (column % 32) & 1 == 1;
                        assert_eq!(bit, expected, "{mask:?} {extent:?} {tile:?} {b} {h} {row} {key}");
                    }
                }
            }
        }
    }
}

/// Columns list what rows list, in order.
fn check_transpose(plan: &BlockPlan) {
    for (b, h) in (0..plan.batch()).flat_map(|b| (0..plan.heads()).map(move |h| (b, h))) {
        let columns: Vec<Blocks> = (0..plan.key_tiles()).map(|j| plan.column(b, h, j)).collect();
        let mut listed = (0, 0);
        for i in 0..plan.query_tiles() {
            let row = plan.row(b, h, i);
            listed = (listed.0 + row.full.len(), listed.1 + row.partial.len());
            assert!(row.full.iter().all(|&j| columns[j as usize].full.contains(&i)));
            for (&j, bitmap) in row.partial.iter().zip(row.bitmaps) {
                let column = columns[j as usize];
                let at = column.partial.iter().position(|&found| found == i).unwrap();
                assert_eq!(&column.bitmaps[at], bitmap);
            }
            assert!(row.full.is_sorted_by(|a, b| a < b) && row.partial.is_sorted_by(|a, b| a < b));
        }
        let full: usize = columns.iter().map(|column| column.full.len()).sum();
        let partial: usize = columns.iter().map(|column| column.partial.len()).sum();
        assert_eq!((full, partial), listed);
        assert!(columns.iter().all(|c| c.full.is_sorted_by(|a, b| a < b) && c.partial.is_sorted_by(|a, b| a < b)));
    }
}

fn check_densities(plan: &BlockPlan, mask: &Mask, extent: Extent) {
    let bound = mask.bind(extent).unwrap();
    let Extent { batch, heads, seq_q, seq_kv } = extent;
    let mut seen = 0;
    for (b, h) in (0..batch).flat_map(|b| (0..heads).map(move |h| (b, h))) {
        seen += (0..seq_q)
            .flat_map(|i| (0..seq_kv).map(move |j| (i, j)))
            .filter(|&(i, j)| bound.allows(b, h, i, j))
            .count();
    }
    let all = (batch * heads * seq_q * seq_kv) as f64;
    assert!((plan.point_density() - seen as f64 / all).abs() < 1e-12);
    let kinds = planned(plan, extent);
    let listed = kinds.iter().filter(|&&kind| kind != TileKind::Empty).count();
    assert!((plan.density() - listed as f64 / kinds.len() as f64).abs() < 1e-12);
}

/// A plan survives a file, and the way through other libraries' arrays.
fn check_copies(plan: &BlockPlan, mask: &Mask) {
    let read: BlockPlan = serde_json::from_str(&serde_json::to_string(plan).unwrap()).unwrap();
    assert_eq!(&read, plan);
    read.check_mask(mask).unwrap();
    let (tile, extent) = (plan.tile(), plan.extent);
    // A mask that tells heads apart can only be asked with all of them.
    if mask.bind(extent).is_err() {
        return;
    }
    let (full, partial) = plan.to_bsr();
    let options = PlanOptions::default();
    let imported = BlockPlan::from_bsr(extent, tile, full, partial, Some(mask), options).unwrap();
    assert_eq!(&imported, plan);
    let (full, partial) = plan.to_padded();
    let imported = BlockPlan::from_padded(extent, tile, &full, &partial, Some(mask), options).unwrap();
    assert_eq!(&imported, plan);
}

#[test]
fn a_dense_mask_gives_the_plan_of_the_mask_that_it_was_drawn_from() {
    let extent = Extent { batch: 1, heads: 2, seq_q: 37, seq_kv: 45 };
    let tile = TileSize { bq: 8, bk: 8 };
    let mask = Mask::per_head(vec![Mask::causal(), Mask::window(9, 4) | Mask::sinks(8)]);
    let bound = mask.bind(extent).unwrap();
    let points: Vec<bool> = (0..2 * 37 * 45).map(|n| bound.allows(0, n / (37 * 45), n / 45 % 37, n % 45)).collect();
    let drawn = BlockPlan::from_dense([1, 2, 37, 45], &points, tile).unwrap();
    let plan = BlockPlan::new(&mask, extent, tile).unwrap().refine();
    assert!(drawn.is_exact());
    assert_eq!(drawn.to_bsr(), plan.to_bsr());
    assert_eq!((&drawn.bitmaps, drawn.points()), (&plan.bitmaps, plan.points()));
    drawn.check_mask(&mask).unwrap_err();
}

#[test]
fn blocks_without_a_mask_are_full() {
    let extent = Extent { batch: 1, heads: 1, seq_q: 20, seq_kv: 20 };
    let tile = TileSize { bq: 8, bk: 8 };
    // The last key tile holds four keys.
    let full = Bsr { indptr: &[0, 2, 2, 3], indices: &[0, 2, 1] };
    let plan = BlockPlan::from_bsr(extent, tile, full, Bsr::default(), None, PlanOptions::default()).unwrap();
    assert_eq!(plan.row(0, 0, 0), Blocks { full: &[0], partial: &[2], bitmaps: &[0] });
    assert!(plan.row(0, 0, 1).is_empty());
    assert!(plan.bitmap(0).iter().all(|&word| word == 0b1111));
    assert_eq!((plan.points(), plan.fingerprint()), (8 * 8 + 8 * 4 + 4 * 8, None));
    assert!(plan.is_exact());
}

#[test]
fn one_plan_serves_heads_that_do_not_differ() {
    let extent = Extent { batch: 3, heads: 4, seq_q: 64, seq_kv: 64 };
    let tile = TileSize { bq: 16, bk: 16 };
    let plan = |mask: &Mask| BlockPlan::new(mask, extent, tile).unwrap();
    let shared = plan(&Mask::causal());
    assert_eq!((shared.batch(), shared.heads(), shared.plane(2, 3)), (1, 1, 0));
    let heads = plan(&Mask::per_head((0..4).map(|n| Mask::sinks(16 * n)).collect()));
    assert_eq!((heads.batch(), heads.heads(), heads.plane(2, 3)), (1, 4, 3));
    assert_eq!(heads.row(2, 3, 0).full, [0, 1, 2]);
    let batch = plan(&Mask::per_batch((0..3).map(|n| Mask::sinks(16 * n)).collect()));
    assert_eq!((batch.batch(), batch.heads(), batch.plane(2, 3)), (3, 1, 2));
    let both = plan(&(Mask::function("every_third", crate::mask::tests::random::every_third).unwrap()));
    assert_eq!((both.batch(), both.heads(), both.plane(2, 3)), (3, 4, 11));
    assert_eq!(both.bitmap_count(), 3);
}

#[test]
fn heads_and_batch_elements_do_not_share_bitmaps_that_only_look_alike() {
    // A mask and its complement lie alike in a tile, and show opposite points.
    let extent = Extent { batch: 2, heads: 2, seq_q: 64, seq_kv: 64 };
    let alike = || vec![Mask::window(20, 9), !Mask::window(20, 9)];
    for mask in [Mask::per_head(alike()), Mask::per_batch(alike())] {
        let plan = BlockPlan::new(&mask, extent, TileSize { bq: 16, bk: 16 }).unwrap();
        check_bitmaps(&plan, &mask, extent);
        assert!(plan.block_counts().1 > 8);
    }
}

#[test]
fn rows_are_ordered_by_their_blocks() {
    let extent = Extent { batch: 1, heads: 2, seq_q: 64, seq_kv: 64 };
    let tile = TileSize { bq: 16, bk: 16 };
    let mask = Mask::per_head(vec![Mask::causal(), Mask::sinks(40)]);
    let plan = BlockPlan::new(&mask, extent, tile).unwrap();
    assert_eq!(plan.row_order(), [3, 2, 4, 5, 6, 7, 1, 0]);
    assert_eq!(plan.column_order(), [0, 4, 5, 6, 1, 2, 3, 7]);
}

#[test]
fn masks_that_see_nothing_and_sequences_without_tokens_have_plans() {
    let tile = TileSize { bq: 8, bk: 8 };
    for (seq_q, seq_kv) in [(20, 20), (0, 20), (20, 0), (0, 0)] {
        let extent = Extent { batch: 2, heads: 2, seq_q, seq_kv };
        let nothing = Mask::per_head(vec![Mask::Nothing, Mask::causal() & !Mask::causal()]);
        for mask in [Mask::Nothing, nothing, Mask::documents(vec![1; seq_q as usize], vec![2; seq_kv as usize])] {
            let plan = BlockPlan::new(&mask, extent, tile).unwrap().refine();
            assert_eq!((plan.block_counts(), plan.bitmap_count(), plan.points()), ((0, 0), 0, 0));
            assert_eq!((plan.density(), plan.point_density()), (0.0, 0.0));
            check_transpose(&plan);
            walk::check(&plan);
        }
        walk::check(&BlockPlan::new(&Mask::causal(), extent, tile).unwrap());
    }
}

#[test]
fn queries_past_the_end_do_not_make_a_tile_partial_and_keys_do() {
    let extent = Extent { batch: 1, heads: 1, seq_q: 12, seq_kv: 20 };
    let plan = BlockPlan::new(&Mask::Everything, extent, TileSize { bq: 8, bk: 8 }).unwrap();
    for i in 0..2 {
        assert_eq!((plan.row(0, 0, i).full, plan.row(0, 0, i).partial), (&[0, 1][..], &[2][..]));
    }
    assert_eq!((plan.points(), plan.bitmap_count()), (12 * 20, 2));
    assert!(plan.is_exact());
}

#[test]
fn a_plan_describes_itself() {
    let extent = Extent { batch: 4, heads: 2, seq_q: 1000, seq_kv: 1000 };
    let plan = BlockPlan::new(&Mask::causal(), extent, TileSize { bq: 128, bk: 64 }).unwrap();
    assert_eq!(
        plan.to_string(),
        "1×1 planes of 8×16 tiles (128×64): 56 full and 16 partial blocks, 4 bitmaps, 56.25 % of the blocks and 50.05 % of \
         the points, 0.01 MB"
    );
}
