//! FLOPs and bytes of every step, derived from the program's specs alone.
//!
//! Two sizes of a collective are told apart (A.1). The *payload* is what the paper's formulas count: the per-chip output
//! of an all-gather, the per-chip input of a reduce-scatter, twice the tensor of an all-reduce, the local tensor of an
//! all-to-all or a send. The *sent* bytes are what a chip really puts on the wire: `(K − 1)/K` of that in a group of `K`
//! chips, and all of it in a send. A group of one chip moves nothing.

use crate::error::ShardError;
use crate::mesh::{Axis, Mesh};
use crate::precision::{Precision, Storage};
use crate::program::{Collective, Op, Part, Program, Role, Step, TensorId};
use crate::spec::{Dim, Sizes};

/// Bytes that a collective moves, per chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved<'a> {
    /// Which collective.
    pub kind: Collective,
    /// Axes of its groups.
    pub axes: &'a [Axis],
    /// Chips of a group.
    pub group: u64,
    /// Bytes as the paper counts them.
    pub payload: u64,
    /// Bytes that a chip sends.
    pub sent: u64,
    /// Elements that a chip sends.
    pub sent_elements: u64,
    /// Elements of the payload.
    pub payload_elements: u64,
}

/// What one execution of a step costs a chip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepCount<'a> {
    /// The part of the model.
    pub part: Part,
    /// The step.
    pub op: &'a Op,
    /// How often it runs in a pass through the model.
    pub times: u64,
    /// Floating point operations of matrix products, 2 a multiply-add. Pointwise steps count as none.
    pub flops: u64,
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Bytes of keys and values read.
    pub cache_bytes: u64,
    /// Bytes of activations read and written.
    pub activation_bytes: u64,
    /// What it moves between chips, if anything.
    pub moved: Option<Moved<'a>>,
}

/// Counts a program on one mesh, for any number of workloads.
pub struct Counter<'a> {
    program: &'a Program,
    mesh: &'a Mesh,
    layers: u64,
}

impl<'a> Counter<'a> {
    /// A counter for a model of so many blocks.
    pub fn new(program: &'a Program, mesh: &'a Mesh, layers: usize) -> Self {
        Counter { program, mesh, layers: layers as u64 }
    }

    /// Elements of every tensor that a chip holds, by [`TensorId`].
    ///
    /// # Errors
    ///
    /// As [`Program::check`].
    pub fn local_elements(&self, sizes: &Sizes) -> Result<Vec<u64>, ShardError> {
        self.program.check(self.mesh, sizes)?;
        let elements = |id: TensorId| {
            let dims = self.program.tensors[id].spec.dims();
            dims.iter().try_fold(1, |n, d| Ok(n * (sizes.get(d.dim) / self.mesh.group_size(&d.axes)?) as u64))
        };
        (0..self.program.tensors.len()).map(elements).collect()
    }

    /// Calls `visit` with the counts of every step in order: the embedding, one block (its counts once, with how often it
    /// runs), the head.
    ///
    /// # Errors
    ///
    /// As [`Program::check`].
    pub fn steps(
        &self,
        sizes: &Sizes,
        precision: &Precision,
        mut visit: impl FnMut(&StepCount<'a>),
    ) -> Result<(), ShardError> {
        let local = self.local_elements(sizes)?;
        let at = At { counter: self, sizes, precision, local: &local };
        for (steps, times) in [(&self.program.embed, 1), (&self.program.layer, self.layers), (&self.program.head, 1)] {
            at.walk(steps, times, &mut visit)?;
        }
        Ok(())
    }

    /// Bytes that a chip holds: weights and cache of all blocks, and the most that the tensors of one block take at once
    /// if none is freed before the end (an upper bound on what is live).
    ///
    /// # Errors
    ///
    /// As [`Program::check`].
    pub fn memory(&self, sizes: &Sizes, precision: &Precision) -> Result<Memory, ShardError> {
        let local = self.local_elements(sizes)?;
        let bytes = |id: TensorId| bytes(local[id], precision.bits(self.program.tensors[id].storage));
        let stored = |role| {
            let of_role = self.program.of_role(role);
            of_role.map(|(id, _)| bytes(id) * if self.program.is_per_layer(id) { self.layers } else { 1 }).sum()
        };
        let working = |steps: &[Step]| {
            let outputs = steps.iter().flat_map(|step| step.op.outputs());
            outputs.filter(|&id| self.program.tensors[id].role != Role::Cache).map(bytes).sum::<u64>()
        };
        let sections = [&self.program.embed, &self.program.layer, &self.program.head];
        Ok(Memory {
            weights: stored(Role::Weight),
            cache: stored(Role::Cache),
            working: sections.map(|steps| working(steps)).into_iter().max().unwrap_or(0),
        })
    }
}

/// Bytes of memory that a chip needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Memory {
    /// Weights as they are stored.
    pub weights: u64,
    /// Keys and values.
    pub cache: u64,
    /// Activations, and weights gathered for one block: everything that a block makes, nothing freed in between.
    pub working: u64,
}

fn bytes(elements: u64, bits: u64) -> u64 {
    (elements * bits).div_ceil(8)
}

/// A counter with the sizes of one workload.
struct At<'c, 'a> {
    counter: &'c Counter<'a>,
    sizes: &'c Sizes,
    precision: &'c Precision,
    local: &'c [u64],
}

