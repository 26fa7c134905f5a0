//! How far a result may be from the oracle: per tensor, in max-abs, `2 × max|naive − oracle| + 1e-5`.
//!
//! The naive reference of the same element type says what that type allows; a fused kernel, which rounds less often,
//! gets twice that.
//!
//! The naive error of a tensor of a few elements (a bias of shape `[1, 1, 1, 1]`, a slope a head), or of few that are not 0,
//! is a matter of luck: it is one or a few samples of a random sum, and often near 0. It is taken over as many draws of
//! the inputs as give [`SAMPLE`] elements.

use std::cell::RefCell;

use flashover_kernels::operands::Gradients;
use flashover_kernels::problem::Problem;

use crate::data::Inputs;
use crate::{naive, oracle};

/// What the naive reference cannot explain: sums in another order, fast exponentials.
pub const FLOOR: f64 = 1e-5;

/// Elements, other than 0, over which a naive error is taken at least.
pub const SAMPLE: usize = 16;

/// A tensor that passed.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The tensor.
    pub name: String,
    /// Largest error, over elements where the oracle is finite.
    pub error: f64,
    /// Where it stands.
    pub index: usize,
    /// Largest error that was allowed.
    pub budget: f64,
}

/// The error budget of a tensor. Elements where either reference is not finite say nothing about precision.
pub fn budget(expected: &[f64], naive: &[f64]) -> f64 {
    2.0 * naive_error(expected, naive) + FLOOR
}

fn naive_error(expected: &[f64], naive: &[f64]) -> f64 {
    assert_eq!(expected.len(), naive.len(), "elements of the two references");
    let errors = expected.iter().zip(naive).map(|(e, n)| (n - e).abs()).filter(|error| error.is_finite());
    errors.fold(0.0, f64::max)
}

/// What the results of a problem are held against. It takes far longer than attention itself, so it is computed once for
/// all backends.
pub struct References<'a> {
    problem: &'a Problem,
    inputs: &'a Inputs,
    o: Reference,
    lse: Reference,
    /// In the order of [`GRADIENTS`]; `None` where the problem has no such operand.
    gradients: [Option<Reference>; 7],
    /// The naive errors of other draws of the inputs, as far as they were needed.
    drawn: RefCell<Vec<[f64; 7]>>,
}

/// The oracle's tensor and how far another may be from it.
struct Reference {
    expected: Vec<f64>,
    budget: f64,
}

/// Names of the gradients, in the order in which they are kept here.
const GRADIENTS: [&str; 7] = ["dq", "dk", "dv", "dbias", "dalibi_slopes", "dlearned_sinks", "dscore_parameters"];

impl<'a> References<'a> {
    /// Runs the oracle and the naive reference.
    pub fn of(problem: &'a Problem, inputs: &'a Inputs) -> Self {
        let ((o, lse), naive) = (oracle::forward(problem, inputs), naive::forward(problem, inputs));
        let gradients = ordered(oracle::backward(problem, inputs));
        let mut naive_gradients = ordered(naive::backward(problem, inputs)).into_iter();
        References {
            problem,
            inputs,
            o: Reference::of(o, &naive.0),
            lse: Reference::of(lse, &naive.1),
            gradients: gradients.map(|expected| {
                let naive = naive_gradients.next().expect("as many gradients");
                expected.zip(naive).map(|(expected, naive)| Reference::of(expected, &naive))
            }),
            drawn: RefCell::default(),
        }
    }

    /// Holds both outputs of a forward against the oracle; the error lists every tensor that failed.
    pub fn check_forward(&self, o: &[f64], lse: &[f64]) -> Result<Vec<Report>, String> {
        collect([self.o.check("o", o), self.lse.check("lse", lse)])
    }

    /// Holds every gradient that is given against the oracle, each apart; one of an operand that the problem lacks is an
    /// error. Gradients that were not [`Wanted`](flashover_kernels::operands::Wanted) are left `None`.
    pub fn check_gradients(&self, actual: Gradients<Vec<f64>>) -> Result<Vec<Report>, String> {
        let checks = self.gradients.iter().zip(ordered(actual)).enumerate();
        collect(checks.filter_map(|(n, (reference, actual))| {
            let (name, actual) = (GRADIENTS[n], actual?);
            Some(match reference {
                Some(reference) => self.check_gradient(n, reference, &actual),
                None => Err(format!("{name}: expected none, the problem has no such operand, found {}", actual.len())),
            })
        }))
    }

