//! What a thread of a warpgroup does with its two rows of a product: hides, exponentiates, sums, packs, stores.
//!
//! Where the elements of an accumulator stand is told at [`Accumulator`].

use cubecl::prelude::*;

use super::place::{Heads, Place, head_at, query_at};
use super::ptx::Accumulator;
use crate::block_plan::flat::bit_word;
use crate::dropout::dropout_keeps;
use crate::family::element::{Numbers, position, row_hash};
use crate::family::ptx::{exp2, value_of};
use crate::family::score_function::with_function;
use crate::family::walk::Step;
use crate::score::{Alibi, Bias, Position, ScoreCode, ScoreFunction, Softcap};

/// Growth of the maximum, in powers of 2, up to which what was accumulated is not rescaled (FlashAttention-4's conditional
/// rescaling): weights then reach 2⁸, which every 16-bit type holds without loss of precision.
const SLACK: f32 = 8.0;

/// Online softmax of a thread's two rows. `m` is in the unit of the scores, `l` of this thread's columns only.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct RowState {
    pub m0: f32,
    pub m1: f32,
    /// What exponents are taken against.
    pub base0: f32,
    pub base1: f32,
    pub l0: f32,
    pub l1: f32,
    /// Whether a maximum of the warp grew in the last tile: then what was accumulated before is multiplied by factors.
    pub grown: bool,
    pub grow0: f32,
    pub grow1: f32,
}

/// Before any key.
#[cube]
pub(crate) fn rows_start(n: Numbers) -> RowState {
    let m = n.minus_infinity;
    RowState {
        m0: m,
        m1: m,
        base0: 0.0f32,
        base1: 0.0f32,
        l0: 0.0f32,
        l1: 0.0f32,
        grown: false,
        grow0: 1.0f32,
        grow1: 1.0f32,
    }
}

/// Scores that a query does not see become −∞. Without `with_bits` only position and length hide. What a row sees is worked
/// out for 32 keys at a time, a bit each.
#[cube]
pub(crate) fn hide<N: Size>(
    s: &mut Accumulator<N>,
    place: Place,
    step: Step,
    heads: Heads,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bits: bool,
    #[comptime] bk: usize,
) {
    let words = comptime!(bk.div_ceil(32));
    let mut bits = Array::<u32>::new(comptime!(2 * words));
    if with_bits {
        read_bits(&mut bits, place, step, heads, scratch, n, words);
    }
    #[unroll]
    for r in 0..2usize {
        let at = head_at(heads, r);
        let a = position(query_at(place, r), n);
        // As `band_allows`, with the bounds of a row taken once. Rows past the end hide nothing: they are not stored.
        let from = step.j0 as i32 + place.column as i32;
        let first = max(a - n.left, 0i32) - from;
        let end = min(a + min(n.right, n.ahead), at.keys - 1) + 1 - from;
        let sinks = min(min(n.sinks, a + n.ahead + 1), at.keys) - from;
        #[unroll]
        for word in 0..words {
            let before = comptime!(32 * word as i32);
            let mut seen = ones(first - before, end - before) | ones(0i32, sinks - before);
            if with_bits {
                seen &= bits[comptime!(r * words + word)] >> place.column;
            }
            #[unroll]
            for x in 0..comptime!(8.min((bk - 32 * word) / 4)) {
                let e = comptime!(16 * word + 4 * (x / 2) + 2 * r + x % 2);
                let own = comptime!(1u32 << (8 * (x / 2) + x % 2));
                s.insert(e, select(seen & own != 0, s.extract(e), n.minus_infinity));
            }
        }
    }
}

/// Ones in bits `start .. end` of a word.
#[cube]
fn ones(start: i32, end: i32) -> u32 {
    let start = max(start, 0i32);
    let width = value_of::<u32>(max(end - start, 0i32) as u32);
    let start = value_of::<u32>(start as u32);
    let out: u32;
    gpu_asm!(
        "bmsk.clamp.b32 {out}, {start}, {width};",
        out = out(_) out, start = in(_) start, width = in(_) width, options(pure, nomem),
    );
    out
}

