//! A problem together with its operands: what a tile needs to know about scores and visibility.

use std::hint::select_unpredictable;
use std::ops::Range;

use flashover_kernels::block_plan::{BlockPlan, flat};
use flashover_kernels::dropout::{Dropout, dropout_row};
use flashover_kernels::mask::{Band, TileKind};
use flashover_kernels::problem::Problem;
use flashover_kernels::score::{Along, Derivatives, Position, Row, ScoreCode};
use pulp::Simd;

use super::Inputs;
use super::real::{Float, Real};
use super::tiles::{read_row, sum, widen_row};
use super::view::View;

/// Most keys that a tile has.
const MAX_KEYS: usize = if super::forward::BK > super::sweep::BK { super::forward::BK } else { super::sweep::BK };

/// A tile of scores: queries `i0 .. i0 + rows` and keys `j0 .. j0 + keys` of query head `h` of batch element `b`.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    pub b: usize,
    pub h: usize,
    pub i0: usize,
    pub rows: usize,
    pub j0: usize,
    pub keys: usize,
    /// The plan's bitmap of the tile, if it hides anything there.
    pub bitmap: Option<u32>,
}

/// A validated problem and its operands, the bias and the mask broadcast to the scores.
pub(super) struct Context<'a, T: Float> {
    pub problem: &'a Problem,
    pub q: View<'a, T>,
    pub k: View<'a, T>,
    pub v: View<'a, T>,
    pub bias: Option<View<'a, T>>,
    pub slopes: Option<&'a [T::Compute]>,
    pub sinks: Option<&'a [T::Compute]>,
    pub scale: T::Compute,
    /// The user's score function and its parameters.
    pub function: Option<(ScoreCode, &'a [f32])>,
    mask: Option<View<'a, u8>>,
    key_lengths: Option<&'a [i32]>,
    plan: Option<&'a BlockPlan>,
}

impl<'a, T: Float> Context<'a, T> {
    /// # Panics
    /// When the operands are not those that the problem describes.
    pub fn new(problem: &'a Problem, inputs: &Inputs<'a, T>) -> Self {
        let p = problem;
        assert_eq!(p.element, T::ELEMENT, "element type");
        assert_eq!(inputs.q.shape(), [p.batch, p.heads_q, p.seq_q, p.head_dim], "shape of q");
        assert_eq!(inputs.k.shape(), [p.batch, p.heads_kv, p.seq_kv, p.head_dim], "shape of k");
        assert_eq!(inputs.v.shape(), [p.batch, p.heads_kv, p.seq_kv, p.value_dim], "shape of v");
        assert_eq!(inputs.bias.map(|x| x.shape()), p.bias, "shape of the bias");
        assert_eq!(inputs.mask.map(|x| x.shape()), p.mask, "shape of the mask");
        assert_eq!(inputs.alibi_slopes.map(<[_]>::len), p.alibi.then_some(p.heads_q), "number of ALiBi slopes");
        assert_eq!(inputs.learned_sinks.map(<[_]>::len), p.learned_sinks.then_some(p.heads_q), "number of sinks");
        let parameters = p.score.map(|score| score.parameters);
        assert_eq!(inputs.score_parameters.map(<[_]>::len), parameters, "number of the score function's parameters");
        assert_eq!(inputs.key_lengths.map(<[_]>::len), p.key_lengths.then_some(p.batch), "number of key lengths");
        assert_eq!(inputs.plan.map(BlockPlan::tile), p.plan.map(|plan| plan.tile), "tiles of the plan");
        Context {
            problem,
            q: inputs.q,
            k: inputs.k,
            v: inputs.v,
            bias: inputs.bias.map(|x| x.broadcast(p.score_shape())),
            slopes: inputs.alibi_slopes,
            sinks: inputs.learned_sinks,
            scale: T::Compute::from_f64(p.scale),
            function: p.score.map(|score| score.code).zip(inputs.score_parameters),
            mask: inputs.mask.map(|x| x.broadcast(p.score_shape())),
            key_lengths: inputs.key_lengths,
            plan: inputs.plan,
        }
    }

    /// Keys of batch element `b` that its length leaves visible.
    pub fn keys(&self, b: usize) -> usize {
        let all = self.problem.seq_kv;
        self.key_lengths.map_or(all, |lengths| usize::try_from(lengths[b]).unwrap_or(0).min(all))
    }

