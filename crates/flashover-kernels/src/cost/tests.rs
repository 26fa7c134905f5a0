//! Counts against sums by hand.

use super::*;
use crate::mask::UNBOUNDED;
use crate::problem::{Element, Precision};

#[test]
fn visible_pairs_are_those_that_the_band_allows() {
    for causal in [false, true] {
        for left in [0, 2, UNBOUNDED] {
            for right in [0, 3, UNBOUNDED] {
                for sinks in [0, 1, 4, 20] {
                    for (seq_q, seq_kv) in [(5, 9), (9, 5), (1, 1), (7, 0)] {
                        let band = Band { causal, left, right, sinks };
                        let shape = [2, 3, seq_q, 4];
                        let keys = [2, 3, seq_kv, 4];
                        let plain = Problem::new(shape, keys, keys, Element::F32).unwrap();
                        let problem = Problem { band, ..plain };
                        let pairs = (0..seq_q as i32).flat_map(|i| (0..seq_kv as i32).map(move |j| (i, j)));
                        let seen = pairs.filter(|&(i, j)| band.allows(i + problem.alignment(), j)).count();
                        assert_eq!(visible_pairs(&problem), 6 * seen as u64, "{band:?} {seq_q} {seq_kv}");
                    }
                }
            }
        }
    }
}

#[test]
fn elements_of_f32_move_twice_the_bytes() {
    let shape = [1, 2, 300, 64];
    let halves = Problem::new(shape, shape, shape, Element::BF16).unwrap();
    let floats = Problem { element: Element::F32, precision: Precision::Tf32x3, ..halves.clone() };
    let forward = |problem| mma_forward(problem, MmaConfig::of(problem).0, false, false).pop().unwrap();
    let (halves, floats) = (forward(&halves), forward(&floats));
    assert_eq!(halves.flops, floats.flops);
    // Two bytes more an element of q, k, v and o.
    assert_eq!(floats.hbm_bytes - halves.hbm_bytes, 4 * 2 * (2 * 300 * 64));
    // Rows of 64 floats and 16 bytes: 128 queries, and twice 32 keys and values.
    assert_eq!(floats.shared_bytes, (128 + 2 * 2 * 32) * (4 * 64 + 16));
}

#[test]
fn nothing_is_launched_for_nothing() {
    let tile = TileConfig::SMALL;
    let all = Wanted {
        q: true,
        k: true,
        v: true,
        bias: true,
        alibi_slopes: true,
        learned_sinks: true,
        score_parameters: true,
    };
    let empty = Problem::new([1, 2, 0, 8], [1, 2, 4, 8], [1, 2, 4, 8], Element::F32).unwrap();
    assert!(portable_forward(&empty, tile, true).is_empty() && portable_backward(&empty, tile, all, true).is_empty());
    let keyless = Problem::new([1, 2, 4, 8], [1, 2, 0, 8], [1, 2, 0, 8], Element::F32).unwrap();
    assert_eq!(portable_forward(&keyless, tile, true).len(), 1);
    assert!(portable_backward(&keyless, tile, all, true).is_empty());
}
