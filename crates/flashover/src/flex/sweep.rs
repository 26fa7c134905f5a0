//! Backward of one tile, and the sweep over tiles that adds up the gradients of q, k and v.
//!
//! Source: FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 2. With `delta` and `norm` of [`delta`](super::delta):
//!
//! ```text
//! s = (scale · q) kᵀ              p = exp(f(s) − lse) · norm             [bq, bk], recomputed
//! dp = do vᵀ                      ds = p ∘ (dp − delta) ∘ f′(s)          f: all score functions, the user's last
//! dv += pᵀ do      dk += dsᵀ (scale · q)      dq += scale · ds k
//! ```
//!
//! A tile lies queries down and keys across. kᵀ and vᵀ of a key tile are packed once and serve all its query blocks;
//! q, do and k are read where they are. Dropout's multiplier stands on dp, and on p in dv.

use std::ops::Range;

use flashover_kernels::mask::TileKind;
use flashover_kernels::problem::Problem;
use pulp::{Simd, WithSimd};

use super::context::{Context, HeadDropout, Tile};
use super::gemm::{Left, Right, Shape, product, product_where};
use super::real::{Float, PAD, Real, padded};
use super::tiles::{Rows, all_finite, rows, rows_scratch, scaled, transpose};
use super::view::View;

/// Queries of a tile.
pub(super) const BQ: usize = 64;
/// Keys of a tile, and elements of a row of `p` and `ds`.
pub(super) const BK: usize = 64;

/// What the backward knows of the forward and of the loss.
pub(super) struct Saved<'a, T: Float> {
    /// Gradient of o.
    pub do_: View<'a, T>,
    /// Log-sum-exp, `[B, Hq, Sq]`.
    pub lse: &'a [T::Compute],
    /// `[B, Hq, Sq]`.
    pub delta: &'a [T::Compute],
    /// Factor that makes the probabilities of a query sum to 1, `[B, Hq, Sq]`.
    pub norm: &'a [T::Compute],
}

/// Tiles of one thread.
pub(super) struct Scratch<R> {
    keys: KeyScratch<R>,
    tile: TileScratch<R>,
    /// Sums of dk, `[BK, D]`, and of dv, `[BK, Dv]`, rows padded.
    dk: Vec<R>,
    dv: Vec<R>,
    /// A row that is about to be stored.
    row: Vec<R>,
    /// The tiles of a key tile.
    walk: Vec<(Tile, TileKind)>,
}

/// Key tile: rows where they cannot be read in place, and the packed kᵀ `[D, BK]` and vᵀ `[Dv, BK]`.
pub(super) struct KeyScratch<R> {
    k: Vec<R>,
    v: Vec<R>,
    kt: Vec<R>,
    vt: Vec<R>,
}

/// One tile: copies of rows of q and do where needed, `scale · q`, p and ds, `[BQ, BK]`, and a row each of the softcap's
/// derivative, of dropout's multipliers and of the derivatives of the user's function.
pub(super) struct TileScratch<R> {
    q: Vec<R>,
    scaled_q: Vec<R>,
    do_: Vec<R>,
    p: Vec<R>,
    pub ds: Vec<R>,
    slope_of_cap: Vec<R>,
    multipliers: Vec<R>,
    for_score: Vec<R>,
    for_parameter: Vec<R>,
}

impl<R: Real> KeyScratch<R> {
    pub fn new(problem: &Problem) -> Self {
        let zeros = |n: usize| vec![R::default(); n];
        let (d, dv) = (problem.head_dim, problem.value_dim);
        KeyScratch {
            k: zeros(rows_scratch(BK, d)),
            v: zeros(rows_scratch(BK, dv)),
            kt: zeros(d * BK),
            vt: zeros(dv * BK),
        }
    }

    pub fn bytes(&self) -> usize {
        (self.k.len() + self.v.len() + self.kt.len() + self.vt.len()) * size_of::<R>()
    }
}

