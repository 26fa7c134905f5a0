//! Backward on sm90: dk and dv in one pass over the query tiles, and dq with them.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2, in the form of FlashAttention-3 (Shah et al., arXiv 2407.08608),
//! Appendix B: a cube owns a tile of keys, one unit copies tiles of queries, two warpgroups multiply, another unit adds what
//! they have for dq to f32 in global memory. Tiles lie transposed, rows are keys, so that `pᵀ` and `dsᵀ` go from the
//! sums of one product into the operands of the next in registers; `ds` also goes through shared memory for dq. Of head
//! dimensions above 128 [another form](super::backward_wide) shares all but what the two warpgroups do.
//!
//! ```text
//! sᵀ = k · qᵀ    pᵀ = exp(sᵀ − lse)    dpᵀ = v · doᵀ    dsᵀ = pᵀ ∘ (dpᵀ − delta)
//! dv += pᵀ · do    dk += dsᵀ · q    dqᵀ += kᵀ · dsᵀ
//! ```
//!
//! **dq has the same bits in every run.** The cubes of a head take [turns](crate::family::turns) at a query tile: in a window
//! they come by in that order, elsewhere they follow each other at the distance of one addition. Tickets are given out in that order
//! too, so that no cube waits for one that has not started. The first to come writes, the others add: nothing is zeroed before.
//! Unordered, they add as they come, once the first has written.
//!
//! **Under a block plan** a launch before this one [lists](crate::family::listed) every cube's steps. The unit that copies reads its list and tells the
//! others of each step. Those before a cube at a query tile are the listed key tiles that come later, whose tickets are earlier.

use cubecl::prelude::*;

use super::backward_config::HopperBackwardConfig;
use super::backward_copies::{Barriers, add_pieces, add_up, copy_keys, copy_tiles};
use super::backward_messages::{LINE, LINES, told_step};
use super::backward_scores::{KeyRows, Statistics, differentiate, drop_elements, weights_of};
use super::backward_wide::consume;
use super::bulk::{fence_shared, store_transposed};
use super::config::{PIECE, ROWS, WARPGROUP};
use super::ptx::{
    Accumulator, barrier_address, barrier_arrive, barrier_wait, descriptor, fence_barriers, issue_named, issue_scores,
    named_read_text, named_text, named_value_text, named_wait, read_named, registers_decrease, registers_increase,
    run_block, score_text, shared_address, transposed_text, uniform, wait_products, wait_text,
};
use super::ring::{address_at, addresses, advance, barriers, ring_start};
use super::rows::{pack_text, pack_weights};
use super::store::{Place, same_factor, store_rows};
use crate::family::element::Numbers;
use crate::family::listed::Lists;
use crate::family::ptx::{global_address, ticket, value_of};
use crate::family::turns::{KeyTile, all_steps_listed, key_tile, query_tile_at};
use crate::family::walk::{Step, query_band_step};
use crate::score::ScoreCode;

/// Warps of the warpgroups that compute, each of which arrives at a barrier once.
const WARPS: u32 = 8;