    /// A tensor of few elements other than 0 is over its budget only if it is with as many draws as give [`SAMPLE`]: they are
    /// drawn when one is needed, since each costs as much as the first.
    fn check_gradient(&self, n: usize, reference: &Reference, actual: &[f64]) -> Result<Report, String> {
        let name = GRADIENTS[n];
        let mut checked = reference.check(name, actual);
        let mut budget = reference.budget;
        let elements = reference.expected.iter().filter(|&&x| x != 0.0).count();
        let draws = SAMPLE.div_ceil(elements.max(1));
        for draw in 1..draws {
            if checked.is_ok() {
                break;
            }
            budget = budget.max(2.0 * self.drawn_error(draw, n) + FLOOR);
            checked = Reference { expected: reference.expected.clone(), budget }.check(name, actual);
        }
        checked
    }

    /// Naive error of gradient `n` in a draw of the inputs, from 1 on.
    fn drawn_error(&self, draw: usize, n: usize) -> f64 {
        let mut drawn = self.drawn.borrow_mut();
        while drawn.len() < draw {
            let inputs = self.inputs.redrawn(self.problem, drawn.len() as u64 + 1);
            let expected = ordered(oracle::backward(self.problem, &inputs));
            drawn.push(naive_errors(&expected, &ordered(naive::backward(self.problem, &inputs))));
        }
        drawn[draw - 1][n]
    }
}

impl Reference {
    fn of(expected: Vec<f64>, naive: &[f64]) -> Self {
        Reference { budget: budget(&expected, naive), expected }
    }

    /// Holds `actual` against `expected`: within the budget where that is finite, the same infinity where it is infinite,
    /// NaN where it is NaN. The error names the worst element of the kind that failed first.
    fn check(&self, name: &str, actual: &[f64]) -> Result<Report, String> {
        let Reference { expected, budget } = self;
        let budget = *budget;
        if actual.len() != expected.len() {
            return Err(format!("{name}: expected {} elements, found {}", expected.len(), actual.len()));
        }
        let mut worst = Report { name: name.to_string(), error: 0.0, index: 0, budget };
        for (index, (&e, &a)) in expected.iter().zip(actual).enumerate() {
            let error = (a - e).abs();
            let wrong_kind = if e.is_finite() { !a.is_finite() } else { !(a == e || a.is_nan() && e.is_nan()) };
            if wrong_kind {
                return Err(format!("{name}[{index}]: expected {e}, found {a}, budget {budget:.3e}"));
            }
            if e.is_finite() && error > worst.error {
                worst = Report { error, index, ..worst };
            }
        }
        if worst.error > budget {
            let (index, error) = (worst.index, worst.error);
            let over = expected.iter().zip(actual).filter(|(e, a)| (*a - *e).abs() > budget).count();
            return Err(format!(
                "{name}[{index}]: expected {}, found {}, error {error:.3e}, budget {budget:.3e}; {over} of {} are over",
                expected[index],
                actual[index],
                expected.len(),
            ));
        }
        Ok(worst)
    }
}

fn ordered(gradients: Gradients<Vec<f64>>) -> [Option<Vec<f64>>; 7] {
    let Gradients { q, k, v, bias, alibi_slopes, learned_sinks, score_parameters } = gradients;
    [q, k, v, bias, alibi_slopes, learned_sinks, score_parameters]
}

/// Errors of the naive gradients; 0 for one that is not there.
fn naive_errors(expected: &[Option<Vec<f64>>; 7], naive: &[Option<Vec<f64>>; 7]) -> [f64; 7] {
    std::array::from_fn(|n| match (&expected[n], &naive[n]) {
        (Some(expected), Some(naive)) => naive_error(expected, naive),
        _ => 0.0,
    })
}

fn collect(checks: impl IntoIterator<Item = Result<Report, String>>) -> Result<Vec<Report>, String> {
    let (passed, failed): (Vec<_>, Vec<_>) = checks.into_iter().partition(Result::is_ok);
    if failed.is_empty() {
        Ok(passed.into_iter().flatten().collect())
    } else {
        Err(failed.into_iter().filter_map(Result::err).collect::<Vec<_>>().join("\n"))
    }
}

#[cfg(test)]
mod tests {
    use flashover_kernels::problem::Element;

    use super::*;
    use crate::small;

