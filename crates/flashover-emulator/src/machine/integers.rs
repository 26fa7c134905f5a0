//! Arithmetic of integers. PTX ISA, "Integer Arithmetic Instructions" and "Logic and Shift Instructions".

use super::code::Compute;
use super::lanewise::{binary, binary64, of, ternary, ternary64, unary, unary64, unknown};
use super::numbers::Kind;
use crate::ptx::{Error, Slot};

pub(super) fn integers(code: &[&str], kind: Kind, d: Slot, s: &[Slot]) -> Result<Compute, Error> {
    if kind.bits() == 16 {
        return integers16(code, kind, d, s);
    }
    let signed = matches!(kind, Kind::Signed(_));
    let high = code.contains(&"hi");
    Ok(match code[0] {
        "add" => binary(d, of(s)?, u32::wrapping_add),
        "sub" => binary(d, of(s)?, u32::wrapping_sub),
        "mul" if high && signed => binary(d, of(s)?, |x, y| ((i64::from(x as i32) * i64::from(y as i32)) >> 32) as u32),
        "mul" if high => binary(d, of(s)?, |x, y| ((u64::from(x) * u64::from(y)) >> 32) as u32),
        "mul" => binary(d, of(s)?, u32::wrapping_mul),
        "mad" if high && signed => {
            ternary(d, of(s)?, |x, y, z| (((i64::from(x as i32) * i64::from(y as i32)) >> 32) as u32).wrapping_add(z))
        }
        "mad" if high => ternary(d, of(s)?, |x, y, z| (((u64::from(x) * u64::from(y)) >> 32) as u32).wrapping_add(z)),
        "mad" => ternary(d, of(s)?, |x, y, z| x.wrapping_mul(y).wrapping_add(z)),
        "sad" => ternary(d, of(s)?, |x, y, z| (x as i32).abs_diff(y as i32).wrapping_add(z)),
        // What a division by zero gives is not told; here all bits.
        "div" if signed => {
            binary(d, of(s)?, |x, y| if y == 0 { u32::MAX } else { (x as i32).wrapping_div(y as i32) as u32 })
        }
        "div" => binary(d, of(s)?, |x, y| x.checked_div(y).unwrap_or(u32::MAX)),
        "rem" if signed => {
            binary(d, of(s)?, |x, y| if y == 0 { u32::MAX } else { (x as i32).wrapping_rem(y as i32) as u32 })
        }
        "rem" => binary(d, of(s)?, |x, y| x.checked_rem(y).unwrap_or(u32::MAX)),
        "abs" => unary(d, of::<1>(s)?[0], |x| (x as i32).unsigned_abs()),
        "neg" => unary(d, of::<1>(s)?[0], u32::wrapping_neg),
        "min" if signed => binary(d, of(s)?, |x, y| (x as i32).min(y as i32) as u32),
        "max" if signed => binary(d, of(s)?, |x, y| (x as i32).max(y as i32) as u32),
        "min" => binary(d, of(s)?, u32::min),
        "max" => binary(d, of(s)?, u32::max),
        "and" => binary(d, of(s)?, |x, y| x & y),
        "or" => binary(d, of(s)?, |x, y| x | y),
        "xor" => binary(d, of(s)?, |x, y| x ^ y),
        "not" => unary(d, of::<1>(s)?[0], |x| !x),
        "cnot" => unary(d, of::<1>(s)?[0], |x| u32::from(x == 0)),
        "shl" => binary(d, of(s)?, |x, n| if n > 31 { 0 } else { x << n }),
        "shr" if signed => binary(d, of(s)?, |x, n| (x as i32 >> n.min(31)) as u32),
        "shr" => binary(d, of(s)?, |x, n| if n > 31 { 0 } else { x >> n }),
        "shf" => {
            let (left, wrap) = (code[1] == "l", code.contains(&"wrap"));
            ternary(d, of(s)?, move |low, high, n| {
                let n = if wrap { n & 31 } else { n.min(32) };
                let both = u64::from(high) << 32 | u64::from(low);
                if left { ((both << n) >> 32) as u32 } else { (both >> n) as u32 }
            })
        }
        "lop3" => {
            let [a, b, c, table] = of(s)?;
            Box::new(move |r, m| {
                let (x, y, z, t) = (r.get(a), r.get(b), r.get(c), r.get(table));
                let mut out = [0u32; 32];
                for row in 0..8 {
                    let take = |x: u32, bit: u32| if row >> bit & 1 != 0 { x } else { !x };
                    for l in 0..32 {
                        if t[l] >> row & 1 != 0 {
                            out[l] |= take(x[l], 2) & take(y[l], 1) & take(z[l], 0);
                        }
                    }
                }
                r.put(d, m, &out);
            })
        }
        "bfe" => ternary(d, of(s)?, move |x, at, len| {
            let (at, len) = (at & 255, len & 255);
            let cut = if at > 31 {
                if signed && x >> 31 != 0 { u32::MAX } else { 0 }
            } else if signed {
                (x as i32 >> at) as u32
            } else {
                x >> at
            };
            match len {
                0 => 0,
                32.. => cut,
                len if signed => ((cut << (32 - len)) as i32 >> (32 - len)) as u32,
                len => cut & ((1 << len) - 1),
            }
        }),
        "bfi" => {
            let [a, b, c, len] = of(s)?;
            Box::new(move |r, m| {
                let (x, y, at, len) = (r.get(a), r.get(b), r.get(c), r.get(len));
                let out = std::array::from_fn(|l| {
                    let (at, len) = (at[l] & 255, len[l] & 255);
                    let ones = if len > 31 { u32::MAX } else { (1 << len) - 1 };
                    let ones = if at > 31 { 0 } else { ones << at };
                    y[l] & !ones | x[l].checked_shl(at).unwrap_or(0) & ones
                });
                r.put(d, m, &out);
            })
        }
        "bfind" => unary(d, of::<1>(s)?[0], move |x| {
            let x = if signed && (x as i32) < 0 { !x } else { x };
            31u32.wrapping_sub(x.leading_zeros())
        }),
        "bmsk" => binary(d, of(s)?, |at, len| {
            let ones = if len > 31 { u32::MAX } else { (1 << len) - 1 };
            ones.checked_shl(at).unwrap_or(0)
        }),
        "brev" => unary(d, of::<1>(s)?[0], u32::reverse_bits),
        "popc" => unary(d, of::<1>(s)?[0], u32::count_ones),
        "clz" => unary(d, of::<1>(s)?[0], u32::leading_zeros),
        "prmt" if code.len() == 2 => ternary(d, of(s)?, |x, y, how| {
            let both = u64::from(y) << 32 | u64::from(x);
            (0..4).fold(0, |out, at| {
                let pick = how >> (4 * at) & 15;
                let byte = (both >> (8 * (pick & 7))) as u8;
                let byte = if pick & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
                out | u32::from(byte) << (8 * at)
            })
        }),
        _ => return Err(unknown()),
    })
}

