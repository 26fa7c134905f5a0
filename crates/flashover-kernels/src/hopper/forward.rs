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
    named_wait, registers_decrease, registers_increase, score_text, shared_address, value_of, value_text, wait_products, wait_text,
};
use super::ring::{Ring, address_at, advance, barriers, ring_start};
use super::rows::{
    Place, RowState, drop_weights, hide, pack_weights, rescale, rows_finish, rows_start, shape_scores, softmax_tile, store_rows,
};
use crate::family::element::{Head, Numbers, head_of};
use crate::family::walk::{Side, Step, Walk, key_step, key_walk, no_step, work_of};

/// A persistent grid: cube `c` takes work `c`, `c + cubes`, …. `factor` takes scores to logarithms of base 2.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn forward_kernel<E: Float, NS: Size, NO: Size, NP: Size>(
    q: &TensorMap<E, Tiled>,
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    o: &mut [Vector<u32, Const<4>>],
    mut lse: ComptimeOption<&mut [f32]>,
    n: Numbers,
    works: u32,
    factor: f32,
    #[comptime] with_bias: bool,
    #[comptime] with_lse: bool,
    #[comptime] ty: String,
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
    let mut work = CUBE_POS;
    if UNIT_POS < comptime!(WARPGROUP as u32) {
        registers_decrease(spare);
        if UNIT_POS == 0 {
            let mut ring = ring_start(1u32);
            let mut q_parity = 1u32;
            while (work as u32) < works {
                let own = work_of(work, n.heads_q, n.seq_q, scratch, n, Side::Queries, shape);
                if own.exists {
                    let (b, h, i0) = (own.head / n.heads_q, own.head % n.heads_q, own.tile * bq);
                    let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
                    let kv = h / (n.heads_q / n.heads_kv);
                    let walk = key_walk(i0, at, scratch, n, shape);
                    let mut cursor = Cursor { t: 0u32, step: no_step(i0) };
                    seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                    if cursor.t < walk.steps {
                        barrier_wait(address_at(&q_free, 0u32, 1usize), q_parity);
                        q_parity ^= 1u32;
                        copy_tile::<E>(q, &mut sq, &q_full, 0u32, b, h, i0, 1usize, q_len, cfg.bq());
                    }
                    while cursor.t < walk.steps {
                        barrier_wait(address_at(&k_free, ring.stage, cfg.stages), ring.parity);
                        copy_tile::<E>(k, &mut sk, &k_full, ring.stage, b, kv, cursor.step.j0, cfg.stages, k_len, cfg.bk);
                        barrier_wait(address_at(&v_free, ring.stage, cfg.stages), ring.parity);
                        copy_tile::<E>(v, &mut sv, &v_full, ring.stage, b, kv, cursor.step.j0, cfg.stages, v_len, cfg.bk);
                        advance(&mut ring, comptime!(cfg.stages as u32));
                        cursor.t += 1;
                        seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                    }
                }
                work += CUBE_COUNT;
            }
        }
    } else {
        registers_increase(registers);
        let group = UNIT_POS / comptime!(WARPGROUP as u32) - 1;
        let leader = UNIT_POS % 32 == 0;
        let q_at = shared_address::<E>(unsafe { sq.as_slice().as_ptr_unchecked() });
        let k_at = shared_address::<E>(unsafe { sk.as_slice().as_ptr_unchecked() });
        let v_at = shared_address::<E>(unsafe { sv.as_slice().as_ptr_unchecked() });
        let q_matrix = descriptor(q_at + group * comptime!((ROWS * 2 * PIECE) as u32), 16u32);
        let [ns, no, np] = comptime!(cfg.lanes());
        let pair = comptime!(format!("{ty}x2"));
        let piece_bytes = comptime!(2 * PIECE);
        let to_scores = comptime!(score_text(ns, cfg.bk, cfg.head_dim, cfg.bq() * piece_bytes, cfg.bk * piece_bytes, &ty));
        let to_output = comptime!(value_text(no, np, cfg.value_dim, cfg.bk, &ty));
        let scores_done = comptime!(wait_text(ns, cfg.bk, 0));
        let scores_first = comptime!(wait_text(ns, cfg.bk, 1));
        let output_done = comptime!(wait_text(no, cfg.value_dim, 0));
        let both = comptime!(2 * WARPGROUP as u32);
        let turns = comptime!(cfg.consumers == 2);
        if turns {
            // The first warpgroup may begin.
            if group == 1 {
                named_arrive(1u32, both);
            }
        }
        let mut ring = ring_start(0u32);
        let mut q_parity = 0u32;
        while (work as u32) < works {
            let own = work_of(work, n.heads_q, n.seq_q, scratch, n, Side::Queries, shape);
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
                    barrier_wait(address_at(&q_full, 0u32, 1usize), q_parity);
                    q_parity ^= 1u32;
                    barrier_wait(address_at(&k_full, ring.stage, cfg.stages), ring.parity);
                    let k_matrix = descriptor(k_at + ring.stage * comptime!(2 * k_len as u32), 16u32);
                    let flying = issue_scores::<NS>(q_matrix, k_matrix, comptime!(to_scores.clone()).as_str());
                    let mut s = wait_products::<NS>(flying, comptime!(scores_done.clone()).as_str());
                    if leader {
                        barrier_arrive(address_at(&k_free, ring.stage, cfg.stages));
                    }
                    weigh::<E, NS>(&mut s, &mut rows, place, cursor.step, at, scratch, bias, n, factor, with_bias, cfg);
                    let mut p = pack_weights::<NS, NP>(s, comptime!(pair.clone()).as_str(), cfg.bk);
                    cursor.t += 1;
                    seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                    while cursor.t < walk.steps {
                        let before = Ring { stage: value_of::<u32>(ring.stage), parity: value_of::<u32>(ring.parity) };
                        advance(&mut ring, comptime!(cfg.stages as u32));
                        barrier_wait(address_at(&k_full, ring.stage, cfg.stages), ring.parity);
                        if turns {
                            named_wait(1 + group, both);
                        }
                        let k_matrix = descriptor(k_at + ring.stage * comptime!(2 * k_len as u32), 16u32);
                        let flying = issue_scores::<NS>(q_matrix, k_matrix, comptime!(to_scores.clone()).as_str());
                        barrier_wait(address_at(&v_full, before.stage, cfg.stages), before.parity);
                        let v_matrix = descriptor(v_at + before.stage * comptime!(2 * v_len as u32), comptime!((cfg.bk * piece_bytes) as u32));
                        let filling = issue_values::<NO, NP>(out, p, v_matrix, comptime!(to_output.clone()).as_str());
                        if turns {
                            named_arrive(2 - group, both);
                        }
                        s = wait_products::<NS>(flying, comptime!(scores_first.clone()).as_str());
                        if leader {
                            barrier_arrive(address_at(&k_free, ring.stage, cfg.stages));
                        }
                        weigh::<E, NS>(&mut s, &mut rows, place, cursor.step, at, scratch, bias, n, factor, with_bias, cfg);
                        out = wait_products::<NO>(filling, comptime!(output_done.clone()).as_str());
                        if leader {
                            barrier_arrive(address_at(&v_free, before.stage, cfg.stages));
                        }
                        rescale::<NO>(&mut out, rows, cfg.value_dim);
                        p = pack_weights::<NS, NP>(s, comptime!(pair.clone()).as_str(), cfg.bk);
                        cursor.t += 1;
                        seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                    }
                    if leader {
                        barrier_arrive(address_at(&q_free, 0u32, 1usize));
                    }
                    barrier_wait(address_at(&v_full, ring.stage, cfg.stages), ring.parity);
                    let v_matrix = descriptor(v_at + ring.stage * comptime!(2 * v_len as u32), comptime!((cfg.bk * piece_bytes) as u32));
                    let filling = issue_values::<NO, NP>(out, p, v_matrix, comptime!(to_output.clone()).as_str());
                    out = wait_products::<NO>(filling, comptime!(output_done.clone()).as_str());
                    if leader {
                        barrier_arrive(address_at(&v_free, ring.stage, cfg.stages));
                    }
                    advance(&mut ring, comptime!(cfg.stages as u32));
                }
                let (l0, l1) = rows_finish(rows);
                let first_row = own.head as usize * n.seq_q as usize;
                store_rows::<NO>(out, l0, l1, place, first_row, o, n, comptime!(pair.clone()).as_str(), cfg.value_dim);
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
            work += CUBE_COUNT;
        }
    }
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
    #[comptime] cfg: HopperConfig,
) {
    if comptime!(!cfg.plain) {
        shape_scores::<E, N>(s, place, step, at, bias, n, with_bias, cfg.bk);
    }
    if !step.full {
        hide::<N>(s, place, step, at, scratch, n, cfg.plain, cfg.bk);
    }
    softmax_tile::<N>(s, rows, factor, cfg.bk);
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
