//! Forward: `o = softmax(f(scale · q kᵀ)) v` with an online softmax, one block of queries at a time.
//!
//! Source: FlashAttention-2 (Dao, arXiv 2307.08691), Algorithm 1. A task is a block of `BQ` queries of one head; it
//! walks the key tiles that its queries can see. Everything of a block lies transposed, keys or value dimensions down
//! and queries across:
//!
//! ```text
//! sᵀ[j, i] = Σ_d k[j, d] · (scale · q)ᵀ[d, i]      oᵀ[d, i] += Σ_j vᵀ[d, j] · pᵀ[j, i]
//! ```
//!
//! so that k and v are read where they are, one broadcast element at a time, and the softmax runs down the columns:
//! maxima and sums are vectors over queries, and nothing is ever reduced across the lanes of a vector.

use flashover_kernels::launch_log::{self, Launch};
use flashover_kernels::mask::TileKind;
use flashover_kernels::problem::Problem;
use pulp::{Arch, Simd, WithSimd};

use super::context::{Context, HeadDropout, Tile};
use super::gemm::{Right, Shape, product, product_where};
use super::parallel;
use super::real::{Float, PAD, Real, padded};
use super::tiles::{all_finite, rows, rows_scratch, transpose};
use super::{Inputs, simd_name};

/// Queries of a block.
pub(super) const BQ: usize = 64;
/// Keys of a tile.
pub(super) const BK: usize = 128;
/// How far the maximum of a row may grow before what was accumulated is rescaled: probabilities then reach `e⁸` instead
/// of 1, which f32 does not mind, and most tiles need no rescaling (FlashAttention-4 does the same).
const SLACK: f64 = 8.0;

/// Computes `o` `[B, Hq, Sq, Dv]` and, if wanted, `lse` `[B, Hq, Sq]`; every element of both is written.
///
/// # Panics
/// When operands or results do not have the shapes that the problem says.
pub fn forward<T: Float>(problem: &Problem, inputs: &Inputs<'_, T>, o: &mut [T], lse: Option<&mut [f32]>) {
    let context = Context::new(problem, inputs);
    let heads = problem.batch * problem.heads_q;
    assert_eq!(o.len(), heads * problem.seq_q * problem.value_dim, "elements of o");
    assert!(lse.as_ref().is_none_or(|lse| lse.len() == heads * problem.seq_q), "elements of lse");
    launch_log::note(|| launch::<T>(problem));
    if problem.is_empty() {
        return;
    }
    let bq = context.block_queries(BQ);
    let mut lse = lse.map(|lse| lse.chunks_mut(problem.seq_q));
    let mut tasks = Vec::with_capacity(heads * problem.seq_q.div_ceil(bq));
    for (head, o) in o.chunks_mut(problem.seq_q * problem.value_dim).enumerate() {
        let mut lse = lse.as_mut().and_then(Iterator::next).map(|lse| lse.chunks_mut(bq));
        for (block, o) in o.chunks_mut(bq * problem.value_dim).enumerate() {
            tasks.push((head, block * bq, o, lse.as_mut().and_then(Iterator::next)));
        }
    }
    let arch = Arch::new();
    let work = problem.seq_q * problem.seq_kv * (problem.head_dim + problem.value_dim) * heads;
    parallel::for_each(
        tasks.into_iter(),
        work,
        || Scratch::new(problem),
        |scratch, (head, i0, o, lse)| {
            let rows = o.len() / problem.value_dim;
            let (b, h) = (head / problem.heads_q, head % problem.heads_q);
            arch.dispatch(Block { context: &context, scratch, b, h, i0, rows, values: true });
            scratch.write_o(o, context.problem);
            for (i, lse) in lse.into_iter().flatten().enumerate() {
                *lse = scratch.lse(i).to_f64() as f32;
            }
        },
    );
}

