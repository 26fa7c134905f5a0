//! Forward: `o = softmax(f(q·kᵀ · scale)) · v` and `lse`, in one pass over the keys.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 1. A cube owns a tile of queries of one head, a plane 16 or 32 rows of it.
//! Scores go from the matrices of the first product to shared memory, where one unit (or a few neighbours) takes the maximum and
//! the exponentials of a row, and rounded probabilities come back as the operand of the second. The output stays in
//! registers: it passes through shared memory to be shrunk only where a maximum was outgrown by more than [`LAG`].
//!
//! In a Partial tile what is hidden gets the weight 0, and 0 times a NaN or an infinity among the values of a hidden key is NaN: such
//! values reach every query of that tile. Rows past the end are zeros.

use cubecl::prelude::*;

use super::config::Compiled;
use super::gradient::shows;
use super::products::{accumulate, product, zeros};
use super::sums::{own_column, own_row, own_scores, own_weights, row_maximum, row_sum, scale_rows, store_rows};
use super::tile::{E4, LANES, V4, head_rows, load_rows, pitch, score_pitch};
use crate::family::element::{Head, Numbers, Reach, head_of, is_minus_infinity, reach_of, row_hash, score, where_kept};
use crate::family::score_function::with_function;
use crate::family::walk::{Side, Step, key_step, key_walk, work_of};

/// Scores are taken from a maximum that may lag behind by so much: then probabilities are at most 2⁸, which even f16 holds.
const LAG: f32 = 8.0 * core::f32::consts::LN_2;

/// What the tile of scores holds where a score is hidden: no visible score is that large.
const HIDDEN: f32 = f32::MAX;

/// One cube a query tile and head, the longest tiles first.
#[cfg_attr(not(all(test, feature = "compilers")), cube(launch_unchecked, address_type = "dynamic"))]
#[cfg_attr(all(test, feature = "compilers"), cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic"))]
pub(crate) fn forward_kernel<E: Float, W: Size>(
    q: &Tensor<Vector<E, W>>,
    k: &Tensor<Vector<E, W>>,
    v: &Tensor<Vector<E, W>>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    o: &mut [E],
    mut lse: ComptimeOption<&mut [f32]>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] with_lse: bool,
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    let tile = comptime!(c.tile);
    let work = work_of(CUBE_POS, n.heads_q, n.seq_q, scratch, n, Side::Queries, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, i0) = (work.head, work.tile * comptime!(tile.rows() as u32));
    let (b, h) = (head / n.heads_q, head % n.heads_q);
    let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
    let kv = h / (n.heads_q / n.heads_kv);
    let q_rows = head_rows::<E, W>(q, b, h, n.seq_q, n.head_dim);
    let k_rows = head_rows::<E, W>(k, b, kv, n.seq_kv, n.head_dim);
    let v_rows = head_rows::<E, W>(v, b, kv, n.seq_kv, n.value_dim);

    let (v_at, walked_len) = comptime!(tile.walked(c.head_dim, c.value_dim));
    let mut own = Shared::<[E4<E>]>::new_aligned_slice(comptime!(tile.rows() * pitch(c.head_dim) / LANES), 32usize);
    let mut walked = Shared::<[E4<E>]>::new_aligned_slice(comptime!(walked_len / LANES), 32usize);
    let mut scores =
        Shared::<[V4]>::new_aligned_slice(comptime!(tile.rows() * score_pitch(tile.cols) / LANES), 32usize);
    let mut weights = Shared::<[E4<E>]>::new_aligned_slice(comptime!(tile.rows() * pitch(tile.cols) / LANES), 32usize);

    let mut acc = zeros(comptime!(tile.plane_rows() * c.value_dim / (tile.edge * tile.edge)), tile); // o [rows, Dv]
    let i = i0 + own_row(tile);
    let reach = reach_of(i, at, n);
    let mut m = n.minus_infinity; // of everything this unit's row saw, or less by LAG
    let mut l = 0.0f32; // this unit's columns only, until the end
    let mut hash = 0u32;
    if comptime!(c.options) {
        hash = row_hash(head, i, n);
    }
    load_rows::<E, W>(q, q_rows, i0, &mut own, 0usize, tile.rows(), c.head_dim, tile);

    let walk = key_walk(i0, at, scratch, n, tile.shape());
    for t in 0..walk.steps {
        let step = key_step(walk, t, i0, at, scratch, n, c.hides, tile.shape());
        if !step.empty {
            // Everyone is done with the last tile.
            sync_cube();
            load_rows::<E, W>(k, k_rows, step.j0, &mut walked, 0usize, tile.cols, c.head_dim, tile);
            if comptime!(tile.apart) {
                load_rows::<E, W>(v, v_rows, step.j0, &mut walked, v_at, tile.cols, c.value_dim, tile);
            }
            sync_cube();
            product::<E>(&own, 0usize, &walked, 0usize, &mut scores, c.head_dim, tile); // s = q · kᵀ
            if comptime!(!tile.apart) {
                sync_cube();
                load_rows::<E, W>(v, v_rows, step.j0, &mut walked, v_at, tile.cols, c.value_dim, tile);
            }
            sync_plane();

            let mut unit = 1.0f32; // of what stands in the tile of scores
            let mut top = m;
            if comptime!(!c.options) && step.full {
                unit = n.scale;
                top = max(top, top_of_products(&scores, c) * n.scale);
            } else {
                top = max(top, finish_scores::<E>(&mut scores, i, reach, step, at, scratch, bias, n, with_bias, c));
            }
            top = row_maximum(top, tile);
            let unseen = is_minus_infinity(m);
            let behind = !unseen && top - m > LAG;
            let mut shrink = 1.0f32;
            if behind {
                shrink = (m - top).exp();
            }
            if behind || unseen {
                m = top;
            }
            l = l * shrink + probabilities::<E>(&scores, &mut weights, m, unit, hash, step.j0, n, c);
            if plane_any(behind) {
                scale_rows(&mut acc, &mut scores, shrink, c.value_dim, tile);
            }
            if comptime!(tile.apart) {
                sync_plane();
            } else {
                sync_cube();
            }
            accumulate::<E>(&acc, &weights, &walked, v_at, c.value_dim, tile); // o += p · v
        }
    }

    let mut sum = row_sum(l, tile);
    let mut shrink = 1.0f32;
    if n.sinks_at != 0 {
        // A learned sink is one more score that has no value.
        let sink = f32::reinterpret(scratch[n.sinks_at + h as usize]);
        let higher = max(m, sink);
        if !is_minus_infinity(higher) {
            shrink = (m - higher).exp();
            sum = sum * shrink + (sink - higher).exp();
            m = higher;
        }
    }
    // A row that saw nothing has a sum of 0.
    let seen = u32::reinterpret(sum) != 0u32;
    // Dropout grows what it keeps.
    let norm = select(seen, shrink / sum * n.factor, 0.0f32);
    let first = head as usize * n.seq_q as usize;
    if with_lse {
        if UNIT_POS_X.is_multiple_of(comptime!(tile.row_units() as u32)) && i < n.seq_q {
            lse.as_mut().unwrap()[first + i as usize] = select(seen, m + sum.ln(), n.minus_infinity);
        }
    }
    let left = n.seq_q - i0;
    store_rows::<E>(&acc, &mut scores, norm, o, first + i0 as usize, left, n.value_dim, c.value_dim, tile);
}