/// One cube a key tile and key head. `statistics` holds for each query head and query tile `−lse` in logarithms of base 2 and
/// `delta`; `turns` the ticket counter and, for each query head, query tile and unit that adds, how many cubes have added to `dq`, which
/// is in the order of threads (see [`finish_kernel`](super::backward_rows::finish_kernel)); behind them the `lists` of steps,
/// under a plan.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn backward_kernel<E: Float, NS: Size, NK: Size, NV: Size, NQ: Size, NP: Size>(
    q: &TensorMap<E, Tiled>,
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    d_o: &TensorMap<E, Tiled>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    statistics: &[f32],
    turns: &mut [u32],
    dq: &mut [f32],
    dk: &mut [Vector<u32, Const<2>>],
    dv: &mut [Vector<u32, Const<2>>],
    n: Numbers,
    factor: f32,
    section: u32,
    lists: Lists,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] cfg: HopperBackwardConfig,
    #[define(E)] _dtype: ElemType,
    #[define(NS)] _ns: usize,
    #[define(NK)] _nk: usize,
    #[define(NV)] _nv: usize,
    #[define(NQ)] _nq: usize,
    #[define(NP)] _np: usize,
) {
    let (stages, do_stages) = comptime!((cfg.stages(), cfg.do_stages()));
    let [k_len, v_len, q_len, do_len] = comptime!(cfg.elements());
    let mut sk: Shared<[E]> = Shared::new_aligned_slice(k_len, 1024usize);
    let mut sv: Shared<[E]> = Shared::new_aligned_slice(v_len, 1024usize);
    let mut sq: Shared<[E]> = Shared::new_aligned_slice(q_len * stages, 1024usize);
    let mut sdo: Shared<[E]> = Shared::new_aligned_slice(do_len * do_stages, 1024usize);
    let sds: Shared<[E]> = Shared::new_aligned_slice(comptime!(cfg.score_buffers() * cfg.score_elements()), 1024usize);
    let mut sdq: Shared<[Vector<f32, Const<4>>]> =
        Shared::new_aligned_slice(comptime!(cfg.written_floats() / 4), 1024usize);
    let rows: Shared<[Vector<f32, Const<2>>]> =
        Shared::new_aligned_slice(comptime!(cfg.stages() * cfg.statistics() * cfg.bq / 2), 1024usize);
    let mut own = if comptime!(cfg.listed) {
        Shared::<[u32]>::new_aligned_slice(comptime!(cfg.words()), 16usize)
    } else {
        Shared::<[u32]>::new_slice(1usize)
    };
    let dealt = comptime!(cfg.words() - 1);
    let all = Barriers {
        kv_full: barriers(1usize, 1u32),
        q_full: barriers(stages, 1u32),
        do_full: barriers(do_stages, 1u32),
        dq_full: barriers(2usize, comptime!(WARPS / cfg.dq_slots() as u32)),
        q_free: barriers(stages, WARPS),
        do_free: barriers(do_stages, WARPS),
        dq_free: barriers(cfg.dq_slots(), 1u32),
    };
    fence_barriers();
    let counters = global_address::<u32>(&*turns);
    if UNIT_POS == 0 {
        own[dealt] = ticket(counters);
        let tile = dealt_tile::<E>(own[dealt], section, scratch, bias, n, with_bias, cfg);
        // On their way while the steps are looked up.
        if tile.exists {
            copy_keys::<E>(k, v, &mut sk, &mut sv, &all, tile, cfg);
        }
        if comptime!(cfg.listed) {
            own[comptime!(LINES * LINE)] =
                all_steps_listed::<E>(tile, counters, lists, scratch, n, comptime!(cfg.shape()));
        }
    }
    sync_cube();
    let tile = dealt_tile::<E>(own[dealt], section, scratch, bias, n, with_bias, cfg);
    if !tile.exists {
        terminate!();
    }
    let lines = lines_at(&own, cfg);
    let (registers, spare) = comptime!(cfg.registers());
    if UNIT_POS < comptime!(WARPGROUP as u32) {
        registers_decrease(spare);
        let some = has_steps(&own, tile, cfg);
        if UNIT_POS == 0 {
            if some {
                copy_tiles::<E>(
                    q, d_o, statistics, &mut sq, &mut sdo, &rows, &all, tile, lines, counters, lists, scratch, n, cfg,
                );
            } else {
                // The cube's memory must not be given up before.
                barrier_wait(barrier_address(&all.kv_full[0]), 0u32);
            }
        }
        // Two units take the steps in turns, or for large head dimensions have a warpgroup each: one waits until what it added has arrived while the other adds.
        if UNIT_POS == 32 || UNIT_POS == 64 {
            let sums = global_address::<f32>(&*dq);
            let steps = steps_of(&own, tile, cfg);
            if comptime!(cfg.wide()) {
                add_pieces(&sdq, &all, counters, sums, tile, UNIT_POS / 64, steps, lines, n, cfg);
            } else {
                add_up(&sdq, &all, counters, sums, tile, UNIT_POS / 64, steps, lines, n, cfg);
            }
        }
    } else if comptime!(cfg.wide()) {
        registers_increase(registers);
        let steps = steps_of(&own, tile, cfg);
        consume::<E, NS, NK, NV, NQ, NP>(
            &sk, &sv, &sq, &sdo, &sds, &rows, &mut sdq, &all, tile, steps, lines, bias, scratch, dk, dv, n, factor,
            with_bias, function, cfg,
        );
    } else {
        registers_increase(registers);
        run_block(comptime!(named_text("dk", cfg.head_dim)).as_str());
        run_block(comptime!(named_text("dv", cfg.value_dim)).as_str());
        let places = places_of::<E>(&sk, &sv, &sq, &sdo, &sds, tile.j0, cfg);
        if has_steps(&own, tile, cfg) {
            let gates = gates(&all, cfg);
            let steps = steps_of(&own, tile, cfg);
            differentiate_tiles::<E, NS, NQ, NP>(
                places, &gates, &rows, &mut sdq, tile, steps, lines, bias, scratch, n, factor, with_bias, function, cfg,
            );
        }
        let (dk_text, dv_text) = comptime!((named_read_text("dk", cfg.head_dim), named_read_text("dv", cfg.value_dim)));
        let acc_k = read_named::<NK>(comptime!(dk_text.clone()).as_str());
        let acc_v = read_named::<NV>(comptime!(dv_text.clone()).as_str());
        let (row, column) = (places.keys.j, places.keys.column);
        let first = (tile.batch * n.heads_kv + tile.key_head) as usize * n.seq_kv as usize;
        let place = Place { row, column, first, rows: n.seq_kv, width: n.head_dim };
        store_rows::<NK>(acc_k, same_factor(n.scale), place, dk, false, cfg.element, cfg.head_dim, false);
        let place = Place { row, column, first, rows: n.seq_kv, width: n.value_dim };
        store_rows::<NV>(acc_v, same_factor(n.factor), place, dv, false, cfg.element, cfg.value_dim, false);
    }
}