    fn check(name: &str, expected: &[f64], naive: &[f64], actual: &[f64]) -> Result<Report, String> {
        Reference::of(expected.to_vec(), naive).check(name, actual)
    }

    const NAN: f64 = f64::NAN;
    const LOWEST: f64 = f64::NEG_INFINITY;

    #[test]
    fn the_budget_is_twice_the_naive_error_and_the_floor() {
        assert_eq!(budget(&[1.0, 2.0, LOWEST], &[1.5, 2.25, LOWEST]), 1.0 + FLOOR);
        assert_eq!(budget(&[1.0, NAN, 3.0], &[1.0, 2.0, f64::INFINITY]), FLOOR);
        let report = check("o", &[1.0, 2.0], &[1.5, 2.0], &[1.25, 1.0]).unwrap();
        assert_eq!(report, Report { name: "o".into(), error: 1.0, index: 1, budget: 1.0 + FLOOR });
    }

    #[test]
    fn a_failure_says_tensor_index_expected_found_and_budget() {
        let message = check("dk", &[1.0, 2.0], &[1.0, 2.0], &[1.0, 2.5]).unwrap_err();
        assert_eq!(message, "dk[1]: expected 2, found 2.5, error 5.000e-1, budget 1.000e-5; 1 of 2 are over");
        assert_eq!(check("o", &[1.0], &[1.0], &[]).unwrap_err(), "o: expected 1 elements, found 0");
    }

    #[test]
    fn what_is_not_finite_must_agree() {
        let pass = |expected: f64, actual: f64| check("lse", &[expected], &[expected], &[actual]).is_ok();
        assert!(pass(LOWEST, LOWEST) && pass(NAN, NAN) && pass(f64::INFINITY, f64::INFINITY));
        for (expected, actual) in [
            (0.0, NAN),
            (0.0, LOWEST),
            (NAN, 0.0),
            (NAN, LOWEST),
            (LOWEST, NAN),
            (LOWEST, -1e30),
            (LOWEST, f64::INFINITY),
        ] {
            assert!(!pass(expected, actual), "expected {expected}, found {actual}");
        }
    }

    #[test]
    fn the_naive_reference_passes_and_each_spoilt_tensor_fails() {
        let (_, problem) =
            small::problems(Element::F32).into_iter().find(|(_, p)| p.alibi && p.bias.is_some()).unwrap();
        let problem = Problem { learned_sinks: true, ..problem };
        let inputs = Inputs::random(&problem, 0);
        let (o, lse) = naive::forward(&problem, &inputs);
        let references = References::of(&problem, &inputs);
        assert_eq!(references.check_forward(&o, &lse).unwrap().len(), 2);
        let g = naive::backward(&problem, &inputs);
        assert_eq!(references.check_gradients(g.clone()).unwrap().len(), 6);

        let spoil = |tensor: &[f64]| tensor.iter().map(|x| x + 1e-2).collect::<Vec<_>>();
        let message = references.check_forward(&spoil(&o), &spoil(&lse)).unwrap_err();
        assert!(message.starts_with("o[") && message.contains("\nlse["), "{message}");
        for (name, spoilt) in [
            ("dq[", Gradients { q: g.q.as_deref().map(spoil), ..g.clone() }),
            ("dk[", Gradients { k: g.k.as_deref().map(spoil), ..g.clone() }),
            ("dv[", Gradients { v: g.v.as_deref().map(spoil), ..g.clone() }),
            ("dbias[", Gradients { bias: g.bias.as_deref().map(spoil), ..g.clone() }),
            ("dalibi_slopes[", Gradients { alibi_slopes: g.alibi_slopes.as_deref().map(spoil), ..g.clone() }),
            ("dlearned_sinks[", Gradients { learned_sinks: g.learned_sinks.as_deref().map(spoil), ..g.clone() }),
        ] {
            let message = references.check_gradients(spoilt).unwrap_err();
            assert!(message.starts_with(name) && !message.contains('\n'), "{message}");
        }
        let bare = Problem { learned_sinks: false, ..problem };
        let sinks = Gradients { learned_sinks: g.learned_sinks, ..Gradients::default() };
        let inputs = Inputs::random(&bare, 0);
        let message = References::of(&bare, &inputs).check_gradients(sinks);
        assert_eq!(message.unwrap_err(), "dlearned_sinks: expected none, the problem has no such operand, found 4");
    }
}
