//! The one matrix product of this path: `C (+)= A · B` over tiles.
//!
//! A is read one element at a time and broadcast, so any strides will do and nothing has to be packed; rows of B and C
//! are contiguous. `ROWS` rows of A times `VECTORS` vectors of B stay in registers over the whole inner dimension
//! (6 × 4 of AVX-512's 32 registers): the outer-product scheme of Goto and van de Geijn, "Anatomy of High-Performance
//! Matrix Multiplication", without its packing, since our tiles lie in the first two caches anyway.
//!
//! Every element of C is one chain of fused multiply-adds over ascending k, and one addition to what C held. The order
//! does not depend on the shape of the tile or on which operand is broadcast.

use pulp::{Simd, WithSimd};

use super::real::{Real, padded};

/// Left operand: element `[r, k]` is `data[r · row + k · col]`.
#[derive(Clone, Copy)]
pub(super) struct Left<'a, R> {
    pub data: &'a [R],
    pub row: usize,
    pub col: usize,
}

/// Right operand: element `[k, c]` is `data[k · row + c]`, readable up to `padded(n)` columns.
#[derive(Clone, Copy)]
pub(super) struct Right<'a, R> {
    pub data: &'a [R],
    pub row: usize,
}

/// Shape of a product: C is `[m, n]`, the inner dimension `k`.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// `C = A · B`, or `C += A · B`; element `[r, c]` of C is `c[r · c_row + c]`. Columns of C from n on are left alone.
///
/// # Panics
/// When an operand is shorter than its shape says.
pub(super) fn product<R: Real, S: Simd>(
    simd: S,
    (c, c_row): (&mut [R], usize),
    a: Left<'_, R>,
    b: Right<'_, R>,
    shape: Shape,
    accumulate: bool,
) {
    let Shape { m, n, k } = shape;
    if m == 0 || n == 0 {
        return;
    }
    assert!(k > 0 && a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "left operand of a {m}×{n}×{k} product");
    assert!(b.data.len() >= (k - 1) * b.row + padded(n), "right operand of a {m}×{n}×{k} product");
    assert!(c.len() >= (m - 1) * c_row + n, "result of a {m}×{n}×{k} product");
    let (a_data, b_data, c) = (a.data.as_ptr(), b.data.as_ptr(), c.as_mut_ptr());
    simd.vectorize(Product {
        m,
        n,
        k,
        a: a_data,
        a_row: a.row,
        a_col: a.col,
        b: b_data,
        b_row: b.row,
        c,
        c_row,
        accumulate,
    });
}

struct Product<R> {
    m: usize,
    n: usize,
    k: usize,
    a: *const R,
    a_row: usize,
    a_col: usize,
    b: *const R,
    b_row: usize,
    c: *mut R,
    c_row: usize,
    accumulate: bool,
}

impl<R: Real> WithSimd for Product<R> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let lanes = size_of::<R::Vector<S>>() / size_of::<R>();
        let mut column = 0;
        // SAFETY: `product` checked that rows of A and C and padded rows of B lie within their slices, and a panel
        // reads B up to the next multiple of the lanes, which `padded` covers.
        unsafe {
            if S::REGISTER_COUNT >= 32 {
                while column + 3 * lanes < self.n {
                    self.panel::<S, 4>(simd, column);
                    column += 4 * lanes;
                }
            }
            while column + lanes < self.n {
                self.panel::<S, 2>(simd, column);
                column += 2 * lanes;
            }
            if column < self.n {
                self.panel::<S, 1>(simd, column);
            }
        }
    }
}

impl<R: Real> Product<R> {
    /// The columns of C from `column` on, `VECTORS` vectors of them.
    #[inline(always)]
    unsafe fn panel<S: Simd, const VECTORS: usize>(&self, simd: S, column: usize) {
        let mut row = 0;
        // SAFETY: rows `row .. row + ROWS` are below m.
        unsafe {
            while row + 6 <= self.m {
                self.tile::<S, 6, VECTORS>(simd, row, column);
                row += 6;
            }
            match self.m - row {
                5 => self.tile::<S, 5, VECTORS>(simd, row, column),
                4 => self.tile::<S, 4, VECTORS>(simd, row, column),
                3 => self.tile::<S, 3, VECTORS>(simd, row, column),
                2 => self.tile::<S, 2, VECTORS>(simd, row, column),
                1 => self.tile::<S, 1, VECTORS>(simd, row, column),
                _ => {}
            }
        }
    }

