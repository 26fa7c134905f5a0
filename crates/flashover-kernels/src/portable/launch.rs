//! From a problem and its operands to launches.

use core::ops::ControlFlow;

use cubecl::prelude::*;

use super::backward::{backward_keys_kernel, backward_queries_kernel};
use super::checks::check_limits;
use super::delta::delta_kernel;
use super::forward::forward_kernel;
use super::parameters::{
    BiasShapeLaunch, HeadSum, bias_gradient_kernel, bias_rows_kernel, bias_sum_kernel, head_sums_kernel,
};
use super::reductions::{Reductions, bias_terms};
use super::score_parameters::{parameter_gradient_kernel, parameter_sum_kernel};
use super::tile::TileConfig;
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::checks::{check_operands, check_outputs, check_plan};
use crate::family::element::NumbersLaunch;
use crate::family::launcher::{
    Forward, Launcher, Outputs, SUM_UNITS, binding_facts, cubes_of, numbers, visible_part, without_absent_scores,
};
use crate::family::scratch::{self, Layout, fill_row_statistics};
use crate::family::walk::Side;
use crate::operands::{Gradients, Operands, Wanted};
use crate::problem::Problem;
use crate::score::{ScoreCode, ScoreUse};

/// Attention forward: `o` `[B, Hq, Sq, Dv]` in the problem's element type and, if asked for, `lse` `[B, Hq, Sq]` in f32,
/// both contiguous. Nothing is written for an `lse` that was not asked for. `plan` is that of the problem, in
/// [`flat`](crate::block_plan::flat) form: u32, `[words]`.
pub fn forward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    plan: Option<&DeviceTensor>,
    with_lse: bool,
    tile: TileConfig,
) -> Result<(DeviceTensor, Option<DeviceTensor>), KernelError> {
    check_limits(problem, &DeviceLimits::of(client), tile)?;
    let call = match Forward::prepare(client, problem, operands, plan, with_lse)? {
        ControlFlow::Continue(call) => call,
        ControlFlow::Break(outputs) => return Ok(outputs),
    };
    let launcher = call.launcher(client);
    let (bindings, address) = call.binding_facts();
    let Forward { problem, operands: Operands { q, k, v, bias, .. }, scratch, o, lse, .. } = &call;
    tile.note(&launcher, "forward", bindings);
    // SAFETY: rows, keys and elements are tested against the shapes that `check_operands` held against the problem.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            launcher.cubes(cubes_of(problem, Side::Queries, tile.shape())),
            tile.dim(),
            address,
            q.arg(),
            k.arg(),
            v.arg(),
            bias.as_ref().map(DeviceTensor::arg).into(),
            scratch.buffer(),
            o.buffer(),
            lse.as_ref().map(DeviceTensor::buffer).into(),
            call.numbers(),
            problem.bias.is_some(),
            with_lse,
            function(problem),
            tile.chunks(problem.value_dim),
            tile,
            q.elem,
        );
    }
    Ok((call.o, call.lse))
}

