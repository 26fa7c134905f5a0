//! The matrix-product rate of the machine's CPU: what attention's two products could reach at most.

use crate::timing;

/// Best f32 GEMM rate in FLOP/s, and what computed it. On x86-64 `private-gemm-x86` (the kernels of faer) with AVX-512
/// where the CPU has it, on all cores; elsewhere there is none at hand.
pub fn f32_rate(n: usize, repeats: usize) -> Option<(f64, String)> {
    rate(n, repeats)
}

#[cfg(target_arch = "x86_64")]
fn rate(n: usize, repeats: usize) -> Option<(f64, String)> {
    use private_gemm_x86::{Accum, DType, DstKind, IType, InstrSet, gemm};

    let (instructions, name) = if std::arch::is_x86_feature_detected!("avx512f") {
        (InstrSet::Avx512, "AVX-512")
    } else if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
        (InstrSet::Avx256, "AVX2")
    } else {
        return None;
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let fill = |seed: u32| -> Vec<f32> {
        let mut x = seed;
        let mut next = || {
            x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (x >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..n * n).map(|_| next()).collect()
    };
    let (a, b, mut c) = (fill(1), fill(2), vec![f32::NAN; n * n]);
    let one = 1.0f32;
    let stride = n as isize;
    let mut run = || {
        // SAFETY: all three matrices are n×n, column-major with stride n, in live vectors of n·n elements; no index
        // arrays and no diagonal are given, and `alpha` points to an f32 as the dtype says.
        let work = || unsafe {
            gemm(
                DType::F32,
                IType::U64,
                instructions,
                n,
                n,
                n,
                c.as_mut_ptr().cast(),
                1,
                stride,
                std::ptr::null(),
                std::ptr::null(),
                DstKind::Full,
                Accum::Replace,
                a.as_ptr().cast(),
                1,
                stride,
                false,
                std::ptr::null(),
                0,
                b.as_ptr().cast(),
                1,
                stride,
                false,
                (&raw const one).cast(),
                threads,
            );
        };
        timing::milliseconds(work).1
    };
    let [ms] = timing::interleaved(repeats, [&mut run]);
    // One element by hand: a rate of a wrong product is none.
    let expected: f64 = (0..n).map(|k| f64::from(a[k * n]) * f64::from(b[k])).sum();
    assert!((f64::from(c[0]) - expected).abs() < 1e-2, "gemm: expected {expected}, got {}", c[0]);
    let rate = 2.0 * (n as f64).powi(3) / ms * 1e3;
    Some((rate, format!("private-gemm-x86 0.1, {name}, {threads} threads")))
}

#[cfg(not(target_arch = "x86_64"))]
fn rate(_n: usize, _repeats: usize) -> Option<(f64, String)> {
    None
}
