//! Forward of what only position and key lengths hide, and only the scale changes: the kernel of [`forward`](super::forward) with
//! nothing in its loop but the tile.

use cubecl::prelude::*;

use super::config::{COLS, Compiled, MmaTile, ROWS, STAGES, WARP};
use super::forward::LOG2_E;
use super::products::{accumulate, product};
use super::ptx::{
    Fragment, Sums, any_lane, commit_copies, copy_async, kept, load_matrix, load_matrix_transposed, mma, row_maximum,
    row_sum, shared_address, wait_copies,
};
use super::scores::{hide_out_of_reach, row_index};
use super::store::store_rows;
use super::tile::{DEPTH, PIECE, PIECE_LEN, Rows, column_place, head_rows, load_rows, pitch, row_place};
use crate::family::element::{Numbers, head_of, is_minus_infinity, position};
use crate::family::ptx::{exp2, pack};
use crate::family::walk::{Side, Walk, key_walk, work_of};

/// What a row that has seen nothing has in place of its maximum: far below every score.
const NOTHING: f32 = f32::MAX;

/// Scores are taken from a maximum that may lag behind by a factor of the probabilities of 2 to this.
const LAG: f32 = 8.0;

/// Sum of a lane's probabilities of a row of a tile from which on the maximum moves.
const LARGE: f32 = 256.0;

