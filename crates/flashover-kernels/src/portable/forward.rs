//! Forward: `o = softmax(f(q·kᵀ · scale)) · v` and `lse`, in one pass over the keys.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 1. A cube owns `bq` queries of one head and keeps their running
//! maximum, sum and output in registers; it walks the key tiles that its queries can see, the visible sinks first.

use cubecl::prelude::*;

use super::tile::{
    HIDDEN, LANES, PIECE, TileConfig, V4, chunk_count, head_rows, is_hidden, product_scores, product_values,
    share_maximum, share_sum, store_lanes, store_weights, unit_place,
};
use crate::family::element::{Numbers, after_dropout, head_of, is_minus_infinity, row_hash, score, sees};
use crate::family::score_function::with_function;
use crate::family::walk::{Side, key_step, key_walk, work_of};
use crate::score::ScoreCode;
use crate::softmax::{softmax_init, softmax_init_sink, softmax_rescale};

/// One cube a query tile and head, the longest tiles first.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn forward_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    o: &mut [E],
    mut lse: ComptimeOption<&mut [f32]>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] with_lse: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] chunks: usize,
    #[comptime] tile: TileConfig,
    #[define(E)] _dtype: ElemType,
) {
    let (bq, bk) = comptime!((tile.rows() as u32, tile.cols() as u32));
    let work = work_of(CUBE_POS, n.heads_q, n.seq_q, scratch, n, Side::Queries, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, i0) = (work.head, work.tile * bq);
    let (b, h) = (head / n.heads_q, head % n.heads_q);
    let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
    let kv = h / (n.heads_q / n.heads_kv);
    let q_rows = head_rows::<E>(q, b, h, n.seq_q, n.head_dim);
    let k_rows = head_rows::<E>(k, b, kv, n.seq_kv, n.head_dim);
    let v_rows = head_rows::<E>(v, b, kv, n.seq_kv, n.value_dim);

    let mut weights = Shared::<[V4]>::new_slice(tile.weights_len());
    let mut stage = Shared::<[V4]>::new_slice(tile.stage_len());
    let (ty, tx) = unit_place(tile);
    let mut piece = Array::<f32>::new(PIECE); // s, then p [4, 4]
    let mut m = Array::<f32>::new(LANES);
    let mut l = Array::<f32>::new(LANES); // this unit's columns only, until the end
    let mut hash = Array::<u32>::new(LANES);
    let mut acc = Array::<V4>::new(chunks * LANES); // o [4, Dv / col_units]
    #[unroll(tile.unroll)]
    for x in 0..chunks * LANES {
        acc[x] = V4::new(0.0f32);
    }
    #[unroll]
    for r in 0..LANES {
        let start = softmax_init();
        m[r] = start.m;
        l[r] = start.l;
        if n.sinks_at != 0 {
            let start = softmax_init_sink(f32::reinterpret(scratch[n.sinks_at + h as usize]));
            m[r] = start.m;
            l[r] = select(tx == 0, start.l, 0.0f32);
        }
        hash[r] = row_hash(head, i0 + ty + comptime!((r * tile.row_units) as u32), n);
    }

    // A user's function may hide by −∞, as a bias may.
    let hides = comptime!(with_bias || function.is_some());
    let walk = key_walk(i0, at, scratch, n, tile.shape());
    for t in 0..walk.steps {
        let step = key_step(walk, t, i0, at, scratch, n, hides, tile.shape());
        if !step.empty {
            let (j0, full) = (step.j0, step.full);
            product_scores::<E>(q, q_rows, i0, k, k_rows, j0, &mut piece, &mut stage, tile);
            let mut top = Array::<f32>::new(LANES);
            #[unroll]
            for r in 0..LANES {
                top[r] = m[r];
            }
            #[unroll(tile.unroll)]
            for e in 0..PIECE {
                let (r, c) = (e % LANES, e / LANES);
                let i = i0 + ty + (r * tile.row_units) as u32;
                let j = j0 + tx + (c * tile.col_units) as u32;
                let mut s = HIDDEN.runtime();
                if full || sees(i, j, step, at, scratch, n) {
                    let x = score::<E>(piece[e], i, j, at, bias, n, with_bias);
                    let x = with_function(x, i, j, at, scratch, n, function);
                    // A score of −∞ is as good as hidden; in full tiles its weight 0 will do.
                    if full || !is_minus_infinity(x) {
                        s = x;
                        top[r] = max(top[r], x);
                    }
                }
                piece[e] = s;
            }
            share_maximum(&mut top, &mut weights, tile);
            let mut grow = Array::<f32>::new(LANES);
            #[unroll]
            for r in 0..LANES {
                grow[r] = softmax_rescale(m[r], top[r]);
                m[r] = top[r];
                l[r] *= grow[r];
            }
            #[unroll(tile.unroll)]
            for e in 0..PIECE {
                let (r, c) = (e % LANES, e / LANES);
                if !is_hidden(piece[e]) {
                    let p = (piece[e] - m[r]).exp();
                    l[r] += p;
                    piece[e] = after_dropout(p, hash[r], j0 + tx + (c * tile.col_units) as u32, n);
                }
            }
            #[unroll(tile.unroll)]
            for chunk in 0..chunk_count(n.value_dim, chunks, tile) {
                #[unroll]
                for r in 0..LANES {
                    acc[chunk * LANES + r] *= V4::new(grow[r]);
                }
            }
            store_weights(&piece, &mut weights, tile);
            product_values::<E>(&weights, v, v_rows, j0, !full, &mut acc, &mut stage, chunks, tile);
        }
    }
    share_sum(&mut l, &mut weights, tile);
    #[unroll]
    for r in 0..LANES {
        let i = i0 + ty + comptime!((r * tile.row_units) as u32);
        if i < n.seq_q {
            let row = head as usize * n.seq_q as usize + i as usize;
            // A row that saw nothing has l = 0, whatever its impossible keys left in the sums.
            let seen = u32::reinterpret(l[r]) != 0u32;
            let norm = select(seen, 1.0f32 / l[r], 0.0f32);
            #[unroll(tile.unroll)]
            for chunk in 0..chunk_count(n.value_dim, chunks, tile) {
                let d = chunk as u32 * bk + tx * comptime!(LANES as u32);
                store_lanes::<E>(acc[chunk * LANES + r], norm, seen, o, row, d, n.value_dim);
            }
            if with_lse {
                if tx == 0 {
                    lse.as_mut().unwrap()[row] = select(seen, m[r] + l[r].ln(), n.minus_infinity);
                }
            }
        }
    }
}
