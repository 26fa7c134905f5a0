//! What a framework without fused attention computes: every matrix is materialised and rounded to the problem's element
//! type, products and sums run in f32 (in f64 for an f64 problem). Its distance from the oracle is the measure of what
//! the element type allows; it serves [`crate::tolerance`] and nothing else.
//!
//! Unlike the oracle it lets a NaN of a hidden value through (0 · NaN), as frameworks do.

use flashover_kernels::operands::Gradients;
use flashover_kernels::problem::{Element, Problem};

use crate::data::{Inputs, round_to};
use crate::head::{Head, HeadGradients, gather, sum};
use crate::matmul::{Real, matmul, transpose};
use crate::parallel::map_heads;

/// Output `[B, Hq, Sq, Dv]` in the problem's element type, and log-sum-exp `[B, Hq, Sq]` in f32.
pub fn forward(problem: &Problem, inputs: &Inputs) -> (Vec<f64>, Vec<f64>) {
    let heads = map_heads(problem, |index| {
        let head = Head::new(problem, inputs, index);
        match problem.element {
            Element::F64 => head_forward::<f64>(&head),
            _ => head_forward::<f32>(&head),
        }
    });
    let (o, lse): (Vec<_>, Vec<_>) = heads.into_iter().unzip();
    (o.concat(), lse.concat())
}

/// Gradients of the same loss as [`crate::oracle::backward`], each in its operand's element type. `o` and `lse` are two
/// nodes of a graph: each gives gradients in the element type, and those are added.
pub fn backward(problem: &Problem, inputs: &Inputs) -> Gradients<Vec<f64>> {
    let zeros = |x: &[f64]| vec![0.0; x.len()];
    if inputs.dlse.iter().all(|&x| x == 0.0) {
        return node_backward(problem, inputs);
    }
    let through_o = Inputs { dlse: zeros(&inputs.dlse), ..inputs.clone() };
    let through_lse = Inputs { do_: zeros(&inputs.do_), ..inputs.clone() };
    sum(node_backward(problem, &through_o), node_backward(problem, &through_lse))
}

fn node_backward(problem: &Problem, inputs: &Inputs) -> Gradients<Vec<f64>> {
    let heads = map_heads(problem, |index| {
        let head = Head::new(problem, inputs, index);
        match problem.element {
            Element::F64 => head_backward::<f64>(&head),
            _ => head_backward::<f32>(&head),
        }
    });
    let sums = gather(problem, inputs, &heads);
    let statistic = if problem.element == Element::F64 { Element::F64 } else { Element::F32 };
    let stored = |sum: Option<Vec<f64>>, element: Element| {
        sum.map(|sum| sum.into_iter().map(|x| round_to(element, x)).collect::<Vec<f64>>())
    };
    Gradients {
        q: stored(sums.q, problem.element),
        k: stored(sums.k, problem.element),
        v: stored(sums.v, problem.element),
        bias: stored(sums.bias, problem.element),
        alibi_slopes: stored(sums.alibi_slopes, statistic),
        learned_sinks: stored(sums.learned_sinks, statistic),
        score_parameters: stored(sums.score_parameters, statistic),
    }
}

/// The matrices of a head that a framework keeps for its backward, `[Sq, Skv]`, each in the element type.
struct Kept<T> {
    /// Probabilities.
    p: Vec<T>,
    /// Hyperbolic tangent of the capped scores; empty without a softcap.
    tanh: Vec<T>,
    /// Derivatives of the user's function for the score and for its parameter, and which that is; empty without one.
    function: Vec<(T, T, usize)>,
    /// Share of the learned sink in the denominator, `[Sq]`; 0 without one.
    sink: Vec<T>,
    /// `[Sq]`.
    lse: Vec<T>,
}