    /// End of the keys that queries up to `i` of batch element `b` may see.
    pub fn keys_seen(&self, b: usize, i: usize) -> usize {
        let [_, after] = keys_hidden_from(&self.problem.band, self.position(i));
        self.keys(b).min(usize::try_from(after.start).unwrap_or(0))
    }

    /// Whether scores are anything else than `scale · q·k`.
    pub fn has_score_functions(&self) -> bool {
        let added = self.slopes.is_some() || self.bias.is_some();
        self.problem.softcap.is_some() || added || self.function.is_some()
    }

    /// A query's position on the key axis.
    fn position(&self, i: usize) -> i32 {
        i as i32 + self.problem.alignment()
    }

    /// Kind of a tile whose keys are all within the key length, and which the plan lists. A dense mask may hide anything.
    pub fn classify(&self, tile: &Tile) -> TileKind {
        let (a0, j0) = (self.position(tile.i0), tile.j0 as i32);
        let kind = self.problem.band.classify(a0, a0 + tile.rows as i32 - 1, j0, j0 + tile.keys as i32 - 1);
        let points = self.mask.is_some() || tile.bitmap.is_some();
        if points && kind == TileKind::Full { TileKind::Partial } else { kind }
    }

    /// Whether query `i` sees key `j`, both of the tile.
    pub fn visible(&self, tile: &Tile, i: usize, j: usize) -> bool {
        self.problem.band.allows(self.position(i), j as i32)
            && self.mask.is_none_or(|mask| mask.at(tile.b, tile.h, i, j) == 0)
            && self.plan_row(tile, i).is_none_or(|(words, c0)| {
                let c = (c0 + j - tile.j0) as u32;
                flat::bit_is_set(words[c as usize / 32], c)
            })
    }

    /// The plan's bits of query `i` of the tile, and the bit of the tile's first key; `None` if the plan hides nothing.
    #[inline(always)]
    fn plan_row(&self, tile: &Tile, i: usize) -> Option<(&'a [u32], usize)> {
        let (plan, bitmap) = (self.plan?, tile.bitmap?);
        let (size, width) = (plan.tile(), plan.tile().row_words());
        let row = i % size.bq as usize * width;
        Some((&plan.bitmap(bitmap)[row..row + width], tile.j0 % size.bk as usize))
    }

    /// Calls `hide` with every key of the tile, counted from its first, that the plan hides from query `i`.
    #[inline(always)]
    fn for_hidden_by_plan(&self, tile: &Tile, i: usize, mut hide: impl FnMut(usize)) {
        let Some((words, c0)) = self.plan_row(tile, i) else { return };
        let (mut c, end) = (c0, c0 + tile.keys);
        while c < end {
            // What is left of the word, its hidden keys as ones.
            let mut hidden = !words[c / 32] >> (c % 32);
            let next = (c / 32 + 1) * 32;
            if next > end {
                hidden &= u32::MAX >> (32 - (end - c));
            }
            while hidden != 0 {
                hide(c - c0 + hidden.trailing_zeros() as usize);
                hidden &= hidden - 1;
            }
            c = next;
        }
    }

    /// Queries of a block of at most `most`, such that blocks from 0 on never reach over the plan's tiles.
    pub fn block_queries(&self, most: usize) -> usize {
        let Some(plan) = self.plan else { return most };
        let bq = plan.tile().bq as usize;
        (1..=most.min(bq)).rev().find(|size| bq.is_multiple_of(*size)).unwrap_or(1)
    }

    /// Queries of a task that walks key tiles and packs each for all of its queries: `few` without a plan. A plan visits a
    /// key tile less often, so a task takes more queries, as long as there are enough tasks for all threads.
    pub fn task_queries(&self, few: usize) -> usize {
        let Some(plan) = self.plan else { return few };
        let wanted = few as f64 / plan.density().max(1e-3);
        let p = self.problem;
        let most = p.batch * p.heads_q * p.seq_q / (8 * rayon::current_num_threads());
        ((wanted as usize).min(most) / few).max(1) * few
    }

