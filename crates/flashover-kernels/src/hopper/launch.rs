//! From a problem and its operands to launches.

use cubecl::prelude::*;

use super::checks::{check_limits, reads_in_place};
use super::config::{HopperConfig, PIECE};
use super::forward::forward_kernel;
use crate::device::{DeviceLimits, DeviceTensor, KernelError, element_type};
use crate::family::checks::{check_operands, check_plan};
use crate::family::launcher::{Launcher, binding_facts, cubes_of, numbers, visible_part};
use crate::family::scratch::{self, Layout};
use crate::family::walk::Side;
use crate::operands::Operands;
use crate::problem::{Element, Problem};

/// Attention forward, as [`portable::forward`](crate::portable::forward). `q`, `k` and `v` are tensors that the copy engine
/// [`reads_in_place`].
pub fn forward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    plan: Option<&DeviceTensor>,
    with_lse: bool,
    cfg: HopperConfig,
) -> Result<(DeviceTensor, Option<DeviceTensor>), KernelError> {
    check_limits(problem, &DeviceLimits::of(client), cfg)?;
    check_operands(problem, operands)?;
    check_plan(problem, plan)?;
    let elem = element_type(problem.element);
    let o = DeviceTensor::empty(client, &problem.output_shape(), elem);
    let lse = with_lse.then(|| DeviceTensor::empty(client, &problem.lse_shape(), f32::elem_type_native()));
    if problem.is_empty() {
        return Ok((o, lse));
    }
    let (problem, operands) = visible_part(problem, operands);
    for (operand, tensor) in [("q", &operands.q), ("k", &operands.k), ("v", &operands.v)] {
        if !reads_in_place(tensor) {
            return Err(KernelError::Layout { operand, found: tensor.strides.clone() });
        }
    }
    let layout = Layout::of(&problem, None);
    let launcher = Launcher { client, scratch_bytes: layout.bytes() };
    let scratch = scratch::build(&launcher, &problem, &operands, plan, &layout);
    let bound = [&operands.q, &operands.k, &operands.v, &o].into_iter();
    let bound = bound.chain(&operands.bias).chain([&scratch]).chain(&lse);
    let (bindings, address) = binding_facts(bound);
    launcher.note("forward_hopper", &cfg, bindings, cfg.shared_bytes(), cfg.units());
    let works = cubes_of(&problem, Side::Queries, cfg.shape());
    let multiprocessors = client.properties().hardware.num_streaming_multiprocessors.unwrap_or(1) as usize;
    let [ns, no, np] = cfg.lanes();
    let ty = match problem.element {
        Element::F16 => "f16",
        _ => "bf16",
    };
    let scale = if cfg.plain { problem.scale as f32 } else { 1.0 };
    // SAFETY: the copy engine keeps to the shapes, which `check_operands` held against the problem; rows and keys are tested.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            CubeCount::Static(works.min(multiprocessors) as u32, 1, 1),
            CubeDim::new_1d(cfg.units() as u32),
            address,
            tiles(&operands.q, cfg.bq()),
            tiles(&operands.k, cfg.bk),
            tiles(&operands.v, cfg.bk),
            operands.bias.as_ref().map(DeviceTensor::arg).into(),
            scratch.buffer(),
            BufferArg::from_raw_parts(o.handle.clone(), o.elements() / 8),
            lse.as_ref().map(DeviceTensor::buffer).into(),
            numbers(&problem, &layout),
            works as u32,
            section(&problem) as u32,
            scale * core::f32::consts::LOG2_E,
            problem.bias.is_some(),
            with_lse,
            ty.to_string(),
            cfg,
            elem,
            ns,
            no,
            np,
        );
    }
    Ok((o, lse))
}

/// Bytes of keys and values that a section of heads may take of the second-level cache.
const SECTION_BYTES: usize = 24 << 20;

/// Heads that are worked on side by side: as many as leave their keys and values in the cache.
fn section(problem: &Problem) -> usize {
    let Problem { batch, heads_q, seq_kv, head_dim, value_dim, element, .. } = *problem;
    let bytes = seq_kv * (head_dim + value_dim) * element.bytes();
    (SECTION_BYTES / bytes.max(1)).max(1).saturating_mul(problem.group()).clamp(1, batch * heads_q)
}

/// A tensor as the copy engine reads it: `rows` rows of 64 elements at a time, swizzled.
fn tiles(tensor: &DeviceTensor, rows: usize) -> TensorMapArg<Tiled> {
    let mut strides = tensor.strides.clone();
    for d in (0..strides.len() - 1).rev() {
        // Nothing is ever a stride of a single row, yet it must be a multiple of 16 bytes.
        if tensor.shape[d] <= 1 {
            strides[d] = (strides[d + 1] * tensor.shape[d + 1].max(1)).next_multiple_of(8);
        }
    }
    // SAFETY: shape and strides are the tensor's own.
    let arg = unsafe { TensorArg::from_raw_parts(tensor.handle.clone(), strides.into(), tensor.shape.clone().into()) };
    let args = TiledArgs { tile_size: [1, 1, rows, PIECE].into() };
    TensorMapArg::new(args, arg, tensor.elem).with_swizzle(TensorMapSwizzle::B128)
}