/// The key tile of the cube that has a ticket.
#[cube]
fn dealt_tile<E: Float>(
    ticket: u32,
    section: u32,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperBackwardConfig,
) -> KeyTile {
    key_tile::<E>(ticket, section, scratch, bias, n, with_bias, comptime!(cfg.shape()), cfg.listed, cfg.unordered)
}

/// How many steps the cube takes.
#[cube]
fn steps_of(own: &Shared<[u32]>, tile: KeyTile, #[comptime] cfg: HopperBackwardConfig) -> u32 {
    if comptime!(cfg.listed) { own[comptime!(LINES * LINE)] } else { tile.group * tile.walk.steps }
}

/// Whether any query sees a key of the cube.
#[cube]
fn has_steps(own: &Shared<[u32]>, tile: KeyTile, #[comptime] cfg: HopperBackwardConfig) -> bool {
    if comptime!(cfg.listed) { steps_of(own, tile, cfg) > 0 } else { tile.walk.steps > 0 }
}

/// Where the lines of steps start in shared memory, if there are any.
#[cube]
fn lines_at(own: &Shared<[u32]>, #[comptime] cfg: HopperBackwardConfig) -> u32 {
    if comptime!(cfg.listed) {
        shared_address::<u32>(unsafe { own.as_slice().as_ptr_unchecked() })
    } else {
        0u32.runtime()
    }
}