    /// End of the keys from `j0` on that make one tile: at most `most`, before `end`, and within one tile of the plan.
    pub fn end_of_keys(&self, j0: usize, most: usize, end: usize) -> usize {
        let of_plan = self.plan.map_or(end, |plan| (j0 / plan.tile().bk as usize + 1) * plan.tile().bk as usize);
        (j0 + most).min(end).min(of_plan)
    }

    /// Key tiles of at most `most` keys, before `end`, that a block of queries visits: what `block` has of keys is
    /// overwritten. Neighbouring Full tiles of a plan are walked as one.
    pub fn list_keys(&self, block: &Tile, most: usize, end: usize, out: &mut Vec<(Tile, TileKind)>) {
        out.clear();
        let mut push = |start: usize, until: usize, bitmap: Option<u32>| {
            for j0 in (start..until.min(end)).step_by(most) {
                let tile = Tile { j0, keys: most.min(until.min(end) - j0), bitmap, ..*block };
                let kind = self.classify(&tile);
                if kind != TileKind::Empty {
                    out.push((tile, kind));
                }
            }
        };
        let Some(plan) = self.plan else { return push(0, end, None) };
        let (bq, bk) = (plan.tile().bq as usize, plan.tile().bk as usize);
        let blocks = plan.row(block.b as u32, block.h as u32, (block.i0 / bq) as u32);
        for run in blocks.full.chunk_by(|j, next| j + 1 == *next) {
            push(run[0] as usize * bk, (run[0] as usize + run.len()) * bk, None);
        }
        for (&j, &bitmap) in blocks.partial.iter().zip(blocks.bitmaps) {
            push(j as usize * bk, (j as usize + 1) * bk, Some(bitmap));
        }
    }

    /// Adds the blocks of at most `most` of `queries` that a tile of keys visits: what `tile` has of queries is overwritten.
    pub fn list_queries(&self, tile: &Tile, queries: &Range<usize>, most: usize, out: &mut Vec<(Tile, TileKind)>) {
        let mut push = |start: usize, until: usize, bitmap: Option<u32>| {
            let (start, until) = (start.max(queries.start), until.min(queries.end));
            for i0 in (start..until).step_by(most) {
                let tile = Tile { i0, rows: most.min(until - i0), bitmap, ..*tile };
                let kind = self.classify(&tile);
                if kind != TileKind::Empty {
                    out.push((tile, kind));
                }
            }
        };
        let Some(plan) = self.plan else { return push(queries.start, queries.end, None) };
        let (bq, bk) = (plan.tile().bq as usize, plan.tile().bk as usize);
        let blocks = plan.column(tile.b as u32, tile.h as u32, (tile.j0 / bk) as u32);
        let (first, last) = ((queries.start / bq) as u32, (queries.end.div_ceil(bq)) as u32);
        let within = |list: &[u32]| list.partition_point(|&i| i < first)..list.partition_point(|&i| i < last);
        for &i in &blocks.full[within(blocks.full)] {
            push(i as usize * bq, (i as usize + 1) * bq, None);
        }
        for n in within(blocks.partial) {
            let i = blocks.partial[n] as usize;
            push(i * bq, (i + 1) * bq, Some(blocks.bitmaps[n]));
        }
    }

    /// Score functions over a tile that lies keys down, queries across: `s[j · columns + i]`.
    #[inline(always)]
    pub fn score_columns<S: Simd>(&self, s: &mut [T::Compute], columns: usize, tile: &Tile) {
        if let Some(cap) = self.problem.softcap {
            let cap = T::Compute::from_f64(cap);
            for s in &mut s[..tile.keys * columns] {
                *s = cap * (*s / cap).tanh::<S>();
            }
        }
        if let Some(slopes) = self.slopes {
            let (slope, a0) = (slopes[tile.h], self.position(tile.i0));
            for (j, s) in s.chunks_exact_mut(columns).take(tile.keys).enumerate() {
                let ahead = a0 - (tile.j0 + j) as i32;
                for (c, s) in s.iter_mut().enumerate() {
                    *s = *s - slope * T::Compute::from_i32((ahead + c as i32).abs());
                }
            }
        }
        if let Some(bias) = self.bias {
            let mut row = [T::Compute::default(); MAX_KEYS];
            if bias.stride(2) == 0 {
                widen_row(&bias, [tile.b, tile.h, 0, tile.j0], &mut row[..tile.keys]);
                for (s, &bias) in s.chunks_exact_mut(columns).zip(&row[..tile.keys]) {
                    s.iter_mut().for_each(|s| *s += bias);
                }
            } else {
                for i in 0..tile.rows {
                    widen_row(&bias, [tile.b, tile.h, tile.i0 + i, tile.j0], &mut row[..tile.keys]);
                    for (s, &bias) in s.chunks_exact_mut(columns).zip(&row[..tile.keys]) {
                        s[i] += bias;
                    }
                }
            }
        }
        if let Some((code, parameters)) = self.function {
            let mut row = [0.0; super::forward::BQ];
            let row = &mut row[..tile.rows];
            for (j, s) in s.chunks_exact_mut(columns).take(tile.keys).enumerate() {
                row.iter_mut().zip(&*s).for_each(|(x, s)| *x = s.to_f64() as f32);
                let first = self.place(tile, tile.i0, tile.j0 + j);
                code.values(row, Row { first, along: Along::Queries }, parameters);
                s.iter_mut().zip(&*row).for_each(|(s, &x)| *s = T::Compute::from_f64(x.into()));
            }
        }
    }

