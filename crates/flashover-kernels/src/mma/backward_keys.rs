//! Backward, for the keys: `dk` and `dv`.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2. A cube owns a tile of keys and walks the queries of every head of the group in
//! order. Tiles lie transposed: rows are keys, so that `pᵀ` and `dsᵀ` go from the sums of one product into the operands of the
//! next in registers.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, ROWS, STAGES, WARP, statistics_bytes};
use super::gradient::differentiate;
use super::products::{accumulate, product};
use super::ptx::{Fragment, Sums, commit_copies, copy_word_async, shared_address, wait_copies};
use super::steps::{step_at, visible_from};
use super::store::store_rows;
use super::tile::{PIECE, Rows, column_place, depth_place, head_rows, load_rows, pitch, row_place};
use crate::family::element::{Numbers, head_of};
use crate::family::ptx::global_address;
use crate::family::walk::{Side, query_walk, work_of};

/// `dv = Σ_i p · mult · do_i` and `dk = Σ_i ds · ∂s/∂(q·k) · q_i`. One cube a key tile and key head. Both at once unless registers or
/// bindings forbid.
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
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    let tile = comptime!(c.tile);
    let (blocks, col_blocks) = comptime!((tile.blocks, tile.cols / COLS));
    let work = work_of(CUBE_POS, n.heads_kv, n.seq_kv, scratch, n, Side::Keys, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, j0) = (work.head, work.tile * comptime!(tile.rows() as u32));
    let (b, kv) = (head / n.heads_kv, head % n.heads_kv);
    let group = n.heads_q / n.heads_kv;

    // Keys (later dk), values (later dv), then the stages: queries, gradients of outputs, and statistics.
    let (q_bytes, do_bytes) =
        comptime!((tile.cols * pitch(c.head_dim, c.element), tile.cols * pitch(c.value_dim, c.element)));
    let (k_bytes, v_bytes) =
        comptime!((tile.rows() * pitch(c.head_dim, c.element), tile.rows() * pitch(c.value_dim, c.element)));
    let stage_bytes = comptime!(q_bytes + do_bytes + statistics_bytes(&tile));
    let memory = Shared::<[Fragment]>::new_aligned_slice(
        comptime!((k_bytes + v_bytes + STAGES * stage_bytes) / PIECE),
        comptime!(PIECE),
    );
    let k_at = shared_address(&memory);
    let v_at = k_at + comptime!(k_bytes as u32);
    let stage_at = v_at + comptime!(v_bytes as u32);
    let warp_row = UNIT_POS / comptime!(WARP as u32) * comptime!((blocks * ROWS) as u32);
    let lane = UNIT_POS % comptime!(WARP as u32);
    // This lane's first row and column of every block of sums.
    let (row, column) = (j0 + warp_row + lane / 4, lane % 4 * 2);
    let k_place = row_place(k_at + warp_row * comptime!(pitch(c.head_dim, c.element) as u32), c.head_dim, c.element);
    let v_place = row_place(v_at + warp_row * comptime!(pitch(c.value_dim, c.element) as u32), c.value_dim, c.element);
    let q_place = column_place(stage_at, c.head_dim, c.element);
    let q_rows_place = depth_place(stage_at, c.head_dim, c.element);
    let do_place = column_place(stage_at + comptime!(q_bytes as u32), c.value_dim, c.element);
    let do_rows_place = depth_place(stage_at + comptime!(q_bytes as u32), c.value_dim, c.element);
    let statistics = stage_at + comptime!((q_bytes + do_bytes) as u32) + column * 4;

    let mut acc_k = Array::<Sums>::new(comptime!(if with_dk { blocks * c.head_dim / COLS } else { 1 }));
    #[unroll]
    for x in 0..comptime!(if with_dk { blocks * c.head_dim / COLS } else { 1 }) {
        acc_k[x] = Sums::new(0.0f32);
    }
    let mut acc_v = Array::<Sums>::new(comptime!(if with_dv { blocks * c.value_dim / COLS } else { 1 }));
    #[unroll]
    for x in 0..comptime!(if with_dv { blocks * c.value_dim / COLS } else { 1 }) {
        acc_v[x] = Sums::new(0.0f32);
    }

    let k_rows = head_rows::<E>(k, b, kv, n.seq_kv, n.head_dim);
    load_rows::<E>(k, k_rows, j0, k_at, tile.rows(), c.head_dim, c.k_pieces, tile.units(), c.element);
    if with_dk {
        let v = v.unwrap();
        let v_rows = head_rows::<E>(v, b, kv, n.seq_kv, n.value_dim);
        load_rows::<E>(v, v_rows, j0, v_at, tile.rows(), c.value_dim, c.v_pieces, tile.units(), c.element);
    }
    for g in 0..group {
        let h = kv * group + g;
        let head = b * n.heads_q + h;
        let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
        let q_rows = head_rows::<E>(q, b, h, n.seq_q, n.head_dim);
        let do_rows = head_rows::<E>(d_o, b, h, n.seq_q, n.value_dim);
        let walk = query_walk(j0, at, scratch, n, tile.shape());
        let mut t = visible_from(walk, 0u32, j0, at, scratch, n, with_bias, Side::Keys, c);
        let mut stage = 0u32; // bytes from the first
        // Nobody reads the last head's tiles any more.
        sync_cube();
        if t < walk.steps {
            let step = step_at(walk, t, j0, at, scratch, n, with_bias, Side::Keys, c);
            load_queries::<E>(q, d_o, q_rows, do_rows, head, step.i0, stage_at, scratch, n, c);
        }
        commit_copies();
        while t < walk.steps {
            wait_copies(0usize);
            // Everyone's copies have arrived, and everyone is done with the other stage.
            sync_cube();

            let mut s = Array::<Sums>::new(comptime!(blocks * col_blocks));
            let mut dp = Array::<Sums>::new(comptime!(blocks * col_blocks));
            product(&mut s, k_place, q_place + stage, c.head_dim, tile, c.element); // sᵀ = k · qᵀ

            // What is next is found out, and asked for, while the products are under way.
            let step = step_at(walk, t, j0, at, scratch, n, with_bias, Side::Keys, c);
            t = visible_from(walk, t + 1, j0, at, scratch, n, with_bias, Side::Keys, c);
            let other = comptime!(stage_bytes as u32) - stage;
            if t < walk.steps {
                let next = step_at(walk, t, j0, at, scratch, n, with_bias, Side::Keys, c);
                load_queries::<E>(q, d_o, q_rows, do_rows, head, next.i0, stage_at + other, scratch, n, c);
            }
            commit_copies();
            if with_dk {
                product(&mut dp, v_place, do_place + stage, c.value_dim, tile, c.element); // dpᵀ = v · doᵀ
            } else {
                #[unroll]
                for x in 0..comptime!(blocks * col_blocks) {
                    dp[x] = Sums::new(0.0f32);
                }
            }

            differentiate::<E>(
                &mut s,
                &mut dp,
                row,
                column,
                statistics + stage,
                head,
                step,
                at,
                scratch,
                bias,
                n,
                with_bias,
                with_dk,
                comptime!(4 * tile.cols),
                c,
            );
            if with_dv {
                accumulate(&mut acc_v, &s, do_rows_place + stage, c.value_dim, c); // dv += pᵀ · do
            }
            if with_dk {
                accumulate(&mut acc_k, &dp, q_rows_place + stage, c.head_dim, c); // dk += dsᵀ · q
            }
            stage = other;
        }
        wait_copies(0usize);
    }
    // The gradients take the place of keys and values.
    wait_copies(0usize);
    sync_cube();
    let mut factor = Array::<f32>::new(comptime!(2 * blocks));
    let first = head as usize * n.seq_kv as usize;
    if with_dv {
        #[unroll]
        for x in 0..comptime!(2 * blocks) {
            factor[x] = n.factor; // by which dropout grows what it keeps
        }
        store_rows::<E>(
            &acc_v,
            &factor,
            dv.as_mut().unwrap(),
            first,
            j0,
            n.seq_kv,
            v_at,
            n.value_dim,
            c.value_dim,
            false,
            tile,
            c.element,
        );
    }
    if with_dk {
        #[unroll]
        for x in 0..comptime!(2 * blocks) {
            factor[x] = 1.0f32;
            if comptime!(!c.options) {
                factor[x] = n.scale;
            }
        }
        store_rows::<E>(
            &acc_k,
            &factor,
            dk.as_mut().unwrap(),
            first,
            j0,
            n.seq_kv,
            k_at,
            n.head_dim,
            c.head_dim,
            false,
            tile,
            c.element,
        );
    }
}

