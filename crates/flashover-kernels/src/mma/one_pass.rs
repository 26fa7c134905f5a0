//! Backward in one pass over the query tiles: `dk` and `dv` as in [`backward_keys`](super::backward_keys), and `dq` with them.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2. A cube owns a tile of keys.
//!
//! ```text
//! sᵀ = k · qᵀ    pᵀ = exp(sᵀ − lse)    dpᵀ = v · doᵀ    dsᵀ = pᵀ ∘ (dpᵀ − delta)
//! dv += pᵀ · do    dk += dsᵀ · q    dq += ds · k
//! ```
//!
//! **Warps work in pairs.** What bounds the kernel is reading shared memory, so each fragment that is read is multiplied by two blocks of 16
//! rows. With `W` warps, a warp has of a step:
//!
//! ```text
//! sᵀ, dpᵀ   32 keys, those of its pair   half the queries
//! dv, dk    the same keys                half the elements        weights and ds of its own queries in registers, of the others from its partner
//! dq        half the queries             1 / (W / 2) of D         ds of all keys
//! ```
//!
//! Weights go to the partner as the lanes hold them, `ds`, which `dq` takes transposed, as a tile whose rows are keys. A step has three barriers:
//!
//! - of all, first: the step's copies have arrived, and nobody reads the other stage any more, nor the weights and `ds` of the step before;
//! - of a pair, when `dv` and `dk` have their own half: the partner's weights and `ds` are there;
//! - of the warps with the same half of the queries, before `dq`: their `ds` is there, which together is that of all keys.
//!
//! **dq has the same bits in every run:** it is added to f32 in global memory, and the cubes of a head take [turns](crate::family::turns) at a
//! query tile; tickets are given out in that order, so that no cube waits for one that has not started. The first to come writes, the
//! others add: nothing is zeroed before. A turn is passed on a step later, when what was added has long arrived, by the first unit alone:
//! the barrier of all orders everyone's additions before its release, and a release covers whatever is ordered before it (PTX ISA, "Memory
//! consistency model", causality order), so that no other unit needs a fence. It comes after `sᵀ`, whose products hide the wait.

use cubecl::prelude::*;