    fn place(&self, tile: &Tile, i: usize, j: usize) -> Position {
        Position { batch: tile.b as u32, head: tile.h as u32, a: self.position(i), j: j as i32 }
    }

    /// `−∞` wherever a query does not see a key, in a tile that lies keys down, queries across.
    #[inline(always)]
    pub fn hide_columns(&self, s: &mut [T::Compute], columns: usize, tile: &Tile) {
        let band = self.problem.band;
        let a0 = self.position(tile.i0);
        for (j, s) in s.chunks_exact_mut(columns).take(tile.keys).enumerate() {
            let seen = columns_that_see(&band, (tile.j0 + j) as i32);
            let column = |a: i64| (a - i64::from(a0)).clamp(0, columns as i64) as usize;
            let (from, to) = (column(seen.start), column(seen.end));
            s[..from].fill(T::Compute::NEG_INFINITY);
            s[to.max(from)..].fill(T::Compute::NEG_INFINITY);
        }
        if let Some(mask) = self.mask {
            let mut row = [0; MAX_KEYS];
            if mask.stride(2) == 0 {
                mask_row(&mask, [tile.b, tile.h, 0, tile.j0], &mut row[..tile.keys]);
                for (s, _) in s.chunks_exact_mut(columns).zip(&row[..tile.keys]).filter(|(_, hides)| **hides != 0) {
                    s.fill(T::Compute::NEG_INFINITY);
                }
            } else {
                for i in 0..tile.rows {
                    mask_row(&mask, [tile.b, tile.h, tile.i0 + i, tile.j0], &mut row[..tile.keys]);
                    for (s, &hides) in s.chunks_exact_mut(columns).zip(&row[..tile.keys]) {
                        s[i] = select_unpredictable(hides != 0, T::Compute::NEG_INFINITY, s[i]);
                    }
                }
            }
        }
        if tile.bitmap.is_some() {
            for i in 0..tile.rows {
                self.for_hidden_by_plan(tile, tile.i0 + i, |j| s[j * columns + i] = T::Compute::NEG_INFINITY);
            }
        }
    }

    /// Score functions but for the user's over row `i` of a tile, and the derivative of the softcap at each score (untouched
    /// without one).
    #[inline(always)]
    pub fn score_row<S: Simd>(&self, s: &mut [T::Compute], slope_of_cap: &mut [T::Compute], tile: &Tile, i: usize) {
        if let Some(cap) = self.problem.softcap {
            let cap = T::Compute::from_f64(cap);
            for (s, derivative) in s.iter_mut().zip(slope_of_cap) {
                let t = (*s / cap).tanh::<S>();
                *s = cap * t;
                *derivative = T::Compute::from_f64(1.0) - t * t;
            }
        }
        if let Some(slopes) = self.slopes {
            let slope = slopes[tile.h];
            self.for_distances(s, tile, i, |s, distance| *s = *s - slope * distance);
        }
        if let Some(bias) = self.bias {
            let mut row = [T::Compute::default(); MAX_KEYS];
            widen_row(&bias, [tile.b, tile.h, i, tile.j0], &mut row[..s.len()]);
            s.iter_mut().zip(row).for_each(|(s, bias)| *s += bias);
        }
    }

