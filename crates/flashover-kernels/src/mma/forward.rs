//! Forward: `o = softmax(f(q·kᵀ · scale)) · v` and `lse`, in one pass over the keys.
//!
//! FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 1, on the tensor cores. A cube owns a tile of queries of one head, a
//! warp some blocks of 16 of its rows: their running maximum, sum and output stay in the warp's registers, and the
//! probabilities go from the sums of the first product into the operands of the second without leaving them. Keys and values
//! of the next tile are copied to shared memory while this one is worked on: one barrier a tile.
//!
//! In a Partial tile what is hidden gets the weight 0, and 0 times a NaN or an infinity among the values of a hidden key is NaN: such
//! values reach every query of that tile.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, MmaTile, ROWS, STAGES, WARP};
use super::products::{accumulate, product};
use super::ptx::{Fragment, Sums, any_lane, commit_copies, row_maximum, row_sum, shared_address, wait_copies};
use super::scores::{all_scores, hide, place, row_index};
use super::steps::{follow, no_step, step_at, visible_from};
use super::store::store_rows;
use super::tile::{PIECE, Rows, column_place, depth_place, head_rows, load_rows, pitch, row_place};
use crate::family::element::{Numbers, head_of, is_minus_infinity, row_hash, where_kept};
use crate::family::ptx::{exp2, value_of};
use crate::family::walk::{Side, key_walk, work_of};

/// `log₂ e`: exponentials are taken to the base 2.
pub(crate) const LOG2_E: f32 = core::f32::consts::LOG2_E;

