//! From a problem and its operands to launches.

use cubecl::prelude::*;
use cubecl::server::CubeCountSelection;

use super::backward::{backward_keys_kernel, backward_queries_kernel};
use super::checks::{check_limits, check_operands, check_outputs, check_plan};
use super::delta::delta_kernel;
use super::element::NumbersLaunch;
use super::forward::forward_kernel;
use super::parameters::{BiasShapeLaunch, HeadSum, bias_gradient_kernel, bias_sum_kernel, head_sums_kernel};
use super::reductions::Reductions;
use super::scratch::{self, Layout, row_statistics};
use super::tile::TileConfig;
use super::walk::Side;
use crate::device::{DeviceLimits, DeviceTensor, KernelError, element_type};
use crate::launch_log::{self, Launch};
use crate::operands::{Gradients, Operands, Wanted};
use crate::problem::Problem;

/// Storage buffers that a launch binds at most; CubeCL takes one more, and WebGPU guarantees 8.
pub const BINDINGS: usize = 7;

/// Units of a cube of the kernels that do not work on tiles.
pub(crate) const SUM_UNITS: usize = 64;

/// What the forward returned and what came back for it.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// Output `[B, Hq, Sq, Dv]`.
    pub o: DeviceTensor,
    /// Log-sum-exp `[B, Hq, Sq]`, f32.
    pub lse: DeviceTensor,
    /// Gradient of `o`, in its element type.
    pub do_: DeviceTensor,
    /// Gradient of `lse`, f32, if the loss depends on it.
    pub dlse: Option<DeviceTensor>,
}

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
    check_operands(problem, operands)?;
    check_plan(problem, plan)?;
    let elem = element_type(problem.element);
    let o = DeviceTensor::empty(client, &problem.output_shape(), elem);
    let lse = with_lse.then(|| DeviceTensor::empty(client, &problem.lse_shape(), f32::elem_type_native()));
    if problem.is_empty() {
        return Ok((o, lse));
    }
    let (problem, operands) = visible_part(problem, operands);
    let layout = Layout::of(&problem, None);
    let launcher = Launcher { client, tile, scratch_bytes: layout.bytes() };
    let scratch = scratch::build(&launcher, &problem, &operands, plan, &layout);
    let bound = [&operands.q, &operands.k, &operands.v, &o].into_iter();
    let bound = bound.chain(&operands.bias).chain([&scratch]).chain(&lse);
    let (bindings, address) = binding_facts(bound);
    launcher.note("forward", bindings);
    // SAFETY: rows, keys and elements are tested against the shapes that `check_operands` held against the problem.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            launcher.cubes(cubes_of(&problem, Side::Queries, tile)),
            launcher.dim(),
            address,
            operands.q.arg(),
            operands.k.arg(),
            operands.v.arg(),
            operands.bias.as_ref().map(DeviceTensor::arg).into(),
            scratch.buffer(),
            o.buffer(),
            lse.as_ref().map(DeviceTensor::buffer).into(),
            numbers(&problem, &layout),
            problem.bias.is_some(),
            with_lse,
            tile.chunks(problem.value_dim),
            tile,
            elem,
        );
    }
    Ok((o, lse))
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
    let Gradients { q, k, v, bias, alibi_slopes, .. } = &gradients;
    let of_scores = scores > 0 && [q, k, v, bias, alibi_slopes].iter().any(|gradient| gradient.is_some());
    if rows == 0 || !(of_scores || gradients.learned_sinks.is_some()) {
        return Ok(gradients);
    }

    let (problem, operands) = visible_part(problem, operands);
    let query_tiles = problem.seq_q.div_ceil(tile.rows());
    let reductions = Reductions::of(&problem, wanted, tile);
    let layout = Layout::of(&problem, Some(&reductions));
    let launcher = Launcher { client, tile, scratch_bytes: layout.bytes() };
    let scratch = scratch::build(&launcher, &problem, &operands, plan, &layout);
    let call = Backward { launcher, problem: &problem, operands: &operands, outputs, reductions, layout, scratch };
    call.row_statistics(rows);
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
            call.bias(bias, dbias);
        }
    }
    if let Some(sinks) = &gradients.learned_sinks {
        call.head_sums(sinks, problem.seq_q, HeadSum::Sinks);
    }
    Ok(gradients)
}

/// Bytes of the scratch buffer of a forward, or of a backward and its partial sums.
pub(crate) fn scratch_bytes(problem: &Problem, backward: Option<&Reductions>) -> usize {
    Layout::of(&without_absent_scores(problem), backward).bytes()
}

