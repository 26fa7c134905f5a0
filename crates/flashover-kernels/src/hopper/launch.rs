//! From a problem and its operands to launches.

use core::ops::ControlFlow;

use cubecl::prelude::*;

use super::checks::{check_limits, reads_in_place};
use super::config::{HopperConfig, PIECE};
use super::forward::{Written, forward_kernel};
use super::sections::section;
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::launcher::{Forward, cubes_of};
use crate::family::walk::Side;
use crate::operands::Operands;
use crate::problem::Problem;

/// Attention forward, as [`portable::forward`](crate::portable::forward). `q`, `k` and `v` are tensors that the copy engine
/// [`reads_in_place`]. The third tensor, if asked for, is what rounding took from `o`, in its shape and element type: the
/// [backward](super::backward) takes `delta` from both.
pub fn forward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    plan: Option<&DeviceTensor>,
    with_lse: bool,
    with_rest: bool,
    cfg: HopperConfig,
) -> Result<(DeviceTensor, Option<DeviceTensor>, Option<DeviceTensor>), KernelError> {
    check_limits(problem, &DeviceLimits::of(client), cfg)?;
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
    for (operand, tensor) in [("q", q), ("k", k), ("v", v)] {
        if !reads_in_place(tensor) {
            return Err(KernelError::Layout { operand, found: tensor.strides.clone() });
        }
    }
    launcher.note("forward_hopper", &cfg, bindings, cfg.shared_bytes(), cfg.units());
    let works = cubes_of(problem, Side::Queries, cfg.shape()) / cfg.packed;
    let cubes = launcher.persistent_cubes(works);
    let [ns, no, np] = cfg.lanes();
    let scale = if cfg.plain { problem.scale as f32 } else { 1.0 };
    // SAFETY: the copy engine keeps to the shapes, which `check_operands` held against the problem; rows and keys are tested.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(cfg.units() as u32),
            address,
            boxes(q, cfg.packed, cfg.bq()),
            tiles(k, cfg.bk),
            tiles(v, cfg.bk),
            bias.as_ref().map(DeviceTensor::arg).into(),
            scratch.buffer(),
            fours(o),
            lse.as_ref().map(DeviceTensor::buffer).into(),
            rest.as_ref().map(fours).into(),
            call.numbers(),
            works as u32,
            section(problem, cfg, cubes) as u32,
            scale * core::f32::consts::LOG2_E,
            problem.bias.is_some(),
            problem.score.map(|score| score.code),
            Written { with_lse, with_rest, whole: problem.value_dim == cfg.value_dim },
            cfg,
            q.elem,
            ns,
            no,
            np,
        );
    }
    Ok((call.o, call.lse, rest))
}

/// A contiguous tensor whose rows are multiples of 8 elements, four elements at a time.
pub(super) fn fours(tensor: &DeviceTensor) -> BufferArg {
    // SAFETY: the tensor has a multiple of four elements.
    unsafe { BufferArg::from_raw_parts(tensor.handle.clone(), tensor.elements() / 4) }
}

/// A tensor as the copy engine reads it: `rows` rows of 64 elements at a time, swizzled.
pub(super) fn tiles(tensor: &DeviceTensor, rows: usize) -> TensorMapArg<Tiled> {
    boxes(tensor, 1, rows)
}

/// The same of `heads` heads at a time, one behind the other.
fn boxes(tensor: &DeviceTensor, heads: usize, rows: usize) -> TensorMapArg<Tiled> {
    let mut strides = tensor.strides.clone();
    for d in (0..strides.len() - 1).rev() {
        // Nothing is ever a stride of a single row, yet it must be a multiple of 16 bytes.
        if tensor.shape[d] <= 1 {
            strides[d] = (strides[d + 1] * tensor.shape[d + 1].max(1)).next_multiple_of(8);
        }
    }
    // SAFETY: shape and strides are the tensor's own.
    let arg = unsafe { TensorArg::from_raw_parts(tensor.handle.clone(), strides.into(), tensor.shape.clone().into()) };
    let args = TiledArgs { tile_size: [1, heads, rows, PIECE].into() };
    TensorMapArg::new(args, arg, tensor.elem).with_swizzle(TensorMapSwizzle::B128)
}