/// Row statistics in the compute type: what `lse` is before it becomes f32, `[B, Hq, Sq]`. A backward in f64 needs
/// them; the f32 `lse` would cost it half of its digits.
pub(super) fn statistics<T: Float>(context: &Context<'_, T>) -> Vec<T::Compute> {
    let problem = context.problem;
    let mut lse = vec![T::Compute::default(); problem.batch * problem.heads_q * problem.seq_q];
    let bq = context.block_queries(BQ);
    let tasks: Vec<_> = lse
        .chunks_mut(problem.seq_q)
        .enumerate()
        .flat_map(|(head, lse)| lse.chunks_mut(bq).enumerate().map(move |(block, lse)| (head, block * bq, lse)))
        .collect();
    let arch = Arch::new();
    let work = problem.seq_q * problem.seq_kv * problem.head_dim * problem.batch * problem.heads_q;
    parallel::for_each(
        tasks.into_iter(),
        work,
        || Scratch::new(problem),
        |scratch, (head, i0, lse)| {
            let (b, h, rows) = (head / problem.heads_q, head % problem.heads_q, lse.len());
            arch.dispatch(Block { context, scratch, b, h, i0, rows, values: false });
            for (i, lse) in lse.iter_mut().enumerate() {
                *lse = scratch.lse(i);
            }
        },
    );
    lse
}

/// The launch that [`forward`] notes.
pub(super) fn launch<T: Float>(problem: &Problem) -> Launch {
    Launch {
        kernel: "flex_forward",
        config: format!("bq={BQ} bk={BK} simd={}", simd_name()),
        bindings: 0,
        shared_bytes: 0,
        units: 0,
        scratch_bytes: rayon::current_num_threads() * Scratch::<T::Compute>::new(problem).bytes(),
    }
}

/// What a thread needs for one block.
struct Scratch<R> {
    /// Rows of q, k or v, where they cannot be read in place.
    rows: Vec<R>,
    /// `scale · qᵀ`, `[D, BQ]`.
    qt: Vec<R>,
    /// Scores, then probabilities, `[BK, BQ]`.
    s: Vec<R>,
    /// Unnormalised output, `[Dv, BQ]`.
    ot: Vec<R>,
    softmax: Softmax<R>,
    columns: usize,
    /// The key tiles of a block.
    walk: Vec<(Tile, TileKind)>,
}

/// Online softmax of the columns of a block.
struct Softmax<R> {
    /// What is subtracted from the scores: the running maximum less at most [`SLACK`]; `−∞` before any key, `NaN` never.
    m: [R; BQ],
    /// Running sum of `exp(s − m)`.
    l: [R; BQ],
    /// Factor of what was accumulated under the maximum before the last tile.
    rescale: [R; BQ],
}

impl<R: Real> Scratch<R> {
    fn new(problem: &Problem) -> Self {
        let zeros = |n: usize| vec![R::default(); n];
        let (d, dv) = (problem.head_dim, problem.value_dim);
        let zero = [R::default(); BQ];
        Scratch {
            rows: zeros(rows_scratch(BQ.max(BK), d.max(dv))),
            qt: zeros(d * BQ),
            s: zeros(BK * BQ),
            ot: zeros(dv * BQ),
            softmax: Softmax { m: zero, l: zero, rescale: zero },
            columns: 0,
            walk: Vec::new(),
        }
    }

    fn bytes(&self) -> usize {
        let elements = self.rows.len() + self.qt.len() + self.s.len() + self.ot.len();
        elements * size_of::<R>() + size_of::<Softmax<R>>()
    }

    /// Log-sum-exp of query `i` of the block.
    fn lse(&self, i: usize) -> R {
        let (m, l) = (self.softmax.m[i], self.softmax.l[i]);
        if l == R::default() { R::NEG_INFINITY } else { m + l.ln() }
    }