impl<R: Real> TileScratch<R> {
    pub fn new(problem: &Problem) -> Self {
        let zeros = |n: usize| vec![R::default(); n];
        TileScratch {
            q: zeros(rows_scratch(BQ, problem.head_dim)),
            scaled_q: zeros(rows_scratch(BQ, problem.head_dim)),
            do_: zeros(rows_scratch(BQ, problem.value_dim)),
            p: zeros(BQ * BK),
            ds: zeros(BQ * BK),
            slope_of_cap: zeros(BK),
            multipliers: zeros(BK),
            for_score: zeros(if problem.score.is_some() { BK } else { 0 }),
            for_parameter: zeros(if problem.score.is_some() { BK } else { 0 }),
        }
    }

    pub fn bytes(&self) -> usize {
        let TileScratch { q, scaled_q, do_, p, ds, slope_of_cap, multipliers, for_score, for_parameter } = self;
        let all = [q, scaled_q, do_, p, ds, slope_of_cap, multipliers, for_score, for_parameter];
        let elements: usize = all.map(Vec::len).iter().sum();
        elements * size_of::<R>()
    }
}

impl<R: Real> Scratch<R> {
    pub fn new(problem: &Problem) -> Self {
        let (d, dv) = (problem.head_dim, problem.value_dim);
        Scratch {
            keys: KeyScratch::new(problem),
            tile: TileScratch::new(problem),
            dk: vec![R::default(); rows_scratch(BK, d)],
            dv: vec![R::default(); rows_scratch(BK, dv)],
            row: vec![R::default(); d.max(dv)],
            walk: Vec::new(),
        }
    }

    pub fn bytes(&self) -> usize {
        self.keys.bytes() + self.tile.bytes() + (self.dk.len() + self.dv.len() + self.row.len()) * size_of::<R>()
    }
}

/// A tile of keys and values, ready for any number of query blocks.
pub(super) struct KeyTile<'x, R> {
    k: Rows<'x, R>,
    kt: Right<'x, R>,
    vt: Right<'x, R>,
}

impl<'x, R: Real> KeyTile<'x, R> {
    /// Keys `j0 .. j0 + keys` of key head `kv`; v only when dp will be computed.
    #[inline(always)]
    pub fn load<T: Float<Compute = R>>(
        context: &Context<'x, T>,
        scratch: &'x mut KeyScratch<R>,
        kv: (usize, usize),
        (j0, keys): (usize, usize),
        with_v: bool,
    ) -> Self {
        let (d, dv, columns) = (context.problem.head_dim, context.problem.value_dim, padded(keys));
        let KeyScratch { k, v, kt, vt } = scratch;
        let k = rows(&context.k, kv, j0, keys, k);
        let (kt, vt) = (&mut kt[..d * columns], &mut vt[..dv * columns]);
        let one = R::from_f64(1.0);
        transpose(k, keys, one, kt, columns);
        if with_v {
            transpose(rows(&context.v, kv, j0, keys, v), keys, one, vt, columns);
        }
        KeyTile { k, kt: Right { data: kt, row: columns }, vt: Right { data: vt, row: columns } }
    }
}

