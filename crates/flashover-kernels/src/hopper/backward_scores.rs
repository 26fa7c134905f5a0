//! What a thread of a warpgroup does with its elements of the transposed tiles: rows are keys, columns are queries.

use cubecl::prelude::*;

use super::backward_config::HopperBackwardConfig;
use super::ptx::Accumulator;
use crate::block_plan::flat::{bit_is_set, bit_word};
use crate::dropout::dropout_keeps;
use crate::family::element::{Head, Numbers, head_of, position};
use crate::family::ptx::{exp2, pack, unpack};
use crate::family::score_function::{function_derivative, with_function};
use crate::family::turns::KeyTile;
use crate::family::walk::Step;
use crate::score::{Alibi, Bias, Position, ScoreCode, ScoreFunction, Softcap};

/// A thread's rows: keys `j` and `j + 8`; columns `column` and the next of every 8 queries.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct KeyRows {
    pub j: u32,
    pub column: u32,
}

/// Statistics of the queries of the tiles in flight, pairs of neighbours: `−lse` of a tile's queries, then `delta`, then hashes.
pub(crate) type Statistics = Shared<[Vector<f32, Const<2>>]>;

/// The products of a step become weights, hidden ones 0, by the statistics of the queries from `row` on. Where a score is more than a scaled product
/// the derivatives come back.
#[cube]
pub(crate) fn weights_of<E: Float, N: Size, P: Size>(
    s: &mut Accumulator<N>,
    rows: &Statistics,
    row: usize,
    keys: KeyRows,
    tile: KeyTile,
    step: Step,
    head: u32,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    n: Numbers,
    factor: f32,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] cfg: HopperBackwardConfig,
) -> Vector<u32, P> {
    let mut slopes = Vector::<u32, P>::new(0u32);
    if comptime!(!cfg.plain) {
        let at = head_of::<E>(tile.batch, head, scratch, bias, n, with_bias);
        slopes = shape_scores::<E, N, P>(s, keys, step.i0, at, scratch, bias, n, with_bias, function, cfg);
    }
    weigh::<N>(s, rows, row, factor, cfg);
    if !step.full {
        hide::<N>(s, keys, step.i0, tile.at, n, cfg);
        if comptime!(!cfg.plain) {
            if n.mask_at != 0 {
                let at = head_of::<E>(tile.batch, head, scratch, bias, n, with_bias);
                hide_bits::<N>(s, keys, step.i0, at, scratch, n, cfg);
            }
        }
        if comptime!(cfg.listed) {
            if step.bits != 0 {
                hide_unlisted::<N>(s, keys, step, scratch, cfg);
            }
        }
    }
    slopes
}

/// Products or scores become weights `exp(s − lse)`; `row` is where the thread's first statistic stands. Where products are all that
/// scores are made of, `factor` takes them to logarithms of base 2, in which the statistics hold `−lse`.
#[cube]
fn weigh<N: Size>(
    s: &mut Accumulator<N>,
    rows: &Statistics,
    row: usize,
    factor: f32,
    #[comptime] cfg: HopperBackwardConfig,
) {
    #[unroll]
    for x in 0..comptime!(cfg.bq / 8) {
        let minus_lse = rows[row + comptime!(4 * x)];
        #[unroll]
        for y in 0..4usize {
            let e = comptime!(4 * x + y);
            let minus = minus_lse.extract(comptime!(y % 2));
            if comptime!(cfg.plain) {
                s.insert(e, exp2(fma(s.extract(e), factor, minus)));
            } else {
                s.insert(e, exp2((s.extract(e) + minus) * comptime!(core::f32::consts::LOG2_E)));
            }
        }
    }
}

/// Gradients of products, `p ∘ (dp − delta)` and times the derivative of the softcap and of the user's function, packed.
#[cube]
pub(crate) fn differentiate<N: Size, P: Size>(
    dp: Accumulator<N>,
    p: Accumulator<N>,
    slopes: Vector<u32, P>,
    rows: &Statistics,
    row: usize,
    n: Numbers,
    #[comptime] with_function: bool,
    #[comptime] cfg: HopperBackwardConfig,
) -> Vector<u32, P> {
    let first = row + comptime!(cfg.bq / 2);
    let mut ds = Vector::<u32, P>::new(0u32);
    #[unroll]
    for x in 0..comptime!(cfg.bq / 8) {
        let delta = rows[first + comptime!(4 * x)];
        #[unroll]
        for r in 0..2usize {
            let y = comptime!(2 * x + r);
            let (e, f) = comptime!((2 * y, 2 * y + 1));
            let mut low = p.extract(e) * (dp.extract(e) - delta.extract(0usize));
            let mut high = p.extract(f) * (dp.extract(f) - delta.extract(1usize));
            if comptime!(!cfg.plain) {
                let (slope_low, slope_high) = unpack(slopes.extract(y), cfg.element);
                if with_function {
                    // Where the key is hidden, by a value of −∞ or otherwise, the derivative may be anything.
                    low *= select(p.extract(e) == 0.0f32, 0.0f32, slope_low);
                    high *= select(p.extract(f) == 0.0f32, 0.0f32, slope_high);
                } else {
                    low = select(n.softcap > 0.0f32, low * slope_low, low);
                    high = select(n.softcap > 0.0f32, high * slope_high, high);
                }
            }
            ds.insert(y, pack(low, high, cfg.element));
        }
    }
    ds
}

