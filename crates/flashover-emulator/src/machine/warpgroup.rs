//! Products of a warpgroup: each warp has 16 of its 64 rows, and no more to do with the others. PTX ISA, "Asynchronous
//! Warpgroup Level Matrix Instructions".

use std::sync::Arc;

use super::arithmetic::fragment;
use super::block::Block;
use super::code::{Act, Builder, Then};
use super::matrices::{element_of, number, operand_a, targets};
use super::numbers::{Kind, from_bf16, from_f16};
use super::registers::Lanes;
use super::warp::Warp;
use crate::ptx::{Arg, Error, Slot};

/// A matrix that `wgmma` finds in shared memory.
#[derive(Clone, Copy)]
struct Descriptor {
    start: u64,
    leading: u64,
    stride: u64,
    /// Whether rows of 128 bytes run along the columns of the result, not along the sum.
    transposed: bool,
}

impl Descriptor {
    fn of(x: u64, transposed: bool) -> Result<Descriptor, Error> {
        if x >> 62 != 1 || x >> 49 & 7 != 0 {
            return Err(format!("the matrix {x:#x} is not swizzled by 128 bytes from a multiple of 1024 bytes"));
        }
        let field = |shift: u32| (x >> shift & 0x3fff) << 4;
        Ok(Descriptor { start: field(0), leading: field(16), stride: field(32), transposed })
    }

    /// Element `z` of the sum in row (or column of the result) `x`; PTX ISA, "Shared Memory Matrix Layout", swizzled as
    /// the copy engine does it: bits 4 to 6 of an address are changed by bits 7 to 9.
    fn at(&self, x: u64, z: u64) -> u64 {
        let at = if self.transposed {
            x / 64 * self.leading + z / 8 * self.stride + z % 8 * 128 + x % 64 * 2
        } else {
            x / 8 * self.stride + x % 8 * 128 + z * 2
        };
        let at = self.start + at;
        at ^ (at >> 7 & 7) << 4
    }
}

enum Left {
    Registers(Box<[Lanes<u32>; 4]>),
    Shared(u64, bool),
}

/// A product that was started. It is carried out when it is waited for, with what shared memory holds then.
pub(crate) struct Product {
    kind: Kind,
    columns: usize,
    d: Arc<[Slot]>,
    left: Left,
    right: (u64, bool),
    keeps: bool,
    mask: u32,
}

/// `wgmma.mma_async`
pub(super) fn start(builder: &mut Builder, code: &[&str], args: &[Arg]) -> Result<Act, Error> {
    let kind = element_of(code).ok_or("only f16 and bf16 are known")?;
    let shape =
        code.iter().find(|part| part.starts_with("m64n") && part.ends_with("k16")).ok_or("expected m64nNk16")?;
    let columns: usize = shape[4..shape.len() - 3].parse().map_err(|_| "expected a number of columns")?;
    let d: Arc<[Slot]> = targets(&args[0])?.into();
    if d.len() != columns / 2 {
        return Err(format!("expected {} sums, got {}", columns / 2, d.len()));
    }
    enum From {
        Registers([Slot; 4]),
        Shared(Slot),
    }
    let left = match &args[1] {
        Arg::List(_) => From::Registers(fragment(builder, &args[1])?.try_into().map_err(|_| "expected 4 registers")?),
        a => From::Shared(builder.source64(a)?),
    };
    let right = builder.source64(&args[2])?;
    let &Arg::Pred(keep, negated) = &args[3] else { return Err("expected a predicate".into()) };
    let flag = |x: Option<&Arg>| match x {
        Some(Arg::Int(x @ (0 | 1))) => Ok(*x == 1),
        other => Err(format!("expected 0 or 1, got {other:?}")),
    };
    if !(flag(args.get(4))? && flag(args.get(5))?) {
        return Err("operands are not negated here".into());
    }
    let (left_turned, right_turned) = if matches!(left, From::Shared(_)) {
        (flag(args.get(6))?, flag(args.get(7))?)
    } else {
        (false, flag(args.get(6))?)
    };
    Ok(Box::new(move |w, _, m| {
        if m != u32::MAX {
            return Err(format!("a product of a warpgroup with lanes {m:08x}"));
        }
        let r = &w.registers;
        let left = match left {
            From::Registers(a) => Left::Registers(Box::new(a.map(|a| *r.get(a)))),
            From::Shared(a) => Left::Shared(r.get64(a)[0], left_turned),
        };
        let keeps = r.holds(keep, negated) & 1 != 0;
        let right = (r.get64(right)[0], right_turned);
        w.products.open.push(Product { kind, columns, d: d.clone(), left, right, keeps, mask: m });
        Ok(Then::Next)
    }))
}

impl Product {
    /// The 16 rows that are this warp's.
    pub(super) fn run(self, w: &mut Warp, b: &mut Block) -> Result<(), Error> {
        let Product { kind, columns, d, left, right, keeps, mask } = self;
        let read = |b: &mut Block, at: u64| -> Result<f32, Error> {
            // SAFETY: `shared` checked two bytes.
            let x = unsafe { b.shared(at, 2)?.cast::<u16>().read() }.into();
            Ok(if kind == Kind::F16 { from_f16(x) } else { from_bf16(x) })
        };
        let left = match left {
            Left::Registers(a) => operand_a(kind, [&a[0], &a[1], &a[2], &a[3]]),
            Left::Shared(descriptor, turned) => {
                let descriptor = Descriptor::of(descriptor, turned)?;
                let first = 16 * u64::from(w.number % 4);
                let mut out = [[0.0; 16]; 16];
                for (row, out) in out.iter_mut().enumerate() {
                    for (z, out) in out.iter_mut().enumerate() {
                        *out = read(b, descriptor.at(first + row as u64, z as u64))?;
                    }
                }
                out
            }
        };
        let descriptor = Descriptor::of(right.0, right.1)?;
        let mut right = vec![0.0f32; 16 * columns];
        for (z, row) in right.chunks_exact_mut(columns).enumerate() {
            for (x, out) in row.iter_mut().enumerate() {
                *out = read(b, descriptor.at(x as u64, z as u64))?;
            }
        }
        let mut sums = vec![0.0f32; 16 * columns];
        let place = |l: usize, e: usize| (l / 4 + 8 * (e / 2 % 2)) * columns + 8 * (e / 4) + 2 * (l % 4) + e % 2;
        if keeps {
            for (e, &d) in d.iter().enumerate() {
                for (l, &x) in w.registers.get(d).iter().enumerate() {
                    sums[place(l, e)] = f32::from_bits(x);
                }
            }
        }
        for (sums, left) in sums.chunks_exact_mut(columns).zip(&left) {
            for (x, right) in left.iter().zip(right.chunks_exact(columns)) {
                for (sum, y) in sums.iter_mut().zip(right) {
                    *sum += x * y;
                }
            }
        }
        for (e, &d) in d.iter().enumerate() {
            w.registers.put(d, mask, &std::array::from_fn(|l| number(sums[place(l, e)])));
        }
        Ok(())
    }
}