impl<'a> At<'_, 'a> {
    fn walk(&self, steps: &'a [Step], times: u64, visit: &mut impl FnMut(&StepCount<'a>)) -> Result<(), ShardError> {
        for step in steps {
            if let Op::Repeat { axes, body, .. } = &step.op {
                let rounds = self.counter.mesh.group_size(axes)? as u64 - 1;
                if rounds > 0 {
                    self.walk(body, times * rounds, visit)?;
                }
            } else {
                visit(&self.count(step, times)?);
            }
        }
        Ok(())
    }

    fn storage(&self, id: TensorId) -> Storage {
        self.counter.program.tensors[id].storage
    }

    fn bytes(&self, id: TensorId) -> u64 {
        bytes(self.local[id], self.precision.bits(self.storage(id)))
    }

    fn size(&self, id: TensorId, dim: Dim) -> Result<u64, ShardError> {
        let by = self.counter.mesh.group_size(self.counter.program.tensors[id].spec.axes(dim))?;
        Ok((self.sizes.get(dim) / by) as u64)
    }

    fn count(&self, step: &'a Step, times: u64) -> Result<StepCount<'a>, ShardError> {
        let op = &step.op;
        let mut count = StepCount {
            part: step.part,
            op,
            times,
            flops: 0,
            weight_bytes: 0,
            cache_bytes: 0,
            activation_bytes: 0,
            moved: None,
        };
        match op {
            Op::Einsum { lhs, rhs, output } => {
                count.flops = 2 * self.local[*output] * self.contracted(*lhs, *rhs, *output)?;
                for id in [*lhs, *rhs, *output] {
                    match self.storage(id) {
                        Storage::Weight => count.weight_bytes += self.bytes(id),
                        _ => count.activation_bytes += self.bytes(id),
                    }
                }
            }
            Op::Attention { q, k, v, output, .. } => {
                let width = self.local[*q] / self.size(*q, Dim::L)?;
                count.flops = 4 * width * self.pairs(*q, *k)?;
                count.cache_bytes = self.bytes(*k) + self.bytes(*v);
                count.activation_bytes = self.bytes(*q) + self.bytes(*output);
            }
            Op::Collective { kind, axes, moves } => {
                let group = self.counter.mesh.group_size(axes)? as u64;
                let mut moved =
                    Moved { kind: *kind, axes, group, payload: 0, sent: 0, sent_elements: 0, payload_elements: 0 };
                if group > 1 {
                    for one in moves {
                        self.add_move(&mut moved, one.input, one.output);
                    }
                }
                count.moved = Some(moved);
            }
            // A lookup reads as many rows of the table as it writes.
            Op::Embed { output, .. } => count.activation_bytes = 2 * self.bytes(*output),
            Op::Append { new, .. } => count.activation_bytes = 2 * self.bytes(*new),
            _ => {
                for id in op.inputs().into_iter().chain(op.outputs()) {
                    match self.storage(id) {
                        Storage::Weight => count.weight_bytes += self.bytes(id),
                        _ => count.activation_bytes += self.bytes(id),
                    }
                }
            }
        }
        Ok(count)
    }

    /// Product of the local sizes of the dimensions that an einsum sums over.
    fn contracted(&self, lhs: TensorId, rhs: TensorId, output: TensorId) -> Result<u64, ShardError> {
        let tensors = &self.counter.program.tensors;
        let (r, out) = (&tensors[rhs].spec, &tensors[output].spec);
        let summed = tensors[lhs].spec.dims().iter().filter(|d| r.has(d.dim) && !out.has(d.dim));
        summed.map(|d| self.size(lhs, d.dim)).product()
    }

    /// Pairs of a query and a key that it sees, of one sequence and head. Blocks of a ring count whole, because the last
    /// rank sees all of them and the others wait for it.
    fn pairs(&self, q: TensorId, k: TensorId) -> Result<u64, ShardError> {
        let (queries, keys) = (self.size(q, Dim::L)?, self.size(k, Dim::M)?);
        let whole = |id: TensorId, dim| self.counter.program.tensors[id].spec.axes(dim).is_empty();
        Ok(if whole(q, Dim::L) && whole(k, Dim::M) {
            queries * keys - queries * (queries - 1) / 2
        } else {
            queries * keys
        })
    }

    fn add_move(&self, moved: &mut Moved, input: TensorId, output: TensorId) {
        let (before, after, group) = (self.local[input], self.local[output], moved.group);
        let (payload, sent) = match moved.kind {
            Collective::AllGather => (after, after - before),
            Collective::ReduceScatter => (before, before - after),
            // A reduce-scatter and an all-gather of the flat tensor, in pieces that are rounded up.
            Collective::AllReduce | Collective::AllReduceMax => (2 * before, 2 * (group - 1) * before.div_ceil(group)),
            Collective::AllToAll => (before, before - before / group),
            Collective::Send => (before, before),
        };
        let storage = self.storage(input);
        let compressible = matches!(moved.kind, Collective::AllGather | Collective::AllToAll | Collective::Send)
            && matches!(storage, Storage::Activation | Storage::Cache);
        let bits = self.precision.bits(storage);
        let bits = if self.precision.compressed && compressible { bits.min(8) } else { bits };
        moved.payload += bytes(payload, bits);
        moved.sent += bytes(sent, bits);
        moved.payload_elements += payload;
        moved.sent_elements += sent;
    }
}
