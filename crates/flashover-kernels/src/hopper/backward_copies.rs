//! The unit of a cube of the backward that finds its works and copies what they need.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::backward::told_tile;
use super::backward_config::HopperBackwardConfig;
use super::backward_gates::{Gate, gate_at, gate_of};
use super::backward_messages::{Told, step_lines, tell_step, tell_work};
use super::backward_scores::Statistics;
use super::backward_works::{kind, work_of};
use super::bulk::{barrier_expect, bulk_load};
use super::ptx::{barrier_address, barrier_arrive, barrier_wait, shared_address};
use super::ring::{Ring, advance, copy_pieces, ring_start};
use crate::family::element::{Numbers, head_of};
use crate::family::listed::{Lists, listing, next_listed, ranked_tile};
use crate::family::ptx::{global_address, ticket, value_of};
use crate::family::turns::{Dealt, KeyTile, all_steps_listed, dealt, key_tile, listed_head, place_of, query_tile_at};
use crate::family::walk::{Step, no_step};

/// What the unit that copies knows from the start.
#[derive(CubeType)]
struct Copies {
    /// Where barriers start.
    gates: u32,
    /// Where statistics start, in shared and in global memory.
    rows: u32,
    statistics: u64,
    /// Where the line of a work stands in shared memory.
    told: u32,
}

/// Where the unit that copies stands among the works and steps of its cube.
#[derive(CubeType)]
struct Copied {
    /// The stage of the next step's queries.
    ring: Ring,
    /// Steps so far, of all key tiles; counted under a plan.
    number: u32,
    /// Parities of the phases that end when keys and values are free.
    k_parity: u32,
    v_parity: u32,
    /// Whether the others are still to be told of the key tile, and its keys and values to be copied.
    closed: bool,
}

/// Finds work after work, tells the others, and copies what they need for a key tile.
#[cube]
pub(crate) fn copy_works<E: Float>(
    q: &TensorMap<E, Tiled>,
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    d_o: &TensorMap<E, Tiled>,
    bias: ComptimeOption<&Tensor<E>>,
    statistics: &[f32],
    sk: &mut Shared<[E]>,
    sv: &mut Shared<[E]>,
    sq: &mut Shared<[E]>,
    sdo: &mut Shared<[E]>,
    rows: &Statistics,
    all: &Shared<[Barrier]>,
    told: u32,
    counters: u64,
    lists: Lists,
    scratch: &[u32],
    n: Numbers,
    section: u32,
    lag: u32,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let shape = comptime!(cfg.shape());
    let copies = Copies {
        gates: barrier_address(&all[0]),
        rows: shared_address::<Vector<f32, Const<2>>>(unsafe { rows.as_slice().as_ptr_unchecked() }),
        statistics: global_address::<f32>(statistics),
        told,
    };
    let mut at = Copied {
        ring: ring_start(1u32),
        number: 0u32.runtime(),
        k_parity: 1u32.runtime(),
        v_parity: 1u32.runtime(),
        closed: true.runtime(),
    };
    let mut next = Told {
        kind: 0u32.runtime(),
        number: 0u32.runtime(),
        tile: 0u32.runtime(),
        ascending: false.runtime(),
        steps: 0u32.runtime(),
    };
    let mut found = false.runtime();
    let mut more = true.runtime();
    while more {
        if !found {
            find_work::<E>(&mut next, counters, lists, bias, scratch, n, section, lag, with_bias, cfg);
        }
        found = false.runtime();
        let this = value_of_told(&next);
        more = this.kind != comptime!(kind::NOTHING);
        if this.kind == comptime!(kind::KEYS) {
            let tile = told_tile::<E>(this, bias, scratch, n, with_bias, cfg);
            at.closed = true.runtime();
            for g in 0..tile.group {
                let h = tile.first_head + g;
                let last_head = g + 1 == tile.group;
                if comptime!(cfg.listed) {
                    let head = listed_head::<E>(tile, h, scratch, n);
                    let mut walk = listing(counters, tile.j0, head, lists, scratch, n, shape);
                    let mut left = true.runtime();
                    while left {
                        let listed = next_listed(&mut walk, tile.j0, n);
                        left = !listed.step.empty;
                        if left {
                            if last_head && walk.left == 0 {
                                find_work::<E>(
                                    &mut next, counters, lists, bias, scratch, n, section, lag, with_bias, cfg,
                                );
                                found = true.runtime();
                            }
                            let (step, turn) = (listed.step, listed.turn);
                            let m = step.i0 / comptime!(cfg.bq as u32);
                            copy_step::<E>(
                                q, k, v, d_o, sk, sv, sq, sdo, all, &copies, &mut at, this, tile, h, m, step, turn, n,
                                cfg,
                            );
                        }
                    }
                } else {
                    for t in 0..tile.walk.steps {
                        if last_head && t + 1 == tile.walk.steps {
                            find_work::<E>(&mut next, counters, lists, bias, scratch, n, section, lag, with_bias, cfg);
                            found = true.runtime();
                        }
                        let m = query_tile_at(tile, t);
                        let step = no_step(m * comptime!(cfg.bq as u32));
                        copy_step::<E>(
                            q,
                            k,
                            v,
                            d_o,
                            sk,
                            sv,
                            sq,
                            sdo,
                            all,
                            &copies,
                            &mut at,
                            this,
                            tile,
                            h,
                            m,
                            step,
                            0u32.runtime(),
                            n,
                            cfg,
                        );
                    }
                }
            }
            if at.closed {
                copy_values::<E>(v, sv, all, &copies, &mut at, tile, cfg);
                open_tile::<E>(k, sk, all, &copies, &mut at, this, tile, cfg);
            }
        } else {
            tell_all(&copies, &mut at, this, cfg);
        }
    }
}

