//! Tiles of the operands: rows of a tensor as the compute type, in place where that is possible.

use super::gemm::{Left, Right};
use super::real::{Float, PAD, Real, padded};
use super::view::View;

/// Rows of one head of a tensor as the compute type: element `[r, d]` is `data[r · stride + d]`. Each row is readable
/// up to the padded width; what stands beyond the width is of no meaning.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a, R> {
    pub data: &'a [R],
    pub stride: usize,
}

impl<'a, R> Rows<'a, R> {
    /// As a left operand.
    pub fn left(self) -> Left<'a, R> {
        Left { data: self.data, row: self.stride, col: 1 }
    }

    /// Transposed, as a left operand.
    pub fn left_transposed(self) -> Left<'a, R> {
        Left { data: self.data, row: 1, col: self.stride }
    }

    /// As a right operand.
    pub fn right(self) -> Right<'a, R> {
        Right { data: self.data, row: self.stride }
    }
}

/// Elements of scratch that [`rows`] needs for `count` rows of width `width`.
pub(super) const fn rows_scratch(count: usize, width: usize) -> usize {
    count * padded(width)
}

/// Rows `first .. first + count` of head `[b, h]`: in place when they are stored as they are computed with and their
/// elements are adjacent, otherwise widened into `scratch`.
#[inline(always)]
pub(super) fn rows<'a, T: Float>(
    view: &View<'a, T>,
    (b, h): (usize, usize),
    first: usize,
    count: usize,
    scratch: &'a mut [T::Compute],
) -> Rows<'a, T::Compute> {
    let width = view.shape()[3];
    let start = view.index(b, h, first, 0);
    let adjacent = view.stride(3) == 1 || width == 1;
    if adjacent
        && let Some(data) = T::as_compute(view.data())
        && let Ok(stride) = usize::try_from(view.stride(2))
        && start as usize + (count - 1) * stride + padded(width) <= data.len()
    {
        return Rows { data: &data[start as usize..], stride };
    }
    let stride = padded(width);
    for (r, row) in scratch.chunks_exact_mut(stride).take(count).enumerate() {
        let (row, pad) = row.split_at_mut(width);
        pad.fill(T::Compute::default());
        widen_row(view, [b, h, first + r, 0], row);
    }
    Rows { data: scratch, stride }
}

/// Elements `[b, h, i, j ..]` as the compute type.
#[inline(always)]
pub(super) fn widen_row<T: Float>(view: &View<'_, T>, at: [usize; 4], out: &mut [T::Compute]) {
    read_row(view, at, out, T::widen_slice, T::widen);
}

/// Elements `[b, h, i, j ..]`, converted by `slice` where they are adjacent, otherwise by `element`.
#[inline(always)]
pub(super) fn read_row<X: Copy, Y: Copy>(
    view: &View<'_, X>,
    [b, h, i, j]: [usize; 4],
    out: &mut [Y],
    slice: impl FnOnce(&[X], &mut [Y]),
    element: impl Fn(X) -> Y,
) {
    let start = view.index(b, h, i, j);
    match view.stride(3) {
        0 => out.fill(element(view.data()[start as usize])),
        1 => slice(&view.data()[start as usize..][..out.len()], out),
        stride => {
            for (n, x) in out.iter_mut().enumerate() {
                *x = element(view.data()[(start + n as isize * stride) as usize]);
            }
        }
    }
}

/// `out[d · columns + r] = scale · rows[r, d]`; columns from `count` up to the next vector become 0.
#[inline(always)]
pub(super) fn transpose<R: Real>(rows: Rows<'_, R>, count: usize, scale: R, out: &mut [R], columns: usize) {
    /// Elements of a row that are taken at a time, of [`PAD`] rows: what the compiler makes shuffles of.
    const STEP: usize = 4;
    let width = out.len() / columns;
    for first in (0..count).step_by(PAD) {
        let row = |r: usize| &rows.data[(first + r) * rows.stride..];
        let whole = if first + PAD <= count { width / STEP * STEP } else { 0 };
        for d in (0..whole).step_by(STEP) {
            let block: [[R; STEP]; PAD] = std::array::from_fn(|r| {
                let (four, _) = row(r)[d..].split_first_chunk().expect("a row has its width");
                *four
            });
            for e in 0..STEP {
                let (out, _) = out[(d + e) * columns + first..].split_first_chunk_mut::<PAD>().expect("padded");
                *out = std::array::from_fn(|r| block[r][e] * scale);
            }
        }
        for d in whole..width {
            for (r, x) in out[d * columns + first..][..PAD.min(columns - first)].iter_mut().enumerate() {
                *x = if first + r < count { row(r)[d] * scale } else { R::default() };
            }
        }
    }
}

/// The rows times a factor, in `out`.
#[inline(always)]
pub(super) fn scaled<'a, R: Real>(
    rows: Rows<'_, R>,
    count: usize,
    width: usize,
    factor: R,
    out: &'a mut [R],
) -> Rows<'a, R> {
    let stride = padded(width);
    for (r, out) in out.chunks_exact_mut(stride).take(count).enumerate() {
        let (out, pad) = out.split_at_mut(width);
        pad.fill(R::default());
        out.iter_mut().zip(&rows.data[r * rows.stride..]).for_each(|(out, &x)| *out = x * factor);
    }
    Rows { data: out, stride }
}

/// Whether no element of the rows is NaN or infinite.
#[inline(always)]
pub(super) fn all_finite<R: Real>(rows: Rows<'_, R>, count: usize, width: usize) -> bool {
    (0..count).all(|r| {
        let row = &rows.data[r * rows.stride..][..width];
        row.iter().fold(0u32, |bad, x| bad | u32::from(!x.is_finite())) == 0
    })
}

/// Sum of a row: in lanes of the compute type, and these in f64.
#[inline(always)]
pub(super) fn sum<R: Real>(row: &[R]) -> f64 {
    let mut lanes = [R::default(); PAD];
    let (vectors, rest) = row.as_chunks::<PAD>();
    for vector in vectors {
        lanes.iter_mut().zip(vector).for_each(|(lane, &x)| *lane += x);
    }
    lanes.iter_mut().zip(rest).for_each(|(lane, &x)| *lane += x);
    lanes.iter().map(|x| x.to_f64()).sum()
}
