//! What two units of a cube of the backward add to dq.

use cubecl::prelude::*;

use super::backward::{steps_of, told_tile};
use super::backward_config::HopperBackwardConfig;
use super::backward_gates::{Gate, gate_at, gate_of};
use super::backward_messages::{Due, step_lines, told_due, told_work};
use super::backward_works::{counter_at, done_at, kind};
use super::bulk::{WRITTEN, bulk_add, bulk_store, bulk_wait, bulk_wait_read, come_by, turn_pass, turn_wait};
use super::config::PIECE;
use super::ptx::{barrier_arrive, barrier_wait, shared_address};
use crate::family::element::Numbers;
use crate::family::ptx::value_of;
use crate::family::turns::{KeyTile, place_of, query_tile_at, turn_of};

/// A unit that adds to dq.
#[derive(CubeType)]
struct Adder {
    /// 0 or 1.
    number: u32,
    /// Parity of the phase that ends when consumers have something for it.
    parity: u32,
    /// Steps of the key tiles before.
    before: u32,
}

/// Adds what a cube has for dq, by one of two units. `counters` and `sums` are where the turns and the sums start.
#[cube]
pub(crate) fn add_works<E: Float>(
    sdq: &Shared<[Vector<f32, Const<4>>]>,
    gates: u32,
    told: u32,
    counters: u64,
    sums: u64,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    n: Numbers,
    number: u32,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let mut adder = Adder { number, parity: 0u32.runtime(), before: 0u32.runtime() };
    let mut parity = 0u32;
    let mut more = true.runtime();
    while more {
        barrier_wait(gate_of(gates, Gate::Told, cfg), parity);
        parity ^= 1u32;
        let work = told_work(told);
        barrier_arrive(gate_of(gates, Gate::FreeKeys, cfg), true);
        more = work.kind != comptime!(kind::NOTHING);
        if work.kind == comptime!(kind::KEYS) {
            let tile = told_tile::<E>(work, bias, scratch, n, with_bias, cfg);
            let steps = steps_of(work, tile, cfg);
            if comptime!(cfg.wide()) {
                add_pieces(sdq, gates, counters, sums, tile, &mut adder, steps, told, n, cfg);
            } else {
                add_up(sdq, gates, counters, sums, tile, &mut adder, steps, told, n, cfg);
            }
            bulk_wait();
            turn_pass(done_at(counters, work.number, n, cfg), 1u32);
        }
    }
}

/// Adds what consumers have for dq, every other of `steps` steps, when it is the cube's turn, or in any order.
#[cube]
fn add_up(
    sdq: &Shared<[Vector<f32, Const<4>>]>,
    gates: u32,
    counters: u64,
    sums: u64,
    tile: KeyTile,
    adder: &mut Adder,
    steps: u32,
    told: u32,
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let full = gate_at(gates, adder.number, Gate::Sums, cfg);
    let free = gate_at(gates, adder.number, Gate::FreeSums, cfg);
    let dq_at = shared_address::<Vector<f32, Const<4>>>(unsafe { sdq.as_slice().as_ptr_unchecked() });
    let bytes = comptime!(cfg.dq_elements() * size_of::<f32>());
    let from = dq_at + adder.number * comptime!(bytes as u32);
    let mut step = (adder.before + adder.number) % 2u32;
    while step < steps {
        // Under a plan the step's line is sure to be there once the consumers are done.
        if comptime!(cfg.listed) {
            barrier_wait(full, adder.parity);
        }
        let due = due_at(step, adder.before, tile, told, n, cfg);
        let place = place_of(tile, due.head, due.m, n, cfg.bq);
        let counter = counter_at(counters, place, 0u32, cfg);
        let to = sums + place as u64 * comptime!(bytes as u64);
        if comptime!(!cfg.listed) {
            barrier_wait(full, adder.parity);
        }
        adder.parity ^= 1u32;
        let first = wait_for_place(counter, due.turn, cfg);
        write_or_add(to, from, first, free, bytes);
        give_place(counter, first, cfg);
        step += 2;
    }
    adder.before += steps;
}

/// Adds the pieces of dq that a warpgroup has, every other of the head dimension, in every step, when it is the cube's turn, or in any
/// order.
#[cube]
fn add_pieces(
    sdq: &Shared<[Vector<f32, Const<4>>]>,
    gates: u32,
    counters: u64,
    sums: u64,
    tile: KeyTile,
    adder: &mut Adder,
    steps: u32,
    told: u32,
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let warpgroup = value_of::<u32>(adder.number);
    let full = gate_at(gates, warpgroup, Gate::Sums, cfg);
    let free = gate_at(gates, warpgroup, Gate::FreeSums, cfg);
    let bytes = comptime!((cfg.bq * PIECE * size_of::<f32>()) as u32);
    let dq_at = shared_address::<Vector<f32, Const<4>>>(unsafe { sdq.as_slice().as_ptr_unchecked() });
    let from = dq_at + warpgroup * bytes;
    let [even, odd] = comptime!([cfg.wide_pieces(0) as u32, cfg.wide_pieces(1) as u32]);
    let pieces = select(warpgroup == 0, even, odd);
    let steps = select(pieces > 0, steps, 0u32);
    let mut step = 0u32;
    while step < steps {
        // Under a plan the step's line is sure to be there once the consumers are done.
        if comptime!(cfg.listed) {
            barrier_wait(full, adder.parity);
        }
        let due = due_at(step, adder.before, tile, told, n, cfg);
        let place = place_of(tile, due.head, due.m, n, cfg.bq);
        let counter = counter_at(counters, place, warpgroup, cfg);
        let to = sums + place as u64 * comptime!((cfg.dq_elements() * size_of::<f32>()) as u64);
        let first = wait_for_place(counter, due.turn, cfg);
        for x in 0..pieces {
            barrier_wait(full, adder.parity);
            adder.parity ^= 1u32;
            let piece = to + ((2 * x + warpgroup) * bytes) as u64;
            write_or_add(piece, from, first, free, comptime!(bytes as usize));
        }
        give_place(counter, first, cfg);
        step += 1;
    }
    adder.before += steps;
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

/// The query tile of a step of the key tile, and the turn; `before` are the steps of key tiles before.
#[cube]
fn due_at(step: u32, before: u32, tile: KeyTile, told: u32, n: Numbers, #[comptime] cfg: HopperBackwardConfig) -> Due {
    if comptime!(cfg.listed) {
        told_due(step_lines(told), before + step, cfg)
    } else {
        let (g, m) = (step / tile.walk.steps, query_tile_at(tile, step % tile.walk.steps));
        if comptime!(cfg.unordered) {
            Due { head: tile.first_head + g, m, turn: 0u32.runtime() }
        } else {
            Due { head: tile.first_head + g, m, turn: turn_of(tile, m, n, comptime!(cfg.shape())) }
        }
    }
}