/// Draws a ticket and finds out what for. That takes as long as a step: the unit does so before it waits for a place for the last queries of a key
/// tile, when the consumers have two steps before them.
#[cube]
fn find_work<E: Float>(
    next: &mut Told,
    counters: u64,
    lists: Lists,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    n: Numbers,
    section: u32,
    lag: u32,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let shape = comptime!(cfg.shape());
    let work = work_of(ticket(counters), section, lag, n, shape);
    next.kind = work.kind;
    next.number = work.number;
    if work.kind == comptime!(kind::KEYS) {
        let mut dealt = dealt(work.number, section, n, shape, cfg.listed, cfg.unordered);
        if comptime!(cfg.listed && cfg.unordered) {
            let head = dealt.head % n.heads_kv * (n.heads_q / n.heads_kv);
            let at = head_of::<E>(dealt.head / n.heads_kv, head, scratch, ComptimeOption::new_None(), n, false);
            dealt.tile = ranked_tile(dealt.rank, at, counters, lists, scratch, n, shape);
        }
        next.number = dealt.head;
        next.tile = dealt.tile;
        next.ascending = dealt.ascending;
        if comptime!(cfg.listed) {
            let Dealt { head, tile, ascending, .. } = dealt;
            let tile = key_tile::<E>(head, tile, ascending, scratch, bias, n, with_bias, shape, true);
            next.steps = all_steps_listed::<E>(tile, counters, lists, scratch, n, shape);
        }
    }
}

/// What a variable holds now.
#[cube]
fn value_of_told(told: &Told) -> Told {
    Told {
        kind: value_of::<u32>(told.kind),
        number: value_of::<u32>(told.number),
        tile: value_of::<u32>(told.tile),
        ascending: value_of::<bool>(told.ascending),
        steps: value_of::<u32>(told.steps),
    }
}

/// Tells of a work, once all have taken leave of the one before.
#[cube]
fn tell_all(copies: &Copies, at: &mut Copied, this: Told, #[comptime] cfg: HopperBackwardConfig) {
    barrier_wait(gate_of(copies.gates, Gate::FreeKeys, cfg), at.k_parity);
    at.k_parity ^= 1u32;
    tell_work(copies.told, this);
    barrier_arrive(gate_of(copies.gates, Gate::Told, cfg), true);
}

/// Copies the values of a key tile, once the last products with those before are done.
#[cube]
fn copy_values<E: Float>(
    v: &TensorMap<E, Tiled>,
    sv: &mut Shared<[E]>,
    all: &Shared<[Barrier]>,
    copies: &Copies,
    at: &mut Copied,
    tile: KeyTile,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let [_, v_len, _, _] = comptime!(cfg.elements());
    barrier_wait(gate_of(copies.gates, Gate::FreeValues, cfg), at.v_parity);
    at.v_parity ^= 1u32;
    let barrier = &all[comptime!(cfg.first_barrier(Gate::Values))];
    barrier.arrive_and_expect_tx(1u32, comptime!(2 * v_len as u32));
    copy_pieces::<E>(v, sv, barrier, 0usize, tile.batch, tile.key_head, tile.j0, v_len, cfg.bk());
}

