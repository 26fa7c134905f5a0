//! Masks against their points.

mod definitions;
mod messages;
pub(crate) mod random;

use std::collections::HashMap;
use std::ops::Range;

use self::random::{FAMILIES, Random, expression, primitive};
use super::primitive::Plane;
use super::spans::Span;
use super::*;

/// Lengths with more queries than keys, fewer, and as many; now and then very few.
fn extent(r: &mut Random) -> Extent {
    let longest = if r.chance(20) { 5 } else { 130 };
    Extent { batch: r.within(1, 3), heads: r.within(1, 3), seq_q: r.within(1, longest), seq_kv: r.within(1, longest) }
}

/// A random part of `0 .. length`, not empty.
fn part(length: u32, r: &mut Random) -> Range<u32> {
    let size = r.within(1, length.min(40));
    let start = r.within(0, length - size);
    start..start + size
}

fn dense_kind(bound: &BoundMask, plane: Plane, queries: Range<u32>, keys: Range<u32>) -> TileKind {
    let mut points = queries.flat_map(|i| keys.clone().map(move |j| (i, j)));
    let first = points.next().map(|(i, j)| bound.allows(plane.b, plane.h, i, j));
    match (points.all(|(i, j)| Some(bound.allows(plane.b, plane.h, i, j)) == first), first) {
        (true, Some(true)) => TileKind::Full,
        (true, _) => TileKind::Empty,
        _ => TileKind::Partial,
    }
}

#[test]
fn every_primitive_classifies_tiles_as_its_points_say() {
    for family in FAMILIES {
        let mut r = Random(7);
        let mut kinds = [0; 3];
        for _ in 0..400 {
            let extent = extent(&mut r);
            let mask = primitive(family, extent, &mut r);
            let bound = mask.bind(extent).unwrap();
            for _ in 0..40 {
                let plane = Plane { b: r.within(0, extent.batch - 1), h: r.within(0, extent.heads - 1) };
                let (queries, keys) = (part(extent.seq_q, &mut r), part(extent.seq_kv, &mut r));
                let kind = bound.classify(plane.b, plane.h, queries.clone(), keys.clone());
                let expected = dense_kind(&bound, plane, queries.clone(), keys.clone());
                assert_eq!(kind, expected, "{mask:?} {extent:?} {plane:?} {queries:?} {keys:?}");
                kinds[kind as usize] += 1;
            }
        }
        let constant = family == "everything or nothing";
        let often = |kind: TileKind| kinds[kind as usize] > 500 || constant && kind == TileKind::Partial;
        assert!([TileKind::Empty, TileKind::Full, TileKind::Partial].into_iter().all(often), "{family}: {kinds:?}");
    }
}

#[test]
fn the_keys_that_any_and_all_queries_see_are_exact_for_primitives() {
    for family in FAMILIES {
        let mut r = Random(8);
        for _ in 0..300 {
            let extent = extent(&mut r);
            let mask = primitive(family, extent, &mut r);
            let bound = mask.bind(extent).unwrap();
            let plane = Plane { b: r.within(0, extent.batch - 1), h: r.within(0, extent.heads - 1) };
            let (queries, keys) = (part(extent.seq_q, &mut r), part(extent.seq_kv, &mut r));
            let reach = bound.reach(plane, queries.clone(), Span { start: keys.start, end: keys.end });
            let seen = |i, j| bound.allows(plane.b, plane.h, i, j);
            let any: Vec<u32> = keys.clone().filter(|&j| queries.clone().any(|i| seen(i, j))).collect();
            let all: Vec<u32> = keys.clone().filter(|&j| queries.clone().all(|i| seen(i, j))).collect();
            for (what, spans, expected) in [("any", &reach.any, any), ("all", &reach.all, all)] {
                let found: Vec<u32> = spans.as_slice().iter().flat_map(|span| span.start..span.end).collect();
                assert_eq!(found, expected, "{what} {mask:?} {extent:?} {queries:?} {keys:?}");
            }
        }
    }
}

