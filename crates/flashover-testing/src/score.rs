//! Score functions of a user's, each twice: as kernels and host call it, and in f64 for the oracle, written from its definition.

use flashover_kernels::cubecl;
use flashover_kernels::cubecl::prelude::*;
use flashover_kernels::problem::Problem;
use flashover_kernels::score::{Position, ScoreCode, ScoreFunction, ScoreUse};

/// T5's relative position buckets (Raffel et al., arXiv 1910.10683, section 2.1), 32 of them in both directions, up to a
/// distance of 128: a number of a table `[Hq, 32]` is added to each score.
pub struct Buckets;

#[cube]
impl ScoreFunction for Buckets {
    fn parameter(at: Position) -> u32 {
        at.head * 32u32 + bucket(at.j - at.a)
    }

    fn value(s: f32, _at: Position, parameter: f32) -> f32 {
        s + parameter
    }

    fn derivative(_s: f32, _at: Position, _parameter: f32) -> f32 {
        1.0f32
    }

    fn parameter_derivative(_s: f32, _at: Position, _parameter: f32) -> f32 {
        1.0f32
    }
}

/// Exact up to a distance of 7, then two buckets an octave.
#[cube]
fn bucket(relative: i32) -> u32 {
    let mut bucket = 0u32;
    let mut distance = 0u32;
    if relative > 0 {
        bucket += 16;
        distance += relative as u32;
    } else {
        distance += (-relative) as u32;
    }
    bucket += min(distance, 8u32);
    if distance >= 12 {
        bucket += 1;
    }
    if distance >= 16 {
        bucket += 1;
    }
    if distance >= 23 {
        bucket += 1;
    }
    if distance >= 32 {
        bucket += 1;
    }
    if distance >= 46 {
        bucket += 1;
    }
    if distance >= 64 {
        bucket += 1;
    }
    if distance >= 91 {
        bucket += 1;
    }
    bucket
}

/// Linear in nothing, with one of 11 parameters that depends on all of a score's place:
/// `s + p · tanh(s / 2) + p² / 4`.
pub struct Waves;

#[cube]
impl ScoreFunction for Waves {
    fn parameter(at: Position) -> u32 {
        let distance = (max(at.a, at.j) - min(at.a, at.j)) as u32;
        (at.batch * 5u32 + at.head * 3u32 + distance / 7u32 + at.j as u32 / 16u32) % 11u32
    }

    fn value(s: f32, _at: Position, parameter: f32) -> f32 {
        s + parameter * (s * 0.5f32).tanh() + parameter * parameter * 0.25f32
    }

    fn derivative(s: f32, _at: Position, parameter: f32) -> f32 {
        let t = (s * 0.5f32).tanh();
        1.0f32 + parameter * 0.5f32 * (1.0f32 - t * t)
    }

    fn parameter_derivative(s: f32, _at: Position, parameter: f32) -> f32 {
        (s * 0.5f32).tanh() + parameter * 0.5f32
    }
}

/// The problem with [`Buckets`].
pub fn with_buckets(problem: Problem) -> Problem {
    let score = ScoreUse { code: ScoreCode::of::<Buckets>(), parameters: 32 * problem.heads_q };
    Problem { score: Some(score), ..problem }
}

/// The problem with [`Waves`].
pub fn with_waves(problem: Problem) -> Problem {
    Problem { score: Some(ScoreUse { code: ScoreCode::of::<Waves>(), parameters: 11 }), ..problem }
}

/// One score of a function of this module in f64.
pub(crate) struct Applied {
    pub(crate) value: f64,
    pub(crate) derivative: f64,
    pub(crate) parameter_derivative: f64,
}

/// Which parameter the score at `(b, h, a, j)` reads.
pub(crate) fn parameter(code: ScoreCode, [b, h]: [usize; 2], a: i64, j: i64) -> usize {
    let distance = (a - j).unsigned_abs() as usize;
    if code == ScoreCode::of::<Buckets>() {
        return h * 32 + reference_bucket(j - a, 32, 128.0);
    }
    assert_eq!(code, ScoreCode::of::<Waves>(), "a function that the oracle knows");
    (5 * b + 3 * h + distance / 7 + j as usize / 16) % 11
}

pub(crate) fn apply(code: ScoreCode, s: f64, p: f64) -> Applied {
    if code == ScoreCode::of::<Buckets>() {
        return Applied { value: s + p, derivative: 1.0, parameter_derivative: 1.0 };
    }
    let t = (s / 2.0).tanh();
    Applied {
        value: s + p * t + p * p / 4.0,
        derivative: 1.0 + p * (1.0 - t * t) / 2.0,
        parameter_derivative: t + p / 2.0,
    }
}

/// `_relative_position_bucket` of the paper's public code, bidirectional.
fn reference_bucket(relative_position: i64, num_buckets: usize, max_distance: f64) -> usize {
    let num_buckets = num_buckets / 2;
    let mut ret = 0;
    let mut n = -relative_position;
    if n < 0 {
        ret += num_buckets;
        n = -n;
    }
    let max_exact = num_buckets / 2;
    if (n as usize) < max_exact {
        return ret + n as usize;
    }
    let octaves = (n as f64 / max_exact as f64).ln() / (max_distance / max_exact as f64).ln();
    // Logarithms of powers of two must not fall short of whole numbers.
    let large = max_exact + (octaves * (num_buckets - max_exact) as f64 + 1e-9) as usize;
    ret + large.min(num_buckets - 1)
}

#[cfg(test)]
mod tests {
    use flashover_kernels::score::{Along, Derivatives, Row};

    use super::*;

    #[test]
    fn both_ways_to_write_a_function_agree() {
        for code in [ScoreCode::of::<Buckets>(), ScoreCode::of::<Waves>()] {
            for a in -40..400 {
                for j in 0..400 {
                    let at = Position { batch: 1, head: 2, a, j };
                    assert_eq!(code.parameter(at) as usize, parameter(code, [1, 2], a.into(), j.into()), "{at:?}");
                }
            }
            for s in [-9.0, -0.3, 0.0, 1.7] {
                let row = Row { first: Position { batch: 0, head: 0, a: 3, j: 5 }, along: Along::Keys };
                let (mut value, mut derivative, mut own) = ([s], [0.0], [0.0]);
                let to = Derivatives { score: &mut derivative, parameter: &mut own };
                code.derivatives(&mut value, to, row, &[0.6; 32]);
                let x = apply(code, s.into(), f64::from(0.6f32));
                for (found, expected) in [(value, x.value), (derivative, x.derivative), (own, x.parameter_derivative)] {
                    assert!((f64::from(found[0]) - expected).abs() < 1e-6, "{code:?} at {s}: {found:?}, {expected}");
                }
            }
        }
    }
}