/// The gradients of a key tile, step by step: dk and dv in named registers, dq a tile at a time into shared memory.
#[cube]
fn differentiate_tiles<E: Float, NS: Size, NQ: Size, NP: Size>(
    places: Places,
    gates: &Gates,
    rows: &Statistics,
    sdq: &mut Shared<[Vector<f32, Const<4>>]>,
    tile: KeyTile,
    steps: u32,
    lines: u32,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    n: Numbers,
    factor: f32,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let stages = comptime!(cfg.stages());
    let [_, _, q_len, do_len] = comptime!(cfg.elements());
    let ds_piece = comptime!(cfg.bq * 2 * PIECE);
    let leader = UNIT_POS.is_multiple_of(32u32);
    let (keys, column) = (places.keys, places.keys.column);
    let mut ring = ring_start(0u32);
    let mut dq_parity = 1u32;
    barrier_wait(gates.kv_full, 0u32);
    barrier_wait(address_at(&gates.q_full, ring.stage, stages), ring.parity);
    let flying = scores::<NS>(places, ring.stage, cfg);
    let mut s = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
    let mut left = steps;
    let mut t = 0u32;
    let mut h = tile.first_head;
    while left > 0 {
        let (step, head) = step_at(tile, t, h, lines, scratch, n, with_bias, cfg);
        let (stage, parity) = (value_of::<u32>(ring.stage), value_of::<u32>(ring.parity));
        advance(&mut ring, comptime!(stages as u32));
        left -= 1;
        barrier_wait(address_at(&gates.do_full, stage, stages), parity);
        let dp_flying = gradients_of_weights::<NS>(places, stage, cfg);
        let row = stage as usize * comptime!(cfg.statistics() * cfg.bq / 2) + (column / 2) as usize;
        let slopes = weights_of::<E, NS, NP>(
            &mut s, rows, row, keys, tile, step, head, bias, scratch, n, factor, with_bias, function, cfg,
        );
        let mut dp = wait_products::<NS>(dp_flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
        if comptime!(!cfg.plain) {
            drop_elements::<NS>(&mut dp, keys, rows, row, n, true, cfg);
        }
        // While weights are still in f32: rounded ones would round ds twice.
        let ds = differentiate::<NS, NP>(dp, s, slopes, rows, row, n, comptime!(function.is_some()), cfg);
        if comptime!(!cfg.plain) {
            // By what they grow dv is multiplied.
            drop_elements::<NS>(&mut s, keys, rows, row, n, false, cfg);
        }
        let packing = comptime!(pack_text(cfg.lanes()[4], cfg.bq, cfg.element.name()));
        let packed = pack_weights::<NS, NP>(s, comptime!(packing.clone()).as_str());
        let do_matrix = descriptor(places.d_o + stage * comptime!(2 * do_len as u32), comptime!(ds_piece as u32));
        let to_v = comptime!(named_value_text("dv", cfg.lanes()[4], cfg.value_dim, cfg.bq, cfg.element.name()));
        issue_named::<NP>(packed, do_matrix, comptime!(to_v.clone()).as_str());
        t += 1;
        if comptime!(!cfg.listed) {
            if t == tile.walk.steps {
                t = 0u32;
                h += 1;
            }
        }
        let buffer = stage % 2 * comptime!(2 * cfg.score_elements() as u32);
        give_gradients::<NP>(ds, places.ds_write + buffer, cfg);
        fence_shared();
        named_wait(1u32, comptime!(2 * WARPGROUP as u32));
        let dq_flying = queries_part::<NQ>(places.k_turned, places.ds + buffer, cfg);
        let q_matrix = descriptor(places.q + stage * comptime!(2 * q_len as u32), comptime!(ds_piece as u32));
        let to_k = comptime!(named_value_text("dk", cfg.lanes()[4], cfg.head_dim, cfg.bq, cfg.element.name()));
        issue_named::<NP>(ds, q_matrix, comptime!(to_k.clone()).as_str());
        let dq_lanes = comptime!(cfg.lanes()[3]);
        let part = wait_products::<NQ>(dq_flying, comptime!(wait_text(dq_lanes, cfg.dq_columns(), 1)).as_str());
        barrier_arrive(address_at(&gates.do_free, stage, stages), leader);
        barrier_wait(gates.dq_free[0], dq_parity);
        dq_parity ^= 1u32;
        give_queries::<NQ>(part, places.line, sdq, cfg);
        fence_shared();
        sync_plane();
        barrier_arrive(address_at(&gates.dq_full, stage % 2, 2usize), leader);
        if left > 0 {
            barrier_wait(address_at(&gates.q_full, ring.stage, stages), ring.parity);
        }
        // After the last step nobody looks at these.
        let flying = scores::<NS>(places, ring.stage, cfg);
        s = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
        barrier_arrive(address_at(&gates.q_free, stage, stages), leader);
    }
}

/// Step `t` and its query head: of head `h` counted in it, or under a plan of all as the copying unit tells.
#[cube]
pub(crate) fn step_at(
    tile: KeyTile,
    t: u32,
    h: u32,
    lines: u32,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperBackwardConfig,
) -> (Step, u32) {
    if comptime!(cfg.listed) {
        told_step(lines, t, tile.j0, scratch, n)
    } else {
        let m = query_tile_at(tile, t);
        (query_band_step(m, tile.j0, tile.at, n, with_bias, comptime!(cfg.shape())), h)
    }
}

/// Writes ds to shared memory, a row a query.
#[cube]
pub(crate) fn give_gradients<P: Size>(ds: Vector<u32, P>, to: u32, #[comptime] cfg: HopperBackwardConfig) {
    #[unroll]
    for x in 0..comptime!(cfg.bq / 16) {
        store_transposed(
            to,
            comptime!(x * 16 * 128),
            ds.extract(comptime!(4 * x)),
            ds.extract(comptime!(4 * x + 1)),
            ds.extract(comptime!(4 * x + 2)),
            ds.extract(comptime!(4 * x + 3)),
        );
    }
}

/// Writes a thread's part of dq to shared memory, four floats at a time.
#[cube]
pub(crate) fn give_queries<N: Size>(
    part: Accumulator<N>,
    line: u32,
    sdq: &mut Shared<[Vector<f32, Const<4>>]>,
    #[comptime] cfg: HopperBackwardConfig,
) {
    #[unroll]
    for x in 0..comptime!(cfg.dq_registers() / 4) {
        let mut four = Vector::<f32, Const<4>>::new(0.0f32);
        #[unroll]
        for y in 0..4usize {
            four.insert(y, part.extract(comptime!(4 * x + y)));
        }
        sdq[line as usize + comptime!(x * WARPGROUP)] = four;
    }
}

/// Addresses of the barriers that consumers use.
#[derive(CubeType)]
pub(crate) struct Gates {
    pub kv_full: u32,
    pub q_full: Sequence<u32>,
    pub do_full: Sequence<u32>,
    pub dq_full: Sequence<u32>,
    pub q_free: Sequence<u32>,
    pub do_free: Sequence<u32>,
    pub dq_free: Sequence<u32>,
}

#[cube]
pub(crate) fn gates(all: &Barriers, #[comptime] cfg: HopperBackwardConfig) -> Gates {
    Gates {
        kv_full: barrier_address(&all.kv_full[0]),
        q_full: addresses(&all.q_full, cfg.stages()),
        do_full: addresses(&all.do_full, cfg.do_stages()),
        dq_full: addresses(&all.dq_full, 2usize),
        q_free: addresses(&all.q_free, cfg.stages()),
        do_free: addresses(&all.do_free, cfg.do_stages()),
        dq_free: addresses(&all.dq_free, cfg.dq_slots()),
    }
}

/// The warpgroup's keys and values as matrices, the part of the keys that it multiplies for dq, and where the rest starts.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Places {
    pub k: u64,
    pub v: u64,
    pub k_turned: u64,
    pub q: u32,
    pub d_o: u32,
    pub ds: u32,
    /// Where this lane's row of the first matrices of ds is written.
    pub ds_write: u32,
    /// Where this thread's first four floats of dq are written, counted in fours.
    pub line: u32,
    pub keys: KeyRows,
}

