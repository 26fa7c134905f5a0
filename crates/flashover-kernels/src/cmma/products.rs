//! The two products that every kernel is made of, by matrices of a plane.

use cubecl::cmma::{self, Matrix, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

use super::config::CmmaTile;
use super::tile::{E4, LANES, V4, pitch, score_pitch};

/// Matrices whose sums stay in registers: those of `[rows of a plane, columns]`, row by row.
pub(crate) type Sums = Sequence<Matrix<f32>>;

/// `count` matrices of zeros.
#[cube]
pub(crate) fn zeros(#[comptime] count: usize, #[comptime] tile: CmmaTile) -> Sums {
    let edge = comptime!(tile.edge);
    let mut sums = Sequence::<Matrix<f32>>::new();
    #[unroll]
    for _ in 0..count {
        sums.push(Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            edge,
            edge,
            edge,
            MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    sums
}

/// The matrix of an operand whose first element is `of[at]`.
#[cube]
fn load<E: Float>(
    of: &Shared<[E4<E>]>,
    at: usize,
    #[comptime] ident: MatrixIdent,
    #[comptime] layout: MatrixLayout,
    #[comptime] pitch: usize,
    #[comptime] tile: CmmaTile,
) -> Matrix<E> {
    let edge = comptime!(tile.edge);
    let first = at / comptime!(LANES);
    let end = first + comptime!(((edge - 1) * pitch + edge) / LANES);
    // SAFETY: it is filled before anything reads it.
    let mut matrix = unsafe { Matrix::<E>::uninitialized(ident, edge, edge, edge, layout) };
    cmma::load(&mut matrix, &of[first..end], comptime!(pitch as u32));
    matrix
}

/// Stores a matrix of sums with its first element at `to[at]`.
#[cube]
pub(crate) fn store(to: &mut Shared<[V4]>, at: usize, sums: &Matrix<f32>, #[comptime] tile: CmmaTile) {
    let pitch = comptime!(score_pitch(tile.cols));
    let first = at / comptime!(LANES);
    let end = first + comptime!(((tile.edge - 1) * pitch + tile.edge) / LANES);
    cmma::store(&mut to[first..end], sums, comptime!(pitch as u32), MatrixLayout::RowMajor);
}

/// Fills a matrix of sums from where [`store`] puts it.
#[cube]
pub(crate) fn reload(sums: &mut Matrix<f32>, from: &Shared<[V4]>, at: usize, #[comptime] tile: CmmaTile) {
    let pitch = comptime!(score_pitch(tile.cols));
    let first = at / comptime!(LANES);
    let end = first + comptime!(((tile.edge - 1) * pitch + tile.edge) / LANES);
    cmma::load_with_layout(sums, &from[first..end], comptime!(pitch as u32), MatrixLayout::RowMajor);
}

/// `to = own · walkedᵀ` over `dim` elements (padded): this plane's rows of `own`, which starts at `own_at`, and all columns of the
/// tile.
#[cube]
pub(crate) fn product<E: Float>(
    own: &Shared<[E4<E>]>,
    #[comptime] own_at: usize,
    walked: &Shared<[E4<E>]>,
    #[comptime] walked_at: usize,
    to: &mut Shared<[V4]>,
    #[comptime] dim: usize,
    #[comptime] tile: CmmaTile,
) {
    let edge = comptime!(tile.edge);
    let (rows, cols) = comptime!((tile.plane_rows() / edge, tile.cols / edge));
    let first = UNIT_POS_Y as usize * comptime!(tile.plane_rows());
    let sums = zeros(comptime!(rows * cols), tile);
    for depth in 0..comptime!(dim / edge) {
        let d = depth * edge;
        let mut a = Sequence::<Matrix<E>>::new();
        #[unroll]
        for r in 0..rows {
            let at = comptime!(own_at) + (first + comptime!(r * edge)) * comptime!(pitch(dim)) + d;
            a.push(load::<E>(own, at, MatrixIdent::A, MatrixLayout::RowMajor, comptime!(pitch(dim)), tile));
        }
        #[unroll]
        for c in 0..cols {
            let at = comptime!(walked_at + c * edge * pitch(dim)) + d;
            // A row of the operand is a column of its transpose.
            let b = load::<E>(walked, at, MatrixIdent::B, MatrixLayout::ColMajor, comptime!(pitch(dim)), tile);
            #[unroll]
            for r in 0..rows {
                let x = comptime!(r * cols + c);
                cmma::execute(a.index(r), &b, sums.index(x), sums.index(x));
            }
        }
    }
    #[unroll]
    for r in 0..rows {
        #[unroll]
        for c in 0..cols {
            let at = (first + comptime!(r * edge)) * comptime!(score_pitch(tile.cols)) + comptime!(c * edge);
            store(to, at, sums.index(comptime!(r * cols + c)), tile);
        }
    }
}

/// `sums += weights · walked`: this plane's rows of the weights, and `dim` elements (padded) of the columns' rows in `walked`.
#[cube]
pub(crate) fn accumulate<E: Float>(
    sums: &Sums,
    weights: &Shared<[E4<E>]>,
    walked: &Shared<[E4<E>]>,
    #[comptime] walked_at: usize,
    #[comptime] dim: usize,
    #[comptime] tile: CmmaTile,
) {
    let edge = comptime!(tile.edge);
    let (rows, wide) = comptime!((tile.plane_rows() / edge, dim / edge));
    let first = UNIT_POS_Y as usize * comptime!(tile.plane_rows());
    for depth in 0..comptime!(tile.cols / edge) {
        let j = depth * edge;
        let mut a = Sequence::<Matrix<E>>::new();
        #[unroll]
        for r in 0..rows {
            let at = (first + comptime!(r * edge)) * comptime!(pitch(tile.cols)) + j;
            a.push(load::<E>(weights, at, MatrixIdent::A, MatrixLayout::RowMajor, comptime!(pitch(tile.cols)), tile));
        }
        #[unroll]
        for c in 0..wide {
            let at = comptime!(walked_at + c * edge) + j * comptime!(pitch(dim));
            let b = load::<E>(walked, at, MatrixIdent::B, MatrixLayout::RowMajor, comptime!(pitch(dim)), tile);
            #[unroll]
            for r in 0..rows {
                let x = comptime!(r * wide + c);
                cmma::execute(a.index(r), &b, sums.index(x), sums.index(x));
            }
        }
    }
}
