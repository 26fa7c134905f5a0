//! A user's [`ScoreFunction`] as a value: what problems hold, kernels are compiled with, and the host calls.
//!
//! A kernel is compiled for one function, which it gets as a compile-time argument: pointers to the code that CubeCL's macro
//! made of the function. So there is one source of every kernel, with or without a function, and no registry.

use core::any::{TypeId, type_name};
use core::hash::{Hash, Hasher};
use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use cubecl::frontend::NativeExpand;
use cubecl::ir::Scope;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{Position, PositionExpand, ScoreFunction};
use crate::problem::{Problem, ProblemError};

type Expanded = NativeExpand<f32>;

/// The code of a [`ScoreFunction`]. Two are equal when they are of the same type.
#[derive(Clone, Copy)]
pub struct ScoreCode {
    id: TypeId,
    name: &'static str,
    parameter: fn(Position) -> u32,
    values: fn(&mut [f32], Row, &[f32]),
    derivatives: fn(&mut [f32], Derivatives<'_>, Row, &[f32]),
    pub(crate) expand_parameter: fn(&Scope, PositionExpand) -> NativeExpand<u32>,
    pub(crate) expand_value: fn(&Scope, Expanded, PositionExpand, Expanded) -> Expanded,
    pub(crate) expand_derivative: fn(&Scope, Expanded, PositionExpand, Expanded) -> Expanded,
    pub(crate) expand_parameter_derivative: fn(&Scope, Expanded, PositionExpand, Expanded) -> Expanded,
}

/// Neighbouring scores: where the first stands, and which way the others follow.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The first.
    pub first: Position,
    /// Which of its coordinates grows by one.
    pub along: Along,
}

/// A direction in a matrix of scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Along {
    /// One query, key after key.
    Keys,
    /// One key, query after query.
    Queries,
}

/// Where derivatives at a row of scores are put.
#[derive(Debug)]
pub struct Derivatives<'x> {
    /// For the score.
    pub score: &'x mut [f32],
    /// For the parameter that it reads.
    pub parameter: &'x mut [f32],
}

impl Row {
    /// Where the score of index `n` stands.
    pub fn at(&self, n: usize) -> Position {
        let Position { a, j, .. } = self.first;
        match self.along {
            Along::Keys => Position { j: j + n as i32, ..self.first },
            Along::Queries => Position { a: a + n as i32, ..self.first },
        }
    }
}

impl ScoreCode {
    /// The code of a function.
    pub fn of<F: ScoreFunction>() -> Self {
        ScoreCode {
            id: TypeId::of::<F>(),
            name: type_name::<F>(),
            parameter: F::parameter,
            values: values::<F>,
            derivatives: derivatives::<F>,
            expand_parameter: F::__expand_parameter,
            expand_value: F::__expand_value,
            expand_derivative: F::__expand_derivative,
            expand_parameter_derivative: F::__expand_parameter_derivative,
        }
    }

    /// The function's type, without its path.
    pub fn name(&self) -> &'static str {
        let path = self.name.split('<').next().unwrap_or(self.name);
        &self.name[path.rfind("::").map_or(0, |at| at + 2)..]
    }

    /// Which parameter the score reads.
    pub fn parameter(&self, at: Position) -> u32 {
        (self.parameter)(at)
    }

    /// Scores become the function's values. A parameter that does not exist is NaN, as in kernels.
    pub fn values(&self, s: &mut [f32], row: Row, parameters: &[f32]) {
        (self.values)(s, row, parameters);
    }

    /// As [`values`](Self::values), and the derivatives at the scores.
    pub fn derivatives(&self, s: &mut [f32], to: Derivatives<'_>, row: Row, parameters: &[f32]) {
        (self.derivatives)(s, to, row, parameters);
    }
}

fn values<F: ScoreFunction>(s: &mut [f32], row: Row, parameters: &[f32]) {
    for (n, s) in s.iter_mut().enumerate() {
        let at = row.at(n);
        *s = F::value(*s, at, read(parameters, F::parameter(at)));
    }
}