fn integers16(code: &[&str], kind: Kind, d: Slot, s: &[Slot]) -> Result<Compute, Error> {
    let signed = matches!(kind, Kind::Signed(_));
    Ok(match code[0] {
        "add" => binary(d, of(s)?, |x, y| x.wrapping_add(y) & 0xffff),
        "sub" => binary(d, of(s)?, |x, y| x.wrapping_sub(y) & 0xffff),
        "mul" if !code.contains(&"hi") => binary(d, of(s)?, |x, y| x.wrapping_mul(y) & 0xffff),
        "mad" if !code.contains(&"hi") => ternary(d, of(s)?, |x, y, z| x.wrapping_mul(y).wrapping_add(z) & 0xffff),
        "and" => binary(d, of(s)?, |x, y| x & y & 0xffff),
        "or" => binary(d, of(s)?, |x, y| (x | y) & 0xffff),
        "xor" => binary(d, of(s)?, |x, y| (x ^ y) & 0xffff),
        "not" => unary(d, of::<1>(s)?[0], |x| !x & 0xffff),
        "neg" => unary(d, of::<1>(s)?[0], |x| x.wrapping_neg() & 0xffff),
        "shl" => binary(d, of(s)?, |x, n| if n > 15 { 0 } else { x << n & 0xffff }),
        "shr" if signed => binary(d, of(s)?, |x, n| u32::from((x as i16 >> n.min(15)) as u16)),
        "shr" => binary(d, of(s)?, |x, n| if n > 15 { 0 } else { (x & 0xffff) >> n }),
        "min" if signed => binary(d, of(s)?, |x, y| u32::from((x as i16).min(y as i16) as u16)),
        "max" if signed => binary(d, of(s)?, |x, y| u32::from((x as i16).max(y as i16) as u16)),
        "min" => binary(d, of(s)?, |x, y| (x & 0xffff).min(y & 0xffff)),
        "max" => binary(d, of(s)?, |x, y| (x & 0xffff).max(y & 0xffff)),
        "div" if !signed => binary(d, of(s)?, |x, y| (x & 0xffff).checked_div(y & 0xffff).unwrap_or(0xffff)),
        "rem" if !signed => binary(d, of(s)?, |x, y| (x & 0xffff).checked_rem(y & 0xffff).unwrap_or(0xffff)),
        _ => return Err(unknown()),
    })
}

