//! Factors between the model's terms and measured times, by non-negative least squares.
//!
//! A free fit of such terms to the paper's points wants a negative factor, which would make more work faster; so factors
//! are constrained, and a fit is worth what it says about points that it has not seen.

use serde::{Deserialize, Serialize};

use crate::error::ShardError;

/// Factors of the terms of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// Of the seconds of compute at peak.
    pub compute: f64,
    /// Of the seconds that reading memory takes beyond that.
    pub memory: f64,
    /// Of the seconds of communication.
    pub communication: f64,
    /// Seconds of each block.
    pub per_layer: f64,
}

/// A measured pass: the model's terms and the seconds that it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// What it is, for reports.
    pub name: String,
    /// From [`Sheet::terms`](crate::cost::Sheet::terms).
    pub terms: [f64; Calibration::TERMS],
    /// Measured seconds.
    pub seconds: f64,
}

impl Calibration {
    /// Number of terms.
    pub const TERMS: usize = 4;

    /// Fits the factors that minimize the sum of squared relative errors, none of them negative. With four factors every
    /// set of those that are not zero is solved for, and the best sound solution is the optimum.
    ///
    /// # Errors
    ///
    /// Without points, or with a time or a term that is not finite or a time that is not positive.
    pub fn fit(points: &[Point]) -> Result<Self, ShardError> {
        if points.is_empty() {
            return Err(ShardError::field("points", "at least one measured point", 0));
        }
        for point in points {
            if !(point.seconds > 0.0 && point.seconds.is_finite() && point.terms.iter().all(|t| t.is_finite())) {
                let expected = "positive finite seconds and finite terms";
                return Err(ShardError::field(point.name.clone(), expected, format!("{point:?}")));
            }
        }
        // Rows scaled by the measured time make every error relative.
        let rows: Vec<[f64; 4]> = points.iter().map(|p| p.terms.map(|term| term / p.seconds)).collect();
        let error = |factors: &[f64; 4]| -> f64 {
            let residual = |row: &[f64; 4]| row.iter().zip(factors).map(|(r, f)| r * f).sum::<f64>() - 1.0;
            rows.iter().map(|row| residual(row).powi(2)).sum()
        };
        let sets = (0..1_u32 << 4).filter_map(|set| solve(&rows, set)).filter(|f| f.iter().all(|&f| f >= 0.0));
        let best = sets.min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or([0.0; 4]);
        let [compute, memory, communication, per_layer] = best;
        Ok(Calibration { compute, memory, communication, per_layer })
    }

    /// Seconds of a pass with these terms.
    pub fn seconds(&self, terms: [f64; Self::TERMS]) -> f64 {
        let factors = [self.compute, self.memory, self.communication, self.per_layer];
        terms.iter().zip(factors).map(|(term, factor)| term * factor).sum()
    }

    /// For each point, the seconds that a fit to all the others gives it.
    ///
    /// # Errors
    ///
    /// As [`fit`](Self::fit).
    pub fn held_out(points: &[Point]) -> Result<Vec<f64>, ShardError> {
        let without = |i: usize| {
            let others: Vec<_> = points.iter().enumerate().filter(|&(j, _)| j != i).map(|(_, p)| p.clone()).collect();
            Ok(Calibration::fit(&others)?.seconds(points[i].terms))
        };
        (0..points.len()).map(without).collect()
    }
}

/// Least squares of `rows · factors = 1` over the factors of a set, the others zero; `None` if it is singular.
fn solve(rows: &[[f64; 4]], set: u32) -> Option<[f64; 4]> {
    let used: Vec<usize> = (0..4).filter(|i| set >> i & 1 == 1).collect();
    let n = used.len();
    // Normal equations, columns scaled to unit length against the spread of magnitudes.
    let scale: Vec<f64> = used.iter().map(|&i| rows.iter().map(|row| row[i] * row[i]).sum::<f64>().sqrt()).collect();
    if scale.contains(&0.0) {
        return None;
    }
    let column = |row: &[f64; 4], i: usize| row[used[i]] / scale[i];
    let mut a: Vec<Vec<f64>> = (0..n)
        .map(|i| {
            let products = (0..n).map(|j| rows.iter().map(|row| column(row, i) * column(row, j)).sum());
            products.chain([rows.iter().map(|row| column(row, i)).sum()]).collect()
        })
        .collect();
    for pivot in 0..n {
        let largest = (pivot..n).max_by(|&i, &j| a[i][pivot].abs().total_cmp(&a[j][pivot].abs()))?;
        a.swap(pivot, largest);
        if a[pivot][pivot].abs() < 1e-10 {
            return None;
        }
        let row = a[pivot].clone();
        for other in a.iter_mut().enumerate().filter(|(i, _)| *i != pivot).map(|(_, other)| other) {
            let factor = other[pivot] / row[pivot];
            other.iter_mut().zip(&row).for_each(|(x, r)| *x -= factor * r);
        }
    }
    let mut factors = [0.0; 4];
    for i in 0..n {
        factors[used[i]] = a[i][n] / a[i][i] / scale[i];
    }
    Some(factors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn point(terms: [f64; 4], seconds: f64) -> Point {
        Point { name: "p".into(), terms, seconds }
    }

    fn terms() -> [[f64; 4]; 6] {
        [
            [1.0, 0.0, 0.3, 2.0],
            [2.0, 0.5, 0.1, 2.0],
            [0.1, 4.0, 0.2, 2.0],
            [0.0, 1.0, 3.0, 2.0],
            [5.0, 0.0, 1.0, 2.0],
            [0.3, 0.7, 0.9, 2.0],
        ]
    }

    #[test]
    fn factors_that_made_the_points_are_found_again() {
        let made = Calibration { compute: 1.3, memory: 1.6, communication: 2.0, per_layer: 0.01 };
        let points = terms().map(|t| point(t, made.seconds(t)));
        let found = Calibration::fit(&points).unwrap();
        for t in terms() {
            assert!((found.seconds(t) - made.seconds(t)).abs() < 1e-9);
        }
        for (p, held_out) in points.iter().zip(Calibration::held_out(&points).unwrap()) {
            assert!((held_out - p.seconds).abs() < 1e-9 * p.seconds);
        }
    }

    #[test]
    fn a_factor_that_wants_to_be_negative_is_zero() {
        let made = Calibration { compute: -0.2, memory: 1.6, communication: 2.0, per_layer: 0.9 };
        let points = terms().map(|t| point(t, made.seconds(t)));
        let found = Calibration::fit(&points).unwrap();
        assert_eq!(found.compute, 0.0);
        assert!(found.memory > 0.0 && found.communication > 0.0 && found.per_layer >= 0.0);
    }

    #[test]
    fn points_must_be_sound() {
        assert!(Calibration::fit(&[]).is_err());
        assert!(Calibration::fit(&[point([1.0; 4], 0.0)]).is_err());
        assert!(Calibration::fit(&[point([f64::NAN; 4], 1.0)]).is_err());
    }
}