/// Attention backward: the gradients that are [`Wanted`], contiguous, each in the shape and element type of its operand.
/// What the problem lacks has no gradient. `plan` as in [`forward`].
pub fn backward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    outputs: &Outputs,
    plan: Option<&DeviceTensor>,
    wanted: Wanted,
    tile: TileConfig,
) -> Result<Gradients<DeviceTensor>, KernelError> {
    check_limits(problem, &DeviceLimits::of(client), tile)?;
    check_operands(problem, operands)?;
    check_plan(problem, plan)?;
    check_outputs(problem, outputs)?;
    let mut gradients = Gradients::default();
    let rows = problem.batch * problem.heads_q * problem.seq_q;
    let scores = rows * problem.seq_kv;
    let new = |operand: &DeviceTensor| {
        let make = if scores == 0 { DeviceTensor::zeros } else { DeviceTensor::empty };
        make(client, &operand.shape, operand.elem)
    };
    gradients.q = wanted.q.then(|| new(&operands.q));
    gradients.k = wanted.k.then(|| new(&operands.k));
    gradients.v = wanted.v.then(|| new(&operands.v));
    gradients.bias = operands.bias.as_ref().filter(|_| wanted.bias).map(new);
    gradients.alibi_slopes = operands.alibi_slopes.as_ref().filter(|_| wanted.alibi_slopes).map(new);
    gradients.learned_sinks = operands.learned_sinks.as_ref().filter(|_| wanted.learned_sinks).map(new);
    gradients.score_parameters = operands.score_parameters.as_ref().filter(|_| wanted.score_parameters).map(new);
    let Gradients { q, k, v, bias, alibi_slopes, score_parameters, .. } = &gradients;
    let of_scores =
        scores > 0 && [q, k, v, bias, alibi_slopes, score_parameters].iter().any(|gradient| gradient.is_some());
    if rows == 0 || !(of_scores || gradients.learned_sinks.is_some()) {
        return Ok(gradients);
    }

    let (problem, operands) = visible_part(problem, operands);
    let query_tiles = problem.seq_q.div_ceil(tile.rows());
    let reductions = Reductions::of(&problem, wanted, tile);
    let layout = Layout::of(&problem, Some(reductions.partials(&problem)));
    let launcher = Launcher { client, scratch_bytes: layout.bytes() };
    let scratch = scratch::build(&launcher, &problem, &operands, plan, &layout);
    let call =
        Backward { launcher, tile, problem: &problem, operands: &operands, outputs, reductions, layout, scratch };
    fill_row_statistics(&call.launcher, &problem, outputs, &call.scratch, &call.layout);
    if scores > 0 {
        call.delta();
    }
    if of_scores {
        if gradients.q.is_some() || gradients.alibi_slopes.is_some() {
            call.queries(gradients.q.as_ref(), gradients.alibi_slopes.is_some());
        }
        if let Some(slopes) = &gradients.alibi_slopes {
            call.head_sums(slopes, query_tiles, HeadSum::Slopes);
        }
        // Seven bindings hold both outputs or a bias; and the accumulators of both are too many registers for large heads.
        if keys_fused(&problem) {
            if gradients.k.is_some() || gradients.v.is_some() {
                call.keys(gradients.k.as_ref(), gradients.v.as_ref());
            }
        } else {
            if gradients.k.is_some() {
                call.keys(gradients.k.as_ref(), None);
            }
            if gradients.v.is_some() {
                call.keys(None, gradients.v.as_ref());
            }
        }
        if let (Some(bias), Some(dbias)) = (&operands.bias, &gradients.bias) {
            if reductions.bias_rows {
                call.bias_rows(dbias);
            } else {
                call.bias(bias, dbias);
            }
        }
        if let (Some(score), Some(gradient)) = (problem.score, &gradients.score_parameters) {
            call.score_parameters(score, gradient);
        }
    }
    if let Some(sinks) = &gradients.learned_sinks {
        call.head_sums(sinks, problem.seq_q, HeadSum::Sinks);
    }
    Ok(gradients)
}

/// The user's score function, which kernels are compiled with.
fn function(problem: &Problem) -> Option<ScoreCode> {
    problem.score.map(|score| score.code)
}

/// Bytes of the scratch buffer of a forward, or of a backward and its partial sums.
pub(crate) fn scratch_bytes(problem: &Problem, backward: Option<&Reductions>) -> usize {
    let problem = without_absent_scores(problem);
    Layout::of(&problem, backward.map(|backward| backward.partials(&problem))).bytes()
}

/// Whether `dk` and `dv` come from one launch.
pub(crate) fn keys_fused(problem: &Problem) -> bool {
    problem.bias.is_none() && problem.head_dim + problem.value_dim <= crate::problem::MAX_HEAD_DIM
}

/// The launches of one backward.
struct Backward<'a> {
    launcher: Launcher<'a>,
    tile: TileConfig,
    problem: &'a Problem,
    operands: &'a Operands<DeviceTensor>,
    outputs: &'a Outputs,
    reductions: Reductions,
    layout: Layout,
    scratch: DeviceTensor,
}