    /// The user's score function over row `i` of a tile, after [`score_row`](Self::score_row); its derivatives for the score
    /// and for the parameter at each of them, 0 where the key is hidden.
    #[inline(always)]
    pub fn function_row(
        &self,
        s: &mut [T::Compute],
        for_score: &mut [T::Compute],
        for_parameter: &mut [T::Compute],
        (tile, kind): (&Tile, TileKind),
        i: usize,
    ) {
        let Some((code, parameters)) = self.function else { return };
        let mut rows = [[0.0; MAX_KEYS]; 3];
        let [values, scores, own] = rows.each_mut().map(|row| &mut row[..tile.keys]);
        values.iter_mut().zip(&*s).for_each(|(x, s)| *x = s.to_f64() as f32);
        let row = Row { first: self.place(tile, i, tile.j0), along: Along::Keys };
        code.derivatives(values, Derivatives { score: &mut *scores, parameter: &mut *own }, row, parameters);
        for (to, from) in [(s, &*values), (&mut *for_score, &*scores), (&mut *for_parameter, &*own)] {
            to.iter_mut().zip(from).for_each(|(to, &x)| *to = T::Compute::from_f64(x.into()));
        }
        if kind == TileKind::Partial {
            // What stands there may be NaN, and 0 · NaN is not 0.
            self.hide_row(&mut for_score[..tile.keys], &mut for_parameter[..tile.keys], tile, i);
        }
    }

    /// The parameter that each score of row `i` of a tile reads.
    pub fn parameters_of_row<'x>(&'x self, tile: &'x Tile, i: usize) -> impl Iterator<Item = usize> + 'x {
        let code = self.function.map(|(code, _)| code);
        let row = Row { first: self.place(tile, i, tile.j0), along: Along::Keys };
        (0..tile.keys).filter_map(move |n| code.map(|code| code.parameter(row.at(n)) as usize))
    }

    /// `Σ_j ds_j · |a − j|` over row `i` of a tile.
    #[inline(always)]
    pub fn distance_sum(&self, ds: &[T::Compute], tile: &Tile, i: usize) -> f64 {
        let mut terms = [T::Compute::default(); MAX_KEYS];
        let terms = &mut terms[..ds.len()];
        terms.copy_from_slice(ds);
        self.for_distances(terms, tile, i, |term, distance| *term *= distance);
        sum(terms)
    }

    /// Calls `f` with each element of row `i` of a tile and its ALiBi distance.
    #[inline(always)]
    pub fn for_distances(
        &self,
        row: &mut [T::Compute],
        tile: &Tile,
        i: usize,
        mut f: impl FnMut(&mut T::Compute, T::Compute),
    ) {
        let ahead = self.position(i) - tile.j0 as i32;
        for (j, x) in row.iter_mut().enumerate() {
            f(x, T::Compute::from_i32((ahead - j as i32).abs()));
        }
    }

    /// 0 in both rows wherever query `i` does not see the key.
    #[inline(always)]
    pub fn hide_row(&self, p: &mut [T::Compute], ds: &mut [T::Compute], tile: &Tile, i: usize) {
        let zero = T::Compute::default();
        for gap in keys_hidden_from(&self.problem.band, self.position(i)) {
            let key = |j: i64| (j - tile.j0 as i64).clamp(0, p.len() as i64) as usize;
            let (from, to) = (key(gap.start), key(gap.end));
            if from < to {
                p[from..to].fill(zero);
                ds[from..to].fill(zero);
            }
        }
        if let Some(mask) = self.mask {
            let mut row = [0; MAX_KEYS];
            mask_row(&mask, [tile.b, tile.h, i, tile.j0], &mut row[..p.len()]);
            for ((p, ds), hides) in p.iter_mut().zip(&mut *ds).zip(row) {
                *p = if hides != 0 { zero } else { *p };
                *ds = if hides != 0 { zero } else { *ds };
            }
        }
        self.for_hidden_by_plan(tile, i, |j| (p[j], ds[j]) = (zero, zero));
    }
}

/// Elements `[b, h, i, j ..]` of a mask.
#[inline(always)]
fn mask_row(mask: &View<'_, u8>, at: [usize; 4], out: &mut [u8]) {
    read_row(mask, at, out, |from, to| to.copy_from_slice(from), |hides| hides);
}

