//! The warpgroups of the backward of head dimensions above 128, where the registers of one hold no more than dk or dv of 64 keys.
//!
//! Both have the same keys: one computes the weights and has dv, the other their gradients and has dk. So each takes from the sums of one
//! product the operand of the next in registers, as with [smaller heads](super::backward). Weights go from one to the other in f32
//! through shared memory, `ds` to both. dq comes in pieces of 64 elements of the head dimension, of which they have every other.
//!
//! ```text
//! of values: sᵀ = k · qᵀ    pᵀ = exp(sᵀ − lse)    dv += pᵀ · do            dqᵀ += kᵀ · dsᵀ, pieces 0, 2
//! of keys:   dpᵀ = v · doᵀ    dsᵀ = pᵀ ∘ (dpᵀ − delta)    dk += dsᵀ · q    dqᵀ += kᵀ · dsᵀ, pieces 1, 3
//! ```
//!
//! What runs beside what: the weights beside `v · doᵀ`, `ds` beside `pᵀ · do`, and the first piece of dq goes to shared memory beside
//! the next `k · qᵀ` and `dsᵀ · q`.

use cubecl::prelude::*;

use super::backward::{
    Consumed, Places, give_gradients, give_queries, gradients_of_weights, next_work, pass_values, places_of,
    queries_part, scores, step_at, steps_of, told_tile,
};
use super::backward_config::{DQ_SLOTS, HopperBackwardConfig};
use super::backward_copies::gradient_ring;
use super::backward_gates::{Gate, gate_at, gate_of};
use super::backward_scores::{Statistics, differentiate, drop_elements, times_slopes, weights_of};
use super::backward_works::{end_queries, kind};
use super::bulk::fence_shared;
use super::config::{PIECE, WARPGROUP};
use super::ptx::{
    Accumulator, barrier_arrive, barrier_wait, descriptor, issue_named, named_arrive, named_read_text, named_text,
    named_value_text, named_wait, named_zero_text, read_named, run_block, uniform, wait_products, wait_text,
};
use super::ring::advance;
use super::rows::{pack_text, pack_weights};
use super::store::{Place, same_factor, store_rows};
use crate::family::element::Numbers;
use crate::family::ptx::value_of;
use crate::family::turns::KeyTile;
use crate::score::ScoreCode;

/// Named barriers of both warpgroups: weights are there, and gradients of scores. At the second all weights have been read, and the
/// first comes after all products with the gradients before: neither needs another that says that its place is free.
const WEIGHTS: u32 = 1;
const GRADIENTS: u32 = 2;

/// Threads of both.
const THREADS: u32 = 2 * WARPGROUP as u32;

/// The works of one of the warpgroups: of key tiles either gradient.
#[cube]
pub(crate) fn consume_large<E: Float, NS: Size, NK: Size, NV: Size, NQ: Size, NP: Size>(
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
    let of_values = uniform(UNIT_POS / comptime!(WARPGROUP as u32)) == 1;
    if of_values {
        run_block(comptime!(named_text("dv", cfg.value_dim)).as_str());
    } else {
        run_block(comptime!(named_text("dk", cfg.head_dim)).as_str());
    }
    let leader = UNIT_POS.is_multiple_of(32u32);
    let mut at = Consumed::new();
    let mut more = true.runtime();
    while more {
        let work = next_work(gates, told, &mut at, cfg);
        more = work.kind != comptime!(kind::NOTHING);
        if work.kind == comptime!(kind::KEYS) {
            let tile = told_tile::<E>(work, bias, scratch, n, with_bias, cfg);
            let steps = steps_of(work, tile, cfg);
            let places = places_of::<E>(sk, sv, sq, sdo, sds, tile.j0, cfg);
            let (row, column) = (places.keys.j, places.keys.column);
            let first = work.number as usize * n.seq_kv as usize;
            barrier_wait(gate_of(gates, Gate::Keys, cfg), at.kv_parity);
            if of_values {
                run_block(comptime!(named_zero_text("dv", cfg.value_dim)).as_str());
                if steps > 0 {
                    weigh_tiles::<E, NS, NQ, NP>(
                        places, gates, rows, sdq, &mut at, tile, steps, told, bias, scratch, n, factor, with_bias,
                        function, cfg,
                    );
                }
                barrier_arrive(gate_of(gates, Gate::FreeKeys, cfg), leader);
                let text = comptime!(named_read_text("dv", cfg.value_dim));
                let acc = read_named::<NV>(comptime!(text.clone()).as_str());
                let place = Place { row, column, first, rows: n.seq_kv, width: n.value_dim };
                store_rows::<NV>(acc, same_factor(n.factor), place, dv, false, cfg.element, cfg.value_dim, false, true);
            } else {
                run_block(comptime!(named_zero_text("dk", cfg.head_dim)).as_str());
                if steps > 0 {
                    differentiate_tiles::<NS, NQ, NP>(places, gates, rows, sdq, &mut at, steps, n, cfg);
                } else {
                    pass_values(gates, &at, leader, cfg);
                }
                barrier_arrive(gate_of(gates, Gate::FreeKeys, cfg), leader);
                let text = comptime!(named_read_text("dk", cfg.head_dim));
                let acc = read_named::<NK>(comptime!(text.clone()).as_str());
                let place = Place { row, column, first, rows: n.seq_kv, width: n.head_dim };
                store_rows::<NK>(acc, same_factor(n.scale), place, dk, false, cfg.element, cfg.head_dim, false, true);
            }
            at.kv_parity ^= 1u32;
        } else if more {
            barrier_arrive(gate_of(gates, Gate::FreeKeys, cfg), leader);
            end_queries(work.number, counters, sums, dq, n, cfg);
        }
    }
}

