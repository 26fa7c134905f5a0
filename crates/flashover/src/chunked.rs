//! Attention composed of a backend's own operations, for backends without a kernel: a chunk of queries at a time
//! against all keys, so that memory stays O(Sq + Skv), never their product. Arithmetic in f32 (f64 for f64). A score function of
//! the user's is called on the host: a chunk's scores go there and back.

use burn::backend::tensor::{BoolTensor, FloatTensor};
use burn::backend::{Backend, TensorMetadata, get_or_init_device_settings};
use burn::tensor::{BoolDType, FloatDType, IntDType, Shape, Slice, TensorData};
use flashover_kernels::block_plan::BlockPlan;
use flashover_kernels::operands::{Gradients, Wanted};
use flashover_kernels::problem::{Element, Problem};
use flashover_kernels::score::{Along, Derivatives, Position, Row, ScoreUse};

use crate::SparsePlan;
use crate::backend::{AttentionBackend, Extras, ForwardState, InputGradients, MaybeFloat, Plan};

/// Queries of a chunk: a chunk's scores are `[B, Hq, CHUNK, Skv]`.
const CHUNK: usize = 64;

/// Stands for −∞ where a difference with −∞ must not become NaN.
const LOWEST: f64 = -3.0e38;

macro_rules! chunked_backend {
    ($($feature:literal => $backend:path),+ $(,)?) => {$(
        #[cfg(feature = $feature)]
        #[allow(deprecated)]
        impl AttentionBackend for $backend {
            fn flashover_forward(
                q: FloatTensor<Self>,
                k: FloatTensor<Self>,
                v: FloatTensor<Self>,
                extras: Extras<Self>,
                plan: Plan,
            ) -> FloatTensor<Self> {
                forward::<Self>(q, k, v, extras, &plan).0
            }

            fn flashover_forward_state(
                q: FloatTensor<Self>,
                k: FloatTensor<Self>,
                v: FloatTensor<Self>,
                extras: Extras<Self>,
                plan: Plan,
                _for_backward: bool,
            ) -> ForwardState<Self> {
                let (o, lse) = forward::<Self>(q, k, v, extras, &plan);
                ForwardState { o, lse, rest: MaybeFloat::Absent }
            }

            fn flashover_backward(
                q: FloatTensor<Self>,
                k: FloatTensor<Self>,
                v: FloatTensor<Self>,
                extras: Extras<Self>,
                state: ForwardState<Self>,
                do_: FloatTensor<Self>,
                dlse: MaybeFloat<Self>,
                plan: Plan,
                wanted: Wanted,
            ) -> InputGradients<Self> {
                let composition = Composition::<Self>::new(q, k, v, extras, &plan);
                composition.backward(state.lse, do_, dlse.into_option(), wanted)
            }
        }
    )+};
}

chunked_backend! {
    "ndarray" => burn::backend::NdArray,
    "tch" => burn::backend::LibTorch,
    // With `fusion` this type is Burn's router within Fusion, and the composition runs on the fused operations: a custom
    // operation in a fused stream would be sent to the server, which does not know it.
    "remote" => burn::backend::Remote,
}

fn forward<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    extras: Extras<B>,
    plan: &Plan,
) -> (FloatTensor<B>, FloatTensor<B>) {
    Composition::<B>::new(q, k, v, extras, plan).forward()
}

/// The operands in the type of the arithmetic.
struct Composition<'a, B: Backend> {
    problem: &'a Problem,
    blocks: Option<&'a BlockPlan>,
    extras: Extras<B>,
    device: B::Device,
    q: FloatTensor<B>,
    /// Keys `[B, Hkv, Skv, D]` and values.
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    compute: FloatDType,
    booleans: BoolDType,
}

/// The scores of a chunk, `[B, Hq, c, Skv]`.
struct Scores<B: Backend> {
    /// After everything, −∞ where hidden.
    s: FloatTensor<B>,
    /// `tanh(s / cap)` of the softcap, if there is one.
    tanh: Option<FloatTensor<B>>,
    /// `|a − j|`, `[1, 1, c, Skv]`, under ALiBi.
    distance: Option<FloatTensor<B>>,
    /// Derivatives of the user's function for the score and for the parameter, if there is one; 0 where hidden.
    function: Option<[FloatTensor<B>; 2]>,
}