/// One cube a query tile and head, the longest tiles first.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn forward_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    bias: ComptimeOption<&Tensor<E>>,
    scratch: &[u32],
    o: &mut [E],
    mut lse: ComptimeOption<&mut [f32]>,
    mut rest: ComptimeOption<Box<[E]>>,
    n: Numbers,
    #[comptime] with_bias: bool,
    #[comptime] with_lse: bool,
    #[comptime] with_rest: bool,
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    let tile = comptime!(c.tile);
    let blocks = comptime!(tile.blocks);
    // What of a tile is in registers at a time.
    let part = comptime!(Compiled { tile: MmaTile { cols: tile.part, ..tile }, ..c });
    let (col_blocks, value_blocks) = comptime!((tile.part / COLS, c.value_dim / COLS));
    let work = work_of(CUBE_POS, n.heads_q, n.seq_q, scratch, n, Side::Queries, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, i0) = (work.head, work.tile * comptime!(tile.rows() as u32));
    let (b, h) = (head / n.heads_q, head % n.heads_q);
    let at = head_of::<E>(b, h, scratch, bias, n, with_bias);
    let kv = h / (n.heads_q / n.heads_kv);
    let q_rows = head_rows::<E>(q, b, h, n.seq_q, n.head_dim);
    let k_rows = head_rows::<E>(k, b, kv, n.seq_kv, n.head_dim);
    let v_rows = head_rows::<E>(v, b, kv, n.seq_kv, n.value_dim);

    // Queries (later the output), then the stages: keys and values.
    let (k_bytes, v_bytes) =
        comptime!((tile.cols * pitch(c.head_dim, c.element), tile.cols * pitch(c.value_dim, c.element)));
    let q_bytes = comptime!(tile.rows() * pitch(c.head_dim.max(c.value_dim), c.element));
    let memory = Shared::<[Fragment]>::new_aligned_slice(
        comptime!((q_bytes + STAGES * (k_bytes + v_bytes)) / PIECE),
        comptime!(PIECE),
    );
    let q_at = shared_address(&memory);
    let stage_at = q_at + comptime!(q_bytes as u32);
    let warp_row = UNIT_POS / comptime!(WARP as u32) * comptime!((blocks * ROWS) as u32);
    let lane = UNIT_POS % comptime!(WARP as u32);
    // This lane's first row and column of every block of sums.
    let quarter = lane % 4;
    let (row, column) = (i0 + warp_row + lane / 4, quarter * 2);
    let q_place = row_place(q_at + warp_row * comptime!(pitch(c.head_dim, c.element) as u32), c.head_dim, c.element);
    let k_place = column_place(stage_at, c.head_dim, c.element);
    let v_place = depth_place(stage_at + comptime!(k_bytes as u32), c.value_dim, c.element);

    let mut acc = Array::<Sums>::new(comptime!(blocks * value_blocks)); // o [16 · blocks, Dv]
    #[unroll]
    for x in 0..comptime!(blocks * value_blocks) {
        acc[x] = Sums::new(0.0f32);
    }
    let mut m = Array::<f32>::new(comptime!(2 * blocks)); // rows 16·block + 8·half + lane / 4
    let mut l = Array::<f32>::new(comptime!(2 * blocks)); // this lane's columns only, until the end
    let mut hash = Array::<u32>::new(comptime!(2 * blocks));
    #[unroll]
    for x in 0..comptime!(2 * blocks) {
        m[x] = n.minus_infinity;
        l[x] = 0.0f32;
        hash[x] = 0u32;
        if comptime!(c.options) {
            hash[x] = row_hash(head, row + comptime!(8 * x as u32), n);
        }
    }
    // Exponent of a score less the maximum. With options, scores are in natural units.
    let mut unit = LOG2_E.runtime();
    if comptime!(!c.options) {
        unit *= n.scale;
    }

    let walk = key_walk(i0, at, scratch, n, tile.shape());
    let mut t = visible_from(walk, 0u32, i0, at, scratch, n, with_bias, Side::Queries, c);
    load_rows::<E>(q, q_rows, i0, q_at, tile.rows(), c.head_dim, c.q_pieces, tile.units(), c.element);
    let mut stage = 0u32; // bytes from the first
    let mut next = no_step();
    if t < walk.steps {
        follow(&mut next, step_at(walk, t, i0, at, scratch, n, with_bias, Side::Queries, c));
        load_keys::<E>(k, v, k_rows, v_rows, next.j0, stage_at, c);
    }
    commit_copies();
    while t < walk.steps {
        wait_copies(0usize);
        // Everyone's copies have arrived, and everyone is done with the other stage.
        sync_cube();
        let mut step = no_step();
        follow(&mut step, next);
        let other = comptime!((k_bytes + v_bytes) as u32) - stage;
        #[unroll]
        for number in 0..comptime!(tile.cols / tile.part) {
            let mut s = Array::<Sums>::new(comptime!(blocks * col_blocks));
            let down = comptime!((number * tile.part * pitch(c.head_dim, c.element)) as u32);
            product(&mut s, q_place, k_place + stage + down, c.head_dim, part.tile, c.element); // s = q · kᵀ

            if comptime!(number == 0) {
                // What is next is found out, and asked for, while the products are under way.
                t = visible_from(walk, t + 1, i0, at, scratch, n, with_bias, Side::Queries, c);
                if t < walk.steps {
                    follow(&mut next, step_at(walk, t, i0, at, scratch, n, with_bias, Side::Queries, c));
                    load_keys::<E>(k, v, k_rows, v_rows, next.j0, stage_at + other, c);
                }
                commit_copies();
            }

            let column = step.j0 + column + comptime!((number * tile.part) as u32);
            if comptime!(c.options) {
                all_scores::<E>(&mut s, row, column, at, scratch, bias, n, with_bias, Side::Queries, part);
            }
            if !step.full {
                let mut none = Array::<Sums>::new(1usize);
                hide(&mut s, &mut none, row, column, step, at, scratch, n, false, Side::Queries, part);
            }
            follow_maxima(&s, &mut m, &mut l, &mut acc, unit, part);
            // p = exp(s − m)
            #[unroll]
            for x in 0..comptime!(blocks * col_blocks) {
                weights(&mut s, &m, &mut l, &hash, unit, column, x, n, part);
            }
            let down = comptime!((number * tile.part * pitch(c.value_dim, c.element)) as u32);
            accumulate(&mut acc, &s, v_place + stage + down, c.value_dim, part); // o += p · v
        }
        stage = other;
    }
    // The output takes the queries' place: no copy is under way, and nobody reads.
    wait_copies(0usize);
    sync_cube();

    let mut norm = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for x in 0..comptime!(2 * blocks) {
        // In natural units from here on.
        let mut top = m[x];
        if comptime!(!c.options) {
            top = m[x] * n.scale;
        }
        let (factor, row_lse) = finish_row(row_sum(l[x]), top, h, scratch, n);
        norm[x] = factor;
        if comptime!(c.options) {
            norm[x] *= n.factor; // by which dropout grows what it keeps
        }
        let i = row + comptime!(8 * x as u32);
        if with_lse {
            if quarter == 0 && i < n.seq_q {
                let to = head as usize * n.seq_q as usize + i as usize;
                lse.as_mut().unwrap()[to] = row_lse;
            }
        }
    }
    let first = head as usize * n.seq_q as usize;
    store_rows::<E>(&acc, &norm, o, first, i0, n.seq_q, q_at, n.value_dim, c.value_dim, false, tile, c.element);
    if with_rest {
        let rest = rest.as_mut().unwrap();
        sync_plane();
        store_rows::<E>(&acc, &norm, rest, first, i0, n.seq_q, q_at, n.value_dim, c.value_dim, true, tile, c.element);
    }
}

/// What a row's output is multiplied by, and its log-sum-exp. `sum` is that of its probabilities, `top` what their scores were
/// taken from: −∞ where it saw nothing.
#[cube]
pub(crate) fn finish_row(sum: f32, top: f32, head: u32, scratch: &[u32], n: Numbers) -> (f32, f32) {
    let mut sum = value_of::<f32>(sum);
    let mut top = value_of::<f32>(top);
    let mut shrink = 1.0f32;
    if n.sinks_at != 0 {
        // A learned sink is one more score that has no value.
        let sink = f32::reinterpret(scratch[n.sinks_at + head as usize]);
        let higher = max(top, sink);
        if !is_minus_infinity(higher) {
            shrink = exp2((top - higher) * LOG2_E);
            sum = sum * shrink + exp2((sink - higher) * LOG2_E);
            top = higher;
        }
    }
    // A row that saw nothing has a sum of 0.
    let seen = u32::reinterpret(sum) != 0u32;
    (select(seen, shrink / sum, 0.0f32), select(seen, top + sum.ln(), n.minus_infinity))
}