fn derivatives<F: ScoreFunction>(s: &mut [f32], to: Derivatives<'_>, row: Row, parameters: &[f32]) {
    for (n, ((s, for_score), for_parameter)) in s.iter_mut().zip(to.score).zip(to.parameter).enumerate() {
        let at = row.at(n);
        let parameter = read(parameters, F::parameter(at));
        *for_score = F::derivative(*s, at, parameter);
        *for_parameter = F::parameter_derivative(*s, at, parameter);
        *s = F::value(*s, at, parameter);
    }
}

fn read(parameters: &[f32], index: u32) -> f32 {
    parameters.get(index as usize).copied().unwrap_or(f32::NAN)
}

impl PartialEq for ScoreCode {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for ScoreCode {}

impl Hash for ScoreCode {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.id.hash(state);
    }
}

impl core::fmt::Debug for ScoreCode {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.name)
    }
}

/// A function with the number of its parameters, as a [`Problem`] has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreUse {
    /// The function.
    pub code: ScoreCode,
    /// Parameters that there are.
    pub parameters: usize,
}

/// What has been checked already: a function, its parameters, and what positions depend on.
type Checked = (TypeId, usize, [usize; 4], crate::mask::Band);

static CHECKED: Mutex<Option<HashSet<Checked>>> = Mutex::new(None);

/// Checks that are remembered; a decoder makes a new one each step.
const REMEMBERED: usize = 4096;

impl ScoreUse {
    /// Whether every score reads a parameter that exists: at the rim of the scores, of every head, in the first and in the
    /// last batch element. The rim holds every query, every key and every distance between them, so a function of one of these
    /// is checked whole, in time of `Hq · (Sq + Skv)`. What position hides is left out. Once for each shape.
    pub fn check_parameters(&self, problem: &Problem) -> Result<(), ProblemError> {
        let key = (self.code.id, self.parameters, problem.score_shape(), problem.band);
        if CHECKED.lock().unwrap_or_else(PoisonError::into_inner).as_ref().is_some_and(|known| known.contains(&key)) {
            return Ok(());
        }
        self.check_rim(problem)?;
        let mut known = CHECKED.lock().unwrap_or_else(PoisonError::into_inner);
        let known = known.get_or_insert_default();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(key);
        Ok(())
    }

    fn check_rim(&self, problem: &Problem) -> Result<(), ProblemError> {
        let Problem { batch, heads_q, seq_q, seq_kv, .. } = *problem;
        if batch * heads_q * seq_q * seq_kv == 0 {
            return Ok(());
        }
        let (i1, j1) = (seq_q - 1, seq_kv - 1);
        let rows = [0, i1].into_iter().flat_map(|i| (0..seq_kv).map(move |j| (i, j)));
        let columns = [0, j1].into_iter().flat_map(|j| (0..seq_q).map(move |i| (i, j)));
        for (i, j) in rows.chain(columns) {
            let a = i as i32 + problem.alignment();
            if !problem.band.allows(a, j as i32) {
                continue;
            }
            for batch in [0, batch - 1] {
                for head in 0..heads_q {
                    let at = Position { batch: batch as u32, head: head as u32, a, j: j as i32 };
                    let found = self.code.parameter(at);
                    if found as usize >= self.parameters {
                        let (function, parameters) = (self.code.name(), self.parameters);
                        return Err(ProblemError::ScoreParameter { function, parameters, found, head, i, j });
                    }
                }
            }
        }
        Ok(())
    }
}

/// Code is no data.
const NO_DATA: &str =
    "expected a problem without a user's score function: its code cannot be written or read, got one that has one";

impl Serialize for ScoreUse {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(serde::ser::Error::custom(NO_DATA))
    }
}

impl<'de> Deserialize<'de> for ScoreUse {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(serde::de::Error::custom(NO_DATA))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::Band;
    use crate::problem::Element;
    use crate::score::{Alibi, Softcap};