/// The warpgroup of values, step by step: weights, which it hands on, dv in named registers, and its pieces of dq.
#[cube]
fn weigh_tiles<E: Float, NS: Size, NQ: Size, NP: Size>(
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
    let [_, _, _, do_len] = comptime!(cfg.elements());
    let leader = UNIT_POS.is_multiple_of(32u32);
    let (keys, column) = (places.keys, places.keys.column);
    barrier_wait(gate_at(gates, at.ring.stage, Gate::Queries, cfg), at.ring.parity);
    let flying = scores::<NS>(places, at.ring.stage, cfg);
    let mut s = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
    let mut left = steps;
    // Under a plan steps are counted over all key tiles, else those of a head.
    let mut t = if comptime!(cfg.listed) { value_of::<u32>(at.number) } else { 0u32.runtime() };
    let mut h = tile.first_head;
    at.number += steps;
    while left > 0 {
        let (step, head) = step_at(tile, t, h, told, scratch, n, with_bias, cfg);
        let stage = value_of::<u32>(at.ring.stage);
        let gradients = gradient_ring(at.ring.stage, at.ring.parity, 0u32, cfg);
        let (do_stage, do_parity) = (value_of::<u32>(gradients.stage), value_of::<u32>(gradients.parity));
        advance(&mut at.ring, comptime!(stages as u32));
        left -= 1;
        let row = stage as usize * comptime!(cfg.statistics() * cfg.bq / 2) + (column / 2) as usize;
        let slopes = weights_of::<E, NS, NP>(
            &mut s, rows, row, keys, tile, step, head, bias, scratch, n, factor, with_bias, function, cfg,
        );
        if comptime!(cfg.plain) {
            give_queries::<NS>(s, handed_line(cfg), sdq, cfg);
        } else {
            let handed = times_slopes::<NS, NP>(s, slopes, n, comptime!(function.is_some()), cfg);
            give_queries::<NS>(handed, handed_line(cfg), sdq, cfg);
            // By what they grow dv is multiplied.
            drop_elements::<NS>(&mut s, keys, rows, row, n, false, cfg);
        }
        named_arrive(comptime!(WEIGHTS).runtime(), THREADS);
        let packing = comptime!(pack_text(cfg.lanes()[4], cfg.bq, cfg.element.name()));
        let packed = pack_weights::<NS, NP>(s, comptime!(packing.clone()).as_str());
        barrier_wait(gate_at(gates, do_stage, Gate::Gradients, cfg), do_parity);
        let do_matrix =
            descriptor(places.d_o + do_stage * comptime!(2 * do_len as u32), comptime!((cfg.bq * 2 * PIECE) as u32));
        let to_v = comptime!(named_value_text("dv", cfg.lanes()[4], cfg.value_dim, cfg.bq, cfg.element.name()));
        issue_named::<NP>(packed, do_matrix, comptime!(to_v.clone()).as_str());
        t += 1;
        if comptime!(!cfg.listed) {
            if t == tile.walk.steps {
                t = 0u32;
                h += 1;
            }
        }
        named_wait(comptime!(GRADIENTS).runtime(), THREADS);
        let first = piece::<NQ>(places, 0usize, cfg);
        if left > 0 {
            barrier_wait(gate_at(gates, at.ring.stage, Gate::Queries, cfg), at.ring.parity);
        }
        // After the last step nobody looks at these.
        let flying = scores::<NS>(places, at.ring.stage, cfg);
        let part = wait_products::<NQ>(first, comptime!(wait_text(cfg.lanes()[3], cfg.bq, 1)).as_str());
        barrier_arrive(gate_at(gates, do_stage, Gate::FreeGradients, cfg), leader);
        barrier_arrive(gate_at(gates, stage, Gate::FreeQueries, cfg), leader);
        give_piece::<NQ>(part, places, gates, 0usize, &mut at.dq_parity, sdq, cfg);
        if comptime!(cfg.wide_pieces(0) > 1) {
            let second = piece::<NQ>(places, 2usize, cfg);
            let part = wait_products::<NQ>(second, comptime!(wait_text(cfg.lanes()[3], cfg.bq, 0)).as_str());
            give_piece::<NQ>(part, places, gates, 0usize, &mut at.dq_parity, sdq, cfg);
        }
        s = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
    }
}