/// After every position and every key.
const BEYOND: i64 = i32::MAX as i64;

/// Positions of the queries that see key `j`.
fn columns_that_see(band: &Band, j: i32) -> Range<i64> {
    let (ahead, left, right, sinks) = band.scalars();
    let [j64, ahead, left, right] = [j, ahead, left, right].map(i64::from);
    if j < sinks { j64 - ahead..BEYOND } else { j64 - ahead.min(right)..j64 + left + 1 }
}

/// Keys that the query at `a` does not see, as two ranges.
fn keys_hidden_from(band: &Band, a: i32) -> [Range<i64>; 2] {
    let (ahead, left, right, sinks) = band.scalars();
    let [a, ahead, left, right, sinks] = [a, ahead, left, right, sinks].map(i64::from);
    let after_sinks = sinks.min(a + ahead + 1);
    [after_sinks..a - left, after_sinks.max(a + ahead.min(right) + 1)..BEYOND]
}

/// Dropout of one head, as loops over rows and keys want it.
#[derive(Clone, Copy)]
pub(super) struct HeadDropout {
    seed: (u32, u32),
    head: u32,
    threshold: u32,
    /// `1/(1 − probability)`.
    pub factor: f64,
}

impl HeadDropout {
    pub fn new(dropout: &Dropout, problem: &Problem, b: usize, h: usize) -> Self {
        let head = (b * problem.heads_q + h) as u32;
        HeadDropout { seed: dropout.seed_words(), head, threshold: dropout.threshold(), factor: dropout.factor() }
    }

    /// Hash of row `i`.
    pub fn row(&self, i: usize) -> u32 {
        dropout_row(self.seed.0, self.seed.1, self.head, i as u32)
    }

    /// Hash of key `j`; the same for all rows.
    #[inline(always)]
    pub fn key(j: usize) -> u32 {
        mix(j as u32 ^ 2_654_435_769)
    }

    /// What dropout does to row `i` of probabilities, from key `j0` on: the factor or 0.
    #[inline(always)]
    pub fn multipliers<R: Real>(&self, i: usize, j0: usize, out: &mut [R]) {
        let (row, factor) = (self.row(i), R::from_f64(self.factor));
        for (j, out) in out.iter_mut().enumerate() {
            *out = if self.keeps(row, Self::key(j0 + j)) { factor } else { R::default() };
        }
    }

    /// Whether the probability at a row and a key, given by their hashes, is kept.
    #[inline(always)]
    pub fn keeps(&self, row: u32, key: u32) -> bool {
        mix(row ^ key) >= self.threshold
    }
}

/// `flashover_kernels::dropout::mix`, here so that it becomes part of vector loops.
#[inline(always)]
fn mix(x: u32) -> u32 {
    let x = (x ^ (x >> 16)).wrapping_mul(2_146_121_005);
    let x = (x ^ (x >> 15)).wrapping_mul(2_221_713_035);
    x ^ (x >> 16)
}

#[cfg(test)]
mod tests {
    use flashover_kernels::mask::UNBOUNDED;
    use flashover_kernels::problem::Element;
    use flashover_kernels::score::{Alibi, Bias, ScoreFunction, Softcap};

    use super::*;

    #[test]
    fn intervals_of_visibility_are_those_of_the_band() {
        for causal in [false, true] {
            for (left, right) in [(UNBOUNDED, UNBOUNDED), (0, 0), (3, 0), (2, 5), (UNBOUNDED, 1)] {
                for sinks in [0, 1, 4, UNBOUNDED] {
                    let band = Band { causal, left, right, sinks };
                    for a in -9..12 {
                        for j in 0..14 {
                            let seen = band.allows(a, j);
                            assert_eq!(columns_that_see(&band, j).contains(&i64::from(a)), seen, "{band:?} {a} {j}");
                            let hidden = keys_hidden_from(&band, a).iter().any(|gap| gap.contains(&i64::from(j)));
                            assert_eq!(!hidden, seen, "{band:?} {a} {j}");
                        }
                    }
                }
            }
        }
    }

