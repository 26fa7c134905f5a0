//! Rows of an accumulator as rows of a tensor.

use cubecl::prelude::*;

use super::ptx::Accumulator;
use crate::family::ptx::{pack, value_of};
use crate::family::rounding::lost;
use crate::problem::Element;

/// The rows that a thread writes, and where: `row` and `row + 8` of the `rows` that follow `first` in a tensor whose rows have
/// `width` elements, a multiple of 8; in each group of 8 columns it holds `column` and the next.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Place {
    pub row: u32,
    pub column: u32,
    pub first: usize,
    pub rows: u32,
    pub width: u32,
}

/// Factors of a thread's two rows; a row without one is written as 0.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Factors {
    pub factor0: f32,
    pub factor1: f32,
    pub some0: bool,
    pub some1: bool,
}

/// One factor of all rows.
#[cube]
pub(crate) fn same_factor(factor: f32) -> Factors {
    Factors { factor0: factor, factor1: factor, some0: true, some1: true }
}

/// Writes `acc · factor`, rounded, or what that rounding loses, if `rest`. `whole` says that rows have `dim` elements, not less.
/// Neighbouring threads exchange what they hold of two groups of 8 columns, so that each writes four elements of one and
/// the four threads of a row 32 bytes. What `streams` leaves the second-level cache first.
#[cube]
pub(crate) fn store_rows<N: Size>(
    acc: Accumulator<N>,
    factors: Factors,
    place: Place,
    to: &mut [Vector<u32, Const<2>>],
    #[comptime] rest: bool,
    #[comptime] element: Element,
    #[comptime] dim: usize,
    #[comptime] whole: bool,
    #[comptime] streams: bool,
) {
    #[unroll]
    for r in 0..2usize {
        let Place { row, column, first, rows, width } = place;
        let own = Place { row: row + comptime!(8 * r as u32), column, first, rows, width };
        store_row::<N>(acc, factors, own, to, r, rest, element, dim, whole, streams);
    }
}

/// [`store_rows`] of one of a thread's two rows, as row `place.row`.
#[cube]
pub(crate) fn store_row<N: Size>(
    acc: Accumulator<N>,
    factors: Factors,
    place: Place,
    to: &mut [Vector<u32, Const<2>>],
    #[comptime] r: usize,
    #[comptime] rest: bool,
    #[comptime] element: Element,
    #[comptime] dim: usize,
    #[comptime] whole: bool,
    #[comptime] streams: bool,
) {
    let row = (place.width / 4) as usize;
    let odd = place.column / 2 % 2 == 1;
    let group = place.column / 2 % 2;
    let factor = if comptime!(r == 0) { factors.factor0 } else { factors.factor1 };
    let some = if comptime!(r == 0) { factors.some0 } else { factors.some1 };
    let at = (place.first + place.row as usize) * row + (2 * group + place.column / 4) as usize;
    let line = unsafe { to[at..at + comptime!(dim / 4)].as_ptr_unchecked() };
    let mut fours = Array::<Vector<u32, Const<2>>>::new(comptime!(dim / 16));
    #[unroll]
    for two in 0..comptime!(dim / 16) {
        let own0 = rounded_pair::<N>(acc, factor, some, r, comptime!(2 * two), rest, element);
        let own1 = rounded_pair::<N>(acc, factor, some, r, comptime!(2 * two + 1), rest, element);
        let got = plane_shuffle_xor(select(odd, own0, own1), 1u32);
        let mut four = Vector::<u32, Const<2>>::new(0u32);
        four.insert(0usize, select(odd, got, own0));
        four.insert(1usize, select(odd, own1, got));
        fours[two] = four;
    }
    if place.row < place.rows {
        #[unroll]
        for two in 0..comptime!(dim / 16) {
            if comptime!(whole) || (comptime!(2 * two as u32) + group) * 8 < place.width {
                store_four(line, fours[two], comptime!(32 * two), streams);
            }
        }
    }
}

/// Writes four elements `offset` bytes behind a place, which the instruction adds.
#[cube]
fn store_four(
    line: *const Vector<u32, Const<2>>,
    four: Vector<u32, Const<2>>,
    #[comptime] offset: usize,
    #[comptime] streams: bool,
) {
    let four = value_of::<Vector<u32, Const<2>>>(four);
    let how = comptime!(if streams { ".cs" } else { "" });
    gpu_asm!(
        "st.global{how}.v2.b32 [{line}+{offset}], {four};",
        line = mem_in(_) line, four = in(_) four, options(explicit_mem),
    );
}

/// Two neighbouring elements of a row, or what rounding takes from them.
#[cube]
fn rounded_pair<N: Size>(
    acc: Accumulator<N>,
    factor: f32,
    some: bool,
    #[comptime] r: usize,
    #[comptime] group: usize,
    #[comptime] rest: bool,
    #[comptime] element: Element,
) -> u32 {
    let e = comptime!(4 * group + 2 * r);
    let (low, high) = (acc.extract(e) * factor, acc.extract(comptime!(e + 1)) * factor);
    let mut pair = pack(low, high, element);
    if rest {
        pair = lost(low, high, pair, element);
    }
    select(some, pair, 0u32)
}
