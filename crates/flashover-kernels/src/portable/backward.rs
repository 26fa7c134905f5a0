//! Backward, recomputing `p` from `lse`: `dq`, `dk` and `dv`.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2, in two kernels so that no sum needs atomics: one owns queries and
//! walks the keys for `dq`, one owns keys and walks the queries of every head of the group for `dk` and `dv`.

use cubecl::prelude::*;

use super::gradient::{Towards, operand_rows, score_gradients, statistics, two_products};
use super::tile::{
    LANES, PIECE, TileConfig, V4, chunk_count, head_rows, product_scores, product_values, store_lanes, store_weights,
    unit_place,
};
use crate::family::element::{Numbers, head_of};
use crate::family::walk::{Side, key_step, key_walk, query_step, query_walk, work_of};
use crate::score::ScoreCode;

/// `dq = Σ_j ds_ij · ∂s/∂(q·k) · k_j`. One cube a query tile and head. With `slopes`, also the tile's share of the ALiBi
/// slope's gradient, into the scratch buffer.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn backward_queries_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    d_o: &Tensor<E>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &mut [u32],
    mut dq: ComptimeOption<Box<[E]>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] with_dq: bool,
    #[comptime] with_slopes: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] chunks: usize,
    #[comptime] tile: TileConfig,
    #[define(E)] _dtype: ElemType,
) {
    let (bq, bk) = comptime!((tile.rows() as u32, tile.cols() as u32));
    let work = work_of(CUBE_POS, n.heads_q, n.seq_q, &*scratch, n, Side::Queries, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, i0) = (work.head, work.tile * bq);
    let (b, h) = (head / n.heads_q, head % n.heads_q);
    let rows = operand_rows::<E>(q, k, v, d_o, b, h, n);

    let mut weights = Shared::<[V4]>::new_slice(tile.weights_len());
    let mut stage = Shared::<[V4]>::new_slice(tile.stage_len());
    let (ty, tx) = unit_place(tile);
    let mut s = Array::<f32>::new(PIECE);
    let mut dp = Array::<f32>::new(PIECE);
    let mut slope = 0.0f32;
    let mut acc = Array::<V4>::new(chunks * LANES);
    #[unroll(tile.unroll)]
    for x in 0..chunks * LANES {
        acc[x] = V4::new(0.0f32);
    }
    let at = head_of::<E>(b, h, &*scratch, bias, n, with_bias);
    let stats = statistics(i0 + ty, tile.row_units, at, &*scratch, n);

    let hides = comptime!(with_bias || function.is_some());
    let walk = key_walk(i0, at, &*scratch, n, tile.shape());
    for t in 0..walk.steps {
        let step = key_step(walk, t, i0, at, &*scratch, n, hides, tile.shape());
        if !step.empty {
            let (j0, full) = (step.j0, step.full);
            two_products::<E>(q, k, v, d_o, rows, i0, j0, &mut s, &mut dp, &mut stage, tile);
            slope += score_gradients::<E>(
                &mut s,
                &mut dp,
                &stats,
                i0 + ty,
                j0 + tx,
                step,
                at,
                &*scratch,
                bias,
                n,
                Towards::Product,
                with_slopes,
                Side::Queries,
                with_bias,
                function,
                tile,
            );
            if with_dq {
                store_weights(&dp, &mut weights, tile);
                product_values::<E>(&weights, k, rows.k, j0, !full, &mut acc, &mut stage, chunks, tile);
            }
        }
    }
    if with_dq {
        #[unroll]
        for r in 0..LANES {
            let i = i0 + ty + comptime!((r * tile.row_units) as u32);
            if i < n.seq_q {
                let row = head as usize * n.seq_q as usize + i as usize;
                #[unroll(tile.unroll)]
                for chunk in 0..chunk_count(n.head_dim, chunks, tile) {
                    let d = chunk as u32 * bk + tx * comptime!(LANES as u32);
                    let x = acc[chunk * LANES + r];
                    store_lanes::<E>(x, 1.0f32, true, dq.as_mut().unwrap(), row, d, n.head_dim);
                }
            }
        }
    }
    if with_slopes {
        sync_cube();
        weights[UNIT_POS as usize] = V4::new(slope);
        sync_cube();
        if UNIT_POS == 0 {
            let mut sum = 0.0f32;
            for unit in 0..tile.units() {
                sum += weights[unit].extract(0usize);
            }
            let tiles = n.seq_q.div_ceil(bq) as usize;
            scratch[n.slope_partials_at + head as usize * tiles + work.tile as usize] = u32::reinterpret(sum);
        }
    }
}