use super::backward_keys::load_queries;
use super::config::{COLS, Compiled, ROWS, STAGES, WARP};
use super::gradient::differentiate;
use super::one_pass_launch::OnePass;
use super::products::{accumulate_fragments, fragments, product, product_turned};
use super::ptx::{
    Fragment, Sums, add_floats, commit_copies, load_matrix, shared_address, store_floats, store_shared, sync_some,
    turn_now, turn_pass, turn_wait, wait_copies,
};
use super::steps::{follow, no_step};
use super::store::store_halves;
use super::tile::{DEPTH, PIECE, column_place, head_rows, load_rows, pitch, row_place};
use crate::family::element::{Numbers, head_of};
use crate::family::listed::Lists;
use crate::family::ptx::{global_address, load_shared_16, store_shared_16, ticket, value_of};
use crate::family::turns::{dealt, key_tile, next_query_tile, place_of, query_tiles, turn_of};

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
    let mut taken = Shared::<[u32]>::new_slice(1usize);
    let counters = global_address::<u32>(&*turns);
    if UNIT_POS == 0 {
        taken[0] = ticket(counters);
    }
    sync_cube();
    let dealt = dealt(taken[0], section, n, tile.shape(), of.listed, false);
    let (head, index, ascending) = (dealt.head, dealt.tile, dealt.ascending);
    let owned = key_tile::<E>(head, index, ascending, scratch, bias, n, with_bias, tile.shape(), of.listed);
    if !dealt.exists {
        terminate!();
    }
    // How a warp multiplies scores: 32 keys by half the queries.
    let scores = comptime!(of.scores());
    let own = comptime!(Compiled { tile: scores, ..c });
    let (col_blocks, keys, queries) = comptime!((scores.cols / COLS, scores.blocks * ROWS, scores.cols as u32));
    // Keys (later dk), values (later dv), the stages (queries, gradients of outputs, statistics), ds, and the weights that warps
    // hand each other.
    let (k_bytes, v_bytes) =
        comptime!((tile.rows() * pitch(c.head_dim, c.element), tile.rows() * pitch(c.value_dim, c.element)));
    let memory = Shared::<[Fragment]>::new_aligned_slice(comptime!(of.shared_bytes() / PIECE), comptime!(PIECE));
    let k_at = shared_address(&memory);
    let v_at = k_at + comptime!(k_bytes as u32);
    let stages = v_at + comptime!(v_bytes as u32);
    let ds_at = stages + comptime!((STAGES * of.stage_bytes()) as u32);
    let p_at = ds_at + comptime!(of.ds_bytes() as u32);
    let sums_at = global_address::<f32>(&*sums);
    let (q_bytes, stage_bytes) = comptime!((tile.cols * pitch(c.head_dim, c.element), of.stage_bytes()));
    let (warp, lane) = (UNIT_POS / comptime!(WARP as u32), UNIT_POS % comptime!(WARP as u32));
    let (pair, half) = (warp / 2, warp % 2);
    let warp_row = pair * comptime!(keys as u32);
    let (first, other_first) = (half * queries, (1 - half) * queries);
    // This lane's first row and column of every block of sums.
    let (row, column) = (owned.j0 + warp_row + lane / 4, first + lane % 4 * 2);
    let k_place = row_place(k_at + warp_row * comptime!(pitch(c.head_dim, c.element) as u32), c.head_dim, c.element);
    let v_place = row_place(v_at + warp_row * comptime!(pitch(c.value_dim, c.element) as u32), c.value_dim, c.element);
    let do_at = stages + comptime!(q_bytes as u32);
    let q_place = column_place(stages + first * comptime!(pitch(c.head_dim, c.element) as u32), c.head_dim, c.element);
    let do_place =
        column_place(do_at + first * comptime!(pitch(c.value_dim, c.element) as u32), c.value_dim, c.element);
    let statistics = do_at + comptime!((tile.cols * pitch(c.value_dim, c.element)) as u32) + column * 4;
    // Pairs of blocks of 8 elements that a warp has of dk and of dv, the last perhaps past the end.
    let (k_pairs, v_pairs) = comptime!(((c.head_dim / DEPTH).div_ceil(2), (c.value_dim / DEPTH).div_ceil(2)));
    let q_rows_place = row_place(stages + half * comptime!((k_pairs * 2 * PIECE) as u32), c.head_dim, c.element);
    let do_rows_place = row_place(do_at + half * comptime!((v_pairs * 2 * PIECE) as u32), c.value_dim, c.element);
    // Where the warp writes ds, and reads that of the other; likewise the weights, as the lanes hold them.
    let ds_write = ds_at + (warp_row + lane / 4) * comptime!(pitch(tile.cols, c.element) as u32) + column * 2;
    let ds_read = row_place(
        ds_at + warp_row * comptime!(pitch(tile.cols, c.element) as u32) + other_first * 2,
        tile.cols,
        c.element,
    );
    let weights = comptime!(scores.cols / DEPTH * scores.blocks);
    let each = comptime!((weights * WARP * PIECE) as u32);
    let p_write = p_at + warp * each + lane * comptime!(PIECE as u32);
    let p_read = p_at + (2 * pair + 1 - half) * each + lane * comptime!(PIECE as u32);
    // The queries and the elements of the head dimension that the warp takes of dq.
    let ds_place = column_place(ds_at, tile.cols, c.element) + first * 2;
    let first_pair = pair * comptime!(of.pairs() as u32);
    let k_rows_place = row_place(k_at, c.head_dim, c.element) + first_pair * comptime!(2 * PIECE as u32);

    let mut acc_k = Array::<Sums>::new(comptime!(4 * k_pairs));
    #[unroll]
    for x in 0..comptime!(4 * k_pairs) {
        acc_k[x] = Sums::new(0.0f32);
    }
    let mut acc_v = Array::<Sums>::new(comptime!(4 * v_pairs));
    #[unroll]
    for x in 0..comptime!(4 * v_pairs) {
        acc_v[x] = Sums::new(0.0f32);
    }
    let j0 = owned.j0;

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
            // Everyone's copies have arrived, and everyone is done with the other stage, with weights and with ds.
            sync_cube();
            let mut s = Array::<Sums>::new(comptime!(scores.blocks * col_blocks));
            let mut dp = Array::<Sums>::new(comptime!(scores.blocks * col_blocks));
            product(&mut s, k_place, q_place + stage, c.head_dim, scores, c.element); // sᵀ = k · qᵀ
            turn_pass(added, UNIT_POS == 0); // that of the step before

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
            product(&mut dp, v_place, do_place + stage, c.value_dim, scores, c.element); // dpᵀ = v · doᵀ

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
                own,
            );
            let mut p_rows = Array::<Fragment>::new(weights);
            let mut ds_rows = Array::<Fragment>::new(weights);
            fragments(&mut p_rows, &s, scores, c.element);
            fragments(&mut ds_rows, &dp, scores, c.element);
            #[unroll]
            for x in 0..weights {
                store_shared_16(p_write, comptime!(x * WARP * PIECE), p_rows[x]);
                #[unroll]
                for y in 0..4usize {
                    let down = comptime!(x % scores.blocks * ROWS + y % 2 * 8);
                    let across = comptime!(x / scores.blocks * 2 + y / 2);
                    store_shared(
                        ds_write,
                        comptime!(down * pitch(tile.cols, c.element) + across * PIECE),
                        ds_rows[x].extract(y),
                    );
                }
            }
            // dv += pᵀ · do, dk += dsᵀ · q, first of the warp's own queries.
            let k_down = comptime!(pitch(c.head_dim, c.element) as u32);
            let v_down = comptime!(pitch(c.value_dim, c.element) as u32);
            let do_here = do_rows_place + stage + first * v_down;
            let q_here = q_rows_place + stage + first * k_down;
            accumulate_fragments(&mut acc_v, &p_rows, do_here, v_pairs, c.value_dim, scores, c.element);
            accumulate_fragments(&mut acc_k, &ds_rows, q_here, k_pairs, c.head_dim, scores, c.element);
            // The partner's weights and ds are there.
            sync_some(1 + pair, comptime!(2 * WARP));
            #[unroll]
            for x in 0..weights {
                p_rows[x] = load_shared_16(p_read, comptime!(x * WARP * PIECE));
                let (down, across) = comptime!((x % scores.blocks * ROWS, x / scores.blocks * 2 * PIECE));
                ds_rows[x] = load_matrix(ds_read, comptime!(down * pitch(tile.cols, c.element) + across));
            }
            let do_here = do_rows_place + stage + other_first * v_down;
            let q_here = q_rows_place + stage + other_first * k_down;
            accumulate_fragments(&mut acc_v, &p_rows, do_here, v_pairs, c.value_dim, scores, c.element);
            accumulate_fragments(&mut acc_k, &ds_rows, q_here, k_pairs, c.head_dim, scores, c.element);
            // Likewise ds of all keys for the queries of which the warp takes dq.
            sync_some(comptime!(1 + tile.warps as u32 / 2) + half, comptime!(tile.units() / 2));
            let place = place_of(owned, h, step.i0 / comptime!(tile.cols as u32), n, tile.cols);
            let turn = if comptime!(of.listed) {
                listed_turn
            } else {
                turn_of(owned, step.i0 / comptime!(tile.cols as u32), n, tile.shape())
            };
            added = counters + (place as u64 + 1u64) * 4u64;
            let early = turn_now(added);
            let mut part_q = Array::<Sums>::new(comptime!(of.blocks()));
            product_turned(&mut part_q, ds_place, k_rows_place, first_pair, of, c); // dq = ds · k
            turn_wait(added, early, turn);
            let to = sums_at
                + place as u64 * comptime!(of.sums_bytes() as u64)
                + u64::cast_from(UNIT_POS) * comptime!(PIECE as u64);
            #[unroll]
            for x in 0..comptime!(of.blocks()) {
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
    sync_cube();
    turn_pass(added, UNIT_POS == 0);
    let first_row = (owned.batch * n.heads_kv + owned.key_head) as usize * n.seq_kv as usize;
    // By which dropout grows what it keeps.
    store_halves::<E>(&acc_v, n.factor, dv, first_row, j0, n.seq_kv, v_at, n.value_dim, c.value_dim, tile, c.element);
    let mut factor = 1.0f32;
    if comptime!(!c.options) {
        factor = n.scale;
    }
    store_halves::<E>(&acc_k, factor, dk, first_row, j0, n.seq_kv, k_at, n.head_dim, c.head_dim, tile, c.element);
}
