//! Element types: what is stored ([`Float`]) and what is computed with ([`Real`]).
//!
//! `exp` and `tanh` are branch-free scalar code without tables, so that loops over them become vector code for
//! whatever instruction set the caller was compiled for.

use std::ops::{Add, AddAssign, Div, Mul, MulAssign, Neg, Sub};

use bytemuck::Zeroable;
use flashover_kernels::problem::Element;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use pulp::Simd;

/// Elements by which rows of B operands are padded: a multiple of the lanes of every instruction set.
pub(super) const PAD: usize = 16;

/// `n` rounded up to whole vectors of any instruction set.
pub(super) const fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// A type that attention is computed in: f32 or f64.
pub trait Real:
    Float<Compute = Self>
    + PartialOrd
    + std::iter::Sum
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
    + MulAssign
{
    /// A vector of the instruction set `S`.
    #[doc(hidden)]
    type Vector<S: Simd>: Copy;
    /// Minus infinity.
    const NEG_INFINITY: Self;

    /// Nearest value.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Nearest value.
    fn from_i32(x: i32) -> Self;
    /// Row statistics in this type, when they lose nothing in f32.
    fn from_lse(lse: &[f32]) -> Option<&[Self]>;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Neither NaN nor infinite.
    fn is_finite(self) -> bool;
    /// `self · b + c`, in one rounding where `S` has such an instruction.
    fn mul_add<S: Simd>(self, b: Self, c: Self) -> Self;
    /// `eˣ` for x ≤ 88, to about one unit in the last place; results below the normal numbers are 0, NaN stays NaN.
    fn exp<S: Simd>(self) -> Self;
    /// Hyperbolic tangent, with small relative error near 0 too; NaN stays NaN.
    fn tanh<S: Simd>(self) -> Self;

    #[doc(hidden)]
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    #[doc(hidden)]
    fn vector_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    #[doc(hidden)]
    fn vector_mul_add<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>) -> Self::Vector<S>;
    #[doc(hidden)]
    fn partial_load<S: Simd>(simd: S, from: &[Self]) -> Self::Vector<S>;
    #[doc(hidden)]
    fn partial_store<S: Simd>(simd: S, to: &mut [Self], x: Self::Vector<S>);
}

/// An element type of tensors. f16 and bf16 are computed in f32.
pub trait Float: Copy + Send + Sync + Default + Zeroable + 'static + sealed::Sealed {
    /// The type that its attention is computed in.
    type Compute: Real;
    /// Its name in a problem.
    const ELEMENT: Element;

    /// As the compute type.
    fn widen(self) -> Self::Compute;
    /// Nearest value.
    fn narrow(x: Self::Compute) -> Self;
    /// `from` as the compute type, all of it.
    fn widen_slice(from: &[Self], to: &mut [Self::Compute]);
    /// Nearest values, all of them.
    fn narrow_slice(from: &[Self::Compute], to: &mut [Self]);
    /// The same slice, when it is stored as it is computed with.
    fn as_compute(data: &[Self]) -> Option<&[Self::Compute]>;
    /// The same slice, when it is stored as it is computed with.
    fn as_compute_mut(data: &mut [Self]) -> Option<&mut [Self::Compute]>;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
    impl Sealed for half::f16 {}
    impl Sealed for half::bf16 {}
}