impl<'a, B: Backend> Composition<'a, B> {
    fn new(q: FloatTensor<B>, k: FloatTensor<B>, v: FloatTensor<B>, extras: Extras<B>, plan: &'a Plan) -> Self {
        let (problem, blocks) = (&plan.problem, plan.blocks.as_ref().map(SparsePlan::block_plan));
        let device = q.device();
        let compute = if problem.element == Element::F64 { FloatDType::F64 } else { FloatDType::F32 };
        let booleans = get_or_init_device_settings::<B>(&device).bool_dtype;
        let (k, v) = (B::float_cast(k, compute), B::float_cast(v, compute));
        Composition { problem, blocks, extras, device, q, k, v, compute, booleans }
    }

    fn forward(&self) -> (FloatTensor<B>, FloatTensor<B>) {
        let p = self.problem;
        if p.is_empty() || p.seq_kv == 0 {
            return (self.zeros(&p.output_shape(), self.storage()), self.lse_without_keys());
        }
        let (mut os, mut lses) = (Vec::new(), Vec::new());
        for i0 in (0..p.seq_q).step_by(CHUNK) {
            let rows = i0..(i0 + CHUNK).min(p.seq_q);
            let s = self.scores(&rows).s;
            let lse = self.log_sum_exp(s.clone());
            let probabilities = self.probabilities(s, lse.clone());
            let dropped = self.dropped(probabilities, &rows);
            let o = B::float_matmul(self.grouped(dropped), self.v.clone());
            let o = B::float_reshape(o, Shape::from([p.batch, p.heads_q, rows.len(), p.value_dim]));
            os.push(B::float_cast(o, self.storage()));
            lses.push(B::float_cast(lse, FloatDType::F32));
        }
        let lse = B::float_cat(lses, 2);
        (B::float_cat(os, 2), B::float_reshape(lse, Shape::from(p.lse_shape())))
    }

