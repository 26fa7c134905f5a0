//! Products of matrices of a warp, and how they come to registers. PTX ISA, "Warp Level Matrix Instructions". Sums are f32 in the order of the inner dimension; a GPU's order and the bits that it
//! cuts are not told.

use super::arithmetic::fragment;
use super::block::Block;
use super::code::{Act, Builder, Step, Then, list, target};
use super::memory::{Address, place, space_of};
use super::numbers::{Kind, from_bf16, from_f16};
use super::registers::{Lanes, Registers};
use super::warp::Warp;
use crate::ptx::{Arg, Error, Slot, Space};

/// An instruction on matrices.
pub(crate) fn step(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Step, Error> {
    let run: Act = match (code[0], code[1]) {
        ("ldmatrix", _) => load_matrix(builder, code, args)?,
        ("stmatrix", _) => store_matrix(builder, code, args)?,
        ("mma", _) => mma(builder, code, args)?,
        ("wmma", "load") => load_fragment(builder, code, args)?,
        ("wmma", "store") => store_fragment(builder, code, args)?,
        ("wmma", "mma") => multiply_fragments(builder, code, args)?,
        ("wgmma", "fence") => Box::new(|_, _, _| Ok(Then::Next)),
        ("wgmma", "commit_group") => Box::new(|w: &mut Warp, _: &mut Block, _| {
            w.products.close();
            Ok(Then::Next)
        }),
        ("wgmma", "wait_group") => {
            let Arg::Int(left) = args[0] else { return Err("expected a count".into()) };
            Box::new(move |w, b, _| {
                for product in w.products.take(left as usize) {
                    product.run(w, b)?;
                }
                Ok(Then::Next)
            })
        }
        ("wgmma", "mma_async") => super::warpgroup::start(builder, code, args)?,
        _ => return Err("the instruction is not known".into()),
    };
    Ok(Step::Together(None, run))
}

pub(super) fn targets(arg: &Arg) -> Result<Vec<Slot>, Error> {
    list(arg).iter().map(target).collect()
}

/// The 8×8 matrices of 16-bit elements whose rows the lanes name, 8 after 8.
fn rows_of(w: &mut Warp, b: &mut Block, at: Address, count: usize) -> Result<Vec<[*mut u16; 8]>, Error> {
    (0..count)
        .map(|matrix| {
            let mut rows = [std::ptr::null_mut(); 8];
            for (row, to) in rows.iter_mut().enumerate() {
                let lane = 8 * matrix + row;
                *to = place(w, b, Space::Shared, lane, at.at(&w.registers, lane), 16)?.cast();
            }
            Ok(rows)
        })
        .collect()
}

fn matrix_count(code: &[&str]) -> usize {
    if code.contains(&"x4") {
        4
    } else if code.contains(&"x2") {
        2
    } else {
        1
    }
}

fn load_matrix(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let (d, at) = (targets(&args[0])?, Address::of(builder, &args[1])?);
    let (count, transposed) = (matrix_count(code), code.contains(&"trans"));
    Ok(Box::new(move |w, b, m| {
        let all = rows_of(w, b, at, count)?;
        for (rows, &d) in all.iter().zip(&d) {
            let out = std::array::from_fn(|l| {
                let (x, y) = (l / 4, 2 * (l % 4));
                // SAFETY: `rows_of` checked 16 bytes a row.
                let read = |row: usize, column: usize| u32::from(unsafe { rows[row].add(column).read() });
                if transposed { read(y, x) | read(y + 1, x) << 16 } else { read(x, y) | read(x, y + 1) << 16 }
            });
            w.registers.put(d, m, &out);
        }
        Ok(Then::Next)
    }))
}

fn store_matrix(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let (at, s) = (Address::of(builder, &args[0])?, fragment(builder, &args[1])?);
    let (count, transposed) = (matrix_count(code), code.contains(&"trans"));
    Ok(Box::new(move |w, b, _| {
        let all = rows_of(w, b, at, count)?;
        for (rows, &s) in all.iter().zip(&s) {
            let from = w.registers.get(s);
            for (l, &pair) in from.iter().enumerate() {
                let (x, y) = (l / 4, 2 * (l % 4));
                // SAFETY: `rows_of` checked 16 bytes a row.
                let write =
                    |row: usize, column: usize, value: u32| unsafe { rows[row].add(column).write(value as u16) };
                for (z, half) in [pair, pair >> 16].into_iter().enumerate() {
                    if transposed { write(y + z, x, half) } else { write(x, y + z, half) }
                }
            }
        }
        Ok(Then::Next)
    }))
}

/// What a register of two elements holds.
fn pair(kind: Kind, x: u32) -> [f32; 2] {
    match kind {
        Kind::F16 => [from_f16(x), from_f16(x >> 16)],
        _ => [from_bf16(x), from_bf16(x >> 16)],
    }
}

pub(super) fn element_of(code: &[&str]) -> Option<Kind> {
    code.iter().find_map(|part| match *part {
        "f16" => Some(Kind::F16),
        "bf16" => Some(Kind::Bf16),
        _ => None,
    })
}

/// The A operand of `m16n8k16`, from four registers.
pub(super) fn operand_a(kind: Kind, a: [&Lanes<u32>; 4]) -> [[f32; 16]; 16] {
    let mut out = [[0.0; 16]; 16];
    for l in 0..32 {
        for (x, a) in a.iter().enumerate() {
            let (row, column) = (l / 4 + 8 * (x % 2), 2 * (l % 4) + 8 * (x / 2));
            [out[row][column], out[row][column + 1]] = pair(kind, a[l]);
        }
    }
    out
}

fn mma(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let d: [Slot; 4] = targets(&args[0])?.try_into().map_err(|_| "expected 4 sums")?;
    let a: [Slot; 4] = fragment(builder, &args[1])?.try_into().map_err(|_| "expected 4 registers")?;
    let b: [Slot; 2] = fragment(builder, &args[2])?.try_into().map_err(|_| "expected 2 registers")?;
    let c: [Slot; 4] = fragment(builder, &args[3])?.try_into().map_err(|_| "expected 4 sums")?;
    let tf32 = code.contains(&"m16n8k8") && code.contains(&"tf32");
    let kind = element_of(code);
    let halves = code.contains(&"m16n8k16") && kind.is_some() && code[code.len() - 4] == "f32";
    if !tf32 && !halves {
        return Err("the product is not known".into());
    }
    Ok(Box::new(move |w, _, m| {
        let r = &mut w.registers;
        let (mut left, mut right) = ([[0.0; 16]; 16], [[0.0; 8]; 16]);
        let depth = if tf32 { 8 } else { 16 };
        if tf32 {
            let cut = |x: u32| f32::from_bits(x & !0x1fff);
            for l in 0..32 {
                let (g, t) = (l / 4, l % 4);
                for x in 0..4 {
                    left[g + 8 * (x % 2)][t + 4 * (x / 2)] = cut(r.get(a[x])[l]);
                }
                for x in 0..2 {
                    right[t + 4 * x][g] = cut(r.get(b[x])[l]);
                }
            }
        } else if let Some(kind) = kind {
            left = operand_a(kind, a.map(|a| r.get(a)));
            for l in 0..32 {
                for (x, &b) in b.iter().enumerate() {
                    let row = 2 * (l % 4) + 8 * x;
                    [right[row][l / 4], right[row + 1][l / 4]] = pair(kind, r.get(b)[l]);
                }
            }
        }
        let mut sums = [[0.0f32; 8]; 16];
        for l in 0..32 {
            for x in 0..4 {
                sums[l / 4 + 8 * (x / 2)][2 * (l % 4) + x % 2] = f32::from_bits(r.get(c[x])[l]);
            }
        }
        for (sums, left) in sums.iter_mut().zip(&left) {
            for (x, right) in left.iter().zip(&right).take(depth) {
                for (sum, y) in sums.iter_mut().zip(right) {
                    *sum += x * y;
                }
            }
        }
        for x in 0..4 {
            r.put(d[x], m, &std::array::from_fn(|l| number(sums[l / 4 + 8 * (x / 2)][2 * (l % 4) + x % 2])));
        }
        Ok(Then::Next)
    }))
}

/// NaN as the hardware writes it.
pub(super) fn number(x: f32) -> u32 {
    if x.is_nan() { 0x7fff_ffff } else { x.to_bits() }
}

/// Where element `(row, column)` of a 16×16 fragment of `wmma` is: lane and number. Which one holds what is not told by PTX,
/// so that no kernel may ask.
fn in_fragment(row: usize, column: usize) -> (usize, usize) {
    let at = 16 * row + column;
    (at / 8, at % 8)
}

/// Whether rows lie behind one another, and the shape.
fn fragment_layout(code: &[&str]) -> Result<bool, Error> {
    if !code.contains(&"m16n16k16") {
        return Err("expected m16n16k16".into());
    }
    Ok(code.contains(&"row"))
}

fn load_fragment(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let (d, at, stride) = (targets(&args[0])?, Address::of(builder, &args[1])?, builder.source(&args[2])?);
    let (by_rows, space) = (fragment_layout(code)?, space_of(code));
    let wide = code.last() == Some(&"f32");
    Ok(Box::new(move |w, b, m| {
        let stride = w.registers.get(stride)[0] as usize;
        let size = if wide { 4 } else { 2 };
        let mut out = [[0u32; 32]; 8];
        for row in 0..16 {
            for column in 0..16 {
                let offset = if by_rows { row * stride + column } else { column * stride + row };
                let from = place(w, b, space, 0, at.at(&w.registers, 0) + (offset * size) as u64, size)?;
                let (lane, x) = in_fragment(row, column);
                // SAFETY: `place` checked as many bytes.
                unsafe {
                    if wide {
                        out[x][lane] = from.cast::<u32>().read();
                    } else {
                        out[x / 2][lane] |= u32::from(from.cast::<u16>().read()) << (16 * (x % 2));
                    }
                }
            }
        }
        for (d, out) in d.iter().zip(&out) {
            w.registers.put(*d, m, out);
        }
        Ok(Then::Next)
    }))
}

fn store_fragment(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let (at, s, stride) = (Address::of(builder, &args[0])?, fragment(builder, &args[1])?, builder.source(&args[2])?);
    let (by_rows, space) = (fragment_layout(code)?, space_of(code));
    if code.last() != Some(&"f32") {
        return Err("only sums of f32 are known".into());
    }
    Ok(Box::new(move |w, b, _| {
        let stride = w.registers.get(stride)[0] as usize;
        for row in 0..16 {
            for column in 0..16 {
                let offset = if by_rows { row * stride + column } else { column * stride + row };
                let to = place(w, b, space, 0, at.at(&w.registers, 0) + 4 * offset as u64, 4)?;
                let (lane, x) = in_fragment(row, column);
                // SAFETY: `place` checked four bytes.
                unsafe { to.cast::<u32>().write(w.registers.get(s[x])[lane]) };
            }
        }
        Ok(Then::Next)
    }))
}

fn multiply_fragments(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    fragment_layout(code)?;
    let (d, a, b, c) =
        (targets(&args[0])?, fragment(builder, &args[1])?, fragment(builder, &args[2])?, fragment(builder, &args[3])?);
    // Products of f16 name the types of sums alone.
    let kind = if code.contains(&"bf16") { Kind::Bf16 } else { Kind::F16 };
    if code.contains(&"f16") || d.len() != 8 {
        return Err("only sums of f32 are known".into());
    }
    Ok(Box::new(move |w, _, m| {
        let r = &mut w.registers;
        let element = |r: &Registers, from: &[Slot], row: usize, column: usize| {
            let (lane, x) = in_fragment(row, column);
            pair(kind, r.get(from[x / 2])[lane])[x % 2]
        };
        let mut out = [[0u32; 32]; 8];
        for row in 0..16 {
            let left: [f32; 16] = std::array::from_fn(|x| element(r, &a, row, x));
            for column in 0..16 {
                let (lane, x) = in_fragment(row, column);
                let mut sum = f32::from_bits(r.get(c[x])[lane]);
                for (z, left) in left.iter().enumerate() {
                    sum += left * element(r, &b, z, column);
                }
                out[x][lane] = number(sum);
            }
        }
        for (d, out) in d.iter().zip(&out) {
            r.put(*d, m, out);
        }
        Ok(Then::Next)
    }))
}
