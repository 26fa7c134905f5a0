//! Backward in one pass over the query tiles: `dk` and `dv` as in [`backward_keys`](super::backward_keys), and `dq` with them.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2. A cube owns a tile of keys. Its warps have a few rows of the transposed tiles
//! each; `ds` also goes through shared memory, where all of them multiply it with the keys for `dq`, and add that to f32 in
//! global memory.
//!
//! ```text
//! sᵀ = k · qᵀ    pᵀ = exp(sᵀ − lse)    dpᵀ = v · doᵀ    dsᵀ = pᵀ ∘ (dpᵀ − delta)
//! dv += pᵀ · do    dk += dsᵀ · q    dq += ds · k
//! ```
//!
//! **dq has the same bits in every run:** the cubes of a head take turns at a query tile, the last key tile first, and tickets
//! are given out in that order, so that no cube waits for one that has not started. The first to come writes, the others
//! add: nothing is zeroed before. A turn is passed on a step later, when what was added has long arrived.

use cubecl::prelude::*;

use super::backward_keys::load_queries;
use super::config::{COLS, Compiled, ROWS, STAGES, WARP};
use super::gradient::differentiate;
use super::one_pass_launch::OnePass;
use super::products::{accumulate, product, product_turned};
use super::ptx::{
    Fragment, Sums, add_floats, commit_copies, fence_device, shared_address, store_floats, store_shared, turn_now,
    turn_pass, turn_wait, wait_copies,
};
use super::steps::{follow, no_step};
use super::store::store_rows;
use super::tile::{PIECE, column_place, head_rows, load_rows, pitch, row_place};
use crate::family::element::{Numbers, head_of};
use crate::family::listed::Lists;
use crate::family::ptx::{global_address, pack, ticket, value_of};
use crate::family::turns::{key_tile, next_query_tile, place_of, query_tiles, turn_of};