/// The maximum of this unit's products.
#[cube]
fn top_of_products(scores: &Shared<[V4]>, #[comptime] c: Compiled) -> f32 {
    let tile = comptime!(c.tile);
    let own = own_scores(tile);
    let mut top = scores[own].extract(0usize);
    #[unroll]
    for x in 0..comptime!(tile.row_vectors()) {
        let y = scores[own + comptime!(x * tile.row_units())];
        let (low, high) = (max(y.extract(0usize), y.extract(1usize)), max(y.extract(2usize), y.extract(3usize)));
        top = max(top, max(low, high));
    }
    top
}

/// Turns this unit's products into scores, [`HIDDEN`] where its query does not see the key, and takes their maximum.
#[cube]
fn finish_scores<E: Float>(
    scores: &mut Shared<[V4]>,
    i: u32,
    reach: Reach,
    step: Step,
    at: Head,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] c: Compiled,
) -> f32 {
    let tile = comptime!(c.tile);
    let own = own_scores(tile);
    let mut top = n.minus_infinity;
    #[unroll]
    for x in 0..comptime!(tile.row_vectors()) {
        let place = own + comptime!(x * tile.row_units());
        let products = scores[place];
        let mut finished = V4::new(HIDDEN.runtime());
        #[unroll]
        for lane in 0..LANES {
            let j = step.j0 + own_column(x, tile) + comptime!(lane as u32);
            if shows(i, j, reach, step, at, scratch, n) {
                let mut s = products.extract(lane) * n.scale;
                if comptime!(c.options) {
                    s = score::<E>(products.extract(lane), i, j, at, bias, n, with_bias);
                    s = with_function(s, i, j, at, scratch, n, c.function);
                }
                // A score of −∞ is as good as hidden.
                if !is_minus_infinity(s) {
                    finished.insert(lane, s);
                    top = max(top, s);
                }
            }
        }
        scores[place] = finished;
    }
    top
}

/// Writes the probabilities of this unit's scores, dropped ones 0, and returns the sum of all, none dropped.
#[cube]
fn probabilities<E: Float>(
    scores: &Shared<[V4]>,
    weights: &mut Shared<[E4<E>]>,
    m: f32,
    unit: f32,
    hash: u32,
    j0: u32,
    n: Numbers,
    #[comptime] c: Compiled,
) -> f32 {
    let tile = comptime!(c.tile);
    let (from, to) = (own_scores(tile), own_weights(tile));
    let mut sum = 0.0f32;
    #[unroll]
    for x in 0..comptime!(tile.row_vectors()) {
        let step = comptime!(x * tile.row_units());
        let s = scores[from + step];
        let mut p = V4::new(0.0f32);
        #[unroll]
        for lane in 0..LANES {
            let s = s.extract(lane);
            // By its bits: a NaN differs from it, so that a visible NaN stays visible.
            let hidden = u32::reinterpret(s) == 0x7f7f_ffffu32;
            let mut weight = select(hidden, 0.0f32, (s * unit - m).exp());
            sum += weight;
            if comptime!(c.options) {
                weight = where_kept(weight, hash, j0 + own_column(x, tile) + comptime!(lane as u32), n);
            }
            p.insert(lane, weight);
        }
        weights[to + step] = E4::<E>::cast_from(p);
    }
    sum
}
