//! One score: where it stands, whether it is seen, what becomes of it.

use cubecl::prelude::*;

use super::walk::Step;
use crate::block_plan::flat::{bit_is_set, bit_word};
use crate::dropout::{dropout_keeps, dropout_row};
use crate::mask::{band_allows, band_keys};
use crate::problem::Problem;
use crate::score::{Alibi, Bias, Position, ScoreFunction, Softcap};

/// The numbers of a problem, and with them its options, given at run time: a kernel is compiled once for all lengths,
/// windows and options, a bias excepted, which takes a binding. The `…_at` are offsets into the scratch buffer in words,
/// 0 where the problem lacks what would stand there.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Numbers {
    pub batch: u32,
    pub heads_q: u32,
    pub heads_kv: u32,
    pub seq_q: u32,
    pub seq_kv: u32,
    pub head_dim: u32,
    pub value_dim: u32,
    pub scale: f32,
    /// 0 without a softcap.
    pub softcap: f32,
    pub ahead: i32,
    pub left: i32,
    pub right: i32,
    pub sinks: i32,
    pub seed_low: u32,
    pub seed_high: u32,
    /// Dropout keeps what hashes to this or more: everything, at 0.
    pub threshold: u32,
    pub factor: f32,
    /// −∞, which WGSL cannot write down.
    pub minus_infinity: f32,
    pub lse_at: usize,
    pub delta_at: usize,
    pub norm_at: usize,
    pub slopes_at: usize,
    pub sinks_at: usize,
    pub lengths_at: usize,
    pub slope_partials_at: usize,
    pub bias_partials_at: usize,
    /// Parameters of a user's score function: where, and how many.
    pub parameters_at: usize,
    pub parameters: u32,
    pub parameter_partials_at: usize,
    /// Where the block plan starts.
    pub plan_at: usize,
    pub mask_at: usize,
    /// Words between batch elements, heads and queries of the packed mask; 0 where it is broadcast.
    pub mask_batch: usize,
    pub mask_head: usize,
    pub mask_query: usize,
    /// 1, or 0 where the mask is broadcast along the keys.
    pub mask_key: u32,
}

/// The head that a cube works on and what it needs of it, looked up once.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Head {
    pub batch: u32,
    pub head: u32,
    /// Keys of this batch element that may be seen.
    pub keys: i32,
    /// ALiBi slope, 0 if there is none.
    pub slope: f32,
    /// Where the packed mask of this head starts in the scratch buffer.
    pub mask_at: usize,
    /// Where the bias of this head starts.
    pub bias_at: usize,
}

/// Looks up what a head needs.
#[cube]
pub(crate) fn head_of<E: Float>(
    batch: u32,
    head: u32,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
) -> Head {
    let mut keys = n.seq_kv as i32;
    let mut slope = 0.0f32;
    let mut bias_at = 0usize;
    let mut mask_at = 0usize;
    if n.lengths_at != 0 {
        let length = i32::reinterpret(scratch[n.lengths_at + batch as usize]);
        keys = max(min(keys, length), 0i32);
    }
    if n.slopes_at != 0 {
        slope = f32::reinterpret(scratch[n.slopes_at + head as usize]);
    }
    if with_bias {
        bias_at = batch as usize * bias.unwrap().stride(0) + head as usize * bias.unwrap().stride(1);
    }
    if n.mask_at != 0 {
        mask_at = n.mask_at + batch as usize * n.mask_batch + head as usize * n.mask_head;
    }
    Head { batch, head, keys, slope, mask_at, bias_at }
}

/// Whether query `i` sees key `j` of a tile. Both exist or not: what lies outside the tensors is hidden.
#[cube]
pub(crate) fn sees(i: u32, j: u32, step: Step, at: Head, scratch: &[u32], n: Numbers) -> bool {
    let a = position(i, n);
    let mut seen = i < n.seq_q && (j as i32) < at.keys;
    seen = seen && band_allows(a, j as i32, n.ahead, n.left, n.right, n.sinks);
    if seen && n.mask_at != 0 {
        let bit = j * n.mask_key;
        let word = scratch[at.mask_at + i as usize * n.mask_query + (bit / 32u32) as usize];
        seen = (word >> (bit % 32u32)) & 1u32 == 1u32;
    }
    if seen && step.bits != 0 {
        // From the word on that the tile starts in: one of fewer than 32 keys may start within it.
        let c = j - step.j0 / 32u32 * 32u32;
        let word = bit_word(0u32, step.row_words, i - step.i0, c);
        seen = bit_is_set(scratch[step.bits + word as usize], c);
    }
    seen
}