/// `dv = Σ_i p_ij · mult_ij · do_i` and `dk = Σ_i ds_ij · ∂s/∂(q·k) · q_i`, over the queries of every head of the group, in
/// order. One cube a key tile and key head. Both at once unless registers or bindings forbid.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn backward_keys_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: ComptimeOption<&Tensor<E>>,
    d_o: &Tensor<E>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    mut dk: ComptimeOption<Box<[E]>>,
    mut dv: ComptimeOption<Box<[E]>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] with_dk: bool,
    #[comptime] with_dv: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] chunks_k: usize,
    #[comptime] chunks_v: usize,
    #[comptime] tile: TileConfig,
    #[define(E)] _dtype: ElemType,
) {
    let (bk, bq) = comptime!((tile.rows() as u32, tile.cols() as u32));
    let work = work_of(CUBE_POS, n.heads_kv, n.seq_kv, scratch, n, Side::Keys, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, j0) = (work.head, work.tile * bk);
    let (b, kv) = (head / n.heads_kv, head % n.heads_kv);
    let group = n.heads_q / n.heads_kv;
    let k_rows = head_rows::<E>(k, b, kv, n.seq_kv, n.head_dim);

    let mut weights = Shared::<[V4]>::new_slice(tile.weights_len());
    let mut stage = Shared::<[V4]>::new_slice(tile.stage_len());
    let (ty, tx) = unit_place(tile);
    let mut s = Array::<f32>::new(PIECE); // sᵀ, then pᵀ [4, 4]
    let mut dp = Array::<f32>::new(PIECE); // dpᵀ, then dsᵀ
    let mut acc_k = Array::<V4>::new(chunks_k * LANES);
    #[unroll(tile.unroll)]
    for x in 0..chunks_k * LANES {
        acc_k[x] = V4::new(0.0f32);
    }
    let mut acc_v = Array::<V4>::new(chunks_v * LANES);
    #[unroll(tile.unroll)]
    for x in 0..chunks_v * LANES {
        acc_v[x] = V4::new(0.0f32);
    }

    let hides = comptime!(with_bias || function.is_some());
    for g in 0..group {
        let h = kv * group + g;
        let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
        let q_rows = head_rows::<E>(q, b, h, n.seq_q, n.head_dim);
        let do_rows = head_rows::<E>(d_o, b, h, n.seq_q, n.value_dim);
        let walk = query_walk(j0, at, scratch, n, tile.shape());
        for t in 0..walk.steps {
            let step = query_step(walk, t, j0, at, scratch, n, hides, tile.shape());
            if !step.empty {
                let (i0, full) = (step.i0, step.full);
                let stats = statistics(i0 + tx, tile.col_units, at, scratch, n);
                product_scores::<E>(k, k_rows, j0, q, q_rows, i0, &mut s, &mut stage, tile);
                if with_dk {
                    let v = v.unwrap();
                    let v_rows = head_rows::<E>(v, b, kv, n.seq_kv, n.value_dim);
                    product_scores::<E>(v, v_rows, j0, d_o, do_rows, i0, &mut dp, &mut stage, tile);
                }
                score_gradients::<E>(
                    &mut s,
                    &mut dp,
                    &stats,
                    i0 + tx,
                    j0 + ty,
                    step,
                    at,
                    scratch,
                    bias,
                    n,
                    Towards::Product,
                    false,
                    Side::Keys,
                    with_bias,
                    function,
                    tile,
                );
                if with_dv {
                    store_weights(&s, &mut weights, tile);
                    product_values::<E>(&weights, d_o, do_rows, i0, !full, &mut acc_v, &mut stage, chunks_v, tile);
                    sync_cube();
                }
                if with_dk {
                    store_weights(&dp, &mut weights, tile);
                    product_values::<E>(&weights, q, q_rows, i0, !full, &mut acc_k, &mut stage, chunks_k, tile);
                }
            }
        }
    }
    #[unroll]
    for r in 0..LANES {
        let j = j0 + ty + comptime!((r * tile.row_units) as u32);
        if j < n.seq_kv {
            let row = head as usize * n.seq_kv as usize + j as usize;
            if with_dk {
                #[unroll(tile.unroll)]
                for chunk in 0..chunk_count(n.head_dim, chunks_k, tile) {
                    let d = chunk as u32 * bq + tx * comptime!(LANES as u32);
                    let x = acc_k[chunk * LANES + r];
                    store_lanes::<E>(x, 1.0f32, true, dk.as_mut().unwrap(), row, d, n.head_dim);
                }
            }
            if with_dv {
                #[unroll(tile.unroll)]
                for chunk in 0..chunk_count(n.value_dim, chunks_v, tile) {
                    let d = chunk as u32 * bq + tx * comptime!(LANES as u32);
                    let x = acc_v[chunk * LANES + r];
                    store_lanes::<E>(x, 1.0f32, true, dv.as_mut().unwrap(), row, d, n.value_dim);
                }
            }
        }
    }
}
