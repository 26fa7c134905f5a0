//! Barriers of a block, mbarriers, shuffles and votes. PTX ISA, "Parallel Synchronization and Communication Instructions".

use super::code::{Act, Builder, Step, Then, target, target_predicate, target64};
use super::memory::{Address, in_shared, space_of};
use super::registers::lanes;
use crate::ptx::{Arg, Error, Slot, Space};

/// An instruction that threads meet at.
pub(crate) fn step(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    match code[0] {
        // One thread runs at a time, and what it writes is there: fences have nothing to do.
        "fence" | "membar" | "setmaxnreg" | "griddepcontrol" => Ok(Step::Compute(Box::new(|_, _| ()))),
        "nanosleep" => Ok(Step::Act(Box::new(|_, _, _| Ok(Then::Next)))),
        "trap" => Ok(Step::Act(Box::new(|_, _, _| Err("the kernel trapped".into())))),
        "bar" | "barrier" if code.get(1) == Some(&"warp") => {
            let members = builder.source(&args[0])?;
            Ok(Step::Together(Some(members), Box::new(|_, _, _| Ok(Then::Next))))
        }
        "bar" | "barrier" => block_barrier(builder, code, args),
        "shfl" => shuffle(builder, code, args),
        "vote" => vote(builder, code, args),
        "activemask" => {
            let d = target(&args[0])?;
            Ok(Step::Compute(Box::new(move |r, m| r.put(d, m, &[m; 32]))))
        }
        "elect" => elect(builder, args),
        "redux" => reduce(builder, code, args),
        "mbarrier" => mbarrier(builder, code, args),
        _ => Err("the instruction is not known".into()),
    }
}

fn block_barrier(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    let waits = match code.iter().find(|part| matches!(**part, "sync" | "arrive" | "red")) {
        Some(&"sync") => true,
        Some(&"arrive") => false,
        other => return Err(format!("a barrier's {other:?} is not known")),
    };
    let id = builder.source(&args[0])?;
    let count = args.get(1).map(|count| builder.source(count)).transpose()?;
    Ok(Step::Act(Box::new(move |w, b, m| {
        let lane = m.trailing_zeros() as usize;
        let id = w.registers.get(id)[lane] as usize;
        let count = count.map_or(0, |count| w.registers.get(count)[lane]);
        let done = b.arrive(id, count, m.count_ones())?;
        Ok(if done || !waits { Then::Next } else { Then::Wait(id) })
    })))
}

fn shuffle(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    let (d, p) = match &args[0] {
        Arg::Both(d, p) => (target(d)?, Some(target_predicate(p)?)),
        d => (target(d)?, None),
    };
    let (a, by, bound) = (builder.source(&args[1])?, builder.source(&args[2])?, builder.source(&args[3])?);
    let members = builder.source(&args[4])?;
    let how = ["idx", "up", "down", "bfly"].into_iter().find(|how| code.contains(how)).ok_or("no mode")?;
    let run: Act = Box::new(move |w, _, m| {
        let r = &mut w.registers;
        let (x, by, bound) = (*r.get(a), *r.get(by), *r.get(bound));
        let (mut out, mut within) = ([0; 32], 0u32);
        for l in lanes(m) {
            let (clamp, segment) = ((bound[l] & 31) as i32, (bound[l] >> 8 & 31) as i32);
            let (lane, by) = (l as i32, (by[l] & 31) as i32);
            let (low, high) = (lane & segment, lane & segment | clamp & !segment);
            let (from, valid) = match how {
                "idx" => (low | by & !segment, (low | by & !segment) <= high),
                "up" => (lane - by, lane - by >= high),
                "down" => (lane + by, lane + by <= high),
                _ => (lane ^ by, (lane ^ by) <= high),
            };
            let from = if valid { from as usize } else { l };
            if m >> from & 1 == 0 {
                return Err(format!("lane {l} reads lane {from}, which is not there"));
            }
            out[l] = x[from];
            within |= u32::from(valid) << l;
        }
        r.put(d, m, &out);
        if let Some(p) = p {
            r.put_predicate(p, m, within);
        }
        Ok(Then::Next)
    });
    Ok(Step::Together(Some(members), run))
}

fn vote(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    let &Arg::Pred(p, negated) = &args[1] else { return Err("expected a predicate".into()) };
    let members = builder.source(&args[2])?;
    let run: Act = if code.contains(&"ballot") {
        let d = target(&args[0])?;
        Box::new(move |w, _, m| {
            let all = w.registers.holds(p, negated) & m;
            w.registers.put(d, m, &[all; 32]);
            Ok(Then::Next)
        })
    } else {
        let d = target_predicate(&args[0])?;
        let how: fn(u32, u32) -> bool = match code.iter().find(|part| matches!(**part, "any" | "all" | "uni")) {
            Some(&"any") => |x, _| x != 0,
            Some(&"all") => |x, m| x == m,
            _ => |x, m| x == m || x == 0,
        };
        Box::new(move |w, _, m| {
            let x = w.registers.holds(p, negated) & m;
            w.registers.put_predicate(d, m, if how(x, m) { u32::MAX } else { 0 });
            Ok(Then::Next)
        })
    };
    Ok(Step::Together(Some(members), run))
}

