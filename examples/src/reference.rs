//! Causal attention and its gradients in f64, naive, in plain Rust: what both sides of the comparison are held against.

use std::thread;

/// Results of attention over heads of `[S, D]`, one after the other.
pub struct Reference {
    /// Output.
    pub o: Vec<f64>,
    /// Gradient of the queries.
    pub dq: Vec<f64>,
    /// Gradient of the keys.
    pub dk: Vec<f64>,
    /// Gradient of the values.
    pub dv: Vec<f64>,
}

/// One head's operands: rows of `D`, and transposed where a loop over keys is innermost.
struct Head {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    do_: Vec<f64>,
    k_t: Vec<f64>,
    v_t: Vec<f64>,
    s: usize,
    d: usize,
}

impl Reference {
    /// Of the heads that `q`, `k`, `v` and the output's gradient `do_` hold, each `[heads, s, d]`.
    pub fn new(q: &[f32], k: &[f32], v: &[f32], do_: &[f32], s: usize, d: usize) -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let mut all = Reference { o: Vec::new(), dq: Vec::new(), dk: Vec::new(), dv: Vec::new() };
        for start in (0..q.len()).step_by(s * d) {
            let wide = |x: &[f32]| x[start..start + s * d].iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
            let head = Head::new(wide(q), wide(k), wide(v), wide(do_), s, d);
            // Thread `t` takes the rows t, t + threads, …: the long ones are shared evenly.
            let head = &head;
            let parts: Vec<Reference> = thread::scope(|scope| {
                let workers: Vec<_> =
                    (0..threads).map(|t| scope.spawn(move || head.rows((t..s).step_by(threads)))).collect();
                workers.into_iter().map(|worker| worker.join().expect("a worker of the reference")).collect()
            });
            all.append(parts);
        }
        all
    }

    fn zeros(length: usize) -> Self {
        let zeros = || vec![0.0; length];
        Reference { o: zeros(), dq: zeros(), dk: zeros(), dv: zeros() }
    }

    /// Appends the sum of one head's parts.
    fn append(&mut self, parts: Vec<Reference>) {
        let sum = |field: fn(&Reference) -> &Vec<f64>| -> Vec<f64> {
            (0..field(&parts[0]).len()).map(|at| parts.iter().map(|part| field(part)[at]).sum()).collect()
        };
        self.o.extend(sum(|part| &part.o));
        self.dq.extend(sum(|part| &part.dq));
        self.dk.extend(sum(|part| &part.dk));
        self.dv.extend(sum(|part| &part.dv));
    }
}

impl Head {
    fn new(q: Vec<f64>, k: Vec<f64>, v: Vec<f64>, do_: Vec<f64>, s: usize, d: usize) -> Self {
        let transposed = |x: &[f64]| (0..s * d).map(|at| x[at % s * d + at / s]).collect();
        Head { k_t: transposed(&k), v_t: transposed(&v), q, k, v, do_, s, d }
    }

    /// What the query rows give: their o and dq, and their share of dk and dv.
    fn rows(&self, rows: impl Iterator<Item = usize>) -> Reference {
        let Head { q, k, v, do_, k_t, v_t, s, d } = self;
        let scale = 1.0 / (*d as f64).sqrt();
        let mut part = Reference::zeros(s * d);
        for i in rows {
            let row = i * d..(i + 1) * d;
            let (q_i, do_i) = (&q[row.clone()], &do_[row.clone()]);
            // p_j = softmax_j(scale · q_i·k_j) over the keys j ≤ i
            let mut p = products(q_i, k_t, *s, i + 1);
            let m = p.iter().fold(f64::NEG_INFINITY, |m, x| m.max(x * scale));
            p.iter_mut().for_each(|x| *x = (*x * scale - m).exp());
            let l: f64 = p.iter().sum();
            p.iter_mut().for_each(|x| *x /= l);
            // o_i = Σ p_j v_j
            let o_i = &mut part.o[row.clone()];
            p.iter().zip(v.chunks(*d)).for_each(|(p_j, v_j)| add(o_i, *p_j, v_j));
            // ds_j = p_j (do_i·v_j − do_i·o_i)
            let delta: f64 = do_i.iter().zip(&*o_i).map(|(x, y)| x * y).sum();
            let dp = products(do_i, v_t, *s, i + 1);
            let dq_i = &mut part.dq[row];
            for (j, (p_j, dp_j)) in p.iter().zip(&dp).enumerate() {
                let ds_j = scale * p_j * (dp_j - delta);
                let key = j * d..(j + 1) * d;
                add(dq_i, ds_j, &k[key.clone()]);
                add(&mut part.dk[key.clone()], ds_j, q_i);
                add(&mut part.dv[key], *p_j, do_i);
            }
        }
        part
    }
}

/// x · y_j of the first `count` rows of y, given y transposed, `[D, s]`.
fn products(x: &[f64], y_t: &[f64], s: usize, count: usize) -> Vec<f64> {
    let mut sums = vec![0.0; count];
    x.iter().zip(y_t.chunks(s)).for_each(|(x_d, y_d)| add(&mut sums, *x_d, &y_d[..count]));
    sums
}

/// to += factor · x
fn add(to: &mut [f64], factor: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += factor * x);
}

/// The largest |difference|; NaN if there is one.
pub fn max_error(found: &[f32], expected: &[f64]) -> f64 {
    let differences = found.iter().zip(expected).map(|(found, expected)| (f64::from(*found) - expected).abs());
    differences.fold(0.0, |worst, x| if x > worst || x.is_nan() { x } else { worst })
}