/// Tells of a key tile and copies its keys.
#[cube]
fn open_tile<E: Float>(
    k: &TensorMap<E, Tiled>,
    sk: &mut Shared<[E]>,
    all: &Shared<[Barrier]>,
    copies: &Copies,
    at: &mut Copied,
    this: Told,
    tile: KeyTile,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let [k_len, _, _, _] = comptime!(cfg.elements());
    tell_all(copies, at, this, cfg);
    let barrier = &all[comptime!(cfg.first_barrier(Gate::Keys))];
    barrier.arrive_and_expect_tx(1u32, comptime!(2 * k_len as u32));
    copy_pieces::<E>(k, sk, barrier, 0usize, tile.batch, tile.key_head, tile.j0, k_len, cfg.bk());
    at.closed = false.runtime();
}

/// Copies query tile `m` of a head with its statistics, and the gradients of its outputs, each as soon as its place is free; in the
/// first step of a key tile also its values and keys. Under a plan all are told of the `step`. Keys come last: those before are in use
/// until the end of their key tile.
#[cube]
fn copy_step<E: Float>(
    q: &TensorMap<E, Tiled>,
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    d_o: &TensorMap<E, Tiled>,
    sk: &mut Shared<[E]>,
    sv: &mut Shared<[E]>,
    sq: &mut Shared<[E]>,
    sdo: &mut Shared<[E]>,
    all: &Shared<[Barrier]>,
    copies: &Copies,
    at: &mut Copied,
    this: Told,
    tile: KeyTile,
    h: u32,
    m: u32,
    step: Step,
    turn: u32,
    n: Numbers,
    #[comptime] cfg: HopperBackwardConfig,
) {
    let (stages, do_stages) = comptime!((cfg.stages(), cfg.do_stages()));
    let [_, _, q_len, do_len] = comptime!(cfg.elements());
    let bytes = comptime!(cfg.statistics_bytes());
    let i0 = m * comptime!(cfg.bq as u32);
    let place = place_of(tile, h, m, n, cfg.bq);
    barrier_wait(gate_at(copies.gates, at.ring.stage, Gate::FreeQueries, cfg), at.ring.parity);
    if comptime!(cfg.listed) {
        // The line's last readers are done when the stage's are.
        tell_step(step_lines(copies.told), at.number, step, h, turn, n);
        at.number += 1;
    }
    let barrier = gate_at(copies.gates, at.ring.stage, Gate::Queries, cfg);
    barrier_expect(barrier, comptime!(2 * q_len + bytes));
    bulk_load(
        copies.rows + at.ring.stage * comptime!(bytes as u32),
        copies.statistics + place as u64 * comptime!(bytes as u64),
        barrier,
        bytes,
    );
    #[unroll]
    for s in 0..stages {
        if at.ring.stage == comptime!(s as u32) {
            copy_pieces::<E>(
                q,
                sq,
                &all[comptime!(cfg.first_barrier(Gate::Queries) + s)],
                s,
                tile.batch,
                h,
                i0,
                q_len,
                cfg.bq,
            );
        }
    }
    if at.closed {
        copy_values::<E>(v, sv, all, copies, at, tile, cfg);
    }
    let gradients = gradient_ring(at.ring.stage, at.ring.parity, 1u32, cfg);
    barrier_wait(gate_at(copies.gates, gradients.stage, Gate::FreeGradients, cfg), gradients.parity);
    barrier_expect(gate_at(copies.gates, gradients.stage, Gate::Gradients, cfg), comptime!(2 * do_len));
    #[unroll]
    for s in 0..do_stages {
        if gradients.stage == comptime!(s as u32) {
            copy_pieces::<E>(
                d_o,
                sdo,
                &all[comptime!(cfg.first_barrier(Gate::Gradients) + s)],
                s,
                tile.batch,
                h,
                i0,
                do_len,
                cfg.bq,
            );
        }
    }
    advance(&mut at.ring, comptime!(stages as u32));
    if at.closed {
        open_tile::<E>(k, sk, all, copies, at, this, tile, cfg);
    }
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
