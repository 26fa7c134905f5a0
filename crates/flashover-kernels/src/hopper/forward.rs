//! Forward on sm90: one thread copies tiles with the copy engine, two or three warpgroups multiply with `wgmma`.
//!
//! FlashAttention-3 (Shah et al., arXiv 2407.08608), Algorithm 2: inside a warpgroup the softmax of a tile runs while the
//! product with the values of the tile before is in flight; between warpgroups, named barriers let one multiply while
//! the other takes its exponentials. The grid is persistent, and all steps of a cube are one pipeline: the first scores
//! of a query tile are multiplied before the last values of the one before, whose output is stored under the second.

use cubecl::prelude::*;

use super::config::{Gate, HopperConfig, PIECE, ROWS, WARPGROUP};
use super::messages::{LINE, QueryTile, after, told_step, told_tile};
use super::place::{clear_rows, head_in, heads_in, place_in, query_at};
use super::produce::{Lines, gate_at, produce};
use super::ptx::{
    Accumulator, barrier_address, barrier_arrive, barrier_wait, descriptor, fence_barriers, issue_scores, issue_values,
    named_arrive, named_wait, registers_decrease, registers_increase, score_text, shared_address, uniform, value_text,
    wait_after_text, wait_products, wait_products_after, wait_text,
};
use super::ring::{Ring, advance, barrier_row, ring_start};
use super::rows::{
    RowEnd, RowState, drop_weights, hide, pack_text, pack_weights, rescale, row_end, rows_start, shape_scores,
    softmax_tile,
};
use super::store::{Factors, Place, store_row};
use crate::family::element::Numbers;
use crate::family::ptx::value_of;
use crate::family::walk::Step;
use crate::score::ScoreCode;

/// What a forward writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Written {
    pub with_lse: bool,
    /// Whether also what rounding takes from the output.
    pub with_rest: bool,
    /// Whether the value dimension is the one that products are made for, not less.
    pub whole: bool,
}

/// A persistent grid: of each round of as many works as there are cubes a cube takes one. `factor` takes scores to logarithms of base 2.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn forward_kernel<E: Float, NS: Size, NO: Size, NP: Size>(
    q: &TensorMap<E, Tiled>,
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    o: &mut [Vector<u32, Const<2>>],
    mut lse: ComptimeOption<&mut [f32]>,
    mut rest: ComptimeOption<Box<[Vector<u32, Const<2>>]>>,
    n: Numbers,
    works: u32,
    section: u32,
    factor: f32,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] written: Written,
    #[comptime] cfg: HopperConfig,
    #[define(E)] _dtype: ElemType,
    #[define(NS)] _ns: usize,
    #[define(NO)] _no: usize,
    #[define(NP)] _np: usize,
) {
    let [q_len, k_len, v_len] = comptime!(cfg.elements());
    let (buffers, stages, value_stages) = comptime!((cfg.query_buffers(), cfg.stages, cfg.value_stages()));
    let mut sq: Shared<[E]> = Shared::new_aligned_slice(q_len * buffers, 1024usize);
    let mut sk: Shared<[E]> = Shared::new_aligned_slice(k_len * stages, 1024usize);
    let mut sv: Shared<[E]> = Shared::new_aligned_slice(v_len * value_stages, 1024usize);
    let line_words: Shared<[u32]> = Shared::new_aligned_slice(comptime!(LINE * (buffers + stages)), 16usize);
    let barriers = barrier_row(comptime!(cfg.arrivals()));
    fence_barriers();
    if comptime!(cfg.boxed_rows() < cfg.rows()) {
        clear_rows(shared_address::<E>(unsafe { sq.as_slice().as_ptr_unchecked() }), cfg);
    }
    sync_cube();

    let (registers, spare) = comptime!(cfg.registers());
    if UNIT_POS < comptime!(WARPGROUP as u32) {
        registers_decrease(spare);
        if UNIT_POS == 0 {
            let lines = lines_at(&line_words, cfg);
            produce::<E>(
                q, k, v, bias, &mut sq, &mut sk, &mut sv, &barriers, lines, scratch, n, works, section, with_bias, cfg,
            );
        }
    } else {
        registers_increase(registers);
        // Which of the two ptxas finds registers for without spilling depends on how many a thread has.
        let number = UNIT_POS / comptime!(WARPGROUP as u32);
        let group = if comptime!(cfg.consumers == 2) { number } else { uniform(number) } - 1;
        let consumer = Consumer {
            barriers: barrier_address(&barriers[0]),
            lines: lines_at(&line_words, cfg),
            q: uniform(shared_address::<E>(unsafe { sq.as_slice().as_ptr_unchecked() })),
            k: uniform(shared_address::<E>(unsafe { sk.as_slice().as_ptr_unchecked() })),
            v: uniform(shared_address::<E>(unsafe { sv.as_slice().as_ptr_unchecked() })),
            group,
            leader: UNIT_POS.is_multiple_of(32u32),
            factor,
        };
        // The first warpgroup may begin.
        if group == comptime!(cfg.consumers as u32 - 1) {
            named_arrive(1u32, comptime!(2 * WARPGROUP as u32));
        }
        attend::<E, NS, NO, NP>(&consumer, bias, scratch, o, &mut lse, &mut rest, n, with_bias, function, written, cfg);
    }
}