    fn problem(batch: usize, seq_q: usize, seq_kv: usize) -> Problem {
        let (q, k) = ([batch, 3, seq_q, 8], [batch, 3, seq_kv, 8]);
        Problem::new(q, k, k, Element::F32).unwrap()
    }

    #[test]
    fn functions_are_told_apart_by_type_and_named_without_their_path() {
        let (softcap, alibi) = (ScoreCode::of::<Softcap>(), ScoreCode::of::<Alibi>());
        assert_eq!((softcap.name(), format!("{alibi:?}")), ("Softcap", "flashover_kernels::score::Alibi".to_string()));
        assert!(softcap == ScoreCode::of::<Softcap>() && softcap != alibi);
    }

    #[test]
    fn rows_follow_keys_or_queries() {
        let code = ScoreCode::of::<Alibi>();
        let first = Position { batch: 0, head: 1, a: 5, j: 3 };
        let slopes = [9.0, 0.5];
        let mut row = [1.0; 4];
        code.values(&mut row, Row { first, along: Along::Keys }, &slopes);
        assert_eq!(row, [0.0, 0.5, 1.0, 0.5]);
        let mut row = [1.0; 3];
        code.values(&mut row, Row { first, along: Along::Queries }, &slopes);
        assert_eq!(row, [0.0, -0.5, -1.0]);
        let (mut row, mut for_score, mut for_parameter) = ([1.0; 2], [0.0; 2], [0.0; 2]);
        let to = Derivatives { score: &mut for_score, parameter: &mut for_parameter };
        code.derivatives(&mut row, to, Row { first, along: Along::Keys }, &slopes);
        assert_eq!((row, for_score, for_parameter), ([0.0, 0.5], [1.0; 2], [-2.0, -1.0]));
        // A parameter that does not exist.
        code.values(&mut row, Row { first, along: Along::Keys }, &slopes[..1]);
        assert!(row.iter().all(|x| x.is_nan()));
    }

    #[test]
    fn a_parameter_that_does_not_exist_is_found_where_it_is_visible() {
        // A slope a head.
        let of = |parameters| ScoreUse { code: ScoreCode::of::<Alibi>(), parameters };
        of(3).check_parameters(&problem(2, 5, 7)).unwrap();
        let error = of(2).check_parameters(&problem(2, 5, 7)).unwrap_err();
        let message =
            "score function Alibi: expected an index below its 2 parameters, got 2 for query 0 and key 0 of head 2";
        assert_eq!(error.to_string(), message);
        // Nothing is visible, or there is nothing.
        let behind = Band { causal: true, left: 0, right: 0, sinks: 0 };
        of(2).check_parameters(&Problem { band: behind, ..problem(1, 2, 0) }).unwrap();
        of(2).check_parameters(&problem(0, 5, 7)).unwrap();
        // And once more, from memory.
        of(3).check_parameters(&problem(2, 5, 7)).unwrap();
        assert!(of(2).check_parameters(&problem(2, 5, 7)).is_err());
    }

    #[test]
    fn a_number_of_parameters_that_makes_no_sense_is_refused() {
        for parameters in [0, 1 << 31] {
            let score = Some(ScoreUse { code: ScoreCode::of::<Alibi>(), parameters });
            let error = Problem { score, ..problem(1, 2, 3) }.validate().unwrap_err();
            let message = format!("score function Alibi: expected 1 to 2147483647 parameters, got {parameters}");
            assert_eq!(error.to_string(), message);
        }
    }

    #[test]
    fn code_is_not_written_down() {
        let plain = problem(1, 2, 3);
        let text = serde_json::to_string(&plain).unwrap();
        assert_eq!(serde_json::from_str::<Problem>(&text).unwrap(), plain);
        let score = Some(ScoreUse { code: ScoreCode::of::<Alibi>(), parameters: 3 });
        assert!(
            serde_json::to_string(&Problem { score, ..plain })
                .unwrap_err()
                .to_string()
                .starts_with("expected a problem")
        );
        let text = text.replace("\"score\":null", "\"score\":3");
        assert!(serde_json::from_str::<Problem>(&text).is_err());
    }
}