/// Weights times the derivatives of the softcap and of the user's function.
#[cube]
pub(crate) fn times_slopes<N: Size, P: Size>(
    p: Accumulator<N>,
    slopes: Vector<u32, P>,
    n: Numbers,
    #[comptime] with_function: bool,
    #[comptime] cfg: HopperBackwardConfig,
) -> Accumulator<N> {
    let mut out = Accumulator::<N>::new(0.0f32);
    #[unroll]
    for y in 0..comptime!(cfg.bq / 4) {
        let (slope_low, slope_high) = unpack(slopes.extract(y), cfg.element);
        #[unroll]
        for r in 0..2usize {
            let e = comptime!(2 * y + r);
            let slope = if comptime!(r == 0) { slope_low } else { slope_high };
            let weight = p.extract(e);
            if with_function {
                // Where the key is hidden, by a value of −∞ or otherwise, the derivative may be anything.
                out.insert(e, select(weight == 0.0f32, 0.0f32, weight * slope));
            } else {
                out.insert(e, select(n.softcap > 0.0f32, weight * slope, weight));
            }
        }
    }
    out
}

/// Weights of keys that a query does not see become 0. A query past the end has none anyway: its `−lse` is −∞.
#[cube]
fn hide<N: Size>(
    p: &mut Accumulator<N>,
    keys: KeyRows,
    i0: u32,
    at: Head,
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let from = position(i0 + keys.column, n);
    #[unroll]
    for r in 0..2usize {
        // `band_allows` read for a key: the queries that see it are those of one span.
        let j = keys.j as i32 + comptime!(8 * r as i32);
        let sink = j < n.sinks;
        let first = j - select(sink, n.ahead, min(n.right, n.ahead)) - from;
        let last = select(sink, comptime!(i32::MAX).runtime(), j + n.left - from);
        let last = select(j < at.keys, last, -1i32);
        #[unroll]
        for x in 0..comptime!(cfg.bq / 4) {
            let column = comptime!((8 * (x / 2) + x % 2) as i32);
            let e = comptime!(4 * (x / 2) + 2 * r + x % 2);
            p.insert(e, select(column >= first && column <= last, p.extract(e), 0.0f32));
        }
    }
}

/// What a dense mask hides, as [`hide`]. The keys of a warp's rows lie in one word of 32.
#[cube]
fn hide_bits<N: Size>(
    p: &mut Accumulator<N>,
    keys: KeyRows,
    i0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    // Keys past the end are hidden by now, and have no word.
    let bit = min(keys.j, n.seq_kv - 1) * n.mask_key;
    #[unroll]
    for x in 0..comptime!(cfg.bq / 4) {
        // Queries past the end have no row; their weights are 0.
        let i = min(i0 + keys.column + comptime!((8 * (x / 2) + x % 2) as u32), n.seq_q - 1);
        let word = scratch[at.mask_at + i as usize * n.mask_query + (bit / 32u32) as usize];
        #[unroll]
        for r in 0..2usize {
            let e = comptime!(4 * (x / 2) + 2 * r + x % 2);
            let seen = (word >> ((keys.j + comptime!(8 * r as u32)) * n.mask_key % 32)) & 1u32;
            p.insert(e, select(seen == 1u32, p.extract(e), 0.0f32));
        }
    }
}

/// What a plan's bits of a Partial tile hide, as [`hide`]. They reach past the ends of queries and keys.
#[cube]
fn hide_unlisted<N: Size>(
    p: &mut Accumulator<N>,
    keys: KeyRows,
    step: Step,
    scratch: &[u32],
    #[comptime] cfg: HopperBackwardConfig,
) {
    let c = keys.j - step.j0;
    let first = step.bits + bit_word(0u32, step.row_words, keys.column, c) as usize;
    #[unroll]
    for x in 0..comptime!(cfg.bq / 4) {
        let row = comptime!((8 * (x / 2) + x % 2) as u32) * step.row_words;
        // That of the key 8 further too: a warp's rows are 16 keys.
        let word = scratch[first + row as usize];
        #[unroll]
        for r in 0..2usize {
            let e = comptime!(4 * (x / 2) + 2 * r + x % 2);
            let seen = bit_is_set(word, c + comptime!(8 * r as u32));
            p.insert(e, select(seen, p.extract(e), 0.0f32));
        }
    }
}

