//! What one unit of a cube of the backward copies for it, and what two others add to dq.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::backward_config::HopperBackwardConfig;
use super::backward_messages::{Due, tell_step, told_due};
use super::backward_scores::Statistics;
use super::bulk::{
    WRITTEN, barrier_expect, bulk_add, bulk_load, bulk_store, bulk_wait, bulk_wait_read, come_by, fence_shared,
    turn_pass, turn_wait,
};
use super::config::PIECE;
use super::ptx::{barrier_address, barrier_arrive, barrier_wait, shared_address};
use super::ring::{Ring, address_at, addresses, advance, copy_pieces, ring_start};
use crate::family::element::Numbers;
use crate::family::listed::{Lists, listing, next_listed};
use crate::family::ptx::global_address;
use crate::family::turns::{KeyTile, listed_head, place_of, query_tile_at, turn_of};

/// Barriers of a cube. Keys and values arrive together; two of dq, for steps of either parity.
#[derive(CubeType)]
pub(crate) struct Barriers {
    pub kv_full: Sequence<Shared<Barrier>>,
    pub q_full: Sequence<Shared<Barrier>>,
    pub do_full: Sequence<Shared<Barrier>>,
    pub dq_full: Sequence<Shared<Barrier>>,
    pub q_free: Sequence<Shared<Barrier>>,
    pub do_free: Sequence<Shared<Barrier>>,
    pub dq_free: Sequence<Shared<Barrier>>,
}

/// What the unit that copies knows from the start.
#[derive(CubeType)]
struct Copies {
    q_free: Sequence<u32>,
    do_free: Sequence<u32>,
    q_full: Sequence<u32>,
    do_full: Sequence<u32>,
    /// Where statistics start, in shared and in global memory.
    rows: u32,
    statistics: u64,
}

/// Copies the keys and values, by the unit that initialized the barriers, which others need not have seen yet.
#[cube]
pub(crate) fn copy_keys<E: Float>(
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    sk: &mut Shared<[E]>,
    sv: &mut Shared<[E]>,
    all: &Barriers,
    tile: KeyTile,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let [k_len, v_len, _, _] = comptime!(cfg.elements());
    fence_shared();
    let barrier = &all.kv_full[0];
    barrier.arrive_and_expect_tx(1u32, comptime!(2 * (k_len + v_len) as u32));
    copy_pieces::<E>(k, sk, barrier, 0usize, tile.batch, tile.key_head, tile.j0, k_len, cfg.bk());
    copy_pieces::<E>(v, sv, barrier, 0usize, tile.batch, tile.key_head, tile.j0, v_len, cfg.bk());
}

/// Copies query tile after query tile with the gradients of outputs and the statistics. Under a plan
/// it reads the [list](crate::family::listed) of steps from the buffer that starts at `counters`, and tells of each at `lines`.
#[cube]
pub(crate) fn copy_tiles<E: Float>(
    q: &TensorMap<E, Tiled>,
    d_o: &TensorMap<E, Tiled>,
    statistics: &[f32],
    sq: &mut Shared<[E]>,
    sdo: &mut Shared<[E]>,
    rows: &Statistics,
    all: &Barriers,
    tile: KeyTile,
    lines: u32,
    counters: u64,
    lists: Lists,
    scratch: &[u32],
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let (stages, do_stages) = comptime!((cfg.stages(), cfg.do_stages()));
    let copies = Copies {
        q_free: addresses(&all.q_free, stages),
        do_free: addresses(&all.do_free, do_stages),
        q_full: addresses(&all.q_full, stages),
        do_full: addresses(&all.do_full, do_stages),
        rows: shared_address::<Vector<f32, Const<2>>>(unsafe { rows.as_slice().as_ptr_unchecked() }),
        statistics: global_address::<f32>(statistics),
    };
    let mut ring = ring_start(1u32);
    if comptime!(cfg.listed) {
        let mut number = 0u32;
        for g in 0..tile.group {
            let h = tile.first_head + g;
            let at = listed_head::<E>(tile, h, scratch, n);
            let mut walk = listing(counters, tile.j0, at, lists, scratch, n, comptime!(cfg.shape()));
            let mut more = true.runtime();
            while more {
                let next = next_listed(&mut walk, tile.j0, n);
                more = !next.step.empty;
                if more {
                    // The line's last readers are done when the stage's are.
                    barrier_wait(address_at(&copies.q_free, ring.stage, stages), ring.parity);
                    tell_step(lines, number, next.step, h, next.turn, n);
                    let m = next.step.i0 / comptime!(cfg.bq as u32);
                    copy_queries::<E>(q, d_o, sq, sdo, all, &copies, &mut ring, tile, h, m, n, cfg);
                    number += 1;
                }
            }
        }
    } else {
        for g in 0..tile.group {
            let h = tile.first_head + g;
            for t in 0..tile.walk.steps {
                let m = query_tile_at(tile, t);
                copy_queries::<E>(q, d_o, sq, sdo, all, &copies, &mut ring, tile, h, m, n, cfg);
            }
        }
    }
}

