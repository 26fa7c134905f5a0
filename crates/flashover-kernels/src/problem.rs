//! What is to be computed: shapes, element type, scale, grouping of heads and options, without any tensor data.
//!
//! [`Problem::validate`] is the only place that decides whether a problem is sound. Every kernel family takes a
//! validated problem and checks only its own limits.

use serde::{Deserialize, Serialize};

use crate::block_plan::PlanShape;
use crate::dropout::Dropout;
use crate::mask::Band;
use crate::score::ScoreUse;

/// Largest head dimension, of queries and keys and of values, that any kernel family accepts.
pub const MAX_HEAD_DIM: usize = 256;

/// Element type of `q`, `k`, `v`, `o` and their gradients. Statistics (`lse`, `delta`) are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Element {
    /// IEEE double precision; the native CPU path only.
    F64,
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
}

impl Element {
    /// Size in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Element::F64 => 8,
            Element::F32 => 4,
            Element::F16 | Element::BF16 => 2,
        }
    }

    /// The name used in messages and case names.
    pub const fn name(self) -> &'static str {
        match self {
            Element::F64 => "f64",
            Element::F32 => "f32",
            Element::F16 => "f16",
            Element::BF16 => "bf16",
        }
    }
}

/// How elements of f32 are multiplied. Sums, the softmax and the statistics are f32 whatever it is, and elements of other types
/// are multiplied exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Precision {
    /// As f32. Tensor cores cannot.
    #[default]
    Exact,
    /// May be three products of tf32 on tensor cores, `big · big + big · small + small · big` of `x = big + small`, `big` being `x`
    /// rounded to the 11 bits of tf32: off by about 2⁻²² of a product, where f32 is by 2⁻²⁴. Magnitudes above 3.4·10³⁸ overflow. What
    /// multiplies f32 exactly anyhow goes on doing so. (Ootomo and Yokota, arXiv 2203.03341.)
    Tf32x3,
}

/// One attention problem: `softmax(f(q·kᵀ · scale)) · v` with everything that shapes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Problem {
    /// Batch size `B`.
    pub batch: usize,
    /// Query heads `Hq`; a multiple of [`heads_kv`](Self::heads_kv).
    pub heads_q: usize,
    /// Key and value heads `Hkv`. Query head `h` reads head `h / (Hq / Hkv)`.
    pub heads_kv: usize,
    /// Queries `Sq`.
    pub seq_q: usize,
    /// Keys `Skv`.
    pub seq_kv: usize,
    /// Dimension `D` of queries and keys.
    pub head_dim: usize,
    /// Dimension `Dv` of values and output.
    pub value_dim: usize,
    /// Element type of the tensors.
    pub element: Element,
    /// How elements of f32 are multiplied.
    #[serde(default)]
    pub precision: Precision,
    /// Factor of `q·k` before anything else happens to a score.
    pub scale: f64,
    /// `c` of `c · tanh(s / c)`, applied after the scale.
    pub softcap: Option<f64>,
    /// Whether a slope per query head (ALiBi) is given.
    pub alibi: bool,
    /// Shape of the additive bias, each dimension that of `[B, Hq, Sq, Skv]` or 1.
    pub bias: Option<[usize; 4]>,
    /// The user's own score function, applied after all others.
    #[serde(default)]
    pub score: Option<ScoreUse>,
    /// Shape of the dense boolean mask, likewise.
    pub mask: Option<[usize; 4]>,
    /// What is visible by position.
    pub band: Band,
    /// The block plan that hides what it does not list, if there is one.
    #[serde(default)]
    pub plan: Option<PlanShape>,
    /// Whether a number of keys per batch element is given.
    pub key_lengths: bool,
    /// Whether a learned logit per query head stands in the denominator.
    pub learned_sinks: bool,
    /// Dropout of the probabilities.
    pub dropout: Option<Dropout>,
    /// Whether the parts of q's gradient may be added up in any order, and its last bits differ from run to run.
    #[serde(default)]
    pub unordered: bool,
}

impl Problem {
    /// A plain problem: every query sees every key, scale `1/√D`, nothing else.
    pub fn new(q: [usize; 4], k: [usize; 4], v: [usize; 4], element: Element) -> Result<Self, ProblemError> {
        for (what, axis, expected, found) in [
            ("batch of k", 0, q[0], k[0]),
            ("batch of v", 0, q[0], v[0]),
            ("heads of v", 1, k[1], v[1]),
            ("keys of v", 2, k[2], v[2]),
            ("head dimension of k", 3, q[3], k[3]),
        ] {
            if expected != found {
                return Err(ProblemError::Mismatch { what, axis, expected, found });
            }
        }
        let problem = Problem {
            batch: q[0],
            heads_q: q[1],
            heads_kv: k[1],
            seq_q: q[2],
            seq_kv: k[2],
            head_dim: q[3],
            value_dim: v[3],
            element,
            precision: Precision::default(),
            scale: 1.0 / (q[3].max(1) as f64).sqrt(),
            softcap: None,
            alibi: false,
            bias: None,
            score: None,
            mask: None,
            band: Band::default(),
            plan: None,
            key_lengths: false,
            learned_sinks: false,
            dropout: None,
            unordered: false,
        };
        problem.validate()?;
        Ok(problem)
    }

