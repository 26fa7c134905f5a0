//! What bad plans are told.

use super::super::*;
use crate::problem::Element;

const EXTENT: Extent = Extent { batch: 1, heads: 2, seq_q: 24, seq_kv: 32 };
const TILE: TileSize = TileSize { bq: 8, bk: 8 };

fn refused<T>(result: Result<T, MaskError>, message: &str) {
    assert_eq!(result.map(|_| ()).unwrap_err().to_string(), message);
}

#[test]
fn tiles() {
    let plan = |bq, bk| BlockPlan::new(&Mask::causal(), EXTENT, TileSize { bq, bk });
    refused(plan(0, 8), "queries of a tile: expected at least 1, got 0");
    refused(plan(8, 0), "keys of a tile: expected at least 1, got 0");
    refused(plan(8, 5000), "keys of a tile: expected at most 4096, got 5000");
    let many = Extent { batch: 1 << 16, heads: 1 << 16, ..EXTENT };
    let every_head = Mask::function("every_third", crate::mask::tests::random::every_third).unwrap();
    refused(BlockPlan::new(&every_head, many, TILE), "rows of tiles: expected at most 268435456, got 17179869184");
    refused(
        BlockPlan::new(&Mask::sliding_window(0), EXTENT, TILE),
        "sliding_window: expected at least 1 key (the query's own), got 0",
    );
}

#[test]
fn bitmaps() {
    // Every tile differs from every other.
    let mask = Mask::function("scattered", |_, _, i, j| crate::dropout::mix(i * 1000 + j) & 1 == 0).unwrap();
    let plan = |max_bitmap_bytes| BlockPlan::with_options(&mask, EXTENT, TILE, PlanOptions { max_bitmap_bytes });
    // Both heads are asked and found to be the same.
    assert_eq!(plan(12 * 32).unwrap().bitmap_count(), 12);
    refused(
        plan(12 * 32 - 1),
        "bitmaps of partial tiles: expected at most 383 bytes (32 for each distinct tile), got more; raise \
         PlanOptions::max_bitmap_bytes",
    );
}

#[test]
fn a_plan_for_something_else() {
    let mask = Mask::per_head(vec![Mask::causal(), Mask::sinks(3)]);
    let plan = BlockPlan::new(&mask, EXTENT, TILE).unwrap();
    let problem = |batch, heads, seq_q, seq_kv| {
        let (q, k) = ([batch, heads, seq_q, 16], [batch, heads, seq_kv, 16]);
        Problem::new(q, k, k, Element::F32).unwrap()
    };
    plan.check_problem(&problem(5, 2, 24, 32)).unwrap();
    refused(plan.check_problem(&problem(1, 2, 24, 33)), "plan: expected [Sq, Skv] = [24, 33], got [24, 32]");
    refused(plan.check_problem(&problem(1, 4, 24, 32)), "plan: expected heads of 4 or 1, got 2");
    let batch = Mask::per_batch(vec![Mask::causal(), Mask::sinks(3)]);
    let of_batch = BlockPlan::new(&batch, Extent { batch: 2, ..EXTENT }, TILE).unwrap();
    of_batch.check_problem(&problem(2, 7, 24, 32)).unwrap();
    refused(of_batch.check_problem(&problem(3, 2, 24, 32)), "plan: expected batch of 3 or 1, got 2");
    plan.check_tile(TILE).unwrap();
    refused(
        plan.check_tile(TileSize { bq: 16, bk: 8 }),
        "plan: expected tiles of [16, 8] queries and keys, got [8, 8]",
    );
    plan.check_mask(&mask).unwrap();
    let (expected, found) = (Mask::causal().fingerprint(), mask.fingerprint());
    refused(
        plan.check_mask(&Mask::causal()),
        &format!("plan: expected one for the mask {expected:#018x}, got one for {found:#018x}"),
    );
    let listed = BlockPlan::from_bsr(EXTENT, TILE, Bsr::default(), Bsr::default(), None, PlanOptions::default());
    refused(
        listed.unwrap().check_mask(&Mask::causal()),
        &format!("plan: expected one for the mask {expected:#018x}, got one for blocks without a mask"),
    );
}

const ONE_HEAD: Extent = Extent { heads: 1, ..EXTENT };

