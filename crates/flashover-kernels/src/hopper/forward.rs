//! Forward on sm90: one thread copies tiles with the copy engine, two or three warpgroups multiply with `wgmma`.
//!
//! FlashAttention-3 (Shah et al., arXiv 2407.08608), Algorithm 2: inside a warpgroup the softmax of a tile runs while the
//! product with the values of the tile before is in flight; between warpgroups, named barriers let one multiply while
//! the other takes its exponentials. The grid is persistent: a cube works on one query tile after another, and the copies
//! for the next one begin while the last one ends.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::config::{HopperConfig, PIECE, ROWS, WARPGROUP};
use super::ptx::{
    Accumulator, barrier_arrive, barrier_wait, descriptor, fence_barriers, issue_scores, issue_values, named_arrive,
    named_wait, registers_decrease, registers_increase, score_text, shared_address, value_text, wait_after_text,
    wait_products, wait_products_after, wait_text,
};
use super::ring::{Ring, address_at, addresses, advance, barriers, ring_start};
use super::rows::{
    Place, RowState, drop_weights, hide, norms, pack_weights, rescale, rows_finish, rows_start, shape_scores,
    softmax_tile,
};
use super::store::{Lines, store_lines};
use crate::family::element::{Head, Numbers, head_of};
use crate::family::ptx::value_of;
use crate::family::walk::{Step, Walk, band_step, key_step, key_walk, no_step, sectioned_work};

