//! The one-pass backward: its tiles, and from a problem and its operands to its launches.

use core::fmt::{Display, Formatter};

use cubecl::prelude::*;

use super::config::{Compiled, MmaTile, ROWS, STAGES, WARP, WIDE, statistics_bytes};
use super::one_pass::one_pass_kernel;
use super::one_pass_rows::{delta_kernel, finish_kernel};
use super::tile::{DEPTH, PIECE, padded, pitch};
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::checks::{check_operands, check_outputs, check_plan, check_rest};
use crate::family::launcher::{Launcher, Outputs, binding_facts, numbers};
use crate::family::scratch::{self, Layout, Partials, fill_row_statistics};
use crate::family::tile_shape::TileShape;
use crate::family::turn_buffer::TurnBuffer;
use crate::family::two_passes::FEW_KEYS;
use crate::operands::{Gradients, Operands};
use crate::problem::{Element, Problem};

/// Buffers that its largest launch binds.
pub(crate) const BINDINGS: usize = 11;

/// Units of a cube of the kernels before and after.
pub(crate) const ROW_UNITS: usize = 256;

/// Sizes of the one-pass backward of a problem, known when its kernels are compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OnePass {
    /// Rows are the keys that a cube owns, columns the queries of a step.
    pub tile: MmaTile,
    /// The head dimension, padded.
    pub head_dim: usize,
    /// The value dimension, padded.
    pub value_dim: usize,
    /// Whether a plan lists the query tiles.
    pub listed: bool,
    /// Whether the device adds four floats to global memory at once (sm90).
    pub vector_adds: bool,
}

impl OnePass {
    /// Sizes for a problem on a device, and why; or what it has no form for.
    pub fn of(problem: &Problem, limits: &DeviceLimits) -> Result<(Self, &'static str), &'static str> {
        let (head_dim, value_dim) = (padded(problem.head_dim), padded(problem.value_dim));
        if problem.element == Element::F32 {
            return Err("elements of f32");
        }
        if problem.seq_kv < FEW_KEYS {
            return Err("so few keys");
        }
        if head_dim.max(value_dim) > WIDE {
            return Err("head dimensions above 128");
        }
        let tile = |warps| MmaTile { warps, blocks: 1, cols: 64, part: 64 };
        let (warps, why) = match head_dim.max(value_dim) {
            ..=64 => (4, "two cubes of such heads share a multiprocessor"),
            _ => (8, "the registers of a multiprocessor hold dk and dv of 128 keys"),
        };
        let listed = problem.plan.is_some();
        let of = OnePass { tile: tile(warps), head_dim, value_dim, listed, vector_adds: limits.wgmma };
        if problem.plan.is_some_and(|plan| !of.turned().divides(plan.tile)) {
            return Err("a block plan whose tiles are no multiples of 64 queries and the keys of a cube");
        }
        if of.shared_bytes() > limits.max_shared_bytes || BINDINGS > limits.max_bindings {
            return Err("the shared memory or the bindings of this device");
        }
        Ok((of, why))
    }

    /// As a tile on the side of queries.
    pub(crate) const fn turned(&self) -> TileShape {
        self.tile.shape().turned()
    }

    /// Whether the tile is one that pairs of warps can share, each pair with a barrier of the 16 that a cube has, beside three others.
    const fn in_pairs(&self) -> bool {
        let MmaTile { warps, blocks, cols, .. } = self.tile;
        blocks == 1 && warps.is_multiple_of(2) && warps / 2 + 3 <= 16 && cols.is_multiple_of(2 * DEPTH)
    }

    /// How a warp multiplies scores: two share 32 keys, each with half the queries.
    pub(crate) const fn scores(&self) -> MmaTile {
        let cols = self.tile.cols / 2;
        MmaTile { warps: self.tile.warps / 2, blocks: 2, cols, part: cols }
    }

    /// Blocks of 16 queries that a warp has of dq: half of all.
    pub(crate) const fn query_blocks(&self) -> usize {
        self.tile.cols / (2 * ROWS)
    }

    /// Pairs of blocks of 8 elements that a warp has of dq, the last perhaps past the end: every second warp has the same queries.
    pub(crate) const fn pairs(&self) -> usize {
        (self.head_dim / DEPTH).div_ceil(self.tile.warps / 2)
    }

    /// Whether the pairs of all warps are those of the head dimension.
    pub(crate) const fn even(&self) -> bool {
        (self.head_dim / DEPTH).is_multiple_of(self.tile.warps / 2)
    }

    /// Blocks of sums that a warp has of dq.
    pub(crate) const fn blocks(&self) -> usize {
        2 * self.pairs() * self.query_blocks()
    }

    /// Bytes between rows in shared memory, the same for all elements that it takes.
    const fn pitch(&self, dim: usize) -> usize {
        pitch(dim, Element::BF16)
    }

    /// Bytes of a stage: queries, gradients of outputs, statistics.
    pub(crate) const fn stage_bytes(&self) -> usize {
        self.tile.cols * (self.pitch(self.head_dim) + self.pitch(self.value_dim)) + statistics_bytes(&self.tile)
    }

    /// Bytes of a tile of gradients of scores, a row a key.
    pub(crate) const fn ds_bytes(&self) -> usize {
        self.tile.rows() * self.pitch(self.tile.cols)
    }

    /// Bytes of the weights that warps hand each other.
    pub(crate) const fn weight_bytes(&self) -> usize {
        self.tile.rows() * self.tile.cols * Element::BF16.bytes()
    }

    /// Bytes of a tile of dq in f32.
    pub(crate) const fn sums_bytes(&self) -> usize {
        self.blocks() * self.tile.units() * PIECE
    }

    /// Shared memory of a cube in bytes.
    pub const fn shared_bytes(&self) -> usize {
        let own = self.tile.rows() * (self.pitch(self.head_dim) + self.pitch(self.value_dim));
        own + STAGES * self.stage_bytes() + self.ds_bytes() + self.weight_bytes()
    }
}

impl Display for OnePass {
    fn fmt(&self, f: &mut Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}, one pass", self.tile)
    }
}

