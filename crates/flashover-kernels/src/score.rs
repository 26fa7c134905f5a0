//! What happens to a score between the product and the mask: softcap, ALiBi, an additive bias, a user's own function, in
//! this order.
//!
//! Every score function reads at most one parameter per score, so that a kernel knows where the parameter's gradient
//! goes before it computes it: the gradient of parameter `n` is the sum of `ds · ∂value/∂parameter` over the scores
//! that read it, gathered in a fixed order by the tile that owns them. No float atomics, the same bits every run.
//! A function of several parameters is a chain of functions of one.
//!
//! The four functions of [`ScoreFunction`] are scalar code over f32 and u32. The same source runs inside `#[cube]`
//! kernels and, called plainly, on the host.

mod code;

use cubecl::prelude::*;

pub use code::{Along, Derivatives, Row, ScoreCode, ScoreUse};

/// Where a score stands.
#[derive(CubeType, Debug, Clone, Copy, PartialEq, Eq)]
#[expand(derive(Clone, Copy))]
pub struct Position {
    /// Batch element.
    pub batch: u32,
    /// Query head.
    pub head: u32,
    /// The query's position on the key axis, `i + Skv − Sq`.
    pub a: i32,
    /// Key.
    pub j: i32,
}

/// A function of a score, its derivative, and the derivative for its own parameter.
///
/// In a chain each function takes the value of the one before it; the derivatives multiply. A value of −∞ hides the key. A
/// hidden key's score may be asked for, and is dropped.
///
/// Written by a user, it is a type without fields: the parameters come as a tensor. `docs/scores.md` has an example.
#[cube]
pub trait ScoreFunction: 'static + Send + Sync {
    /// Which parameter this score reads, as an index into the function's parameters (0 if there is but one). Below their
    /// number wherever a key is visible; beyond it a parameter is NaN, and its gradient goes nowhere.
    fn parameter(at: Position) -> u32;

    /// The new score.
    fn value(s: f32, at: Position, parameter: f32) -> f32;

    /// `∂value/∂s`.
    fn derivative(s: f32, at: Position, parameter: f32) -> f32;

    /// `∂value/∂parameter`.
    fn parameter_derivative(s: f32, at: Position, parameter: f32) -> f32;
}

/// `c · tanh(s / c)` with `c` the parameter (Gemma 2's logit soft-capping).
pub struct Softcap;

#[cube]
impl ScoreFunction for Softcap {
    fn parameter(_at: Position) -> u32 {
        0u32
    }

    fn value(s: f32, _at: Position, parameter: f32) -> f32 {
        parameter * (s / parameter).tanh()
    }

    fn derivative(s: f32, _at: Position, parameter: f32) -> f32 {
        let t = (s / parameter).tanh();
        1.0f32 - t * t
    }

    fn parameter_derivative(s: f32, _at: Position, parameter: f32) -> f32 {
        let x = s / parameter;
        let t = x.tanh();
        t - x * (1.0f32 - t * t)
    }
}

/// `s − slope · |a − j|`, a slope per query head (Press et al., "Train Short, Test Long", arXiv 2108.12409).
pub struct Alibi;

#[cube]
impl ScoreFunction for Alibi {
    fn parameter(at: Position) -> u32 {
        at.head
    }

    fn value(s: f32, at: Position, parameter: f32) -> f32 {
        s - parameter * alibi_distance(at)
    }

    fn derivative(_s: f32, _at: Position, _parameter: f32) -> f32 {
        1.0f32
    }

    fn parameter_derivative(_s: f32, at: Position, _parameter: f32) -> f32 {
        -alibi_distance(at)
    }
}

/// `s + bias`. The parameter is the element of the bias that broadcasts to the score's place; kernels find it through
/// the tensor's strides, so [`parameter`](ScoreFunction::parameter) is not asked.
pub struct Bias;

#[cube]
impl ScoreFunction for Bias {
    fn parameter(_at: Position) -> u32 {
        0u32
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

#[cube]
fn alibi_distance(at: Position) -> f32 {
    let ahead = max(at.a, at.j);
    let behind = min(at.a, at.j);
    (ahead - behind) as f32
}