/// What a dense mask and the bits of a plan let a thread's rows see, `words` words a row. All are asked for before any is needed: one
/// after another they would take longer than the product.
#[cube]
fn read_bits(
    bits: &mut Array<u32>,
    place: Place,
    step: Step,
    heads: Heads,
    scratch: &[u32],
    n: Numbers,
    #[comptime] words: usize,
) {
    let all = 0xFFFF_FFFFu32;
    #[unroll]
    for x in 0..comptime!(2 * words) {
        bits[x] = all.runtime();
    }
    if step.bits != 0 {
        #[unroll]
        for x in 0..comptime!(2 * words) {
            let (i, column) = (row_of(place, n, comptime!(x / words)), comptime!(32 * (x % words) as u32));
            let word = bit_word(0u32, step.row_words, i - step.i0, column);
            bits[x] = scratch[step.bits + word as usize];
        }
    }
    // Keys past the end have no bits; their position hides them.
    if n.mask_at != 0 && step.j0 < n.seq_kv {
        #[unroll]
        for x in 0..comptime!(2 * words) {
            let (i, j0) = (row_of(place, n, comptime!(x / words)), step.j0 + comptime!(32 * (x % words) as u32));
            let bit = min(j0, n.seq_kv - 1) * n.mask_key;
            let at = head_at(heads, comptime!(x / words)).mask_at;
            let mask = scratch[at + i as usize * n.mask_query + (bit / 32u32) as usize];
            // A mask that is broadcast along the keys has one bit for all.
            bits[x] &= select(n.mask_key == 0, 0u32 - (mask & 1u32), mask);
        }
    }
}

/// The query of row `r` of a thread. What lies past the end has no bits; such rows are not stored.
#[cube]
fn row_of(place: Place, n: Numbers, #[comptime] r: usize) -> u32 {
    min(query_at(place, r), n.seq_q - 1)
}

/// Products become scores: scale, then softcap, then ALiBi and bias, as [`score`](crate::family::element::score) does it,
/// but with one branch an option and not one an element: the compiler takes minutes over the latter. The user's function
/// comes last; past the ends its values are dropped with the queries, or hidden with the keys.
#[cube]
pub(crate) fn shape_scores<E: Float, N: Size>(
    s: &mut Accumulator<N>,
    place: Place,
    step: Step,
    heads: Heads,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] bk: usize,
) {
    #[unroll]
    for e in 0..comptime!(bk / 2) {
        s.insert(e, s.extract(e) * n.scale);
    }
    if n.softcap > 0.0f32 {
        #[unroll]
        for e in 0..comptime!(bk / 2) {
            s.insert(e, Softcap::value(s.extract(e), element_position(place, step, heads, n, e), n.softcap));
        }
    }
    if n.slopes_at != 0 {
        #[unroll]
        for e in 0..comptime!(bk / 2) {
            let slope = head_at(heads, comptime!((e / 2) % 2)).slope;
            s.insert(e, Alibi::value(s.extract(e), element_position(place, step, heads, n, e), slope));
        }
    }
    if with_bias {
        let bias = bias.unwrap();
        let (rows, columns) = (bias.stride(2), bias.stride(3));
        #[unroll]
        for e in 0..comptime!(bk / 2) {
            let here = element_position(place, step, heads, n, e);
            // A bias has no element for what lies past the ends.
            let i = min(query_at(place, comptime!((e / 2) % 2)), n.seq_q - 1);
            let j = min(here.j as u32, n.seq_kv - 1);
            let b = bias[head_at(heads, comptime!((e / 2) % 2)).bias_at + i as usize * rows + j as usize * columns];
            s.insert(e, Bias::value(s.extract(e), here, f32::cast_from(b)));
        }
    }
    if comptime!(function.is_some()) {
        #[unroll]
        for e in 0..comptime!(bk / 2) {
            let i = query_at(place, comptime!((e / 2) % 2));
            let j = step.j0 + place.column + comptime!((8 * (e / 4) + e % 2) as u32);
            let at = head_at(heads, comptime!((e / 2) % 2));
            s.insert(e, with_function(s.extract(e), i, j, at, scratch, n, function));
        }
    }
}

/// Where element `e` of a thread's scores stands.
#[cube]
fn element_position(place: Place, step: Step, heads: Heads, n: Numbers, #[comptime] e: usize) -> Position {
    let at = head_at(heads, comptime!((e / 2) % 2));
    Position {
        batch: at.batch,
        head: at.head,
        a: position(query_at(place, comptime!((e / 2) % 2)), n),
        j: (step.j0 + place.column + comptime!((8 * (e / 4) + e % 2) as u32)) as i32,
    }
}