/// p and, if wanted, ds of one tile, in `scratch`. `each_row(i, p, gradients)` sees every row of p before dropout.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
pub(super) fn gradient_tile<'x, T: Float, S: Simd>(
    simd: S,
    context: &Context<'x, T>,
    saved: &Saved<'x, T>,
    keys: &KeyTile<'_, T::Compute>,
    (tile, kind): (&Tile, TileKind),
    scratch: &'x mut TileScratch<T::Compute>,
    with_ds: bool,
    mut each_row: impl FnMut(usize, &[T::Compute], RowGradients<'_, T::Compute>),
) -> GradientTile<'x, T::Compute> {
    let (b, h) = (tile.b, tile.h);
    let problem = context.problem;
    let TileScratch { q, scaled_q, do_, p, ds, slope_of_cap, multipliers, for_score, for_parameter } = scratch;
    let q = rows(&context.q, (b, h), tile.i0, tile.rows, q);
    // As the forward scales them: a key that is alone must get the score again, bit for bit, for its p to be 1.
    let q = scaled(q, tile.rows, problem.head_dim, context.scale, scaled_q);
    let do_ = rows(&saved.do_, (b, h), tile.i0, tile.rows, do_);
    let shape = Shape { m: tile.rows, n: padded(tile.keys), k: problem.head_dim };
    product(simd, (p, BK), q.left(), keys.kt, shape, false);
    if with_ds {
        product(simd, (ds, BK), do_.left(), keys.vt, Shape { k: problem.value_dim, ..shape }, false);
    }
    let dropout = problem.dropout.map(|dropout| HeadDropout::new(&dropout, problem, b, h));
    let mut hides = kind == TileKind::Partial;
    for (r, (p, ds)) in p.chunks_exact_mut(BK).zip(ds.chunks_exact_mut(BK)).take(tile.rows).enumerate() {
        let i = tile.i0 + r;
        let row = (b * problem.heads_q + h) * problem.seq_q + i;
        let (lse, delta, norm) = (saved.lse[row], saved.delta[row], saved.norm[row]);
        if lse == T::Compute::NEG_INFINITY {
            hides = true;
            p.fill(T::Compute::default());
            ds.fill(T::Compute::default());
            continue;
        }
        if context.has_score_functions() {
            context.score_row::<S>(&mut p[..tile.keys], slope_of_cap, tile, i);
            context.function_row(&mut p[..tile.keys], for_score, for_parameter, (tile, kind), i);
        }
        let vectors = ..padded(tile.keys);
        if let Some(dropout) = &dropout {
            dropout.multipliers(i, tile.j0, &mut multipliers[vectors]);
            ds[vectors].iter_mut().zip(&*multipliers).for_each(|(ds, &multiplier)| *ds *= multiplier);
        }
        gradient_row::<_, S>(&mut p[vectors], &mut ds[vectors], lse, norm, delta);
        let (p, ds) = (&mut p[..tile.keys], &mut ds[..tile.keys]);
        if kind == TileKind::Partial {
            context.hide_row(p, ds, tile, i);
        }
        if context.function.is_some() {
            let (for_score, for_parameter) = (&mut for_score[..tile.keys], &mut for_parameter[..tile.keys]);
            for (derivative, ds) in for_score.iter_mut().chain(&mut *for_parameter).zip(ds.iter().chain(&*ds)) {
                *derivative *= *ds;
            }
            each_row(i, p, RowGradients { value: ds, score: for_score, parameter: for_parameter });
            ds.copy_from_slice(for_score);
        } else {
            each_row(i, p, RowGradients { value: ds, score: ds, parameter: &[] });
        }
        if dropout.is_some() {
            p.iter_mut().zip(&*multipliers).for_each(|(p, &multiplier)| *p *= multiplier);
        }
        if problem.softcap.is_some() {
            ds.iter_mut().zip(slope_of_cap.iter()).for_each(|(ds, &derivative)| *ds *= derivative);
        }
    }
    GradientTile { q, do_, p, ds, hides }
}

/// Gradients along a row of a tile.
pub(super) struct RowGradients<'x, R> {
    /// Of the scores that the softmax saw.
    pub value: &'x [R],
    /// Of the scores before the user's function, and so of what the other functions added, the softcap excepted.
    pub score: &'x [R],
    /// Each score's share of the gradient of the parameter that it read; empty without a function.
    pub parameter: &'x [R],
}

/// Result of [`gradient_tile`].
pub(super) struct GradientTile<'x, R> {
    q: Rows<'x, R>,
    do_: Rows<'x, R>,
    /// Probabilities times dropout's multiplier, `[BQ, BK]`.
    p: &'x [R],
    ds: &'x [R],
    /// Whether some query of the tile does not see some key of it.
    hides: bool,
}

