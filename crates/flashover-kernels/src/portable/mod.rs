//! The kernels that run everywhere: shared-memory tiles, no plane or matrix operations.
//!
//! One source for CUDA, ROCm, Vulkan, WebGPU and Metal. A launch binds at most 7 storage buffers, and takes at most 16 KB
//! of shared memory and 256 units, which every WebGPU device grants. Products accumulate, and the softmax runs, in f32.
//! No float atomics: every sum is taken in a fixed order, so results are the same bits every time.

mod element;
mod forward;
mod scratch;
mod tile;
mod walk;

pub use tile::TileConfig;

use cubecl::prelude::*;
use cubecl::server::CubeCountSelection;

use crate::device::{DeviceLimits, DeviceTensor, KernelError, element_type};
use crate::launch_log::{self, Launch};
use crate::operands::Operands;
use crate::problem::Problem;
use element::{Flags, NumbersLaunch};
use scratch::Layout;

/// What all launches of one call share.
pub(crate) struct Launcher<'a> {
    client: &'a Client,
}

impl Launcher<'_> {
    /// At least `cubes` cubes, spread over the grid's dimensions where one does not hold them.
    fn cubes(&self, cubes: usize) -> CubeCount {
        CubeCountSelection::new(self.client, cubes as u32).cube_count()
    }

    fn note(
        &self,
        kernel: &'static str,
        config: String,
        bindings: usize,
        shared_bytes: usize,
        units: usize,
        scratch_bytes: usize,
    ) {
        launch_log::note(|| Launch { kernel, config, bindings, shared_bytes, units, scratch_bytes });
    }
}

/// Attention forward: `o` `[B, Hq, Sq, Dv]` in the problem's element type and, if asked for, `lse` `[B, Hq, Sq]` in f32.
pub fn forward(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    with_lse: bool,
    tile: TileConfig,
) -> Result<(DeviceTensor, Option<DeviceTensor>), KernelError> {
    let launcher = Launcher { client };
    let elem = element_type(problem.element);
    let o = DeviceTensor::empty(client, &problem.output_shape(), elem);
    let lse = with_lse.then(|| DeviceTensor::empty(client, &problem.lse_shape(), f32::elem_type_native()));
    let (problem, operands) = visible_part(problem, operands);
    let layout = Layout::of(&problem, false, 0);
    let scratch = scratch::build(&launcher, &problem, &operands, &layout);
    let cubes = problem.batch * problem.heads_q * problem.seq_q.div_ceil(tile.rows());
    unsafe {
        forward::forward_kernel::launch_unchecked(
            client,
            launcher.cubes(cubes),
            CubeDim::new_1d(tile.units() as u32),
            AddressType::U32,
            operands.q.arg(),
            operands.k.arg(),
            operands.v.arg(),
            operands.bias.as_ref().map(DeviceTensor::arg).into(),
            scratch.as_ref().map(DeviceTensor::buffer).into(),
            o.buffer(),
            lse.as_ref().map(DeviceTensor::buffer).into(),
            numbers(&problem, &layout),
            flags(&problem),
            with_lse,
            tile.chunks(problem.value_dim),
            tile,
            elem,
        );
    }
    Ok((o, lse))
}

/// The problem without what no score asks for: where there are no keys, empty operands cannot be bound, and are not read.
fn visible_part(problem: &Problem, operands: &Operands<DeviceTensor>) -> (Problem, Operands<DeviceTensor>) {
    let (mut problem, mut operands) = (problem.clone(), operands.clone());
    if problem.seq_kv == 0 {
        (operands.k, operands.v) = (operands.q.clone(), operands.q.clone());
        (problem.bias, problem.mask, operands.bias, operands.mask) = (None, None, None, None);
    }
    (problem, operands)
}

fn flags(problem: &Problem) -> Flags {
    Flags {
        softcap: problem.softcap.is_some(),
        alibi: problem.alibi,
        bias: problem.bias.is_some(),
        mask: problem.mask.is_some(),
        key_lengths: problem.key_lengths,
        learned_sinks: problem.learned_sinks,
        dropout: problem.dropout.is_some(),
    }
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
        problem.softcap.unwrap_or(1.0) as f32,
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
        layout.slopes,
        layout.sinks,
        layout.lengths,
        layout.partials,
        layout.mask,
        step(mask[0], mask[1] * mask[2] * row_words),
        step(mask[1], mask[2] * row_words),
        step(mask[2], row_words),
        u32::from(mask[3] != 1),
    )
}
