//! Forward of plain problems: only a positive scale changes a score, and only position and key lengths hide.
//!
//! `o = softmax(q·kᵀ · scale) · v` and `lse`: FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 1, with the tiles, the grid and the
//! memory of [`forward`](super::forward), which takes every problem. This form is apart from it because what a plan, a dense mask or
//! an option asks of a tile costs registers, and at D 128 those that hold scores of 64 keys: without it a block of queries is read
//! from shared memory once a tile and not twice. What else differs:
//!
//! - Which tiles are Full are two ranges of the walk, worked out once.
//! - A unit copies the same piece of every row it copies: an address and a stride for each operand.
//! - Maxima are taken over a lane's own columns; the lanes of a row compare them only where one has outgrown the old one.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, MmaTile, ROWS, STAGES, WARP};
use super::forward::{LAG, LOG2_E, finish_row, shrink_row};
use super::products::{accumulate, product};
use super::ptx::{
    Fragment, Sums, any_lane, commit_copies, copy_async, kept, row_maximum, row_sum, shared_address, wait_copies,
};
use super::scores::{hide_out_of_reach, row_index};
use super::store::store_rows;
use super::tile::{PIECE, PIECE_LEN, Rows, column_place, depth_place, head_rows, load_rows, pitch, row_place};
use crate::family::element::{Numbers, head_of, position};
use crate::family::ptx::exp2;
use crate::family::walk::{Side, Walk, key_walk, work_of};
use crate::problem::Element;

/// What a row that has seen nothing has in place of `−m`: it hides every score of −∞, and any other outgrows it.
const NOTHING: f32 = f32::MAX;

