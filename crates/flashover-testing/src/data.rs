//! A case and its inputs: deterministic, and exactly representable in the problem's element type, so that every
//! implementation sees the same numbers.

use flashover_kernels::operands::Operands;
use flashover_kernels::problem::{Element, Problem};

use crate::grid::case_name;
use crate::matmul::Real;

/// A problem and the seed of its inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// What is to be computed.
    pub problem: Problem,
    /// Seed of [`Inputs::random`].
    pub seed: u64,
    /// Whether the loss depends on `lse`; otherwise [`Inputs::dlse`] is all zeros.
    pub lse_gradient: bool,
}

impl Case {
    /// A case whose loss depends on both `o` and `lse`.
    pub fn new(problem: Problem, seed: u64) -> Self {
        Case { problem, seed, lse_gradient: true }
    }

    /// [`case_name`] of the problem, and `_dlse` when the loss depends on `lse`.
    pub fn name(&self) -> String {
        format!("{}{}", case_name(&self.problem), if self.lse_gradient { "_dlse" } else { "" })
    }

    /// The inputs of this case.
    pub fn inputs(&self) -> Inputs {
        let mut inputs = Inputs::random(&self.problem, self.seed);
        if !self.lse_gradient {
            inputs.dlse.fill(0.0);
        }
        inputs
    }
}

/// Operands of a problem and the gradients that come back from its two outputs; everything contiguous row-major.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The tensors of the problem; those that the problem does not mention are `None`.
    pub operands: Operands<Vec<f64>, Vec<bool>, Vec<i32>>,
    /// Gradient of the output `[B, Hq, Sq, Dv]`.
    pub do_: Vec<f64>,
    /// Gradient of the log-sum-exp `[B, Hq, Sq]`.
    pub dlse: Vec<f64>,
}

impl Inputs {
    /// Other inputs of the same problem: another draw of everything. Without a gradient of `lse` if this one has none.
    pub fn redrawn(&self, problem: &Problem, draw: u64) -> Self {
        let mut drawn = Inputs::random(problem, 0xd1a3 ^ draw);
        if problem.plan.is_some() {
            // There the mask says what the plan shows, which is no matter of luck.
            drawn.operands.mask.clone_from(&self.operands.mask);
        }
        if self.dlse.iter().all(|&x| x == 0.0) {
            drawn.dlse.fill(0.0);
        }
        drawn
    }

    /// Normally distributed `q`, `k`, `v`, `do`, `dlse`, bias and sinks, a mask that hides a quarter of the keys and
    /// some whole rows, key lengths from 0 to `Skv` with both ends likely, and ALiBi's own slopes `2^(−8h/H)`.
    ///
    /// Each tensor has its own stream of numbers: an option more or less leaves the others as they are.
    pub fn random(problem: &Problem, seed: u64) -> Self {
        let element = problem.element;
        // Statistics and per-head parameters are f32, in an f64 problem f64.
        let statistic = if element == Element::F64 { Element::F64 } else { Element::F32 };
        let stream = |tensor: u64| Rng::new(Rng::new(seed).next_u64().wrapping_add(tensor));
        let normal = |tensor: u64, n: usize, element: Element| -> Vec<f64> {
            let mut rng = stream(tensor);
            (0..n).map(|_| round_to(element, rng.normal())).collect()
        };
        let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim, .. } = *problem;
        let operands = Operands {
            q: normal(0, batch * heads_q * seq_q * head_dim, element),
            k: normal(1, batch * heads_kv * seq_kv * head_dim, element),
            v: normal(2, batch * heads_kv * seq_kv * value_dim, element),
            bias: problem.bias.map(|shape| normal(3, shape.iter().product(), element)),
            mask: problem.mask.map(|shape| random_mask(&mut stream(4), shape)),
            alibi_slopes: problem.alibi.then(|| {
                let slope = |h: usize| (-8.0 * (h + 1) as f64 / heads_q as f64).exp2();
                (0..heads_q).map(|h| round_to(statistic, slope(h))).collect()
            }),
            learned_sinks: problem.learned_sinks.then(|| normal(5, heads_q, statistic)),
            score_parameters: problem.score.map(|score| normal(9, score.parameters, statistic)),
            key_lengths: problem.key_lengths.then(|| {
                let mut rng = stream(6);
                (0..batch).map(|_| random_length(&mut rng, seq_kv)).collect()
            }),
        };
        let rows = batch * heads_q * seq_q;
        // `lse` is f32 in every problem, so its gradient is.
        Inputs { operands, do_: normal(7, rows * value_dim, element), dlse: normal(8, rows, Element::F32) }
    }
}

/// `x` rounded to what `element` can hold, to nearest, ties to even.
pub fn round_to(element: Element, x: f64) -> f64 {
    x.rounded(element)
}