/// Starts loading the queries from `i0` on, the gradients of their outputs, and their statistics.
#[cube]
pub(crate) fn load_queries<E: Float>(
    q: &Tensor<E>,
    d_o: &Tensor<E>,
    q_rows: Rows,
    do_rows: Rows,
    head: u32,
    i0: u32,
    to: u32,
    scratch: &[u32],
    n: Numbers,
    #[comptime] c: Compiled,
) {
    let tile = comptime!(c.tile);
    load_rows::<E>(q, q_rows, i0, to, tile.cols, c.head_dim, c.q_pieces, tile.units(), c.element);
    let to = to + comptime!((tile.cols * pitch(c.head_dim, c.element)) as u32);
    load_rows::<E>(d_o, do_rows, i0, to, tile.cols, c.value_dim, c.do_pieces, tile.units(), c.element);
    let to = to + comptime!((tile.cols * pitch(c.value_dim, c.element)) as u32);
    if UNIT_POS < comptime!(2 * tile.cols as u32) {
        let (of_delta, r) = (UNIT_POS / comptime!(tile.cols as u32), UNIT_POS % comptime!(tile.cols as u32));
        let section = select(of_delta != 0, n.delta_at, n.lse_at);
        let valid = i0 + r < n.seq_q;
        let word = section + head as usize * n.seq_q as usize + select(valid, i0 + r, 0u32) as usize;
        copy_word_async(to + UNIT_POS * 4, global_address::<u32>(scratch) + word as u64 * 4u64, valid);
    }
}
