//! From a problem and its operands to launches.

use core::ops::ControlFlow;

use cubecl::prelude::*;

use super::backward_keys::backward_keys_kernel;
use super::backward_queries::backward_queries_kernel;
use super::checks::check_limits;
use super::config::{CmmaConfig, CmmaTile, Compiled, vector_size};
use super::forward::forward_kernel;
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::launcher::{Forward, Outputs, binding_facts, cubes_of};
use crate::family::two_passes::{self, Call};
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
    two_passes::gradients(
        client,
        problem,
        operands,
        outputs,
        plan,
        wanted,
        |call, dq| queries(call, config.queries, dq),
        |call, dk, dv| keys(call, config.keys, dk, dv),
    )
}

/// Elements that both kernels read at a time.
fn elements_at_a_time(call: &Call) -> usize {
    let Operands { q, k, v, .. } = call.operands;
    vector_size(&[q, k, v, &call.outputs.do_])
}

/// `dq`, and `delta` into the scratch buffer.
fn queries(call: &Call, tile: CmmaTile, dq: Option<&DeviceTensor>) {
    let Operands { q, k, v, bias, .. } = call.operands;
    let bound = [q, k, v, &call.outputs.do_, &call.scratch].into_iter().chain(bias).chain(dq);
    let (bindings, address) = binding_facts(bound);
    let shared = tile.queries_shared_bytes(call.problem);
    call.launcher.note("backward_queries_cmma", &tile, bindings, shared, tile.units());
    // SAFETY: rows, keys and elements are tested against the checked shapes; vectors are read only where `vector_size`
    // found rows aligned.
    unsafe {
        backward_queries_kernel::launch_unchecked(
            call.launcher.client,
            call.launcher.cubes(cubes_of(call.problem, Side::Queries, tile.shape())),
            tile.dim(),
            address,
            elements_at_a_time(call),
            q.arg(),
            k.arg(),
            v.arg(),
            call.outputs.do_.arg(),
            bias.as_ref().map(DeviceTensor::arg).into(),
            call.scratch.buffer(),
            dq.map(DeviceTensor::buffer).into(),
            call.numbers(),
            bias.is_some(),
            dq.is_some(),
            Compiled::of(call.problem, tile, true),
            q.elem,
        );
    }
}

/// `dk`, `dv` or both.
fn keys(call: &Call, tile: CmmaTile, dk: Option<&DeviceTensor>, dv: Option<&DeviceTensor>) {
    let Operands { q, k, v, bias, .. } = call.operands;
    // Only dk asks for do · vᵀ.
    let v = dk.map(|_| v);
    let bound = [q, k, &call.outputs.do_, &call.scratch].into_iter().chain(v).chain(bias).chain(dk).chain(dv);
    let (bindings, address) = binding_facts(bound);
    let shared = tile.keys_shared_bytes(call.problem);
    call.launcher.note("backward_keys_cmma", &tile, bindings, shared, tile.units());
    // SAFETY: as in `queries`.
    unsafe {
        backward_keys_kernel::launch_unchecked(
            call.launcher.client,
            call.launcher.cubes(cubes_of(call.problem, Side::Keys, tile.shape())),
            tile.dim(),
            address,
            elements_at_a_time(call),
            q.arg(),
            k.arg(),
            v.map(DeviceTensor::arg).into(),
            call.outputs.do_.arg(),
            bias.as_ref().map(DeviceTensor::arg).into(),
            call.scratch.buffer(),
            dk.map(DeviceTensor::buffer).into(),
            dv.map(DeviceTensor::buffer).into(),
            call.numbers(),
            bias.is_some(),
            dk.is_some(),
            dv.is_some(),
            Compiled::of(call.problem, tile, true),
            q.elem,
        );
    }
}

impl CmmaTile {
    /// A plane is a row of the cube: ROCm's matrices take a unit's place in its plane to be its first coordinate.
    fn dim(&self) -> CubeDim {
        CubeDim::new_2d(self.plane as u32, self.planes as u32)
    }
}
