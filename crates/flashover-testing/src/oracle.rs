//! The oracle: attention and its gradients in f64, naive, written from the contract alone.
//!
//! ```text
//! x_ij = (q_i · k_j) · scale                        product
//! s_ij = f(c · tanh(x_ij / c) − slope · |a_i − j| + bias_ij)   a_i = i + Skv − Sq, f: the user's function
//! p_ij = exp(s_ij − lse_i)                          over the keys that i sees, 0 elsewhere
//! lse_i = ln(Σ_j exp(s_ij) + exp(sink))
//! o_i  = Σ_j p_ij · mult_ij · v_j                   mult: dropout
//! ```
//!
//! A key is seen when it is visible and its score is not −∞. Sums run over seen keys only: what stands in a hidden key
//! or value, NaN included, never enters, and a visible NaN does. A row that sees nothing has `o = 0` and no gradients;
//! its `lse` is −∞, or its sink's logit, whose gradient is then that of `lse`.

use flashover_kernels::operands::Gradients;
use flashover_kernels::problem::Problem;

use crate::data::Inputs;
use crate::head::{Head, HeadGradients, gather};
use crate::matmul::{matmul, transpose};
use crate::parallel::map_heads;

/// Output `[B, Hq, Sq, Dv]` and log-sum-exp `[B, Hq, Sq]`.
pub fn forward(problem: &Problem, inputs: &Inputs) -> (Vec<f64>, Vec<f64>) {
    let heads = map_heads(problem, |index| {
        let head = Head::new(problem, inputs, index);
        let softmax = Softmax::of(&head);
        let kept = softmax.kept(&head);
        let o = seen_product(&kept, &softmax.seen, head.v, problem.seq_q, problem.seq_kv, problem.value_dim);
        (o, softmax.lse)
    });
    let (o, lse): (Vec<_>, Vec<_>) = heads.into_iter().unzip();
    (o.concat(), lse.concat())
}

/// Gradients of `⟨o, do⟩ + ⟨lse, dlse⟩`, the second sum over rows whose `lse` is finite: those of `q`, `k`, `v`, and of
/// the bias, the ALiBi slopes and the learned sinks that the problem has.
pub fn backward(problem: &Problem, inputs: &Inputs) -> Gradients<Vec<f64>> {
    let heads = map_heads(problem, |index| head_backward(&Head::new(problem, inputs, index)));
    gather(problem, inputs, &heads)
}

/// Scores of a head after softmax, and what its backward needs of them. Matrices are `[Sq, Skv]`.
struct Softmax {
    /// Probabilities; 0 where not seen.
    p: Vec<f64>,
    /// Visible, and with a score that is not −∞.
    seen: Vec<bool>,
    /// Derivative of the softcap; empty without one.
    cap: Vec<f64>,
    /// Derivatives of the user's function for the score and for its parameter, and which that is; empty without one.
    function: Vec<(f64, f64, usize)>,
    /// Share of the learned sink in the denominator, `[Sq]`; 0 without one.
    sink: Vec<f64>,
    /// `[Sq]`.
    lse: Vec<f64>,
}

impl Softmax {
    fn of(head: &Head) -> Self {
        let Problem { seq_q, seq_kv, head_dim, scale, softcap, .. } = *head.problem;
        let mut s = matmul(head.q, &transpose(head.k, seq_kv, head_dim), seq_q, head_dim, seq_kv);
        let mut seen = vec![false; s.len()];
        let mut cap = vec![0.0; if softcap.is_some() { s.len() } else { 0 }];
        let mut function = Vec::new();
        let (mut sink, mut lse) = (vec![0.0; seq_q], vec![f64::NEG_INFINITY; seq_q]);
        for i in 0..seq_q {
            let row = &mut s[i * seq_kv..][..seq_kv];
            let seen = &mut seen[i * seq_kv..][..seq_kv];
            for (j, s) in row.iter_mut().enumerate() {
                *s *= scale;
                if let Some(c) = softcap {
                    let t = (*s / c).tanh();
                    *s = c * t;
                    cap[i * seq_kv + j] = 1.0 - t * t;
                }
                if let Some(slope) = head.slope {
                    *s -= slope * head.distance(i, j);
                }
                *s += head.bias(i, j);
                if let Some((f, parameter)) = head.function(i, j, *s) {
                    *s = f.value;
                    function.push((f.derivative, f.parameter_derivative, parameter));
                }
                seen[j] = head.visible(i, j) && *s != f64::NEG_INFINITY;
            }
            (sink[i], lse[i]) = normalise(row, seen, head.sink);
        }
        Softmax { p: s, seen, cap, function, sink, lse }
    }

    /// Probabilities after dropout.
    fn kept(&self, head: &Head) -> Vec<f64> {
        let Some(dropout) = head.problem.dropout else { return self.p.clone() };
        let Problem { heads_q, seq_kv, .. } = *head.problem;
        let place = |index: usize| ((index / seq_kv) as u32, (index % seq_kv) as u32);
        let kept = self.p.iter().enumerate().map(|(index, p)| {
            let (i, j) = place(index);
            p * dropout.multiplier(head.b as u32, head.h as u32, heads_q as u32, i, j)
        });
        kept.collect()
    }
}

