//! Backward: which sweeps compute the wanted gradients, and how they are shared out among threads.
//!
//! With enough key heads a task is one of them, and one sweep gives dq, dk and dv: five products a tile. Otherwise
//! dk and dv are swept by tasks of one key tile and dq by tasks of some query blocks: seven products, but any number
//! of threads. Both meet the same tiles in the same order, so the choice does not show in a single bit.

use std::ops::Range;

use flashover_kernels::launch_log::{self, Launch};
use flashover_kernels::operands::Wanted;
use flashover_kernels::problem::Problem;
use pulp::Arch;

use super::context::Context;
use super::delta::RowSums;
use super::forward::statistics;
use super::real::{Float, Real};
use super::sweep::{BK, BQ, Saved, Scratch, Sweep, Targets};
use super::view::View;
use super::{Inputs, bias_gradient, delta, pages, parallel, score_gradient, simd_name};

/// Queries of a task that computes dq alone, without a plan.
const QUERIES: usize = 4 * BQ;

/// The gradients that were wanted, each in the shape of its operand, contiguous.
#[derive(Debug, Clone)]
pub struct Gradients<T: Float> {
    /// Gradient of the queries.
    pub q: Option<Vec<T>>,
    /// Gradient of the keys.
    pub k: Option<Vec<T>>,
    /// Gradient of the values.
    pub v: Option<Vec<T>>,
    /// Gradient of the bias, in its own shape.
    pub bias: Option<Vec<T>>,
    /// Gradient of the ALiBi slopes.
    pub alibi_slopes: Option<Vec<T::Compute>>,
    /// Gradient of the learned sinks.
    pub learned_sinks: Option<Vec<T::Compute>>,
    /// Gradient of the parameters of the user's score function.
    pub score_parameters: Option<Vec<f32>>,
}

/// Gradients of attention, from what [`forward`](super::forward) gave and the gradients of it: `do_` of `o` and
/// `dlse` of `lse`.
///
/// # Panics
/// When operands do not have the shapes that the problem says, or a gradient is wanted of an operand that is not there.
pub fn backward<T: Float>(
    problem: &Problem,
    inputs: &Inputs<'_, T>,
    o: View<'_, T>,
    lse: &[f32],
    do_: View<'_, T>,
    dlse: Option<&[f32]>,
    wanted: Wanted,
) -> Gradients<T> {
    let context = Context::new(problem, inputs);
    let rows = problem.batch * problem.heads_q * problem.seq_q;
    assert_eq!((o.shape(), do_.shape()), (problem.output_shape(), problem.output_shape()), "shapes of o and do");
    assert!(lse.len() == rows && dlse.is_none_or(|dlse| dlse.len() == rows), "elements of lse and dlse");
    assert!(!wanted.bias || inputs.bias.is_some(), "gradient of a bias that is not there");
    assert!(!wanted.alibi_slopes || inputs.alibi_slopes.is_some(), "gradient of ALiBi slopes that are not there");
    assert!(!wanted.learned_sinks || inputs.learned_sinks.is_some(), "gradient of sinks that are not there");
    assert!(!wanted.score_parameters || inputs.score_parameters.is_some(), "gradient of parameters that are not there");

    let zeros = |wanted: bool, shape: [usize; 4]| wanted.then(|| pages::zeros::<T>(shape.iter().product()));
    let mut gradients = Gradients {
        q: zeros(wanted.q, inputs.q.shape()),
        k: zeros(wanted.k, inputs.k.shape()),
        v: zeros(wanted.v, inputs.v.shape()),
        bias: zeros(wanted.bias, problem.bias.unwrap_or_default()),
        alibi_slopes: wanted.alibi_slopes.then(|| vec![T::Compute::default(); problem.heads_q]),
        learned_sinks: wanted.learned_sinks.then(|| vec![T::Compute::default(); problem.heads_q]),
        score_parameters: wanted.score_parameters.then(|| vec![0.0; problem.score.map_or(0, |score| score.parameters)]),
    };
    launch_log::note(|| launch::<T>(problem, wanted));
    if problem.is_empty() {
        return gradients;
    }
    let exact_lse;
    let lse = match T::Compute::from_lse(lse) {
        Some(lse) => lse,
        None => {
            exact_lse = statistics(&context);
            &exact_lse
        }
    };
    let RowSums { delta, norm } = delta::compute(&context, do_, lse, dlse);
    let saved = Saved { do_, lse, delta: &delta, norm: &norm };
    if let Some(sinks) = &mut gradients.learned_sinks {
        sink_gradient(&context, &saved, sinks);
    }
    if problem.seq_kv > 0 {
        run(&context, &saved, &mut gradients, plan(problem, wanted));
        if let Some(parameters) = &mut gradients.score_parameters {
            score_gradient::compute(&context, &saved, parameters);
        }
    }
    gradients
}