#[cube]
pub(crate) fn places_of<E: Float>(
    sk: &Shared<[E]>,
    sv: &Shared<[E]>,
    sq: &Shared<[E]>,
    sdo: &Shared<[E]>,
    sds: &Shared<[E]>,
    j0: u32,
    #[comptime] cfg: HopperBackwardConfig,
) -> Places {
    let warpgroup = uniform(UNIT_POS / comptime!(WARPGROUP as u32)) - 1;
    let (warp, lane) = (UNIT_POS % comptime!(WARPGROUP as u32) / 32, UNIT_POS % 32);
    let k_at = shared_address::<E>(unsafe { sk.as_slice().as_ptr_unchecked() });
    let v_at = shared_address::<E>(unsafe { sv.as_slice().as_ptr_unchecked() });
    let q_at = shared_address::<E>(unsafe { sq.as_slice().as_ptr_unchecked() });
    let do_at = shared_address::<E>(unsafe { sdo.as_slice().as_ptr_unchecked() });
    let ds_at = shared_address::<E>(unsafe { sds.as_slice().as_ptr_unchecked() });
    // For large head dimensions both have the same keys, and dq is in pieces of 64 columns.
    let part = if comptime!(cfg.wide()) { 0u32.runtime() } else { warpgroup };
    let own_rows = part * comptime!((ROWS * 2 * PIECE) as u32);
    let k_piece = comptime!(cfg.bk() * 2 * PIECE);
    let ds_piece = comptime!(cfg.bq * 2 * PIECE);
    // The warpgroup's part of dq: 64 columns of k, or half of the queries.
    let (k_part, ds_part) = comptime!(match cfg.head_dim {
        ..=PIECE => (0, cfg.dq_columns() * 2 * PIECE),
        _ => (k_piece, 0),
    });
    Places {
        k: descriptor(k_at + own_rows, 16u32),
        v: descriptor(v_at + own_rows, 16u32),
        k_turned: descriptor(k_at + part * comptime!(k_part as u32), comptime!(k_piece as u32)),
        q: q_at,
        d_o: do_at,
        ds: ds_at + part * comptime!(ds_part as u32),
        // Row `lane % 8` of matrix `lane / 8`: matrices are 8 keys wide, two side by side and two below each other.
        ds_write: ds_at
            + part * comptime!(ds_piece as u32)
            + (lane / 16 * 8 + lane % 8) * 128
            + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16,
        line: warpgroup * comptime!((cfg.dq_registers() / 4 * WARPGROUP) as u32)
            + UNIT_POS % comptime!(WARPGROUP as u32),
        keys: KeyRows { j: j0 + part * comptime!(ROWS as u32) + warp * 16 + lane / 4, column: lane % 4 * 2 },
    }
}