/// The addresses of the lines.
#[cube]
fn lines_at(words: &Shared<[u32]>, #[comptime] cfg: HopperConfig) -> Lines {
    let tiles = shared_address::<u32>(unsafe { words.as_slice().as_ptr_unchecked() });
    Lines { tiles, steps: tiles + comptime!(4 * LINE as u32 * cfg.query_buffers() as u32) }
}

/// What a thread of a consumer knows from the start.
#[derive(CubeType)]
struct Consumer {
    /// Address of the first barrier.
    barriers: u32,
    lines: Lines,
    /// Where the buffers of queries, keys and values start.
    q: u32,
    k: u32,
    v: u32,
    group: u32,
    /// Whether the thread arrives for its warp.
    leader: bool,
    /// Takes scores to logarithms of base 2.
    factor: f32,
}

/// What is carried from one step of a cube to the next, beside the weights of the last and the output they belong to.
#[derive(CubeType)]
struct Carried {
    tile: QueryTile,
    rows: RowState,
    /// The tile before, whose output is stored once its last product is done.
    done: Done,
    /// What comes next, and what came before the step whose weights are known, of [`after`].
    next: u32,
    before: u32,
    /// The buffer of the queries, the stage of the keys of the next step, and that of the values of the last.
    queries: Ring,
    keys: Ring,
    values: Ring,
}

/// All steps of a cube.
#[cube]
fn attend<E: Float, NS: Size, NO: Size, NP: Size>(
    consumer: &Consumer,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    o: &mut [Vector<u32, Const<2>>],
    lse: &mut ComptimeOption<&mut [f32]>,
    rest: &mut ComptimeOption<Box<[Vector<u32, Const<2>>]>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] written: Written,
    #[comptime] cfg: HopperConfig,
) {
    let [ns, no, np] = comptime!(cfg.lanes());
    let scores_done = comptime!(wait_text(ns, cfg.bk, 0));
    let output_done = comptime!(wait_text(no, cfg.value_dim, 0));
    let to_output = comptime!(value_text(no, np, cfg.value_dim, cfg.bk, cfg.element.name()));
    barrier_wait(gate_at(consumer.barriers, 0u32, Gate::Queries, cfg), 0u32);
    let (first, exists) = told_tile(consumer.lines.tiles, 0u32);
    if exists {
        let mut keys = ring_start(0u32);
        barrier_wait(gate_at(consumer.barriers, 0u32, Gate::Keys, cfg), 0u32);
        let told = told_step(consumer.lines.steps, 0u32, first.i0, n, cfg);
        let flying = scores::<NS>(consumer, 0u32, 0u32, cfg);
        let mut s = wait_products::<NS>(flying, comptime!(scores_done.clone()).as_str());
        barrier_arrive(gate_at(consumer.barriers, 0u32, Gate::FreeKeys, cfg), consumer.leader);
        let mut rows = rows_start(n);
        let factor = consumer.factor;
        weigh::<E, NS>(&mut s, &mut rows, first, told.step, scratch, bias, n, factor, with_bias, function, true, cfg);
        let mut p = packed::<NS, NP>(s, cfg);
        let mut out = Accumulator::<NO>::new(0.0f32);
        advance(&mut keys, comptime!(cfg.stages as u32));
        let mut carried = Carried {
            tile: first,
            rows,
            done: Done { tile: first, m0: rows.m0, m1: rows.m1, l0: rows.l0, l1: rows.l1 },
            next: told.after,
            before: comptime!(after::NOTHING).runtime(),
            queries: ring_start(0u32),
            keys,
            values: ring_start(0u32),
        };
        while carried.next != comptime!(after::NOTHING) {
            next_step::<E, NS, NO, NP>(
                &mut s,
                &mut p,
                &mut out,
                &mut carried,
                consumer,
                bias,
                scratch,
                o,
                lse,
                rest,
                n,
                with_bias,
                function,
                written,
                cfg,
            );
        }
        make_room::<NO>(&mut out, &mut carried, consumer, scratch, o, lse, rest, n, written, cfg);
        let stage = value_of::<u32>(carried.values.stage);
        barrier_wait(gate_at(consumer.barriers, stage, Gate::Values, cfg), carried.values.parity);
        if comptime!(cfg.packs_late()) {
            p = packed::<NS, NP>(s, cfg);
        }
        let v = value_matrix(consumer, stage, cfg);
        let filling = issue_values::<NO, NP>(out, p, v, comptime!(to_output.clone()).as_str());
        out = wait_products::<NO>(filling, comptime!(output_done.clone()).as_str());
        let rows = carried.rows;
        let last = Done { tile: carried.tile, m0: rows.m0, m1: rows.m1, l0: rows.l0, l1: rows.l1 };
        finish::<NO>(out, last, consumer.factor, scratch, o, lse, rest, n, written, cfg);
    }
}