/// Products become scores: scale, then softcap, then ALiBi and bias, with one branch an option, then the user's function. Returns
/// the derivative of the softcap for each, times that of the function, packed; without either it means nothing.
///
/// Packed, it costs `ds` one more rounding to 16 bits beside its own, two with both. In f32 it would take the registers of a
/// product, or what hides behind the product for `dp` would have to wait for it.
#[cube]
fn shape_scores<E: Float, N: Size, P: Size>(
    s: &mut Accumulator<N>,
    keys: KeyRows,
    i0: u32,
    at: Head,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] cfg: HopperBackwardConfig,
) -> Vector<u32, P> {
    let mut slopes = Vector::<u32, P>::new(0u32);
    #[unroll]
    for e in 0..comptime!(cfg.bq / 2) {
        s.insert(e, s.extract(e) * n.scale);
    }
    if n.softcap > 0.0f32 {
        #[unroll]
        for x in 0..comptime!(cfg.bq / 4) {
            let (low, high) = (s.extract(comptime!(2 * x)), s.extract(comptime!(2 * x + 1)));
            let here = element_position(keys, i0, at, n, comptime!(2 * x));
            let capped_low = Softcap::value(low, here, n.softcap);
            let capped_high = Softcap::value(high, here, n.softcap);
            let (tanh_low, tanh_high) = (capped_low / n.softcap, capped_high / n.softcap);
            slopes.insert(x, pack(1.0f32 - tanh_low * tanh_low, 1.0f32 - tanh_high * tanh_high, cfg.element));
            s.insert(comptime!(2 * x), capped_low);
            s.insert(comptime!(2 * x + 1), capped_high);
        }
    }
    if n.slopes_at != 0 {
        #[unroll]
        for e in 0..comptime!(cfg.bq / 2) {
            s.insert(e, Alibi::value(s.extract(e), element_position(keys, i0, at, n, e), at.slope));
        }
    }
    if with_bias {
        let bias = bias.unwrap();
        let (rows, columns) = (bias.stride(2), bias.stride(3));
        #[unroll]
        for e in 0..comptime!(cfg.bq / 2) {
            let here = element_position(keys, i0, at, n, e);
            // A bias has no element for what lies past the ends.
            let i = min(i0 + keys.column + comptime!((8 * (e / 4) + e % 2) as u32), n.seq_q - 1);
            let j = min(here.j as u32, n.seq_kv - 1);
            let b = bias[at.bias_at + i as usize * rows + j as usize * columns];
            s.insert(e, Bias::value(s.extract(e), here, f32::cast_from(b)));
        }
    }
    if comptime!(function.is_some()) {
        #[unroll]
        for x in 0..comptime!(cfg.bq / 4) {
            let (cap_low, cap_high) = unpack(slopes.extract(x), cfg.element);
            let low = apply_function::<N>(s, keys, i0, at, scratch, n, comptime!(2 * x), function);
            let high = apply_function::<N>(s, keys, i0, at, scratch, n, comptime!(2 * x + 1), function);
            let low = select(n.softcap > 0.0f32, low * cap_low, low);
            let high = select(n.softcap > 0.0f32, high * cap_high, high);
            slopes.insert(x, pack(low, high, cfg.element));
        }
    }
    slopes
}

/// An element becomes the user's function's value there; returns the derivative. A query past the end has none: −∞, which
/// its weight is 0 of, whatever the function makes of a place that does not exist.
#[cube]
fn apply_function<N: Size>(
    s: &mut Accumulator<N>,
    keys: KeyRows,
    i0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] e: usize,
    #[comptime] function: Option<ScoreCode>,
) -> f32 {
    let i = i0 + keys.column + comptime!((8 * (e / 4) + e % 2) as u32);
    let j = keys.j + comptime!(8 * ((e / 2) % 2) as u32);
    let before = s.extract(e);
    let value = with_function(before, i, j, at, scratch, n, function);
    let slope = function_derivative(before, i, j, at, scratch, n, comptime!(function.unwrap()));
    s.insert(e, select(i < n.seq_q, value, n.minus_infinity));
    slope
}

/// Where element `e` of a thread's scores stands.
#[cube]
fn element_position(keys: KeyRows, i0: u32, at: Head, n: Numbers, #[comptime] e: usize) -> Position {
    Position {
        batch: at.batch,
        head: at.head,
        a: position(i0 + keys.column + comptime!((8 * (e / 4) + e % 2) as u32), n),
        j: (keys.j + comptime!(8 * ((e / 2) % 2) as u32)) as i32,
    }
}

/// Dropout of weights, or of their gradients; what is kept is left as it is, or grown.
#[cube]
pub(crate) fn drop_elements<N: Size>(
    s: &mut Accumulator<N>,
    keys: KeyRows,
    rows: &Statistics,
    row: usize,
    n: Numbers,
    #[comptime] grows: bool,
    #[comptime] cfg: HopperBackwardConfig,
) {
    if n.threshold != 0 {
        #[unroll]
        for x in 0..comptime!(cfg.bq / 8) {
            let hashes = rows[row + comptime!(cfg.bq + 4 * x)];
            #[unroll]
            for y in 0..4usize {
                let e = comptime!(4 * x + y);
                let hash = u32::reinterpret(hashes.extract(comptime!(y % 2)));
                let kept = if comptime!(grows) { s.extract(e) * n.factor } else { s.extract(e) };
                let j = keys.j + comptime!(8 * (y / 2) as u32);
                s.insert(e, select(dropout_keeps(hash, j, n.threshold), kept, 0.0f32));
            }
        }
    }
}
