//! Matrix products of the oracle (f64) and of the naive reference (f32, f64).
//!
//! Each element is one running sum over the inner dimension, products and sums rounded apart: the bits do not depend
//! on the machine's vector width.

use std::array;
use std::ops::{Add, AddAssign, Div, Mul, Neg, Sub};

use flashover_kernels::problem::Element;
use half::{bf16, f16};

/// Rows of the block that stays in registers.
const MR: usize = 4;
/// Columns of the block that stays in registers.
const NR: usize = 8;

/// f32 or f64.
pub(crate) trait Real:
    Copy
    + PartialOrd
    + Send
    + Sync
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + AddAssign
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// −∞.
    const NEG_INFINITY: Self;
    /// The nearest value.
    fn of(x: f64) -> Self;
    /// The same value in f64.
    fn wide(self) -> f64;
    /// Rounded to what `element` can hold.
    fn rounded(self, element: Element) -> Self;
    /// The larger of the two; the other one if one is NaN.
    fn larger(self, other: Self) -> Self;
    /// `e^x`.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Hyperbolic tangent.
    fn tanh(self) -> Self;
}

macro_rules! real {
    ($t:ident) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            fn of(x: f64) -> Self {
                x as $t
            }
            fn wide(self) -> f64 {
                f64::from(self)
            }
            fn rounded(self, element: Element) -> Self {
                match element {
                    Element::F64 => self,
                    Element::F32 => self as f32 as $t,
                    Element::F16 => f16::from_f32(sticky(self.wide())).to_f32() as $t,
                    Element::BF16 => bf16::from_f32(sticky(self.wide())).to_f32() as $t,
                }
            }
            fn larger(self, other: Self) -> Self {
                self.max(other)
            }
            fn exp(self) -> Self {
                $t::exp(self)
            }
            fn ln(self) -> Self {
                $t::ln(self)
            }
            fn tanh(self) -> Self {
                $t::tanh(self)
            }
        }
    };
}

real!(f32);
real!(f64);

/// `x` in f32, rounded to odd: a number that lies beside a tie of a narrower type still lies beside it, so rounding
/// twice is rounding once. (`half::f16::from_f64` drops the last 32 bits.)
fn sticky(x: f64) -> f32 {
    let nearest = x as f32;
    if f64::from(nearest) == x || x.is_nan() {
        return nearest;
    }
    let away = f64::from(nearest).abs() > x.abs();
    f32::from_bits((nearest.to_bits() - u32::from(away)) | 1)
}

/// `a · b`, `[m, n] · [n, k] → [m, k]`.
pub(crate) fn matmul<T: Real>(a: &[T], b: &[T], m: usize, n: usize, k: usize) -> Vec<T> {
    assert_eq!((a.len(), b.len()), (m * n, n * k), "operands of a [{m}, {n}] · [{n}, {k}] product");
    let mut c = vec![T::ZERO; m * k];
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the line above found AVX2 on this CPU.
        unsafe { product_avx2(&mut c, a, b, m, n, k) };
        return c;
    }
    product(&mut c, a, b, m, n, k);
    c
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn product_avx2<T: Real>(c: &mut [T], a: &[T], b: &[T], m: usize, n: usize, k: usize) {
    product(c, a, b, m, n, k);
}

#[inline(always)]
fn product<T: Real>(c: &mut [T], a: &[T], b: &[T], m: usize, n: usize, k: usize) {
    let mut panel = vec![[T::ZERO; NR]; n]; // NR columns of b, contiguous
    for column in (0..k).step_by(NR) {
        let width = NR.min(k - column);
        for (packed, row) in panel.iter_mut().zip(b.chunks_exact(k)) {
            packed[..width].copy_from_slice(&row[column..column + width]);
        }
        for top in (0..m).step_by(MR) {
            // Rows past the end repeat the last one and are not stored.
            let rows: [&[T]; MR] = array::from_fn(|r| &a[(top + r).min(m - 1) * n..][..n]);
            let mut sums = [[T::ZERO; NR]; MR];
            for (j, packed) in panel.iter().enumerate() {
                for (sum, row) in sums.iter_mut().zip(rows) {
                    let x = row[j];
                    for (s, &y) in sum.iter_mut().zip(packed) {
                        *s += x * y;
                    }
                }
            }
            for (r, sum) in sums.iter().enumerate().take(m - top) {
                c[(top + r) * k + column..][..width].copy_from_slice(&sum[..width]);
            }
        }
    }
}

/// `[m, n] → [n, m]`.
pub(crate) fn transpose<T: Copy>(a: &[T], m: usize, n: usize) -> Vec<T> {
    assert_eq!(a.len(), m * n, "operand of a transpose");
    (0..n).flat_map(|j| (0..m).map(move |i| a[i * n + j])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_sums_of_products() {
        for (m, n, k) in [(0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (4, 5, 8), (7, 11, 19), (9, 3, 17)] {
            let a: Vec<f64> = (0..m * n).map(|x| (x % 13) as f64 - 6.0).collect();
            let b: Vec<f64> = (0..n * k).map(|x| (x % 7) as f64 - 2.0).collect();
            let expected: Vec<f64> =
                (0..m * k).map(|x| (0..n).map(|j| a[x / k * n + j] * b[j * k + x % k]).sum()).collect();
            assert_eq!(matmul(&a, &b, m, n, k), expected, "[{m}, {n}] · [{n}, {k}]");
            let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
            assert_eq!(matmul(&narrow(&a), &narrow(&b), m, n, k), narrow(&expected));
            assert_eq!(transpose(&transpose(&a, m, n), n, m), a);
        }
    }

    #[test]
    fn elements_round_as_they_store() {
        let x = 1.000_244_140_625_1_f64; // just above halfway between two f16
        assert_eq!(x.rounded(Element::F64), x);
        assert_eq!(x.rounded(Element::F32), f64::from(x as f32));
        assert_eq!(x.rounded(Element::BF16), 1.0);
        assert_eq!((1.0 + 2.0_f64.powi(-11) + 1e-9).rounded(Element::F16), 1.0 + 2.0_f64.powi(-10));
        assert_eq!((1.0 + 2.0_f64.powi(-11)).rounded(Element::F16), 1.0);
        assert_eq!((1.0 + 2.0_f64.powi(-11) - 1e-9).rounded(Element::F16), 1.0);
        assert_eq!((-1.0 - 2.0_f64.powi(-8) - 1e-9).rounded(Element::BF16), -1.0 - 2.0_f64.powi(-7));
        assert_eq!(1e6_f32.rounded(Element::F16), f32::INFINITY);
    }
}