/// The scores of the next step are multiplied; under them the last step's output is made ready for its weights, which then
/// are multiplied with their values; under that the next weights are taken.
#[cube]
fn next_step<E: Float, NS: Size, NO: Size, NP: Size>(
    s: &mut Accumulator<NS>,
    p: &mut Vector<u32, NP>,
    out: &mut Accumulator<NO>,
    carried: &mut Carried,
    consumer: &Consumer,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    o: &mut [Vector<u32, Const<2>>],
    lse: &mut ComptimeOption<&mut [f32]>,
    rest: &mut ComptimeOption<Box<[Vector<u32, Const<2>>]>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] written: Written,
    #[comptime] cfg: HopperConfig,
) {
    let [ns, no, np] = comptime!(cfg.lanes());
    let (buffers, value_stages) = comptime!((cfg.query_buffers(), cfg.value_stages()));
    let both = comptime!(2 * WARPGROUP as u32);
    let scores_first = comptime!(wait_text(ns, cfg.bk, 1));
    let to_output = comptime!(value_text(no, np, cfg.value_dim, cfg.bk, cfg.element.name()));
    let output_done = comptime!(wait_after_text(no, cfg.value_dim, 0));
    let opens = carried.next == comptime!(after::NEXT_TILE);
    let (k_stage, v_stage) = (value_of::<u32>(carried.keys.stage), value_of::<u32>(carried.values.stage));
    if opens {
        barrier_arrive(gate_at(consumer.barriers, carried.queries.stage, Gate::FreeQueries, cfg), consumer.leader);
        advance(&mut carried.queries, comptime!(buffers as u32));
        barrier_wait(gate_at(consumer.barriers, carried.queries.stage, Gate::Queries, cfg), carried.queries.parity);
    }
    barrier_wait(gate_at(consumer.barriers, k_stage, Gate::Keys, cfg), carried.keys.parity);
    named_wait(1 + consumer.group, both);
    let flying = scores::<NS>(consumer, carried.queries.stage, k_stage, cfg);
    let following = select(consumer.group == comptime!(cfg.consumers as u32 - 1), 1u32, 2 + consumer.group);
    // While a whole output is stored the other warpgroup may multiply.
    let stores = carried.before == comptime!(after::NEXT_TILE);
    if stores {
        named_arrive(following, both);
    }
    make_room::<NO>(out, carried, consumer, scratch, o, lse, rest, n, written, cfg);
    barrier_wait(gate_at(consumer.barriers, v_stage, Gate::Values, cfg), carried.values.parity);
    if comptime!(cfg.packs_late()) {
        *p = packed::<NS, NP>(*s, cfg);
    }
    let v = value_matrix(consumer, v_stage, cfg);
    let filling = issue_values::<NO, NP>(*out, *p, v, comptime!(to_output.clone()).as_str());
    if !stores {
        named_arrive(following, both);
    }
    if opens {
        open_tile(carried, consumer, n);
    }
    let told = told_step(consumer.lines.steps, k_stage, carried.tile.i0, n, cfg);
    advance(&mut carried.keys, comptime!(cfg.stages as u32));
    *s = wait_products::<NS>(flying, comptime!(scores_first.clone()).as_str());
    barrier_arrive(gate_at(consumer.barriers, k_stage, Gate::FreeKeys, cfg), consumer.leader);
    // The whole softmax twice: a branch around the hiding alone makes the compiler copy scores.
    let (tile, factor) = (carried.tile, consumer.factor);
    if comptime!(cfg.plain) && told.step.full {
        weigh::<E, NS>(
            s,
            &mut carried.rows,
            tile,
            told.step,
            scratch,
            bias,
            n,
            factor,
            with_bias,
            function,
            false,
            cfg,
        );
    } else {
        weigh::<E, NS>(s, &mut carried.rows, tile, told.step, scratch, bias, n, factor, with_bias, function, true, cfg);
    }
    let (l0, l1) = (value_of::<f32>(carried.rows.l0), value_of::<f32>(carried.rows.l1));
    *out = wait_products_after::<NO>(filling, l0, l1, comptime!(output_done.clone()).as_str());
    barrier_arrive(gate_at(consumer.barriers, v_stage, Gate::FreeValues, cfg), consumer.leader);
    advance(&mut carried.values, comptime!(value_stages as u32));
    if comptime!(!cfg.packs_late()) {
        *p = packed::<NS, NP>(*s, cfg);
    }
    carried.before = value_of::<u32>(carried.next);
    carried.next = told.after;
}