    /// `o = oᵀ / l`, transposed back; dropout's factor is applied here too.
    fn write_o<T: Float<Compute = R>>(&mut self, o: &mut [T], problem: &Problem) {
        /// Elements of an output that are taken at a time, of [`PAD`] queries: what the compiler makes shuffles of.
        const STEP: usize = 4;
        let (columns, dv) = (self.columns, problem.value_dim);
        let factor = R::from_f64(problem.dropout.map_or(1.0, |dropout| dropout.factor()));
        for (first, o) in o.chunks_mut(PAD * dv).enumerate().map(|(n, o)| (n * PAD, o)) {
            let sums: [R; PAD] = std::array::from_fn(|r| self.softmax.l[first + r]);
            let factors = sums.map(|l| factor / l);
            // A query that saw nothing has zeros, whatever stood among the values of hidden keys.
            let output = |r: usize, x: R| if sums[r] == R::default() { R::default() } else { x * factors[r] };
            let whole = dv / STEP * STEP;
            for d in (0..whole).step_by(STEP) {
                let block: [[R; PAD]; STEP] = std::array::from_fn(|e| {
                    let (lanes, _) = self.ot[(d + e) * columns + first..].split_first_chunk().expect("padded");
                    *lanes
                });
                for (r, row) in self.rows.chunks_exact_mut(dv).take(PAD).enumerate() {
                    let (out, _) = row[d..].split_first_chunk_mut::<STEP>().expect("a row of outputs");
                    *out = std::array::from_fn(|e| output(r, block[e][r]));
                }
            }
            for d in whole..dv {
                for r in 0..PAD {
                    self.rows[r * dv + d] = output(r, self.ot[d * columns + first + r]);
                }
            }
            T::narrow_slice(&self.rows[..o.len()], o);
        }
    }
}

/// One block of queries against all keys that it can see; `values: false` leaves out the product with v.
struct Block<'s, 'a, T: Float> {
    context: &'s Context<'a, T>,
    scratch: &'s mut Scratch<T::Compute>,
    b: usize,
    h: usize,
    i0: usize,
    rows: usize,
    values: bool,
}

impl<T: Float> WithSimd for Block<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Block { context, scratch, b, h, i0, rows: queries, values } = self;
        let (d, dv) = (context.problem.head_dim, context.problem.value_dim);
        let kv = (b, h / context.problem.group());
        let columns = padded(queries);
        scratch.columns = columns;
        let Scratch { rows: copies, qt, s, ot, softmax, walk, .. } = scratch;

        let qt = &mut qt[..d * columns];
        transpose(rows(&context.q, (b, h), i0, queries, copies), queries, context.scale, qt, columns);
        let qt = Right { data: qt, row: columns };
        softmax.start::<S>(context.sinks.map(|sinks| sinks[h]));
        ot[..dv * columns].fill(T::Compute::default());
        let dropout = context.problem.dropout.map(|dropout| HeadDropout::new(&dropout, context.problem, b, h));
        let mut row_hash = [0; BQ];
        if let Some(dropout) = dropout {
            (0..queries).for_each(|i| row_hash[i] = dropout.row(i0 + i));
        }

        let end = context.keys_seen(b, i0 + queries - 1);
        let block = Tile { b, h, i0, rows: queries, j0: 0, keys: 0, bitmap: None };
        context.list_keys(&block, BK, end, walk);
        for &(tile, kind) in walk.iter() {
            let j0 = tile.j0;
            let s = &mut s[..tile.keys * columns];
            let k = rows(&context.k, kv, j0, tile.keys, copies);
            product(simd, (s, columns), k.left(), qt, Shape { m: tile.keys, n: columns, k: d }, false);
            if context.has_score_functions() {
                context.score_columns::<S>(s, columns, &tile);
            }
            if kind == TileKind::Partial {
                context.hide_columns(s, columns, &tile);
            }
            if softmax.update::<S>(s, columns) && values {
                for ot in ot[..dv * columns].chunks_exact_mut(columns) {
                    ot.iter_mut().zip(&softmax.rescale).for_each(|(ot, &rescale)| *ot *= rescale);
                }
            }
            if !values {
                continue;
            }
            if let Some(dropout) = dropout {
                drop_columns(s, columns, &dropout, &row_hash, j0);
            }
            let v = rows(&context.v, kv, j0, tile.keys, copies);
            let p = Right { data: s, row: columns };
            let shape = Shape { m: dv, n: columns, k: tile.keys };
            if kind == TileKind::Partial && !all_finite(v, tile.keys, dv) {
                let sees = |_, i, j| context.visible(&tile, i0 + i, j0 + j);
                product_where((ot, columns), v.left_transposed(), p, Shape { n: queries, ..shape }, sees);
            } else {
                product(simd, (ot, columns), v.left_transposed(), p, shape, true);
            }
        }
    }
}

