//! From a problem and its operands to launches.

use core::ops::ControlFlow;

use cubecl::prelude::*;

use super::backward_keys::backward_keys_kernel;
use super::backward_queries::backward_queries_kernel;
use super::checks::check_limits;
use super::config::{Compiled, MmaConfig, MmaTile};
use super::forward::forward_kernel;
use super::forward_plain::forward_plain_kernel;
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::launcher::{Forward, Outputs, binding_facts, cubes_of};
use crate::family::two_passes::{self, Call};
use crate::family::walk::Side;
use crate::operands::{Gradients, Operands, Wanted};
use crate::problem::{Element, Problem};

/// Attention forward: `o` `[B, Hq, Sq, Dv]` in the problem's element type and, if asked for, `lse` `[B, Hq, Sq]` in f32,
/// both contiguous, and likewise what rounding took from `o`, which a [one-pass backward](super::backward_one_pass) asks for.
/// Nothing is written for what was not asked for. `plan` is that of the problem, in
/// [`flat`](crate::block_plan::flat) form: u32, `[words]`.
pub fn forward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    plan: Option<&DeviceTensor>,
    with_lse: bool,
    with_rest: bool,
    config: MmaConfig,
) -> Result<(DeviceTensor, Option<DeviceTensor>, Option<DeviceTensor>), KernelError> {
    check_limits(problem, &DeviceLimits::of(client), config)?;
    if with_rest && problem.element == Element::F32 {
        return Err(KernelError::Form {
            kernel: "forward_mma",
            what: "elements of f32, of which rounding takes nothing",
        });
    }
    let tile = config.forward;
    let call = match Forward::prepare(client, problem, operands, plan, with_lse)? {
        ControlFlow::Continue(call) => call,
        ControlFlow::Break((o, lse)) => {
            let rest = with_rest.then(|| o.clone());
            return Ok((o, lse, rest));
        }
    };
    let rest = with_rest.then(|| DeviceTensor::empty(client, &call.o.shape, call.o.elem));
    let launcher = call.launcher(client);
    let (bindings, address) = call.binding_facts();
    let bindings = bindings + usize::from(with_rest);
    let Forward { problem, operands: Operands { q, k, v, bias, .. }, scratch, o, lse, .. } = &call;
    launcher.note("forward_mma", &tile, bindings, tile.forward_shared_bytes(problem), tile.units());
    let c = Compiled::of(problem, tile, [q, k, v], None);
    if c.is_plain(problem, [k, v]) {
        // SAFETY: as below.
        unsafe {
            forward_plain_kernel::launch_unchecked(
                client,
                launcher.cubes(cubes_of(problem, Side::Queries, tile.shape())),
                tile.dim(),
                address,
                q.arg(),
                k.arg(),
                v.arg(),
                scratch.buffer(),
                o.buffer(),
                lse.as_ref().map(DeviceTensor::buffer).into(),
                rest.as_ref().map(DeviceTensor::buffer).into(),
                call.numbers(),
                with_lse,
                with_rest,
                c,
                q.elem,
            );
        }
        return Ok((call.o, call.lse, rest));
    }
    // SAFETY: rows, keys and elements are tested against the shapes that `check_operands` held against the problem;
    // 16-byte accesses are made only where `Compiled` found rows aligned.
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
            rest.as_ref().map(DeviceTensor::buffer).into(),
            call.numbers(),
            bias.is_some(),
            with_lse,
            with_rest,
            c,
            q.elem,
        );
    }
    Ok((call.o, call.lse, rest))
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
    config: MmaConfig,
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

fn compiled(call: &Call, tile: MmaTile) -> Compiled {
    let Operands { q, k, v, .. } = call.operands;
    Compiled::of(call.problem, tile, [q, k, v], Some(&call.outputs.do_))
}

/// `dq`, and `delta` into the scratch buffer.
fn queries(call: &Call, tile: MmaTile, dq: Option<&DeviceTensor>) {
    let Operands { q, k, v, bias, .. } = call.operands;
    let bound = [q, k, v, &call.outputs.do_, &call.scratch].into_iter().chain(bias).chain(dq);
    let (bindings, address) = binding_facts(bound);
    let shared = tile.queries_shared_bytes(call.problem);
    call.launcher.note("backward_queries_mma", &tile, bindings, shared, tile.units());
    // SAFETY: rows, keys and elements are tested against the checked shapes; 16-byte accesses are made only where
    // `Compiled` found rows aligned.
    unsafe {
        backward_queries_kernel::launch_unchecked(
            call.launcher.client,
            call.launcher.cubes(cubes_of(call.problem, Side::Queries, tile.shape())),
            tile.dim(),
            address,
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
            compiled(call, tile),
            q.elem,
        );
    }
}

/// `dk`, `dv` or both.
fn keys(call: &Call, tile: MmaTile, dk: Option<&DeviceTensor>, dv: Option<&DeviceTensor>) {
    let Operands { q, k, v, bias, .. } = call.operands;
    // Only dk asks for do · vᵀ.
    let v = dk.map(|_| v);
    let bound = [q, k, &call.outputs.do_, &call.scratch].into_iter().chain(v).chain(bias).chain(dk).chain(dv);
    let (bindings, address) = binding_facts(bound);
    let shared = tile.keys_shared_bytes(call.problem);
    call.launcher.note("backward_keys_mma", &tile, bindings, shared, tile.units());
    // SAFETY: as in `queries`.
    unsafe {
        backward_keys_kernel::launch_unchecked(
            call.launcher.client,
            call.launcher.cubes(cubes_of(call.problem, Side::Keys, tile.shape())),
            tile.dim(),
            address,
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
            compiled(call, tile),
            q.elem,
        );
    }
}

impl MmaTile {
    fn dim(&self) -> CubeDim {
        CubeDim::new_1d(self.units() as u32)
    }
}
