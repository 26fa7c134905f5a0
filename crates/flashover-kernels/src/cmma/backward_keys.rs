//! Backward, for the keys: `dk` and `dv`.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2. A cube owns a tile of keys and walks the queries of every head of the
//! group, in order, for `dv = Σ_i p · mult · do` and `dk = Σ_i ds · ∂s/∂(q·k) · q`, with `delta` as the kernel of the queries left
//! it. Scores are transposed: rows are keys.

use cubecl::prelude::*;

use super::config::Compiled;
use super::gradient::{Row, element};
use super::products::{product, zeros};
use super::sums::{accumulate_scores, own_column, own_row, own_scores, store_rows};
use super::tile::{E4, LANES, V4, head_rows, load_rows, pitch, score_pitch};
use crate::family::element::{Numbers, head_of, row_hash, sees, where_kept};
use crate::family::walk::{Side, query_step, query_walk, work_of};

/// One cube a key tile and key head. Both gradients at once unless registers or bindings forbid.
#[cfg_attr(not(all(test, feature = "compilers")), cube(launch_unchecked, address_type = "dynamic"))]
#[cfg_attr(all(test, feature = "compilers"), cube(launch_unchecked, create_dummy_kernel, address_type = "dynamic"))]
pub(crate) fn backward_keys_kernel<E: Float, W: Size>(
    q: &Tensor<Vector<E, W>>,
    k: &Tensor<Vector<E, W>>,
    v: ComptimeOption<&Tensor<Vector<E, W>>>,
    d_o: &Tensor<Vector<E, W>>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    mut dk: ComptimeOption<Box<[E]>>,
    mut dv: ComptimeOption<Box<[E]>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] with_dk: bool,
    #[comptime] with_dv: bool,
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    let tile = comptime!(c.tile);
    let work = work_of(CUBE_POS, n.heads_kv, n.seq_kv, scratch, n, Side::Keys, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, j0) = (work.head, work.tile * comptime!(tile.rows() as u32));
    let (b, kv) = (head / n.heads_kv, head % n.heads_kv);
    let group = n.heads_q / n.heads_kv;
    let k_rows = head_rows::<E, W>(k, b, kv, n.seq_kv, n.head_dim);

    // Keys, then values; queries and the gradients of their outputs, apart or in turns.
    let v_at = comptime!(tile.rows() * pitch(c.head_dim));
    let own_len = comptime!(v_at + tile.rows() * pitch(c.value_dim));
    let (do_at, walked_len) = comptime!(tile.walked(c.head_dim, c.value_dim));
    let score_len = comptime!(tile.rows() * score_pitch(tile.cols) / LANES);
    let mut own = Shared::<[E4<E>]>::new_aligned_slice(comptime!(own_len / LANES), 32usize);
    let mut walked = Shared::<[E4<E>]>::new_aligned_slice(comptime!(walked_len / LANES), 32usize);
    let mut s = Shared::<[V4]>::new_aligned_slice(score_len, 32usize);
    let mut dp = Shared::<[V4]>::new_aligned_slice(score_len, 32usize);
    let mut weights = Shared::<[E4<E>]>::new_aligned_slice(comptime!(tile.rows() * pitch(tile.cols) / LANES), 32usize);
    // Log-sum-exps of the tile's queries, then their deltas.
    let mut statistics = Shared::<[f32]>::new_aligned_slice(comptime!(2 * tile.cols), 32usize);

    // A sequence of no matrices is never read.
    let (dk_dim, dv_dim) = comptime!((if with_dk { c.head_dim } else { 0 }, if with_dv { c.value_dim } else { 0 }));
    let acc_k = zeros(comptime!(tile.plane_rows() * dk_dim / (tile.edge * tile.edge)), tile); // dk [rows, D]
    let acc_v = zeros(comptime!(tile.plane_rows() * dv_dim / (tile.edge * tile.edge)), tile); // dv [rows, Dv]
    let j = j0 + own_row(tile);
    load_rows::<E, W>(k, k_rows, j0, &mut own, 0usize, tile.rows(), c.head_dim, tile);
    if with_dk {
        let v = v.unwrap();
        let v_rows = head_rows::<E, W>(v, b, kv, n.seq_kv, n.value_dim);
        load_rows::<E, W>(v, v_rows, j0, &mut own, v_at, tile.rows(), c.value_dim, tile);
    }

    for g in 0..group {
        let h = kv * group + g;
        let head = b * n.heads_q + h;
        let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
        let q_rows = head_rows::<E, W>(q, b, h, n.seq_q, n.head_dim);
        let do_rows = head_rows::<E, W>(d_o, b, h, n.seq_q, n.value_dim);
        let walk = query_walk(j0, at, scratch, n, tile.shape());
        for t in 0..walk.steps {
            let step = query_step(walk, t, j0, at, scratch, n, c.hides, tile.shape());
            if !step.empty {
                // Everyone is done with the last tile.
                sync_cube();
                load_rows::<E, W>(q, q_rows, step.i0, &mut walked, 0usize, tile.cols, c.head_dim, tile);
                if comptime!(tile.apart) {
                    load_rows::<E, W>(d_o, do_rows, step.i0, &mut walked, do_at, tile.cols, c.value_dim, tile);
                }
                let mut x = UNIT_POS;
                while x < comptime!(tile.cols as u32) {
                    let i = step.i0 + x;
                    let row = head as usize * n.seq_q as usize + i as usize;
                    let (mut lse, mut delta) = (n.minus_infinity, 0.0f32);
                    if i < n.seq_q {
                        lse = f32::reinterpret(scratch[n.lse_at + row]);
                        delta = f32::reinterpret(scratch[n.delta_at + row]);
                    }
                    statistics[x as usize] = lse;
                    statistics[x as usize + comptime!(tile.cols)] = delta;
                    x += comptime!(tile.units() as u32);
                }
                sync_cube();
                product::<E>(&own, 0usize, &walked, 0usize, &mut s, c.head_dim, tile); // sᵀ = k · qᵀ
                if comptime!(!tile.apart) {
                    sync_cube();
                    load_rows::<E, W>(d_o, do_rows, step.i0, &mut walked, do_at, tile.cols, c.value_dim, tile);
                    sync_cube();
                }
                if with_dk {
                    product::<E>(&own, v_at, &walked, do_at, &mut dp, c.value_dim, tile); // dpᵀ = v · doᵀ
                }
                sync_plane();

                // pᵀ after dropout, not grown, takes the place of sᵀ, dsᵀ that of dpᵀ.
                let place = own_scores(tile);
                #[unroll]
                for x in 0..comptime!(tile.row_vectors()) {
                    let here = place + comptime!(x * tile.row_units());
                    let products = s[here];
                    let mut gradients = V4::new(0.0f32);
                    if with_dk {
                        gradients = dp[here];
                    }
                    let (mut p, mut ds) = (V4::new(0.0f32), V4::new(0.0f32));
                    #[unroll]
                    for lane in 0..LANES {
                        let column = own_column(x, tile) + comptime!(lane as u32);
                        let i = step.i0 + column;
                        let mut hash = 0u32;
                        if comptime!(c.options) {
                            hash = row_hash(head, i, n);
                        }
                        let lse = statistics[column as usize];
                        let delta = statistics[column as usize + comptime!(tile.cols)];
                        let (weight, gradient) = element::<E>(
                            products.extract(lane),
                            gradients.extract(lane),
                            i,
                            j,
                            Row { lse, delta, hash },
                            step.full || sees(i, j, step, at, scratch, n),
                            true,
                            at,
                            scratch,
                            bias,
                            n,
                            with_bias,
                            c,
                        );
                        p.insert(lane, where_kept(weight, hash, j, n));
                        ds.insert(lane, gradient);
                    }
                    s[here] = p;
                    if with_dk {
                        dp[here] = ds;
                    }
                }
                if with_dv {
                    // dv += pᵀ · do
                    accumulate_scores::<E>(&acc_v, &s, &mut weights, &walked, do_at, c.value_dim, c.few_keys, tile);
                }
                if with_dk {
                    if comptime!(!tile.apart) {
                        sync_cube();
                        load_rows::<E, W>(q, q_rows, step.i0, &mut walked, 0usize, tile.cols, c.head_dim, tile);
                        sync_cube();
                    }
                    // dk += dsᵀ · q
                    accumulate_scores::<E>(&acc_k, &dp, &mut weights, &walked, 0usize, c.head_dim, c.few_keys, tile);
                }
            }
        }
    }
    let (row, left) = (head as usize * n.seq_kv as usize + j0 as usize, n.seq_kv - j0);
    if with_dk {
        let mut factor = 1.0f32;
        if comptime!(!c.options) {
            factor = n.scale;
        }
        store_rows::<E>(&acc_k, &mut s, factor, dk.as_mut().unwrap(), row, left, n.head_dim, c.head_dim, tile);
    }
    if with_dv {
        // Dropout grows what it keeps.
        store_rows::<E>(&acc_v, &mut s, n.factor, dv.as_mut().unwrap(), row, left, n.value_dim, c.value_dim, tile);
    }
}