    /// Checks everything that does not depend on a device.
    pub fn validate(&self) -> Result<(), ProblemError> {
        if self.heads_q != 0 && (self.heads_kv == 0 || !self.heads_q.is_multiple_of(self.heads_kv)) {
            return Err(ProblemError::HeadGroups { heads_q: self.heads_q, heads_kv: self.heads_kv });
        }
        for (what, found) in [("head", self.head_dim), ("value", self.value_dim)] {
            if found == 0 || found > MAX_HEAD_DIM {
                return Err(ProblemError::HeadDim { what, found });
            }
        }
        if self.precision != Precision::Exact && self.element != Element::F32 {
            return Err(ProblemError::Precision { precision: self.precision, found: self.element });
        }
        if !self.scale.is_finite() {
            return Err(ProblemError::Scale { found: self.scale });
        }
        if let Some(found) = self.softcap
            && !(found.is_finite() && found > 0.0)
        {
            return Err(ProblemError::Softcap { found });
        }
        for (what, shape) in [("mask", self.mask), ("bias", self.bias)] {
            if let Some(found) = shape
                && found.iter().zip(self.score_shape()).any(|(&f, s)| f != 1 && f != s)
            {
                return Err(ProblemError::Broadcast { what, expected: self.score_shape(), found });
            }
        }
        self.band.validate()?;
        if let Some(ScoreUse { code, parameters }) = self.score
            && (parameters == 0 || parameters > i32::MAX as usize)
        {
            return Err(ProblemError::ScoreParameters { function: code.name(), found: parameters });
        }
        if let Some(dropout) = self.dropout {
            dropout.validate()?;
        }
        for (what, length) in [("queries", self.seq_q), ("keys", self.seq_kv)] {
            if length > i32::MAX as usize / 4 {
                return Err(ProblemError::TooLong { what, found: length });
            }
        }
        Ok(())
    }

    /// `[B, Hq, Sq, Skv]`, the shape that masks and biases broadcast to. Never allocated.
    pub fn score_shape(&self) -> [usize; 4] {
        [self.batch, self.heads_q, self.seq_q, self.seq_kv]
    }

    /// `[B, Hq, Sq, Dv]`.
    pub fn output_shape(&self) -> [usize; 4] {
        [self.batch, self.heads_q, self.seq_q, self.value_dim]
    }

    /// `[B, Hq, Sq]`.
    pub fn lse_shape(&self) -> [usize; 3] {
        [self.batch, self.heads_q, self.seq_q]
    }

    /// Query heads that share one key head.
    pub fn group(&self) -> usize {
        self.heads_q.checked_div(self.heads_kv).unwrap_or(1).max(1)
    }

    /// `Skv − Sq`: what turns a query's index into its position on the key axis (bottom-right alignment).
    pub fn alignment(&self) -> i32 {
        self.seq_kv as i32 - self.seq_q as i32
    }

    /// No query, so nothing to write.
    pub fn is_empty(&self) -> bool {
        self.batch * self.heads_q * self.seq_q == 0
    }
}

