//! Backward on sm90: dk and dv in one pass over the query tiles, and dq with them.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2, in the form of FlashAttention-3 (Shah et al., arXiv 2407.08608),
//! Appendix B: a cube owns a tile of keys, one unit copies tiles of queries, two warpgroups multiply, another unit adds what
//! they have for dq to f32 in global memory. Tiles lie transposed, rows are keys, so that `pᵀ` and `dsᵀ` go from the
//! sums of one product into the operands of the next in registers; `ds` also goes through shared memory for dq.
//!
//! ```text
//! sᵀ = k · qᵀ    pᵀ = exp(sᵀ − lse)    dpᵀ = v · doᵀ    dsᵀ = pᵀ ∘ (dpᵀ − delta)
//! dv += pᵀ · do    dk += dsᵀ · q    dqᵀ += kᵀ · dsᵀ
//! ```
//!
//! **dq has the same bits in every run.** The cubes of a head take turns at a query tile, the last key tile first: with
//! a window or causal order it starts at the last queries, so they come by in that order; without, they follow each other
//! at the distance of one addition. Tickets are given out in that order too, so that no cube waits for one that has not
//! started. The first to come writes, the others add: nothing is zeroed before.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::backward_config::HopperBackwardConfig;
use super::backward_scores::{
    KeyRows, differentiate, drop_elements, hide, hide_bits, shape_scores, weigh, weigh_shaped,
};
use super::bulk::{
    barrier_expect, bulk_add, bulk_load, bulk_store, bulk_wait, bulk_wait_read, fence_shared, store_transposed, ticket,
    turn_pass, turn_wait,
};
use super::config::{PIECE, ROWS, WARPGROUP};
use super::ptx::{
    Accumulator, barrier_address, barrier_arrive, barrier_wait, descriptor, fence_barriers, issue_named, issue_scores,
    named_read_text, named_text, named_value_text, named_wait, read_named, registers_decrease, registers_increase,
    run_block, score_text, shared_address, transposed_text, wait_products, wait_text,
};
use super::ring::{address_at, addresses, advance, barriers, ring_start};
use super::rows::{pack_text, pack_weights};
use super::store::{Place, same_factor, store_rows};
use crate::family::element::{Head, Numbers, head_of};
use crate::family::ptx::{global_address, value_of};
use crate::family::walk::{Walk, key_walk, query_band_step, query_walk};