    /// Scores of one tile as rows and as columns, and the derivative of the softcap.
    struct Scores<'a>(&'a Context<'a, f32>, &'a [f32], Tile);

    impl pulp::WithSimd for Scores<'_> {
        type Output = [Vec<f32>; 3];

        fn with_simd<S: Simd>(self, _: S) -> Self::Output {
            let Scores(context, s, tile) = self;
            let (mut across, mut derivative, mut down) = (s.to_vec(), vec![0.0; s.len()], vec![0.0; s.len()]);
            for (n, &s) in s.iter().enumerate() {
                down[n % tile.keys * tile.rows + n / tile.keys] = s;
            }
            context.score_columns::<S>(&mut down, tile.rows, &tile);
            let rows = across.chunks_mut(tile.keys).zip(derivative.chunks_mut(tile.keys));
            for (r, (across, derivative)) in rows.enumerate() {
                context.score_row::<S>(across, derivative, &tile, tile.i0 + r);
            }
            let down = (0..s.len()).map(|n| down[n % tile.keys * tile.rows + n / tile.keys]).collect();
            [across, derivative, down]
        }
    }

    #[test]
    fn score_functions_agree_with_those_of_the_kernels() {
        let mut problem = Problem::new([1, 2, 40, 1], [1, 2, 70, 1], [1, 2, 70, 1], Element::F32).unwrap();
        (problem.softcap, problem.alibi, problem.bias) = (Some(3.0), true, Some([1, 1, 40, 70]));
        let (zeros, slopes) = ([0.0; 140], [0.3, 0.7]);
        let bias: Vec<f32> = (0..40 * 70).map(|n| (n % 37) as f32 * 0.1 - 1.5).collect();
        let (q, k) = (View::contiguous(&zeros[..80], [1, 2, 40, 1]), View::contiguous(&zeros, [1, 2, 70, 1]));
        let bias_view = View::contiguous(&bias, [1, 1, 40, 70]);
        let (bias_input, alibi_slopes) = (Some(bias_view), Some(&slopes[..]));
        let inputs = Inputs {
            q,
            k,
            v: k,
            bias: bias_input,
            mask: None,
            alibi_slopes,
            learned_sinks: None,
            score_parameters: None,
            key_lengths: None,
            plan: None,
        };
        let context = Context::new(&problem, &inputs);
        let tile = Tile { b: 0, h: 1, i0: 5, rows: 33, j0: 9, keys: 48, bitmap: None };
        let s: Vec<f32> = (0..33 * 48).map(|n| ((n * 31) % 97) as f32 * 0.25 - 12.0).collect();
        let [across, derivative, down] = pulp::Arch::new().dispatch(Scores(&context, &s, tile));
        for (n, &s) in s.iter().enumerate() {
            let (i, j) = (tile.i0 + n / tile.keys, tile.j0 + n % tile.keys);
            let at = Position { batch: 0, head: 1, a: i as i32 + 30, j: j as i32 };
            let expected = Bias::value(Alibi::value(Softcap::value(s, at, 3.0), at, slopes[1]), at, bias[i * 70 + j]);
            // The order is the same; only tanh differs, by a few units in the last place of at most 3.
            let close = |x: f32| (x - expected).abs() < 2.5e-7 * (3.0 + expected.abs());
            assert!(close(across[n]) && close(down[n]), "{s} at {at:?}: {}, {}, {expected}", across[n], down[n]);
            assert!((derivative[n] - Softcap::derivative(s, at, 3.0)).abs() < 1e-6, "{s} at {at:?}");
        }
    }

    #[test]
    fn dropout_agrees_with_its_definition() {
        let problem = Problem::new([3, 5, 7, 4], [3, 5, 9, 4], [3, 5, 9, 4], Element::F32);
        let problem = problem.unwrap();
        for (probability, seed) in [(0.0, 1), (0.3, 99), (0.8, u64::MAX - 5)] {
            let dropout = Dropout { probability, seed };
            for (b, h) in [(0, 0), (1, 4), (2, 3)] {
                let head = HeadDropout::new(&dropout, &problem, b, h);
                for i in [0, 1, 63, 1000] {
                    for j in 0..200 {
                        let keeps = head.keeps(head.row(i), HeadDropout::key(j));
                        let expected = dropout.multiplier(b as u32, h as u32, 5, i as u32, j as u32);
                        assert_eq!(if keeps { head.factor } else { 0.0 }, expected);
                    }
                }
            }
        }
    }
}
