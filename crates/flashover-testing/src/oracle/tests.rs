//! The oracle against finite differences, against figures worked out by hand, and against its own contract.

use flashover_kernels::mask::{Band, UNBOUNDED};
use flashover_kernels::problem::Element;

use super::*;
use crate::small;

fn loss(problem: &Problem, inputs: &Inputs) -> f64 {
    let (o, lse) = forward(problem, inputs);
    let through_o: f64 = o.iter().zip(&inputs.do_).map(|(o, g)| o * g).sum();
    let through_lse: f64 = lse.iter().zip(&inputs.dlse).filter(|(lse, _)| lse.is_finite()).map(|(l, g)| l * g).sum();
    through_o + through_lse
}

type Operand = fn(&mut Inputs) -> Option<&mut Vec<f64>>;
type Gradient = fn(&Gradients<Vec<f64>>) -> Option<&Vec<f64>>;

const TENSORS: [(&str, Operand, Gradient); 7] = [
    ("q", |x| Some(&mut x.operands.q), |g| g.q.as_ref()),
    ("k", |x| Some(&mut x.operands.k), |g| g.k.as_ref()),
    ("v", |x| Some(&mut x.operands.v), |g| g.v.as_ref()),
    ("bias", |x| x.operands.bias.as_mut(), |g| g.bias.as_ref()),
    ("slopes", |x| x.operands.alibi_slopes.as_mut(), |g| g.alibi_slopes.as_ref()),
    ("sinks", |x| x.operands.learned_sinks.as_mut(), |g| g.learned_sinks.as_ref()),
    ("parameters", |x| x.operands.score_parameters.as_mut(), |g| g.score_parameters.as_ref()),
];

/// Central differences of every element of every operand; the number of elements whose gradient is not 0, per tensor.
fn compare_with_differences(name: &str, problem: &Problem, inputs: &Inputs) -> [usize; 7] {
    const STEP: f64 = 1e-5;
    let gradients = backward(problem, inputs);
    TENSORS.map(|(tensor, operand, gradient)| {
        let mut x = inputs.clone();
        let Some(elements) = operand(&mut x).map(|values| values.len()) else {
            assert!(gradient(&gradients).is_none(), "{name}: a gradient of {tensor}, which the problem lacks");
            return 0;
        };
        let found = gradient(&gradients).unwrap_or_else(|| panic!("{name}: no gradient of {tensor}"));
        assert_eq!(found.len(), elements, "{name}: elements of the gradient of {tensor}");
        let mut at = |index: usize, step: f64| {
            operand(&mut x).unwrap()[index] += step;
            let loss = loss(problem, &x);
            operand(&mut x).unwrap()[index] -= step;
            loss
        };
        for (index, &found) in found.iter().enumerate() {
            let expected = (at(index, STEP) - at(index, -STEP)) / (2.0 * STEP);
            let error = (found - expected).abs();
            assert!(
                error <= 2e-8 * (1.0 + expected.abs()),
                "{name}: d{tensor}[{index}]: {expected} by differences, {found}"
            );
        }
        found.iter().filter(|&&g| g != 0.0).count()
    })
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let (mut nonzero, mut dead, mut rows) = ([0; 7], 0, 0);
    for (seed, (name, problem)) in small::problems(Element::F64).iter().enumerate() {
        let inputs = Inputs::random(problem, seed as u64);
        for (total, count) in nonzero.iter_mut().zip(compare_with_differences(name, problem, &inputs)) {
            *total += count;
        }
        let (_, lse) = forward(problem, &inputs);
        dead += lse.iter().filter(|lse| **lse == f64::NEG_INFINITY).count();
        rows += lse.len();
    }
    assert!(nonzero.iter().all(|&count| count > 20), "every tensor has gradients: {nonzero:?}");
    assert!(dead > 50 && dead < rows / 2, "{dead} of {rows} rows see nothing");
}

#[test]
fn gradients_through_lse_alone_are_those_of_finite_differences() {
    for (seed, (name, problem)) in small::problems(Element::F64).iter().enumerate() {
        let mut inputs = Inputs::random(problem, seed as u64);
        inputs.do_.fill(0.0);
        let seen = forward(problem, &inputs).0.iter().any(|&o| o != 0.0);
        let [q, k, v, ..] = compare_with_differences(name, problem, &inputs);
        assert_eq!((v, q > 0, k > 0), (0, seen, seen), "{name}");
    }
}

