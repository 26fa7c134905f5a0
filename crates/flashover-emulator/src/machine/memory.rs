//! Loads, stores and atomic operations. PTX ISA, "Data Movement and Conversion Instructions: ld, st, cvta" and "Parallel
//! Synchronization and Communication Instructions: atom, red".

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use super::block::Block;
use super::code::{Act, Builder, Given, LOCAL_WINDOW, PARAM_WINDOW, SHARED_WINDOW, Step, Then, list, target, target64};
use super::numbers::Kind;
use super::registers::{Lanes, Registers, lanes};
use super::warp::Warp;
use crate::ptx::{Arg, Error, Slot, Space};

/// An address: a register, 0 if none, and what is added.
#[derive(Clone, Copy)]
pub(crate) struct Address {
    base: Base,
    offset: u64,
}

#[derive(Clone, Copy)]
enum Base {
    None,
    Reg32(Slot),
    Reg64(Slot),
}

impl Address {
    pub(crate) fn of(builder: &mut Builder, arg: &Arg) -> Result<Address, Error> {
        let (base, offset) = match arg {
            Arg::Address(base, offset) => (&**base, *offset as u64),
            other => (other, 0),
        };
        Ok(match base {
            Arg::Reg32(slot) => Address { base: Base::Reg32(*slot), offset },
            Arg::Reg64(slot) => Address { base: Base::Reg64(*slot), offset },
            Arg::Variable(..) => Address { base: Base::None, offset: builder.address_of(base)?.wrapping_add(offset) },
            Arg::Int(x) => Address { base: Base::None, offset: (*x as u64).wrapping_add(offset) },
            other => return Err(format!("an address of {other:?}")),
        })
    }

    #[inline(always)]
    pub(crate) fn at(&self, r: &Registers, lane: usize) -> u64 {
        match self.base {
            Base::None => self.offset,
            Base::Reg32(slot) => u64::from(r.get(slot)[lane].wrapping_add(self.offset as u32)),
            Base::Reg64(slot) => r.get64(slot)[lane].wrapping_add(self.offset),
        }
    }
}

/// The space that an opcode names.
pub(crate) fn space_of(code: &[&str]) -> Space {
    let named = code.iter().find_map(|part| match part.split("::").next() {
        Some("global") => Some(Space::Global),
        Some("shared") => Some(Space::Shared),
        Some("local") => Some(Space::Local),
        Some("param") => Some(Space::Param),
        _ => None,
    });
    named.unwrap_or(Space::Generic)
}

/// An address within shared memory, whichever way it is written.
pub(crate) fn in_shared(at: u64) -> u64 {
    at.checked_sub(SHARED_WINDOW).unwrap_or(at)
}

/// Where bytes lie in this program's memory.
#[inline(always)]
pub(crate) fn place(
    w: &mut Warp,
    b: &mut Block,
    space: Space,
    lane: usize,
    at: u64,
    len: usize,
) -> Result<*mut u8, Error> {
    if !at.is_multiple_of(len as u64) {
        return Err(format!("the address {at:#x} is not a multiple of {len}"));
    }
    match space {
        Space::Global => b.global(at, len),
        Space::Shared => b.shared(at, len),
        Space::Local => w.local(lane, at, len),
        Space::Param => b.param(at, len),
        Space::Generic if at >= PARAM_WINDOW => b.param(at - PARAM_WINDOW, len),
        Space::Generic if at >= LOCAL_WINDOW => w.local(lane, at - LOCAL_WINDOW, len),
        Space::Generic if at >= SHARED_WINDOW => b.shared(at - SHARED_WINDOW, len),
        Space::Generic => b.global(at, len),
    }
}

/// Instructions on memory.
pub(crate) fn step(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    match code[0] {
        "ld" | "ldu" => load(builder, code, args).map(Step::Act),
        "st" => store(builder, code, args).map(Step::Act),
        "atom" | "red" => atomic(builder, code, args).map(Step::Act),
        "cvta" => convert_address(builder, code, args),
        "prefetch" => Ok(Step::Compute(Box::new(|_, _| ()))),
        _ => Err("the instruction is not known".into()),
    }
}

fn convert_address(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    let window = match space_of(code) {
        Space::Shared => SHARED_WINDOW,
        Space::Local => LOCAL_WINDOW,
        Space::Param => PARAM_WINDOW,
        _ => 0,
    };
    let to_space = code[1] == "to";
    let (d, a) = (target64(&args[0])?, builder.source64(&args[1])?);
    Ok(Step::Compute(Box::new(move |r, m| {
        let x = r.get64(a);
        let out = std::array::from_fn(|l| if to_space { x[l].wrapping_sub(window) } else { x[l] + window });
        r.put64(d, m, &out);
    })))
}