fn elect(builder: &mut Builder, args: &[Arg]) -> Result<Step, Error> {
    let (d, p) = match &args[0] {
        Arg::Both(d, p) if **d == Arg::Nothing => (None, target_predicate(p)?),
        Arg::Both(d, p) => (Some(target(d)?), target_predicate(p)?),
        other => return Err(format!("expected a register and a predicate, got {other:?}")),
    };
    let members = builder.source(&args[1])?;
    let run: Act = Box::new(move |w, _, m| {
        let first = m.trailing_zeros();
        w.registers.put_predicate(p, m, 1 << first);
        if let Some(d) = d {
            w.registers.put(d, m, &[first; 32]);
        }
        Ok(Then::Next)
    });
    Ok(Step::Together(Some(members), run))
}

fn reduce(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    let (d, a, members) = (target(&args[0])?, builder.source(&args[1])?, builder.source(&args[2])?);
    let signed = code.contains(&"s32");
    let f: fn(u32, u32) -> u32 =
        match code.iter().find(|part| matches!(**part, "add" | "min" | "max" | "and" | "or" | "xor")) {
            Some(&"add") => u32::wrapping_add,
            Some(&"min") if signed => |x, y| (x as i32).min(y as i32) as u32,
            Some(&"max") if signed => |x, y| (x as i32).max(y as i32) as u32,
            Some(&"min") => u32::min,
            Some(&"max") => u32::max,
            Some(&"and") => |x, y| x & y,
            Some(&"or") => |x, y| x | y,
            Some(&"xor") => |x, y| x ^ y,
            _ => return Err("the reduction is not known".into()),
        };
    let run: Act = Box::new(move |w, _, m| {
        let x = *w.registers.get(a);
        let all = lanes(m).map(|l| x[l]).reduce(f).unwrap_or(0);
        w.registers.put(d, m, &[all; 32]);
        Ok(Then::Next)
    });
    Ok(Step::Together(Some(members), run))
}

fn mbarrier(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    if !matches!(space_of(code), Space::Shared | Space::Generic) {
        return Err("an mbarrier lies in shared memory".into());
    }
    let run: Act = match code[1] {
        "init" => {
            let (at, count) = (Address::of(builder, &args[0])?, builder.source(&args[1])?);
            Box::new(move |w, b, m| {
                for l in lanes(m) {
                    b.mbarrier(in_shared(at.at(&w.registers, l)))?.init(w.registers.get(count)[l])?;
                }
                Ok(Then::Next)
            })
        }
        "inval" => Box::new(|_, _, _| Ok(Then::Next)),
        "expect_tx" => {
            let (at, bytes) = (Address::of(builder, &args[0])?, builder.source(&args[1])?);
            Box::new(move |w, b, m| {
                for l in lanes(m) {
                    b.mbarrier(in_shared(at.at(&w.registers, l)))?.expect(w.registers.get(bytes)[l])?;
                }
                Ok(Then::Next)
            })
        }
        "arrive" => return arrive(builder, code, args).map(Step::Act),
        "try_wait" | "test_wait" => {
            let (p, at) = (target_predicate(&args[0])?, Address::of(builder, &args[1])?);
            let by_parity = code.contains(&"parity");
            let phase: Slot = if by_parity { builder.source(&args[2])? } else { builder.source64(&args[2])? };
            let tries = code[1] == "try_wait";
            Box::new(move |w, b, m| {
                let mut passed = 0;
                for l in lanes(m) {
                    let parity = if by_parity { w.registers.get(phase)[l] } else { w.registers.get64(phase)[l] as u32 };
                    passed |= u32::from(b.mbarrier(in_shared(at.at(&w.registers, l)))?.passed(parity)?) << l;
                }
                if tries && passed != m {
                    return Ok(Then::Again);
                }
                w.registers.put_predicate(p, m, passed);
                Ok(if passed == m { Then::Next } else { Then::Yield })
            })
        }
        _ => return Err("the instruction is not known".into()),
    };
    Ok(Step::Act(run))
}

fn arrive(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let state = match &args[0] {
        Arg::Nothing => None,
        // Without a state the address comes first.
        Arg::Address(..) => return Err("an arrival without a state is not known".into()),
        d => Some(target64(d)?),
    };
    let at = Address::of(builder, &args[1])?;
    let number = args.get(2).map(|number| builder.source(number)).transpose()?;
    let expects = code.contains(&"expect_tx");
    Ok(Box::new(move |w, b, m| {
        let mut out = [0; 32];
        for l in lanes(m) {
            let number = number.map(|number| w.registers.get(number)[l]);
            let barrier = b.mbarrier(in_shared(at.at(&w.registers, l)))?;
            out[l] = barrier.parity().into();
            if expects {
                barrier.expect(number.unwrap_or(0))?;
                barrier.arrive(1)?;
            } else {
                barrier.arrive(number.unwrap_or(1))?;
            }
        }
        if let Some(d) = state {
            w.registers.put64(d, m, &out);
        }
        Ok(Then::Next)
    }))
}