/// A persistent grid: cube `c` takes work `c`, `c + cubes`, …. `factor` takes scores to logarithms of base 2. `rest` receives what
/// rounding takes from `o`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn forward_kernel<E: Float, NS: Size, NO: Size, NP: Size>(
    q: &TensorMap<E, Tiled>,
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    o: &mut [Vector<u32, Const<4>>],
    mut lse: ComptimeOption<&mut [f32]>,
    mut rest: ComptimeOption<Box<[Vector<u32, Const<4>>]>>,
    n: Numbers,
    works: u32,
    section: u32,
    factor: f32,
    #[comptime] with_bias: bool,
    #[comptime] with_lse: bool,
    #[comptime] with_rest: bool,
    #[comptime] cfg: HopperConfig,
    #[define(E)] _dtype: ElemType,
    #[define(NS)] _ns: usize,
    #[define(NO)] _no: usize,
    #[define(NP)] _np: usize,
) {
    let [q_len, k_len, v_len] = comptime!(cfg.elements());
    let mut sq: Shared<[E]> = Shared::new_aligned_slice(q_len, 1024usize);
    let mut sk: Shared<[E]> = Shared::new_aligned_slice(k_len * cfg.stages, 1024usize);
    let mut sv: Shared<[E]> = Shared::new_aligned_slice(v_len * cfg.stages, 1024usize);
    let q_full = barriers(1usize, 1u32);
    let k_full = barriers(cfg.stages, 1u32);
    let v_full = barriers(cfg.stages, 1u32);
    let warps = comptime!(4 * cfg.consumers as u32);
    let q_free = barriers(1usize, warps);
    let k_free = barriers(cfg.stages, warps);
    let v_free = barriers(cfg.stages, warps);
    fence_barriers();
    sync_cube();

    let shape = comptime!(cfg.shape());
    let bq = comptime!(cfg.bq() as u32);
    let (registers, spare) = comptime!(cfg.registers());
    let mut round = 0usize;
    let mut work = CUBE_POS;
    if UNIT_POS < comptime!(WARPGROUP as u32) {
        registers_decrease(spare);
        if UNIT_POS == 0 {
            let q_gate = addresses(&q_free, 1usize);
            let k_gates = addresses(&k_free, cfg.stages);
            let v_gates = addresses(&v_free, cfg.stages);
            let mut ring = ring_start(1u32);
            let mut q_parity = 1u32;
            while (work as u32) < works {
                let own = sectioned_work(work, section, scratch, n, shape);
                if own.exists {
                    let (b, h, i0) = (own.head / n.heads_q, own.head % n.heads_q, own.tile * bq);
                    let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
                    let kv = h / (n.heads_q / n.heads_kv);
                    let walk = key_walk(i0, at, scratch, n, shape);
                    let mut cursor = Cursor { t: 0u32, step: no_step(i0) };
                    seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                    if cursor.t < walk.steps {
                        barrier_wait(address_at(&q_gate, 0u32, 1usize), q_parity);
                        q_parity ^= 1u32;
                        copy_tile::<E>(q, &mut sq, &q_full, 0u32, b, h, i0, 1usize, q_len, cfg.bq());
                    }
                    while cursor.t < walk.steps {
                        barrier_wait(address_at(&k_gates, ring.stage, cfg.stages), ring.parity);
                        copy_tile::<E>(
                            k,
                            &mut sk,
                            &k_full,
                            ring.stage,
                            b,
                            kv,
                            cursor.step.j0,
                            cfg.stages,
                            k_len,
                            cfg.bk,
                        );
                        barrier_wait(address_at(&v_gates, ring.stage, cfg.stages), ring.parity);
                        copy_tile::<E>(
                            v,
                            &mut sv,
                            &v_full,
                            ring.stage,
                            b,
                            kv,
                            cursor.step.j0,
                            cfg.stages,
                            v_len,
                            cfg.bk,
                        );
                        advance(&mut ring, comptime!(cfg.stages as u32));
                        cursor.t += 1;
                        seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                    }
                }
                round += 1;
                work = snake(round);
            }
        }
    } else {
        registers_increase(registers);
        let group = UNIT_POS / comptime!(WARPGROUP as u32) - 1;
        let lane = UNIT_POS % 32;
        let leader = lane == 0;
        let gates = Gates {
            q_full: addresses(&q_full, 1usize),
            k_full: addresses(&k_full, cfg.stages),
            v_full: addresses(&v_full, cfg.stages),
            q_free: addresses(&q_free, 1usize),
            k_free: addresses(&k_free, cfg.stages),
            v_free: addresses(&v_free, cfg.stages),
        };
        let q_at = shared_address::<E>(unsafe { sq.as_slice().as_ptr_unchecked() });
        let k_at = shared_address::<E>(unsafe { sk.as_slice().as_ptr_unchecked() });
        let v_at = shared_address::<E>(unsafe { sv.as_slice().as_ptr_unchecked() });
        let tiles =
            Tiles { q: descriptor(q_at + group * comptime!((ROWS * 2 * PIECE) as u32), 16u32), k: k_at, v: v_at };
        let [ns, no, np] = comptime!(cfg.lanes());
        let to_output = comptime!(value_text(no, np, cfg.value_dim, cfg.bk, cfg.element.name()));
        let scores_done = comptime!(wait_text(ns, cfg.bk, 0));
        let output_done = comptime!(wait_text(no, cfg.value_dim, 0));
        let both = comptime!(2 * WARPGROUP as u32);
        // The first warpgroup may begin.
        if group == comptime!(cfg.consumers as u32 - 1) {
            named_arrive(1u32, both);
        }
        let mut ring = ring_start(0u32);
        let mut q_parity = 0u32;
        while (work as u32) < works {
            let own = sectioned_work(work, section, scratch, n, shape);
            if own.exists {
                let (b, h, i0) = (own.head / n.heads_q, own.head % n.heads_q, own.tile * bq);
                let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
                let walk = key_walk(i0, at, scratch, n, shape);
                let place = Place {
                    i: i0 + UNIT_POS / 32 * 16 - comptime!(ROWS as u32) + UNIT_POS % 32 / 4,
                    column: UNIT_POS % 4 * 2,
                };
                let mut rows = rows_start(place, at, scratch, n);
                let mut out = Accumulator::<NO>::new(0.0f32);
                let mut cursor = Cursor { t: 0u32, step: no_step(i0) };
                seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                if cursor.t < walk.steps {
                    barrier_wait(address_at(&gates.q_full, 0u32, 1usize), q_parity);
                    q_parity ^= 1u32;
                    barrier_wait(address_at(&gates.k_full, ring.stage, cfg.stages), ring.parity);
                    let flying = scores::<NS>(tiles, ring.stage, cfg);
                    let mut s = wait_products::<NS>(flying, comptime!(scores_done.clone()).as_str());
                    barrier_arrive(address_at(&gates.k_free, ring.stage, cfg.stages), leader);
                    weigh::<E, NS>(
                        &mut s,
                        &mut rows,
                        place,
                        cursor.step,
                        at,
                        scratch,
                        bias,
                        n,
                        factor,
                        with_bias,
                        true,
                        cfg,
                    );
                    let mut p = pack_weights::<NS, NP>(s, cfg.element, cfg.bk);
                    cursor.t += 1;
                    seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                    while cursor.t < walk.steps {
                        // The whole step twice: a branch around the hiding alone would end the block in which the compiler
                        // lays the softmax over the product in flight.
                        if comptime!(cfg.plain) && cursor.step.full {
                            next_tile::<E, NS, NO, NP>(
                                &mut out,
                                &mut p,
                                &mut rows,
                                &mut ring,
                                cursor.step,
                                &gates,
                                tiles,
                                place,
                                at,
                                scratch,
                                bias,
                                n,
                                factor,
                                group,
                                leader,
                                with_bias,
                                false,
                                cfg,
                            );
                        } else {
                            next_tile::<E, NS, NO, NP>(
                                &mut out,
                                &mut p,
                                &mut rows,
                                &mut ring,
                                cursor.step,
                                &gates,
                                tiles,
                                place,
                                at,
                                scratch,
                                bias,
                                n,
                                factor,
                                group,
                                leader,
                                with_bias,
                                true,
                                cfg,
                            );
                        }
                        cursor.t += 1;
                        seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                    }
                    barrier_arrive(address_at(&gates.q_free, 0u32, 1usize), leader);
                    barrier_wait(address_at(&gates.v_full, ring.stage, cfg.stages), ring.parity);
                    let v_matrix = value_matrix(tiles, ring.stage, cfg);
                    let filling = issue_values::<NO, NP>(out, p, v_matrix, comptime!(to_output.clone()).as_str());
                    out = wait_products::<NO>(filling, comptime!(output_done.clone()).as_str());
                    barrier_arrive(address_at(&gates.v_free, ring.stage, cfg.stages), leader);
                    advance(&mut ring, comptime!(cfg.stages as u32));
                }
                let (l0, l1) = rows_finish(rows);
                let first_row = own.head as usize * n.seq_q as usize;
                let lines =
                    Lines { row: place.i, column: place.column, first: first_row, rows: n.seq_q, width: n.value_dim };
                store_lines::<NO>(out, norms(l0, l1), lines, o, false, cfg.element, cfg.value_dim);
                if with_rest {
                    let all = norms(l0, l1);
                    store_lines::<NO>(out, all, lines, rest.as_mut().unwrap(), true, cfg.element, cfg.value_dim);
                }
                if with_lse {
                    if place.column == 0 {
                        let (x0, x1) = (row_lse(rows.m0, l0, factor, n), row_lse(rows.m1, l1, factor, n));
                        if place.i < n.seq_q {
                            lse.as_mut().unwrap()[first_row + place.i as usize] = x0;
                        }
                        if place.i + 8 < n.seq_q {
                            lse.as_mut().unwrap()[first_row + place.i as usize + 8] = x1;
                        }
                    }
                }
            }
            round += 1;
            work = snake(round);
        }
    }
}

