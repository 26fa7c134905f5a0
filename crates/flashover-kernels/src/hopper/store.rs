//! Rows of an accumulator as lines of 16 bytes.

use cubecl::prelude::*;

use super::ptx::Accumulator;
use crate::family::ptx::{pack, unpack};
use crate::problem::Element;

/// The rows that a thread writes, and where: `row` and `row + 8` of the `rows` that follow `first` in a tensor whose rows have
/// `width` elements, a multiple of 8; in each group of 8 columns it holds `column` and the next.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Lines {
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

/// Writes `acc · factor`, rounded, or what that rounding loses, if `rest`. The four threads of a row exchange what they hold
/// until each has 8 neighbouring elements.
#[cube]
pub(crate) fn store_lines<N: Size>(
    acc: Accumulator<N>,
    factors: Factors,
    lines: Lines,
    to: &mut [Vector<u32, Const<4>>],
    #[comptime] rest: bool,
    #[comptime] element: Element,
    #[comptime] dim: usize,
) {
    let lane = lines.column / 2;
    let row_vectors = (lines.width / 8) as usize;
    #[unroll]
    for r in 0..2usize {
        let factor = if comptime!(r == 0) { factors.factor0 } else { factors.factor1 };
        let some = if comptime!(r == 0) { factors.some0 } else { factors.some1 };
        let i = lines.row + comptime!(8 * r as u32);
        #[unroll]
        for quad in 0..comptime!(dim / 32) {
            let mut own = Array::<u32>::new(4usize);
            #[unroll]
            for x in 0..4usize {
                let e = comptime!(4 * (4 * quad + x) + 2 * r);
                let (low, high) = (acc.extract(e) * factor, acc.extract(comptime!(e + 1)) * factor);
                let rounded = pack(low, high, element);
                own[x] = select(some, rounded, 0u32);
                if rest {
                    let (rounded_low, rounded_high) = unpack(rounded, element);
                    own[x] = select(some, pack(low - rounded_low, high - rounded_high, element), 0u32);
                }
            }
            // First between threads two apart, then between neighbours: thread t ends with group t of the four.
            let upper = lane >= 2;
            let odd = lane % 2 == 1;
            let got0 = plane_shuffle_xor(select(upper, own[0], own[2]), 2u32);
            let got1 = plane_shuffle_xor(select(upper, own[1], own[3]), 2u32);
            let (kept0, kept1) = (select(upper, own[2], own[0]), select(upper, own[3], own[1]));
            let (low0, high0) = (select(upper, got0, kept0), select(upper, kept0, got0));
            let (low1, high1) = (select(upper, got1, kept1), select(upper, kept1, got1));
            let got_low = plane_shuffle_xor(select(odd, low0, low1), 1u32);
            let got_high = plane_shuffle_xor(select(odd, high0, high1), 1u32);
            let (kept_low, kept_high) = (select(odd, low1, low0), select(odd, high1, high0));
            let mut line = Vector::<u32, Const<4>>::new(0u32);
            line.insert(0usize, select(odd, got_low, kept_low));
            line.insert(1usize, select(odd, kept_low, got_low));
            line.insert(2usize, select(odd, got_high, kept_high));
            line.insert(3usize, select(odd, kept_high, got_high));
            let group = lane + comptime!(4 * quad as u32);
            if i < lines.rows && group * 8 < lines.width {
                to[(lines.first + i as usize) * row_vectors + group as usize] = line;
            }
        }
    }
}