/// Why a problem is not sound. Each message gives what was expected and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ProblemError {
    /// Two tensors disagree in a dimension they share.
    #[error("{what} (dimension {axis}): expected {expected}, got {found}")]
    Mismatch {
        /// Which dimension of which tensor.
        what: &'static str,
        /// Its index.
        axis: usize,
        /// The size that the other tensor has.
        expected: usize,
        /// The size that came.
        found: usize,
    },
    /// The query heads do not divide among the key heads.
    #[error("query heads: expected a multiple of the {heads_kv} key heads, got {heads_q}")]
    HeadGroups {
        /// Query heads.
        heads_q: usize,
        /// Key heads.
        heads_kv: usize,
    },
    /// A head dimension is out of range.
    #[error("{what} dimension: expected 1 to {MAX_HEAD_DIM}, got {found}")]
    HeadDim {
        /// `head` or `value`.
        what: &'static str,
        /// The size that came.
        found: usize,
    },
    /// A precision of f32's products, and elements of another type.
    #[error("precision {precision:?}: expected elements of type F32, got {found:?}")]
    Precision {
        /// The precision.
        precision: Precision,
        /// The element type that came.
        found: Element,
    },
    /// The scale is NaN or infinite.
    #[error("scale: expected a finite number, got {found}")]
    Scale {
        /// The scale that came.
        found: f64,
    },
    /// The softcap is not a positive finite number.
    #[error("softcap: expected a positive finite number, got {found}")]
    Softcap {
        /// The softcap that came.
        found: f64,
    },
    /// A user's score function without parameters, or with more than can be counted.
    #[error("score function {function}: expected 1 to {limit} parameters, got {found}", limit = i32::MAX)]
    ScoreParameters {
        /// The function's type.
        function: &'static str,
        /// The number that came.
        found: usize,
    },
    /// A user's score function reads a parameter that does not exist.
    #[error(
        "score function {function}: expected an index below its {parameters} parameters, got {found} for query {i} and key \
         {j} of head {head}"
    )]
    ScoreParameter {
        /// The function's type.
        function: &'static str,
        /// Parameters that exist.
        parameters: usize,
        /// The index that came.
        found: u32,
        /// Query head.
        head: usize,
        /// Query.
        i: usize,
        /// Key.
        j: usize,
    },
    /// A mask or bias does not broadcast to the scores.
    #[error("{what}: expected a shape that broadcasts to [B, Hq, Sq, Skv] = {expected:?}, got {found:?}")]
    Broadcast {
        /// `mask` or `bias`.
        what: &'static str,
        /// The shape of the scores.
        expected: [usize; 4],
        /// The shape that came.
        found: [usize; 4],
    },
    /// A sliding window of no keys.
    #[error("sliding_window: expected at least 1 key (the query's own), got 0")]
    EmptyWindow,
    /// A window or a number of sinks beyond what positions can reach.
    #[error("{what}: expected at most {limit} keys, got {found}")]
    WindowTooLarge {
        /// Which bound.
        what: &'static str,
        /// Largest accepted value.
        limit: u32,
        /// The value that came.
        found: u32,
    },
    /// A dropout probability outside `[0, 1)`.
    #[error("dropout: expected a probability in [0, 1), got {found}")]
    Dropout {
        /// The probability that came.
        found: f64,
    },
    /// A sequence longer than positions can count.
    #[error("{what}: expected at most {limit}, got {found}", limit = i32::MAX / 4)]
    TooLong {
        /// `queries` or `keys`.
        what: &'static str,
        /// The length that came.
        found: usize,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plain() -> Problem {
        Problem::new([2, 4, 5, 8], [2, 2, 7, 8], [2, 2, 7, 3], Element::F32).unwrap()
    }

    #[test]
    fn shapes_follow_from_the_operands() {
        let p = plain();
        assert_eq!(p.output_shape(), [2, 4, 5, 3]);
        assert_eq!(p.score_shape(), [2, 4, 5, 7]);
        assert_eq!((p.group(), p.alignment()), (2, 2));
    }

    #[test]
    fn messages_say_what_was_expected_and_what_came() {
        let err = Problem::new([2, 4, 5, 8], [1, 2, 7, 8], [2, 2, 7, 3], Element::F32).unwrap_err();
        assert_eq!(err.to_string(), "batch of k (dimension 0): expected 2, got 1");
        let err = Problem::new([2, 3, 5, 8], [2, 2, 7, 8], [2, 2, 7, 3], Element::F32).unwrap_err();
        assert_eq!(err.to_string(), "query heads: expected a multiple of the 2 key heads, got 3");
        let err = Problem::new([2, 2, 5, 300], [2, 2, 7, 300], [2, 2, 7, 3], Element::F32).unwrap_err();
        assert_eq!(err.to_string(), "head dimension: expected 1 to 256, got 300");
        let err = Problem { bias: Some([2, 1, 5, 6]), ..plain() }.validate().unwrap_err();
        assert_eq!(
            err.to_string(),
            "bias: expected a shape that broadcasts to [B, Hq, Sq, Skv] = [2, 4, 5, 7], got [2, 1, 5, 6]"
        );
        let rounded = Problem { precision: Precision::Tf32x3, ..plain() };
        rounded.validate().unwrap();
        let err = Problem { element: Element::BF16, ..rounded }.validate().unwrap_err();
        assert_eq!(err.to_string(), "precision Tf32x3: expected elements of type F32, got BF16");
        assert!(Problem { scale: f64::NAN, ..plain() }.validate().is_err());
        assert!(Problem { softcap: Some(0.0), ..plain() }.validate().is_err());
    }

    #[test]
    fn empty_problems_are_sound() {
        assert!(Problem::new([0, 4, 5, 8], [0, 2, 7, 8], [0, 2, 7, 3], Element::F32).unwrap().is_empty());
        assert!(!Problem::new([1, 4, 5, 8], [1, 2, 0, 8], [1, 2, 0, 3], Element::F32).unwrap().is_empty());
    }
}