/// A cube's work of a round: every other round in the opposite direction, so that none always gets the longest.
#[cube]
fn snake(round: usize) -> usize {
    let first = round * CUBE_COUNT;
    let end = first + CUBE_COUNT;
    select(round % 2 == 1, end - (CUBE_POS + 1), first + CUBE_POS)
}

/// Addresses of the barriers.
#[derive(CubeType)]
struct Gates {
    q_full: Sequence<u32>,
    k_full: Sequence<u32>,
    v_full: Sequence<u32>,
    q_free: Sequence<u32>,
    k_free: Sequence<u32>,
    v_free: Sequence<u32>,
}

/// The warpgroup's queries as a matrix, and where the rings of keys and values start.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Tiles {
    q: u64,
    k: u32,
    v: u32,
}

/// Issues the scores of the key tile in a stage.
#[cube]
fn scores<NS: Size>(tiles: Tiles, stage: u32, #[comptime] cfg: HopperConfig) -> Accumulator<NS> {
    let [ns, _, _] = comptime!(cfg.lanes());
    let [_, k_len, _] = comptime!(cfg.elements());
    let (piece_q, piece_k) = comptime!((cfg.bq() * 2 * PIECE, cfg.bk * 2 * PIECE));
    let text = comptime!(score_text(ns, cfg.bk, cfg.head_dim, piece_q, piece_k, cfg.element.name()));
    let k = descriptor(tiles.k + stage * comptime!(2 * k_len as u32), 16u32);
    issue_scores::<NS>(tiles.q, k, comptime!(text.clone()).as_str())
}

