//! The producer of a forward: one thread that walks all works of its cube, tells the consumers of each step and has the copy
//! engine bring its tiles, as far ahead as there is room.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::config::{Gate, HopperConfig};
use super::messages::{QueryTile, after, tell_nothing, tell_step, tell_tile};
use super::ptx::{barrier_address, barrier_arrive, barrier_wait};
use super::ring::{Ring, advance, barrier_at, copy_pieces, ring_start};
use crate::family::element::{Head, Numbers, head_of};
use crate::family::ptx::{global_address, ticket, value_of};
use crate::family::walk::{Step, Walk, band_step, key_step, key_walk, no_step, sectioned_work};

/// Address of the barrier of a buffer or stage, from that of the first of all.
#[cube]
pub(crate) fn gate_at(barriers: u32, stage: u32, #[comptime] gate: Gate, #[comptime] cfg: HopperConfig) -> u32 {
    barrier_at(barriers, stage, comptime!(cfg.first_barrier(gate)))
}

/// Where the lines of query tiles and of steps start in shared memory.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Lines {
    pub tiles: u32,
    pub steps: u32,
}

/// A step that was found and is not yet sent: what comes after it must be known first.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Held {
    exists: bool,
    /// Whether it is the first of its query tile.
    opens: bool,
    batch: u32,
    head: u32,
    /// Its head of keys and values.
    kv: u32,
    step: Step,
}

/// Where the values of a step lie whose keys were sent.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Values {
    exist: bool,
    batch: u32,
    head: u32,
    j0: u32,
}

/// The stages that are filled next.
#[derive(CubeType)]
struct Rings {
    q: Ring,
    k: Ring,
    v: Ring,
}

/// Copies the tiles of all works of a cube, each as soon as its place is free.
#[cube]
pub(crate) fn produce<E: Float>(
    q: &TensorMap<E, Tiled>,
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    bias: ComptimeOption<&Tensor<E>>,
    sq: &mut Shared<[E]>,
    sk: &mut Shared<[E]>,
    sv: &mut Shared<[E]>,
    barriers: &Shared<[Barrier]>,
    lines: Lines,
    scratch: &[u32],
    n: Numbers,
    works: u32,
    section: u32,
    #[comptime] with_bias: bool,
    #[comptime] cfg: HopperConfig,
) {
    let shape = comptime!(cfg.shape());
    let gates = barrier_address(&barriers[0]);
    let mut rings = Rings { q: ring_start(1u32), k: ring_start(1u32), v: ring_start(1u32) };
    let mut behind = Values { exist: false, batch: 0u32, head: 0u32, j0: 0u32 };
    let mut held = Held { exists: false, opens: false, batch: 0u32, head: 0u32, kv: 0u32, step: no_step(0u32) };
    let group = n.heads_q / n.heads_kv;
    // Heads that have tiles of their own, or share them.
    let packs = if comptime!(cfg.packed == 1) { n.heads_q } else { n.heads_q / comptime!(cfg.packed as u32) };
    let mut round = 0usize;
    let mut work = CUBE_POS;
    while (work as u32) < works {
        let own = sectioned_work(work, packs, section, scratch, n, shape);
        if own.exists {
            let (b, pack, i0) = (own.head / packs, own.head % packs, own.tile * comptime!(cfg.bq() as u32));
            let h = if comptime!(cfg.packed == 1) { pack } else { pack * comptime!(cfg.packed as u32) };
            let kv = h / group;
            let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
            let walk = key_walk(i0, at, scratch, n, shape);
            let mut cursor = Cursor { t: 0u32, step: no_step(i0) };
            seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
            if cursor.t >= walk.steps {
                // Queries that see nothing still have a step, of keys past the end: its output is that of no key. Where there
                // are none at all, the queries stand in for keys and values (`visible_part`).
                cursor.step.j0 = max(n.seq_q, n.seq_kv).div_ceil(comptime!(cfg.bk as u32)) * comptime!(cfg.bk as u32);
                cursor.step.full = false;
                cursor.step.bits = 0usize;
            }
            let mut opens = true.runtime();
            let mut more = true.runtime();
            while more {
                if held.exists {
                    let next = select(opens, comptime!(after::NEXT_TILE), comptime!(after::SAME_TILE));
                    send::<E>(q, k, v, sq, sk, sv, barriers, gates, &mut rings, &mut behind, lines, held, next, n, cfg);
                }
                held.exists = true;
                held.opens = opens;
                held.batch = b;
                held.head = h;
                held.kv = kv;
                held.step.i0 = i0;
                held.step.j0 = cursor.step.j0;
                held.step.full = cursor.step.full;
                held.step.bits = cursor.step.bits;
                held.step.row_words = cursor.step.row_words;
                opens = false.runtime();
                cursor.t += 1;
                seek(walk, &mut cursor, i0, at, scratch, n, with_bias, cfg);
                more = cursor.t < walk.steps;
            }
        }
        round += 1;
        work = next_work(round, scratch, cfg);
    }
    if held.exists {
        let next = comptime!(after::NOTHING).runtime();
        send::<E>(q, k, v, sq, sk, sv, barriers, gates, &mut rings, &mut behind, lines, held, next, n, cfg);
        send_values::<E>(v, sv, barriers, gates, &mut rings, behind.batch, behind.head, behind.j0, cfg);
    } else {
        tell_nothing(lines.tiles);
        barrier_arrive(barrier_address(&barriers[0]), true.runtime());
    }
}