/// One batch element, one head, D = Dv = 1.
fn line(q: &[f64], k: &[f64], v: &[f64]) -> (Problem, Inputs) {
    let (rows, keys) = (q.len(), k.len());
    let problem = Problem::new([1, 1, rows, 1], [1, 1, keys, 1], [1, 1, keys, 1], Element::F64).unwrap();
    let mut inputs = Inputs::random(&problem, 0);
    inputs.operands.q = q.to_vec();
    inputs.operands.k = k.to_vec();
    inputs.operands.v = v.to_vec();
    (problem, inputs)
}

fn close(found: &[f64], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!(f == e || (f - e).abs() < 1e-12, "expected {expected:?}, got {found:?}");
    }
}

#[test]
fn figures_by_hand() {
    // Scores ln 1, ln 2, ln 3: probabilities 1/6, 2/6, 3/6.
    let (problem, mut x) = line(&[1.0], &[0.0, 2.0_f64.ln(), 3.0_f64.ln()], &[6.0, 12.0, 24.0]);
    let (o, lse) = forward(&problem, &x);
    close(&o, &[17.0]);
    close(&lse, &[6.0_f64.ln()]);

    // A sink of ln 6 halves them.
    x.operands.learned_sinks = Some(vec![6.0_f64.ln()]);
    let (o, lse) = forward(&Problem { learned_sinks: true, ..problem.clone() }, &x);
    close(&o, &[8.5]);
    close(&lse, &[12.0_f64.ln()]);

    // The query stands at key 2, so ALiBi with slope ln 2 takes away ln 4, ln 2, 0: weights 1/4, 1, 3.
    x.operands.alibi_slopes = Some(vec![2.0_f64.ln()]);
    let (o, _) = forward(&Problem { alibi: true, ..problem.clone() }, &x);
    close(&o, &[(6.0 / 4.0 + 12.0 + 72.0) / 4.25]);

    // The scale comes first, then the softcap, then ALiBi and the bias.
    x.operands.bias = Some(vec![0.5]);
    let all = Problem { scale: 3.0, softcap: Some(2.0), alibi: true, bias: Some([1, 1, 1, 1]), ..problem.clone() };
    let (_, lse) = forward(&all, &x);
    let s = |k: f64, distance: f64| 2.0 * (3.0 * k / 2.0).tanh() - 2.0_f64.ln() * distance + 0.5;
    let l = s(0.0, 2.0).exp() + s(2.0_f64.ln(), 1.0).exp() + s(3.0_f64.ln(), 0.0).exp();
    close(&lse, &[l.ln()]);

    // Key lengths hide keys and do not move the query: causal order still sees key 1 from the only query.
    x.operands.key_lengths = Some(vec![2]);
    let (o, _) = forward(&Problem { key_lengths: true, band: Band::causal(), ..problem.clone() }, &x);
    close(&o, &[10.0]);
}

#[test]
fn dropout_scales_what_is_left_and_spares_lse() {
    // Equal scores and values 1, 10, 100: the output says which keys were kept.
    let plain = Problem::new([2, 3, 40, 1], [2, 3, 3, 1], [2, 3, 3, 1], Element::F64).unwrap();
    let mut x = Inputs::random(&plain, 0);
    x.operands.q.fill(0.0);
    x.operands.v = [1.0, 10.0, 100.0].repeat(6);
    let dropout = flashover_kernels::dropout::Dropout { probability: 0.5, seed: 3 };
    let (o, lse) = forward(&Problem { dropout: Some(dropout), ..plain.clone() }, &x);
    assert_eq!(lse, forward(&plain, &x).1);
    for (row, o) in o.into_iter().enumerate() {
        let [b, h, i] = [row / 120, row / 40 % 3, row % 40].map(|index| index as u32);
        let kept: f64 = (0..3).map(|j| 10.0_f64.powi(j as i32) * dropout.multiplier(b, h, 3, i, j)).sum();
        close(&[o], &[kept / 3.0]);
    }
}