/// One cube a key tile and key head. `turns` holds the ticket counter and, for each query head and query tile, how many cubes have
/// added to `sums`, which lie as the lanes hold them (see [`finish_kernel`](super::one_pass_rows::finish_kernel)); behind
/// them the `lists` of steps, under a plan.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn one_pass_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    d_o: &Tensor<E>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    turns: &mut [u32],
    sums: &mut [f32],
    dk: &mut [E],
    dv: &mut [E],
    n: Numbers,
    section: u32,
    lists: Lists,
    #[comptime] with_bias: bool,
    #[comptime] of: OnePass,
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    let tile = comptime!(c.tile);
    let mut own = Shared::<[u32]>::new_slice(1usize);
    let counters = global_address::<u32>(&*turns);
    if UNIT_POS == 0 {
        own[0] = ticket(counters);
    }
    sync_cube();
    let owned = key_tile::<E>(own[0], section, scratch, bias, n, with_bias, tile.shape(), of.listed);
    if !owned.exists {
        terminate!();
    }
    // Keys (later dk), values (later dv), the stages (queries, gradients of outputs, statistics), and ds.
    let (k_bytes, v_bytes) = comptime!((tile.rows() * pitch(c.head_dim), tile.rows() * pitch(c.value_dim)));
    let memory = Shared::<[Fragment]>::new_aligned_slice(comptime!(of.shared_bytes() / PIECE), comptime!(PIECE));
    let k_at = shared_address(&memory);
    let v_at = k_at + comptime!(k_bytes as u32);
    let stages = v_at + comptime!(v_bytes as u32);
    let ds_at = stages + comptime!((STAGES * of.stage_bytes()) as u32);
    let col_blocks = comptime!(tile.cols / COLS);
    let sums_at = global_address::<f32>(&*sums);
    let (q_bytes, stage_bytes) = comptime!((tile.cols * pitch(c.head_dim), of.stage_bytes()));
    let (warp, lane) = (UNIT_POS / comptime!(WARP as u32), UNIT_POS % comptime!(WARP as u32));
    let warp_row = warp * comptime!(ROWS as u32);
    let j0 = owned.j0;
    // This lane's first row and column of every block of sums.
    let (row, column) = (j0 + warp_row + lane / 4, lane % 4 * 2);
    let k_place = row_place(k_at + warp_row * comptime!(pitch(c.head_dim) as u32), c.head_dim);
    let v_place = row_place(v_at + warp_row * comptime!(pitch(c.value_dim) as u32), c.value_dim);
    let do_at = stages + comptime!(q_bytes as u32);
    let q_place = column_place(stages, c.head_dim);
    let q_rows_place = row_place(stages, c.head_dim);
    let do_place = column_place(do_at, c.value_dim);
    let do_rows_place = row_place(do_at, c.value_dim);
    let statistics = do_at + comptime!((tile.cols * pitch(c.value_dim)) as u32) + column * 4;
    // Where it writes ds; the queries and the elements of the head dimension that the warp takes of dq.
    let ds_write = ds_at + (warp_row + lane / 4) * comptime!(pitch(tile.cols) as u32) + column * 2;
    let (query_warp, part) = (warp % comptime!(of.query_warps() as u32), warp / comptime!(of.query_warps() as u32));
    let ds_place = column_place(ds_at, tile.cols) + query_warp * comptime!((2 * ROWS) as u32);
    let first_pair = part * comptime!(of.pairs() as u32);
    let k_rows_place = row_place(k_at, c.head_dim) + first_pair * comptime!(2 * PIECE as u32);

    let mut acc_k = Array::<Sums>::new(comptime!(c.head_dim / COLS));
    #[unroll]
    for x in 0..comptime!(c.head_dim / COLS) {
        acc_k[x] = Sums::new(0.0f32);
    }
    let mut acc_v = Array::<Sums>::new(comptime!(c.value_dim / COLS));
    #[unroll]
    for x in 0..comptime!(c.value_dim / COLS) {
        acc_v[x] = Sums::new(0.0f32);
    }

    let k_rows = head_rows::<E>(k, owned.batch, owned.key_head, n.seq_kv, n.head_dim);
    load_rows::<E>(k, k_rows, j0, k_at, tile.rows(), c.head_dim, c.k_pieces, tile.units(), c.element);
    let v_rows = head_rows::<E>(v, owned.batch, owned.key_head, n.seq_kv, n.value_dim);
    load_rows::<E>(v, v_rows, j0, v_at, tile.rows(), c.value_dim, c.v_pieces, tile.units(), c.element);
    // The counter of the step before, whose turn is still to be passed on.
    let mut added = 0u64.runtime();
    for g in 0..owned.group {
        let h = owned.first_head + g;
        let head = owned.batch * n.heads_q + h;
        let at = head_of::<E>(owned.batch, h, scratch, bias, n, with_bias);
        let q_rows = head_rows::<E>(q, owned.batch, h, n.seq_q, n.head_dim);
        let do_rows = head_rows::<E>(d_o, owned.batch, h, n.seq_q, n.value_dim);
        let mut tiles = query_tiles(owned, at, counters, lists, scratch, n, tile.shape(), of.listed);
        let mut stage = 0u32; // bytes from the first
        let mut next = no_step();
        follow(&mut next, next_query_tile(&mut tiles, owned, n, with_bias, tile.shape(), of.listed));
        // Nobody reads the last head's tiles any more.
        sync_cube();
        if !next.empty {
            load_queries::<E>(q, d_o, q_rows, do_rows, head, next.i0, stages, scratch, n, c);
        }
        commit_copies();
        while !next.empty {
            wait_copies(0usize);
            // Everyone's copies have arrived, and everyone is done with the other stage and with ds.
            sync_cube();
            let mut s = Array::<Sums>::new(col_blocks);
            let mut dp = Array::<Sums>::new(col_blocks);
            product(&mut s, k_place, q_place + stage, c.head_dim, tile, c.element); // sᵀ = k · qᵀ

            // What is next is asked for while the products are under way.
            let mut step = no_step();
            follow(&mut step, next);
            let listed_turn = value_of::<u32>(tiles.turn);
            follow(&mut next, next_query_tile(&mut tiles, owned, n, with_bias, tile.shape(), of.listed));
            let other = comptime!(stage_bytes as u32) - stage;
            if !next.empty {
                load_queries::<E>(q, d_o, q_rows, do_rows, head, next.i0, stages + other, scratch, n, c);
            }
            commit_copies();
            product(&mut dp, v_place, do_place + stage, c.value_dim, tile, c.element); // dpᵀ = v · doᵀ

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
                true,
                comptime!(4 * tile.cols),
                c,
            );
            #[unroll]
            for col in 0..col_blocks {
                #[unroll]
                for half in 0..2usize {
                    let (low, high) = (dp[col].extract(comptime!(2 * half)), dp[col].extract(comptime!(2 * half + 1)));
                    let offset = comptime!(8 * half * pitch(tile.cols) + col * PIECE);
                    store_shared(ds_write, offset, pack(low, high, c.element));
                }
            }
            accumulate(&mut acc_v, &s, do_rows_place + stage, c.value_dim, c); // dv += pᵀ · do
            accumulate(&mut acc_k, &dp, q_rows_place + stage, c.head_dim, c); // dk += dsᵀ · q
            // Everyone's ds is there, and what everyone added in the step before.
            if comptime!(of.tile.lean & 2 == 0) {
                fence_device();
            }
            sync_cube();
            turn_pass(added, UNIT_POS == 0);
            let place = place_of(owned, h, step.i0 / comptime!(tile.cols as u32), n, tile.cols);
            let turn = if comptime!(of.listed) {
                listed_turn
            } else {
                turn_of(owned, step.i0 / comptime!(tile.cols as u32), scratch, n, tile.shape())
            };
            added = counters + (place as u64 + 1u64) * 4u64;
            let early = turn_now(added);
            let mut part_q = Array::<Sums>::new(comptime!(2 * of.pairs()));
            product_turned(&mut part_q, ds_place, k_rows_place, first_pair, of, c); // dq = ds · k
            turn_wait(added, early, turn);
            let to = sums_at
                + place as u64 * comptime!(of.sums_bytes() as u64)
                + u64::cast_from(UNIT_POS) * comptime!(PIECE as u64);
            #[unroll]
            for x in 0..comptime!(2 * of.pairs()) {
                let here = comptime!(x * tile.units() * PIECE);
                if turn == 0 {
                    store_floats(to, here, part_q[x]);
                } else {
                    add_floats(to, here, part_q[x], of.vector_adds);
                }
            }
            stage = other;
        }
        wait_copies(0usize);
    }
    // The gradients take the place of keys and values.
    fence_device();
    sync_cube();
    turn_pass(added, UNIT_POS == 0);
    let first_row = (owned.batch * n.heads_kv + owned.key_head) as usize * n.seq_kv as usize;
    let mut factor = Array::<f32>::new(2usize);
    #[unroll]
    for x in 0..2usize {
        factor[x] = n.factor; // by which dropout grows what it keeps
    }
    store_rows::<E>(
        &acc_v,
        &factor,
        dv,
        first_row,
        j0,
        n.seq_kv,
        v_at,
        n.value_dim,
        c.value_dim,
        false,
        tile,
        c.element,
    );
    #[unroll]
    for x in 0..2usize {
        factor[x] = 1.0f32;
        if comptime!(!c.options) {
            factor[x] = n.scale;
        }
    }
    store_rows::<E>(&acc_k, &factor, dk, first_row, j0, n.seq_kv, k_at, n.head_dim, c.head_dim, false, tile, c.element);
}