    fn backward(
        &self,
        lse: FloatTensor<B>,
        do_: FloatTensor<B>,
        dlse: Option<FloatTensor<B>>,
        wanted: Wanted,
    ) -> InputGradients<B> {
        let p = self.problem;
        let zeros = |shape: &[usize], wanted: bool| wanted.then(|| self.zeros(shape, self.compute));
        let bias_shape = p.bias.unwrap_or([1; 4]);
        let mut dq = Vec::new();
        let mut dk = zeros(&[p.batch, p.heads_kv, p.seq_kv, p.head_dim], wanted.k);
        let mut dv = zeros(&[p.batch, p.heads_kv, p.seq_kv, p.value_dim], wanted.v);
        let mut dbias = Vec::new();
        let mut dslopes = zeros(&[p.heads_q], wanted.alibi_slopes);
        let mut dsinks = zeros(&[p.heads_q], wanted.learned_sinks);
        let mut dparameters = wanted.score_parameters.then(|| vec![0.0; p.score.map_or(0, |score| score.parameters)]);
        let column = Shape::from([p.batch, p.heads_q, p.seq_q, 1]);
        let lse = B::float_cast(B::float_reshape(lse, column.clone()), self.compute);
        let dlse = dlse.map(|dlse| B::float_cast(B::float_reshape(dlse, column), self.compute));
        if p.is_empty() || p.seq_kv == 0 {
            // Without a key, a learned sink is all that the log-sum-exp has.
            if let (Some(sum), Some(dlse), false) = (dsinks.as_mut(), dlse, p.is_empty()) {
                *sum = self.per_head(dlse);
            }
            let dq = wanted.q.then(|| self.zeros(&[p.batch, p.heads_q, p.seq_q, p.head_dim], self.compute));
            let dbias = wanted.bias.then(|| self.zeros(&bias_shape, self.compute));
            let score_parameters = dparameters.map(|x| self.vector(x));
            let (alibi_slopes, learned_sinks) = (dslopes, dsinks);
            return self.stored(Gradients {
                q: dq,
                k: dk,
                v: dv,
                bias: dbias,
                alibi_slopes,
                learned_sinks,
                score_parameters,
            });
        }
        for i0 in (0..p.seq_q).step_by(CHUNK) {
            let rows = i0..(i0 + CHUNK).min(p.seq_q);
            let of = |tensor: &FloatTensor<B>| B::float_cast(self.rows(tensor, &rows), self.compute);
            let Scores { s, tanh, distance, function } = self.scores(&rows);
            let lse = of(&lse);
            let probabilities = self.probabilities(s, lse.clone());
            let do_ = self.grouped(of(&do_));
            if let Some(sum) = dv.take() {
                let dropped = self.grouped(self.dropped(probabilities.clone(), &rows));
                dv = Some(B::float_add(sum, B::float_matmul(B::float_transpose(dropped), do_.clone())));
            }
            let of_scores = wanted.q || wanted.k || wanted.bias || wanted.alibi_slopes || wanted.score_parameters;
            if !(of_scores || wanted.learned_sinks) {
                continue;
            }
            let dp = B::float_matmul(do_, B::float_transpose(self.v.clone()));
            let dp = self.dropped(self.ungrouped(dp), &rows);
            // delta = rowsum(p ∘ dp) − dlse. It is rowsum(do ∘ o) as well, but the rounding of o would stand in every
            // score of the row alike, and add up in the gradients of what a head's scores share.
            let mut delta = B::float_sum_dim(B::float_mul(probabilities.clone(), dp.clone()), 3);
            if let Some(dlse) = &dlse {
                delta = B::float_sub(delta, of(dlse));
            }
            if let (Some(sum), MaybeFloat::Present(sinks)) = (dsinks.take(), &self.extras.learned_sinks) {
                let sinks = B::float_reshape(sinks.clone(), Shape::from([1, p.heads_q, 1, 1]));
                let sink = B::float_exp(B::float_sub(sinks, lse));
                dsinks = Some(B::float_sub(sum, self.per_head(B::float_mul(sink, delta.clone()))));
            }
            if !of_scores {
                continue;
            }
            // ds = p ∘ (dp − delta)
            let mut ds = B::float_mul(probabilities, B::float_sub(dp, delta));
            if let (Some([for_score, for_parameter]), Some(score)) = (function, p.score) {
                if let Some(sums) = &mut dparameters {
                    self.add_by_parameter(score, B::float_mul(ds.clone(), for_parameter), &rows, sums);
                }
                ds = B::float_mul(ds, for_score);
            }
            if wanted.bias {
                dbias.push(self.reduced(ds.clone(), bias_shape));
            }
            if let (Some(sum), Some(distance)) = (dslopes.take(), distance) {
                dslopes = Some(B::float_sub(sum, self.per_head(B::float_mul(ds.clone(), distance))));
            }
            let ds = match tanh {
                // 1 − tanh²
                Some(t) => {
                    let slope = B::float_add_scalar(B::float_neg(B::float_mul(t.clone(), t)), 1.0.into());
                    B::float_mul(ds, slope)
                }
                None => ds,
            };
            let ds = self.grouped(B::float_mul_scalar(ds, p.scale.into()));
            if wanted.q {
                let dq_rows = B::float_matmul(ds.clone(), self.k.clone());
                let shape = Shape::from([p.batch, p.heads_q, rows.len(), p.head_dim]);
                dq.push(B::float_cast(B::float_reshape(dq_rows, shape), self.storage()));
            }
            if let Some(sum) = dk.take() {
                let q = self.grouped(of(&self.q));
                dk = Some(B::float_add(sum, B::float_matmul(B::float_transpose(ds), q)));
            }
        }
        let dq = wanted.q.then(|| B::float_cat(dq, 2));
        let dbias = wanted.bias.then(|| match bias_shape[2] {
            1 => dbias.into_iter().reduce(B::float_add).expect("there is a chunk"),
            _ => B::float_cat(dbias, 2),
        });
        let score_parameters = dparameters.map(|x| self.vector(x));
        let (alibi_slopes, learned_sinks) = (dslopes, dsinks);
        self.stored(Gradients { q: dq, k: dk, v: dv, bias: dbias, alibi_slopes, learned_sinks, score_parameters })
    }