fn vector(code: &[&str]) -> usize {
    if code.contains(&"v2") {
        2
    } else if code.contains(&"v4") {
        4
    } else if code.contains(&"v8") {
        8
    } else {
        1
    }
}

/// Whether others may write meanwhile, so that the warp lets them.
fn watches(code: &[&str]) -> bool {
    ["acquire", "relaxed", "volatile"].iter().any(|how| code.contains(how))
}

enum To {
    Narrow(Slot),
    Wide(Slot),
    Nowhere,
}

fn load(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let kind = code.last().and_then(|ty| Kind::of(ty)).ok_or("no type")?;
    let size = kind.bits() as usize / 8;
    let parts = list(&args[0]);
    let count = vector(code);
    if parts.len() != count {
        return Err(format!("expected {count} registers"));
    }
    let to = parts.iter().map(|part| match part {
        Arg::Nothing => Ok(To::Nowhere),
        Arg::Reg64(_) => target64(part).map(To::Wide),
        _ => target(part).map(To::Narrow),
    });
    let to = to.collect::<Result<Vec<_>, _>>()?;
    let (space, from, watched) = (space_of(code), Address::of(builder, &args[1])?, watches(code));
    let signed = matches!(kind, Kind::Signed(_));
    Ok(Box::new(move |w, b, m| {
        let mut out: [Lanes<u64>; 8] = [[0; 32]; 8];
        for l in lanes(m) {
            let at = place(w, b, space, l, from.at(&w.registers, l), size * count)?;
            for (x, out) in out[..count].iter_mut().enumerate() {
                // SAFETY: `place` gave memory of `size * count` bytes, aligned to them.
                let read = unsafe {
                    match size {
                        1 => at.add(x).read().into(),
                        2 => at.add(2 * x).cast::<u16>().read().into(),
                        4 if watched => AtomicU32::from_ptr(at.add(4 * x).cast()).load(Ordering::Acquire).into(),
                        4 => at.add(4 * x).cast::<u32>().read().into(),
                        _ => at.add(8 * x).cast::<u64>().read(),
                    }
                };
                let empty = 64 - 8 * size as u32;
                out[l] = if signed { ((read << empty) as i64 >> empty) as u64 } else { read };
            }
        }
        for (to, out) in to.iter().zip(&out) {
            match *to {
                To::Narrow(d) => w.registers.put(d, m, &out.map(|x| x as u32)),
                To::Wide(d) => w.registers.put64(d, m, out),
                To::Nowhere => {}
            }
        }
        Ok(if watched { Then::Yield } else { Then::Next })
    }))
}

/// Where values come from.
#[derive(Clone, Copy)]
enum From {
    Narrow(Slot),
    Wide(Slot),
}

impl From {
    fn of(builder: &mut Builder, arg: &Arg, bits: u32) -> Result<From, Error> {
        match arg {
            Arg::Reg64(slot) => Ok(From::Wide(*slot)),
            _ if bits == 64 => builder.source64(arg).map(From::Wide),
            _ => builder.source(arg).map(From::Narrow),
        }
    }

    fn at(self, r: &Registers, lane: usize) -> u64 {
        match self {
            From::Narrow(slot) => r.get(slot)[lane].into(),
            From::Wide(slot) => r.get64(slot)[lane],
        }
    }
}

fn store(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let kind = code.last().and_then(|ty| Kind::of(ty)).ok_or("no type")?;
    let size = kind.bits() as usize / 8;
    let count = vector(code);
    let from = list(&args[1]).iter().map(|arg| From::of(builder, arg, kind.bits()));
    let from = from.collect::<Result<Vec<_>, _>>()?;
    if from.len() != count {
        return Err(format!("expected {count} registers"));
    }
    let (space, to) = (space_of(code), Address::of(builder, &args[0])?);
    Ok(Box::new(move |w, b, m| {
        for l in lanes(m) {
            let at = place(w, b, space, l, to.at(&w.registers, l), size * count)?;
            for (x, from) in from.iter().enumerate() {
                let value = from.at(&w.registers, l);
                // SAFETY: `place` gave memory of `size * count` bytes, aligned to them.
                unsafe {
                    match size {
                        1 => at.add(x).write(value as u8),
                        2 => at.add(2 * x).cast::<u16>().write(value as u16),
                        4 => AtomicU32::from_ptr(at.add(4 * x).cast()).store(value as u32, Ordering::Release),
                        _ => at.add(8 * x).cast::<u64>().write(value),
                    }
                }
            }
        }
        Ok(Then::Next)
    }))
}

