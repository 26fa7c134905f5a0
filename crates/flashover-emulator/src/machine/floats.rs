//! Arithmetic of floats. PTX ISA, "Floating Point Instructions" and "Half Precision Floating Point Instructions".

use super::code::Compute;
use super::lanewise::{bits, double2, float1, float2, of, ternary, ternary64, unary, unary64, unknown};
use super::numbers::{Kind, narrow, widen};
use crate::ptx::{Error, Slot};

/// `max` and `min` of floats give the number where one is none.
fn larger(x: f32, y: f32) -> f32 {
    if x.is_nan() || y > x || (x == y && y.is_sign_positive()) { y } else { x }
}

fn smaller(x: f32, y: f32) -> f32 {
    if x.is_nan() || y < x || (x == y && y.is_sign_negative()) { y } else { x }
}

pub(super) fn floats(code: &[&str], d: Slot, s: &[Slot]) -> Result<Compute, Error> {
    let sat = code.contains(&"sat");
    Ok(match code[0] {
        "add" => float2(d, of(s)?, |x, y| x + y),
        "sub" => float2(d, of(s)?, |x, y| x - y),
        "mul" if sat => float2(d, of(s)?, |x, y| (x * y).clamp(0.0, 1.0)),
        "mul" => float2(d, of(s)?, |x, y| x * y),
        "div" => float2(d, of(s)?, |x, y| x / y),
        "fma" | "mad" => {
            ternary(d, of(s)?, |x, y, z| bits(f32::from_bits(x).mul_add(f32::from_bits(y), f32::from_bits(z))))
        }
        "neg" => unary(d, of::<1>(s)?[0], |x| x ^ 1 << 31),
        "abs" => unary(d, of::<1>(s)?[0], |x| x & !(1 << 31)),
        "max" if code.contains(&"NaN") => float2(d, of(s)?, |x, y| if y.is_nan() { y } else { x.max(y) }),
        "max" if s.len() == 2 => float2(d, of(s)?, larger),
        "min" if s.len() == 2 => float2(d, of(s)?, smaller),
        "copysign" => float2(d, of(s)?, |x, y| y.copysign(x)),
        "rcp" => float1(d, of::<1>(s)?[0], |x| 1.0 / x),
        "sqrt" => float1(d, of::<1>(s)?[0], f32::sqrt),
        "rsqrt" => float1(d, of::<1>(s)?[0], |x| 1.0 / x.sqrt()),
        "ex2" => float1(d, of::<1>(s)?[0], |x| {
            let y = x.exp2();
            if y.is_subnormal() { 0.0 } else { y }
        }),
        "lg2" => float1(d, of::<1>(s)?[0], f32::log2),
        "sin" => float1(d, of::<1>(s)?[0], f32::sin),
        "cos" => float1(d, of::<1>(s)?[0], f32::cos),
        "tanh" => float1(d, of::<1>(s)?[0], f32::tanh),
        _ => return Err(unknown()),
    })
}

pub(super) fn doubles(code: &[&str], d: Slot, s: &[Slot]) -> Result<Compute, Error> {
    Ok(match code[0] {
        "add" => double2(d, of(s)?, |x, y| x + y),
        "sub" => double2(d, of(s)?, |x, y| x - y),
        "mul" => double2(d, of(s)?, |x, y| x * y),
        "div" => double2(d, of(s)?, |x, y| x / y),
        "max" => double2(d, of(s)?, f64::max),
        "min" => double2(d, of(s)?, f64::min),
        "fma" => {
            ternary64(d, of(s)?, |x, y, z| f64::from_bits(x).mul_add(f64::from_bits(y), f64::from_bits(z)).to_bits())
        }
        "neg" => unary64(d, of::<1>(s)?[0], |x| x ^ 1 << 63),
        "abs" => unary64(d, of::<1>(s)?[0], |x| x & !(1 << 63)),
        "sqrt" => unary64(d, of::<1>(s)?[0], |x| f64::from_bits(x).sqrt().to_bits()),
        "rcp" => unary64(d, of::<1>(s)?[0], |x| f64::from_bits(x).recip().to_bits()),
        _ => return Err(unknown()),
    })
}

/// One or two numbers of 16 bits; every operation is exact in f64 before it is rounded, but sums of products.
pub(super) fn halves(code: &[&str], kind: Kind, d: Slot, s: &[Slot]) -> Result<Compute, Error> {
    let (one, pair) = match kind {
        Kind::F16 => (Kind::F16, false),
        Kind::Bf16 => (Kind::Bf16, false),
        Kind::F16x2 => (Kind::F16, true),
        _ => (Kind::Bf16, true),
    };
    let f: fn(f64, f64, f64) -> f64 = match code[0] {
        "add" => |x, y, _| x + y,
        "sub" => |x, y, _| x - y,
        "mul" => |x, y, _| x * y,
        "fma" => |x, y, z| x * y + z,
        "max" => |x, y, _| larger(x as f32, y as f32).into(),
        "min" => |x, y, _| smaller(x as f32, y as f32).into(),
        "neg" => return Ok(unary(d, of::<1>(s)?[0], move |x| x ^ if pair { 0x8000_8000 } else { 0x8000 })),
        "abs" => return Ok(unary(d, of::<1>(s)?[0], move |x| x & if pair { 0x7fff_7fff } else { 0x7fff })),
        "ex2" => |x, _, _| x.exp2(),
        "tanh" => |x, _, _| x.tanh(),
        _ => return Err(unknown()),
    };
    let [a, b, c] = [s[0], s.get(1).copied().unwrap_or(s[0]), s.get(2).copied().unwrap_or(s[0])];
    Ok(ternary(d, [a, b, c], move |x, y, z| {
        let at = |shift: u32| {
            let [x, y, z] = [x, y, z].map(|x| widen(one, (x >> shift & 0xffff).into()));
            (narrow(one, f(x, y, z)) as u32) << shift
        };
        if pair { at(0) | at(16) } else { at(0) }
    }))
}