/// One cube a query tile and head, the longest tiles first.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn forward_plain_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    scratch: &[u32],
    o: &mut [E],
    mut lse: ComptimeOption<&mut [f32]>,
    mut rest: ComptimeOption<Box<[E]>>,
    n: Numbers,
    #[comptime] with_lse: bool,
    #[comptime] with_rest: bool,
    #[comptime] c: Compiled,
    #[define(E)] _dtype: ElemType,
) {
    let tile = comptime!(c.tile);
    let blocks = comptime!(tile.blocks);
    let (col_blocks, value_blocks) = comptime!((tile.cols / COLS, c.value_dim / COLS));
    let work = work_of(CUBE_POS, n.heads_q, n.seq_q, scratch, n, Side::Queries, tile.shape());
    if !work.exists {
        terminate!();
    }
    let (head, i0) = (work.head, work.tile * comptime!(tile.rows() as u32));
    let (b, h) = (head / n.heads_q, head % n.heads_q);
    let at = head_of::<E>(b, h, scratch, ComptimeOption::new_None(), n, false);
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
    let q_place =
        kept(row_place(q_at + warp_row * comptime!(pitch(c.head_dim, c.element) as u32), c.head_dim, c.element));
    let mut k_place = kept(column_place(stage_at, c.head_dim, c.element));
    let mut v_place = kept(depth_place(stage_at + comptime!(k_bytes as u32), c.value_dim, c.element));

    let mut acc = Array::<Sums>::new(comptime!(blocks * value_blocks)); // o [16 · blocks, Dv]
    #[unroll]
    for x in 0..comptime!(blocks * value_blocks) {
        acc[x] = Sums::new(0.0f32);
    }
    let mut minus = Array::<f32>::new(comptime!(2 * blocks)); // −m, as an exponent, of rows 16·block + 8·half + lane / 4
    let mut l = Array::<f32>::new(comptime!(2 * blocks)); // this lane's columns only, until the end
    #[unroll]
    for x in 0..comptime!(2 * blocks) {
        minus[x] = NOTHING.runtime();
        l[x] = 0.0f32;
    }
    let unit = LOG2_E * n.scale;

    let walk = key_walk(i0, at, scratch, n, tile.shape());
    let full = full_tiles(walk, i0, at.keys, n, tile);
    load_rows::<E>(q, q_rows, i0, q_at, tile.rows(), c.head_dim, c.q_pieces, tile.units(), c.element);
    let k_copies = copies_of(k_rows, c.head_dim);
    let v_copies = copies_of(v_rows, c.value_dim);
    let mut k_to = kept(copy_place(stage_at, c.head_dim, c.element));
    let mut v_to = k_to;
    if comptime!(c.head_dim != c.value_dim) {
        v_to = kept(copy_place(stage_at, c.value_dim, c.element));
    }
    let mut next = tile_of(walk, 0u32);
    if walk.steps > 0 {
        copy_tile(k_copies, k_to, 0usize, next, c.head_dim, tile, c.element);
        copy_tile(v_copies, v_to, k_bytes, next, c.value_dim, tile, c.element);
    }
    commit_copies();
    let mut other = comptime!((k_bytes + v_bytes) as i32).runtime();
    let mut t = 0u32.runtime();
    while t < walk.steps {
        wait_copies(0usize);
        // Everyone's copies have arrived, and everyone is done with the other stage.
        sync_cube();
        let column = next * comptime!(tile.cols as u32) + column;
        let is_full = t < full.sinks || (t >= full.from && t < full.to);
        let mut s = Array::<Sums>::new(comptime!(blocks * col_blocks));
        product(&mut s, q_place, k_place, c.head_dim, tile, c.element); // s = q · kᵀ

        // What is next is asked for while the products are under way.
        t += 1;
        k_to = moved(k_to, other);
        if comptime!(c.head_dim == c.value_dim) {
            v_to = k_to; // one register less
        } else {
            v_to = moved(v_to, other);
        }
        if t < walk.steps {
            next = tile_of(walk, t);
            copy_tile(k_copies, k_to, 0usize, next, c.head_dim, tile, c.element);
            copy_tile(v_copies, v_to, k_bytes, next, c.value_dim, tile, c.element);
        }
        commit_copies();

        if !is_full {
            let mut none = Array::<Sums>::new(1usize);
            hide_out_of_reach(&mut s, &mut none, row, column, at, n, false, Side::Queries, c);
        }
        follow_maxima(&s, &mut minus, &mut l, &mut acc, unit, c);
        // p = exp(s − m)
        #[unroll]
        for x in 0..comptime!(blocks * col_blocks) {
            weights(&mut s, &minus, &mut l, unit, x, c);
        }
        accumulate(&mut acc, &s, v_place, c.value_dim, c); // o += p · v
        k_place = moved(k_place, other);
        v_place = moved(v_place, other);
        other = -other;
    }
    // The output takes the queries' place: no copy is under way, and nobody reads.
    wait_copies(0usize);
    sync_cube();

    let mut norm = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for x in 0..comptime!(2 * blocks) {
        let sum = row_sum(l[x]);
        // A row that saw nothing has a sum of 0.
        let seen = u32::reinterpret(sum) != 0u32;
        // In natural units from here on.
        let top = select(seen, -(minus[x] * comptime!(1.0 / LOG2_E)), n.minus_infinity);
        let (factor, row_lse) = finish_row(sum, top, h, scratch, n);
        norm[x] = factor;
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

/// An address in the other stage.
#[cube]
fn moved(address: u32, by: i32) -> u32 {
    u32::reinterpret(i32::reinterpret(address) + by)
}

/// Which tiles of a walk are Full: the first `sinks`, and those `from .. to`.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct FullTiles {
    sinks: u32,
    from: u32,
    to: u32,
}

/// The Full tiles of a walk without a plan. Queries past the end do not count: nobody stores them. A tile that is seen half as
/// sinks and half through the window counts as Partial.
#[cube]
fn full_tiles(walk: Walk, i0: u32, keys: i32, n: Numbers, #[comptime] tile: MmaTile) -> FullTiles {
    let bk = comptime!(tile.cols as i32);
    let (first, sink_tiles) = (walk.first as i32, walk.sink_tiles as i32);
    // The first query sees least ahead, the last one least behind.
    let a0 = position(i0, n);
    let a1 = position(min(i0 + comptime!(tile.rows() as u32), n.seq_q) - 1, n);
    let end = min(keys, a0 + n.ahead + 1);
    let sinks = max(min(n.sinks, end), 0i32) / bk;
    let from = max((max(a1 - n.left, 0i32) + comptime!(bk - 1)) / bk, first);
    let to = max(min(end, a0 + n.right + 1), 0i32) / bk;
    FullTiles {
        sinks: sinks as u32,
        from: (from - first + sink_tiles) as u32,
        to: max(to - first + sink_tiles, 0i32) as u32,
    }
}

/// Which tile of keys is the `t`-th of a walk without a plan.
#[cube]
fn tile_of(walk: Walk, t: u32) -> u32 {
    select(t < walk.sink_tiles, t, t - walk.sink_tiles + walk.first)
}

/// What a unit copies of every tile of one operand.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
struct Copies {
    /// Where its piece of the first row lies.
    from: u64,
    /// Bytes between rows.
    stride: u32,
    /// Rows that exist, less its first; none if its piece lies past the end of a row.
    rows: i32,
}

/// What this unit copies, piece `UNIT_POS` of the first rows first.
#[cube]
fn copies_of(rows: Rows, #[comptime] dim: usize) -> Copies {
    let per_row = comptime!((dim / PIECE_LEN) as u32);
    let (r, column) = (UNIT_POS / per_row, UNIT_POS % per_row);
    let stride = (rows.row_stride * 2) as u32;
    let exists = select(column * comptime!(PIECE_LEN as u32) < rows.dim, rows.rows as i32, 0i32);
    Copies {
        from: rows.address + r as u64 * stride as u64 + column as u64 * comptime!(PIECE as u64),
        stride,
        rows: exists - r as i32,
    }
}

/// Where a unit's piece of the first row goes.
#[cube]
fn copy_place(to: u32, #[comptime] dim: usize, #[comptime] element: Element) -> u32 {
    let per_row = comptime!((dim / PIECE_LEN) as u32);
    to + UNIT_POS / per_row * comptime!(pitch(dim, element) as u32) + UNIT_POS % per_row * comptime!(PIECE as u32)
}

/// Starts copying a tile of keys or values.
#[cube]
fn copy_tile(
    copies: Copies,
    to: u32,
    #[comptime] offset: usize,
    number: u32,
    #[comptime] dim: usize,
    #[comptime] tile: MmaTile,
    #[comptime] element: Element,
) {
    let down = comptime!(tile.units() / (dim / PIECE_LEN));
    let passes = comptime!(tile.cols / down);
    let j0 = number * comptime!(tile.cols as u32);
    let left = copies.rows - j0 as i32;
    let mut from = copies.from + j0 as u64 * copies.stride as u64;
    let step = copies.stride * comptime!(down as u32);
    #[unroll]
    for pass in 0..passes {
        let below = comptime!((pass * down) as i32) < left;
        copy_async(to, comptime!(offset + pass * down * pitch(dim, element)), from, below);
        from += step as u64;
    }
}

/// Takes the scores' maxima over this lane's columns, and where in the warp any has outgrown the old maximum by too much, moves all
/// to those of their rows, and shrinks what was summed.
#[cube]
fn follow_maxima(
    s: &Array<Sums>,
    minus: &mut Array<f32>,
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
        top[x] = lane_top(s, x, c);
        grows = grows || fma(top[x], unit, minus[x]) > LAG;
    }
    if any_lane(grows) {
        #[unroll]
        for x in 0..rows {
            let now = min(minus[x], -(row_maximum(top[x]) * unit));
            let shrink = exp2(now - minus[x]);
            minus[x] = now;
            l[x] *= shrink;
            shrink_row(acc, shrink, x, c);
        }
    }
}

