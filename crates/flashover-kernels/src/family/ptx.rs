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

/// The two elements of a register that [`pack`] filled, `(low, high)`.
#[cube]
pub(crate) fn unpack(pair: u32, #[comptime] element: Element) -> (f32, f32) {
    if comptime!(element == Element::F16) {
        (half_of(pair), half_of(pair >> 16))
    } else {
        // The upper half of a float.
        (f32::reinterpret(pair << 16), f32::reinterpret(pair & 0xffff_0000u32))
    }
}

/// The f16 in the lower half of a register.
#[cube]
fn half_of(pair: u32) -> f32 {
    let pair = value_of::<u32>(pair);
    let out: f32;
    gpu_asm!(
        "{{ .reg .b16 low, high; mov.b32 {{low, high}}, {pair}; cvt.f32.f16 {out}, low; }}",
        out = out(_) out, pair = in(_) pair, options(pure, nomem),
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

/// Where a tensor starts in global memory.
#[cube]
pub(crate) fn global_address<E: CubePrimitive>(tensor: &[E]) -> u64 {
    // SAFETY: only the start is taken; rows and elements are tested against the tensor's shape before they are touched.
    let pointer = unsafe { tensor.as_ptr_unchecked() };
    let out: u64;
    gpu_asm!("mov.u64 {out}, {p};", p = in(_) pointer, out = out(_) out);
    out
}

/// Writes 16 bytes to shared memory.
#[cube]
pub(crate) fn store_shared_16(address: u32, #[comptime] offset: usize, x: Vector<u32, Const<4>>) {
    let (address, x) = (value_of::<u32>(address), value_of::<Vector<u32, Const<4>>>(x));
    gpu_asm!("st.shared.v4.b32 [{address}+{offset}], {x};", address = in(_) address, x = in(_) x);
}

/// Reads 16 bytes from shared memory.
#[cube]
pub(crate) fn load_shared_16(address: u32, #[comptime] offset: usize) -> Vector<u32, Const<4>> {
    let address = value_of::<u32>(address);
    let out: Vector<u32, Const<4>>;
    gpu_asm!("ld.shared.v4.b32 {out}, [{address}+{offset}];", out = out(_) out, address = in(_) address);
    out
}

/// Reads 16 bytes of global memory.
#[cube]
pub(crate) fn load_global_16(address: u64) -> Vector<u32, Const<4>> {
    let address = value_of::<u64>(address);
    let out: Vector<u32, Const<4>>;
    gpu_asm!("ld.global.v4.b32 {out}, [{address}];", out = out(_) out, address = in(_) address);
    out
}

/// Reads a word of global memory.
#[cube]
pub(crate) fn load_global_4(address: u64) -> u32 {
    let address = value_of::<u64>(address);
    let out: u32;
    gpu_asm!("ld.global.b32 {out}, [{address}];", out = out(_) out, address = in(_) address);
    out
}

/// The next number of a counter in global memory.
#[cube]
pub(crate) fn ticket(counter: u64) -> u32 {
    let counter = value_of::<u64>(counter);
    let out: u32;
    gpu_asm!("atom.global.add.u32 {out}, [{counter}], 1;", out = out(_) out, counter = in(_) counter);
    out
}