/// Attention backward in one pass: `dq`, `dk` and `dv`, contiguous, each in the shape and element type of its operand. `o` and
/// `rest`, what rounding took from it in the [forward](super::forward), are contiguous; `rest` is given up as soon as it
/// has been read. `dq` takes a buffer of f32. `plan` as in the forward.
pub fn backward_one_pass(
    client: &Client,
    problem: &Problem,
    operands: &Operands<DeviceTensor>,
    outputs: &Outputs,
    plan: Option<&DeviceTensor>,
    rest: DeviceTensor,
    of: OnePass,
) -> Result<Gradients<DeviceTensor>, KernelError> {
    let kernel = "backward_mma";
    let limits = DeviceLimits::of(client);
    super::checks::check_limits(problem, &limits, super::MmaConfig::of(problem).0)?;
    let (own, _) = OnePass::of(problem, &limits).map_err(|what| KernelError::Form { kernel, what })?;
    if (OnePass { tile: of.tile, ..own }) != of || !of.in_pairs() || of.shared_bytes() > limits.max_shared_bytes {
        return Err(KernelError::Tiles { kernel, expected: own.to_string(), found: of.to_string() });
    }
    check_operands(problem, operands)?;
    check_plan(problem, plan)?;
    check_outputs(problem, outputs)?;
    check_rest(problem, outputs, &rest)?;
    let Operands { q, k, v, .. } = operands;
    if problem.batch * problem.heads_q * problem.seq_q == 0 {
        let zeros = |operand: &DeviceTensor| Some(DeviceTensor::zeros(client, &operand.shape, operand.elem));
        return Ok(Gradients { q: zeros(q), k: zeros(k), v: zeros(v), ..Gradients::default() });
    }
    let layout = Layout::of(problem, Some(Partials::default()));
    let launcher = Launcher { client, scratch_bytes: layout.bytes() };
    let scratch = scratch::build(&launcher, problem, operands, plan, &layout);
    fill_row_statistics(&launcher, problem, outputs, &scratch, &layout);
    let query_tiles = problem.batch * problem.heads_q * problem.seq_q.div_ceil(of.tile.cols);
    let turns = TurnBuffer::new(client, problem, query_tiles, of.tile.shape(), true);
    let c = Compiled::of(problem, of.tile, [q, k, v], Some(&outputs.do_));
    let call = Call { launcher, problem, operands, outputs, layout, scratch, turns, query_tiles, of, c };
    call.delta(&rest);
    // Its memory may serve what follows.
    drop(rest);
    let Call { launcher, turns, scratch, layout, .. } = &call;
    turns.list_steps(launcher, problem, scratch, layout, q.elem, of.tile.shape());
    let sums =
        DeviceTensor::empty(client, &[query_tiles * of.sums_bytes() / size_of::<f32>()], f32::elem_type_native());
    let new = |operand: &DeviceTensor| DeviceTensor::empty(client, &operand.shape, operand.elem);
    let (dq, dk, dv) = (new(q), new(k), new(v));
    call.gradients(&sums, &dk, &dv);
    call.finish(&sums, &dq);
    Ok(Gradients { q: Some(dq), k: Some(dk), v: Some(dv), ..Gradients::default() })
}

/// The launches of one backward.
struct Call<'a> {
    launcher: Launcher<'a>,
    problem: &'a Problem,
    operands: &'a Operands<DeviceTensor>,
    outputs: &'a Outputs,
    layout: Layout,
    scratch: DeviceTensor,
    turns: TurnBuffer,
    query_tiles: usize,
    of: OnePass,
    c: Compiled,
}