/// Tells of a step and copies its keys, the queries of a new tile before them and the values of the step before after them:
/// a stage of values is free only once they are multiplied, a good while after the keys.
#[cube]
fn send<E: Float>(
    q: &TensorMap<E, Tiled>,
    k: &TensorMap<E, Tiled>,
    v: &TensorMap<E, Tiled>,
    sq: &mut Shared<[E]>,
    sk: &mut Shared<[E]>,
    sv: &mut Shared<[E]>,
    barriers: &Shared<[Barrier]>,
    gates: u32,
    rings: &mut Rings,
    behind: &mut Values,
    lines: Lines,
    held: Held,
    next: u32,
    n: Numbers,
    #[comptime] cfg: HopperConfig,
) {
    let [q_len, k_len, _] = comptime!(cfg.elements());
    let (stages, buffers) = comptime!((cfg.stages, cfg.query_buffers()));
    let (b, h, j0) = (value_of::<u32>(held.batch), value_of::<u32>(held.head), value_of::<u32>(held.step.j0));
    let kv = value_of::<u32>(held.kv);
    if held.opens {
        let slot = value_of::<u32>(rings.q.stage);
        barrier_wait(gate_at(gates, slot, Gate::FreeQueries, cfg), rings.q.parity);
        tell_tile(lines.tiles, slot, QueryTile { batch: b, head: h, i0: held.step.i0 });
        copy_tile::<E>(
            q,
            sq,
            barriers,
            cfg.first_barrier(Gate::Queries),
            slot,
            b,
            h,
            held.step.i0,
            buffers,
            q_len,
            cfg.rows(),
            cfg.boxed_rows(),
        );
        advance(&mut rings.q, comptime!(buffers as u32));
    }
    let stage = value_of::<u32>(rings.k.stage);
    barrier_wait(gate_at(gates, stage, Gate::FreeKeys, cfg), rings.k.parity);
    tell_step(lines.steps, stage, held.step, next, n, cfg);
    copy_tile::<E>(k, sk, barriers, cfg.first_barrier(Gate::Keys), stage, b, kv, j0, stages, k_len, cfg.bk, cfg.bk);
    advance(&mut rings.k, comptime!(stages as u32));
    if behind.exist {
        send_values::<E>(v, sv, barriers, gates, rings, behind.batch, behind.head, behind.j0, cfg);
    }
    behind.exist = true;
    behind.batch = b;
    behind.head = kv;
    behind.j0 = j0;
}

/// Copies the values of a step.
#[cube]
fn send_values<E: Float>(
    v: &TensorMap<E, Tiled>,
    sv: &mut Shared<[E]>,
    barriers: &Shared<[Barrier]>,
    gates: u32,
    rings: &mut Rings,
    b: u32,
    kv: u32,
    j0: u32,
    #[comptime] cfg: HopperConfig,
) {
    let [_, _, v_len] = comptime!(cfg.elements());
    let stage = value_of::<u32>(rings.v.stage);
    let stages = comptime!(cfg.value_stages());
    barrier_wait(gate_at(gates, stage, Gate::FreeValues, cfg), rings.v.parity);
    copy_tile::<E>(v, sv, barriers, cfg.first_barrier(Gate::Values), stage, b, kv, j0, stages, v_len, cfg.bk, cfg.bk);
    advance(&mut rings.v, comptime!(stages as u32));
}

/// A cube's next work. Without a plan that of a round: every other round in the opposite direction, so that none always gets the
/// longest. Under a plan, where lengths differ from row to row and by head, the next that nobody has; word 0 of the scratch buffer
/// counts those given out.
#[cube]
fn next_work(round: usize, scratch: &[u32], #[comptime] cfg: HopperConfig) -> usize {
    if comptime!(cfg.listed) { CUBE_COUNT + ticket(global_address::<u32>(scratch)) as usize } else { snake(round) }
}

/// The works of a round, in one direction or the other.
#[cube]
fn snake(round: usize) -> usize {
    let first = round * CUBE_COUNT;
    let end = first + CUBE_COUNT;
    select(round % 2 == 1, end - (CUBE_POS + 1), first + CUBE_POS)
}

/// Where the producer stands in a walk: at tile `t`, which `step` tells about.
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
        // Without a plan no tile of a walk is empty. Few queries would fill none of their tiles: those past the end, which are
        // not stored, need see nothing.
        let past_end = comptime!(cfg.packed > 1);
        let found = band_step(walk, cursor.t, i0, at, n, with_bias, past_end, comptime!(cfg.shape()));
        cursor.step.j0 = found.j0;
        cursor.step.full = found.full;
    }
}

/// Copies a tile of `rows` rows, of which `boxed` come, from `row` on into a stage, in pieces of 64 elements; zeros past the
/// ends.
#[cube]
fn copy_tile<E: Float>(
    from: &TensorMap<E, Tiled>,
    to: &mut Shared<[E]>,
    barriers: &Shared<[Barrier]>,
    #[comptime] first: usize,
    stage: u32,
    b: u32,
    h: u32,
    row: u32,
    #[comptime] stages: usize,
    #[comptime] len: usize,
    #[comptime] rows: usize,
    #[comptime] boxed: usize,
) {
    #[unroll]
    for s in 0..stages {
        if stage == comptime!(s as u32) {
            let barrier = &barriers[comptime!(first + s)];
            barrier.arrive_and_expect_tx(1u32, comptime!((2 * len / rows * boxed) as u32));
            copy_pieces::<E>(from, to, barrier, s, b, h, row, len, rows);
        }
    }
}
