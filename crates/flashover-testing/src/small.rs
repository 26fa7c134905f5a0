//! Problems small enough for finite differences, which together use every option.

use flashover_kernels::dropout::Dropout;
use flashover_kernels::mask::{Band, UNBOUNDED};
use flashover_kernels::problem::{Element, Problem};

use crate::score::{with_buckets, with_waves};

/// A name and a problem each.
pub(crate) fn problems(element: Element) -> Vec<(String, Problem)> {
    let shaped = |heads_kv: usize, seq_q: usize, seq_kv: usize| {
        Problem::new([2, 4, seq_q, 3], [2, heads_kv, seq_kv, 3], [2, heads_kv, seq_kv, 4], element).unwrap()
    };
    let plain = shaped(2, 5, 7);
    let window = |left, right, sinks| Band { left, right, sinks, ..Band::default() };
    let sliding = |keys: u32, sinks| Band { causal: true, left: keys - 1, right: 0, sinks };
    let dropout = Some(Dropout { probability: 0.3, seed: 0x1234_5678_9abc_def0 });
    let banded = |band| Problem { band, ..plain.clone() };

    let mut all: Vec<(String, Problem)> = [
        ("plain", plain.clone()),
        ("one head each", shaped(4, 5, 7)),
        ("one key head", shaped(1, 5, 7)),
        ("negative scale", Problem { scale: -0.8, ..plain.clone() }),
        ("no keys", Problem { learned_sinks: true, ..shaped(2, 5, 0) }),
        ("causal", banded(Band::causal())),
        ("causal, more queries", Problem { band: Band::causal(), ..shaped(2, 7, 4) }),
        ("window", banded(window(1, 2, 0))),
        ("left window", banded(window(1, UNBOUNDED, 0))),
        ("window, visible sinks", banded(window(1, 0, 2))),
        ("sliding window", banded(sliding(2, 0))),
        ("sliding window, visible sinks", banded(sliding(2, 2))),
        ("sliding window, more queries", Problem { band: sliding(2, 1), ..shaped(2, 7, 4) }),
        ("softcap", Problem { softcap: Some(0.7), ..plain.clone() }),
        ("alibi", Problem { alibi: true, ..plain.clone() }),
        ("alibi, more queries", Problem { alibi: true, ..shaped(1, 7, 4) }),
        ("key lengths", Problem { key_lengths: true, ..plain.clone() }),
        ("causal, key lengths", Problem { key_lengths: true, band: Band::causal(), ..plain.clone() }),
        ("learned sinks", Problem { learned_sinks: true, ..plain.clone() }),
        ("dropout", Problem { dropout, ..plain.clone() }),
        ("score function", with_waves(plain.clone())),
        ("score function, table", with_buckets(plain.clone())),
    ]
    .map(|(name, problem)| (name.to_string(), problem))
    .into();

    for pattern in 0..16usize {
        let shape = std::array::from_fn(|axis| if pattern >> axis & 1 == 1 { 1 } else { plain.score_shape()[axis] });
        let flip = |bit: usize| pattern >> bit & 1 == 1;
        all.push((format!("bias {shape:?}"), Problem { bias: Some(shape), ..plain.clone() }));
        all.push((format!("mask {shape:?}"), Problem { mask: Some(shape), ..plain.clone() }));
        // Everything at once, and half of the options off in turn.
        let mixed = Problem {
            bias: Some(shape),
            mask: Some([2, 1, 5, 7]),
            softcap: flip(0).then_some(0.9),
            alibi: flip(1) || pattern == 0,
            learned_sinks: flip(2),
            dropout: dropout.filter(|_| flip(3) || pattern == 0),
            key_lengths: pattern % 3 == 0,
            band: if pattern % 5 < 3 { sliding(4, 1) } else { window(3, 2, 0) },
            ..shaped([1, 2, 4][pattern % 3], 5, 7)
        };
        all.push((format!("mixed, bias {shape:?}"), mixed));
    }
    // With everything else before it.
    let mixed = |(name, _): &&(String, Problem)| name.starts_with("mixed");
    let all_mixed: Vec<_> = all.iter().filter(mixed).cloned().collect();
    for (n, function) in [(6, with_waves as fn(Problem) -> Problem), (15, with_buckets)] {
        let (name, problem) = all_mixed[n].clone();
        all.push((format!("{name}, score function"), function(problem)));
    }
    for (name, problem) in &all {
        problem.validate().unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    all
}