    fn scores(&self, rows: &std::ops::Range<usize>) -> Scores<B> {
        let p = self.problem;
        let q = self.grouped(B::float_cast(self.rows(&self.q, rows), self.compute));
        let s = B::float_matmul(q, B::float_transpose(self.k.clone()));
        let mut s = self.ungrouped(B::float_mul_scalar(s, p.scale.into()));
        let mut tanh = None;
        if let Some(cap) = p.softcap {
            let t = B::float_tanh(B::float_div_scalar(s, cap.into()));
            s = B::float_mul_scalar(t.clone(), cap.into());
            tanh = Some(t);
        }
        let mut distance = None;
        if let MaybeFloat::Present(slopes) = &self.extras.alibi_slopes {
            let slopes = B::float_reshape(slopes.clone(), Shape::from([1, p.heads_q, 1, 1]));
            let away = self.distances(rows);
            s = B::float_sub(s, B::float_mul(slopes, away.clone()));
            distance = Some(away);
        }
        if let MaybeFloat::Present(bias) = &self.extras.bias {
            let bias = if p.bias.is_some_and(|shape| shape[2] != 1) { self.rows(bias, rows) } else { bias.clone() };
            s = B::float_add(s, B::float_cast(bias, self.compute));
        }
        let mut function = None;
        if let (Some(score), MaybeFloat::Present(parameters)) = (p.score, &self.extras.score_parameters) {
            let [values, derivatives @ ..] = self.with_function(score, parameters, s, rows);
            (s, function) = (values, Some(derivatives));
        }
        for hidden in self.hidden(rows) {
            let hidden = B::bool_expand(hidden, s.shape());
            // What a function makes of a hidden score may be NaN, and 0 · NaN is not 0.
            function = function.map(|x| x.map(|x| B::float_mask_fill(x, hidden.clone(), 0.0.into())));
            s = B::float_mask_fill(s, hidden, f64::NEG_INFINITY.into());
        }
        Scores { s, tanh, distance, function }
    }

    /// The user's function over the scores of a chunk: its values, and its derivatives for the score and for the parameter.
    fn with_function(
        &self,
        score: ScoreUse,
        parameters: &FloatTensor<B>,
        s: FloatTensor<B>,
        rows: &std::ops::Range<usize>,
    ) -> [FloatTensor<B>; 3] {
        let shape = s.shape();
        let (parameters, mut values) = (host::<B>(parameters.clone()), host::<B>(s));
        let (mut for_score, mut for_parameter) = (vec![0.0; values.len()], vec![0.0; values.len()]);
        let keys = self.problem.seq_kv;
        let of_rows = values.chunks_mut(keys).zip(for_score.chunks_mut(keys)).zip(for_parameter.chunks_mut(keys));
        for (row, ((values, for_score), for_parameter)) in self.places(rows).zip(of_rows) {
            let to = Derivatives { score: for_score, parameter: for_parameter };
            score.code.derivatives(values, to, row, &parameters);
        }
        [values, for_score, for_parameter].map(|x| self.floats(TensorData::new(x, shape.clone())))
    }

    /// Adds the elements of `[B, Hq, c, Skv]` up, each for the parameter that its score reads.
    fn add_by_parameter(
        &self,
        score: ScoreUse,
        terms: FloatTensor<B>,
        rows: &std::ops::Range<usize>,
        sums: &mut [f64],
    ) {
        let terms = host::<B>(terms);
        for (row, terms) in self.places(rows).zip(terms.chunks(self.problem.seq_kv)) {
            for (n, &term) in terms.iter().enumerate() {
                // What is hidden may read a parameter that does not exist.
                if let Some(sum) = sums.get_mut(score.code.parameter(row.at(n)) as usize) {
                    *sum += f64::from(term);
                }
            }
        }
    }

    /// Where the rows of a chunk's scores stand, in their order.
    fn places(&self, rows: &std::ops::Range<usize>) -> impl Iterator<Item = Row> + use<B> {
        let Problem { batch, heads_q, .. } = *self.problem;
        let (alignment, rows) = (self.problem.alignment(), rows.clone());
        let heads = (0..batch as u32).flat_map(move |b| (0..heads_q as u32).map(move |h| (b, h)));
        heads.flat_map(move |(batch, head)| {
            let place = move |i: usize| Position { batch, head, a: i as i32 + alignment, j: 0 };
            rows.clone().map(move |i| Row { first: place(i), along: Along::Keys })
        })
    }

    fn floats(&self, data: TensorData) -> FloatTensor<B> {
        B::float_from_data(data.convert_dtype(self.compute.into()), &self.device)
    }