#[test]
fn heads_of_a_group_share_keys_and_values() {
    let (batch, heads, seq_q, seq_kv, dim, value_dim) = (2, 6, 5, 7, 3, 4);
    let sized = |heads_kv| {
        let (q, k) = ([batch, heads, seq_q, dim], [batch, heads_kv, seq_kv, dim]);
        Problem::new(q, k, [batch, heads_kv, seq_kv, value_dim], Element::F64).unwrap()
    };
    let (grouped, alone) = (sized(2), sized(6));
    let x = Inputs::random(&grouped, 0);
    // Query heads 0, 1, 2 read key head 0, and 3, 4, 5 key head 1.
    let repeated = |tensor: &[f64], dim: usize| -> Vec<f64> {
        tensor.chunks(seq_kv * dim).flat_map(|head| head.repeat(3)).collect()
    };
    let mut y = x.clone();
    y.operands.k = repeated(&x.operands.k, dim);
    y.operands.v = repeated(&x.operands.v, value_dim);
    assert_eq!(forward(&grouped, &x), forward(&alone, &y));
    let (shared, own) = (backward(&grouped, &x), backward(&alone, &y));
    assert_eq!(shared.q, own.q);
    let summed = |tensor: &[f64], dim: usize| -> Vec<f64> {
        let size = seq_kv * dim;
        tensor.chunks(3 * size).flat_map(|g| (0..size).map(|e| g[e] + g[size + e] + g[2 * size + e])).collect()
    };
    close(&shared.k.unwrap(), &summed(&own.k.unwrap(), dim));
    close(&shared.v.unwrap(), &summed(&own.v.unwrap(), value_dim));
}

#[test]
fn per_head_parameters_broadcasts_and_lengths_belong_to_their_place() {
    let plain = Problem::new([2, 3, 4, 2], [2, 3, 5, 2], [2, 3, 5, 2], Element::F64).unwrap();
    for pattern in 0..16usize {
        let shape = std::array::from_fn(|axis| if pattern >> axis & 1 == 1 { 1 } else { plain.score_shape()[axis] });
        let options = Problem {
            bias: Some(shape),
            mask: Some(shape),
            alibi: true,
            learned_sinks: true,
            key_lengths: true,
            ..plain.clone()
        };
        let mut x = Inputs::random(&options, pattern as u64);
        x.operands.key_lengths = Some(vec![4, 3]);
        let found = forward(&options, &x).1;

        // The same with all of it in one dense bias of the score's full shape, and the sink by hand.
        let mut y = x.clone();
        let [_, s1, s2, s3] = shape;
        let mut dense = Vec::new();
        for (b, h, i, j) in (0..2usize).flat_map(|b| {
            (0..3usize).flat_map(move |h| (0..4usize).flat_map(move |i| (0..5usize).map(move |j| (b, h, i, j))))
        }) {
            let at = ((b.min(shape[0] - 1) * s1 + h.min(s1 - 1)) * s2 + i.min(s2 - 1)) * s3 + j.min(s3 - 1);
            let hidden = x.operands.mask.as_ref().unwrap()[at] || j >= [4, 3][b];
            let slope = x.operands.alibi_slopes.as_ref().unwrap()[h];
            let value = x.operands.bias.as_ref().unwrap()[at] - slope * (i as f64 + 1.0 - j as f64).abs();
            dense.push(if hidden { f64::NEG_INFINITY } else { value });
        }
        y.operands.bias = Some(dense);
        let without_sink = forward(&Problem { bias: Some([2, 3, 4, 5]), ..plain.clone() }, &y).1;
        let sinks = x.operands.learned_sinks.as_ref().unwrap();
        let expected: Vec<f64> =
            without_sink.iter().enumerate().map(|(row, lse)| (lse.exp() + sinks[row / 4 % 3].exp()).ln()).collect();
        close(&found, &expected);
    }
}