impl<R: Real> Softmax<R> {
    /// The state before any key. A learned sink counts as a score without a value.
    #[inline(always)]
    fn start<S: Simd>(&mut self, sink: Option<R>) {
        let (m, l) = match sink {
            // exp(sink − sink), which is 1, or NaN for an infinite sink. A NaN sink makes the sum NaN; the maximum stays
            // a number.
            Some(sink) if sink > R::NEG_INFINITY => (sink, (sink * R::default()).exp::<S>()),
            Some(sink) => (R::NEG_INFINITY, sink.exp::<S>()),
            None => (R::NEG_INFINITY, R::default()),
        };
        self.m.fill(m);
        self.l.fill(l);
    }

    /// Scores become `exp(s − m)` under the new m; whether any m moved, so that [`Self::rescale`] matters.
    ///
    /// Hidden keys are −∞. A column of nothing else keeps m = −∞ and l = 0. NaN does not enter m but does enter l.
    #[inline(always)]
    fn update<S: Simd>(&mut self, s: &mut [R], columns: usize) -> bool {
        let mut moved = false;
        // A vector of columns at a time, so that what runs down the keys stays in registers.
        for c in (0..columns).step_by(PAD) {
            let (m, l, rescale) = (lanes(&mut self.m, c), lanes(&mut self.l, c), lanes(&mut self.rescale, c));
            let mut top = *m;
            for s in s.chunks_exact_mut(columns) {
                for (top, &s) in top.iter_mut().zip(lanes(s, c).iter()) {
                    *top = if s > *top { s } else { *top };
                }
            }
            let (mut pivot, mut sum, mut stays) = (top, [R::default(); PAD], true);
            for (((pivot, &top), m), rescale) in pivot.iter_mut().zip(&top).zip(m.iter_mut()).zip(rescale.iter_mut()) {
                let grown = if top > *m + R::from_f64(SLACK) { top } else { *m };
                // −∞ − −∞ would be NaN.
                *pivot = if grown == R::NEG_INFINITY { R::default() } else { grown };
                *rescale = (*m - *pivot).exp::<S>();
                stays &= grown == *m;
                *m = grown;
            }
            for s in s.chunks_exact_mut(columns) {
                let out = lanes(s, c);
                let mut p = *out;
                for ((p, &pivot), sum) in p.iter_mut().zip(&pivot).zip(&mut sum) {
                    *p = (*p - pivot).exp::<S>();
                    *sum += *p;
                }
                *out = p;
            }
            for ((l, &rescale), sum) in l.iter_mut().zip(rescale.iter()).zip(sum) {
                *l = if stays { *l + sum } else { *l * rescale + sum };
            }
            moved |= !stays;
        }
        moved
    }
}

/// Columns `c .. c + PAD`.
#[inline(always)]
fn lanes<R>(row: &mut [R], c: usize) -> &mut [R; PAD] {
    let (lanes, _) = row[c..].split_first_chunk_mut().expect("rows are padded to whole vectors");
    lanes
}

/// Zeroes the probabilities that dropout takes.
#[inline(always)]
fn drop_columns<R: Real>(p: &mut [R], columns: usize, dropout: &HeadDropout, row_hash: &[u32; BQ], j0: usize) {
    for (j, p) in p.chunks_exact_mut(columns).enumerate() {
        let key = HeadDropout::key(j0 + j);
        for (p, &row) in p.iter_mut().zip(row_hash) {
            *p = if dropout.keeps(row, key) { *p } else { R::default() };
        }
    }
}