/// One cube a query tile and head, the longest tiles first.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn lean_forward_kernel<E: Float>(
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
    let part = comptime!(Compiled { tile: MmaTile { cols: tile.part, ..tile }, ..c });
    let (col_blocks, value_blocks) = comptime!((tile.part / COLS, c.value_dim / COLS));
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
    let (k_bytes, v_bytes) = comptime!((tile.cols * pitch(c.head_dim), tile.cols * pitch(c.value_dim)));
    let q_bytes = comptime!(tile.rows() * pitch(c.head_dim.max(c.value_dim)));
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
    let q_place = kept(row_place(q_at + warp_row * comptime!(pitch(c.head_dim) as u32), c.head_dim));
    let mut k_place = kept(column_place(stage_at, c.head_dim));
    let mut v_place = kept(row_place(stage_at + comptime!(k_bytes as u32), c.value_dim));

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
    let mut k_to = kept(copy_place(stage_at, c.head_dim));
    let mut v_to = k_to;
    if comptime!(c.head_dim != c.value_dim) {
        v_to = kept(copy_place(stage_at, c.value_dim));
    }
    let mut next = tile_of(walk, 0u32);
    if walk.steps > 0 {
        copy_tile(k_copies, k_to, 0usize, next, c.head_dim, tile);
        copy_tile(v_copies, v_to, k_bytes, next, c.value_dim, tile);
    }
    commit_copies();
    let mut other = comptime!((k_bytes + v_bytes) as i32).runtime();
    let mut t = 0u32.runtime();
    while t < walk.steps {
        wait_copies(0usize);
        // Everyone's copies have arrived, and everyone is done with the other stage.
        sync_cube();
        let j0 = next * comptime!(tile.cols as u32);
        let is_full = t < full.sinks || (t >= full.from && t < full.to);
        #[unroll]
        for number in 0..comptime!(tile.cols / tile.part) {
            let mut s = Array::<Sums>::new(comptime!(blocks * col_blocks));
            let down = comptime!((number * tile.part * pitch(c.head_dim)) as u32);
            if comptime!(tile.lean & 2 != 0) {
                product_ahead(&mut s, q_place, k_place, comptime!(down as usize), c.head_dim, part.tile, c);
            } else {
                product(&mut s, q_place, k_place + down, c.head_dim, part.tile, c.element);
            }

            if comptime!(number == 0) {
                // What is next is asked for while the products are under way.
                t += 1;
                k_to = shifted(k_to, other);
                v_to = k_to;
                if comptime!(c.head_dim != c.value_dim) {
                    v_to = shifted(v_to, other);
                }
                if t < walk.steps {
                    next = tile_of(walk, t);
                    copy_tile(k_copies, k_to, 0usize, next, c.head_dim, tile);
                    copy_tile(v_copies, v_to, k_bytes, next, c.value_dim, tile);
                }
                commit_copies();
            }

            if !is_full {
                let column = j0 + column + comptime!((number * tile.part) as u32);
                let mut none = Array::<Sums>::new(1usize);
                hide_out_of_reach(&mut s, &mut none, row, column, at, n, false, Side::Queries, part);
            }
            if comptime!(tile.lean & 8 == 0) {
                follow_maxima(&s, &mut minus, &mut l, &mut acc, unit, part);
            }
            let k_down = down;
            let down = comptime!((number * tile.part * pitch(c.value_dim)) as u32);
            if comptime!(tile.lean & 8 != 0) {
                let mut added = Array::<f32>::new(comptime!(2 * blocks));
                if too_large(weigh(&mut s, &minus, &mut added, unit, part)) {
                    // The scores once more, to take their maxima.
                    product(&mut s, q_place, k_place + k_down, c.head_dim, part.tile, c.element);
                    if !is_full {
                        let column = j0 + column + comptime!((number * tile.part) as u32);
                        let mut none = Array::<Sums>::new(1usize);
                        hide_out_of_reach(&mut s, &mut none, row, column, at, n, false, Side::Queries, part);
                    }
                    move_maxima(&s, &mut minus, &mut l, &mut acc, unit, part);
                    weigh(&mut s, &minus, &mut added, unit, part);
                }
                #[unroll]
                for x in 0..comptime!(2 * blocks) {
                    l[x] += added[x];
                }
                accumulate(&mut acc, &s, v_place + down, c.value_dim, part); // o += p · v
            } else if comptime!(tile.lean & 4 != 0) {
                weigh_and_accumulate(&mut acc, &mut s, &minus, &mut l, unit, v_place, comptime!(down as usize), part);
            } else {
                // p = exp(s − m)
                #[unroll]
                for x in 0..comptime!(blocks * col_blocks) {
                    weights(&mut s, &minus, &mut l, unit, x, part);
                }
                accumulate(&mut acc, &s, v_place + down, c.value_dim, part); // o += p · v
            }
        }
        k_place = shifted(k_place, other);
        v_place = shifted(v_place, other);
        other = -other;
    }
    // The output takes the queries' place: no copy is under way, and nobody reads.
    wait_copies(0usize);
    sync_cube();

    let mut norm = Array::<f32>::new(comptime!(2 * blocks));
    #[unroll]
    for x in 0..comptime!(2 * blocks) {
        let mut sum = row_sum(l[x]);
        // A row that saw nothing has a sum of 0.
        let seen = u32::reinterpret(sum) != 0u32;
        // In natural units from here on.
        let mut top = select(seen, -(minus[x] * comptime!(1.0 / LOG2_E)), n.minus_infinity);
        let mut shrink = 1.0f32;
        if n.sinks_at != 0 {
            // A learned sink is one more score that has no value.
            let sink = f32::reinterpret(scratch[n.sinks_at + h as usize]);
            let higher = max(top, sink);
            if !is_minus_infinity(higher) {
                shrink = exp2((top - higher) * LOG2_E);
                sum = sum * shrink + exp2((sink - higher) * LOG2_E);
                top = higher;
            }
        }
        let seen = u32::reinterpret(sum) != 0u32;
        norm[x] = select(seen, shrink / sum, 0.0f32);
        let i = row + comptime!(8 * x as u32);
        if with_lse {
            if quarter == 0 && i < n.seq_q {
                let to = head as usize * n.seq_q as usize + i as usize;
                lse.as_mut().unwrap()[to] = select(seen, top + sum.ln(), n.minus_infinity);
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

/// `address + by`.
#[cube]
fn shifted(address: u32, by: i32) -> u32 {
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

/// The Full tiles of a walk without a plan. A tile that the sinks fill together with the window counts as Partial.
#[cube]
fn full_tiles(walk: Walk, i0: u32, keys: i32, n: Numbers, #[comptime] tile: MmaTile) -> FullTiles {
    let bk = comptime!(tile.cols as i32);
    let (a0, a1) = (position(i0, n), position(i0 + comptime!(tile.rows() as u32 - 1), n));
    let mut full = FullTiles { sinks: 0u32, from: 0u32, to: 0u32 };
    if i0 + comptime!(tile.rows() as u32) <= n.seq_q {
        let seen_by_all = min(keys, a0 + n.ahead + 1);
        let first = walk.first as i32;
        let sink_tiles = walk.sink_tiles as i32;
        full.sinks = (max(min(n.sinks, seen_by_all), 0i32) / bk) as u32;
        let from = max((max(a1 - n.left, 0i32) + comptime!(bk - 1)) / bk, first);
        let to = max(min(seen_by_all, a0 + n.right + 1), 0i32) / bk;
        full.from = (from - first + sink_tiles) as u32;
        full.to = max(to - first + sink_tiles, 0i32) as u32;
    }
    full
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
fn copy_place(to: u32, #[comptime] dim: usize) -> u32 {
    let per_row = comptime!((dim / PIECE_LEN) as u32);
    to + UNIT_POS / per_row * comptime!(pitch(dim) as u32) + UNIT_POS % per_row * comptime!(PIECE as u32)
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
        copy_async(to, comptime!(offset + pass * down * pitch(dim)), from, below);
        from += step as u64;
    }
}

/// As [`product`], the fragments of a depth loaded before the products of the depth before.
#[cube]
fn product_ahead(
    s: &mut Array<Sums>,
    a: u32,
    b: u32,
    #[comptime] down: usize,
    #[comptime] dim: usize,
    #[comptime] tile: MmaTile,
    #[comptime] c: Compiled,
) {
    let (blocks, col_blocks) = comptime!((tile.blocks, tile.cols / COLS));
    let pairs = comptime!(col_blocks / 2);
    #[unroll]
    for x in 0..comptime!(blocks * col_blocks) {
        s[x] = Sums::new(0.0f32);
    }
    let mut rows = Array::<Fragment>::new(comptime!(2 * blocks));
    let mut columns = Array::<Fragment>::new(comptime!(2 * pairs));
    #[unroll]
    for d in 0..comptime!(dim / DEPTH + 1) {
        if comptime!(d < dim / DEPTH) {
            let now = comptime!(d % 2);
            #[unroll]
            for block in 0..blocks {
                rows[comptime!(now * blocks + block)] =
                    load_matrix(a, comptime!(block * ROWS * pitch(dim) + 2 * DEPTH * d));
            }
            #[unroll]
            for pair in 0..pairs {
                columns[comptime!(now * pairs + pair)] =
                    load_matrix(b, comptime!(down + pair * 2 * COLS * pitch(dim) + 2 * DEPTH * d));
            }
        }
        if comptime!(d > 0) {
            let now = comptime!((d + 1) % 2);
            #[unroll]
            for pair in 0..pairs {
                let y = columns[comptime!(now * pairs + pair)];
                #[unroll]
                for block in 0..blocks {
                    let x = comptime!(block * col_blocks + 2 * pair);
                    let row = rows[comptime!(now * blocks + block)];
                    s[x] = mma(row, y.extract(0usize), y.extract(1usize), s[x], c.element);
                    s[x + 1] = mma(row, y.extract(2usize), y.extract(3usize), s[x + 1], c.element);
                }
            }
        }
    }
}

/// Turns scores into probabilities a depth of the second product at a time, and multiplies those of the depth before.
#[cube]
fn weigh_and_accumulate(
    acc: &mut Array<Sums>,
    s: &mut Array<Sums>,
    minus: &Array<f32>,
    l: &mut Array<f32>,
    unit: f32,
    b: u32,
    #[comptime] down: usize,
    #[comptime] c: Compiled,
) {
    let (blocks, col_blocks, value_blocks) = comptime!((c.tile.blocks, c.tile.cols / COLS, c.value_dim / COLS));
    let depths = comptime!(c.tile.cols / DEPTH);
    let mut rows = Array::<Fragment>::new(comptime!(2 * blocks));
    #[unroll]
    for d in 0..comptime!(depths + 1) {
        if comptime!(d < depths) {
            #[unroll]
            for block in 0..blocks {
                let x = comptime!(block * col_blocks + 2 * d);
                weights(s, minus, l, unit, x, c);
                weights(s, minus, l, unit, comptime!(x + 1), c);
                let mut packed = Fragment::new(0u32);
                #[unroll]
                for y in 0..4usize {
                    let sums = s[comptime!(x + y / 2)];
                    let (low, high) = (sums.extract(comptime!(y % 2 * 2)), sums.extract(comptime!(y % 2 * 2 + 1)));
                    packed.insert(y, pack(low, high, c.element));
                }
                rows[comptime!(d % 2 * blocks + block)] = packed;
            }
        }
        if comptime!(d > 0) {
            #[unroll]
            for pair in 0..comptime!(value_blocks / 2) {
                let offset = comptime!(down + (d - 1) * DEPTH * pitch(c.value_dim) + pair * 2 * PIECE);
                let values = load_matrix_transposed(b, offset);
                #[unroll]
                for block in 0..blocks {
                    let x = comptime!(block * value_blocks + 2 * pair);
                    let row = rows[comptime!((d + 1) % 2 * blocks + block)];
                    acc[x] = mma(row, values.extract(0usize), values.extract(1usize), acc[x], c.element);
                    acc[x + 1] = mma(row, values.extract(2usize), values.extract(3usize), acc[x + 1], c.element);
                }
            }
        }
    }
}

/// Takes the scores' maxima, and where any has outgrown the old one by too much, moves there, and shrinks what was summed.
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
    let (col_blocks, value_blocks) = comptime!((c.tile.cols / COLS, c.value_dim / COLS));
    let mut top = Array::<f32>::new(rows);
    let mut grows = false.runtime();
    #[unroll]
    for x in 0..rows {
        let first = s[comptime!(x / 2 * col_blocks)];
        let mut most = max(first.extract(comptime!(x % 2 * 2)), first.extract(comptime!(x % 2 * 2 + 1)));
        #[unroll]
        for col in 1..col_blocks {
            let y = s[comptime!(x / 2 * col_blocks + col)];
            most = max(most, max(y.extract(comptime!(x % 2 * 2)), y.extract(comptime!(x % 2 * 2 + 1))));
        }
        top[x] = most;
        grows = grows || fma(most, unit, minus[x]) > LAG;
    }
    if any_lane(grows) {
        #[unroll]
        for x in 0..rows {
            let now = min(minus[x], -(row_maximum(top[x]) * unit));
            let shrink = exp2(now - minus[x]);
            minus[x] = now;
            l[x] *= shrink;
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
    }
}

/// Turns scores into probabilities, and adds them up: `added` by row, returned over all of them.
#[cube]
fn weigh(s: &mut Array<Sums>, minus: &Array<f32>, added: &mut Array<f32>, unit: f32, #[comptime] c: Compiled) -> f32 {
    let rows = comptime!(2 * c.tile.blocks);
    #[unroll]
    for x in 0..rows {
        added[x] = 0.0f32;
    }
    #[unroll]
    for x in 0..comptime!(c.tile.blocks * c.tile.cols / COLS) {
        weights(s, minus, added, unit, x, c);
    }
    let mut most = added[0];
    #[unroll]
    for x in 1..rows {
        most = max(most, added[x]);
    }
    most
}

/// Whether in any lane probabilities are too large to be rounded and added up as they are.
#[cube]
fn too_large(most: f32) -> bool {
    any_lane(most > LARGE)
}

/// Moves to the scores' maxima, and shrinks what was summed.
#[cube]
fn move_maxima(
    s: &Array<Sums>,
    minus: &mut Array<f32>,
    l: &mut Array<f32>,
    acc: &mut Array<Sums>,
    unit: f32,
    #[comptime] c: Compiled,
) {
    let (col_blocks, value_blocks) = comptime!((c.tile.cols / COLS, c.value_dim / COLS));
    #[unroll]
    for x in 0..comptime!(2 * c.tile.blocks) {
        let first = s[comptime!(x / 2 * col_blocks)];
        let mut most = max(first.extract(comptime!(x % 2 * 2)), first.extract(comptime!(x % 2 * 2 + 1)));
        #[unroll]
        for col in 1..col_blocks {
            let y = s[comptime!(x / 2 * col_blocks + col)];
            most = max(most, max(y.extract(comptime!(x % 2 * 2)), y.extract(comptime!(x % 2 * 2 + 1))));
        }
        let now = min(minus[x], -(row_maximum(most) * unit));
        let shrink = exp2(now - minus[x]);
        minus[x] = now;
        l[x] *= shrink;
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