impl<T: Real> Kept<T> {
    fn of(head: &Head) -> Self {
        let Problem { element, seq_q, seq_kv, head_dim, scale, softcap, .. } = *head.problem;
        let k = transpose(&narrow::<T>(head.k), seq_kv, head_dim);
        let mut s = rounded(matmul(&narrow(head.q), &k, seq_q, head_dim, seq_kv), element);
        let mut tanh = vec![T::ZERO; if softcap.is_some() { s.len() } else { 0 }];
        let mut function = Vec::new();
        let (mut sink, mut lse) = (vec![T::ZERO; seq_q], vec![T::NEG_INFINITY; seq_q]);
        for i in 0..seq_q {
            for (j, s) in s[i * seq_kv..][..seq_kv].iter_mut().enumerate() {
                *s = (*s * T::of(scale)).rounded(element);
                if let Some(c) = softcap {
                    let t = (*s / T::of(c)).rounded(element).tanh().rounded(element);
                    tanh[i * seq_kv + j] = t;
                    *s = (T::of(c) * t).rounded(element);
                }
                if let Some(slope) = head.slope {
                    *s = (*s - (T::of(slope) * T::of(head.distance(i, j))).rounded(element)).rounded(element);
                }
                if head.problem.bias.is_some() {
                    *s = (*s + T::of(head.bias(i, j))).rounded(element);
                }
                if let Some((f, parameter)) = head.function(i, j, s.wide()) {
                    let stored = |x: f64| T::of(x).rounded(element);
                    *s = stored(f.value);
                    function.push((stored(f.derivative), stored(f.parameter_derivative), parameter));
                }
                if !head.visible(i, j) {
                    *s = T::NEG_INFINITY;
                }
            }
            (sink[i], lse[i]) = softmax(&mut s[i * seq_kv..][..seq_kv], head.sink.map(T::of), element);
        }
        Kept { p: s, tanh, function, sink, lse }
    }
}

/// Turns a row of scores into probabilities; the share of the sink, and the log-sum-exp.
fn softmax<T: Real>(row: &mut [T], sink: Option<T>, element: Element) -> (T, T) {
    let m = row.iter().fold(sink.unwrap_or(T::NEG_INFINITY), |m, &s| m.larger(s));
    // A framework would divide 0 by 0 in a row that sees nothing; the contract asks for zeros.
    if m == T::NEG_INFINITY && row.iter().all(|&s| s == T::NEG_INFINITY) {
        row.fill(T::ZERO);
        return (T::ZERO, T::NEG_INFINITY);
    }
    let mut l = sink.map_or(T::ZERO, |logit| (logit - m).exp());
    for s in row.iter_mut() {
        *s = (*s - m).exp();
        l += *s;
    }
    for s in row.iter_mut() {
        *s = (*s / l).rounded(element);
    }
    (sink.map_or(T::ZERO, |logit| (logit - m).exp() / l), m + l.ln())
}

fn head_forward<T: Real>(head: &Head) -> (Vec<f64>, Vec<f64>) {
    let Problem { element, seq_q, seq_kv, value_dim, .. } = *head.problem;
    let kept = Kept::<T>::of(head);
    let dropped = dropped(head, kept.p);
    let o = rounded(matmul(&dropped, &narrow(head.v), seq_q, seq_kv, value_dim), element);
    (wide(o), wide(rounded(kept.lse, Element::F32)))
}

fn head_backward<T: Real>(head: &Head) -> HeadGradients {
    let Problem { element, seq_q, seq_kv, head_dim, value_dim, scale, softcap, bias, .. } = *head.problem;
    let Kept { p, tanh, function, sink, lse } = Kept::<T>::of(head);
    let do_ = narrow::<T>(head.do_);
    let v = transpose(&narrow::<T>(head.v), seq_kv, value_dim);
    let dropped_transposed = transpose(&dropped(head, p.clone()), seq_q, seq_kv);
    let dv = rounded(matmul(&dropped_transposed, &do_, seq_kv, seq_q, value_dim), element);

    let dp = rounded(matmul(&do_, &v, seq_q, value_dim, seq_kv), element);
    let mut ds = dropped(head, dp);
    let mut bias_gradient = vec![T::ZERO; bias.map_or(0, |[.., rows, keys]| rows * keys)];
    let (mut slope_gradient, mut sink_gradient) = (T::ZERO, T::ZERO);
    let mut parameters = vec![T::ZERO; head.problem.score.map_or(0, |score| score.parameters)];
    for i in 0..seq_q {
        let row = i * seq_kv..(i + 1) * seq_kv;
        let mut delta = if lse[i] == T::NEG_INFINITY { T::ZERO } else { -T::of(head.dlse[i]) };
        for (&p, &dp) in p[row.clone()].iter().zip(&ds[row.clone()]) {
            delta += p * dp;
        }
        sink_gradient += -(sink[i] * delta);
        for (j, index) in row.enumerate() {
            let mut x = (p[index] * (ds[index] - delta)).rounded(element);
            if let Some(&(derivative, for_parameter, parameter)) = function.get(index) {
                parameters[parameter] += x * for_parameter;
                x = (x * derivative).rounded(element);
            }
            if let Some([.., rows, keys]) = bias {
                bias_gradient[i % rows * keys + j % keys] += x;
            }
            if head.slope.is_some() {
                slope_gradient += -(x * T::of(head.distance(i, j))); // slopes are f32, so is this product
            }
            if softcap.is_some() {
                let t = tanh[index];
                x = (x * (T::ONE - t * t).rounded(element)).rounded(element);
            }
            ds[index] = (x * T::of(scale)).rounded(element);
        }
    }
    let dq = rounded(matmul(&ds, &narrow(head.k), seq_q, seq_kv, head_dim), element);
    let dk = rounded(matmul(&transpose(&ds, seq_q, seq_kv), &narrow(head.q), seq_kv, seq_q, head_dim), element);
    HeadGradients {
        q: wide(dq),
        k: wide(dk),
        v: wide(dv),
        bias: wide(bias_gradient),
        slope: slope_gradient.wide(),
        sink: sink_gradient.wide(),
        parameters: wide(parameters),
    }
}

