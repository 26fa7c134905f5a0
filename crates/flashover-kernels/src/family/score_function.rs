//! A user's score function in a kernel: the last that happens to a score before the mask. The kernel gets its code as a
//! compile-time argument, and its parameters lie in the scratch buffer.

use cubecl::prelude::*;

use super::element::{Head, Numbers, position};
use crate::score::{Position, ScoreCode};

/// The function's value for query `i` and key `j`, or `s` without one.
#[cube]
pub(crate) fn with_function(
    s: f32,
    i: u32,
    j: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] function: Option<ScoreCode>,
) -> f32 {
    if comptime!(function.is_some()) {
        let code = comptime!(function.unwrap());
        let place = place_of(i, j, at, n);
        call_value(s, place, parameter_at(parameter_of(place, code), scratch, n), code)
    } else {
        s
    }
}

/// The function's derivative at `s`, 1 without one.
#[cube]
pub(crate) fn function_derivative(
    s: f32,
    i: u32,
    j: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] code: ScoreCode,
) -> f32 {
    let place = place_of(i, j, at, n);
    call_derivative(s, place, parameter_at(parameter_of(place, code), scratch, n), code)
}

/// Its derivative for the parameter that the score reads.
#[cube]
pub(crate) fn function_parameter_derivative(
    s: f32,
    i: u32,
    j: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] code: ScoreCode,
) -> f32 {
    let place = place_of(i, j, at, n);
    call_parameter_derivative(s, place, parameter_at(parameter_of(place, code), scratch, n), code)
}

/// Which parameter the score of query `i` and key `j` reads.
#[cube]
pub(crate) fn function_parameter(i: u32, j: u32, at: Head, n: Numbers, #[comptime] code: ScoreCode) -> u32 {
    parameter_of(place_of(i, j, at, n), code)
}

#[cube]
fn place_of(i: u32, j: u32, at: Head, n: Numbers) -> Position {
    Position { batch: at.batch, head: at.head, a: position(i, n), j: j as i32 }
}

/// A parameter; NaN for one that does not exist.
#[cube]
fn parameter_at(index: u32, scratch: &[u32], n: Numbers) -> f32 {
    let bits = scratch[n.parameters_at + min(index, n.parameters - 1) as usize];
    // Infinity's bits and one more. WGSL cannot write a NaN down, and arithmetic that gives one may be folded.
    let nan = u32::reinterpret(n.minus_infinity) | 0x0040_0000u32;
    f32::reinterpret(select(index < n.parameters, bits, nan))
}

#[cube]
fn parameter_of(at: Position, #[comptime] code: ScoreCode) -> u32 {
    intrinsic!(|scope| (code.expand_parameter)(scope, at))
}

#[cube]
fn call_value(s: f32, at: Position, parameter: f32, #[comptime] code: ScoreCode) -> f32 {
    intrinsic!(|scope| (code.expand_value)(scope, s, at, parameter))
}

#[cube]
fn call_derivative(s: f32, at: Position, parameter: f32, #[comptime] code: ScoreCode) -> f32 {
    intrinsic!(|scope| (code.expand_derivative)(scope, s, at, parameter))
}

#[cube]
fn call_parameter_derivative(s: f32, at: Position, parameter: f32, #[comptime] code: ScoreCode) -> f32 {
    intrinsic!(|scope| (code.expand_parameter_derivative)(scope, s, at, parameter))
}