#[test]
fn visibility_agrees_with_the_kernels() {
    for (seq_q, seq_kv) in [(1, 1), (5, 9), (9, 5), (7, 7)] {
        for causal in [false, true] {
            for left in [0, 2, UNBOUNDED] {
                for right in [0, 3, UNBOUNDED] {
                    for sinks in [0, 1, 4, UNBOUNDED] {
                        let band = Band { causal, left, right, sinks };
                        let plain =
                            Problem::new([1, 1, seq_q, 1], [1, 1, seq_kv, 1], [1, 1, seq_kv, 1], Element::F64).unwrap();
                        let problem = Problem { band, ..plain };
                        let inputs = Inputs::random(&problem, 0);
                        let head = Head::new(&problem, &inputs, 0);
                        for (i, j) in (0..seq_q).flat_map(|i| (0..seq_kv).map(move |j| (i, j))) {
                            let allowed = band.allows(i as i32 + problem.alignment(), j as i32);
                            assert_eq!(head.visible(i, j), allowed, "{band:?} {seq_q}×{seq_kv} ({i}, {j})");
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_that_sees_nothing_is_zero() {
    for sinks in [false, true] {
        let (problem, mut x) = line(&[1.0, 2.0], &[1.0, 3.0], &[5.0, 7.0]);
        let problem = Problem { mask: Some([1, 1, 2, 1]), learned_sinks: sinks, ..problem };
        x.operands.mask = Some(vec![true, false]);
        x.operands.learned_sinks = Some(vec![0.25]);
        let (o, lse) = forward(&problem, &x);
        assert_eq!((o[0], lse[0]), (0.0, if sinks { 0.25 } else { f64::NEG_INFINITY }));
        assert!(o[1] > 0.0 && lse[1] > 3.0);
        let gradients = backward(&problem, &x);
        assert_eq!(gradients.q.unwrap()[0], 0.0);

        // Nobody sees anything: all gradients are 0, except that lse is the sink's logit.
        x.operands.mask = Some(vec![true, true]);
        let gradients = backward(&problem, &x);
        assert_eq!(
            (gradients.q, gradients.k, gradients.v),
            (Some(vec![0.0; 2]), Some(vec![0.0; 2]), Some(vec![0.0; 2]))
        );
        assert_eq!(gradients.learned_sinks, sinks.then(|| vec![x.dlse[0] + x.dlse[1]]));
    }
}

#[test]
fn scores_of_minus_infinity_count_as_nothing() {
    let (problem, mut x) = line(&[1.0, 2.0], &[1.0, 3.0], &[5.0, 7.0]);
    let problem = Problem { bias: Some([1, 1, 2, 2]), ..problem };
    let lowest = f64::NEG_INFINITY;
    x.operands.bias = Some(vec![lowest, lowest, 0.0, lowest]);
    let (o, lse) = forward(&problem, &x);
    assert_eq!(o, [0.0, 5.0]);
    assert_eq!(lse, [lowest, 2.0]);
    let gradients = backward(&problem, &x);
    assert_eq!(gradients.bias, Some(vec![0.0, 0.0, x.dlse[1], 0.0]));
    assert_eq!(gradients.q, Some(vec![0.0, x.dlse[1]]));
    assert_eq!(gradients.v, Some(vec![x.do_[1], 0.0]));
}

#[test]
fn spoilt_numbers_reach_only_rows_that_see_them() {
    for spoilt in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        // Causal: key 2 and value 2 are seen by query 2 alone, query 1 sees keys 0 and 1.
        let (problem, clean) = line(&[1.0, 2.0, -1.0], &[1.0, 3.0, 2.0], &[5.0, 7.0, 6.0]);
        let problem = Problem { band: Band::causal(), ..problem };
        let (o, lse) = forward(&problem, &clean);
        let gradients = backward(&problem, &clean);

        let mut x = clean.clone();
        x.operands.v[2] = spoilt;
        let (o_spoilt, lse_spoilt) = forward(&problem, &x);
        assert_eq!((&o_spoilt[..2], &lse_spoilt), (&o[..2], &lse));
        assert!(!o_spoilt[2].is_finite());
        let q = backward(&problem, &x).q.unwrap();
        assert_eq!(q[..2], gradients.q.as_ref().unwrap()[..2]);
        assert!(q[2].is_nan());

        let mut x = clean.clone();
        x.operands.q[1] = spoilt;
        let found = backward(&problem, &x);
        let k = found.k.unwrap();
        assert!(k[0].is_nan() || spoilt.is_infinite(), "NaN of a query reaches the keys that it sees");
        assert_eq!(k[2], gradients.k.as_ref().unwrap()[2]);

        let mut x = clean.clone();
        x.do_[1] = spoilt;
        let v = backward(&problem, &x).v.unwrap();
        assert!(!v[0].is_finite() && !v[1].is_finite());
        assert_eq!(v[2], gradients.v.as_ref().unwrap()[2]);

        // Hidden from everybody by the key length.
        let hidden = Problem { key_lengths: true, ..problem.clone() };
        let mut x = clean.clone();
        x.operands.key_lengths = Some(vec![2]);
        let (expected, expected_gradients) = (forward(&hidden, &x), backward(&hidden, &x));
        x.operands.k[2] = spoilt;
        x.operands.v[2] = spoilt;
        assert_eq!(forward(&hidden, &x), expected);
        let found = backward(&hidden, &x);
        let all = |g: Gradients<Vec<f64>>| (g.q, g.k, g.v);
        assert_eq!(all(found), all(expected_gradients));
    }
    let (problem, mut x) = line(&[1.0, 2.0], &[1.0, f64::NAN], &[5.0, 7.0]);
    x.operands.q[0] = 0.0;
    let (o, lse) = forward(&problem, &x);
    assert!(o.iter().chain(&lse).all(|x| x.is_nan()), "a visible NaN reaches o and lse: {o:?} {lse:?}");
}