#[test]
fn combinations_are_conservative() {
    let mut r = Random(9);
    let (mut kinds, mut settled) = ([0; 3], 0);
    for _ in 0..1500 {
        let extent = extent(&mut r);
        let mask = expression(3, extent, &mut r);
        let bound = mask.bind(extent).unwrap();
        for _ in 0..20 {
            let plane = Plane { b: r.within(0, extent.batch - 1), h: r.within(0, extent.heads - 1) };
            let (queries, keys) = (part(extent.seq_q, &mut r), part(extent.seq_kv, &mut r));
            let kind = bound.classify(plane.b, plane.h, queries.clone(), keys.clone());
            let dense = dense_kind(&bound, plane, queries.clone(), keys.clone());
            kinds[dense as usize] += 1;
            settled += usize::from(kind == dense);
            assert!(
                kind == dense || kind == TileKind::Partial,
                "{kind:?} is {dense:?}: {mask:?} {extent:?} {plane:?} {queries:?} {keys:?}"
            );
        }
    }
    assert!(kinds.iter().all(|&n| n > 3000), "every kind occurs often: {kinds:?}");
    // Being conservative is no excuse for saying Partial to everything.
    let all: usize = kinds.iter().sum();
    assert!(settled * 100 > all * 90, "{settled} of {all} are settled without points");
}

#[test]
fn a_tile_half_seen_by_one_operand_and_half_by_the_other_is_full_in_their_union() {
    let mask = Mask::causal() & (Mask::sliding_window(10) | Mask::sinks(10));
    let bound = mask.bind(Extent { batch: 1, heads: 1, seq_q: 40, seq_kv: 40 }).unwrap();
    // Keys 8 and 9 are sinks, keys from 10 on lie in every window.
    assert_eq!(bound.classify(0, 0, 16..20, 8..16), TileKind::Full);
    assert_eq!(bound.classify(0, 0, 20..24, 8..16), TileKind::Partial);
}

#[test]
fn bits_are_the_points_and_equal_signatures_have_equal_bits() {
    let mut r = Random(10);
    let (mut shared, mut signed) = (0, 0);
    for n in 0..900 {
        let extent = extent(&mut r);
        let mask = match FAMILIES.get(n % 30) {
            Some(family) => primitive(family, extent, &mut r),
            None => expression(3, extent, &mut r),
        };
        let bound = mask.bind(extent).unwrap();
        let [bq, bk] = [r.within(1, extent.seq_q.min(40)), r.within(1, extent.seq_kv.min(70))];
        let mut known: HashMap<Vec<u32>, Vec<u32>> = HashMap::new();
        for _ in 0..40 {
            let plane = Plane { b: r.within(0, extent.batch - 1), h: r.within(0, extent.heads - 1) };
            let [i, j] = [r.within(0, extent.seq_q - bq), r.within(0, extent.seq_kv - bk)];
            let (queries, keys) = (i..i + bq, j..j + bk);
            let bits = bound.bits(plane.b, plane.h, queries.clone(), keys.clone());
            assert_eq!(bits, points(&bound, plane, queries.clone(), keys.clone()), "{mask:?} {extent:?}");
            let mut signature = Vec::new();
            if bound.signature(plane, queries.clone(), Span { start: j, end: j + bk }, &mut signature) {
                signed += 1;
                if let Some(other) = known.get(&signature) {
                    shared += 1;
                    assert_eq!(&bits, other, "{mask:?} {extent:?} {plane:?} {queries:?} {keys:?}");
                }
                known.insert(signature, bits);
            }
        }
    }
    assert!(signed > 15_000 && shared > 4_000, "{shared} of {signed} tiles share a signature");
}

