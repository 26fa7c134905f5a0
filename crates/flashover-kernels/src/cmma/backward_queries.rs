//! Backward, for the queries: `delta` and `dq`.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2, with `p` recomputed from `lse`. A cube owns a tile of queries and walks their
//! keys twice: first for `delta = Σ_j p · mult · dp`, which the rounded output would not give exactly (see
//! docs/measurements.md), then for `dq = Σ_j ds · ∂s/∂(q·k) · k`. No sum crosses cubes, so that no float atomics are needed.

use cubecl::prelude::*;

use super::config::Compiled;
use super::gradient::{Row, element, shows};
use super::products::{product, zeros};
use super::sums::{accumulate_scores, own_column, own_row, own_scores, row_sum, store_rows};
use super::tile::{E4, LANES, V4, head_rows, load_rows, pitch, score_pitch};
use crate::family::element::{Numbers, head_of, is_minus_infinity, reach_of, row_hash};
use crate::family::walk::{Side, key_step, key_walk, work_of};

/// One cube a query tile and head. Adds the row sums to the `delta` of the scratch buffer, which holds `−dlse`.
#[cfg_attr(not(all(test, feature = "compilers")), cube(launch_unchecked, address_type = "dynamic"))]
#[cfg_attr(all(test, feature = "compilers"), cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic"))]
pub(crate) fn backward_queries_kernel<E: Float, W: Size>(
    q: &Tensor<Vector<E, W>>,
    k: &Tensor<Vector<E, W>>,
    v: &Tensor<Vector<E, W>>,
    d_o: &Tensor<Vector<E, W>>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &mut [u32],
    mut dq: ComptimeOption<Box<[E]>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] with_dq: bool,
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    let tile = comptime!(c.tile);
    let work = work_of(CUBE_POS, n.heads_q, n.seq_q, &*scratch, n, Side::Queries, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, i0) = (work.head, work.tile * comptime!(tile.rows() as u32));
    let (b, h) = (head / n.heads_q, head % n.heads_q);
    let at = head_of::<E>(b, h, &*scratch, bias, n, with_bias);
    let kv = h / (n.heads_q / n.heads_kv);
    let q_rows = head_rows::<E, W>(q, b, h, n.seq_q, n.head_dim);
    let k_rows = head_rows::<E, W>(k, b, kv, n.seq_kv, n.head_dim);
    let v_rows = head_rows::<E, W>(v, b, kv, n.seq_kv, n.value_dim);
    let do_rows = head_rows::<E, W>(d_o, b, h, n.seq_q, n.value_dim);

    // Queries, then the gradients of their outputs; keys and values, apart or in turns.
    let do_at = comptime!(tile.rows() * pitch(c.head_dim));
    let own_len = comptime!(do_at + tile.rows() * pitch(c.value_dim));
    let (v_at, walked_len) = comptime!(tile.walked(c.head_dim, c.value_dim));
    let score_len = comptime!(tile.rows() * score_pitch(tile.cols) / LANES);
    let mut own = Shared::<[E4<E>]>::new_aligned_slice(comptime!(own_len / LANES), 32usize);
    let mut walked = Shared::<[E4<E>]>::new_aligned_slice(comptime!(walked_len / LANES), 32usize);
    let mut s = Shared::<[V4]>::new_aligned_slice(score_len, 32usize);
    let mut dp = Shared::<[V4]>::new_aligned_slice(score_len, 32usize);
    let mut weights = Shared::<[E4<E>]>::new_aligned_slice(comptime!(tile.rows() * pitch(tile.cols) / LANES), 32usize);

    let acc = zeros(comptime!(tile.plane_rows() * c.head_dim / (tile.edge * tile.edge)), tile); // dq [rows, D]
    let i = i0 + own_row(tile);
    let reach = reach_of(i, at, n);
    let first = head as usize * n.seq_q as usize;
    let mut lse = n.minus_infinity;
    let mut minus_dlse = 0.0f32;
    if i < n.seq_q {
        lse = f32::reinterpret(scratch[n.lse_at + first + i as usize]);
        minus_dlse = f32::reinterpret(scratch[n.delta_at + first + i as usize]);
    }
    let mut hash = 0u32;
    if comptime!(c.options) {
        hash = row_hash(head, i, n);
    }
    let mut delta = 0.0f32; // until it is known
    let mut mass = 0.0f32; // Σ p of this unit's columns
    let mut sum = 0.0f32; // Σ p · mult · dp

    load_rows::<E, W>(q, q_rows, i0, &mut own, 0usize, tile.rows(), c.head_dim, tile);
    load_rows::<E, W>(d_o, do_rows, i0, &mut own, do_at, tile.rows(), c.value_dim, tile);
    let walk = key_walk(i0, at, &*scratch, n, tile.shape());
    let sweeps = comptime!(if with_dq { 2u32 } else { 1u32 });
    for sweep in 0..sweeps {
        for t in 0..walk.steps {
            let step = key_step(walk, t, i0, at, &*scratch, n, c.hides, tile.shape());
            if !step.empty {
                // Everyone is done with the last tile.
                sync_cube();
                load_rows::<E, W>(k, k_rows, step.j0, &mut walked, 0usize, tile.cols, c.head_dim, tile);
                if comptime!(tile.apart) {
                    load_rows::<E, W>(v, v_rows, step.j0, &mut walked, v_at, tile.cols, c.value_dim, tile);
                }
                sync_cube();
                product::<E>(&own, 0usize, &walked, 0usize, &mut s, c.head_dim, tile); // s = q · kᵀ
                if comptime!(!tile.apart) {
                    sync_cube();
                    load_rows::<E, W>(v, v_rows, step.j0, &mut walked, v_at, tile.cols, c.value_dim, tile);
                    sync_cube();
                }
                product::<E>(&own, do_at, &walked, v_at, &mut dp, c.value_dim, tile); // dp = do · vᵀ
                sync_plane();

                // ds takes the place of dp.
                let place = own_scores(tile);
                #[unroll]
                for x in 0..comptime!(tile.row_vectors()) {
                    let here = place + comptime!(x * tile.row_units());
                    let (products, gradients) = (s[here], dp[here]);
                    let mut ds = V4::new(0.0f32);
                    #[unroll]
                    for lane in 0..LANES {
                        let j = step.j0 + own_column(x, tile) + comptime!(lane as u32);
                        let (weight, gradient) = element::<E>(
                            products.extract(lane),
                            gradients.extract(lane),
                            i,
                            j,
                            Row { lse, delta, hash },
                            shows(i, j, reach, step, at, &*scratch, n),
                            sweep != 0,
                            at,
                            &*scratch,
                            bias,
                            n,
                            with_bias,
                            c,
                        );
                        if sweep == 0 {
                            mass += weight;
                            sum += gradient;
                        }
                        ds.insert(lane, gradient);
                    }
                    dp[here] = ds;
                }
                if with_dq {
                    if sweep != 0 {
                        if comptime!(!tile.apart) {
                            sync_cube();
                            load_rows::<E, W>(k, k_rows, step.j0, &mut walked, 0usize, tile.cols, c.head_dim, tile);
                            sync_cube();
                        }
                        // dq += ds · k
                        accumulate_scores::<E>(&acc, &dp, &mut weights, &walked, 0usize, c.head_dim, c.few_keys, tile);
                    }
                }
            }
        }
        if sweep == 0 {
            let all = row_sum(sum, tile);
            let mut whole = row_sum(mass, tile);
            if i < n.seq_q && !is_minus_infinity(lse) {
                if n.sinks_at != 0 {
                    whole += (f32::reinterpret(scratch[n.sinks_at + h as usize]) - lse).exp();
                }
                delta = minus_dlse + all / whole;
                if UNIT_POS_X.is_multiple_of(comptime!(tile.row_units() as u32)) {
                    scratch[n.delta_at + first + i as usize] = u32::reinterpret(delta);
                }
            }
        }
    }
    if with_dq {
        let mut factor = 1.0f32;
        if comptime!(!c.options) {
            factor = n.scale;
        }
        let (row, left) = (first + i0 as usize, n.seq_q - i0);
        store_rows::<E>(&acc, &mut s, factor, dq.as_mut().unwrap(), row, left, n.head_dim, c.head_dim, tile);
    }
}
