//! Instructions that work on each lane by itself, from what they do to one.

use super::code::Compute;
use crate::ptx::{Error, Slot};

pub(super) fn unary(d: Slot, a: Slot, f: impl Fn(u32) -> u32 + Send + Sync + 'static) -> Compute {
    Box::new(move |r, m| {
        let x = r.get(a);
        let out = std::array::from_fn(|l| f(x[l]));
        r.put(d, m, &out);
    })
}

pub(super) fn binary(d: Slot, [a, b]: [Slot; 2], f: impl Fn(u32, u32) -> u32 + Send + Sync + 'static) -> Compute {
    Box::new(move |r, m| {
        let (x, y) = (r.get(a), r.get(b));
        let out = std::array::from_fn(|l| f(x[l], y[l]));
        r.put(d, m, &out);
    })
}

pub(super) fn ternary(
    d: Slot,
    [a, b, c]: [Slot; 3],
    f: impl Fn(u32, u32, u32) -> u32 + Send + Sync + 'static,
) -> Compute {
    Box::new(move |r, m| {
        let (x, y, z) = (r.get(a), r.get(b), r.get(c));
        let out = std::array::from_fn(|l| f(x[l], y[l], z[l]));
        r.put(d, m, &out);
    })
}

pub(super) fn unary64(d: Slot, a: Slot, f: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Compute {
    Box::new(move |r, m| {
        let x = r.get64(a);
        let out = std::array::from_fn(|l| f(x[l]));
        r.put64(d, m, &out);
    })
}

pub(super) fn binary64(d: Slot, [a, b]: [Slot; 2], f: impl Fn(u64, u64) -> u64 + Send + Sync + 'static) -> Compute {
    Box::new(move |r, m| {
        let (x, y) = (r.get64(a), r.get64(b));
        let out = std::array::from_fn(|l| f(x[l], y[l]));
        r.put64(d, m, &out);
    })
}

pub(super) fn ternary64(
    d: Slot,
    [a, b, c]: [Slot; 3],
    f: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static,
) -> Compute {
    Box::new(move |r, m| {
        let (x, y, z) = (r.get64(a), r.get64(b), r.get64(c));
        let out = std::array::from_fn(|l| f(x[l], y[l], z[l]));
        r.put64(d, m, &out);
    })
}

/// Shifts of 64 bits take their distance from 32.
pub(super) fn shift64(d: Slot, a: Slot, b: Slot, f: impl Fn(u64, u32) -> u64 + Send + Sync + 'static) -> Compute {
    Box::new(move |r, m| {
        let (x, y) = (r.get64(a), r.get(b));
        let out = std::array::from_fn(|l| f(x[l], y[l]));
        r.put64(d, m, &out);
    })
}

pub(super) fn widening(d: Slot, [a, b]: [Slot; 2], f: impl Fn(u32, u32) -> u64 + Send + Sync + 'static) -> Compute {
    Box::new(move |r, m| {
        let (x, y) = (r.get(a), r.get(b));
        let out = std::array::from_fn(|l| f(x[l], y[l]));
        r.put64(d, m, &out);
    })
}

/// Floats: NaN comes out as the hardware writes it.
pub(super) fn bits(x: f32) -> u32 {
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits() }
}

pub(super) fn float1(d: Slot, a: Slot, f: impl Fn(f32) -> f32 + Send + Sync + 'static) -> Compute {
    unary(d, a, move |x| bits(f(f32::from_bits(x))))
}

pub(super) fn float2(d: Slot, s: [Slot; 2], f: impl Fn(f32, f32) -> f32 + Send + Sync + 'static) -> Compute {
    binary(d, s, move |x, y| bits(f(f32::from_bits(x), f32::from_bits(y))))
}

pub(super) fn double2(d: Slot, s: [Slot; 2], f: impl Fn(f64, f64) -> f64 + Send + Sync + 'static) -> Compute {
    binary64(d, s, move |x, y| f(f64::from_bits(x), f64::from_bits(y)).to_bits())
}

/// So many operands.
pub(super) fn of<const N: usize>(slots: &[Slot]) -> Result<[Slot; N], Error> {
    slots.try_into().map_err(|_| format!("expected {N} operands, got {}", slots.len()))
}

pub(super) fn unknown() -> Error {
    "the instruction is not known".into()
}