fn random_mask(rng: &mut Rng, shape: [usize; 4]) -> Vec<bool> {
    let mut mask: Vec<bool> = (0..shape.iter().product()).map(|_| rng.chance(0.25)).collect();
    if shape[3] > 0 {
        for (index, row) in mask.chunks_exact_mut(shape[3]).enumerate() {
            // The sixth row always, so that every mask of some rows has one; a mask of one row hides no more than that.
            if index == 5 || index > 5 && rng.chance(0.05) {
                row.fill(true);
            }
        }
    }
    mask
}

fn random_length(rng: &mut Rng, seq_kv: usize) -> i32 {
    let length = match rng.below(8) {
        0 => 0,
        1 => seq_kv,
        _ => rng.below(seq_kv + 1),
    };
    length as i32
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators").
#[derive(Debug, Clone)]
pub struct Rng {
    state: u64,
}

impl Rng {
    /// A generator; each seed gives another stream, and the same one every time.
    pub fn new(seed: u64) -> Self {
        Rng { state: seed }
    }

    /// 64 uniform bits.
    pub fn next_u64(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..n`, for `n` far below 2⁵³.
    pub fn below(&mut self, n: usize) -> usize {
        (self.uniform() * n as f64) as usize
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.uniform() < probability
    }

    /// Standard normal (Box and Muller), 0 ≤ |x| < 9.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(element: Element) -> Problem {
        let plain = Problem::new([2, 4, 33, 8], [2, 2, 57, 8], [2, 2, 57, 5], element).unwrap();
        Problem {
            bias: Some([1, 4, 1, 57]),
            mask: Some([2, 1, 33, 57]),
            alibi: true,
            learned_sinks: true,
            key_lengths: true,
            ..plain
        }
    }

    #[test]
    fn inputs_have_the_shapes_of_their_problem_and_depend_on_the_seed_alone() {
        let problem = problem(Element::F32);
        let x = Inputs::random(&problem, 3);
        let lengths = [x.operands.q.len(), x.operands.k.len(), x.operands.v.len(), x.do_.len(), x.dlse.len()];
        assert_eq!(lengths, [2 * 4 * 33 * 8, 2 * 2 * 57 * 8, 2 * 2 * 57 * 5, 2 * 4 * 33 * 5, 2 * 4 * 33]);
        assert_eq!(x.operands.bias.as_ref().unwrap().len(), 4 * 57);
        assert_eq!(x.operands.alibi_slopes, Some(vec![0.25, 0.0625, 0.015625, 0.00390625]));
        assert_eq!(x.operands.learned_sinks.as_ref().unwrap().len(), 4);
        assert_eq!(x.operands.q, Inputs::random(&problem, 3).operands.q);
        assert_ne!(x.operands.q, Inputs::random(&problem, 4).operands.q);
        let bare =
            Problem { bias: None, mask: None, alibi: false, learned_sinks: false, key_lengths: false, ..problem };
        assert_eq!(x.do_, Inputs::random(&bare, 3).do_, "options leave the other tensors as they are");
        assert!(Inputs::random(&bare, 3).operands.mask.is_none());
    }

    #[test]
    fn values_are_representable_and_normal() {
        for element in [Element::F64, Element::F32, Element::F16, Element::BF16] {
            let x = Inputs::random(&problem(element), 1);
            let all = [&x.operands.q, &x.operands.k, &x.operands.v, x.operands.bias.as_ref().unwrap(), &x.do_];
            assert!(all.iter().all(|tensor| tensor.iter().all(|&value| round_to(element, value) == value)));
        }
        let mut rng = Rng::new(9);
        let samples: Vec<f64> = (0..100_000).map(|_| rng.normal()).collect();
        let moment = |power: i32| samples.iter().map(|x| x.powi(power)).sum::<f64>() / samples.len() as f64;
        assert!(moment(1).abs() < 0.02 && (moment(2) - 1.0).abs() < 0.03 && (moment(4) - 3.0).abs() < 0.2);
    }

    #[test]
    fn masks_hide_a_quarter_and_some_whole_rows() {
        let problem = Problem { mask: Some([2, 4, 33, 57]), ..problem(Element::F32) };
        let mask = Inputs::random(&problem, 2).operands.mask.unwrap();
        let whole = mask.chunks_exact(57).filter(|row| row.iter().all(|&hides| hides)).count();
        assert!((5..40).contains(&whole), "{whole} of 264 rows");
        let share = mask.iter().filter(|&&hides| hides).count() as f64 / mask.len() as f64;
        assert!((0.24..0.4).contains(&share), "{share}");
    }

    #[test]
    fn key_lengths_reach_both_ends() {
        let problem = problem(Element::F32);
        let lengths: Vec<i32> =
            (0..100).flat_map(|seed| Inputs::random(&problem, seed).operands.key_lengths.unwrap()).collect();
        assert!(lengths.iter().all(|length| (0..=57).contains(length)));
        assert!(
            lengths.contains(&0) && lengths.contains(&57) && lengths.iter().any(|length| (20..40).contains(length))
        );
    }
}
