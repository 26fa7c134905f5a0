//! From a problem and its operands to launches.

use cubecl::prelude::*;

use super::checks::check_limits;
use super::config::{Compiled, MmaConfig, MmaTile};
use super::forward::forward_kernel;
use crate::device::{DeviceLimits, DeviceTensor, KernelError, element_type};
use crate::family::checks::{check_operands, check_plan};
use crate::family::launcher::{Launcher, binding_facts, cubes_of, numbers, visible_part};
use crate::family::scratch::{self, Layout};
use crate::family::walk::Side;
use crate::operands::Operands;
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
    config: MmaConfig,
) -> Result<(DeviceTensor, Option<DeviceTensor>), KernelError> {
    check_limits(problem, &DeviceLimits::of(client), config)?;
    let tile = config.forward;
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
    let launcher = Launcher { client, scratch_bytes: layout.bytes() };
    let scratch = scratch::build(&launcher, &problem, &operands, plan, &layout);
    let Operands { q, k, v, bias, .. } = &operands;
    let bound = [q, k, v, &o].into_iter().chain(bias).chain([&scratch]).chain(&lse);
    let (bindings, address) = binding_facts(bound);
    launcher.note("forward_mma", &tile, bindings, tile.forward_shared_bytes(&problem), tile.units());
    // SAFETY: rows, keys and elements are tested against the shapes that `check_operands` held against the problem;
    // 16-byte accesses are made only where `Compiled` found rows aligned.
    unsafe {
        forward_kernel::launch_unchecked(
            client,
            launcher.cubes(cubes_of(&problem, Side::Queries, tile.shape())),
            tile.dim(),
            address,
            q.arg(),
            k.arg(),
            v.arg(),
            bias.as_ref().map(DeviceTensor::arg).into(),
            scratch.buffer(),
            o.buffer(),
            lse.as_ref().map(DeviceTensor::buffer).into(),
            numbers(&problem, &layout),
            bias.is_some(),
            with_lse,
            Compiled::of(&problem, tile, [q, k, v], None),
            elem,
        );
    }
    Ok((o, lse))
}

impl MmaTile {
    fn dim(&self) -> CubeDim {
        CubeDim::new_1d(self.units() as u32)
    }
}
