//! Numbers of 16 bits, and conversions. PTX ISA, "Data Movement and Conversion Instructions: cvt".

use std::sync::OnceLock;

use half::{bf16, f16};

/// How the bits of a number are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Bits, or an integer without a sign, of so many bits.
    Bits(u32),
    Signed(u32),
    F16,
    Bf16,
    /// Two of them.
    F16x2,
    Bf16x2,
    F32,
    F64,
    Pred,
}

impl Kind {
    /// A type as an opcode names it.
    pub(crate) fn of(name: &str) -> Option<Kind> {
        Some(match name {
            "b8" | "u8" => Kind::Bits(8),
            "b16" | "u16" => Kind::Bits(16),
            "b32" | "u32" => Kind::Bits(32),
            "b64" | "u64" => Kind::Bits(64),
            "s8" => Kind::Signed(8),
            "s16" => Kind::Signed(16),
            "s32" => Kind::Signed(32),
            "s64" => Kind::Signed(64),
            "f16" => Kind::F16,
            "bf16" => Kind::Bf16,
            "f16x2" => Kind::F16x2,
            "bf16x2" => Kind::Bf16x2,
            "f32" => Kind::F32,
            "f64" => Kind::F64,
            "pred" => Kind::Pred,
            _ => return None,
        })
    }

    /// Bits of it.
    pub(crate) fn bits(self) -> u32 {
        match self {
            Kind::Bits(bits) | Kind::Signed(bits) => bits,
            Kind::F16 | Kind::Bf16 => 16,
            Kind::F16x2 | Kind::Bf16x2 | Kind::F32 => 32,
            Kind::F64 => 64,
            Kind::Pred => 1,
        }
    }

    pub(crate) fn is_float(self) -> bool {
        !matches!(self, Kind::Bits(_) | Kind::Signed(_) | Kind::Pred)
    }
}

/// f32 of every f16.
pub(crate) fn f16_table() -> &'static [f32] {
    static TABLE: OnceLock<Vec<f32>> = OnceLock::new();
    TABLE.get_or_init(|| (0..=u16::MAX).map(|x| f16::from_bits(x).to_f32_const()).collect())
}

pub(crate) fn from_f16(x: u32) -> f32 {
    f16_table()[x as usize & 0xffff]
}

pub(crate) fn from_bf16(x: u32) -> f32 {
    f32::from_bits(x << 16)
}

/// NaN is what the hardware makes of it: all bits of the fraction set.
pub(crate) fn to_f16(x: f32) -> u32 {
    if x.is_nan() { 0x7fff } else { f16::from_f32_const(x).to_bits().into() }
}

pub(crate) fn to_bf16(x: f32) -> u32 {
    if x.is_nan() { 0x7fff } else { bf16::from_f32_const(x).to_bits().into() }
}

/// A float of a kind, widened.
pub(crate) fn widen(kind: Kind, x: u64) -> f64 {
    match kind {
        Kind::F16 => from_f16(x as u32).into(),
        Kind::Bf16 => from_bf16(x as u32).into(),
        Kind::F32 => f32::from_bits(x as u32).into(),
        Kind::F64 => f64::from_bits(x),
        _ => unreachable!("{kind:?} is no float"),
    }
}

/// A float rounded to a kind.
pub(crate) fn narrow(kind: Kind, x: f64) -> u64 {
    match kind {
        // Through f32 only where that is exact: its 24 bits are more than twice 11 and 8 and two more.
        Kind::F16 => to_f16(x as f32).into(),
        Kind::Bf16 => to_bf16(x as f32).into(),
        Kind::F32 if x.is_nan() => 0x7fff_ffff,
        Kind::F32 => (x as f32).to_bits().into(),
        Kind::F64 => x.to_bits(),
        _ => unreachable!("{kind:?} is no float"),
    }
}

/// An integer of a kind, with its sign.
pub(crate) fn integer(kind: Kind, x: u64) -> i128 {
    match kind {
        Kind::Signed(bits) => i128::from((x << (64 - bits)) as i64 >> (64 - bits)),
        Kind::Bits(64) => x.into(),
        Kind::Bits(bits) => (x & ((1 << bits) - 1)).into(),
        _ => unreachable!("{kind:?} is no integer"),
    }
}

/// `cvt`: how it rounds to an integer and whether it holds results within the range that has.
pub(crate) fn convert(to: Kind, from: Kind, modes: &[&str], x: u64) -> u64 {
    let has = |mode| modes.contains(&mode);
    match (from.is_float(), to.is_float()) {
        (false, false) => {
            let x = integer(from, x);
            let x = if has("sat") { clamp(to, x) } else { x };
            // Registers wider than the type hold it with its sign.
            mask(to, x as u64)
        }
        (false, true) => {
            let x = integer(from, x);
            match to {
                Kind::F32 if has("rz") => u64::from(toward_zero(x as f64).to_bits()),
                Kind::F32 => u64::from((x as f32).to_bits()),
                _ => narrow(to, x as f64),
            }
        }
        (true, false) => {
            let x = widen(from, x);
            let x = rounded(modes, x).unwrap_or(x.trunc());
            let x = if x.is_nan() { 0 } else { clamp(to, x as i128) };
            mask(to, x as u64)
        }
        (true, true) => {
            let x = widen(from, x);
            // `.rn` of a conversion is a rounding of what does not fit; `.rni` and its like make integers.
            let x = if from == to { rounded(modes, x).unwrap_or(x) } else { x };
            let x = if has("sat") { x.clamp(0.0, 1.0) } else { x };
            if has("rz") && to == Kind::F32 { toward_zero(x).to_bits().into() } else { narrow(to, x) }
        }
    }
}

fn rounded(modes: &[&str], x: f64) -> Option<f64> {
    modes.iter().find_map(|mode| match *mode {
        "rni" => Some(x.round_ties_even()),
        "rzi" => Some(x.trunc()),
        "rmi" => Some(x.floor()),
        "rpi" => Some(x.ceil()),
        _ => None,
    })
}

fn toward_zero(x: f64) -> f32 {
    let y = x as f32;
    if f64::from(y).abs() > x.abs() { f32::from_bits(y.to_bits() - 1) } else { y }
}

fn clamp(to: Kind, x: i128) -> i128 {
    match to {
        Kind::Signed(bits) => x.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1),
        Kind::Bits(bits) => x.clamp(0, (1 << bits) - 1),
        _ => x,
    }
}

/// What a register of 32 or 64 bits holds of an integer of fewer: signs are kept to 32 bits.
fn mask(to: Kind, x: u64) -> u64 {
    match to {
        Kind::Bits(64) | Kind::Signed(64) => x,
        Kind::Bits(bits) => x & ((1 << bits) - 1),
        Kind::Signed(8) => (x as u8 as i8 as i16 as u16).into(),
        Kind::Signed(bits) => x & ((1 << bits) - 1),
        _ => x,
    }
}