/// The bits of a tile, point by point.
fn points(bound: &BoundMask, plane: Plane, queries: Range<u32>, keys: Range<u32>) -> Vec<u32> {
    let mut out = Vec::new();
    for i in queries {
        let row: Vec<u32> = keys.clone().map(|j| u32::from(bound.allows(plane.b, plane.h, i, j))).collect();
        out.extend(row.chunks(32).map(|bits| (0..).zip(bits).fold(0, |word, (n, bit)| word | bit << n)));
    }
    out
}

#[test]
fn masks_survive_serialization_and_keep_their_fingerprint() {
    let mut r = Random(11);
    let extent = Extent { batch: 2, heads: 2, seq_q: 50, seq_kv: 60 };
    let mut masks: Vec<Mask> = FAMILIES.iter().map(|family| primitive(family, extent, &mut r)).collect();
    masks.extend((0..100).map(|_| expression(4, extent, &mut r)));
    masks.extend([Mask::Nothing, Mask::Everything, Mask::causal() & Mask::sinks(3), Mask::causal() | Mask::sinks(3)]);
    let mut fingerprints: HashMap<u64, Mask> = HashMap::new();
    for mask in masks {
        let text = serde_json::to_string(&mask).unwrap();
        let read: Mask = serde_json::from_str(&text).unwrap();
        assert_eq!(read, mask);
        assert_eq!(read.fingerprint(), mask.fingerprint());
        if let Some(other) = fingerprints.insert(mask.fingerprint(), mask.clone()) {
            assert_eq!(other, mask, "two masks of one fingerprint");
        }
    }
    assert!(fingerprints.len() > 100);
}

#[test]
fn the_file_format_and_the_fingerprint_stay() {
    let mask = Mask::causal() & (Mask::sliding_window(4) | !Mask::sinks(2));
    let text = r#"{"and":[{"band":{"causal":true,"left":1073741824,"right":1073741824,"sinks":0}},{"or":[{"sliding_window":{"keys":4}},{"not":{"sinks":{"keys":2}}}]}]}"#;
    assert_eq!(serde_json::to_string(&mask).unwrap(), text);
    assert_eq!(format!("{:#018x}", mask.fingerprint()), "0x6f12ebb9776df7d9");
}

#[test]
fn masks_say_whether_batch_elements_and_heads_differ() {
    let extent = Extent { batch: 2, heads: 2, seq_q: 4, seq_kv: 4 };
    let heads = Mask::per_head(vec![Mask::causal(), Mask::Everything]);
    let batch = Mask::per_batch(vec![Mask::sinks(2), Mask::sinks(3)]);
    let function = Mask::function("every_third", random::every_third).unwrap();
    for (mask, by_batch, by_head) in [
        (Mask::causal() & !Mask::sinks(1), false, false),
        (Mask::causal() | !heads.clone(), false, true),
        (!batch.clone() & Mask::causal(), true, false),
        (Mask::per_head(vec![batch.clone(), Mask::Nothing]), true, true),
        (function, true, true),
        (Mask::function_of_positions("checkers", random::checkers).unwrap(), false, false),
        (Mask::from_dense([1, 2, 4, 4], &[true; 32]).unwrap(), false, true),
        (Mask::from_dense([2, 1, 4, 4], &[true; 32]).unwrap(), true, false),
    ] {
        assert_eq!((mask.varies_by_batch(), mask.varies_by_head()), (by_batch, by_head), "{mask:?}");
        mask.bind(extent).unwrap();
    }
}

#[test]
fn tiles_without_points_and_sequences_without_tokens_are_sound() {
    let extent = Extent { batch: 1, heads: 1, seq_q: 3, seq_kv: 0 };
    for mask in [Mask::causal(), !Mask::causal(), Mask::documents(vec![1; 3], vec![]), Mask::butterfly(2)] {
        let bound = mask.bind(extent).unwrap();
        assert_eq!(bound.classify(0, 0, 0..3, 0..0), TileKind::Empty);
        assert!(bound.bits(0, 0, 0..3, 0..0).is_empty());
    }
}
