//! One query head of one batch element: where its tensors lie and what it sees. Derived from the contract of
//! attention, not from the kernels' mask and score code, which it is there to judge.

use flashover_kernels::operands::Gradients;
use flashover_kernels::problem::Problem;

use crate::data::Inputs;
use crate::score::{self, Applied};

/// A query head `h` of a batch element `b`, with the parts of the operands that it reads.
pub(crate) struct Head<'a> {
    pub(crate) problem: &'a Problem,
    pub(crate) inputs: &'a Inputs,
    pub(crate) b: usize,
    pub(crate) h: usize,
    /// `[Sq, D]`.
    pub(crate) q: &'a [f64],
    /// `[Skv, D]`.
    pub(crate) k: &'a [f64],
    /// `[Skv, Dv]`.
    pub(crate) v: &'a [f64],
    /// `[Sq, Dv]`.
    pub(crate) do_: &'a [f64],
    /// `[Sq]`.
    pub(crate) dlse: &'a [f64],
    /// ALiBi slope.
    pub(crate) slope: Option<f64>,
    /// Learned sink's logit.
    pub(crate) sink: Option<f64>,
}

impl<'a> Head<'a> {
    /// The head of index `b · Hq + h`.
    pub(crate) fn new(problem: &'a Problem, inputs: &'a Inputs, index: usize) -> Self {
        let x = &inputs.operands;
        let (b, h) = (index / problem.heads_q, index % problem.heads_q);
        let shared = b * problem.heads_kv + h / (problem.heads_q / problem.heads_kv);
        let (rows, keys) = (problem.seq_q, problem.seq_kv);
        Head {
            problem,
            inputs,
            b,
            h,
            q: part(&x.q, index, rows * problem.head_dim),
            k: part(&x.k, shared, keys * problem.head_dim),
            v: part(&x.v, shared, keys * problem.value_dim),
            do_: part(&inputs.do_, index, rows * problem.value_dim),
            dlse: part(&inputs.dlse, index, rows),
            slope: problem.alibi.then(|| x.alibi_slopes.as_ref().expect("the problem has ALiBi slopes")[h]),
            sink: problem.learned_sinks.then(|| x.learned_sinks.as_ref().expect("the problem has learned sinks")[h]),
        }
    }

    /// Position of query `i` on the key axis: the last query stands at the last key.
    fn position(&self, i: usize) -> i64 {
        i as i64 + self.problem.seq_kv as i64 - self.problem.seq_q as i64
    }

    /// `|a − j|`.
    pub(crate) fn distance(&self, i: usize, j: usize) -> f64 {
        (self.position(i) - j as i64).abs() as f64
    }

    /// Whether query `i` sees key `j`: the causal order, the window unless the key is a visible sink, the length of the
    /// batch element, and the mask, all of them.
    pub(crate) fn visible(&self, i: usize, j: usize) -> bool {
        let band = &self.problem.band;
        let (a, key) = (self.position(i), j as i64);
        let after = key > a;
        let windowed = key < a - i64::from(band.left) || key > a + i64::from(band.right);
        let beyond = self.problem.key_lengths
            && key
                >= i64::from(self.inputs.operands.key_lengths.as_ref().expect("the problem has key lengths")[self.b]);
        let masked = self.problem.mask.is_some_and(|shape| {
            self.inputs.operands.mask.as_ref().expect("the problem has a mask")[self.broadcast(shape, i, j)]
        });
        !(band.causal && after || windowed && key >= i64::from(band.sinks) || beyond || masked)
    }

    /// The bias of score `(i, j)`, 0 without one.
    pub(crate) fn bias(&self, i: usize, j: usize) -> f64 {
        match self.problem.bias {
            Some(shape) => {
                self.inputs.operands.bias.as_ref().expect("the problem has a bias")[self.broadcast(shape, i, j)]
            }
            None => 0.0,
        }
    }

    /// What the user's function makes of score `(i, j)`, and the parameter that it reads.
    pub(crate) fn function(&self, i: usize, j: usize, s: f64) -> Option<(Applied, usize)> {
        let code = self.problem.score?.code;
        let parameters = self.inputs.operands.score_parameters.as_ref().expect("the problem has a score function");
        let index = score::parameter(code, [self.b, self.h], self.position(i), j as i64);
        Some((score::apply(code, s, parameters[index]), index))
    }