/// `p = exp(s − lse) · norm` and `ds = p ∘ (dp − delta)`, where s and dp stood. Vectors at a time: the rows are padded
/// by elements that nobody reads.
#[inline(always)]
fn gradient_row<R: Real, S: Simd>(p: &mut [R], ds: &mut [R], lse: R, norm: R, delta: R) {
    for (p_out, ds_out) in p.as_chunks_mut::<PAD>().0.iter_mut().zip(ds.as_chunks_mut::<PAD>().0) {
        let (mut p, mut ds) = (*p_out, *ds_out);
        for (p, ds) in p.iter_mut().zip(&mut ds) {
            *p = (*p - lse).exp::<S>() * norm;
            *ds = *p * (*ds - delta);
        }
        (*p_out, *ds_out) = (p, ds);
    }
}

/// Where a sweep adds its gradients; what is `None` is not computed.
pub(super) struct Targets<'x, T: Float> {
    /// `[heads, queries, D]`, added to, not yet times the scale.
    pub dq: Option<&'x mut [T::Compute]>,
    /// `[keys, D]`, overwritten.
    pub dk: Option<&'x mut [T]>,
    /// `[keys, Dv]`, overwritten.
    pub dv: Option<&'x mut [T]>,
    /// `[heads, queries / BQ]`, added to: sums of `ds · distance`.
    pub slopes: Option<&'x mut [f64]>,
    /// `[heads, queries, Skv]`, overwritten where a key is seen; for a bias that is broadcast in no dimension.
    pub bias: Option<&'x mut [T]>,
}

/// The tiles of some query heads of one key head: `heads` × `queries` × `keys`, key tiles outermost. Ranges start at
/// multiples of the tile sizes, so every sweep meets the same tiles, and each sum grows in the same order whatever the
/// ranges are.
pub(super) struct Sweep<'s, 'a, T: Float> {
    pub context: &'s Context<'a, T>,
    pub saved: &'s Saved<'a, T>,
    pub scratch: &'s mut Scratch<T::Compute>,
    pub b: usize,
    pub heads: Range<usize>,
    pub queries: Range<usize>,
    pub keys: Range<usize>,
    pub targets: Targets<'s, T>,
}

impl<T: Float> WithSimd for Sweep<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Sweep { context, saved, scratch, b, heads, queries, keys, mut targets } = self;
        let end = keys.end.min(context.keys(b));
        let mut next = keys.start;
        while next < end {
            let j0 = next;
            next = context.end_of_keys(j0, BK, end);
            let tile = Tile { b, h: heads.start, i0: 0, rows: 0, j0, keys: next - j0, bitmap: None };
            scratch.walk.clear();
            for h in heads.clone() {
                context.list_queries(&Tile { h, ..tile }, &queries, BQ, &mut scratch.walk);
            }
            if scratch.walk.is_empty() {
                continue;
            }
            key_tile(simd, context, saved, scratch, (&heads, &queries), &tile, &mut targets);
            let at = j0 - keys.start;
            let Problem { head_dim, value_dim, .. } = *context.problem;
            store(&scratch.dk, tile.keys, head_dim, at, &mut scratch.row, &mut targets.dk);
            store(&scratch.dv, tile.keys, value_dim, at, &mut scratch.row, &mut targets.dv);
        }
    }
}

/// `out[at + j] = sums[j]`.
fn store<T: Float>(
    sums: &[T::Compute],
    keys: usize,
    width: usize,
    at: usize,
    row: &mut [T::Compute],
    out: &mut Option<&mut [T]>,
) {
    let Some(out) = out else { return };
    let out = out[at * width..].chunks_exact_mut(width).take(keys);
    for (sums, out) in sums.chunks_exact(padded(width)).zip(out) {
        let row = &mut row[..width];
        row.iter_mut().zip(sums).for_each(|(x, &sum)| *x = sum);
        T::narrow_slice(row, out);
    }
}