#[test]
fn compressed_rows() {
    let import = |full: Bsr, partial: Bsr, mask: Option<&Mask>| {
        BlockPlan::from_bsr(ONE_HEAD, TILE, full, partial, mask, PlanOptions::default())
    };
    fn bsr<'a>(indptr: &'a [u32], indices: &'a [u32]) -> Bsr<'a> {
        Bsr { indptr, indices }
    }
    let (none, causal) = (Bsr::default(), Mask::causal());
    import(bsr(&[0, 1, 2, 4], &[0, 3, 0, 1]), bsr(&[0, 0, 0, 1], &[2]), Some(&causal)).unwrap();
    for (full, message) in [
        (bsr(&[0, 1], &[0]), "full blocks: expected 4 row starts (rows + 1), got 2"),
        (bsr(&[0, 1, 2, 3], &[0, 0, 4]), "full blocks: row 2: expected block indices below 4, got 4"),
        (bsr(&[0, 2, 2, 2], &[3, 3]), "full blocks: row 0: expected every block once, got 3 twice"),
        (bsr(&[0, 0, 2, 2], &[3, 2]), "full blocks: row 1: expected ascending block indices, got 2 after 3"),
        (bsr(&[0, 2, 1, 2], &[1, 2]), "full blocks: start of row 2: expected at least 2, got 1"),
        (bsr(&[0, 1, 1, 1], &[1, 2]), "full blocks: start of row 3: expected 2, the end of the indices, got 1"),
        (bsr(&[], &[1]), "full blocks: expected 4 row starts (rows + 1), got 0"),
    ] {
        refused(import(full, none, None), message);
        refused(import(none, full, Some(&causal)), &message.replace("full", "partial"));
    }
    let (first, other) = (bsr(&[0, 1, 1, 1], &[1]), bsr(&[0, 2, 2, 2], &[0, 1]));
    refused(
        import(first, other, Some(&causal)),
        "row 0: expected every block to be full or partial, got 1 in both lists",
    );
    refused(
        import(none, first, None),
        "partial blocks: expected a mask that gives their points, got 1 blocks and none",
    );
    let heads = Mask::per_head(vec![Mask::causal(), Mask::causal()]);
    refused(import(none, first, Some(&heads)), "per_head: expected 1 masks, got 2");
}

#[test]
fn padded_rows() {
    let import = |counts: &[u32], indices: &[u32], width| {
        let full = Padded { counts: counts.to_vec(), indices: indices.to_vec(), width };
        BlockPlan::from_padded(ONE_HEAD, TILE, &full, &Padded::default(), None, PlanOptions::default())
    };
    // What lies behind the count may be anything.
    let plan = import(&[1, 0, 2], &[3, 9, 9, 9, 0, 3], 2).unwrap();
    assert_eq!(plan.row(0, 0, 2).full, [0, 3]);
    refused(import(&[1, 0, 2], &[3, 9, 9, 9, 0], 2), "full blocks: expected 6 elements, got 5");
    refused(import(&[1, 0, 3], &[3, 9, 9, 9, 0, 3], 2), "full blocks: row 2: expected a count of at most 2, got 3");
    refused(
        import(&[1, 0, 2], &[3, 9, 9, 9, 3, 0], 2),
        "full blocks: row 2: expected ascending block indices, got 0 after 3",
    );
    refused(import(&[1, 0], &[3, 9, 9, 9], 2), "full blocks: expected 4 row starts (rows + 1), got 3");
    refused(import(&[1, 1, 1], &[3, 4, 0], 1), "full blocks: row 1: expected block indices below 4, got 4");
}

#[test]
fn files() {
    // Two tiles of 4 × 4 over 4 × 6 points: the second is cut off.
    let read = |full: &str, partial: &str, bitmaps: &str| -> Result<BlockPlan, String> {
        let text = format!(
            r#"{{"extent":{{"batch":1,"heads":1,"seq_q":4,"seq_kv":6}},"tile":{{"bq":4,"bk":4}},"fingerprint":null,
            {full},{partial},"bitmaps":{bitmaps}}}"#
        );
        serde_json::from_str(&text).map_err(|error| error.to_string())
    };
    let full = r#""full_starts":[0,1],"full":[0]"#;
    let partial = r#""partial_starts":[0,1],"partial":[1],"partial_bitmaps":[0]"#;
    assert_eq!(read(full, partial, "[3,3,3,1]").unwrap().points(), 16 + 7);
    let outside = "row 0: expected only points inside the tensors to be visible, got others in block 1";
    let none = r#""partial_starts":[0,0],"partial":[],"partial_bitmaps":[]"#;
    for (full, partial, bitmaps, message) in [
        (full, partial, "[3,3,3,7]", outside),
        (r#""full_starts":[0,2],"full":[0,1]"#, none, "[]", outside),
        (full, partial, "[]", "plan: expected bitmap indices below 0, got 0"),
        (full, partial, "[3,3,3,1,1]", "words of bitmaps: expected 4 elements, got 5"),
        (
            full,
            r#""partial_starts":[0,1],"partial":[1],"partial_bitmaps":[]"#,
            "[3,3,3,1]",
            "bitmaps of partial blocks: expected 1 elements, got 0",
        ),
        (
            r#""full_starts":[],"full":[]"#,
            partial,
            "[3,3,3,1]",
            "row starts of full blocks: expected 2 elements, got 0",
        ),
        (
            full,
            r#""partial_starts":[],"partial":[],"partial_bitmaps":[]"#,
            "[3,3,3,1]",
            "row starts of partial blocks: expected 2 elements, got 0",
        ),
        (r#""full_starts":[0,1],"full":[2]"#, none, "[]", "full blocks: row 0: expected block indices below 2, got 2"),
    ] {
        assert_eq!(read(full, partial, bitmaps).unwrap_err(), message);
    }
}