macro_rules! impl_real {
    ($real:ident, $vector:ident, $splat:ident, $add:ident, $mul_add:ident, $load:ident, $store:ident, $exp:ident, $tanh:ident, $from_lse:expr) => {
        impl Float for $real {
            type Compute = $real;
            const ELEMENT: Element = if size_of::<$real>() == 4 { Element::F32 } else { Element::F64 };

            #[inline(always)]
            fn widen(self) -> $real {
                self
            }

            #[inline(always)]
            fn narrow(x: $real) -> $real {
                x
            }

            fn widen_slice(from: &[$real], to: &mut [$real]) {
                to.copy_from_slice(from);
            }

            fn narrow_slice(from: &[$real], to: &mut [$real]) {
                to.copy_from_slice(from);
            }

            fn as_compute(data: &[$real]) -> Option<&[$real]> {
                Some(data)
            }

            fn as_compute_mut(data: &mut [$real]) -> Option<&mut [$real]> {
                Some(data)
            }
        }

        impl Real for $real {
            type Vector<S: Simd> = S::$vector;
            const NEG_INFINITY: $real = $real::NEG_INFINITY;

            #[inline(always)]
            fn from_f64(x: f64) -> $real {
                x as $real
            }

            #[inline(always)]
            fn to_f64(self) -> f64 {
                self as f64
            }

            #[inline(always)]
            fn from_i32(x: i32) -> $real {
                x as $real
            }

            fn from_lse(lse: &[f32]) -> Option<&[$real]> {
                $from_lse(lse)
            }

            #[inline(always)]
            fn ln(self) -> $real {
                $real::ln(self)
            }

            #[inline(always)]
            fn is_finite(self) -> bool {
                $real::is_finite(self)
            }

            #[inline(always)]
            fn mul_add<S: Simd>(self, b: $real, c: $real) -> $real {
                // Without the instruction, `mul_add` would be a call into the C library.
                if S::IS_SCALAR || cfg!(target_arch = "wasm32") { self * b + c } else { $real::mul_add(self, b, c) }
            }

            #[inline(always)]
            fn exp<S: Simd>(self) -> $real {
                $exp::<S>(self)
            }

            #[inline(always)]
            fn tanh<S: Simd>(self) -> $real {
                $tanh::<S>(self)
            }

            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: $real) -> S::$vector {
                simd.$splat(x)
            }

            #[inline(always)]
            fn vector_add<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$add(a, b)
            }

            #[inline(always)]
            fn vector_mul_add<S: Simd>(simd: S, a: S::$vector, b: S::$vector, c: S::$vector) -> S::$vector {
                simd.$mul_add(a, b, c)
            }

            #[inline(always)]
            fn partial_load<S: Simd>(simd: S, from: &[$real]) -> S::$vector {
                simd.$load(from)
            }

            #[inline(always)]
            fn partial_store<S: Simd>(simd: S, to: &mut [$real], x: S::$vector) {
                simd.$store(to, x);
            }
        }
    };
}

impl_real!(
    f32,
    f32s,
    splat_f32s,
    add_f32s,
    mul_add_e_f32s,
    partial_load_f32s,
    partial_store_f32s,
    exp_f32,
    tanh_f32,
    Some
);
impl_real!(
    f64,
    f64s,
    splat_f64s,
    add_f64s,
    mul_add_e_f64s,
    partial_load_f64s,
    partial_store_f64s,
    exp_f64,
    tanh_f64,
    |_| None
);

macro_rules! impl_half {
    ($half:ident, $element:expr) => {
        impl Float for $half {
            type Compute = f32;
            const ELEMENT: Element = $element;

            #[inline(always)]
            fn widen(self) -> f32 {
                self.to_f32()
            }

            #[inline(always)]
            fn narrow(x: f32) -> $half {
                $half::from_f32(x)
            }

            fn widen_slice(from: &[$half], to: &mut [f32]) {
                from.convert_to_f32_slice(to);
            }

            fn narrow_slice(from: &[f32], to: &mut [$half]) {
                to.convert_from_f32_slice(from);
            }

            fn as_compute(_data: &[$half]) -> Option<&[f32]> {
                None
            }

            fn as_compute_mut(_data: &mut [$half]) -> Option<&mut [f32]> {
                None
            }
        }
    };
}

impl_half!(f16, Element::F16);
impl_half!(bf16, Element::BF16);

/// `2ⁿ · e^r` with n = round(x / ln 2); the polynomial for `e^r` is that of Cephes' `expf`.
#[inline(always)]
fn exp_f32<S: Simd>(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to an integer; 127 more makes the low bits the exponent field of 2ⁿ.
    const ROUND: f32 = 12_582_912.0 + 127.0;
    const LOWEST: f32 = -87.336_54;
    let t = if x < LOWEST { LOWEST } else { x };
    let shifted = Real::mul_add::<S>(t, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = Real::mul_add::<S>(n, -0.693_359_4, t);
    let r = Real::mul_add::<S>(n, 2.121_944_4e-4, r);
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 0.166_666_66, 0.5, 1.0, 1.0] {
        p = Real::mul_add::<S>(p, r, c);
    }
    let power = f32::from_bits(shifted.to_bits() << 23);
    if x < LOWEST { 0.0 } else { p * power }
}