/// Whether `dk` and `dv` come from one launch.
pub(crate) fn keys_fused(problem: &Problem) -> bool {
    problem.bias.is_none() && problem.head_dim + problem.value_dim <= crate::problem::MAX_HEAD_DIM
}

/// The launches of one backward.
struct Backward<'a> {
    launcher: Launcher<'a>,
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

    fn row_statistics(&self, rows: usize) {
        let Outputs { lse, dlse, .. } = self.outputs;
        let (bindings, address) = binding_facts([lse, &self.scratch].into_iter().chain(dlse));
        self.launcher.note_small("row_statistics", bindings, 0);
        // SAFETY: rows are tested against the problem, whose shapes `check_outputs` held against the tensors.
        unsafe {
            row_statistics::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(rows.div_ceil(SUM_UNITS)),
                CubeDim::new_1d(SUM_UNITS as u32),
                address,
                lse.arg(),
                dlse.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                self.numbers(),
                dlse.is_some(),
            );
        }
    }

    fn delta(&self) {
        let Operands { q, k, v, bias, .. } = self.operands;
        let tile = self.launcher.tile;
        let bound = [q, k, v, &self.outputs.do_, &self.scratch].into_iter().chain(bias);
        let (bindings, address) = binding_facts(bound);
        self.launcher.note("delta", bindings);
        // SAFETY: rows, keys and elements are tested against the checked shapes.
        unsafe {
            delta_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(cubes_of(self.problem, Side::Queries, tile)),
                self.launcher.dim(),
                address,
                q.arg(),
                k.arg(),
                v.arg(),
                self.outputs.do_.arg(),
                bias.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                self.numbers(),
                bias.is_some(),
                tile,
                q.elem,
            );
        }
    }

    fn queries(&self, dq: Option<&DeviceTensor>, with_slopes: bool) {
        let head_dim = self.problem.head_dim;
        let Operands { q, k, v, bias, .. } = self.operands;
        let tile = self.launcher.tile;
        let bound = [q, k, v, &self.outputs.do_, &self.scratch].into_iter().chain(bias).chain(dq);
        let (bindings, address) = binding_facts(bound);
        self.launcher.note("backward_queries", bindings);
        // SAFETY: rows, keys and elements are tested against the checked shapes.
        unsafe {
            backward_queries_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(cubes_of(self.problem, Side::Queries, tile)),
                self.launcher.dim(),
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
                tile.chunks(head_dim),
                tile,
                q.elem,
            );
        }
    }

    fn keys(&self, dk: Option<&DeviceTensor>, dv: Option<&DeviceTensor>) {
        let Problem { head_dim, value_dim, .. } = *self.problem;
        let Operands { q, k, v, bias, .. } = self.operands;
        let tile = self.launcher.tile;
        // Only dk asks for do · vᵀ.
        let v = dk.map(|_| v);
        let bound = [q, k, &self.outputs.do_, &self.scratch].into_iter().chain(v).chain(bias).chain(dk).chain(dv);
        let (bindings, address) = binding_facts(bound);
        self.launcher.note("backward_keys", bindings);
        // SAFETY: rows, keys and elements are tested against the checked shapes.
        unsafe {
            backward_keys_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(cubes_of(self.problem, Side::Keys, tile)),
                self.launcher.dim(),
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
                // An array of no elements cannot be declared.
                if dk.is_some() { tile.chunks(head_dim) } else { 1 },
                if dv.is_some() { tile.chunks(value_dim) } else { 1 },
                tile,
                q.elem,
            );
        }
    }

    fn bias(&self, bias: &DeviceTensor, dbias: &DeviceTensor) {
        let Operands { q, k, v, .. } = self.operands;
        let tile = self.launcher.tile;
        let &[batch, heads, queries, keys] = &dbias.shape[..] else {
            unreachable!("a checked bias has four dimensions")
        };
        let parts = self.reductions.bias_parts;
        let direct = (parts == 1).then_some(dbias);
        let bound = [q, k, v, &self.outputs.do_, bias, &self.scratch].into_iter().chain(direct);
        let (bindings, address) = binding_facts(bound);
        self.launcher.note("backward_bias", bindings);
        let tiles = batch * heads * queries.div_ceil(tile.rows()) * keys.div_ceil(tile.cols());
        // SAFETY: rows, keys and elements are tested against the checked shapes.
        unsafe {
            bias_gradient_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(tiles * parts),
                self.launcher.dim(),
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

/// What all launches of one call share.
pub(super) struct Launcher<'a> {
    pub client: &'a Client,
    pub tile: TileConfig,
    /// Bytes of the call's scratch buffer.
    pub scratch_bytes: usize,
}

impl Launcher<'_> {
    /// At least `cubes` cubes, spread over the grid's dimensions where one does not hold them.
    pub fn cubes(&self, cubes: usize) -> CubeCount {
        CubeCountSelection::new(self.client, cubes as u32).cube_count()
    }

    fn dim(&self) -> CubeDim {
        CubeDim::new_1d(self.tile.units() as u32)
    }

    /// Notes the launch of a kernel over tiles.
    fn note(&self, kernel: &'static str, bindings: usize) {
        let Launcher { tile, scratch_bytes, .. } = *self;
        launch_log::note(|| Launch {
            kernel,
            config: tile.to_string(),
            bindings,
            shared_bytes: tile.shared_bytes(),
            units: tile.units(),
            scratch_bytes,
        });
    }

    /// Notes the launch of a kernel without tiles.
    pub fn note_small(&self, kernel: &'static str, bindings: usize, shared_bytes: usize) {
        launch_log::note(|| Launch {
            kernel,
            config: format!("{SUM_UNITS} units"),
            bindings,
            shared_bytes,
            units: SUM_UNITS,
            scratch_bytes: self.scratch_bytes,
        });
    }
}