    /// Index of score `(i, j)` in a tensor of this shape that broadcasts to `[B, Hq, Sq, Skv]`.
    pub(crate) fn broadcast(&self, shape: [usize; 4], i: usize, j: usize) -> usize {
        let place = [self.b, self.h, i, j];
        shape.iter().zip(place).fold(0, |index, (&size, at)| index * size + if size == 1 { 0 } else { at })
    }
}

/// Gradients of one head. The bias's are `[Sq or 1, Skv or 1]`, the last two dimensions of its shape.
pub(crate) struct HeadGradients {
    pub(crate) q: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) bias: Vec<f64>,
    pub(crate) slope: f64,
    pub(crate) sink: f64,
    /// Of all parameters of the user's function.
    pub(crate) parameters: Vec<f64>,
}

/// Sums the gradients of all heads where heads share a tensor, in the order of the heads.
pub(crate) fn gather(problem: &Problem, inputs: &Inputs, heads: &[HeadGradients]) -> Gradients<Vec<f64>> {
    let x = &inputs.operands;
    let (mut q, mut k, mut v) = (vec![0.0; x.q.len()], vec![0.0; x.k.len()], vec![0.0; x.v.len()]);
    let mut bias = problem.bias.map(|shape| vec![0.0; shape.iter().product()]);
    let (mut slopes, mut sinks) = (vec![0.0; problem.heads_q], vec![0.0; problem.heads_q]);
    let mut parameters = x.score_parameters.as_ref().map(|x| vec![0.0; x.len()]);
    for (index, gradients) in heads.iter().enumerate() {
        let (b, h) = (index / problem.heads_q, index % problem.heads_q);
        let shared = b * problem.heads_kv + h / (problem.heads_q / problem.heads_kv);
        add_part(&mut q, index, &gradients.q);
        add_part(&mut k, shared, &gradients.k);
        add_part(&mut v, shared, &gradients.v);
        if let (Some(sum), Some([batch, heads, ..])) = (&mut bias, problem.bias) {
            let (b, h) = (if batch == 1 { 0 } else { b }, if heads == 1 { 0 } else { h });
            add_part(sum, b * heads + h, &gradients.bias);
        }
        slopes[h] += gradients.slope;
        sinks[h] += gradients.sink;
        if let Some(sums) = &mut parameters {
            add_part(sums, 0, &gradients.parameters);
        }
    }
    Gradients {
        q: Some(q),
        k: Some(k),
        v: Some(v),
        bias,
        alibi_slopes: problem.alibi.then_some(slopes),
        learned_sinks: problem.learned_sinks.then_some(sinks),
        score_parameters: parameters,
    }
}

/// Part `index` of equal parts of this length.
fn part(tensor: &[f64], index: usize, length: usize) -> &[f64] {
    &tensor[index * length..][..length]
}

/// Adds to part `index` of equal parts of `terms`' length.
fn add_part(tensor: &mut [f64], index: usize, terms: &[f64]) {
    for (sum, term) in tensor[index * terms.len()..][..terms.len()].iter_mut().zip(terms) {
        *sum += term;
    }
}

/// The sum of two passes' gradients, each tensor in f64; what only one pass has is that pass's.
pub fn sum(x: Gradients<Vec<f64>>, y: Gradients<Vec<f64>>) -> Gradients<Vec<f64>> {
    let add = |x: Option<Vec<f64>>, y: Option<Vec<f64>>| match (x, y) {
        (Some(x), Some(y)) => Some(x.into_iter().zip(y).map(|(x, y)| x + y).collect()),
        (x, y) => x.or(y),
    };
    Gradients {
        q: add(x.q, y.q),
        k: add(x.k, y.k),
        v: add(x.v, y.v),
        bias: add(x.bias, y.bias),
        alibi_slopes: add(x.alibi_slopes, y.alibi_slopes),
        learned_sinks: add(x.learned_sinks, y.learned_sinks),
        score_parameters: add(x.score_parameters, y.score_parameters),
    }
}