/// As [`exp_f32`], with the Taylor polynomial of degree 13, whose error is below half a unit in the last place.
#[inline(always)]
fn exp_f64<S: Simd>(x: f64) -> f64 {
    const ROUND: f64 = 6_755_399_441_055_744.0 + 1023.0;
    const LOWEST: f64 = -708.3;
    let t = if x < LOWEST { LOWEST } else { x };
    let shifted = Real::mul_add::<S>(t, std::f64::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = Real::mul_add::<S>(n, -0.693_147_180_369_123_8, t);
    let r = Real::mul_add::<S>(n, -1.908_214_929_270_587_7e-10, r);
    let mut p = 1.0 / 6_227_020_800.0;
    for c in [
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ] {
        p = Real::mul_add::<S>(p, r, c);
    }
    let power = f64::from_bits(shifted.to_bits() << 52);
    if x < LOWEST { 0.0 } else { p * power }
}

/// Cephes' `tanhf`: an odd polynomial near 0, `1 − 2/(e²ˣ + 1)` beyond.
#[inline(always)]
fn tanh_f32<S: Simd>(x: f32) -> f32 {
    let z = x * x;
    let mut p = -5.704_988_7e-3;
    for c in [2.063_909e-2, -5.373_971_6e-2, 0.133_314_42, -0.333_332_8] {
        p = Real::mul_add::<S>(p, z, c);
    }
    let near = Real::mul_add::<S>(p * z, x, x);
    let magnitude = x.abs();
    // 1 in f32 from about 9.01 on; the comparison keeps NaN.
    let magnitude = if magnitude > 9.1 { 9.1 } else { magnitude };
    let far = (1.0 - 2.0 / (exp_f32::<S>(2.0 * magnitude) + 1.0)).copysign(x);
    if magnitude < 0.625 { near } else { far }
}

#[inline(always)]
#[allow(clippy::extra_unused_type_parameters)] // of the signature that tanh_f32 has
fn tanh_f64<S: Simd>(x: f64) -> f64 {
    x.tanh()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Sweep(Vec<f32>);

    impl pulp::WithSimd for Sweep {
        type Output = Vec<(f32, f32, f32)>;

        fn with_simd<S: Simd>(self, _: S) -> Self::Output {
            self.0.iter().map(|&x| (x, Real::exp::<S>(x), Real::tanh::<S>(x))).collect()
        }
    }

    fn relative(found: f32, expected: f64) -> f64 {
        ((f64::from(found) - expected) / expected).abs()
    }

    #[test]
    fn exp_and_tanh_are_accurate_to_about_a_unit_in_the_last_place() {
        let xs: Vec<f32> =
            (0..2_000_000).map(|n| -87.3 + n as f32 * 5e-5).chain((0..200_000).map(|n| n as f32 * -1e-6)).collect();
        for (x, exp, tanh) in pulp::Arch::new().dispatch(Sweep(xs)) {
            assert!(relative(exp, f64::from(x).exp()) < 1.5e-7, "exp({x}) = {exp}");
            assert!(x == 0.0 || relative(tanh, f64::from(x).tanh()) < 2.0e-7, "tanh({x}) = {tanh}");
        }
        for n in 0..200_000 {
            let x = -700.0 + f64::from(n) * 0.00351;
            let error = ((Real::exp::<pulp::Scalar>(x) - x.exp()) / x.exp()).abs();
            assert!(error < 1e-15, "exp({x}): {error}");
        }
    }

    #[test]
    fn exp_and_tanh_keep_zero_infinity_and_nan() {
        type S = pulp::Scalar;
        // A NaN with every payload bit set must not turn into a number through the exponent's bits.
        for nan in [f32::NAN, -f32::NAN, f32::from_bits(0x7fff_ffff)] {
            assert!(Real::exp::<S>(nan).is_nan() && Real::tanh::<S>(nan).is_nan());
        }
        assert!(Real::exp::<S>(f64::NAN).is_nan());
        assert_eq!(
            (Real::exp::<S>(f32::NEG_INFINITY), Real::exp::<S>(-1e4f32), Real::exp::<S>(0.0f32)),
            (0.0, 0.0, 1.0)
        );
        assert_eq!(
            (Real::exp::<S>(f64::NEG_INFINITY), Real::exp::<S>(-1e4f64), Real::exp::<S>(0.0f64)),
            (0.0, 0.0, 1.0)
        );
        assert_eq!((Real::tanh::<S>(f32::INFINITY), Real::tanh::<S>(f32::NEG_INFINITY)), (1.0, -1.0));
    }
}