/// Copies query tile `m` of a head with its statistics, and the gradients of its outputs, each as soon as its place is free.
#[cube]
fn copy_queries<E: Float>(
    q: &TensorMap<E, Tiled>,
    d_o: &TensorMap<E, Tiled>,
    sq: &mut Shared<[E]>,
    sdo: &mut Shared<[E]>,
    all: &Barriers,
    copies: &Copies,
    ring: &mut Ring,
    tile: KeyTile,
    h: u32,
    m: u32,
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let (stages, do_stages) = comptime!((cfg.stages(), cfg.do_stages()));
    let [_, _, q_len, do_len] = comptime!(cfg.elements());
    let bytes = comptime!(cfg.statistics_bytes());
    let i0 = m * comptime!(cfg.bq as u32);
    let place = place_of(tile, h, m, n, cfg.bq);
    barrier_wait(address_at(&copies.q_free, ring.stage, stages), ring.parity);
    let barrier = address_at(&copies.q_full, ring.stage, stages);
    barrier_expect(barrier, comptime!(2 * q_len + bytes));
    bulk_load(
        copies.rows + ring.stage * comptime!(bytes as u32),
        copies.statistics + place as u64 * comptime!(bytes as u64),
        barrier,
        bytes,
    );
    #[unroll]
    for s in 0..stages {
        if ring.stage == comptime!(s as u32) {
            copy_pieces::<E>(q, sq, &all.q_full[s], s, tile.batch, h, i0, q_len, cfg.bq);
        }
    }
    let place = gradient_ring(ring.stage, ring.parity, 1u32, cfg);
    barrier_wait(address_at(&copies.do_free, place.stage, do_stages), place.parity);
    barrier_expect(address_at(&copies.do_full, place.stage, do_stages), comptime!(2 * do_len));
    #[unroll]
    for s in 0..do_stages {
        if place.stage == comptime!(s as u32) {
            copy_pieces::<E>(d_o, sdo, &all.do_full[s], s, tile.batch, h, i0, do_len, cfg.bq);
        }
    }
    advance(ring, comptime!(stages as u32));
}

/// Where gradients of outputs go when queries go to a stage, whose parity was `first` at the start.
#[cube]
pub(crate) fn gradient_ring(
    stage: u32,
    parity: u32,
    #[comptime] first: u32,
    #[comptime] cfg: HopperBackwardConfig,
) -> Ring {
    if comptime!(cfg.do_stages() == 1) {
        // Of two stages of queries the number is the step's parity.
        Ring { stage: 0u32.runtime(), parity: stage ^ first }
    } else {
        Ring { stage, parity }
    }
}

/// Adds what consumers have for dq, every other of `steps` steps, when it is the cube's turn, or in any order. `counters` and `dq` are
/// where the turns and the sums start.
#[cube]
pub(crate) fn add_up(
    sdq: &Shared<[Vector<f32, Const<4>>]>,
    all: &Barriers,
    counters: u64,
    dq: u64,
    tile: KeyTile,
    adder: u32,
    steps: u32,
    lines: u32,
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let full = address_at(&addresses(&all.dq_full, 2usize), adder, 2usize);
    let free = barrier_address(&all.dq_free[0]);
    let dq_at = shared_address::<Vector<f32, Const<4>>>(unsafe { sdq.as_slice().as_ptr_unchecked() });
    let bytes = comptime!(cfg.dq_elements() * size_of::<f32>());
    let mut parity = 0u32;
    let mut step = adder;
    while step < steps {
        // Under a plan the step's line is sure to be there once the consumers are done.
        if comptime!(cfg.listed) {
            barrier_wait(full, parity);
        }
        let due = due_at(step, tile, lines, n, cfg);
        let place = place_of(tile, due.head, due.m, n, cfg.bq);
        let counter = counter_at(counters, place, 0u32, cfg);
        let to = dq + place as u64 * comptime!(bytes as u64);
        if comptime!(!cfg.listed) {
            barrier_wait(full, parity);
        }
        parity ^= 1u32;
        let first = wait_for_place(counter, due.turn, cfg);
        write_or_add(to, dq_at, first, free, bytes);
        give_place(counter, first, cfg);
        step += 2;
    }
}