/// Scores become weights `exp(s − m)`; `m`, `l` and the factors of what was accumulated follow.
#[cube]
pub(crate) fn softmax_tile<N: Size>(
    s: &mut Accumulator<N>,
    rows: &mut RowState,
    factor: f32,
    #[comptime] plain: bool,
    #[comptime] bk: usize,
) {
    let top0 = row_max::<N>(*s, 0usize, bk);
    let top1 = row_max::<N>(*s, 2usize, bk);
    // Mostly every thread finds that the old maxima will do, and the threads of a row need not ask each other.
    let within = keeps(rows.m0, top0, factor) && keeps(rows.m1, top1, factor);
    rows.grown = !plane_all(within);
    if rows.grown {
        let (m0, m1) = (value_of::<f32>(rows.m0), value_of::<f32>(rows.m1));
        rows.m0 = new_maximum(m0, quad_max(top0), factor);
        rows.m1 = new_maximum(m1, quad_max(top1), factor);
        rows.base0 = exponent_base(rows.m0, factor, plain);
        rows.base1 = exponent_base(rows.m1, factor, plain);
        rows.grow0 = growth(m0, rows.m0, factor, rows.base0, plain);
        rows.grow1 = growth(m1, rows.m1, factor, rows.base1, plain);
        rows.l0 *= rows.grow0;
        rows.l1 *= rows.grow1;
    }
    let (base0, base1) = (value_of::<f32>(rows.base0), value_of::<f32>(rows.base1));
    let mut sum0 = value_of::<f32>(rows.l0);
    let mut sum1 = value_of::<f32>(rows.l1);
    #[unroll]
    for x in 0..comptime!(bk / 4) {
        let (e0, e1) = comptime!((4 * (x / 2) + x % 2, 4 * (x / 2) + 2 + x % 2));
        let p0 = exp2(exponent(s.extract(e0), factor, base0, plain));
        let p1 = exp2(exponent(s.extract(e1), factor, base1, plain));
        sum0 += p0;
        sum1 += p1;
        s.insert(e0, p0);
        s.insert(e1, p1);
    }
    rows.l0 = sum0;
    rows.l1 = sum1;
}

/// The largest of a row's scores in this thread, over four chains that do not wait for each other.
#[cube]
fn row_max<N: Size>(s: Accumulator<N>, #[comptime] row: usize, #[comptime] bk: usize) -> f32 {
    let mut tops = Array::<f32>::new(4usize);
    #[unroll]
    for x in 0..comptime!(bk / 4) {
        let y = s.extract(comptime!(4 * (x / 2) + row + x % 2));
        if comptime!(x < 4) {
            tops[x] = y;
        } else {
            tops[comptime!(x % 4)] = max(tops[comptime!(x % 4)], y);
        }
    }
    max(max(tops[0], tops[1]), max(tops[2], tops[3]))
}

/// Whether weights against the old maximum stay below 2 to the power of [`SLACK`]. With an old maximum of −∞ the difference
/// is +∞, or NaN where nothing was seen yet; the test is then false.
#[cube]
fn keeps(old: f32, top: f32, factor: f32) -> bool {
    (top - old) * factor <= SLACK
}

/// The maximum that weights are taken against: the old one where that will do.
#[cube]
fn new_maximum(old: f32, top: f32, factor: f32) -> f32 {
    select(keeps(old, top, factor), old, max(old, top))
}

/// Factor of what was accumulated under the old maximum: exactly 1 where that was kept, which the exponent of a rounded
/// product would not give.
#[cube]
fn growth(old: f32, new: f32, factor: f32, base: f32, #[comptime] plain: bool) -> f32 {
    select(new == old, 1.0f32, exp2(exponent(old, factor, base, plain)))
}

/// What exponents are taken against: 0 for a row that has seen nothing, else `m`, or `m · factor` where products are all
/// that scores are made of.
#[cube]
fn exponent_base(m: f32, factor: f32, #[comptime] plain: bool) -> f32 {
    let base = if plain { m * factor } else { m };
    select(u32::reinterpret(m) == 0xff80_0000u32, 0.0f32, base)
}

/// `(s − m) · factor`. A plain score takes one instruction; a bias may be the lowest number, whose multiple is not finite.
#[cube]
fn exponent(s: f32, factor: f32, base: f32, #[comptime] plain: bool) -> f32 {
    if plain { fma(s, factor, -base) } else { (s - base) * factor }
}

/// Maximum over the four threads of a row.
#[cube]
fn quad_max(x: f32) -> f32 {
    let y = max(x, plane_shuffle_xor(x, 1u32));
    max(y, plane_shuffle_xor(y, 2u32))
}