/// Which sweeps are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Plan {
    /// Nothing but what needs no tiles.
    Nothing,
    /// One sweep a key head.
    Fused,
    /// dk and dv by key tiles, or one of them.
    Keys,
    /// dq, and what else is summed along rows of scores, by query blocks.
    Queries,
    /// First the one, then the other.
    KeysThenQueries,
}

/// Whether the bias's gradient is that of every score by itself, so that dq's sweep writes it.
fn bias_is_full(problem: &Problem) -> bool {
    problem.bias == Some(problem.score_shape())
}

fn plan(problem: &Problem, wanted: Wanted) -> Plan {
    let rows = wanted.q || wanted.alibi_slopes || (wanted.bias && bias_is_full(problem));
    match (rows, wanted.k || wanted.v) {
        (false, false) => Plan::Nothing,
        (true, false) => Plan::Queries,
        (false, true) => Plan::Keys,
        (true, true) => {
            // Fused, some threads idle in the last round; apart, seven products are computed instead of five.
            let (tasks, threads) = (problem.batch * problem.heads_kv, rayon::current_num_threads());
            if tasks.div_ceil(threads) * threads * 5 <= tasks * 7 { Plan::Fused } else { Plan::KeysThenQueries }
        }
    }
}

/// The launch that [`backward`] notes.
pub(super) fn launch<T: Float>(problem: &Problem, wanted: Wanted) -> Launch {
    let rows = problem.batch * problem.heads_q * problem.seq_q;
    let tiles = rayon::current_num_threads() * Scratch::<T::Compute>::new(problem).bytes();
    let sums = if wanted.score_parameters { score_gradient::sum_bytes(problem) } else { 0 };
    Launch {
        kernel: "flex_backward",
        config: format!("plan={:?} bq={BQ} bk={BK} simd={}", plan(problem, wanted), simd_name()),
        bindings: 0,
        shared_bytes: 0,
        units: 0,
        scratch_bytes: tiles + 3 * rows * size_of::<T::Compute>() + sums,
    }
}

/// `−Σ_{b, i} exp(sink − lse) · norm · delta`.
fn sink_gradient<T: Float>(context: &Context<'_, T>, saved: &Saved<'_, T>, gradient: &mut [T::Compute]) {
    let problem = context.problem;
    let sinks = context.sinks.unwrap_or_default();
    for (h, (gradient, &sink)) in gradient.iter_mut().zip(sinks).enumerate() {
        let mut sum = 0.0;
        for b in 0..problem.batch {
            let rows = (b * problem.heads_q + h) * problem.seq_q..(b * problem.heads_q + h + 1) * problem.seq_q;
            let statistics = saved.lse[rows.clone()].iter().zip(&saved.delta[rows.clone()]).zip(&saved.norm[rows]);
            for ((&lse, &delta), &norm) in statistics {
                // lse ≥ sink, so −∞ means that the sink is −∞ as well and takes no part.
                if lse != T::Compute::NEG_INFINITY {
                    sum -= (sink.to_f64() - lse.to_f64()).exp() * norm.to_f64() * delta.to_f64();
                }
            }
        }
        *gradient = T::Compute::from_f64(sum);
    }
}

