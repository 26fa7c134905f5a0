//! What rounding an output to 16 bits takes from it, kept beside it for `delta` of a backward: the difference does not cancel in
//! `dp − delta`, and a query that sees one key has the exact gradient 0.

use cubecl::prelude::*;

use super::ptx::{pack, unpack};
use crate::problem::Element;

/// What two floats lost when they were rounded to a pair, in 16 bits each: for f16 the difference, rounded; for bf16 that of the
/// numbers which the bits are, so that nothing is lost (half a unit in the last place of f32 where the float lay in the middle).
#[cube]
pub(crate) fn lost(low: f32, high: f32, pair: u32, #[comptime] element: Element) -> u32 {
    let (rounded_low, rounded_high) = unpack(pair, element);
    if comptime!(element == Element::BF16) {
        let low = i32::reinterpret(low) - i32::reinterpret(rounded_low);
        let high = i32::reinterpret(high) - i32::reinterpret(rounded_high);
        (min(low, 0x7fffi32) as u32 & 0xffffu32) | ((min(high, 0x7fffi32) as u32) << 16)
    } else {
        pack(low - rounded_low, high - rounded_high, element)
    }
}

/// The two floats of a pair and what they [`lost`].
#[cube]
pub(crate) fn restored(pair: u32, lost: u32, #[comptime] element: Element) -> (f32, f32) {
    let (low, high) = unpack(pair, element);
    if comptime!(element == Element::BF16) {
        let low = i32::reinterpret(low) + ((lost << 16) as i32 >> 16);
        let high = i32::reinterpret(high) + (lost as i32 >> 16);
        (f32::reinterpret(low), f32::reinterpret(high))
    } else {
        let (lost_low, lost_high) = unpack(lost, element);
        (low + lost_low, high + lost_high)
    }
}