/// How many buffers are bound and how wide their indices are.
fn binding_facts<'a>(tensors: impl Iterator<Item = &'a DeviceTensor>) -> (usize, AddressType) {
    tensors.fold((0, AddressType::U32), |(count, address), tensor| (count + 1, address.max(tensor.address_type())))
}

/// Cubes of a kernel that owns tiles of queries, or of keys: one for each head and each tile, under a plan also for those
/// that its last tile has past the end.
fn cubes_of(problem: &Problem, side: Side, tile: TileConfig) -> usize {
    let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, plan, .. } = *problem;
    let (heads, len, size) = match side {
        Side::Queries => (heads_q, seq_q, plan.map(|plan| plan.tile.bq)),
        Side::Keys => (heads_kv, seq_kv, plan.map(|plan| plan.tile.bk)),
    };
    let size = size.map_or(tile.rows(), |size| size as usize);
    batch * heads * len.div_ceil(size) * (size / tile.rows())
}

/// The problem without what no score asks for: where there are no keys, empty operands cannot be bound, and are not read.
fn without_absent_scores(problem: &Problem) -> Problem {
    let mut problem = problem.clone();
    if problem.seq_kv == 0 {
        (problem.bias, problem.mask, problem.plan) = (None, None, None);
    }
    problem
}

/// [`without_absent_scores`], and the operands likewise, `q` standing in for `k` and `v`.
fn visible_part(problem: &Problem, operands: &Operands<DeviceTensor>) -> (Problem, Operands<DeviceTensor>) {
    let mut operands = operands.clone();
    if problem.seq_kv == 0 {
        (operands.k, operands.v) = (operands.q.clone(), operands.q.clone());
        (operands.bias, operands.mask) = (None, None);
    }
    (without_absent_scores(problem), operands)
}

fn numbers(problem: &Problem, layout: &Layout) -> NumbersLaunch {
    let (ahead, left, right, sinks) = problem.band.scalars();
    let (seed_low, seed_high) = problem.dropout.map_or((0, 0), |dropout| dropout.seed_words());
    let mask = problem.mask.unwrap_or([1; 4]);
    let row_words = mask[3].div_ceil(32);
    let step = |size: usize, words: usize| if size == 1 { 0 } else { words };
    NumbersLaunch::new(
        problem.batch as u32,
        problem.heads_q as u32,
        problem.heads_kv as u32,
        problem.seq_q as u32,
        problem.seq_kv as u32,
        problem.head_dim as u32,
        problem.value_dim as u32,
        problem.scale as f32,
        problem.softcap.unwrap_or(0.0) as f32,
        ahead,
        left,
        right,
        sinks,
        seed_low,
        seed_high,
        problem.dropout.map_or(0, |dropout| dropout.threshold()),
        problem.dropout.map_or(1.0, |dropout| dropout.factor()) as f32,
        f32::NEG_INFINITY,
        layout.lse,
        layout.delta,
        layout.norm,
        layout.slopes,
        layout.sinks,
        layout.lengths,
        layout.slope_partials,
        layout.bias_partials,
        layout.plan,
        layout.mask,
        step(mask[0], mask[1] * mask[2] * row_words),
        step(mask[1], mask[2] * row_words),
        step(mask[2], row_words),
        u32::from(mask[3] != 1),
    )
}