    /// The masks of a chunk, each broadcastable to `[B, Hq, c, Skv]`, `true` hides.
    fn hidden(&self, rows: &std::ops::Range<usize>) -> Vec<BoolTensor<B>> {
        let p = self.problem;
        let mut masks = Vec::new();
        if !p.band.is_unbounded() {
            let hides = |i: usize| {
                let a = i as i32 + p.alignment();
                (0..p.seq_kv as i32).map(move |j| !p.band.allows(a, j))
            };
            let data: Vec<bool> = rows.clone().flat_map(hides).collect();
            let data = TensorData::new(data, [1, 1, rows.len(), p.seq_kv]).convert_dtype(self.booleans.into());
            masks.push(B::bool_from_data(data, &self.device));
        }
        if let Some(blocks) = self.blocks {
            let [batch, heads] = [blocks.batch(), blocks.heads()];
            let mut hides = Vec::new();
            for head in 0..batch * heads {
                for i in rows.clone() {
                    hides.extend(blocks.query(head / heads, head % heads, i as u32).iter().map(|seen| !seen));
                }
            }
            let data = TensorData::new(hides, [batch as usize, heads as usize, rows.len(), p.seq_kv]);
            masks.push(B::bool_from_data(data.convert_dtype(self.booleans.into()), &self.device));
        }
        if let Some(lengths) = self.extras.key_lengths.clone().into_option() {
            let keys = B::int_arange(0..p.seq_kv as i64, &self.device, IntDType::from(lengths.dtype()));
            let keys = B::int_reshape(keys, Shape::from([1, 1, 1, p.seq_kv]));
            let lengths = B::int_reshape(lengths, Shape::from([p.batch, 1, 1, 1]));
            let shape = Shape::from([p.batch, 1, 1, p.seq_kv]);
            let (keys, lengths) = (B::int_expand(keys, shape.clone()), B::int_expand(lengths, shape));
            masks.push(B::int_greater_equal(keys, lengths, self.booleans));
        }
        if let Some(mask) = self.extras.mask.clone().into_option() {
            let slices = p.mask.is_some_and(|shape| shape[2] != 1);
            masks.push(if slices { B::bool_slice(mask, &row_slices(rows)) } else { mask });
        }
        masks
    }

    /// `|a − j|` of a chunk, `[1, 1, c, Skv]`.
    fn distances(&self, rows: &std::ops::Range<usize>) -> FloatTensor<B> {
        let p = self.problem;
        let row = |i: usize| {
            let a = i as i64 + i64::from(p.alignment());
            (0..p.seq_kv as i64).map(move |j| (a - j).abs() as f64)
        };
        let data: Vec<f64> = rows.clone().flat_map(row).collect();
        let data = TensorData::new(data, [1, 1, rows.len(), p.seq_kv]).convert_dtype(self.compute.into());
        B::float_from_data(data, &self.device)
    }

    /// Row-wise log-sum-exp `[B, Hq, c, 1]`, learned sinks included.
    fn log_sum_exp(&self, s: FloatTensor<B>) -> FloatTensor<B> {
        let m = B::float_clamp_min(B::float_max_dim(s.clone(), 3), LOWEST.into());
        let l = B::float_sum_dim(B::float_exp(B::float_sub(s, m.clone())), 3);
        let lse = B::float_add(m, B::float_log(l));
        let MaybeFloat::Present(sinks) = &self.extras.learned_sinks else { return lse };
        let sinks = B::float_reshape(sinks.clone(), Shape::from([1, self.problem.heads_q, 1, 1]));
        let sinks = B::float_expand(sinks, lse.shape());
        let sinks_lead = B::float_greater(sinks.clone(), lse.clone(), self.booleans);
        let m = B::float_mask_where(lse.clone(), sinks_lead, sinks.clone());
        let sum =
            B::float_add(B::float_exp(B::float_sub(lse, m.clone())), B::float_exp(B::float_sub(sinks, m.clone())));
        B::float_add(m, B::float_log(sum))
    }

    /// `exp(s − lse)`; 0 in rows that see nothing.
    fn probabilities(&self, s: FloatTensor<B>, lse: FloatTensor<B>) -> FloatTensor<B> {
        B::float_exp(B::float_sub(s, B::float_clamp_min(lse, LOWEST.into())))
    }