/// The output for the weights of the last step: where they are the first of a tile, that of the tile before is stored.
#[cube]
fn make_room<NO: Size>(
    out: &mut Accumulator<NO>,
    carried: &mut Carried,
    consumer: &Consumer,
    scratch: &[u32],
    o: &mut [Vector<u32, Const<2>>],
    lse: &mut ComptimeOption<&mut [f32]>,
    rest: &mut ComptimeOption<Box<[Vector<u32, Const<2>>]>>,
    n: Numbers,
    #[comptime] written: Written,
    #[comptime] cfg: HopperConfig,
) {
    if carried.before == comptime!(after::NEXT_TILE) {
        finish::<NO>(*out, carried.done, consumer.factor, scratch, o, lse, rest, n, written, cfg);
        #[unroll]
        for e in 0..comptime!(cfg.value_dim / 2) {
            out.insert(e, 0.0f32);
        }
    } else {
        rescale::<NO>(out, carried.rows, cfg.value_dim);
    }
}

/// Goes on to the query tile that is told of beside its queries.
#[cube]
fn open_tile(carried: &mut Carried, consumer: &Consumer, n: Numbers) {
    carried.done.tile.batch = value_of::<u32>(carried.tile.batch);
    carried.done.tile.head = value_of::<u32>(carried.tile.head);
    carried.done.tile.i0 = value_of::<u32>(carried.tile.i0);
    carried.done.m0 = value_of::<f32>(carried.rows.m0);
    carried.done.m1 = value_of::<f32>(carried.rows.m1);
    carried.done.l0 = value_of::<f32>(carried.rows.l0);
    carried.done.l1 = value_of::<f32>(carried.rows.l1);
    let (opened, _) = told_tile(consumer.lines.tiles, carried.queries.stage);
    carried.tile.batch = opened.batch;
    carried.tile.head = opened.head;
    carried.tile.i0 = opened.i0;
    let fresh = rows_start(n);
    carried.rows.m0 = fresh.m0;
    carried.rows.m1 = fresh.m1;
    carried.rows.base0 = fresh.base0;
    carried.rows.base1 = fresh.base1;
    carried.rows.l0 = fresh.l0;
    carried.rows.l1 = fresh.l1;
}

/// Weights as the operand of their product with the values.
#[cube]
fn packed<NS: Size, NP: Size>(s: Accumulator<NS>, #[comptime] cfg: HopperConfig) -> Vector<u32, NP> {
    let [_, _, np] = comptime!(cfg.lanes());
    let text = comptime!(pack_text(np, cfg.bk, cfg.element.name()));
    pack_weights::<NS, NP>(s, comptime!(text.clone()).as_str())
}

/// A query tile that all weights are known of.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Done {
    tile: QueryTile,
    m0: f32,
    m1: f32,
    l0: f32,
    l1: f32,
}

