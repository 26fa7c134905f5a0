//! From a problem and its operands to launches.

use core::ops::ControlFlow;

use cubecl::prelude::*;

use super::backward_keys::backward_keys_kernel;
use super::backward_queries::backward_queries_kernel;
use super::checks::check_limits;
use super::config::{CmmaConfig, CmmaTile, Compiled, vector_size};
use super::forward::forward_kernel;
use super::tile::padded;
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::checks::{check_operands, check_outputs, check_plan};
use crate::family::element::NumbersLaunch;
use crate::family::launcher::{Forward, Launcher, Outputs, binding_facts, cubes_of, numbers};
use crate::family::scratch::{self, Layout, Partials, fill_row_statistics};
use crate::family::walk::Side;
use crate::operands::{Gradients, Operands, Wanted};
use crate::problem::Problem;

/// Attention forward: `o` `[B, Hq, Sq, Dv]` in the problem's element type and, if asked for, `lse` `[B, Hq, Sq]` in f32,
/// both contiguous. Nothing is written for an `lse` that was not asked for. `plan` is that of the problem, in
/// [`flat`](crate::block_plan::flat) form: u32, `[words]`.
pub fn forward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    plan: Option<&DeviceTensor>,
    with_lse: bool,
    config: CmmaConfig,
) -> Result<(DeviceTensor, Option<DeviceTensor>), KernelError> {
    check_limits(problem, &DeviceLimits::of(client), config)?;
    let tile = config.forward;
    let call = match Forward::prepare(client, problem, operands, plan, with_lse)? {
        ControlFlow::Continue(call) => call,
        ControlFlow::Break(outputs) => return Ok(outputs),
    };
    let launcher = call.launcher(client);
    let (bindings, address) = call.binding_facts();
    let Forward { problem, operands: Operands { q, k, v, bias, .. }, scratch, o, lse, .. } = &call;
    launcher.note("forward_cmma", &tile, bindings, tile.forward_shared_bytes(problem), tile.units());
    // SAFETY: rows, keys and elements are tested against the shapes that `check_operands` held against the problem;
    // vectors are read only where `vector_size` found rows aligned.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            launcher.cubes(cubes_of(problem, Side::Queries, tile.shape())),
            tile.dim(),
            address,
            vector_size(&[q, k, v]),
            q.arg(),
            k.arg(),
            v.arg(),
            bias.as_ref().map(DeviceTensor::arg).into(),
            scratch.buffer(),
            o.buffer(),
            lse.as_ref().map(DeviceTensor::buffer).into(),
            call.numbers(),
            bias.is_some(),
            with_lse,
            Compiled::of(problem, tile, false),
            q.elem,
        );
    }
    Ok((call.o, call.lse))
}

/// Attention backward: those of `dq`, `dk` and `dv` that are [`Wanted`], contiguous, each in the shape and element type of its
/// operand. Gradients of the bias, the slopes, the sinks and a score function's parameters are the portable kernels' business: they
/// are `None` here. `plan` as in [`forward`].
pub fn backward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    outputs: &Outputs,
    plan: Option<&DeviceTensor>,
    wanted: Wanted,
    config: CmmaConfig,
) -> Result<Gradients<DeviceTensor>, KernelError> {
    check_limits(problem, &DeviceLimits::of(client), config)?;
    check_operands(problem, operands)?;
    check_plan(problem, plan)?;
    check_outputs(problem, outputs)?;
    let scores = problem.batch * problem.heads_q * problem.seq_q * problem.seq_kv;
    let new = |operand: &DeviceTensor| {
        let make = if scores == 0 { DeviceTensor::zeros } else { DeviceTensor::empty };
        make(client, &operand.shape, operand.elem)
    };
    let gradients = Gradients {
        q: wanted.q.then(|| new(&operands.q)),
        k: wanted.k.then(|| new(&operands.k)),
        v: wanted.v.then(|| new(&operands.v)),
        ..Gradients::default()
    };
    let Gradients { q, k, v, .. } = &gradients;
    if scores == 0 || !(wanted.q || wanted.k || wanted.v) {
        return Ok(gradients);
    }
    let call = Backward::prepare(client, problem, operands, outputs, plan, config);
    if wanted.q || wanted.k {
        call.queries(q.as_ref());
    }
    if keys_fused(problem) {
        if wanted.k || wanted.v {
            call.keys(k.as_ref(), v.as_ref());
        }
    } else {
        if wanted.k {
            call.keys(k.as_ref(), None);
        }
        if wanted.v {
            call.keys(None, v.as_ref());
        }
    }
    Ok(gradients)
}