/// Adds the pieces of dq that a warpgroup has, every other of the head dimension, in every step, when it is the cube's turn, or in any
/// order.
#[cube]
pub(crate) fn add_pieces(
    sdq: &Shared<[Vector<f32, Const<4>>]>,
    all: &Barriers,
    counters: u64,
    dq: u64,
    tile: KeyTile,
    warpgroup: u32,
    steps: u32,
    lines: u32,
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let full = address_at(&addresses(&all.dq_full, 2usize), warpgroup, 2usize);
    let free = address_at(&addresses(&all.dq_free, 2usize), warpgroup, 2usize);
    let bytes = comptime!((cfg.bq * PIECE * size_of::<f32>()) as u32);
    let dq_at = shared_address::<Vector<f32, Const<4>>>(unsafe { sdq.as_slice().as_ptr_unchecked() });
    let from = dq_at + warpgroup * bytes;
    let [even, odd] = comptime!([cfg.wide_pieces(0) as u32, cfg.wide_pieces(1) as u32]);
    let pieces = select(warpgroup == 0, even, odd);
    let steps = select(pieces > 0, steps, 0u32);
    let mut parity = 0u32;
    let mut step = 0u32;
    while step < steps {
        // Under a plan the step's line is sure to be there once the consumers are done.
        if comptime!(cfg.listed) {
            barrier_wait(full, parity);
        }
        let due = due_at(step, tile, lines, n, cfg);
        let place = place_of(tile, due.head, due.m, n, cfg.bq);
        let counter = counter_at(counters, place, warpgroup, cfg);
        let to = dq + place as u64 * comptime!((cfg.dq_elements() * size_of::<f32>()) as u64);
        let first = wait_for_place(counter, due.turn, cfg);
        for x in 0..pieces {
            barrier_wait(full, parity);
            parity ^= 1u32;
            let piece = to + ((2 * x + warpgroup) * bytes) as u64;
            write_or_add(piece, from, first, free, comptime!(bytes as usize));
        }
        give_place(counter, first, cfg);
        step += 1;
    }
}

/// The counter of who has come by at a query tile, of one of the units that add to it.
#[cube]
fn counter_at(counters: u64, place: u32, adder: u32, #[comptime] cfg: HopperBackwardConfig) -> u64 {
    counters + (place as u64 * comptime!(cfg.counters() as u64) + adder as u64 + 1u64) * 4u64
}

/// Waits until the cube may add to a query tile, and tells whether it is the first, who writes.
#[cube]
fn wait_for_place(counter: u64, turn: u32, #[comptime] cfg: HopperBackwardConfig) -> bool {
    if comptime!(cfg.unordered) {
        come_by(counter)
    } else {
        turn_wait(counter, turn);
        turn == 0
    }
}

/// Writes what consumers have, or adds it, and tells them that its place in shared memory is `free` again.
#[cube]
fn write_or_add(to: u64, from: u32, first: bool, free: u32, #[comptime] bytes: usize) {
    if first {
        bulk_store(to, from, bytes);
    } else {
        bulk_add(to, from, bytes);
    }
    bulk_wait_read();
    barrier_arrive(free, true);
}

/// Lets those add who may wait for it.
#[cube]
fn give_place(counter: u64, first: bool, #[comptime] cfg: HopperBackwardConfig) {
    if comptime!(cfg.unordered) {
        if first {
            bulk_wait();
            turn_pass(counter, WRITTEN);
        }
    } else {
        bulk_wait();
        turn_pass(counter, 1u32);
    }
}

/// The query tile of a step, and the turn.
#[cube]
fn due_at(step: u32, tile: KeyTile, lines: u32, n: Numbers, #[comptime] cfg: HopperBackwardConfig) -> Due {
    if comptime!(cfg.listed) {
        told_due(lines, step, cfg)
    } else {
        let (g, m) = (step / tile.walk.steps, query_tile_at(tile, step % tile.walk.steps));
        if comptime!(cfg.unordered) {
            Due { head: tile.first_head + g, m, turn: 0u32.runtime() }
        } else {
            Due { head: tile.first_head + g, m, turn: turn_of(tile, m, n, comptime!(cfg.shape())) }
        }
    }
}