/// Turns a row of scores into probabilities; the share of the sink, and the log-sum-exp.
fn normalise(row: &mut [f64], seen: &[bool], sink: Option<f64>) -> (f64, f64) {
    // A sink of −∞ adds exp(−∞) = 0: it is as if there were none.
    let sink = sink.filter(|&logit| logit != f64::NEG_INFINITY);
    let nothing = sink.is_none() && !seen.contains(&true);
    let visible = row.iter().zip(seen).filter(|&(_, &seen)| seen).map(|(&s, _)| s);
    let m = visible.chain(sink).fold(f64::NEG_INFINITY, f64::max);
    let mut l = sink.map_or(0.0, |logit| (logit - m).exp());
    for (s, &seen) in row.iter_mut().zip(seen) {
        *s = if seen { (*s - m).exp() } else { 0.0 };
        l += *s;
    }
    if nothing {
        return (0.0, f64::NEG_INFINITY);
    }
    for (s, &seen) in row.iter_mut().zip(seen) {
        if seen {
            *s /= l;
        }
    }
    (sink.map_or(0.0, |logit| (logit - m).exp() / l), m + l.ln())
}

/// ```text
/// dv_j  = Σ_i p_ij · mult_ij · do_i
/// dp_ij = mult_ij · (do_i · v_j)
/// ds_ij = p_ij · (dp_ij − delta_i)                  delta_i = Σ_j p_ij · dp_ij − dlse_i
/// dx_ij = ds_ij · f′ · (1 − tanh²(x_ij / c))
/// dq_i  = Σ_j dx_ij · scale · k_j                   dk_j = Σ_i dx_ij · scale · q_i
/// ```
fn head_backward(head: &Head) -> HeadGradients {
    let Problem { seq_q, seq_kv, head_dim, value_dim, scale, bias, .. } = *head.problem;
    let softmax = Softmax::of(head);
    let (p, seen) = (&softmax.p, &softmax.seen);
    let seen_transposed = transpose(seen, seq_q, seq_kv);
    let kept = softmax.kept(head);
    let v_gradient =
        seen_product(&transpose(&kept, seq_q, seq_kv), &seen_transposed, head.do_, seq_kv, seq_q, value_dim);

    // kept_ij · (do_i · v_j) = p_ij · dp_ij, and where dropout left p_ij alone that is all that ds_ij needs of dp_ij.
    let mut ds = matmul(head.do_, &transpose(head.v, seq_kv, value_dim), seq_q, value_dim, seq_kv);
    let mut bias_gradient = vec![0.0; bias.map_or(0, |[.., rows, keys]| rows * keys)];
    let (mut slope, mut sink) = (0.0, 0.0);
    let mut parameters = vec![0.0; head.problem.score.map_or(0, |score| score.parameters)];
    for i in 0..seq_q {
        let row = i * seq_kv..(i + 1) * seq_kv;
        for ((ds, &kept), &seen) in ds[row.clone()].iter_mut().zip(&kept[row.clone()]).zip(&seen[row.clone()]) {
            *ds = if seen { *ds * kept } else { 0.0 };
        }
        let dlse = if softmax.lse[i] == f64::NEG_INFINITY { 0.0 } else { head.dlse[i] };
        let delta = ds[row.clone()].iter().sum::<f64>() - dlse;
        sink -= softmax.sink[i] * delta;
        for (j, index) in row.enumerate().filter(|&(_, index)| seen[index]) {
            ds[index] -= p[index] * delta;
            if let Some(&(derivative, for_parameter, parameter)) = softmax.function.get(index) {
                parameters[parameter] += ds[index] * for_parameter;
                ds[index] *= derivative;
            }
            if let Some([.., rows, keys]) = bias {
                bias_gradient[i % rows * keys + j % keys] += ds[index];
            }
            slope -= ds[index] * head.distance(i, j);
            ds[index] *= scale * softmax.cap.get(index).unwrap_or(&1.0);
        }
    }
    HeadGradients {
        q: seen_product(&ds, seen, head.k, seq_q, seq_kv, head_dim),
        k: seen_product(&transpose(&ds, seq_q, seq_kv), &seen_transposed, head.q, seq_kv, seq_q, head_dim),
        v: v_gradient,
        bias: bias_gradient,
        slope,
        sink,
        parameters,
    }
}

/// `a · b`, `[m, n] · [n, k] → [m, k]`, where row `i` sums over the rows of `b` that it sees; `a` is 0 elsewhere.
///
/// Rows of `b` that are not finite are left out of the dense product, where 0 · NaN would reach every row, and are
/// added to those that see them.
fn seen_product(a: &[f64], seen: &[bool], b: &[f64], m: usize, n: usize, k: usize) -> Vec<f64> {
    let spoilt: Vec<usize> = (0..n).filter(|j| b[j * k..][..k].iter().any(|x| !x.is_finite())).collect();
    if spoilt.is_empty() {
        return matmul(a, b, m, n, k);
    }
    let mut finite = b.to_vec();
    for j in &spoilt {
        finite[j * k..][..k].fill(0.0);
    }
    let mut c = matmul(a, &finite, m, n, k);
    for (i, row) in c.chunks_exact_mut(k).enumerate() {
        for &j in spoilt.iter().filter(|&j| seen[i * n + j]) {
            for (sum, x) in row.iter_mut().zip(&b[j * k..][..k]) {
                *sum += a[i * n + j] * x;
            }
        }
    }
    c
}

#[cfg(test)]
mod tests;
