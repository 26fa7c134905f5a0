//! Attention and its gradients in f64, element by element, over visible keys only.

use flashover_kernels::problem::Problem;

use super::super::real::Real;
use super::super::{Float, Inputs};

/// Everything that forward and backward give, as f64.
pub struct Reference {
    pub o: Vec<f64>,
    pub lse: Vec<f64>,
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
    pub dbias: Vec<f64>,
    pub dslopes: Vec<f64>,
    pub dsinks: Vec<f64>,
    /// `Σ |ds · distance|`: what the rounding of `dslopes`, sums of both signs, is measured by.
    pub slope_terms: f64,
}

/// Keys that query `i` sees.
fn visible<T: Float>(p: &Problem, x: &Inputs<'_, T>, [b, h, i]: [usize; 3]) -> Vec<usize> {
    let length = x.key_lengths.map_or(p.seq_kv, |lengths| lengths[b].clamp(0, p.seq_kv as i32) as usize);
    let hidden = |j| x.mask.is_some_and(|mask| mask.broadcast(p.score_shape()).at(b, h, i, j) != 0);
    (0..length).filter(|&j| p.band.allows(i as i32 + p.alignment(), j as i32) && !hidden(j)).collect()
}

fn dot(n: usize, x: impl Fn(usize) -> f64, y: impl Fn(usize) -> f64) -> f64 {
    (0..n).map(|d| x(d) * y(d)).sum()
}

/// `do_` is `[B, Hq, Sq, Dv]`, contiguous.
pub fn reference<T: Float>(p: &Problem, x: &Inputs<'_, T>, do_: &[T], dlse: &[f32]) -> Reference {
    let (d, dv, rows) = (p.head_dim, p.value_dim, p.batch * p.heads_q * p.seq_q);
    let kv_rows = p.batch * p.heads_kv * p.seq_kv;
    let zeros = |n: usize| vec![0.0; n];
    let bias_shape = p.bias.unwrap_or([0; 4]);
    let mut r = Reference {
        o: zeros(rows * dv),
        lse: zeros(rows),
        dq: zeros(rows * d),
        dk: zeros(kv_rows * d),
        dv: zeros(kv_rows * dv),
        dbias: zeros(bias_shape.iter().product()),
        dslopes: zeros(p.heads_q),
        dsinks: zeros(p.heads_q),
        slope_terms: 0.0,
    };
    let f = |x: T| x.widen().to_f64();
    for row in 0..rows {
        let (b, h, i) = (row / (p.heads_q * p.seq_q), row / p.seq_q % p.heads_q, row % p.seq_q);
        let hk = h / p.group();
        let kv_row = |j: usize| (b * p.heads_kv + hk) * p.seq_kv + j;
        let bias_at = |j: usize| {
            let at = [b, h, i, j];
            (0..4).fold(0, |n, axis| n * bias_shape[axis] + if bias_shape[axis] == 1 { 0 } else { at[axis] })
        };
        let distance = |j: usize| f64::from((i as i32 + p.alignment() - j as i32).abs());
        let keys = visible(p, x, [b, h, i]);
        // (key, score, derivative of the softcap)
        let scores: Vec<(usize, f64, f64)> = keys
            .into_iter()
            .map(|j| {
                let mut s = p.scale * dot(d, |c| f(x.q.at(b, h, i, c)), |c| f(x.k.at(b, hk, j, c)));
                let mut derivative = 1.0;
                if let Some(cap) = p.softcap {
                    let t = (s / cap).tanh();
                    (s, derivative) = (cap * t, 1.0 - t * t);
                }
                s -= x.alibi_slopes.map_or(0.0, |slopes| slopes[h].to_f64() * distance(j));
                s += x.bias.map_or(0.0, |bias| f(bias.broadcast(p.score_shape()).at(b, h, i, j)));
                (j, s, derivative)
            })
            .collect();
        let sink = x.learned_sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[h].to_f64());
        let m = scores.iter().fold(sink, |m, &(_, s, _)| m.max(s));
        if m == f64::NEG_INFINITY && scores.iter().all(|&(_, s, _)| s == m) {
            r.lse[row] = m;
            continue;
        }
        let l = scores.iter().map(|&(_, s, _)| (s - m).exp()).sum::<f64>() + (sink - m).exp();
        let lse = m + l.ln();
        r.lse[row] = lse;
        let multiplier = |j: usize| {
            p.dropout
                .map_or(1.0, |dropout| dropout.multiplier(b as u32, h as u32, p.heads_q as u32, i as u32, j as u32))
        };
        for &(j, s, _) in &scores {
            let weight = (s - lse).exp() * multiplier(j);
            for c in 0..dv {
                r.o[row * dv + c] += weight * f(x.v.at(b, hk, j, c));
                r.dv[kv_row(j) * dv + c] += weight * f(do_[row * dv + c]);
            }
        }
        // Over visible keys, which is not o · do where a row sees nothing and its do is not finite.
        let dp = |j: usize| multiplier(j) * dot(dv, |c| f(do_[row * dv + c]), |c| f(x.v.at(b, hk, j, c)));
        let delta = scores.iter().map(|&(j, s, _)| (s - lse).exp() * dp(j)).sum::<f64>() - f64::from(dlse[row]);
        if x.learned_sinks.is_some() {
            r.dsinks[h] -= (sink - lse).exp() * delta;
        }
        for &(j, s, derivative) in &scores {
            let ds = (s - lse).exp() * (dp(j) - delta);
            if p.bias.is_some() {
                r.dbias[bias_at(j)] += ds;
            }
            r.dslopes[h] -= ds * distance(j);
            r.slope_terms += (ds * distance(j)).abs();
            for c in 0..d {
                r.dq[row * d + c] += ds * derivative * p.scale * f(x.k.at(b, hk, j, c));
                r.dk[kv_row(j) * d + c] += ds * derivative * p.scale * f(x.q.at(b, h, i, c));
            }
        }
    }
    r
}