/// A matrix `[Sq, Skv]` after dropout, rounded.
fn dropped<T: Real>(head: &Head, mut matrix: Vec<T>) -> Vec<T> {
    let Problem { element, heads_q, seq_kv, dropout: Some(dropout), .. } = *head.problem else { return matrix };
    for (index, x) in matrix.iter_mut().enumerate() {
        let (i, j) = ((index / seq_kv) as u32, (index % seq_kv) as u32);
        let multiplier = dropout.multiplier(head.b as u32, head.h as u32, heads_q as u32, i, j);
        *x = (*x * T::of(multiplier)).rounded(element);
    }
    matrix
}

fn rounded<T: Real>(mut matrix: Vec<T>, element: Element) -> Vec<T> {
    matrix.iter_mut().for_each(|x| *x = x.rounded(element));
    matrix
}

fn narrow<T: Real>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&x| T::of(x)).collect()
}

fn wide<T: Real>(values: Vec<T>) -> Vec<f64> {
    values.into_iter().map(T::wide).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{oracle, small};

    /// Largest difference where the oracle is finite; lse of −∞ must agree.
    fn distance(naive: &[f64], oracle: &[f64]) -> f64 {
        assert_eq!(naive.len(), oracle.len());
        let pairs = naive.iter().zip(oracle);
        pairs.map(|(n, o)| if n == o { 0.0 } else { (n - o).abs() }).fold(0.0, |max, error| {
            assert!(!error.is_nan());
            f64::max(max, error)
        })
    }

    #[test]
    fn each_element_type_is_as_far_from_the_oracle_as_its_precision_says() {
        // (least, most) error over all problems, outputs and gradients; lse is f32 whatever the element.
        for (element, least, most) in [
            (Element::F64, 0.0, 1e-13),
            (Element::F32, 1e-8, 2e-5),
            (Element::F16, 1e-5, 5e-2),
            (Element::BF16, 1e-4, 4e-1),
        ] {
            let mut worst = [0.0_f64; 8];
            for (seed, (_, problem)) in small::problems(element).iter().enumerate() {
                let inputs = Inputs::random(problem, seed as u64);
                let ((o, lse), (o_naive, lse_naive)) = (oracle::forward(problem, &inputs), forward(problem, &inputs));
                let (g, g_naive) = (oracle::backward(problem, &inputs), backward(problem, &inputs));
                let lse_error = distance(&lse_naive, &lse);
                assert!(lse_error <= f64::max(most, 1e-6), "{problem:?}: lse {lse_error}");
                worst[0] = worst[0].max(distance(&o_naive, &o));
                for (worst, (naive, oracle)) in worst[1..].iter_mut().zip([
                    (g_naive.q, g.q),
                    (g_naive.k, g.k),
                    (g_naive.v, g.v),
                    (g_naive.bias, g.bias),
                    (g_naive.alibi_slopes, g.alibi_slopes),
                    (g_naive.learned_sinks, g.learned_sinks),
                    (g_naive.score_parameters, g.score_parameters),
                ]) {
                    assert_eq!(naive.is_some(), oracle.is_some());
                    if let (Some(naive), Some(oracle)) = (naive, oracle) {
                        *worst = worst.max(distance(&naive, &oracle));
                    }
                }
            }
            assert!(worst.iter().all(|error| (least..most).contains(error)), "{element:?}: {worst:?}");
        }
    }
}
