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
//! **A cube takes [work after work](super::backward_works).** The unit that copies finds the next key tile while this one's last steps are
//! computed; its keys and values are on their way as soon as the last products with those before are done. Queries, gradients of outputs
//! and parts of dq go through their rings from one key tile to the next.
//!
//! **Under a block plan** a launch before this one [lists](crate::family::listed) every cube's steps. The unit that copies reads its list and tells the
//! others of each step. Those before a cube at a query tile are the listed key tiles that come later, whose tickets are earlier.

use cubecl::prelude::*;

use super::backward_adds::add_works;
use super::backward_config::HopperBackwardConfig;
use super::backward_copies::copy_works;
use super::backward_gates::{Gate, gate_at, gate_of};
use super::backward_messages::{Told, step_lines, told_step, told_work};
use super::backward_scores::{KeyRows, Statistics, differentiate, drop_elements, weights_of};
use super::backward_wide::consume_large;
use super::backward_works::{end_queries, kind};
use super::bulk::{fence_shared, store_transposed};
use super::config::{PIECE, ROWS, WARPGROUP};
use super::ptx::{
    Accumulator, barrier_address, barrier_arrive, barrier_wait, descriptor, fence_barriers, issue_named, issue_scores,
    named_read_text, named_text, named_value_text, named_wait, named_zero_text, read_named, registers_decrease,
    registers_increase, run_block, score_text, shared_address, transposed_text, uniform, wait_products, wait_text,
};
use super::ring::{Ring, advance, barrier_row, ring_start};
use super::rows::{pack_text, pack_weights};
use super::store::{Place, same_factor, store_rows};
use crate::family::element::Numbers;
use crate::family::listed::Lists;
use crate::family::ptx::{global_address, value_of};
use crate::family::turns::{KeyTile, key_tile, query_tile_at};
use crate::family::walk::{Step, query_band_step};
use crate::score::ScoreCode;

/// One cube a multiprocessor. `statistics` holds for each query head and query tile `−lse` in logarithms of base 2 and
/// `delta`; `turns` the ticket counter, for each query head, query tile and unit that adds how many cubes have added to `sums`, which
/// are in the order of threads (see [`end_queries`]), and how many have added all of a key tile of each key head; behind them the `lists` of
/// steps, under a plan.
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
    sums: &mut [f32],
    dq: &mut [Vector<u32, Const<4>>],
    dk: &mut [Vector<u32, Const<2>>],
    dv: &mut [Vector<u32, Const<2>>],
    n: Numbers,
    factor: f32,
    section: u32,
    lag: u32,
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
    let told_words: Shared<[u32]> = Shared::new_aligned_slice(comptime!(cfg.words()), 16usize);
    let all = barrier_row(comptime!(cfg.arrivals()));
    let gates = barrier_address(&all[0]);
    fence_barriers();
    sync_cube();
    let told = shared_address::<u32>(unsafe { told_words.as_slice().as_ptr_unchecked() });
    let counters = global_address::<u32>(&*turns);
    let sums_at = global_address::<f32>(&*sums);
    let (registers, spare) = comptime!(cfg.registers());
    if UNIT_POS < comptime!(WARPGROUP as u32) {
        registers_decrease(spare);
        if UNIT_POS == 0 {
            copy_works::<E>(
                q, k, v, d_o, bias, statistics, &mut sk, &mut sv, &mut sq, &mut sdo, &rows, &all, told, counters,
                lists, scratch, n, section, lag, with_bias, cfg,
            );
        }
        // They take the steps in turns, or for large head dimensions have a warpgroup each: one waits until what it added
        // has arrived while the other adds.
        if UNIT_POS == 32 || UNIT_POS == 64 {
            add_works::<E>(&sdq, gates, told, counters, sums_at, bias, scratch, n, UNIT_POS / 64, with_bias, cfg);
        }
    } else {
        registers_increase(registers);
        if comptime!(cfg.wide()) {
            consume_large::<E, NS, NK, NV, NQ, NP>(
                &sk, &sv, &sq, &sdo, &sds, &rows, &mut sdq, gates, told, counters, sums_at, bias, scratch, dq, dk, dv,
                n, factor, with_bias, function, cfg,
            );
        } else {
            consume::<E, NS, NK, NV, NQ, NP>(
                &sk, &sv, &sq, &sdo, &sds, &rows, &mut sdq, gates, told, counters, sums_at, bias, scratch, dq, dk, dv,
                n, factor, with_bias, function, cfg,
            );
        }
    }
}