impl Call<'_> {
    fn delta(&self, rest: &DeviceTensor) {
        let Outputs { o, do_, .. } = self.outputs;
        let (bindings, address) = binding_facts([o, rest, do_, &self.scratch, &self.turns.words].into_iter());
        self.launcher.note("delta_mma", &self.of, bindings, 0, ROW_UNITS);
        let Problem { batch, heads_q, seq_q, .. } = *self.problem;
        let (rows, counters) = (batch * heads_q * seq_q, self.turns.counters);
        // SAFETY: rows are tested against the problem, whose shapes `check_outputs` held against the tensors, counters against
        // their number, of which there are at most as many as units.
        unsafe {
            delta_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes((WARP * rows).div_ceil(ROW_UNITS)),
                CubeDim::new_1d(ROW_UNITS as u32),
                address,
                o.buffer(),
                rest.buffer(),
                do_.arg(),
                self.scratch.buffer(),
                self.turns.words.buffer(),
                numbers(self.problem, &self.layout),
                rows,
                counters,
                self.c,
                do_.elem,
            );
        }
    }

    fn gradients(&self, sums: &DeviceTensor, dk: &DeviceTensor, dv: &DeviceTensor) {
        let Operands { q, k, v, bias, .. } = self.operands;
        let do_ = &self.outputs.do_;
        let bound = [q, k, v, do_, &self.scratch, &self.turns.words, sums, dk, dv].into_iter().chain(bias);
        let (bindings, address) = binding_facts(bound);
        self.launcher.note("backward_mma", &self.of, bindings, self.of.shared_bytes(), self.of.tile.units());
        let Problem { batch, heads_kv, seq_kv, .. } = *self.problem;
        let key_tiles = seq_kv.div_ceil(self.of.tile.rows());
        let cubes_each = if self.of.tile.warps > 4 { 1 } else { 2 };
        let section = match self.of.listed {
            // Slow enough that memory keeps up with as many as there are.
            true => self.launcher.heads_side_by_side(1, 1, batch * heads_kv),
            false => self.launcher.heads_side_by_side(key_tiles, cubes_each, batch * heads_kv),
        };
        // SAFETY: rows, keys and elements are tested against the checked shapes; 16-byte accesses are made only where
        // `Compiled` found rows aligned; the buffer of sums holds whole tiles.
        unsafe {
            one_pass_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(batch * heads_kv * key_tiles),
                CubeDim::new_1d(self.of.tile.units() as u32),
                address,
                q.arg(),
                k.arg(),
                v.arg(),
                do_.arg(),
                bias.as_ref().map(DeviceTensor::arg).into(),
                self.scratch.buffer(),
                self.turns.words.buffer(),
                sums.buffer(),
                dk.buffer(),
                dv.buffer(),
                numbers(self.problem, &self.layout),
                section as u32,
                self.turns.lists(),
                bias.is_some(),
                self.of,
                self.c,
                q.elem,
            );
        }
    }

    fn finish(&self, sums: &DeviceTensor, dq: &DeviceTensor) {
        let (bindings, address) = binding_facts([sums, &self.turns.words, dq].into_iter());
        self.launcher.note("finish_mma", &self.of, bindings, 0, ROW_UNITS);
        let units = self.query_tiles * self.of.sums_bytes() / PIECE / 4;
        // SAFETY: a unit reads 4 of the vectors that the buffer was made for and tests rows and elements of dq.
        unsafe {
            finish_kernel::launch_unchecked(
                self.launcher.client,
                self.launcher.cubes(units.div_ceil(ROW_UNITS)),
                CubeDim::new_1d(ROW_UNITS as u32),
                address,
                BufferArg::from_raw_parts(sums.handle.clone(), sums.elements() / 4),
                self.turns.words.buffer(),
                dq.buffer(),
                numbers(self.problem, &self.layout),
                units,
                self.of,
                self.c,
                dq.elem,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(tile: MmaTile, dim: usize) -> OnePass {
        OnePass { tile, head_dim: dim, value_dim: dim, listed: false, vector_adds: true }
    }

    fn tile(warps: usize, blocks: usize, cols: usize) -> MmaTile {
        MmaTile { warps, blocks, cols, part: cols }
    }

    #[test]
    fn pairs_of_warps_have_all_of_a_tile() {
        for warps in [4, 8] {
            for dim in (DEPTH..=WIDE).step_by(DEPTH) {
                let of = sizes(tile(warps, 1, 64), dim);
                assert!(of.in_pairs());
                assert_eq!(of.scores().rows(), of.tile.rows());
                let covered = warps / 2 * of.pairs() * DEPTH;
                assert!(covered >= dim && of.even() == (covered == dim), "{of}, {dim} elements");
                // Half the queries of dq, 16 a block.
                assert_eq!(of.blocks() * 16, 2 * of.pairs() * 32, "{of}, {dim} elements");
            }
        }
        for other in [tile(3, 1, 64), tile(4, 2, 64), tile(4, 1, 48), tile(28, 1, 64)] {
            assert!(!sizes(other, 64).in_pairs(), "{other}");
        }
    }

    #[test]
    fn cubes_fit_the_shared_memory_that_is_documented() {
        let bytes = |warps, dim| sizes(tile(warps, 1, 64), dim).shared_bytes();
        // Two cubes a multiprocessor of sm90, 1 KB of each the system's; else what a cube can have on sm90 and sm80.
        assert!(2 * (bytes(4, 64) + 1024) <= 228 * 1024);
        assert!(bytes(8, 112) <= 163 * 1024);
        assert!((163 * 1024..=227 * 1024).contains(&bytes(8, 128)));
    }
}