/// The keys that a query sees in a tile that no dense mask and no plan's bits touch: those from `start` on and before `end`,
/// and those before `first`.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Reach {
    start: i32,
    end: i32,
    first: i32,
}

/// What [`sees`] says of query `i` by position and key lengths, for a kernel that asks about many of its keys.
#[cube]
pub(crate) fn reach_of(i: u32, at: Head, n: Numbers) -> Reach {
    // A query past the end sees nothing.
    let keys = select(i < n.seq_q, at.keys, 0i32);
    let (start, end, first) = band_keys(position(i, n), keys, n.ahead, n.left, n.right, n.sinks);
    Reach { start, end, first }
}

/// Whether key `j` is within reach.
#[cube]
pub(crate) fn in_reach(j: u32, reach: Reach) -> bool {
    let j = j as i32;
    (j >= reach.start && j < reach.end) || j < reach.first
}

/// The query's position on the key axis.
#[cube]
pub(crate) fn position(i: u32, n: Numbers) -> i32 {
    i as i32 + (n.seq_kv as i32 - n.seq_q as i32)
}

/// Hash of a query row for dropout; `head` counts over the batch.
#[cube]
pub(crate) fn row_hash(head: u32, i: u32, n: Numbers) -> u32 {
    let mut hash = 0u32;
    if n.threshold != 0 {
        hash = dropout_row(n.seed_low, n.seed_high, head, i);
    }
    hash
}

/// `x` after dropout: 0, or grown by the factor.
#[cube]
pub(crate) fn after_dropout(x: f32, hash: u32, j: u32, n: Numbers) -> f32 {
    where_kept(x * n.factor, hash, j, n)
}

/// `x`, or 0 where dropout drops it. What is kept is not grown: weights that are rounded would be so once more, and all grow alike.
#[cube]
pub(crate) fn where_kept(x: f32, hash: u32, j: u32, n: Numbers) -> f32 {
    let mut y = x;
    if n.threshold != 0 {
        y = select(dropout_keeps(hash, j, n.threshold), x, 0.0f32);
    }
    y
}

/// Score of query `i` and key `j` from their product: scale, then softcap, then ALiBi and bias. A user's function comes
/// after it (`with_function`).
#[cube]
pub(crate) fn score<E: Float>(
    product: f32,
    i: u32,
    j: u32,
    at: Head,
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
) -> f32 {
    let place = Position { batch: at.batch, head: at.head, a: position(i, n), j: j as i32 };
    let mut s = product * n.scale;
    if n.softcap > 0.0f32 {
        s = Softcap::value(s, place, n.softcap);
    }
    s = Alibi::value(s, place, at.slope); // a slope of 0 leaves every bit
    if with_bias {
        let bias = bias.unwrap();
        let b = bias[at.bias_at + i as usize * bias.stride(2) + j as usize * bias.stride(3)];
        s = Bias::value(s, place, f32::cast_from(b));
    }
    s
}

/// Whether a score or log-sum-exp is −∞.
#[cube]
pub(crate) fn is_minus_infinity(x: f32) -> bool {
    u32::reinterpret(x) == 0xff80_0000u32
}

/// Derivative of [`score`] for the product: the chain of the parts' derivatives, and the scale. Alibi and bias only add,
/// so theirs is 1.
#[cube]
pub(crate) fn score_derivative(product: f32, i: u32, j: u32, at: Head, n: Numbers) -> f32 {
    let mut d = n.scale;
    if n.softcap > 0.0f32 {
        let place = Position { batch: at.batch, head: at.head, a: position(i, n), j: j as i32 };
        d *= Softcap::derivative(product * n.scale, place, n.softcap);
    }
    d
}

/// Whether a score is more than a product by a positive scale, or its probability is dropped.
pub(crate) fn has_options(problem: &Problem) -> bool {
    let Problem { scale, softcap, alibi, score, dropout, .. } = *problem;
    softcap.is_some()
        || alibi
        || problem.bias.is_some()
        || score.is_some()
        || dropout.is_some()
        // Folded into the exponent, the scale must keep the order of scores.
        || scale as f32 <= f32::MIN_POSITIVE
}