/// The value tile in a stage as a matrix.
#[cube]
fn value_matrix(tiles: Tiles, stage: u32, #[comptime] cfg: HopperConfig) -> u64 {
    let [_, _, v_len] = comptime!(cfg.elements());
    descriptor(tiles.v + stage * comptime!(2 * v_len as u32), comptime!((cfg.bk * 2 * PIECE) as u32))
}

/// Scores of the next tile and, while they are weighed, the product of the last weights with their values.
#[cube]
fn next_tile<E: Float, NS: Size, NO: Size, NP: Size>(
    out: &mut Accumulator<NO>,
    p: &mut Vector<u32, NP>,
    rows: &mut RowState,
    ring: &mut Ring,
    step: Step,
    gates: &Gates,
    tiles: Tiles,
    place: Place,
    at: Head,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    factor: f32,
    group: u32,
    leader: bool,
    #[comptime] with_bias: bool,
    #[comptime] masked: bool,
    #[comptime] cfg: HopperConfig,
) {
    let [ns, no, np] = comptime!(cfg.lanes());
    let to_output = comptime!(value_text(no, np, cfg.value_dim, cfg.bk, cfg.element.name()));
    let scores_first = comptime!(wait_text(ns, cfg.bk, 1));
    let output_done = comptime!(wait_after_text(no, cfg.value_dim, 0));
    let both = comptime!(2 * WARPGROUP as u32);
    let (stage, parity) = (value_of::<u32>(ring.stage), value_of::<u32>(ring.parity));
    advance(ring, comptime!(cfg.stages as u32));
    barrier_wait(address_at(&gates.k_full, ring.stage, cfg.stages), ring.parity);
    barrier_wait(address_at(&gates.v_full, stage, cfg.stages), parity);
    named_wait(1 + group, both);
    let flying = scores::<NS>(tiles, ring.stage, cfg);
    let v_matrix = value_matrix(tiles, stage, cfg);
    let filling = issue_values::<NO, NP>(*out, *p, v_matrix, comptime!(to_output.clone()).as_str());
    named_arrive(select(group == comptime!(cfg.consumers as u32 - 1), 1u32, 2 + group), both);
    let mut s = wait_products::<NS>(flying, comptime!(scores_first.clone()).as_str());
    barrier_arrive(address_at(&gates.k_free, ring.stage, cfg.stages), leader);
    weigh::<E, NS>(&mut s, rows, place, step, at, scratch, bias, n, factor, with_bias, masked, cfg);
    let (l0, l1) = (value_of::<f32>(rows.l0), value_of::<f32>(rows.l1));
    *out = wait_products_after::<NO>(filling, l0, l1, comptime!(output_done.clone()).as_str());
    barrier_arrive(address_at(&gates.v_free, stage, cfg.stages), leader);
    rescale::<NO>(out, rows.grow0, rows.grow1, cfg.value_dim);
    *p = pack_weights::<NS, NP>(s, cfg.element, cfg.bk);
}