/// Issues `sᵀ = k · qᵀ` of the queries in a stage.
#[cube]
pub(crate) fn scores<N: Size>(places: Places, stage: u32, #[comptime] cfg: HopperBackwardConfig) -> Accumulator<N> {
    let [_, _, q_len, _] = comptime!(cfg.elements());
    let (piece_k, piece_q) = comptime!((cfg.bk() * 2 * PIECE, cfg.bq * 2 * PIECE));
    let text = comptime!(score_text(cfg.lanes()[0], cfg.bq, cfg.head_dim, piece_k, piece_q, cfg.element.name()));
    let q = descriptor(places.q + stage * comptime!(2 * q_len as u32), 16u32);
    issue_scores::<N>(places.k, q, comptime!(text.clone()).as_str())
}

/// Issues `dpᵀ = v · doᵀ` of the queries in a stage.
#[cube]
pub(crate) fn gradients_of_weights<N: Size>(
    places: Places,
    stage: u32,
    #[comptime] cfg: HopperBackwardConfig,
) -> Accumulator<N> {
    let [_, _, _, do_len] = comptime!(cfg.elements());
    let (piece_v, piece_do) = comptime!((cfg.bk() * 2 * PIECE, cfg.bq * 2 * PIECE));
    let text = comptime!(score_text(cfg.lanes()[0], cfg.bq, cfg.value_dim, piece_v, piece_do, cfg.element.name()));
    let d_o = descriptor(places.d_o + stage * comptime!(2 * do_len as u32), 16u32);
    issue_scores::<N>(places.v, d_o, comptime!(text.clone()).as_str())
}

/// Issues the part of `kᵀ · dsᵀ` that is of 64 columns of k, `k_turned`, and of the gradients of scores from address `ds` on.
#[cube]
pub(crate) fn queries_part<N: Size>(k_turned: u64, ds: u32, #[comptime] cfg: HopperBackwardConfig) -> Accumulator<N> {
    let piece = comptime!(cfg.bq * 2 * PIECE);
    let (lanes, columns) = comptime!((cfg.lanes()[3], cfg.dq_columns()));
    let text = comptime!(transposed_text(lanes, columns, cfg.bk(), piece, cfg.element.name()));
    let ds = descriptor(ds, 16u32);
    issue_scores::<N>(k_turned, ds, comptime!(text.clone()).as_str())
}