/// The warpgroup of keys, step by step: gradients of weights and of scores, dk in named registers, and its pieces of dq.
#[cube]
fn differentiate_tiles<NS: Size, NQ: Size, NP: Size>(
    places: Places,
    gates: u32,
    rows: &Statistics,
    sdq: &mut Shared<[Vector<f32, Const<4>>]>,
    at: &mut Consumed,
    steps: u32,
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let stages = comptime!(cfg.stages());
    let [_, _, q_len, _] = comptime!(cfg.elements());
    let leader = UNIT_POS.is_multiple_of(32u32);
    let (keys, column) = (places.keys, places.keys.column);
    barrier_wait(gate_of(gates, Gate::Values, cfg), at.kv_parity);
    let first = gradient_ring(at.ring.stage, at.ring.parity, 0u32, cfg);
    barrier_wait(gate_at(gates, first.stage, Gate::Gradients, cfg), first.parity);
    let flying = gradients_of_weights::<NS>(places, first.stage, cfg);
    let mut dp = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
    let mut left = steps;
    while left > 0 {
        let (stage, parity) = (value_of::<u32>(at.ring.stage), value_of::<u32>(at.ring.parity));
        let used = gradient_ring(at.ring.stage, at.ring.parity, 0u32, cfg);
        barrier_arrive(gate_at(gates, used.stage, Gate::FreeGradients, cfg), leader);
        advance(&mut at.ring, comptime!(stages as u32));
        left -= 1;
        // For the statistics, and for dk.
        barrier_wait(gate_at(gates, stage, Gate::Queries, cfg), parity);
        let row = stage as usize * comptime!(cfg.statistics() * cfg.bq / 2) + (column / 2) as usize;
        if comptime!(!cfg.plain) {
            drop_elements::<NS>(&mut dp, keys, rows, row, n, true, cfg);
        }
        named_wait(comptime!(WEIGHTS).runtime(), THREADS);
        let p = handed_weights::<NS>(sdq, cfg);
        // Derivatives of scores are in what was handed on.
        let products = comptime!(HopperBackwardConfig { plain: true, ..cfg });
        let ds = differentiate::<NS, NP>(dp, p, Vector::<u32, NP>::new(0u32), rows, row, n, false, products);
        give_gradients::<NP>(ds, places.ds_write, cfg);
        fence_shared();
        named_wait(comptime!(GRADIENTS).runtime(), THREADS);
        let q_matrix =
            descriptor(places.q + stage * comptime!(2 * q_len as u32), comptime!((cfg.bq * 2 * PIECE) as u32));
        let to_k = comptime!(named_value_text("dk", cfg.lanes()[4], cfg.head_dim, cfg.bq, cfg.element.name()));
        if comptime!(cfg.wide_pieces(1) > 0) {
            let first = piece::<NQ>(places, 1usize, cfg);
            issue_named::<NP>(ds, q_matrix, comptime!(to_k.clone()).as_str());
            let part = wait_products::<NQ>(first, comptime!(wait_text(cfg.lanes()[3], cfg.bq, 1)).as_str());
            give_piece::<NQ>(part, places, gates, 1usize, &mut at.dq_parity, sdq, cfg);
        } else {
            issue_named::<NP>(ds, q_matrix, comptime!(to_k.clone()).as_str());
        }
        let next = gradient_ring(at.ring.stage, at.ring.parity, 0u32, cfg);
        if comptime!(cfg.wide_pieces(1) > 1) {
            let second = piece::<NQ>(places, 3usize, cfg);
            if left > 0 {
                barrier_wait(gate_at(gates, next.stage, Gate::Gradients, cfg), next.parity);
            }
            let flying = gradients_of_weights::<NS>(places, next.stage, cfg);
            let part = wait_products::<NQ>(second, comptime!(wait_text(cfg.lanes()[3], cfg.bq, 1)).as_str());
            barrier_arrive(gate_at(gates, stage, Gate::FreeQueries, cfg), leader);
            give_piece::<NQ>(part, places, gates, 1usize, &mut at.dq_parity, sdq, cfg);
            dp = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
        } else {
            if left > 0 {
                barrier_wait(gate_at(gates, next.stage, Gate::Gradients, cfg), next.parity);
            }
            // After the last step nobody looks at these.
            let flying = gradients_of_weights::<NS>(places, next.stage, cfg);
            dp = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
            barrier_arrive(gate_at(gates, stage, Gate::FreeQueries, cfg), leader);
        }
    }
    barrier_arrive(gate_of(gates, Gate::FreeValues, cfg), leader);
}