/// Where a warp stands in a walk: at tile `t`, which `step` tells about.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Cursor {
    t: u32,
    step: Step,
}

/// Finds the first tile from `t` on that is not empty.
#[cube]
fn seek(
    walk: Walk,
    cursor: &mut Cursor,
    i0: u32,
    at: Head,
    scratch: &[u32],
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperConfig,
) {
    if comptime!(cfg.listed) {
        let mut t = cursor.t;
        let mut empty = t < walk.steps;
        while empty {
            let found = key_step(walk, t, i0, at, scratch, n, with_bias, comptime!(cfg.shape()));
            cursor.step.j0 = found.j0;
            cursor.step.full = found.full;
            cursor.step.bits = found.bits;
            cursor.step.row_words = found.row_words;
            t += select(found.empty, 1u32, 0u32);
            empty = found.empty && t < walk.steps;
        }
        cursor.t = t;
    } else {
        // Without a plan no tile of a walk is empty.
        let found = band_step(walk, cursor.t, i0, at, n, with_bias, comptime!(cfg.shape()));
        cursor.step.j0 = found.j0;
        cursor.step.full = found.full;
    }
}

/// Copies a tile of rows from `row` on into a stage, in pieces of 64 elements; zeros past the ends.
#[cube]
fn copy_tile<E: Float>(
    from: &TensorMap<E, Tiled>,
    to: &mut Shared<[E]>,
    full: &Sequence<Shared<Barrier>>,
    stage: u32,
    b: u32,
    h: u32,
    row: u32,
    #[comptime] stages: usize,
    #[comptime] len: usize,
    #[comptime] rows: usize,
) {
    #[unroll]
    for s in 0..stages {
        if stage == comptime!(s as u32) {
            let barrier = &full[s];
            barrier.arrive_and_expect_tx(1u32, comptime!(2 * len as u32));
            #[unroll]
            for piece in 0..comptime!(len / (rows * PIECE)) {
                let first = comptime!(s * len + piece * rows * PIECE);
                let place = &mut to[first..comptime!(first + rows * PIECE)];
                barrier.tma_load_4d(from, place, b as i32, h as i32, row as i32, comptime!((piece * PIECE) as i32));
            }
        }
    }
}

/// The products of a tile become weights.
#[cube]
fn weigh<E: Float, N: Size>(
    s: &mut Accumulator<N>,
    rows: &mut RowState,
    place: Place,
    step: Step,
    at: Head,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    factor: f32,
    #[comptime] with_bias: bool,
    #[comptime] masked: bool,
    #[comptime] cfg: HopperConfig,
) {
    if comptime!(!cfg.plain) {
        shape_scores::<E, N>(s, place, step, at, bias, n, with_bias, cfg.bk);
    }
    if masked && !step.full {
        hide::<N>(s, place, step, at, scratch, n, comptime!(!cfg.plain || cfg.listed), cfg.bk);
    }
    softmax_tile::<N>(s, rows, factor, cfg.plain, cfg.bk);
    if comptime!(!cfg.plain) {
        drop_weights::<N>(s, place, step, at, n, cfg.bk);
    }
}

/// The log-sum-exp of a row, natural logarithm.
#[cube]
fn row_lse(m: f32, l: f32, factor: f32, n: Numbers) -> f32 {
    let unit = factor * comptime!(core::f32::consts::LN_2);
    select(u32::reinterpret(l) == 0u32, n.minus_infinity, m * unit + l.ln())
}