/// Where a task puts its gradients: pieces of the results.
struct Parts<'x, T: Float> {
    dq: Option<&'x mut [T]>,
    dk: Option<&'x mut [T]>,
    dv: Option<&'x mut [T]>,
    slopes: Option<&'x mut [f64]>,
    bias: Option<&'x mut [T]>,
}

/// A sweep of some tiles and the pieces it fills.
struct Task<'x, T: Float> {
    b: usize,
    heads: Range<usize>,
    queries: Range<usize>,
    keys: Range<usize>,
    parts: Parts<'x, T>,
}

fn run<T: Float>(context: &Context<'_, T>, saved: &Saved<'_, T>, gradients: &mut Gradients<T>, plan: Plan) {
    let problem = context.problem;
    let blocks = problem.seq_q.div_ceil(BQ);
    let full_bias = bias_is_full(problem);
    if let Some(bias) = gradients.bias.as_deref_mut().filter(|_| !full_bias) {
        bias_gradient::compute(context, saved, bias);
    }
    let mut slopes = gradients.alibi_slopes.is_some().then(|| vec![0.0; problem.batch * problem.heads_q * blocks]);
    let mut parts = Parts {
        dq: gradients.q.as_deref_mut(),
        dk: gradients.k.as_deref_mut(),
        dv: gradients.v.as_deref_mut(),
        slopes: slopes.as_deref_mut(),
        bias: gradients.bias.as_deref_mut().filter(|_| full_bias),
    };
    if plan == Plan::Fused {
        sweep(context, saved, by_heads(problem, parts));
    } else {
        let (dk, dv) = (parts.dk.take(), parts.dv.take());
        if plan != Plan::Queries {
            sweep(context, saved, by_keys(problem, dk, dv));
        }
        if plan != Plan::Keys {
            sweep(context, saved, by_queries(problem, context.task_queries(QUERIES), parts));
        }
    }
    if let (Some(slopes), Some(gradient)) = (slopes, &mut gradients.alibi_slopes) {
        for (h, gradient) in gradient.iter_mut().enumerate() {
            let heads = slopes.chunks_exact(blocks).skip(h).step_by(problem.heads_q);
            *gradient = T::Compute::from_f64(-heads.flatten().sum::<f64>());
        }
    }
}

/// `whole` cut into `count` pieces of `size`; the last may be shorter.
fn pieces<X>(whole: Option<&mut [X]>, size: usize, count: usize) -> impl Iterator<Item = Option<&mut [X]>> {
    let mut chunks = whole.map(|whole| whole.chunks_mut(size));
    (0..count).map(move |_| chunks.as_mut().and_then(Iterator::next))
}

/// A task for every key head.
fn by_heads<'x, T: Float>(problem: &Problem, parts: Parts<'x, T>) -> Vec<Task<'x, T>> {
    let (group, seq_q, seq_kv) = (problem.group(), problem.seq_q, problem.seq_kv);
    let count = problem.batch * problem.heads_kv;
    let mut dq = pieces(parts.dq, group * seq_q * problem.head_dim, count);
    let mut dk = pieces(parts.dk, seq_kv * problem.head_dim, count);
    let mut dv = pieces(parts.dv, seq_kv * problem.value_dim, count);
    let mut slopes = pieces(parts.slopes, group * seq_q.div_ceil(BQ), count);
    let mut bias = pieces(parts.bias, group * seq_q * seq_kv, count);
    let mut tasks = Vec::with_capacity(count);
    for head in 0..count {
        let first = head % problem.heads_kv * group;
        tasks.push(Task {
            b: head / problem.heads_kv,
            heads: first..first + group,
            queries: 0..seq_q,
            keys: 0..seq_kv,
            parts: Parts {
                dq: dq.next().flatten(),
                dk: dk.next().flatten(),
                dv: dv.next().flatten(),
                slopes: slopes.next().flatten(),
                bias: bias.next().flatten(),
            },
        });
    }
    tasks
}

