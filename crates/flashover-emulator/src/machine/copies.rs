//! Copies that threads start and wait for later. PTX ISA, "Asynchronous copy" and "cp.async.bulk". What a thread started is
//! carried out as late as it may be, so that who does not wait sees it.

use super::block::{Block, Load};
use super::code::{Act, Builder, Step, Then};
use super::memory::{Address, add_float, in_shared, place};
use super::registers::lanes;
use super::warp::{Bulk, Copy, Warp};
use crate::ptx::{Arg, Error, Space};
use crate::tensor_map::TensorMap;

/// A `cp` instruction.
pub(crate) fn step(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    let run = match (code[1], code.get(2).copied(), code.get(3).copied()) {
        ("async", Some("bulk"), Some("tensor")) => tensor(builder, code, args)?,
        ("async", Some("bulk"), Some("commit_group")) => each(|w, _, l| {
            w.bulk[l].close();
            Ok(())
        }),
        ("async", Some("bulk"), Some("wait_group")) => {
            let left = count(&args[0])?;
            each(move |w, b, l| {
                let all = w.bulk[l].take(left);
                write(b, all)
            })
        }
        ("async", Some("bulk"), _) if code.iter().any(|part| part.starts_with("mbarrier")) => row(builder, args)?,
        ("async", Some("bulk"), _) => bulk(builder, args, false)?,
        ("reduce", ..) if code.ends_with(&["add", "f32"]) => bulk(builder, args, true)?,
        ("async", Some("commit_group"), _) => each(|w, _, l| {
            w.copies[l].close();
            Ok(())
        }),
        ("async", Some("wait_group"), _) => {
            let left = count(&args[0])?;
            each(move |w, b, l| {
                let all = w.copies[l].take(left);
                copy(b, all)
            })
        }
        ("async", Some("wait_all"), _) => each(|w, b, l| {
            w.copies[l].close();
            let all = w.copies[l].take(0);
            copy(b, all)
        }),
        ("async", Some("ca" | "cg"), _) => start(builder, args)?,
        _ => return Err("the copy is not known".into()),
    };
    Ok(Step::Act(run))
}

fn count(arg: &Arg) -> Result<usize, Error> {
    match arg {
        Arg::Int(x) => Ok(*x as usize),
        other => Err(format!("expected a count, got {other:?}")),
    }
}

fn each(f: impl Fn(&mut Warp, &mut Block, usize) -> Result<(), Error> + Send + Sync + 'static) -> Act {
    Box::new(move |w, b, m| {
        for l in lanes(m) {
            f(w, b, l)?;
        }
        Ok(Then::Next)
    })
}

fn start(builder: &mut Builder, args: &[Arg]) -> Result<Act, Error> {
    let (to, from, size) = (Address::of(builder, &args[0])?, Address::of(builder, &args[1])?, count(&args[2])?);
    let read = args.get(3).map(|read| builder.source(read)).transpose()?;
    Ok(each(move |w, b, l| {
        let read = read.map_or(size, |read| w.registers.get(read)[l] as usize);
        let (to, from) = (in_shared(to.at(&w.registers, l)), from.at(&w.registers, l));
        if to % size as u64 != 0 || read > 0 && from % size as u64 != 0 || read > size {
            return Err(format!("a copy of {read} of {size} bytes from {from:#x} to {to:#x}"));
        }
        // Out of bounds is said where it is asked for, not where it is waited for.
        if read > 0 {
            b.global(from, read)?;
        }
        b.shared(to, size)?;
        w.copies[l].open.push(Copy { to, from, size, read });
        Ok(())
    }))
}

fn copy(b: &mut Block, all: Vec<Copy>) -> Result<(), Error> {
    for Copy { to, from, size, read } in all {
        let to = b.shared(to, size)?;
        // SAFETY: `shared` and `global` checked as many bytes.
        unsafe {
            to.write_bytes(0, size);
            if read > 0 {
                std::ptr::copy_nonoverlapping(b.global(from, read)?, to, read);
            }
        }
    }
    Ok(())
}