/// The works of the consumers: of key tiles both gradients, each warpgroup those of its own keys.
#[cube]
fn consume<E: Float, NS: Size, NK: Size, NV: Size, NQ: Size, NP: Size>(
    sk: &Shared<[E]>,
    sv: &Shared<[E]>,
    sq: &Shared<[E]>,
    sdo: &Shared<[E]>,
    sds: &Shared<[E]>,
    rows: &Statistics,
    sdq: &mut Shared<[Vector<f32, Const<4>>]>,
    gates: u32,
    told: u32,
    counters: u64,
    sums: u64,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    dq: &mut [Vector<u32, Const<4>>],
    dk: &mut [Vector<u32, Const<2>>],
    dv: &mut [Vector<u32, Const<2>>],
    n: Numbers,
    factor: f32,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] cfg: HopperBackwardConfig,
) {
    run_block(comptime!(named_text("dk", cfg.head_dim)).as_str());
    run_block(comptime!(named_text("dv", cfg.value_dim)).as_str());
    let leader = UNIT_POS.is_multiple_of(32u32);
    let mut at = Consumed::new();
    let mut more = true.runtime();
    while more {
        let work = next_work(gates, told, &mut at, cfg);
        more = work.kind != comptime!(kind::NOTHING);
        if work.kind == comptime!(kind::KEYS) {
            let tile = told_tile::<E>(work, bias, scratch, n, with_bias, cfg);
            let steps = steps_of(work, tile, cfg);
            run_block(comptime!(named_zero_text("dk", cfg.head_dim)).as_str());
            run_block(comptime!(named_zero_text("dv", cfg.value_dim)).as_str());
            let places = places_of::<E>(sk, sv, sq, sdo, sds, tile.j0, cfg);
            barrier_wait(gate_of(gates, Gate::Keys, cfg), at.kv_parity);
            if steps > 0 {
                differentiate_tiles::<E, NS, NQ, NP>(
                    places, gates, rows, sdq, &mut at, tile, steps, told, bias, scratch, n, factor, with_bias,
                    function, cfg,
                );
            } else {
                pass_values(gates, &at, leader, cfg);
            }
            at.kv_parity ^= 1u32;
            barrier_arrive(gate_of(gates, Gate::FreeKeys, cfg), leader);
            let text = comptime!((named_read_text("dk", cfg.head_dim), named_read_text("dv", cfg.value_dim)));
            let acc_k = read_named::<NK>(comptime!(text.0.clone()).as_str());
            let acc_v = read_named::<NV>(comptime!(text.1.clone()).as_str());
            let (row, column) = (places.keys.j, places.keys.column);
            let first = work.number as usize * n.seq_kv as usize;
            let place = Place { row, column, first, rows: n.seq_kv, width: n.head_dim };
            store_rows::<NK>(acc_k, same_factor(n.scale), place, dk, false, cfg.element, cfg.head_dim, false, true);
            let place = Place { row, column, first, rows: n.seq_kv, width: n.value_dim };
            store_rows::<NV>(acc_v, same_factor(n.factor), place, dv, false, cfg.element, cfg.value_dim, false, true);
        } else if more {
            barrier_arrive(gate_of(gates, Gate::FreeKeys, cfg), leader);
            end_queries(work.number, counters, sums, dq, n, cfg);
        }
    }
}

/// The work that a consumer is told of.
#[cube]
pub(crate) fn next_work(gates: u32, told: u32, at: &mut Consumed, #[comptime] cfg: HopperBackwardConfig) -> Told {
    barrier_wait(gate_of(gates, Gate::Told, cfg), at.told_parity);
    at.told_parity ^= 1u32;
    let work = told_work(told);
    let (kind, number, steps) = (uniform(work.kind), uniform(work.number), uniform(work.steps));
    Told { kind, number, tile: work.tile, ascending: work.ascending, steps }
}

/// Takes leave of values that no step needs.
#[cube]
pub(crate) fn pass_values(gates: u32, at: &Consumed, leader: bool, #[comptime] cfg: HopperBackwardConfig) {
    barrier_wait(gate_of(gates, Gate::Values, cfg), at.kv_parity);
    barrier_arrive(gate_of(gates, Gate::FreeValues, cfg), leader);
}

/// The key tile that all are told of.
#[cube]
pub(crate) fn told_tile<E: Float>(
    told: Told,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperBackwardConfig,
) -> KeyTile {
    let Told { number, tile, ascending, .. } = told;
    key_tile::<E>(number, tile, ascending, scratch, bias, n, with_bias, comptime!(cfg.shape()), cfg.listed)
}

