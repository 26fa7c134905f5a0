//! PTX that more than one family is made of.

use cubecl::prelude::*;

use crate::problem::Element;

/// What a variable holds now. A block of PTX would take its address, and a plain `let` another name for it.
#[cube]
pub(crate) fn value_of<T: CubePrimitive>(x: T) -> T {
    intrinsic!(|scope| x.read_value(scope).into())
}

/// Two floats rounded to a register of two elements, `low` in the lower half.
#[cube]
pub(crate) fn pack(low: f32, high: f32, #[comptime] element: Element) -> u32 {
    let (low, high) = (value_of::<f32>(low), value_of::<f32>(high));
    let kind = comptime!(element.name());
    let out: u32;
    gpu_asm!(
        "cvt.rn.{kind}x2.f32 {out}, {high}, {low};",
        out = out(_) out, high = in(_) high, low = in(_) low, options(pure, nomem),
    );
    out
}

/// `2ˣ`, to 2 units in the last place; subnormal results are 0.
#[cube]
pub(crate) fn exp2(x: f32) -> f32 {
    let x = value_of::<f32>(x);
    let out: f32;
    gpu_asm!("ex2.approx.ftz.f32 {out}, {x};", out = out(_) out, x = in(_) x, options(pure, nomem));
    out
}