/// Stores the output and the log-sum-exp of a query tile.
#[cube]
fn finish<NO: Size>(
    out: Accumulator<NO>,
    done: Done,
    factor: f32,
    scratch: &[u32],
    o: &mut [Vector<u32, Const<2>>],
    lse: &mut ComptimeOption<&mut [f32]>,
    rest: &mut ComptimeOption<Box<[Vector<u32, Const<2>>]>>,
    n: Numbers,
    #[comptime] written: Written,
    #[comptime] cfg: HopperConfig,
) {
    let place = place_in(done.tile, n, cfg);
    let (head0, head1) = (head_in(done.tile, 0u32, cfg), head_in(done.tile, 8u32, cfg));
    let end0 = row_end(done.m0, done.l0, head0, scratch, n, factor, cfg.plain);
    let end1 = row_end(done.m1, done.l1, head1, scratch, n, factor, cfg.plain);
    let factors = Factors { factor0: end0.norm, factor1: end1.norm, some0: end0.some, some1: end1.some };
    let first0 = (done.tile.batch * n.heads_q + head0) as usize * n.seq_q as usize;
    let first1 = if comptime!(cfg.packed == 1) {
        first0
    } else {
        (done.tile.batch * n.heads_q + head1) as usize * n.seq_q as usize
    };
    let (column, rows, width) = (place.column, n.seq_q, n.value_dim);
    let row0 = Place { row: place.i, column, first: first0, rows, width };
    store_row::<NO>(out, factors, row0, o, 0usize, false, cfg.element, cfg.value_dim, written.whole, false);
    let row1 = Place { row: query_at(place, 1usize), column, first: first1, rows, width };
    store_row::<NO>(out, factors, row1, o, 1usize, false, cfg.element, cfg.value_dim, written.whole, false);
    if written.with_rest {
        let to = rest.as_mut().unwrap();
        store_row::<NO>(out, factors, row0, to, 0usize, true, cfg.element, cfg.value_dim, written.whole, false);
        store_row::<NO>(out, factors, row1, to, 1usize, true, cfg.element, cfg.value_dim, written.whole, false);
    }
    if written.with_lse {
        if place.column == 0 {
            let (x0, x1) = (row_lse(end0, factor, n), row_lse(end1, factor, n));
            if row0.row < n.seq_q {
                lse.as_mut().unwrap()[first0 + row0.row as usize] = x0;
            }
            if row1.row < n.seq_q {
                let at1 =
                    if comptime!(place.packed) { first1 + row1.row as usize } else { first1 + place.i as usize + 8 };
                lse.as_mut().unwrap()[at1] = x1;
            }
        }
    }
}

/// Issues the scores of the queries in a buffer and the keys in a stage.
#[cube]
fn scores<NS: Size>(consumer: &Consumer, buffer: u32, stage: u32, #[comptime] cfg: HopperConfig) -> Accumulator<NS> {
    let [ns, _, _] = comptime!(cfg.lanes());
    let [q_len, k_len, _] = comptime!(cfg.elements());
    let (piece_q, piece_k) = comptime!((cfg.rows() * 2 * PIECE, cfg.bk * 2 * PIECE));
    let text = comptime!(score_text(ns, cfg.bk, cfg.head_dim, piece_q, piece_k, cfg.element.name()));
    let own = consumer.group * comptime!((ROWS * 2 * PIECE) as u32);
    let q = descriptor(consumer.q + own + buffer * comptime!(2 * q_len as u32), 16u32);
    let k = descriptor(consumer.k + stage * comptime!(2 * k_len as u32), 16u32);
    issue_scores::<NS>(q, k, comptime!(text.clone()).as_str())
}

/// The value tile in a stage as a matrix.
#[cube]
fn value_matrix(consumer: &Consumer, stage: u32, #[comptime] cfg: HopperConfig) -> u64 {
    let [_, _, v_len] = comptime!(cfg.elements());
    descriptor(consumer.v + stage * comptime!(2 * v_len as u32), comptime!((cfg.bk * 2 * PIECE) as u32))
}

/// The products of a tile become weights.
#[cube]
fn weigh<E: Float, N: Size>(
    s: &mut Accumulator<N>,
    rows: &mut RowState,
    tile: QueryTile,
    step: Step,
    scratch: &[u32],
    bias: ComptimeOption<&Tensor<E>>,
    n: Numbers,
    factor: f32,
    #[comptime] with_bias: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] masked: bool,
    #[comptime] cfg: HopperConfig,
) {
    let place = place_in(tile, n, cfg);
    if comptime!(!cfg.plain) {
        let at = heads_in::<E>(tile, scratch, bias, n, with_bias, cfg);
        shape_scores::<E, N>(s, place, step, at, scratch, bias, n, with_bias, function, cfg.bk);
    }
    if masked && !step.full {
        let at = heads_in::<E>(tile, scratch, bias, n, with_bias, cfg);
        hide::<N>(s, place, step, at, scratch, n, comptime!(!cfg.plain || cfg.listed), cfg.bk);
    }
    softmax_tile::<N>(s, rows, factor, cfg.plain, cfg.bk);
    if comptime!(!cfg.plain) {
        let at = heads_in::<E>(tile, scratch, bias, n, with_bias, cfg);
        drop_weights::<N>(s, place, step, at, n, cfg.bk);
    }
}

/// The log-sum-exp of a row, natural logarithm.
#[cube]
fn row_lse(end: RowEnd, factor: f32, n: Numbers) -> f32 {
    let unit = factor * comptime!(core::f32::consts::LN_2);
    select(u32::reinterpret(end.l) == 0u32, n.minus_infinity, end.m * unit + end.l.ln())
}