fn sixteens(to: u64, from: u64, bytes: usize) -> Result<(), Error> {
    if !to.is_multiple_of(16) || !from.is_multiple_of(16) || !bytes.is_multiple_of(16) {
        return Err(format!("a bulk copy of {bytes} bytes from {from:#x} to {to:#x} is not in multiples of 16"));
    }
    Ok(())
}

fn row(builder: &mut Builder, args: &[Arg]) -> Result<Act, Error> {
    let (to, from, bytes) =
        (Address::of(builder, &args[0])?, Address::of(builder, &args[1])?, builder.source(&args[2])?);
    let barrier = Address::of(builder, &args[3])?;
    Ok(each(move |w, b, l| {
        let (to, from) = (in_shared(to.at(&w.registers, l)), from.at(&w.registers, l));
        let bytes = w.registers.get(bytes)[l] as usize;
        sixteens(to, from, bytes)?;
        b.global(from, bytes)?;
        b.shared(to, bytes)?;
        b.loads.push((Load::Row { to, from, bytes }, in_shared(barrier.at(&w.registers, l))));
        Ok(())
    }))
}

fn bulk(builder: &mut Builder, args: &[Arg], adds: bool) -> Result<Act, Error> {
    let (to, from, bytes) =
        (Address::of(builder, &args[0])?, Address::of(builder, &args[1])?, builder.source(&args[2])?);
    Ok(each(move |w, b, l| {
        let (to, from) = (to.at(&w.registers, l), in_shared(from.at(&w.registers, l)));
        let bytes = w.registers.get(bytes)[l] as usize;
        sixteens(to, from, bytes)?;
        b.global(to, bytes)?;
        b.shared(from, bytes)?;
        w.bulk[l].open.push(Bulk { to, from, bytes, adds });
        Ok(())
    }))
}

fn write(b: &mut Block, all: Vec<Bulk>) -> Result<(), Error> {
    for Bulk { to, from, bytes, adds } in all {
        let (to, from) = (b.global(to, bytes)?, b.shared(from, bytes)?);
        if adds {
            for at in (0..bytes).step_by(4) {
                // SAFETY: as many bytes were checked, and both are multiples of 16.
                unsafe { add_float(to.add(at), from.add(at).cast::<f32>().read()) };
            }
        } else {
            // SAFETY: as many bytes were checked.
            unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
        }
    }
    Ok(())
}

fn tensor(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    if !code.iter().any(|part| part.starts_with("mbarrier")) {
        return Err("only loads of tensors are known".into());
    }
    let (to, barrier) = (Address::of(builder, &args[0])?, Address::of(builder, &args[2])?);
    let Arg::Box(map, coordinates) = &args[1] else { return Err("expected a box".into()) };
    let map = Address::of(builder, map)?;
    let coordinates = coordinates.iter().map(|x| builder.source(x)).collect::<Result<Vec<_>, _>>()?;
    Ok(each(move |w, b, l| {
        let at = map.at(&w.registers, l);
        let bytes = place(w, b, Space::Generic, l, at, 64)?;
        place(w, b, Space::Generic, l, at + 64, 64)?;
        // SAFETY: both halves of the map's 128 bytes were checked, and whatever they lie in is in one piece.
        let map = TensorMap::from_bytes(unsafe { &*bytes.cast::<[u8; 128]>() })?;
        let coordinates = coordinates.iter().map(|&x| w.registers.get(x)[l] as i32).collect();
        let to = in_shared(to.at(&w.registers, l));
        b.loads.push((Load::Box { map: Box::new(map), coordinates, to }, in_shared(barrier.at(&w.registers, l))));
        Ok(())
    }))
}

/// Lanes end: what they started comes to pass.
pub(crate) fn finish(w: &mut Warp, b: &mut Block, mask: u32) -> Result<(), Error> {
    for l in lanes(mask) {
        w.bulk[l].close();
        let all = w.bulk[l].take(0);
        write(b, all)?;
        w.copies[l].close();
        let all = w.copies[l].take(0);
        copy(b, all)?;
    }
    Ok(())
}