pub(super) fn integers64(code: &[&str], kind: Kind, d: Slot, s: &[Slot]) -> Result<Compute, Error> {
    let signed = matches!(kind, Kind::Signed(_));
    let high = code.contains(&"hi");
    Ok(match code[0] {
        "add" => binary64(d, of(s)?, u64::wrapping_add),
        "sub" => binary64(d, of(s)?, u64::wrapping_sub),
        "mul" if high && signed => {
            binary64(d, of(s)?, |x, y| ((i128::from(x as i64) * i128::from(y as i64)) >> 64) as u64)
        }
        "mul" if high => binary64(d, of(s)?, |x, y| ((u128::from(x) * u128::from(y)) >> 64) as u64),
        "mul" => binary64(d, of(s)?, u64::wrapping_mul),
        "mad" if !high => ternary64(d, of(s)?, |x, y, z| x.wrapping_mul(y).wrapping_add(z)),
        "div" if signed => {
            binary64(d, of(s)?, |x, y| if y == 0 { u64::MAX } else { (x as i64).wrapping_div(y as i64) as u64 })
        }
        "div" => binary64(d, of(s)?, |x, y| x.checked_div(y).unwrap_or(u64::MAX)),
        "rem" if signed => {
            binary64(d, of(s)?, |x, y| if y == 0 { u64::MAX } else { (x as i64).wrapping_rem(y as i64) as u64 })
        }
        "rem" => binary64(d, of(s)?, |x, y| x.checked_rem(y).unwrap_or(u64::MAX)),
        "abs" => unary64(d, of::<1>(s)?[0], |x| (x as i64).unsigned_abs()),
        "neg" => unary64(d, of::<1>(s)?[0], u64::wrapping_neg),
        "min" if signed => binary64(d, of(s)?, |x, y| (x as i64).min(y as i64) as u64),
        "max" if signed => binary64(d, of(s)?, |x, y| (x as i64).max(y as i64) as u64),
        "min" => binary64(d, of(s)?, u64::min),
        "max" => binary64(d, of(s)?, u64::max),
        "and" => binary64(d, of(s)?, |x, y| x & y),
        "or" => binary64(d, of(s)?, |x, y| x | y),
        "xor" => binary64(d, of(s)?, |x, y| x ^ y),
        "not" => unary64(d, of::<1>(s)?[0], |x| !x),
        _ => return Err(unknown()),
    })
}