    /// `ROWS` × `VECTORS` vectors of C, held in registers.
    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize, const VECTORS: usize>(&self, simd: S, row: usize, column: usize) {
        let lanes = size_of::<R::Vector<S>>() / size_of::<R>();
        let zero = R::splat(simd, R::default());
        let mut sums = [[zero; VECTORS]; ROWS];
        // SAFETY: the caller keeps rows below m and columns below padded(n); k stays below the inner dimension.
        unsafe {
            let mut a = self.a.add(row * self.a_row);
            let mut b = self.b.add(column);
            for _ in 0..self.k {
                let mut right = [zero; VECTORS];
                for (v, right) in right.iter_mut().enumerate() {
                    *right = b.add(v * lanes).cast::<R::Vector<S>>().read_unaligned();
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let left = R::splat(simd, *a.add(r * self.a_row));
                    for (sum, right) in sums.iter_mut().zip(right) {
                        *sum = R::vector_mul_add(simd, left, right, *sum);
                    }
                }
                a = a.wrapping_add(self.a_col);
                b = b.wrapping_add(self.b_row);
            }
            let whole = column + VECTORS * lanes <= self.n;
            for (r, sums) in sums.iter().enumerate() {
                let c = self.c.add((row + r) * self.c_row + column);
                if whole {
                    for (v, &sum) in sums.iter().enumerate() {
                        let c = c.add(v * lanes).cast::<R::Vector<S>>();
                        c.write_unaligned(if self.accumulate {
                            R::vector_add(simd, c.read_unaligned(), sum)
                        } else {
                            sum
                        });
                    }
                } else {
                    let mut c = std::slice::from_raw_parts_mut(c, self.n - column);
                    for &sum in sums {
                        let (head, rest) = c.split_at_mut(lanes.min(c.len()));
                        let sum =
                            if self.accumulate { R::vector_add(simd, R::partial_load(simd, head), sum) } else { sum };
                        R::partial_store(simd, head, sum);
                        c = rest;
                    }
                }
            }
        }
    }
}

/// `C += A · B` over those terms `k` of each element `[r, c]` for which `visible(r, c, k)`, one at a time.
///
/// The exact, slow way, for tiles where a hidden element's zero would meet a NaN or an infinity.
pub(super) fn product_where<R: Real>(
    (c, c_row): (&mut [R], usize),
    a: Left<'_, R>,
    b: Right<'_, R>,
    Shape { m, n, k }: Shape,
    visible: impl Fn(usize, usize, usize) -> bool,
) {
    for r in 0..m {
        for x in 0..n {
            let terms = (0..k).filter(|&k| visible(r, x, k));
            c[r * c_row + x] += terms.map(|k| a.data[r * a.row + k * a.col] * b.data[k * b.row + x]).sum::<R>();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Run<'a>(&'a mut [f32], Left<'a, f32>, Right<'a, f32>, Shape, usize, bool);

    impl WithSimd for Run<'_> {
        type Output = ();

        fn with_simd<S: Simd>(self, simd: S) {
            product(simd, (self.0, self.4), self.1, self.2, self.3, self.5);
        }
    }

    #[test]
    fn products_of_every_remainder_match_their_definition() {
        let value = |n: usize| ((n * 7919) % 23) as f32 - 11.0;
        for m in 1..14 {
            for n in [1, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 131] {
                for (k, transposed, accumulate) in [(1, false, false), (5, true, true), (17, false, true)] {
                    let (row, col) = if transposed { (1, m + 2) } else { (k + 3, 1) };
                    let a: Vec<f32> = (0..m * (k + 3) + k * (m + 2)).map(value).collect();
                    let b_row = padded(n) + 3;
                    let b: Vec<f32> = (0..k * b_row).map(|x| value(x + 5)).collect();
                    let c_row = n + 2;
                    let before: Vec<f32> = (0..m * c_row).map(|x| value(x + 9)).collect();
                    let mut c = before.clone();
                    let (left, right) = (Left { data: &a, row, col }, Right { data: &b, row: b_row });
                    pulp::Arch::new().dispatch(Run(&mut c, left, right, Shape { m, n, k }, c_row, accumulate));
                    for r in 0..m {
                        for x in 0..c_row {
                            let old = before[r * c_row + x];
                            let sum: f32 = (0..k).map(|k| a[r * row + k * col] * b[k * b_row + x.min(n - 1)]).sum();
                            let expected = if x >= n { old } else { sum + if accumulate { old } else { 0.0 } };
                            assert_eq!(c[r * c_row + x], expected, "{m}×{n}×{k} at {r}, {x}");
                        }
                    }
                }
            }
        }
    }
}