/// One cube a key tile and key head. `statistics` holds for each query head and query tile `−lse` in logarithms of base 2 and
/// `delta`; `turns` the ticket counter and, for each query head and query tile, how many cubes have added to `dq`, which
/// is in the order of threads (see [`finish_kernel`](super::backward_rows::finish_kernel)).
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
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperBackwardConfig,
    #[define(E)] _dtype: ElemType,
    #[define(NS)] _ns: usize,
    #[define(NK)] _nk: usize,
    #[define(NV)] _nv: usize,
    #[define(NQ)] _nq: usize,
    #[define(NP)] _np: usize,
) {
    let stages = comptime!(cfg.stages());
    let [k_len, v_len, q_len, do_len] = comptime!(cfg.elements());
    let mut sk: Shared<[E]> = Shared::new_aligned_slice(k_len, 1024usize);
    let mut sv: Shared<[E]> = Shared::new_aligned_slice(v_len, 1024usize);
    let mut sq: Shared<[E]> = Shared::new_aligned_slice(q_len * stages, 1024usize);
    let mut sdo: Shared<[E]> = Shared::new_aligned_slice(do_len * stages, 1024usize);
    let sds: Shared<[E]> = Shared::new_aligned_slice(comptime!(2 * cfg.score_elements()), 1024usize);
    let mut sdq: Shared<[Vector<f32, Const<4>>]> =
        Shared::new_aligned_slice(comptime!(cfg.dq_elements() / 4), 1024usize);
    let rows: Shared<[Vector<f32, Const<2>>]> =
        Shared::new_aligned_slice(comptime!(cfg.stages() * cfg.statistics() * cfg.bq / 2), 1024usize);
    let mut own = Shared::<[u32]>::new_slice(1usize);
    let kv_full = barriers(1usize, 1u32);
    let q_full = barriers(stages, 1u32);
    let do_full = barriers(stages, 1u32);
    let dq_free = barriers(1usize, 1u32);
    let q_free = barriers(stages, 8u32);
    let do_free = barriers(stages, 8u32);
    let dq_full = barriers(2usize, 8u32);
    fence_barriers();
    let counters = global_address::<u32>(&*turns);
    if UNIT_POS == 0 {
        own[0] = ticket(counters);
    }
    sync_cube();

    let (head, tile) = key_tile(own[0], section, n);
    if head >= n.batch * n.heads_kv {
        terminate!();
    }
    let (b, kv) = (head / n.heads_kv, head % n.heads_kv);
    let group = n.heads_q / n.heads_kv;
    let first_head = kv * group;
    let j0 = tile * comptime!(HopperBackwardConfig::BK as u32);
    let at = head_of::<E>(b, first_head, scratch, bias, n, with_bias);
    let walk = query_walk(j0, at, scratch, n, comptime!(cfg.shape()));
    let query_tiles = n.seq_q.div_ceil(comptime!(cfg.bq as u32));
    let (registers, spare) = comptime!(cfg.registers());

    if UNIT_POS < comptime!(WARPGROUP as u32) {
        registers_decrease(spare);
        if UNIT_POS == 0 && walk.steps > 0 {
            let kv_barrier = &kv_full[0];
            kv_barrier.arrive_and_expect_tx(1u32, comptime!(2 * (k_len + v_len) as u32));
            copy_pieces::<E>(k, &mut sk, kv_barrier, 0usize, b, kv, j0, k_len, HopperBackwardConfig::BK);
            copy_pieces::<E>(v, &mut sv, kv_barrier, 0usize, b, kv, j0, v_len, HopperBackwardConfig::BK);
            let q_gate = addresses(&q_free, stages);
            let do_gate = addresses(&do_free, stages);
            let q_ready = addresses(&q_full, stages);
            let do_ready = addresses(&do_full, stages);
            let rows_at = shared_address::<Vector<f32, Const<2>>>(unsafe { rows.as_slice().as_ptr_unchecked() });
            let statistics_at = global_address::<f32>(statistics);
            let bytes = comptime!(cfg.statistics_bytes());
            let mut ring = ring_start(1u32);
            for g in 0..group {
                let h = first_head + g;
                for m in walk.first..walk.first + walk.steps {
                    let i0 = m * comptime!(cfg.bq as u32);
                    let place = (b * n.heads_q + h) * query_tiles + m;
                    barrier_wait(address_at(&q_gate, ring.stage, stages), ring.parity);
                    let barrier = address_at(&q_ready, ring.stage, stages);
                    barrier_expect(barrier, comptime!(2 * q_len + bytes));
                    bulk_load(
                        rows_at + ring.stage * comptime!(bytes as u32),
                        statistics_at + place as u64 * comptime!(bytes as u64),
                        barrier,
                        bytes,
                    );
                    #[unroll]
                    for s in 0..stages {
                        if ring.stage == comptime!(s as u32) {
                            copy_pieces::<E>(q, &mut sq, &q_full[s], s, b, h, i0, q_len, cfg.bq);
                        }
                    }
                    barrier_wait(address_at(&do_gate, ring.stage, stages), ring.parity);
                    barrier_expect(address_at(&do_ready, ring.stage, stages), comptime!(2 * do_len));
                    #[unroll]
                    for s in 0..stages {
                        if ring.stage == comptime!(s as u32) {
                            copy_pieces::<E>(d_o, &mut sdo, &do_full[s], s, b, h, i0, do_len, cfg.bq);
                        }
                    }
                    advance(&mut ring, comptime!(stages as u32));
                }
            }
        }
        // Two units take the steps in turns: one waits until what it added has arrived while the other adds.
        if UNIT_POS == 32 || UNIT_POS == 64 {
            let adder = UNIT_POS / 64;
            let full = address_at(&addresses(&dq_full, 2usize), adder, 2usize);
            let free = barrier_address(&dq_free[0]);
            let dq_at = shared_address::<Vector<f32, Const<4>>>(unsafe { sdq.as_slice().as_ptr_unchecked() });
            let to = global_address::<f32>(&*dq);
            let bytes = comptime!(cfg.dq_elements() * size_of::<f32>());
            let mut parity = 0u32;
            let mut step = adder;
            while step < group * walk.steps {
                let (g, m) = (step / walk.steps, walk.first + step % walk.steps);
                let place = (b * n.heads_q + first_head + g) * query_tiles + m;
                let turn = turn_of(tile, m, at, scratch, n, cfg);
                let counter = counters + (place as u64 + 1u64) * 4u64;
                let to = to + place as u64 * comptime!(bytes as u64);
                barrier_wait(full, parity);
                parity ^= 1u32;
                turn_wait(counter, turn);
                if turn == 0 {
                    bulk_store(to, dq_at, bytes);
                } else {
                    bulk_add(to, dq_at, bytes);
                }
                bulk_wait_read();
                barrier_arrive(free, true);
                bulk_wait();
                turn_pass(counter);
                step += 2;
            }
        }
    } else {
        registers_increase(registers);
        let warpgroup = UNIT_POS / comptime!(WARPGROUP as u32) - 1;
        let (warp, lane) = (UNIT_POS % comptime!(WARPGROUP as u32) / 32, UNIT_POS % 32);
        let leader = lane == 0;
        let (quarter, column) = (lane / 4, lane % 4 * 2);
        let k_at = shared_address::<E>(unsafe { sk.as_slice().as_ptr_unchecked() });
        let v_at = shared_address::<E>(unsafe { sv.as_slice().as_ptr_unchecked() });
        let q_at = shared_address::<E>(unsafe { sq.as_slice().as_ptr_unchecked() });
        let do_at = shared_address::<E>(unsafe { sdo.as_slice().as_ptr_unchecked() });
        let ds_at = shared_address::<E>(unsafe { sds.as_slice().as_ptr_unchecked() });
        let gates = Gates {
            q_full: addresses(&q_full, stages),
            do_full: addresses(&do_full, stages),
            q_free: addresses(&q_free, stages),
            do_free: addresses(&do_free, stages),
            dq_full: addresses(&dq_full, 2usize),
            dq_free: barrier_address(&dq_free[0]),
        };
        let own_rows = warpgroup * comptime!((ROWS * 2 * PIECE) as u32);
        let k_piece = comptime!(HopperBackwardConfig::BK * 2 * PIECE);
        let ds_piece = comptime!(cfg.bq * 2 * PIECE);
        // The warpgroup's part of dq: 64 columns of k, or half of the queries.
        let (k_part, ds_part) = comptime!(match cfg.head_dim {
            ..=PIECE => (0, cfg.dq_columns() * 2 * PIECE),
            _ => (k_piece, 0),
        });
        let places = Places {
            k: descriptor(k_at + own_rows, 16u32),
            v: descriptor(v_at + own_rows, 16u32),
            k_turned: descriptor(k_at + warpgroup * comptime!(k_part as u32), comptime!(k_piece as u32)),
            q: q_at,
            d_o: do_at,
            ds: ds_at + warpgroup * comptime!(ds_part as u32),
            // Row `lane % 8` of matrix `lane / 8`: matrices are 8 keys wide, two side by side and two below each other.
            ds_write: ds_at
                + warpgroup * comptime!(ds_piece as u32)
                + (lane / 16 * 8 + lane % 8) * 128
                + ((warp * 2 + lane / 8 % 2) ^ (lane % 8)) * 16,
        };
        let line =
            warpgroup * comptime!((cfg.dq_registers() / 4 * WARPGROUP) as u32) + UNIT_POS % comptime!(WARPGROUP as u32);
        let keys = KeyRows { j: j0 + warpgroup * comptime!(ROWS as u32) + warp * 16 + quarter, column };
        run_block(comptime!(named_text("dk", cfg.head_dim)).as_str());
        run_block(comptime!(named_text("dv", cfg.value_dim)).as_str());
        if walk.steps > 0 {
            let mut ring = ring_start(0u32);
            let mut dq_parity = 1u32;
            barrier_wait(barrier_address(&kv_full[0]), 0u32);
            barrier_wait(address_at(&gates.q_full, ring.stage, stages), ring.parity);
            let flying = scores::<NS>(places, ring.stage, cfg);
            let mut s = wait_products::<NS>(flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
            let mut left = group * walk.steps;
            let mut t = 0u32;
            let mut h = first_head;
            while left > 0 {
                let step = query_band_step(walk, t, j0, at, n, with_bias, comptime!(cfg.shape()));
                let (stage, parity) = (value_of::<u32>(ring.stage), value_of::<u32>(ring.parity));
                advance(&mut ring, comptime!(stages as u32));
                left -= 1;
                barrier_wait(address_at(&gates.do_full, stage, stages), parity);
                let dp_flying = gradients_of_weights::<NS>(places, stage, cfg);
                let row = stage as usize * comptime!(cfg.statistics() * cfg.bq / 2) + (column / 2) as usize;
                let mut slopes = Vector::<u32, NP>::new(0u32);
                if comptime!(cfg.plain) {
                    weigh::<NS>(&mut s, &rows, row, factor, cfg);
                    if !step.full {
                        hide::<NS>(&mut s, keys, step.i0, at, n, cfg);
                    }
                } else {
                    let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
                    slopes = shape_scores::<E, NS, NP>(&mut s, keys, step.i0, at, bias, n, with_bias, cfg);
                    weigh_shaped::<NS>(&mut s, &rows, row, cfg);
                    if !step.full {
                        hide::<NS>(&mut s, keys, step.i0, at, n, cfg);
                        if n.mask_at != 0 {
                            hide_bits::<NS>(&mut s, keys, step.i0, at, scratch, n, cfg);
                        }
                    }
                }
                let mut dp = wait_products::<NS>(dp_flying, comptime!(wait_text(cfg.lanes()[0], cfg.bq, 0)).as_str());
                if comptime!(!cfg.plain) {
                    drop_elements::<NS>(&mut dp, keys, &rows, row, n, cfg);
                }
                // While weights are still in f32: rounded ones would round ds twice.
                let ds = differentiate::<NS, NP>(dp, s, slopes, &rows, row, n, cfg);
                if comptime!(!cfg.plain) {
                    drop_elements::<NS>(&mut s, keys, &rows, row, n, cfg);
                }
                let packing = comptime!(pack_text(cfg.lanes()[4], cfg.bq, cfg.element.name()));
                let packed = pack_weights::<NS, NP>(s, comptime!(packing.clone()).as_str());
                let do_matrix =
                    descriptor(places.d_o + stage * comptime!(2 * do_len as u32), comptime!(ds_piece as u32));
                let to_v = comptime!(named_value_text("dv", cfg.lanes()[4], cfg.value_dim, cfg.bq, cfg.element.name()));
                issue_named::<NP>(packed, do_matrix, comptime!(to_v.clone()).as_str());
                t += 1;
                if t == walk.steps {
                    t = 0u32;
                    h += 1;
                }
                let buffer = stage % 2 * comptime!(2 * cfg.score_elements() as u32);
                #[unroll]
                for x in 0..comptime!(cfg.bq / 16) {
                    store_transposed(
                        places.ds_write + buffer,
                        comptime!(x * 16 * 128),
                        ds.extract(comptime!(4 * x)),
                        ds.extract(comptime!(4 * x + 1)),
                        ds.extract(comptime!(4 * x + 2)),
                        ds.extract(comptime!(4 * x + 3)),
                    );
                }
                fence_shared();
                named_wait(1u32, comptime!(2 * WARPGROUP as u32));
                let dq_flying = queries_part::<NQ>(places, buffer, cfg);
                let q_matrix = descriptor(places.q + stage * comptime!(2 * q_len as u32), comptime!(ds_piece as u32));
                let to_k = comptime!(named_value_text("dk", cfg.lanes()[4], cfg.head_dim, cfg.bq, cfg.element.name()));
                issue_named::<NP>(ds, q_matrix, comptime!(to_k.clone()).as_str());
                let dq_lanes = comptime!(cfg.lanes()[3]);
                let part = wait_products::<NQ>(dq_flying, comptime!(wait_text(dq_lanes, cfg.dq_columns(), 1)).as_str());
                barrier_arrive(address_at(&gates.do_free, stage, stages), leader);
                barrier_wait(gates.dq_free, dq_parity);
                dq_parity ^= 1u32;
                #[unroll]
                for x in 0..comptime!(cfg.dq_registers() / 4) {
                    let mut four = Vector::<f32, Const<4>>::new(0.0f32);
                    #[unroll]
                    for y in 0..4usize {
                        four.insert(y, part.extract(comptime!(4 * x + y)));
                    }
                    sdq[line as usize + comptime!(x * WARPGROUP)] = four;
                }
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
        let acc_k = read_named::<NK>(comptime!(named_read_text("dk", cfg.head_dim)).as_str());
        let acc_v = read_named::<NV>(comptime!(named_read_text("dv", cfg.value_dim)).as_str());
        let first_row = head as usize * n.seq_kv as usize;
        let place = Place { row: keys.j, column, first: first_row, rows: n.seq_kv, width: n.head_dim };
        store_rows::<NK>(acc_k, same_factor(n.scale), place, dk, false, cfg.element, cfg.head_dim, false);
        let place = Place { row: keys.j, column, first: first_row, rows: n.seq_kv, width: n.value_dim };
        store_rows::<NV>(acc_v, same_factor(1.0f32), place, dv, false, cfg.element, cfg.value_dim, false);
    }
}

/// Addresses of the barriers that consumers use.
#[derive(CubeType)]
struct Gates {
    q_full: Sequence<u32>,
    do_full: Sequence<u32>,
    q_free: Sequence<u32>,
    do_free: Sequence<u32>,
    dq_full: Sequence<u32>,
    dq_free: u32,
}

/// The warpgroup's keys and values as matrices, the part of the keys that it multiplies for dq, and where the rest starts.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Places {
    k: u64,
    v: u64,
    k_turned: u64,
    q: u32,
    d_o: u32,
    ds: u32,
    /// Where this lane's row of the first matrices of ds is written.
    ds_write: u32,
}

/// Issues `sᵀ = k · qᵀ` of the queries in a stage.
#[cube]
fn scores<N: Size>(places: Places, stage: u32, #[comptime] cfg: HopperBackwardConfig) -> Accumulator<N> {
    let [_, _, q_len, _] = comptime!(cfg.elements());
    let (piece_k, piece_q) = comptime!((HopperBackwardConfig::BK * 2 * PIECE, cfg.bq * 2 * PIECE));
    let text = comptime!(score_text(cfg.lanes()[0], cfg.bq, cfg.head_dim, piece_k, piece_q, cfg.element.name()));
    let q = descriptor(places.q + stage * comptime!(2 * q_len as u32), 16u32);
    issue_scores::<N>(places.k, q, comptime!(text.clone()).as_str())
}

/// Issues `dpᵀ = v · doᵀ` of the queries in a stage.
#[cube]
fn gradients_of_weights<N: Size>(places: Places, stage: u32, #[comptime] cfg: HopperBackwardConfig) -> Accumulator<N> {
    let [_, _, _, do_len] = comptime!(cfg.elements());
    let (piece_v, piece_do) = comptime!((HopperBackwardConfig::BK * 2 * PIECE, cfg.bq * 2 * PIECE));
    let text = comptime!(score_text(cfg.lanes()[0], cfg.bq, cfg.value_dim, piece_v, piece_do, cfg.element.name()));
    let d_o = descriptor(places.d_o + stage * comptime!(2 * do_len as u32), 16u32);
    issue_scores::<N>(places.v, d_o, comptime!(text.clone()).as_str())
}

/// Issues the warpgroup's part of `kᵀ · dsᵀ`.
#[cube]
fn queries_part<N: Size>(places: Places, buffer: u32, #[comptime] cfg: HopperBackwardConfig) -> Accumulator<N> {
    let piece = comptime!(cfg.bq * 2 * PIECE);
    let (lanes, columns) = comptime!((cfg.lanes()[3], cfg.dq_columns()));
    let text = comptime!(transposed_text(lanes, columns, HopperBackwardConfig::BK, piece, cfg.element.name()));
    let ds = descriptor(places.ds + buffer, 16u32);
    issue_scores::<N>(places.k_turned, ds, comptime!(text.clone()).as_str())
}

/// Head and key tile of a ticket: in sections of `section` heads, which are worked on side by side, the last tiles of all of
/// them first. Cubes of a head then start as far apart as they must follow each other.
#[cube]
fn key_tile(ticket: u32, section: u32, n: Numbers) -> (u32, u32) {
    let heads = n.batch * n.heads_kv;
    let tiles = n.seq_kv.div_ceil(comptime!(HopperBackwardConfig::BK as u32));
    let (first, rest) = (ticket / (section * tiles) * section, ticket % (section * tiles));
    let wide = max(min(section, heads - min(first, heads)), 1u32);
    (first + rest % wide, tiles - 1 - min(rest / wide, tiles - 1))
}

/// How many cubes add to query tile `m` before key tile `tile`: those whose keys come later, and the visible sinks last.
#[cube]
fn turn_of(tile: u32, m: u32, at: Head, scratch: &[u32], n: Numbers, #[comptime] cfg: HopperBackwardConfig) -> u32 {
    let walk: Walk = key_walk(m * comptime!(cfg.bq as u32), at, scratch, n, comptime!(cfg.query_shape()));
    let band_end = walk.first + walk.steps - walk.sink_tiles;
    select(tile < walk.sink_tiles, walk.steps, band_end) - 1 - tile
}

/// Starts copying rows from `row` on into part `slot` of shared memory, in pieces of 64 elements; zeros past the ends.
#[cube]
fn copy_pieces<E: Float>(
    from: &TensorMap<E, Tiled>,
    to: &mut Shared<[E]>,
    full: &Barrier,
    #[comptime] slot: usize,
    b: u32,
    h: u32,
    row: u32,
    #[comptime] len: usize,
    #[comptime] rows: usize,
) {
    #[unroll]
    for piece in 0..comptime!(len / (rows * PIECE)) {
        let first = comptime!(slot * len + piece * rows * PIECE);
        let place = &mut to[first..comptime!(first + rows * PIECE)];
        full.tma_load_4d(from, place, b as i32, h as i32, row as i32, comptime!((piece * PIECE) as i32));
    }
}