/// Sum over the four threads of a row.
#[cube]
fn quad_sum(x: f32) -> f32 {
    let y = x + plane_shuffle_xor(x, 1u32);
    y + plane_shuffle_xor(y, 2u32)
}

/// Dropout of the weights, which the sums do not feel. What is kept is not grown here: weights would be rounded once more, and
/// all grow alike.
#[cube]
pub(crate) fn drop_weights<N: Size>(
    s: &mut Accumulator<N>,
    place: Place,
    step: Step,
    heads: Heads,
    n: Numbers,
    #[comptime] bk: usize,
) {
    if n.threshold != 0 {
        drop_elements::<N>(s, place, step, heads, n, bk);
    }
}

#[cube]
fn drop_elements<N: Size>(
    s: &mut Accumulator<N>,
    place: Place,
    step: Step,
    heads: Heads,
    n: Numbers,
    #[comptime] bk: usize,
) {
    let batch_heads = heads.first.batch * n.heads_q;
    let head0 = batch_heads + heads.first.head;
    let head1 = if comptime!(place.packed) { batch_heads + heads.other.head } else { head0 };
    let (hash0, hash1) = (row_hash(head0, place.i, n), row_hash(head1, query_at(place, 1usize), n));
    #[unroll]
    for e in 0..comptime!(bk / 2) {
        let hash = if comptime!((e / 2) % 2 == 0) { hash0 } else { hash1 };
        let j = step.j0 + place.column + comptime!((8 * (e / 4) + e % 2) as u32);
        s.insert(e, select(dropout_keeps(hash, j, n.threshold), s.extract(e), 0.0f32));
    }
}

/// Weights as the operand of the next product: 16 columns are four registers. In one block, which the compiler does not take
/// to where they are used, past the wait for the product in flight. `text` is [`pack_text`]'s.
#[cube]
pub(crate) fn pack_weights<N: Size, P: Size>(s: Accumulator<N>, #[comptime] text: &str) -> Vector<u32, P> {
    let s = value_of::<Accumulator<N>>(s);
    let p: Vector<u32, P>;
    gpu_asm!("{text}// {p} {s}\n", p = out(_) p, s = in(_) s);
    p
}

/// The block of [`pack_weights`] for `bk` columns: `lanes` registers come out.
pub(crate) fn pack_text(lanes: usize, bk: usize, ty: &str) -> String {
    let packed = |x: usize| format!("cvt.rn.{ty}x2.f32 %{x}, %{}, %{};\n", lanes + 2 * x + 1, lanes + 2 * x);
    (0..bk / 4).map(packed).collect()
}

/// What was accumulated, under the new maximum. Skipped where no row of the warp has one.
#[cube]
pub(crate) fn rescale<N: Size>(o: &mut Accumulator<N>, rows: RowState, #[comptime] dim: usize) {
    if rows.grown {
        #[unroll]
        for e in 0..comptime!(dim / 2) {
            let grow = if comptime!((e / 2) % 2 == 0) { rows.grow0 } else { rows.grow1 };
            o.insert(e, o.extract(e) * grow);
        }
    }
}

/// A row that all keys are known of: `m` and `l` as in [`RowState`], of the whole row, and what the output is multiplied by.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct RowEnd {
    pub m: f32,
    pub l: f32,
    pub norm: f32,
    /// Whether the row saw any key; else its output is 0.
    pub some: bool,
}

/// The end of a row, with what a thread has of its sum. A learned sink is one more score, that has no value. It comes last:
/// weights against a sink above all scores would be rounded.
#[cube]
pub(crate) fn row_end(
    m: f32,
    l: f32,
    head: u32,
    scratch: &[u32],
    n: Numbers,
    factor: f32,
    #[comptime] plain: bool,
) -> RowEnd {
    let keys = quad_sum(l);
    let mut end = RowEnd { m, l: keys, norm: 1.0f32 / keys, some: u32::reinterpret(keys) != 0u32 };
    if comptime!(!plain) {
        if n.sinks_at != 0 {
            let sink = f32::reinterpret(scratch[n.sinks_at + head as usize]);
            let higher = max(m, sink);
            let base = exponent_base(higher, factor, plain);
            let shrink = exp2(exponent(m, factor, base, plain));
            end.m = higher;
            end.l = keys * shrink + exp2(exponent(sink, factor, base, plain));
            end.norm = shrink / end.l;
        }
        // By which dropout grows what it keeps.
        end.norm *= n.factor;
    }
    end
}