/// One key tile against the query blocks of the sweep that see it.
#[inline(always)]
fn key_tile<T: Float, S: Simd>(
    simd: S,
    context: &Context<'_, T>,
    saved: &Saved<'_, T>,
    scratch: &mut Scratch<T::Compute>,
    (heads, queries): (&Range<usize>, &Range<usize>),
    tile: &Tile,
    targets: &mut Targets<'_, T>,
) {
    let problem = context.problem;
    let (d, dv) = (problem.head_dim, problem.value_dim);
    let with_ds = targets.dq.is_some() || targets.dk.is_some() || targets.slopes.is_some() || targets.bias.is_some();
    let Scratch { keys, tile: tile_scratch, dk: dk_sum, dv: dv_sum, walk, .. } = scratch;
    dk_sum.fill(T::Compute::default());
    dv_sum.fill(T::Compute::default());
    let kv = (tile.b, tile.h / problem.group());
    let keys = KeyTile::load(context, keys, kv, (tile.j0, tile.keys), with_ds);
    for &(tile, kind) in walk.iter() {
        let h = tile.h;
        let mut slope_sum = 0.0;
        let row_of = |i: usize| (h - heads.start) * queries.len() + i - queries.start;
        let result = gradient_tile(simd, context, saved, &keys, (&tile, kind), tile_scratch, with_ds, |i, _, row| {
            let ds = row.score;
            if targets.slopes.is_some() {
                slope_sum += context.distance_sum(ds, &tile, i);
            }
            if let Some(bias) = &mut targets.bias {
                T::narrow_slice(ds, &mut bias[row_of(i) * problem.seq_kv + tile.j0..][..ds.len()]);
            }
        });
        if let Some(slopes) = &mut targets.slopes {
            slopes[(h - heads.start) * queries.len().div_ceil(BQ) + (tile.i0 - queries.start) / BQ] += slope_sum;
        }
        let GradientTile { q, do_, p, ds, hides } = result;
        let sees = |r, j| saved.alive(context, &tile, r) && context.visible(&tile, tile.i0 + r, tile.j0 + j);
        let across = Shape { m: tile.keys, n: 0, k: tile.rows };
        if targets.dv.is_some() {
            let (sum, p) = ((&mut dv_sum[..], padded(dv)), Left { data: p, row: 1, col: BK });
            if hides && !all_finite(do_, tile.rows, dv) {
                product_where(sum, p, do_.right(), Shape { n: dv, ..across }, |j, _, r| sees(r, j));
            } else {
                product(simd, sum, p, do_.right(), Shape { n: padded(dv), ..across }, true);
            }
        }
        if targets.dk.is_some() {
            let (sum, dst) = ((&mut dk_sum[..], padded(d)), Left { data: ds, row: 1, col: BK });
            if hides && !all_finite(q, tile.rows, d) {
                product_where(sum, dst, q.right(), Shape { n: d, ..across }, |j, _, r| sees(r, j));
            } else {
                product(simd, sum, dst, q.right(), Shape { n: padded(d), ..across }, true);
            }
        }
        if let Some(dq) = &mut targets.dq {
            let sum = (&mut dq[row_of(tile.i0) * d..][..tile.rows * d], d);
            let (ds, shape) = (Left { data: ds, row: BK, col: 1 }, Shape { m: tile.rows, n: d, k: tile.keys });
            if hides && !all_finite(keys.k, tile.keys, d) {
                product_where(sum, ds, keys.k.right(), shape, |r, _, j| sees(r, j));
            } else {
                product(simd, sum, ds, keys.k.right(), shape, true);
            }
        }
    }
}

impl<T: Float> Saved<'_, T> {
    /// Whether query `r` of the tile sees anything at all.
    fn alive(&self, context: &Context<'_, T>, tile: &Tile, r: usize) -> bool {
        let problem = context.problem;
        self.lse[(tile.b * problem.heads_q + tile.h) * problem.seq_q + tile.i0 + r] != T::Compute::NEG_INFINITY
    }
}