/// The old value becomes the new.
fn update(at: *mut u8, wide: bool, f: impl Fn(u64) -> u64) -> u64 {
    // SAFETY: `at` comes from `place`, for as many bytes.
    unsafe {
        if wide {
            let all = AtomicU64::from_ptr(at.cast());
            all.fetch_update(Ordering::AcqRel, Ordering::Acquire, |x| Some(f(x))).unwrap_or_else(|x| x)
        } else {
            let all = AtomicU32::from_ptr(at.cast());
            let set = |x: u32| Some(f(x.into()) as u32);
            all.fetch_update(Ordering::AcqRel, Ordering::Acquire, set).unwrap_or_else(|x| x).into()
        }
    }
}

/// Adds a float to one in global memory.
pub(crate) fn add_float(at: *mut u8, x: f32) {
    update(at, false, |old| (f32::from_bits(old as u32) + x).to_bits().into());
}

fn atomic(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let kind = code.iter().rev().find_map(|part| Kind::of(part)).ok_or("no type")?;
    let (wide, size, count) = (kind.bits() == 64, kind.bits() as usize / 8, vector(code));
    let gives = code[0] == "atom";
    let names = ["add", "cas", "exch", "min", "max", "and", "or", "xor", "inc"];
    let operation = names.into_iter().find(|name| code.contains(name)).ok_or("the operation is not known")?;
    let (address, rest) = (&args[usize::from(gives)], &args[usize::from(gives) + 1..]);
    let (space, to) = (space_of(code), Address::of(builder, address)?);
    let from = list(&rest[0]).iter().map(|arg| From::of(builder, arg, kind.bits())).collect::<Result<Vec<_>, _>>()?;
    let other = rest.get(1).map(|arg| From::of(builder, arg, kind.bits())).transpose()?;
    let d = match (gives, &args[0]) {
        (false, _) | (_, Arg::Nothing) => None,
        (true, d) if wide => Some(From::Wide(target64(d)?)),
        (true, d) => Some(From::Narrow(target(d)?)),
    };
    let combine = move |old: u64, x: u64, y: u64| match (operation, kind) {
        ("add", Kind::F32) => (f32::from_bits(old as u32) + f32::from_bits(x as u32)).to_bits().into(),
        ("add", _) => old.wrapping_add(x),
        ("cas", _) => {
            if old == x {
                y
            } else {
                old
            }
        }
        ("exch", _) => x,
        ("min", Kind::Signed(32)) => (old as i32).min(x as i32) as u32 as u64,
        ("max", Kind::Signed(32)) => (old as i32).max(x as i32) as u32 as u64,
        ("min", _) => old.min(x),
        ("max", _) => old.max(x),
        ("and", _) => old & x,
        ("or", _) => old | x,
        ("xor", _) => old ^ x,
        _ => {
            if old >= x {
                0
            } else {
                old + 1
            }
        }
    };
    if kind.is_float() && !(kind == Kind::F32 && operation == "add") {
        return Err("this operation on floats is not known".into());
    }
    Ok(Box::new(move |w, b, m| {
        let mut out = [0; 32];
        for l in lanes(m) {
            let at = place(w, b, space, l, to.at(&w.registers, l), size * count)?;
            let other = other.map_or(0, |other| other.at(&w.registers, l));
            for (x, from) in from.iter().enumerate() {
                let value = from.at(&w.registers, l);
                // SAFETY: within the bytes that `place` gave.
                out[l] = update(unsafe { at.add(size * x) }, wide, |old| combine(old, value, other));
            }
        }
        match d {
            Some(From::Wide(d)) => w.registers.put64(d, m, &out),
            Some(From::Narrow(d)) => w.registers.put(d, m, &out.map(|x| x as u32)),
            None => {}
        }
        Ok(Then::Next)
    }))
}

/// What the machine puts into a register before a warp starts.
pub(crate) fn give(r: &mut Registers, what: Given, slot: Slot, block: [u32; 3], launch: &super::Launch, warp: u32) {
    let size = launch.block;
    let thread = |l: usize, dimension: usize| {
        let x = warp * 32 + l as u32;
        [x % size[0], x / size[0] % size[1], x / size[0] / size[1]][dimension]
    };
    let narrow: Lanes<u32> = match what {
        Given::Bits64(x) => {
            *r.at64(slot) = [x; 32];
            return;
        }
        Given::Bits32(x) => [x; 32],
        Given::Thread(d) => std::array::from_fn(|l| thread(l, d)),
        Given::Threads(d) => [size[d]; 32],
        Given::Block(d) => [block[d]; 32],
        Given::Blocks(d) => [launch.grid[d]; 32],
        Given::Lane => std::array::from_fn(|l| l as u32),
        Given::Warp => [warp; 32],
        Given::LanesBelow => std::array::from_fn(|l| (1u32 << l) - 1),
        Given::SharedSize => [launch.dynamic_shared as u32; 32],
    };
    *r.at(slot) = narrow;
}
