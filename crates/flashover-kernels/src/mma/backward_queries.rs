//! Backward, for the queries: `delta` and `dq`.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2, with `p` recomputed from `lse`. A cube owns a tile of queries and walks their
//! keys twice: first for `delta = Σ_j p · mult · dp`, which the rounded output would not give exactly (see
//! docs/measurements.md), then for `dq = Σ_j ds · ∂s/∂(q·k) · k`. No sum crosses cubes, so that no float atomics are needed.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, ROWS, STAGES, WARP};
use super::forward::{LOG2_E, load_keys};
use super::gradient::{element_with_options, row_of};
use super::products::{accumulate, product};
use super::ptx::{Fragment, Sums, commit_copies, row_sum, shared_address, wait_copies};
use super::scores::{hide, query_and_key, row_index};
use super::steps::{follow, no_step, step_at, visible_from};
use super::store::store_rows;
use super::tile::{PIECE, column_place, depth_place, head_rows, load_rows, pitch, row_place};
use crate::family::element::{Numbers, head_of, is_minus_infinity, row_hash};
use crate::family::ptx::exp2;
use crate::family::walk::{Side, key_walk, work_of};

/// One cube a query tile and head. Adds the row sums to the `delta` of the scratch buffer, which holds `−dlse`.
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
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    let tile = comptime!(c.tile);
    let (blocks, col_blocks) = comptime!((tile.blocks, tile.cols / COLS));
    let work = work_of(CUBE_POS, n.heads_q, n.seq_q, &*scratch, n, Side::Queries, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, i0) = (work.head, work.tile * comptime!(tile.rows() as u32));
    let (b, h) = (head / n.heads_q, head % n.heads_q);
    let at = head_of::<E>(b, h, &*scratch, bias, n, with_bias);
    let kv = h / (n.heads_q / n.heads_kv);
    let q_rows = head_rows::<E>(q, b, h, n.seq_q, n.head_dim);
    let k_rows = head_rows::<E>(k, b, kv, n.seq_kv, n.head_dim);
    let v_rows = head_rows::<E>(v, b, kv, n.seq_kv, n.value_dim);
    let do_rows = head_rows::<E>(d_o, b, h, n.seq_q, n.value_dim);

    // Queries (later dq), the gradients of their outputs, then the stages: keys and values.
    let (k_bytes, v_bytes) =
        comptime!((tile.cols * pitch(c.head_dim, c.element), tile.cols * pitch(c.value_dim, c.element)));
    let (q_bytes, do_bytes) =
        comptime!((tile.rows() * pitch(c.head_dim, c.element), tile.rows() * pitch(c.value_dim, c.element)));
    let memory = Shared::<[Fragment]>::new_aligned_slice(
        comptime!((q_bytes + do_bytes + STAGES * (k_bytes + v_bytes)) / PIECE),
        comptime!(PIECE),
    );
    let q_at = shared_address(&memory);
    let do_at = q_at + comptime!(q_bytes as u32);
    let stage_at = do_at + comptime!(do_bytes as u32);
    let warp_row = UNIT_POS / comptime!(WARP as u32) * comptime!((blocks * ROWS) as u32);
    let lane = UNIT_POS % comptime!(WARP as u32);
    // This lane's first row and column of every block of sums.
    let quarter = lane % 4;
    let (row, column) = (i0 + warp_row + lane / 4, quarter * 2);
    let q_place = row_place(q_at + warp_row * comptime!(pitch(c.head_dim, c.element) as u32), c.head_dim, c.element);
    let do_place =
        row_place(do_at + warp_row * comptime!(pitch(c.value_dim, c.element) as u32), c.value_dim, c.element);
    let k_place = column_place(stage_at, c.head_dim, c.element);
    let k_rows_place = depth_place(stage_at, c.head_dim, c.element);
    let v_place = column_place(stage_at + comptime!(k_bytes as u32), c.value_dim, c.element);

    let mut acc = Array::<Sums>::new(comptime!(blocks * c.head_dim / COLS)); // dq [16 · blocks, D]
    #[unroll]
    for x in 0..comptime!(blocks * c.head_dim / COLS) {
        acc[x] = Sums::new(0.0f32);
    }
    let mut lse = Array::<f32>::new(comptime!(2 * blocks));
    let mut delta = Array::<f32>::new(comptime!(2 * blocks)); // 0 until it is known
    let mut minus_dlse = Array::<f32>::new(comptime!(2 * blocks));
    let mut hash = Array::<u32>::new(comptime!(2 * blocks));
    let mut masses = Array::<f32>::new(comptime!(2 * blocks)); // Σ p of this lane's columns
    let mut sums = Array::<f32>::new(comptime!(2 * blocks)); // Σ p · mult · dp
    let first = head as usize * n.seq_q as usize;
    #[unroll]
    for x in 0..comptime!(2 * blocks) {
        let i = row + comptime!(8 * x as u32);
        lse[x] = n.minus_infinity;
        minus_dlse[x] = 0.0f32;
        if i < n.seq_q {
            lse[x] = f32::reinterpret(scratch[n.lse_at + first + i as usize]);
            minus_dlse[x] = f32::reinterpret(scratch[n.delta_at + first + i as usize]);
        }
        delta[x] = 0.0f32;
        masses[x] = 0.0f32;
        sums[x] = 0.0f32;
        hash[x] = 0u32;
        if comptime!(c.options) {
            hash[x] = row_hash(head, i, n);
        }
    }
    let unit = n.scale * LOG2_E;

    let walk = key_walk(i0, at, &*scratch, n, tile.shape());
    load_rows::<E>(q, q_rows, i0, q_at, tile.rows(), c.head_dim, c.q_pieces, tile.units(), c.element);
    load_rows::<E>(d_o, do_rows, i0, do_at, tile.rows(), c.value_dim, c.do_pieces, tile.units(), c.element);
    let sweeps = comptime!(if with_dq { 2u32 } else { 1u32 });
    for sweep in 0..sweeps {
        let mut t = visible_from(walk, 0u32, i0, at, &*scratch, n, with_bias, Side::Queries, c);
        let mut stage = 0u32; // bytes from the first
        // Nobody reads the last sweep's tiles any more.
        sync_cube();
        let mut next = no_step();
        if t < walk.steps {
            follow(&mut next, step_at(walk, t, i0, at, &*scratch, n, with_bias, Side::Queries, c));
            load_keys::<E>(k, v, k_rows, v_rows, next.j0, stage_at, c);
        }
        commit_copies();
        while t < walk.steps {
            wait_copies(0usize);
            // Everyone's copies have arrived, and everyone is done with the other stage.
            sync_cube();

            let mut s = Array::<Sums>::new(comptime!(blocks * col_blocks));
            let mut dp = Array::<Sums>::new(comptime!(blocks * col_blocks));
            product(&mut s, q_place, k_place + stage, c.head_dim, tile, c.element); // s = q · kᵀ

            // What is next is found out, and asked for, while the products are under way.
            let mut step = no_step();
            follow(&mut step, next);
            t = visible_from(walk, t + 1, i0, at, &*scratch, n, with_bias, Side::Queries, c);
            let other = comptime!((k_bytes + v_bytes) as u32) - stage;
            if t < walk.steps {
                follow(&mut next, step_at(walk, t, i0, at, &*scratch, n, with_bias, Side::Queries, c));
                load_keys::<E>(k, v, k_rows, v_rows, next.j0, stage_at + other, c);
            }
            commit_copies();
            product(&mut dp, do_place, v_place + stage, c.value_dim, tile, c.element); // dp = do · vᵀ

            // s becomes p, dp becomes ds: p · dp in the first sweep.
            if comptime!(!c.options) {
                if !step.full {
                    hide(&mut s, &mut dp, row, step.j0 + column, step, at, &*scratch, n, true, Side::Queries, c);
                }
            }
            #[unroll]
            for x in 0..comptime!(blocks * col_blocks) {
                let (mut p, mut ds) = (s[x], dp[x]);
                #[unroll]
                for z in 0..4usize {
                    let r = comptime!(row_index(x, z, col_blocks));
                    let stats = row_of(lse[r], delta[r], hash[r], n);
                    if comptime!(c.options) {
                        let (i, j) = query_and_key(row, step.j0 + column, x, z, Side::Queries, c);
                        let (weight, gradient) = element_with_options::<E>(
                            s[x].extract(z),
                            dp[x].extract(z),
                            i,
                            j,
                            stats,
                            step,
                            sweep != 0,
                            at,
                            &*scratch,
                            bias,
                            n,
                            with_bias,
                            c,
                        );
                        p.insert(z, weight);
                        ds.insert(z, gradient);
                    } else {
                        let weight = exp2(fma(s[x].extract(z), unit, -(stats.lse * LOG2_E)));
                        p.insert(z, weight);
                        ds.insert(z, weight * (dp[x].extract(z) - stats.delta));
                    }
                }
                s[x] = p;
                dp[x] = ds;
            }
            if sweep == 0 {
                #[unroll]
                for x in 0..comptime!(blocks * col_blocks) {
                    #[unroll]
                    for z in 0..4usize {
                        let r = comptime!(row_index(x, z, col_blocks));
                        masses[r] += s[x].extract(z);
                        sums[r] += dp[x].extract(z);
                    }
                }
            } else if comptime!(with_dq) {
                accumulate(&mut acc, &dp, k_rows_place + stage, c.head_dim, c); // dq += ds · k
            }
            stage = other;
        }
        wait_copies(0usize);
        if sweep == 0 {
            #[unroll]
            for x in 0..comptime!(2 * blocks) {
                let i = row + comptime!(8 * x as u32);
                let mut mass = row_sum(masses[x]);
                let sum = row_sum(sums[x]);
                if i < n.seq_q && !is_minus_infinity(lse[x]) {
                    if n.sinks_at != 0 {
                        mass += exp2((f32::reinterpret(scratch[n.sinks_at + h as usize]) - lse[x]) * LOG2_E);
                    }
                    delta[x] = minus_dlse[x] + sum / mass;
                    if quarter == 0 {
                        scratch[n.delta_at + first + i as usize] = u32::reinterpret(delta[x]);
                    }
                }
            }
        }
    }
    if with_dq {
        let mut factor = Array::<f32>::new(comptime!(2 * blocks));
        #[unroll]
        for x in 0..comptime!(2 * blocks) {
            factor[x] = 1.0f32;
            if comptime!(!c.options) {
                factor[x] = n.scale;
            }
        }
        sync_cube();
        store_rows::<E>(
            &acc,
            &factor,
            dq.as_mut().unwrap(),
            first,
            i0,
            n.seq_q,
            q_at,
            n.head_dim,
            c.head_dim,
            false,
            tile,
            c.element,
        );
    }
}