    /// Each element times 0 or `1/(1 − probability)`.
    fn dropped(&self, x: FloatTensor<B>, rows: &std::ops::Range<usize>) -> FloatTensor<B> {
        let p = self.problem;
        let Some(dropout) = p.dropout else { return x };
        let mut multipliers = Vec::with_capacity(p.batch * p.heads_q * rows.len() * p.seq_kv);
        for b in 0..p.batch as u32 {
            for h in 0..p.heads_q as u32 {
                for i in rows.start as u32..rows.end as u32 {
                    let row = (0..p.seq_kv as u32).map(|j| dropout.multiplier(b, h, p.heads_q as u32, i, j));
                    multipliers.extend(row);
                }
            }
        }
        let data = TensorData::new(multipliers, [p.batch, p.heads_q, rows.len(), p.seq_kv]);
        B::float_mul(x, B::float_from_data(data.convert_dtype(self.compute.into()), &self.device))
    }

    /// `[B, Hq, c, n]` as `[B, Hkv, group·c, n]`: the query heads of a key head stand together.
    fn grouped(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        let [b, h, c, n] = x.shape().dims::<4>();
        B::float_reshape(x, Shape::from([b, self.problem.heads_kv, h / self.problem.heads_kv * c, n]))
    }

    /// Back from [`grouped`](Self::grouped).
    fn ungrouped(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        let [b, h, c, n] = x.shape().dims::<4>();
        B::float_reshape(x, Shape::from([b, self.problem.heads_q, c * h / self.problem.heads_q, n]))
    }

    fn rows(&self, x: &FloatTensor<B>, rows: &std::ops::Range<usize>) -> FloatTensor<B> {
        B::float_slice(x.clone(), &row_slices(rows))
    }

    /// Sum of `[B, Hq, c, n]` to `[Hq]`.
    fn per_head(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        self.flat(self.reduced(x, [1, self.problem.heads_q, 1, 1]))
    }

    fn flat(&self, x: FloatTensor<B>) -> FloatTensor<B> {
        let n = x.shape().num_elements();
        B::float_reshape(x, Shape::from([n]))
    }

    /// Sum over the dimensions in which `shape` is 1.
    fn reduced(&self, x: FloatTensor<B>, shape: [usize; 4]) -> FloatTensor<B> {
        (0..4).filter(|&axis| shape[axis] == 1).fold(x, |x, axis| B::float_sum_dim(x, axis))
    }

    fn lse_without_keys(&self) -> FloatTensor<B> {
        let p = self.problem;
        let shape = Shape::from(p.lse_shape());
        match &self.extras.learned_sinks {
            MaybeFloat::Present(sinks) => {
                let sinks = B::float_reshape(sinks.clone(), Shape::from([1, p.heads_q, 1]));
                B::float_cast(B::float_expand(sinks, shape), FloatDType::F32)
            }
            MaybeFloat::Absent => B::float_full(shape, f64::NEG_INFINITY.into(), &self.device, FloatDType::F32),
        }
    }

    fn zeros(&self, shape: &[usize], dtype: FloatDType) -> FloatTensor<B> {
        B::float_zeros(Shape::from(shape.to_vec()), &self.device, dtype)
    }

    fn storage(&self) -> FloatDType {
        self.q.dtype().into()
    }

    fn vector(&self, x: Vec<f64>) -> FloatTensor<B> {
        let shape = [x.len()];
        self.floats(TensorData::new(x, shape))
    }

    /// The gradients in the element types of their operands.
    fn stored(&self, gradients: Gradients<FloatTensor<B>>) -> InputGradients<B> {
        let stored = |x: Option<FloatTensor<B>>| MaybeFloat::from_option(x.map(|x| B::float_cast(x, self.storage())));
        let Gradients { q, k, v, bias, alibi_slopes, learned_sinks, score_parameters } = gradients;
        InputGradients {
            q: stored(q),
            k: stored(k),
            v: stored(v),
            bias: stored(bias),
            alibi_slopes: MaybeFloat::from_option(alibi_slopes),
            learned_sinks: MaybeFloat::from_option(learned_sinks),
            score_parameters: MaybeFloat::from_option(score_parameters),
        }
    }
}

/// The elements of a tensor, in row-major order.
fn host<B: Backend>(tensor: FloatTensor<B>) -> Vec<f32> {
    let data = burn::tensor::read_sync(B::float_into_data(tensor));
    data.unwrap_or_else(|error| panic!("flashover: the backend gave no data for a score function: {error:?}"))
        .iter()
        .collect()
}

/// Rows of a `[_, _, Sq, _]` tensor.
fn row_slices(rows: &std::ops::Range<usize>) -> [Slice; 4] {
    [Slice::full(), Slice::full(), Slice::from(rows.clone()), Slice::full()]
}
