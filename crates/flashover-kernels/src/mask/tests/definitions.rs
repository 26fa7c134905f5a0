//! What each constructor promises, written once more and point by point.

use cubecl::prelude::*;

use super::super::*;

/// Checks a mask against a definition in terms of query index, position of the query, and key.
fn defined(mask: &Mask, extent: Extent, allows: impl Fn(i64, i64, i64) -> bool) {
    let bound = mask.bind(extent).unwrap();
    let mut seen = 0;
    for i in 0..extent.seq_q {
        for j in 0..extent.seq_kv {
            let a = i as i64 + extent.seq_kv as i64 - extent.seq_q as i64;
            let expected = allows(i.into(), a, j.into());
            seen += usize::from(expected);
            assert_eq!(bound.allows(0, 0, i, j), expected, "{mask:?} {extent:?} {i} {j}");
        }
    }
    assert!(seen > 0, "{mask:?} sees something");
}

fn extents() -> [Extent; 3] {
    [(40, 40), (23, 57), (57, 23)].map(|(seq_q, seq_kv)| Extent { batch: 1, heads: 1, seq_q, seq_kv })
}

#[test]
fn positions() {
    for extent in extents() {
        defined(&Mask::Everything, extent, |_, _, _| true);
        defined(&Mask::causal(), extent, |_, a, j| j <= a);
        defined(&Mask::window(5, 3), extent, |_, a, j| a - 5 <= j && j <= a + 3);
        defined(&Mask::sliding_window(5), extent, |_, a, j| j <= a && a - j < 5);
        defined(&Mask::sliding_window(1), extent, |_, a, j| j == a);
        defined(&Mask::sinks(7), extent, |_, _, j| j < 7);
        defined(&Mask::prefix_lm(7), extent, |_, a, j| j <= a || j < 7);
        defined(&Mask::dilated(3, 2, 4), extent, |_, a, j| (-3..=2).any(|t| j == a + 4 * t));
        defined(&Mask::dilated(6, 0, 1), extent, |_, a, j| a - 6 <= j && j <= a);
        defined(&Mask::strided(6), extent, |_, a, j| (a - j) % 6 == 0);
        defined(&Mask::longformer(4, vec![9, 2, 3, 9]), extent, |_, a, j| {
            (a - j).abs() <= 4 || [2, 3, 9].contains(&a) || [2, 3, 9].contains(&j)
        });
        let both = Mask::causal() & !(Mask::sinks(2) | Mask::sliding_window(3));
        defined(&both, extent, |_, a, j| j <= a && j >= 2 && a - j >= 3);
    }
}

#[test]
fn blocks() {
    for extent in extents() {
        defined(&Mask::butterfly(4), extent, |_, a, j| {
            let (row, column) = (a.div_euclid(4), j / 4);
            row >= 0 && (row == column || (0..8).any(|digit| row ^ (1 << digit) == column))
        });
        let shape = BigBird { block: 4, global: 1, window: 1, random: 0, seed: 0 };
        defined(&Mask::bigbird(shape), extent, |_, a, j| {
            let (row, column) = (a.div_euclid(4), j / 4);
            row < 1 || column < 1 || (row - column).abs() <= 1
        });
        let columns = [vec![0], vec![1, 3], vec![], vec![2], vec![0, 2]];
        let (mut starts, mut listed) = (vec![0], Vec::new());
        for row in 0..extent.seq_q.div_ceil(8) {
            listed.extend(columns[row as usize % 5].iter().filter(|&&c| c < extent.seq_kv.div_ceil(6)));
            starts.push(listed.len() as u32);
        }
        let table = BlockTable { block: [8, 6], batch: 1, heads: 1, starts, columns: listed };
        defined(&Mask::from_blocks(table), extent, |i, _, j| columns[i as usize / 8 % 5].contains(&(j as u32 / 6)));
    }
}