/// A task for every key tile.
fn by_keys<'x, T: Float>(problem: &Problem, dk: Option<&'x mut [T]>, dv: Option<&'x mut [T]>) -> Vec<Task<'x, T>> {
    let (group, seq_kv) = (problem.group(), problem.seq_kv);
    let (heads, tiles) = (problem.batch * problem.heads_kv, seq_kv.div_ceil(BK));
    let mut tasks = Vec::with_capacity(heads * tiles);
    let dk = pieces(dk, seq_kv * problem.head_dim, heads);
    let dv = pieces(dv, seq_kv * problem.value_dim, heads);
    for (head, (dk, dv)) in dk.zip(dv).enumerate() {
        let first = head % problem.heads_kv * group;
        let dk = pieces(dk, BK * problem.head_dim, tiles);
        let dv = pieces(dv, BK * problem.value_dim, tiles);
        for (tile, (dk, dv)) in dk.zip(dv).enumerate() {
            tasks.push(Task {
                b: head / problem.heads_kv,
                heads: first..first + group,
                queries: 0..problem.seq_q,
                keys: tile * BK..seq_kv.min((tile + 1) * BK),
                parts: Parts { dq: None, dk, dv, slopes: None, bias: None },
            });
        }
    }
    tasks
}

/// A task for every `size` queries.
fn by_queries<'x, T: Float>(problem: &Problem, size: usize, parts: Parts<'x, T>) -> Vec<Task<'x, T>> {
    let (seq_q, seq_kv) = (problem.seq_q, problem.seq_kv);
    let (heads, chunks) = (problem.batch * problem.heads_q, seq_q.div_ceil(size));
    let mut tasks = Vec::with_capacity(heads * chunks);
    let dq = pieces(parts.dq, seq_q * problem.head_dim, heads);
    let slopes = pieces(parts.slopes, seq_q.div_ceil(BQ), heads);
    let bias = pieces(parts.bias, seq_q * seq_kv, heads);
    for (head, ((dq, slopes), bias)) in dq.zip(slopes).zip(bias).enumerate() {
        let h = head % problem.heads_q;
        let dq = pieces(dq, size * problem.head_dim, chunks);
        let slopes = pieces(slopes, size / BQ, chunks);
        let bias = pieces(bias, size * seq_kv, chunks);
        for (chunk, ((dq, slopes), bias)) in dq.zip(slopes).zip(bias).enumerate() {
            tasks.push(Task {
                b: head / problem.heads_q,
                heads: h..h + 1,
                queries: chunk * size..seq_q.min((chunk + 1) * size),
                keys: 0..seq_kv,
                parts: Parts { dq, dk: None, dv: None, slopes, bias },
            });
        }
    }
    tasks
}

/// Runs the sweeps. dq is summed in the result itself if that is of the compute type, otherwise in a copy of the
/// task's piece of it.
fn sweep<T: Float>(context: &Context<'_, T>, saved: &Saved<'_, T>, tasks: Vec<Task<'_, T>>) {
    let problem = context.problem;
    let arch = Arch::new();
    let work = problem.batch * problem.heads_q * problem.seq_q * problem.seq_kv * problem.head_dim;
    let scratch = || (Scratch::new(problem), Vec::new());
    parallel::for_each(tasks.into_iter(), work, scratch, |(scratch, sums), task| {
        let Task { b, heads, queries, keys, parts } = task;
        let Parts { mut dq, dk, dv, slopes, bias } = parts;
        let in_place = dq.as_deref_mut().is_some_and(|dq| T::as_compute_mut(dq).is_some());
        if !in_place {
            sums.clear();
            sums.resize(dq.as_deref().map_or(0, <[T]>::len), T::Compute::default());
        }
        let dq_sums = dq.as_deref_mut().map(|dq| T::as_compute_mut(dq).unwrap_or(&mut sums[..]));
        let targets = Targets { dq: dq_sums, dk, dv, slopes, bias };
        arch.dispatch(Sweep { context, saved, scratch, b, heads, queries, keys, targets });
        let Some(dq) = dq else { return };
        if let Some(dq) = T::as_compute_mut(dq) {
            dq.iter_mut().for_each(|x| *x *= context.scale);
        } else {
            sums.iter_mut().for_each(|x| *x *= context.scale);
            T::narrow_slice(sums, dq);
        }
    });
}