/// Where this thread's weights lie behind the pieces of dq, counted in fours: the other warpgroup's thread of the same place in it
/// has the same elements.
#[cube]
fn handed_line(#[comptime] cfg: HopperBackwardConfig) -> u32 {
    comptime!((DQ_SLOTS * cfg.bq * PIECE / 4) as u32) + UNIT_POS % comptime!(WARPGROUP as u32)
}

/// The weights that the warpgroup of values handed on.
#[cube]
fn handed_weights<N: Size>(
    sdq: &mut Shared<[Vector<f32, Const<4>>]>,
    #[comptime] cfg: HopperBackwardConfig,
) -> Accumulator<N> {
    let line = handed_line(cfg) as usize;
    let mut p = Accumulator::<N>::new(0.0f32);
    #[unroll]
    for x in 0..comptime!(cfg.bq / 8) {
        let four = sdq[line + comptime!(x * WARPGROUP)];
        #[unroll]
        for y in 0..4usize {
            p.insert(comptime!(4 * x + y), four.extract(y));
        }
    }
    p
}

/// Issues a piece of dq: 64 elements of the head dimension, all queries.
#[cube]
fn piece<N: Size>(places: Places, #[comptime] number: usize, #[comptime] cfg: HopperBackwardConfig) -> Accumulator<N> {
    // An address in a descriptor is a sixteenth.
    let offset = comptime!((number * cfg.bk() * 2 * PIECE / 16) as u64);
    queries_part::<N>(places.k_turned + offset, places.ds, cfg)
}

/// Gives a piece of dq to who adds it up, as soon as the one before has been read.
#[cube]
fn give_piece<N: Size>(
    part: Accumulator<N>,
    places: Places,
    gates: u32,
    #[comptime] warpgroup: usize,
    parity: &mut u32,
    sdq: &mut Shared<[Vector<f32, Const<4>>]>,
    #[comptime] cfg: HopperBackwardConfig,
) {
    barrier_wait(gate_at(gates, comptime!(warpgroup as u32).runtime(), Gate::FreeSums, cfg), *parity);
    *parity ^= 1u32;
    give_queries::<N>(part, places.line, sdq, cfg);
    fence_shared();
    sync_plane();
    barrier_arrive(
        gate_at(gates, comptime!(warpgroup as u32).runtime(), Gate::Sums, cfg),
        UNIT_POS.is_multiple_of(32u32),
    );
}