/// How many steps a key tile takes, which under a plan all are told.
#[cube]
pub(crate) fn steps_of(told: Told, tile: KeyTile, #[comptime] cfg: HopperBackwardConfig) -> u32 {
    if comptime!(cfg.listed) { told.steps } else { tile.group * tile.walk.steps }
}

/// Where a consumer stands among the works and steps of its cube.
#[derive(CubeType)]
pub(crate) struct Consumed {
    /// Parities of the phases that end when a work is told of, and when keys and values are there.
    pub told_parity: u32,
    pub kv_parity: u32,
    /// The stage of the next step's queries.
    pub ring: Ring,
    /// For large head dimensions the parity of the phase that ends when the place of dq is free.
    pub dq_parity: u32,
    /// Steps so far, of all key tiles.
    pub number: u32,
}

#[cube]
impl Consumed {
    pub fn new() -> Self {
        Consumed {
            told_parity: 0u32.runtime(),
            kv_parity: 0u32.runtime(),
            ring: ring_start(0u32),
            dq_parity: 1u32.runtime(),
            number: 0u32.runtime(),
        }
    }
}

/// The gradients of a key tile, step by step: dk and dv in named registers, dq a tile at a time into shared memory.
#[cube]
fn differentiate_tiles<E: Float, NS: Size, NQ: Size, NP: Size>(
    places: Places,
    gates: u32,
    rows: &Statistics,
    sdq: &mut Shared<[Vector<f32, Const<4>>]>,
    at: &mut Consumed,
    tile: KeyTile,
    steps: u32,
    told: u32,
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
    barrier_wait(gate_at(gates, at.ring.stage, Gate::Queries, cfg), at.ring.parity);
    let flying = scores::<NS>(places, at.ring.stage, cfg);
    let mut s = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
    barrier_wait(gate_of(gates, Gate::Values, cfg), at.kv_parity);
    let mut left = steps;
    // Under a plan steps are counted over all key tiles, else those of a head.
    let mut t = if comptime!(cfg.listed) { value_of::<u32>(at.number) } else { 0u32.runtime() };
    let mut h = tile.first_head;
    at.number += steps;
    while left > 0 {
        let (step, head) = step_at(tile, t, h, told, scratch, n, with_bias, cfg);
        let (stage, parity) = (value_of::<u32>(at.ring.stage), value_of::<u32>(at.ring.parity));
        advance(&mut at.ring, comptime!(stages as u32));
        left -= 1;
        barrier_wait(gate_at(gates, stage, Gate::Gradients, cfg), parity);
        let dp_flying = gradients_of_weights::<NS>(places, stage, cfg);
        let row = stage as usize * comptime!(cfg.statistics() * cfg.bq / 2) + (column / 2) as usize;
        let slopes = weights_of::<E, NS, NP>(
            &mut s, rows, row, keys, tile, step, head, bias, scratch, n, factor, with_bias, function, cfg,
        );
        let mut dp = wait_products::<NS>(dp_flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
        barrier_arrive(gate_of(gates, Gate::FreeValues, cfg), leader && left == 0);
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
        barrier_arrive(gate_at(gates, stage, Gate::FreeGradients, cfg), leader);
        // There are as many places as stages of queries.
        barrier_wait(gate_at(gates, stage, Gate::FreeSums, cfg), parity ^ 1u32);
        give_queries::<NQ>(part, places.line + stage * comptime!(cfg.dq_elements() as u32 / 4), sdq, cfg);
        fence_shared();
        sync_plane();
        barrier_arrive(gate_at(gates, stage, Gate::Sums, cfg), leader);
        if left > 0 {
            barrier_wait(gate_at(gates, at.ring.stage, Gate::Queries, cfg), at.ring.parity);
        }
        // After the last step nobody looks at these.
        let flying = scores::<NS>(places, at.ring.stage, cfg);
        s = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
        barrier_arrive(gate_at(gates, stage, Gate::FreeQueries, cfg), leader);
    }
}

/// Step `t` and its query head: of head `h` counted in it, or under a plan of all as the copying unit tells.
#[cube]
pub(crate) fn step_at(
    tile: KeyTile,
    t: u32,
    h: u32,
    told: u32,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperBackwardConfig,
) -> (Step, u32) {
    if comptime!(cfg.listed) {
        told_step(step_lines(told), t, tile.j0, scratch, n)
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
