//! From a problem and its operands to the launches of a backward.

use cubecl::prelude::*;

use super::backward::backward_kernel;
use super::backward_config::HopperBackwardConfig;
use super::backward_rows::statistics_kernel;
use super::backward_works::lag;
use super::checks::{check_backward, reads_in_place};
use super::launch::{fours, tiles};
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::checks::{check_operands, check_outputs, check_plan, check_rest};
use crate::family::launcher::{Launcher, Outputs, binding_facts, numbers};
use crate::family::scratch::{self, Layout};
use crate::family::turn_buffer::TurnBuffer;
use crate::operands::{Gradients, Operands};
use crate::problem::Problem;

/// Units of a cube of the kernel before.
pub(crate) const ROW_UNITS: usize = 256;

/// Attention backward: `dq`, `dk` and `dv`, contiguous, each in the shape and element type of its operand. `q`, `k`, `v` and the
/// gradient of `o` are tensors that the copy engine [`reads_in_place`]; `o` is contiguous, and so is `rest`, what rounding
/// took from it in the [forward](super::forward). `rest` is given up as soon as it has been read.
pub fn backward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    outputs: &Outputs,
    plan: Option<&DeviceTensor>,
    rest: DeviceTensor,
    cfg: HopperBackwardConfig,
) -> Result<Gradients<DeviceTensor>, KernelError> {
    check_backward(problem, &DeviceLimits::of(client), cfg)?;
    check_operands(problem, operands)?;
    check_outputs(problem, outputs)?;
    check_plan(problem, plan)?;
    check_rest(problem, outputs, &rest)?;
    let Operands { q, k, v, bias, .. } = operands;
    let d_o = &outputs.do_;
    for (operand, tensor) in [("q", q), ("k", k), ("v", v), ("do", d_o)] {
        if !reads_in_place(tensor) {
            return Err(KernelError::Layout { operand, found: tensor.strides.clone() });
        }
    }
    let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, .. } = *problem;
    if batch * heads_q * seq_q * seq_kv == 0 {
        let zeros = |operand: &DeviceTensor| Some(DeviceTensor::zeros(client, &operand.shape, operand.elem));
        return Ok(Gradients { q: zeros(q), k: zeros(k), v: zeros(v), ..Gradients::default() });
    }
    let layout = Layout::of(problem, None);
    let launcher = Launcher { client, scratch_bytes: layout.bytes() };
    let scratch = scratch::build(&launcher, problem, operands, plan, &layout);
    let query_tiles = batch * heads_q * seq_q.div_ceil(cfg.bq);
    let float = f32::elem_type_native();
    let statistics = DeviceTensor::empty(client, &[query_tiles * cfg.statistics() * cfg.bq], float);
    let counters = query_tiles * cfg.counters() + batch * heads_kv;
    let turns = TurnBuffer::new(client, problem, counters, cfg.shape(), !cfg.unordered);
    let Outputs { o, lse, dlse, .. } = outputs;
    let bound = [o, &rest, d_o, lse, &statistics, &turns.words].into_iter().chain(dlse);
    let (bindings, address) = binding_facts(bound);
    launcher.note("statistics_hopper", &cfg, bindings, 0, ROW_UNITS);
    let rows = query_tiles * cfg.bq;
    let stride = |d: usize| if d_o.shape[d] > 1 { d_o.strides[d] / 8 } else { 0 };
    let last = (0..3).map(|d| (d_o.shape[d] - 1) * stride(d)).sum::<usize>();
    // SAFETY: rows are tested against the number of padded rows that the buffers were made for; `check_outputs` held the shapes
    // against the problem, and a line of `d_o` lies within its last row.
    unsafe {
        statistics_kernel::launch_unchecked(
            client,
            launcher.cubes((8 * rows).div_ceil(ROW_UNITS)),
            CubeDim::new_1d(ROW_UNITS as u32),
            address,
            eights(o),
            eights(&rest),
            BufferArg::from_raw_parts(d_o.handle.clone(), last + problem.value_dim / 8),
            lse.arg(),
            dlse.as_ref().map(DeviceTensor::arg).into(),
            statistics.buffer(),
            turns.words.buffer(),
            numbers(problem, &layout),
            stride(0),
            stride(1),
            stride(2),
            rows,
            dlse.is_some(),
            cfg,
        );
    }
    // Its memory may serve what follows.
    drop(rest);
    turns.list_steps(&launcher, problem, &scratch, &layout, q.elem, cfg.shape());
    let new = |operand: &DeviceTensor| DeviceTensor::empty(client, &operand.shape, operand.elem);
    let (dq, dk, dv) = (new(q), new(k), new(v));
    let sums = DeviceTensor::empty(client, &[query_tiles * cfg.dq_elements()], float);
    let bound = [q, k, v, d_o, &scratch, &statistics, &turns.words, &sums, &dq, &dk, &dv];
    let (bindings, address) = binding_facts(bound.into_iter().chain(bias));
    launcher.note("backward_hopper", &cfg, bindings, cfg.shared_bytes(), cfg.units());
    let [ns, nk, nv, nq, np] = cfg.lanes();
    let key_tiles = seq_kv.div_ceil(cfg.bk());
    // Who takes turns waits less the more heads there are side by side; who does not needs no more than fill the device.
    let section = if cfg.listed && !cfg.unordered {
        let q_heads = heads_q / heads_kv;
        let bytes = q_heads * seq_q * (2 * (cfg.head_dim + cfg.value_dim) + 4 * cfg.head_dim);
        launcher.listed_heads_side_by_side(bytes, batch * heads_kv)
    } else {
        launcher.heads_side_by_side(key_tiles, 1, batch * heads_kv)
    };
    let cubes = launcher.persistent_cubes(batch * heads_kv * key_tiles);
    // SAFETY: the copy engine keeps to the shapes, which were checked; the buffers hold whole tiles; rows of dq, dk and dv are tested.
    unsafe {
        backward_kernel::launch_unchecked(
            client,
            CubeCount::Static(cubes as u32, 1, 1),
            CubeDim::new_1d(cfg.units() as u32),
            address,
            tiles(q, cfg.bq),
            tiles(k, cfg.bk()),
            tiles(v, cfg.bk()),
            tiles(d_o, cfg.bq),
            bias.as_ref().map(DeviceTensor::arg).into(),
            scratch.buffer(),
            statistics.buffer(),
            turns.words.buffer(),
            sums.buffer(),
            eights(&dq),
            fours(&dk),
            fours(&dv),
            numbers(problem, &layout),
            problem.scale as f32 * core::f32::consts::LOG2_E,
            section as u32,
            lag(section * key_tiles, cubes, cfg),
            turns.lists(),
            bias.is_some(),
            problem.score.map(|score| score.code),
            cfg,
            q.elem,
            ns,
            nk,
            nv,
            nq,
            np,
        );
    }
    Ok(Gradients { q: Some(dq), k: Some(dk), v: Some(dv), ..Gradients::default() })
}

/// A contiguous tensor whose rows are multiples of 8 elements, as lines of 16 bytes.
fn eights(tensor: &DeviceTensor) -> BufferArg {
    // SAFETY: a line is 8 elements, of which the tensor has a multiple.
    unsafe { BufferArg::from_raw_parts(tensor.handle.clone(), tensor.elements() / 8) }
}