/// Bytes of the scratch buffer of a backward.
pub(crate) fn backward_scratch_bytes(problem: &Problem) -> usize {
    Layout::of(problem, Some(Partials::default())).bytes()
}

/// Whether `dk` and `dv` come from one launch: seven bindings hold both outputs or a bias, and a unit has registers for sums over
/// 256 elements of a row.
pub(crate) fn keys_fused(problem: &Problem) -> bool {
    let dims = padded(problem.head_dim) + padded(problem.value_dim);
    problem.bias.is_none() && dims <= crate::problem::MAX_HEAD_DIM
}

/// The launches of one backward.
struct Backward<'a> {
    launcher: Launcher<'a>,
    config: CmmaConfig,
    problem: &'a Problem,
    operands: &'a Operands<DeviceTensor>,
    outputs: &'a Outputs,
    layout: Layout,
    scratch: DeviceTensor,
}

impl<'a> Backward<'a> {
    /// Builds the scratch buffer and fills in the statistics of rows.
    fn prepare(
        client: &'a Client,
        problem: &'a Problem,
        operands: &'a Operands<DeviceTensor>,
        outputs: &'a Outputs,
        plan: Option<&DeviceTensor>,
        config: CmmaConfig,
    ) -> Self {
        let layout = Layout::of(problem, Some(Partials::default()));
        let launcher = Launcher { client, scratch_bytes: layout.bytes() };
        let scratch = scratch::build(&launcher, problem, operands, plan, &layout);
        fill_row_statistics(&launcher, problem, outputs, &scratch, &layout);
        Backward { launcher, config, problem, operands, outputs, layout, scratch }
    }

    fn numbers(&self) -> NumbersLaunch {
        numbers(self.problem, &self.layout)
    }

    /// Elements that are read at a time.
    fn vector_size(&self) -> usize {
        let Operands { q, k, v, .. } = self.operands;
        vector_size(&[q, k, v, &self.outputs.do_])
    }

    fn queries(&self, dq: Option<&DeviceTensor>) {
        let Operands { q, k, v, bias, .. } = self.operands;
        let tile = self.config.queries;
        let bound = [q, k, v, &self.outputs.do_, &self.scratch].into_iter().chain(bias).chain(dq);
        let (bindings, address) = binding_facts(bound);
        let shared = tile.queries_shared_bytes(self.problem);
        self.launcher.note("backward_queries_cmma", &tile, bindings, shared, tile.units());
        // SAFETY: rows, keys and elements are tested against the checked shapes; vectors are read only where `vector_size`
        // found rows aligned.
        unsafe {
            backward_queries_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(cubes_of(self.problem, Side::Queries, tile.shape())),
                tile.dim(),
                address,
                self.vector_size(),
                q.arg(),
                k.arg(),
                v.arg(),
                self.outputs.do_.arg(),
                bias.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                dq.map(DeviceTensor::buffer).into(),
                self.numbers(),
                bias.is_some(),
                dq.is_some(),
                Compiled::of(self.problem, tile, true),
                q.elem,
            );
        }
    }

    fn keys(&self, dk: Option<&DeviceTensor>, dv: Option<&DeviceTensor>) {
        let Operands { q, k, v, bias, .. } = self.operands;
        let tile = self.config.keys;
        // Only dk asks for do · vᵀ.
        let v = dk.map(|_| v);
        let bound = [q, k, &self.outputs.do_, &self.scratch].into_iter().chain(v).chain(bias).chain(dk).chain(dv);
        let (bindings, address) = binding_facts(bound);
        let shared = tile.keys_shared_bytes(self.problem);
        self.launcher.note("backward_keys_cmma", &tile, bindings, shared, tile.units());
        // SAFETY: as in `queries`.
        unsafe {
            backward_keys_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(cubes_of(self.problem, Side::Keys, tile.shape())),
                tile.dim(),
                address,
                self.vector_size(),
                q.arg(),
                k.arg(),
                v.map(DeviceTensor::arg).into(),
                self.outputs.do_.arg(),
                bias.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                dk.map(DeviceTensor::buffer).into(),
                dv.map(DeviceTensor::buffer).into(),
                self.numbers(),
                bias.is_some(),
                dk.is_some(),
                dv.is_some(),
                Compiled::of(self.problem, tile, true),
                q.elem,
            );
        }
    }
}

impl CmmaTile {
    /// A plane is a row of the cube: ROCm's matrices take a unit's place in its plane to be its first coordinate.
    fn dim(&self) -> CubeDim {
        CubeDim::new_2d(self.plane as u32, self.planes as u32)
    }
}