#[test]
fn random_blocks_of_bigbird() {
    let extent = Extent { batch: 1, heads: 1, seq_q: 64, seq_kv: 64 };
    let shape = BigBird { block: 4, global: 0, window: 0, random: 3, seed: 5 };
    let mask = Mask::bigbird(shape);
    let bound = mask.bind(extent).unwrap();
    for i in 0..64 {
        let blocks = (0..16).filter(|block| bound.allows(0, 0, i, block * 4)).count();
        assert!((3..=4).contains(&blocks), "its own block and three more, which may hold its own: {blocks}");
    }
}

#[test]
fn documents_and_dense() {
    for extent in extents() {
        let queries: Vec<u32> = (0..extent.seq_q).map(|i| [5, 5, 5, 2, 9, PADDING][i as usize / 4 % 6]).collect();
        let keys: Vec<u32> = (0..extent.seq_kv).map(|j| [5, 2, 2, PADDING, 9][j as usize / 5 % 5]).collect();
        defined(&Mask::documents(queries.clone(), keys.clone()), extent, |i, _, j| {
            queries[i as usize] == keys[j as usize] && queries[i as usize] != PADDING
        });
        let at = |i: i64, j: i64| (i * 7 + j * j) % 5 < 2;
        let points = (0..extent.seq_q).flat_map(|i| (0..extent.seq_kv).map(move |j| at(i.into(), j.into())));
        let shape = [1, 1, extent.seq_q, extent.seq_kv];
        defined(&Mask::from_dense(shape, &points.collect::<Vec<_>>()).unwrap(), extent, |i, _, j| at(i, j));
    }
}

#[test]
fn heads_and_batch_elements() {
    let extent = Extent { batch: 2, heads: 2, seq_q: 6, seq_kv: 6 };
    let each =
        Mask::per_head(vec![Mask::sinks(1), Mask::sinks(2)]) | Mask::per_batch(vec![Mask::Nothing, Mask::sinks(4)]);
    let bound = each.bind(extent).unwrap();
    let seen = |b, h| (0..6).filter(|&j| bound.allows(b, h, 0, j)).count();
    assert_eq!([seen(0, 0), seen(0, 1), seen(1, 0), seen(1, 1)], [1, 2, 4, 4]);
    let dense: Vec<bool> = (0..2 * 2 * 36).map(|n| n / 36 != 3).collect();
    let mask = Mask::from_dense([2, 2, 6, 6], &dense).unwrap();
    let bound = mask.bind(extent).unwrap();
    assert!(bound.allows(1, 0, 2, 2) && bound.allows(0, 1, 2, 2) && !bound.allows(1, 1, 2, 2));
    let ids = |n: u32| vec![vec![n; 6], vec![1; 6]];
    let mask = Mask::Documents(Documents { queries: ids(0), keys: vec![vec![1; 6]] });
    let bound = mask.bind(extent).unwrap();
    assert!(!bound.allows(0, 0, 0, 0) && bound.allows(1, 0, 0, 0));
}

/// Written once, for the host and for kernels.
#[cube]
fn same_parity(b: u32, _h: u32, i: u32, j: u32) -> bool {
    (i + j + b) & 1u32 == 0u32
}

#[test]
fn a_function_of_the_user_is_kept_by_name() {
    let extent = Extent { batch: 2, heads: 1, seq_q: 9, seq_kv: 11 };
    let mask = Mask::function("same_parity", same_parity).unwrap();
    let bound = mask.bind(extent).unwrap();
    assert!(bound.allows(0, 0, 1, 3) && !bound.allows(1, 0, 1, 3));
    assert_eq!(bound.classify(0, 0, 0..2, 0..2), TileKind::Partial);
    let read: Mask = serde_json::from_str(&serde_json::to_string(&mask).unwrap()).unwrap();
    assert!(read.bind(extent).unwrap().allows(0, 0, 2, 4));
    // One that looks at positions only is called for the first batch element and head.
    let of_positions = Mask::function_of_positions("same_parity", same_parity).unwrap();
    assert!(of_positions.bind(extent).unwrap().allows(1, 0, 1, 3));
}