/// The maximum of a row's scores in this lane.
#[cube]
fn lane_top(s: &Array<Sums>, #[comptime] x: usize, #[comptime] c: Compiled) -> f32 {
    let col_blocks = comptime!(c.tile.cols / COLS);
    let first = s[comptime!(x / 2 * col_blocks)];
    let mut top = max(first.extract(comptime!(x % 2 * 2)), first.extract(comptime!(x % 2 * 2 + 1)));
    #[unroll]
    for col in 1..col_blocks {
        let y = s[comptime!(x / 2 * col_blocks + col)];
        top = max(top, max(y.extract(comptime!(x % 2 * 2)), y.extract(comptime!(x % 2 * 2 + 1))));
    }
    top
}

/// Turns a block of scores into probabilities and adds them to the sums of their rows.
#[cube]
fn weights(
    s: &mut Array<Sums>,
    minus: &Array<f32>,
    l: &mut Array<f32>,
    unit: f32,
    #[comptime] x: usize,
    #[comptime] c: Compiled,
) {
    let col_blocks = comptime!(c.tile.cols / COLS);
    let mut y = s[x];
    #[unroll]
    for z in 0..4usize {
        let r = comptime!(row_index(x, z, col_blocks));
        let p = exp2(fma(y.extract(z), unit, minus[r]));
        l[r] += p;
        y.insert(z, p);
    }
    s[x] = y;
}