/// Scores are taken from a maximum that may lag behind by a factor of the probabilities of 2 to this.
pub(crate) const LAG: f32 = 8.0;

/// Takes the scores' maxima, and where any has outgrown the old one by too much, moves there, and shrinks what was summed.
#[cube]
fn follow_maxima(
    s: &Array<Sums>,
    m: &mut Array<f32>,
    l: &mut Array<f32>,
    acc: &mut Array<Sums>,
    unit: f32,
    #[comptime] c: Compiled,
) {
    let rows = comptime!(2 * c.tile.blocks);
    let mut top = Array::<f32>::new(rows);
    let mut grows = false.runtime();
    #[unroll]
    for x in 0..rows {
        top[x] = top_of(s, m[x], x, c);
        grows = grows || (top[x] - m[x]) * unit > LAG;
    }
    if any_lane(grows) {
        #[unroll]
        for x in 0..rows {
            let shrink = exp2((m[x] - finite(top[x])) * unit);
            m[x] = top[x];
            l[x] *= shrink;
            shrink_row(acc, shrink, x, c);
        }
    }
}

/// The maximum of a row's scores and what it was before.
#[cube]
fn top_of(s: &Array<Sums>, before: f32, #[comptime] x: usize, #[comptime] c: Compiled) -> f32 {
    let col_blocks = comptime!(c.tile.cols / COLS);
    let mut top = before;
    #[unroll]
    for col in 0..col_blocks {
        let y = s[comptime!(x / 2 * col_blocks + col)];
        top = max(top, max(y.extract(comptime!(x % 2 * 2)), y.extract(comptime!(x % 2 * 2 + 1))));
    }
    row_maximum(top)
}

/// What scores are taken from: the maximum, and for a row that has seen nothing yet any finite number.
#[cube]
fn finite(top: f32) -> f32 {
    select(is_minus_infinity(top), 0.0f32, top)
}

/// Multiplies a row of the output.
#[cube]
pub(crate) fn shrink_row(acc: &mut Array<Sums>, shrink: f32, #[comptime] x: usize, #[comptime] c: Compiled) {
    let value_blocks = comptime!(c.value_dim / COLS);
    #[unroll]
    for col in 0..value_blocks {
        let mut y = acc[comptime!(x / 2 * value_blocks + col)];
        #[unroll]
        for z in comptime!(x % 2 * 2)..comptime!(x % 2 * 2 + 2) {
            y.insert(z, y.extract(z) * shrink);
        }
        acc[comptime!(x / 2 * value_blocks + col)] = y;
    }
}

/// Turns a block of scores into probabilities, dropped ones 0, and adds them, before any is dropped, to the sums of their rows.
/// `j` is this lane's first key.
#[cube]
fn weights(
    s: &mut Array<Sums>,
    m: &Array<f32>,
    l: &mut Array<f32>,
    hash: &Array<u32>,
    unit: f32,
    j: u32,
    #[comptime] x: usize,
    n: Numbers,
    #[comptime] c: Compiled,
) {
    let col_blocks = comptime!(c.tile.cols / COLS);
    let mut y = s[x];
    #[unroll]
    for z in 0..4usize {
        let r = comptime!(row_index(x, z, col_blocks));
        let base = finite(m[r]);
        if comptime!(c.options) {
            // Scores may be as large as f32 allows: the difference comes first.
            let p = exp2((y.extract(z) - base) * unit);
            l[r] += p;
            let j = j + comptime!(place(x, z, col_blocks).1 as u32);
            y.insert(z, where_kept(p, hash[r], j, n));
        } else {
            let p = exp2(fma(y.extract(z), unit, -(base * unit)));
            l[r] += p;
            y.insert(z, p);
        }
    }
    s[x] = y;
}

/// Starts loading the values from key `j0` on into a stage.
#[cube]
fn load_values<E: Float>(v: &Tensor<E>, v_rows: Rows, j0: u32, stage: u32, #[comptime] c: Compiled) {
    let tile = comptime!(c.tile);
    let to = stage + comptime!((tile.cols * pitch(c.head_dim, c.element)) as u32);
    load_rows::<E>(v, v_rows, j0, to, tile.cols, c.value_dim, c.v_pieces, tile.units(), c.element);
}

/// Starts loading the keys and values from key `j0` on.
#[cube]
pub(crate) fn load_keys<E: Float>(
    k: &Tensor<E>,
    v: &Tensor<E>,
    k_rows: Rows,
    v_rows: Rows,
    j0: u32,
    to: u32,
    #[comptime] c: Compiled,
) {
    let tile = comptime!(c.tile);
    load_rows::<E>(k, k_rows, j0, to, tile.cols, c.head_dim, c.k_pieces, tile.units(), c.element);
    load_values::<E>(v, v_rows, j0, to, c);
}
