//! What the launches of every kernel family have in common.

use core::fmt::Display;
use core::ops::ControlFlow;

use cubecl::prelude::*;
use cubecl::server::CubeCountSelection;

use super::checks::{check_operands, check_plan};
use super::element::NumbersLaunch;
use super::scratch::{self, Layout};
use super::tile_shape::TileShape;
use super::walk::Side;
use crate::device::{DeviceTensor, KernelError, element_type};
use crate::launch_log::{self, Launch};
use crate::operands::Operands;
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

/// A forward whose operands were checked, with everything that a launch needs.
pub(crate) struct Forward {
    pub problem: Problem,
    pub operands: Operands<DeviceTensor>,
    pub layout: Layout,
    pub scratch: DeviceTensor,
    pub o: DeviceTensor,
    pub lse: Option<DeviceTensor>,
}

impl Forward {
    /// Holds the operands against the problem, allocates what is returned and builds the scratch buffer. Without queries
    /// there is nothing to launch: then the outputs are all there is.
    pub fn prepare(
        client: &Client,
        problem: &Problem,
        operands: &Operands<DeviceTensor>,
        plan: Option<&DeviceTensor>,
        with_lse: bool,
    ) -> Result<ControlFlow<(DeviceTensor, Option<DeviceTensor>), Self>, KernelError> {
        check_operands(problem, operands)?;
        check_plan(problem, plan)?;
        let o = DeviceTensor::empty(client, &problem.output_shape(), element_type(problem.element));
        let lse = with_lse.then(|| DeviceTensor::empty(client, &problem.lse_shape(), f32::elem_type_native()));
        if problem.is_empty() {
            return Ok(ControlFlow::Break((o, lse)));
        }
        let (problem, operands) = visible_part(problem, operands);
        let layout = Layout::of(&problem, None);
        let launcher = Launcher { client, scratch_bytes: layout.bytes() };
        let scratch = scratch::build(&launcher, &problem, &operands, plan, &layout);
        Ok(ControlFlow::Continue(Forward { problem, operands, layout, scratch, o, lse }))
    }

    /// How many buffers are bound and how wide their indices are.
    pub fn binding_facts(&self) -> (usize, AddressType) {
        let Forward { operands: Operands { q, k, v, bias, .. }, scratch, o, lse, .. } = self;
        binding_facts([q, k, v, o].into_iter().chain(bias).chain([scratch]).chain(lse))
    }

    pub fn launcher<'a>(&self, client: &'a Client) -> Launcher<'a> {
        Launcher { client, scratch_bytes: self.layout.bytes() }
    }

    pub fn numbers(&self) -> NumbersLaunch {
        numbers(&self.problem, &self.layout)
    }
}

/// What all launches of one call share.
pub(crate) struct Launcher<'a> {
    pub client: &'a Client,
    /// Bytes of the call's scratch buffer.
    pub scratch_bytes: usize,
}

impl Launcher<'_> {
    /// At least `cubes` cubes, spread over the grid's dimensions where one does not hold them.
    pub fn cubes(&self, cubes: usize) -> CubeCount {
        CubeCountSelection::new(self.client, cubes as u32).cube_count()
    }

    /// How many of `heads` heads are worked on side by side: as many as there are multiprocessors, with `cubes_each` cubes at a
    /// time, for the cubes of their `tiles` tiles.
    pub fn heads_side_by_side(&self, tiles: usize, cubes_each: usize, heads: usize) -> usize {
        (self.multiprocessors() * cubes_each / tiles).clamp(1, heads)
    }

    /// The same under a plan. Cubes of a head that list other tiles wait for each other at those that they share, the more
    /// the more of them there are; but what the heads read and add to, `bytes` each, should find room near the
    /// multiprocessors (docs/measurements.md has the times).
    pub fn listed_heads_side_by_side(&self, bytes: usize, heads: usize) -> usize {
        const ROOM: usize = 80 << 20;
        (ROOM / bytes.max(1)).max(4).min(self.multiprocessors()).clamp(1, heads)
    }

    /// One cube a multiprocessor, each of which takes work after work, or one a work where there are fewer.
    pub fn persistent_cubes(&self, works: usize) -> usize {
        works.min(self.multiprocessors())
    }

    fn multiprocessors(&self) -> usize {
        self.client.properties().hardware.num_streaming_multiprocessors.unwrap_or(1) as usize
    }

    /// Notes the launch of a kernel over tiles.
    pub fn note(
        &self,
        kernel: &'static str,
        config: &impl Display,
        bindings: usize,
        shared_bytes: usize,
        units: usize,
    ) {
        let scratch_bytes = self.scratch_bytes;
        launch_log::note(|| Launch {
            kernel,
            config: config.to_string(),
            bindings,
            shared_bytes,
            units,
            scratch_bytes,
        });
    }

    /// Notes the launch of a kernel without tiles.
    pub fn note_small(&self, kernel: &'static str, bindings: usize, shared_bytes: usize) {
        self.note(kernel, &format_args!("{SUM_UNITS} units"), bindings, shared_bytes, SUM_UNITS);
    }
}

/// How many buffers are bound and how wide their indices are.
pub(crate) fn binding_facts<'a>(tensors: impl Iterator<Item = &'a DeviceTensor>) -> (usize, AddressType) {
    tensors.fold((0, AddressType::U32), |(count, address), tensor| (count + 1, address.max(tensor.address_type())))
}

/// Cubes of a kernel that owns tiles of queries, or of keys: one for each head and each tile, under a plan also for those
/// that its last tile has past the end.
pub(crate) fn cubes_of(problem: &Problem, side: Side, tile: TileShape) -> usize {
    let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, plan, .. } = *problem;
    let (heads, len, size) = match side {
        Side::Queries => (heads_q, seq_q, plan.map(|plan| plan.tile.bq)),
        Side::Keys => (heads_kv, seq_kv, plan.map(|plan| plan.tile.bk)),
    };
    let size = size.map_or(tile.rows, |size| size as usize);
    batch * heads * len.div_ceil(size) * (size / tile.rows)
}

/// The problem without what no score asks for: where there are no keys, empty operands cannot be bound, and are not read.
pub(crate) fn without_absent_scores(problem: &Problem) -> Problem {
    let mut problem = problem.clone();
    if problem.seq_kv == 0 {
        (problem.bias, problem.mask, problem.plan, problem.score) = (None, None, None, None);
    }
    problem
}

/// [`without_absent_scores`], and the operands likewise, `q` standing in for `k` and `v`.
pub(crate) fn visible_part(problem: &Problem, operands: &Operands<DeviceTensor>) -> (Problem, Operands<DeviceTensor>) {
    let mut operands = operands.clone();
    if problem.seq_kv == 0 {
        (operands.k, operands.v) = (operands.q.clone(), operands.q.clone());
        (operands.bias, operands.mask, operands.score_parameters) = (None, None, None);
    }
    (without_absent_scores(problem), operands)
}

pub(crate) fn numbers(problem: &Problem, layout: &Layout) -> NumbersLaunch {
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
        layout.parameters,
        problem.score.map_or(0, |score| score.parameters as u32),
        layout.parameter_partials,
        layout.plan,
        layout.mask,
        step(mask[0], mask[1] * mask[2] * row_words),
        step(mask[1], mask[2] * row_words),
        step(mask[2], row_words),
        u32::from(mask[3] != 1),
    )
}
