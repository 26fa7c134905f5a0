//! Instructions on registers. PTX ISA, "Integer Arithmetic", "Floating Point", "Comparison and Selection", "Logic and
//! Shift", "Data Movement and Conversion".

use super::code::{Builder, Compute, Step, list, target, target_predicate, target64};
use super::floats::{doubles, floats, halves};
use super::integers::{integers, integers64};
use super::lanewise::{binary, bits, of, shift64, ternary, unary, unary64, unknown, widening};
use super::numbers::{Kind, convert, from_bf16, from_f16, to_bf16, to_f16, widen};
use super::registers::Registers;
use crate::ptx::{Arg, Error, Slot};

/// An instruction on registers.
pub(crate) fn step(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    compute(builder, code, args).map(Step::Compute)
}

fn sources(builder: &mut Builder, args: &[Arg], wide: bool) -> Result<Vec<Slot>, Error> {
    args.iter().map(|arg| if wide { builder.source64(arg) } else { builder.source(arg) }).collect()
}

fn compute(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Compute, Error> {
    let kind = code.iter().rev().find_map(|part| Kind::of(part)).ok_or("no type")?;
    let wide = kind.bits() == 64;
    match code[0] {
        "mov" => return moving(builder, kind, args),
        "cvt" => return conversion(builder, code, args),
        "setp" => return comparison(builder, code, kind, args),
        "selp" => {
            let &Arg::Pred(p, negated) = &args[3] else { return Err("expected a predicate".into()) };
            let s = sources(builder, &args[1..3], wide)?;
            return Ok(if wide {
                select64(target64(&args[0])?, of(&s)?, p, negated)
            } else {
                select(target(&args[0])?, of(&s)?, p, negated)
            });
        }
        _ if kind == Kind::Pred => return predicates(code, args),
        // Two widths.
        "mul" | "mad" if code.contains(&"wide") => {
            let d = if kind.bits() == 32 { target64(&args[0])? } else { target(&args[0])? };
            let s: [Slot; 2] = of(&sources(builder, &args[1..3], false)?)?;
            return widened(builder, code[0], kind, d, s, args.get(3));
        }
        "shl" | "shr" if wide => {
            let (d, a, b) = (target64(&args[0])?, builder.source64(&args[1])?, builder.source(&args[2])?);
            return Ok(match (code[0], kind) {
                ("shl", _) => shift64(d, a, b, |x, n| if n > 63 { 0 } else { x << n }),
                (_, Kind::Signed(_)) => shift64(d, a, b, |x, n| (x as i64 >> n.min(63)) as u64),
                _ => shift64(d, a, b, |x, n| if n > 63 { 0 } else { x >> n }),
            });
        }
        "popc" | "clz" if wide => {
            let (d, a) = (target(&args[0])?, builder.source64(&args[1])?);
            let count = if code[0] == "popc" { u64::count_ones } else { u64::leading_zeros };
            return Ok(Box::new(move |r, m| {
                let x = r.get64(a);
                let out = std::array::from_fn(|l| count(x[l]));
                r.put(d, m, &out);
            }));
        }
        _ => {}
    }
    let s = sources(builder, &args[1..], wide)?;
    if wide {
        let d = target64(&args[0])?;
        return if kind == Kind::F64 { doubles(code, d, &s) } else { integers64(code, kind, d, &s) };
    }
    let d = target(&args[0])?;
    match kind {
        Kind::F32 => floats(code, d, &s),
        Kind::F16 | Kind::Bf16 | Kind::F16x2 | Kind::Bf16x2 => halves(code, kind, d, &s),
        _ => integers(code, kind, d, &s),
    }
}

fn select(d: Slot, [a, b]: [Slot; 2], p: u32, negated: bool) -> Compute {
    Box::new(move |r, m| {
        let holds = r.holds(p, negated);
        let (x, y) = (r.get(a), r.get(b));
        let out = std::array::from_fn(|l| if holds >> l & 1 != 0 { x[l] } else { y[l] });
        r.put(d, m, &out);
    })
}

fn select64(d: Slot, [a, b]: [Slot; 2], p: u32, negated: bool) -> Compute {
    Box::new(move |r, m| {
        let holds = r.holds(p, negated);
        let (x, y) = (r.get64(a), r.get64(b));
        let out = std::array::from_fn(|l| if holds >> l & 1 != 0 { x[l] } else { y[l] });
        r.put64(d, m, &out);
    })
}

fn widened(
    builder: &mut Builder,
    name: &str,
    kind: Kind,
    d: Slot,
    s: [Slot; 2],
    added: Option<&Arg>,
) -> Result<Compute, Error> {
    let product = move |x: u32, y: u32| match kind {
        Kind::Signed(32) => (i64::from(x as i32) * i64::from(y as i32)) as u64,
        Kind::Bits(32) => u64::from(x) * u64::from(y),
        Kind::Signed(_) => (i32::from(x as i16) * i32::from(y as i16)) as u32 as u64,
        _ => u64::from((x & 0xffff) * (y & 0xffff)),
    };
    let added = if name == "mad" { Some(added.ok_or("expected a sum")?) } else { None };
    Ok(match (kind.bits(), added) {
        (32, None) => widening(d, s, product),
        (32, Some(c)) => {
            let c = builder.source64(c)?;
            Box::new(move |r, m| {
                let (x, y, z) = (r.get(s[0]), r.get(s[1]), r.get64(c));
                let out = std::array::from_fn(|l| product(x[l], y[l]).wrapping_add(z[l]));
                r.put64(d, m, &out);
            })
        }
        (_, None) => binary(d, s, move |x, y| product(x, y) as u32),
        (_, Some(c)) => {
            let c = builder.source(c)?;
            ternary(d, [s[0], s[1], c], move |x, y, z| (product(x, y) as u32).wrapping_add(z))
        }
    })
}

fn moving(builder: &mut Builder, kind: Kind, args: &[Arg]) -> Result<Compute, Error> {
    if let (Arg::Special(name), true) = (&args[1], kind.bits() == 64) {
        // Clocks: time does not pass here.
        if name.starts_with("%clock") || name.starts_with("%globaltimer") {
            let d = target64(&args[0])?;
            return Ok(Box::new(move |r, m| r.put64(d, m, &[0; 32])));
        }
    }
    match (&args[0], &args[1], kind) {
        (_, _, Kind::Pred) => predicates(&["mov"], args),
        (d, Arg::List(parts), _) if kind.bits() == 64 => {
            let (d, s) = (target64(d)?, sources(builder, parts, false)?);
            let [low, high] = of(&s)?;
            Ok(widening(d, [low, high], |x, y| u64::from(x) | u64::from(y) << 32))
        }
        (d, Arg::List(parts), _) => {
            let (d, s) = (target(d)?, sources(builder, parts, false)?);
            let each = 32 / s.len() as u32;
            Ok(Box::new(move |r, m| {
                let mut out = [0; 32];
                for (x, slot) in s.iter().enumerate() {
                    let from = r.get(*slot);
                    for l in 0..32 {
                        out[l] |= (from[l] & (u32::MAX >> (32 - each))) << (each * x as u32);
                    }
                }
                r.put(d, m, &out);
            }))
        }
        (Arg::List(parts), a, _) if kind.bits() == 64 => {
            let a = builder.source64(a)?;
            let [low, high] = [&parts[0], &parts[1]]
                .map(|part| if *part == Arg::Nothing { Ok(None) } else { target(part).map(Some) });
            let (low, high) = (low?, high?);
            Ok(Box::new(move |r, m| {
                let x = *r.get64(a);
                for (slot, by) in [(low, 0), (high, 32)] {
                    if let Some(slot) = slot {
                        r.put(slot, m, &std::array::from_fn(|l| (x[l] >> by) as u32));
                    }
                }
            }))
        }
        (Arg::List(parts), a, _) => {
            let a = builder.source(a)?;
            let to = parts.iter().map(|part| if *part == Arg::Nothing { Ok(None) } else { target(part).map(Some) });
            let to = to.collect::<Result<Vec<_>, _>>()?;
            let each = 32 / to.len() as u32;
            Ok(Box::new(move |r, m| {
                let x = *r.get(a);
                for (at, slot) in to.iter().enumerate() {
                    if let Some(slot) = slot {
                        let part = |l: usize| x[l] >> (each * at as u32) & (u32::MAX >> (32 - each));
                        r.put(*slot, m, &std::array::from_fn(part));
                    }
                }
            }))
        }
        (d, a, _) if kind.bits() == 64 => Ok(unary64(target64(d)?, builder.source64(a)?, |x| x)),
        (d, a, Kind::Bits(16) | Kind::F16 | Kind::Bf16 | Kind::Signed(16)) => {
            Ok(unary(target(d)?, builder.source(a)?, |x| x & 0xffff))
        }
        (d, a, _) => Ok(unary(target(d)?, builder.source(a)?, |x| x)),
    }
}

fn conversion(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Compute, Error> {
    let kinds: Vec<Kind> = code.iter().filter_map(|part| Kind::of(part)).collect();
    let [to, from] = kinds[..] else { return Err("expected two types".into()) };
    match to {
        Kind::F16x2 | Kind::Bf16x2 => {
            let s = of(&sources(builder, &args[1..], false)?)?;
            let round = if to == Kind::F16x2 { to_f16 } else { to_bf16 };
            return Ok(binary(target(&args[0])?, s, move |high, low| {
                round(f32::from_bits(high)) << 16 | round(f32::from_bits(low))
            }));
        }
        Kind::F32 if from == Kind::F16 => {
            return Ok(unary(target(&args[0])?, builder.source(&args[1])?, |x| bits(from_f16(x))));
        }
        Kind::F32 if from == Kind::Bf16 => {
            return Ok(unary(target(&args[0])?, builder.source(&args[1])?, |x| bits(from_bf16(x))));
        }
        _ => {}
    }
    let modes: Vec<&'static str> =
        ["sat", "rz", "rni", "rzi", "rmi", "rpi"].into_iter().filter(|mode| code.contains(mode)).collect();
    let f = move |x: u64| convert(to, from, &modes, x);
    // A register may be wider than the type that it is read or written as.
    let wide =
        |arg: &Arg, kind: Kind| matches!(arg, Arg::Reg64(_)) || (kind.bits() == 64 && !matches!(arg, Arg::Reg32(_)));
    let keeps_sign = |kind: Kind| matches!(kind, Kind::Signed(_));
    Ok(match (wide(&args[0], to), wide(&args[1], from)) {
        (false, false) => unary(target(&args[0])?, builder.source(&args[1])?, move |x| f(x.into()) as u32),
        (false, true) => {
            let (d, a) = (target(&args[0])?, builder.source64(&args[1])?);
            Box::new(move |r, m| {
                let x = r.get64(a);
                let out = std::array::from_fn(|l| f(x[l]) as u32);
                r.put(d, m, &out);
            })
        }
        (true, false) => {
            let (d, a, sign) = (target64(&args[0])?, builder.source(&args[1])?, keeps_sign(to) && to.bits() < 64);
            Box::new(move |r, m| {
                let x = r.get(a);
                let out = std::array::from_fn(|l| {
                    let y = f(x[l].into());
                    if sign { (y << (64 - to.bits())) as i64 as u64 } else { y }
                });
                r.put64(d, m, &out);
            })
        }
        (true, true) => unary64(target64(&args[0])?, builder.source64(&args[1])?, f),
    })
}

/// A comparison by its name.
fn compare(name: &str) -> Result<fn(Option<std::cmp::Ordering>) -> bool, Error> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    Ok(match name {
        "eq" => |o| o == Some(Equal),
        "ne" => |o| matches!(o, Some(Less | Greater)),
        "lt" | "lo" => |o| o == Some(Less),
        "le" | "ls" => |o| matches!(o, Some(Less | Equal)),
        "gt" | "hi" => |o| o == Some(Greater),
        "ge" | "hs" => |o| matches!(o, Some(Greater | Equal)),
        "equ" => |o| matches!(o, Some(Equal) | None),
        "neu" => |o| o != Some(Equal),
        "ltu" => |o| matches!(o, Some(Less) | None),
        "leu" => |o| o != Some(Greater),
        "gtu" => |o| matches!(o, Some(Greater) | None),
        "geu" => |o| o != Some(Less),
        "num" => |o| o.is_some(),
        "nan" => |o| o.is_none(),
        other => return Err(format!("the comparison {other} is not known")),
    })
}

fn comparison(builder: &mut Builder, code: &[&str], kind: Kind, args: &[Arg]) -> Result<Compute, Error> {
    let holds = compare(code[1])?;
    let s = sources(builder, &args[1..3], kind.bits() == 64)?;
    let [a, b] = of(&s)?;
    let test: Box<dyn Fn(&Registers) -> u32 + Send + Sync> = match kind {
        Kind::F32 => mask32(a, b, move |x, y| holds(f32::from_bits(x).partial_cmp(&f32::from_bits(y)))),
        Kind::F16 | Kind::Bf16 => {
            mask32(a, b, move |x, y| holds(widen(kind, x.into()).partial_cmp(&widen(kind, y.into()))))
        }
        Kind::Signed(32) => mask32(a, b, move |x, y| holds(Some((x as i32).cmp(&(y as i32))))),
        Kind::Signed(16) => mask32(a, b, move |x, y| holds(Some((x as i16).cmp(&(y as i16))))),
        Kind::Bits(16) => mask32(a, b, move |x, y| holds(Some((x as u16).cmp(&(y as u16))))),
        Kind::Bits(32) => mask32(a, b, move |x, y| holds(Some(x.cmp(&y)))),
        Kind::F64 => mask64(a, b, move |x, y| holds(f64::from_bits(x).partial_cmp(&f64::from_bits(y)))),
        Kind::Signed(64) => mask64(a, b, move |x, y| holds(Some((x as i64).cmp(&(y as i64))))),
        Kind::Bits(64) => mask64(a, b, move |x, y| holds(Some(x.cmp(&y)))),
        _ => return Err(unknown()),
    };
    let (p, q) = match &args[0] {
        Arg::Both(p, q) => (target_predicate(p)?, Some(target_predicate(q)?)),
        p => (target_predicate(p)?, None),
    };
    let joined = match args.get(3) {
        Some(&Arg::Pred(c, negated)) => Some((c, negated, code[2].to_string())),
        Some(other) => return Err(format!("expected a predicate, got {other:?}")),
        None => None,
    };
    Ok(Box::new(move |r, m| {
        let x = test(r);
        let join = |x: u32| match &joined {
            None => x,
            Some((c, negated, how)) => {
                let c = r.holds(*c, *negated);
                match how.as_str() {
                    "and" => x & c,
                    "or" => x | c,
                    _ => x ^ c,
                }
            }
        };
        let (x, not_x) = (join(x), join(!x));
        r.put_predicate(p, m, x);
        if let Some(q) = q {
            r.put_predicate(q, m, not_x);
        }
    }))
}

fn mask32(
    a: Slot,
    b: Slot,
    f: impl Fn(u32, u32) -> bool + Send + Sync + 'static,
) -> Box<dyn Fn(&Registers) -> u32 + Send + Sync> {
    Box::new(move |r| {
        let (x, y) = (r.get(a), r.get(b));
        (0..32).fold(0, |all, l| all | u32::from(f(x[l], y[l])) << l)
    })
}

fn mask64(
    a: Slot,
    b: Slot,
    f: impl Fn(u64, u64) -> bool + Send + Sync + 'static,
) -> Box<dyn Fn(&Registers) -> u32 + Send + Sync> {
    Box::new(move |r| {
        let (x, y) = (r.get64(a), r.get64(b));
        (0..32).fold(0, |all, l| all | u32::from(f(x[l], y[l])) << l)
    })
}

fn predicates(code: &[&str], args: &[Arg]) -> Result<Compute, Error> {
    enum From {
        Pred(u32, bool),
        Known(u32),
    }
    let d = target_predicate(&args[0])?;
    let from = |arg: &Arg| match arg {
        Arg::Pred(p, negated) => Ok(From::Pred(*p, *negated)),
        Arg::Int(x) => Ok(From::Known(if *x != 0 { u32::MAX } else { 0 })),
        other => Err(format!("expected a predicate, got {other:?}")),
    };
    let a = from(&args[1])?;
    let b = args.get(2).map(from).transpose()?.unwrap_or(From::Known(0));
    let f: fn(u32, u32) -> u32 = match code[0] {
        "mov" => |x, _| x,
        "not" => |x, _| !x,
        "and" => |x, y| x & y,
        "or" => |x, y| x | y,
        "xor" => |x, y| x ^ y,
        _ => return Err(unknown()),
    };
    Ok(Box::new(move |r, m| {
        let read = |from: &From| match from {
            From::Pred(p, negated) => r.holds(*p, *negated),
            From::Known(x) => *x,
        };
        let x = f(read(&a), read(&b));
        r.put_predicate(d, m, x);
    }))
}

/// The operands of a list as sources of 32 bits.
pub(crate) fn fragment(builder: &mut Builder, arg: &Arg) -> Result<Vec<Slot>, Error> {
    list(arg).iter().map(|arg| builder.source(arg)).collect()
}