impl Backward<'_> {
    fn numbers(&self) -> NumbersLaunch {
        numbers(self.problem, &self.layout)
    }

    fn delta(&self) {
        let Operands { q, k, v, bias, .. } = self.operands;
        let tile = self.tile;
        let bound = [q, k, v, &self.outputs.do_, &self.scratch].into_iter().chain(bias);
        let (bindings, address) = binding_facts(bound);
        tile.note(&self.launcher, "delta", bindings);
        // SAFETY: rows, keys and elements are tested against the checked shapes.
        unsafe {
            delta_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(cubes_of(self.problem, Side::Queries, tile.shape())),
                tile.dim(),
                address,
                q.arg(),
                k.arg(),
                v.arg(),
                self.outputs.do_.arg(),
                bias.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                self.numbers(),
                bias.is_some(),
                function(self.problem),
                tile,
                q.elem,
            );
        }
    }

    fn queries(&self, dq: Option<&DeviceTensor>, with_slopes: bool) {
        let head_dim = self.problem.head_dim;
        let Operands { q, k, v, bias, .. } = self.operands;
        let tile = self.tile;
        let bound = [q, k, v, &self.outputs.do_, &self.scratch].into_iter().chain(bias).chain(dq);
        let (bindings, address) = binding_facts(bound);
        tile.note(&self.launcher, "backward_queries", bindings);
        // SAFETY: rows, keys and elements are tested against the checked shapes.
        unsafe {
            backward_queries_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(cubes_of(self.problem, Side::Queries, tile.shape())),
                tile.dim(),
                address,
                q.arg(),
                k.arg(),
                v.arg(),
                self.outputs.do_.arg(),
                bias.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                dq.map(DeviceTensor::buffer).into(),
                self.numbers(),
                self.problem.bias.is_some(),
                dq.is_some(),
                with_slopes,
                function(self.problem),
                tile.chunks(head_dim),
                tile,
                q.elem,
            );
        }
    }

    fn keys(&self, dk: Option<&DeviceTensor>, dv: Option<&DeviceTensor>) {
        let Problem { head_dim, value_dim, .. } = *self.problem;
        let Operands { q, k, v, bias, .. } = self.operands;
        let tile = self.tile;
        // Only dk asks for do · vᵀ.
        let v = dk.map(|_| v);
        let bound = [q, k, &self.outputs.do_, &self.scratch].into_iter().chain(v).chain(bias).chain(dk).chain(dv);
        let (bindings, address) = binding_facts(bound);
        tile.note(&self.launcher, "backward_keys", bindings);
        // SAFETY: rows, keys and elements are tested against the checked shapes.
        unsafe {
            backward_keys_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(cubes_of(self.problem, Side::Keys, tile.shape())),
                tile.dim(),
                address,
                q.arg(),
                k.arg(),
                v.map(DeviceTensor::arg).into(),
                self.outputs.do_.arg(),
                bias.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                dk.map(DeviceTensor::buffer).into(),
                dv.map(DeviceTensor::buffer).into(),
                self.numbers(),
                self.problem.bias.is_some(),
                dk.is_some(),
                dv.is_some(),
                function(self.problem),
                // An array of no elements cannot be declared.
                if dk.is_some() { tile.chunks(head_dim) } else { 1 },
                if dv.is_some() { tile.chunks(value_dim) } else { 1 },
                tile,
                q.elem,
            );
        }
    }

    fn bias_rows(&self, dbias: &DeviceTensor) {
        let dlse = self.outputs.dlse.as_ref();
        let &[batch, heads, queries, keys] = &dbias.shape[..] else {
            unreachable!("a checked bias has four dimensions")
        };
        let (bindings, address) = binding_facts([&self.scratch, dbias].into_iter().chain(dlse));
        self.launcher.note_small("backward_bias_rows", bindings, SUM_UNITS * size_of::<f32>());
        // SAFETY: elements are tested, and rows are those of the problem, whose shapes were checked.
        unsafe {
            bias_rows_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(dbias.elements()),
                CubeDim::new_1d(SUM_UNITS as u32),
                address,
                self.scratch.buffer(),
                dlse.map(DeviceTensor::arg).into(),
                dbias.buffer(),
                BiasShapeLaunch::new(batch as u32, heads as u32, queries as u32, keys as u32),
                bias_terms(self.problem, [batch, heads, queries, keys], 1) as u32,
                self.numbers(),
                dlse.is_some(),
                SUM_UNITS,
                dbias.elem,
            );
        }
    }

    fn bias(&self, bias: &DeviceTensor, dbias: &DeviceTensor) {
        let Operands { q, k, v, .. } = self.operands;
        let tile = self.tile;
        let &[batch, heads, queries, keys] = &dbias.shape[..] else {
            unreachable!("a checked bias has four dimensions")
        };
        let parts = self.reductions.bias_parts;
        let direct = (parts == 1).then_some(dbias);
        let bound = [q, k, v, &self.outputs.do_, bias, &self.scratch].into_iter().chain(direct);
        let (bindings, address) = binding_facts(bound);
        tile.note(&self.launcher, "backward_bias", bindings);
        let tiles = batch * heads * queries.div_ceil(tile.rows()) * keys.div_ceil(tile.cols());
        // SAFETY: rows, keys and elements are tested against the checked shapes.
        unsafe {
            bias_gradient_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(tiles * parts),
                tile.dim(),
                address,
                q.arg(),
                k.arg(),
                v.arg(),
                self.outputs.do_.arg(),
                bias.arg(),
                self.scratch.buffer(),
                direct.map(DeviceTensor::buffer).into(),
                BiasShapeLaunch::new(batch as u32, heads as u32, queries as u32, keys as u32),
                parts as u32,
                self.numbers(),
                direct.is_some(),
                queries == 1,
                keys == 1,
                function(self.problem),
                tile,
                q.elem,
            );
        }
        if direct.is_none() {
            let (bindings, address) = binding_facts([&self.scratch, dbias].into_iter());
            self.launcher.note_small("bias_sum", bindings, 0);
            // SAFETY: elements are tested; the section holds that many for each part.
            unsafe {
                bias_sum_kernel::launch_unchecked(
                    self.launcher.client,
                    self.launcher.cubes(dbias.elements().div_ceil(SUM_UNITS)),
                    CubeDim::new_1d(SUM_UNITS as u32),
                    address,
                    self.scratch.buffer(),
                    dbias.buffer(),
                    dbias.elements(),
                    parts as u32,
                    self.numbers(),
                    dbias.elem,
                );
            }
        }
    }

    fn score_parameters(&self, score: ScoreUse, gradient: &DeviceTensor) {
        let Operands { q, k, v, bias, .. } = self.operands;
        let (tile, parts) = (self.tile, self.reductions.parameter_parts);
        let bound = [q, k, v, &self.outputs.do_, &self.scratch].into_iter().chain(bias);
        let (bindings, address) = binding_facts(bound);
        // Its weights go nowhere: there is no second product.
        tile.note(&self.launcher, "backward_parameters", bindings);
        // SAFETY: rows, keys and elements are tested against the checked shapes; a parameter's index is tested, and the
        // section holds sums of all parameters for every unit of every part.
        unsafe {
            parameter_gradient_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(parts),
                tile.dim(),
                address,
                q.arg(),
                k.arg(),
                v.arg(),
                self.outputs.do_.arg(),
                bias.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                parts as u32,
                self.numbers(),
                bias.is_some(),
                score.code,
                tile,
                q.elem,
            );
        }
        let (bindings, address) = binding_facts([&self.scratch, gradient].into_iter());
        self.launcher.note_small("parameter_sum", bindings, SUM_UNITS * size_of::<f32>());
        // SAFETY: parameters are tested, and the section is as above.
        unsafe {
            parameter_sum_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(score.parameters),
                CubeDim::new_1d(SUM_UNITS as u32),
                address,
                self.scratch.buffer(),
                gradient.buffer(),
                parts as u32,
                self.numbers(),
                tile.units(),
                SUM_UNITS,
            );
        }
    }

    fn head_sums(&self, gradient: &DeviceTensor, rows: usize, what: HeadSum) {
        let kernel = match what {
            HeadSum::Sinks => "backward_sinks",
            HeadSum::Slopes => "backward_slopes",
        };
        let (bindings, address) = binding_facts([&self.scratch, gradient].into_iter());
        self.launcher.note_small(kernel, bindings, SUM_UNITS * size_of::<f32>());
        // SAFETY: heads and rows are tested; the sections hold an entry for each.
        unsafe {
            head_sums_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(self.problem.heads_q),
                CubeDim::new_1d(SUM_UNITS as u32),
                address,
                self.scratch.buffer(),
                gradient.buffer(),
                rows as u32,
                self.numbers(),
                what,
                SUM_UNITS,
            );
        }
    }
}

impl TileConfig {
    fn dim(&self) -> CubeDim {
        CubeDim::new_1d(self.units() as u32)
    }

    /// Notes the launch of a kernel over tiles.
    fn note(&self, launcher: &Launcher, kernel: &'static str, bindings: usize) {
        launcher.note(kernel, self, bindings, self.shared_bytes(), self.units());
    }
}
