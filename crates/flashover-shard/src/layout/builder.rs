//! Makes tensors and steps. Specs of collectives and splits are computed here from what goes in, so that a layout says
//! only what moves where; [`Program::validate`](crate::program::Program::validate) checks them by other rules.

use super::plan::{Plan, without};
use crate::mesh::Axis;
use crate::precision::Storage;
use crate::program::{Collective, Move, Op, Part, Role, Step, Tensor, TensorId};
use crate::spec::{Dim, Spec};

/// A program in the making: its tensors, and the steps of the section at hand.
pub(super) struct Builder<'a> {
    pub plan: &'a Plan,
    pub tensors: Vec<Tensor>,
    pub steps: Vec<Step>,
    pub part: Part,
}

/// A spec that is right by construction.
fn sound(spec: Result<Spec, crate::error::ShardError>) -> Spec {
    spec.expect("layouts name every axis and dimension once")
}

/// A spec of these dimensions.
pub(super) fn spec<const N: usize>(dims: [(Dim, &[Axis]); N], partial: &[Axis]) -> Spec {
    sound(Spec::new(dims.map(|(dim, axes)| (dim, axes.to_vec())), partial.iter().copied()))
}

impl Builder<'_> {
    pub(super) fn tensor(&mut self, name: &'static str, spec: Spec, role: Role, storage: Storage) -> TensorId {
        debug_assert!(self.tensors.iter().all(|tensor| tensor.name != name), "two tensors called {name}");
        self.tensors.push(Tensor { name, spec, role, storage });
        self.tensors.len() - 1
    }

    pub(super) fn activation(&mut self, name: &'static str, spec: Spec) -> TensorId {
        self.tensor(name, spec, Role::Temporary, Storage::Activation)
    }

    pub(super) fn weight<const N: usize>(&mut self, name: &'static str, dims: [(Dim, &[Axis]); N]) -> TensorId {
        self.tensor(name, spec(dims, &[]), Role::Weight, Storage::Weight)
    }

    pub(super) fn spec(&self, id: TensorId) -> &Spec {
        &self.tensors[id].spec
    }

    pub(super) fn step(&mut self, op: Op) {
        self.steps.push(Step { part: self.part, op });
    }

    /// A tensor like `input` with another spec.
    fn like(&mut self, name: &'static str, input: TensorId, spec: Spec) -> TensorId {
        let storage = self.tensors[input].storage;
        self.tensor(name, spec, Role::Temporary, storage)
    }

    pub(super) fn einsum(&mut self, name: &'static str, lhs: TensorId, rhs: TensorId, out: &[Dim]) -> TensorId {
        let (l, r) = (self.spec(lhs), self.spec(rhs));
        let axes = |dim: Dim| if l.has(dim) { l.axes(dim) } else { r.axes(dim) }.to_vec();
        let contracted = l.dims().iter().filter(|d| r.has(d.dim) && !out.contains(&d.dim));
        let partial: Vec<_> = contracted.flat_map(|d| d.axes.clone()).collect();
        let spec = sound(Spec::new(out.iter().map(|&dim| (dim, axes(dim))), partial));
        let output = self.activation(name, spec);
        self.step(Op::Einsum { lhs, rhs, output });
        output
    }

    /// One collective for several tensors if projections are fused, and one for each otherwise. Each tensor comes with
    /// the part of the model that it belongs to.
    pub(super) fn collective(&mut self, kind: Collective, axes: &[Axis], moves: &[(Part, Move)]) {
        if axes.is_empty() || moves.is_empty() {
            return;
        }
        let mut step = |part, moves| {
            self.steps.push(Step { part, op: Op::Collective { kind, axes: axes.to_vec(), moves } });
        };
        if self.plan.fused {
            step(moves[0].0, moves.iter().map(|m| m.1).collect());
        } else {
            moves.iter().for_each(|&(part, one)| step(part, vec![one]));
        }
    }

    /// A tensor after a collective that changes one dimension's axes to `to`; the same tensor if there is no axis to
    /// communicate over.
    pub(super) fn moved(
        &mut self,
        name: &'static str,
        kind: Collective,
        axes: &[Axis],
        input: TensorId,
        to: &[(Dim, Vec<Axis>)],
    ) -> TensorId {
        if axes.is_empty() {
            return input;
        }
        let output = self.after(name, kind, axes, input, to);
        let part = self.part;
        self.collective(kind, axes, &[(part, Move { input, output })]);
        output
    }

    /// The tensor that such a collective writes, without the step.
    pub(super) fn after(
        &mut self,
        name: &'static str,
        kind: Collective,
        axes: &[Axis],
        input: TensorId,
        to: &[(Dim, Vec<Axis>)],
    ) -> TensorId {
        let from = self.spec(input).clone();
        let pays = matches!(kind, Collective::ReduceScatter | Collective::AllReduce | Collective::AllReduceMax);
        let partial = if pays { without(from.partial(), axes) } else { from.partial().to_vec() };
        let dims = from.dims().iter().map(|d| {
            let changed = to.iter().find(|(dim, _)| *dim == d.dim);
            (d.dim, changed.map_or_else(|| d.axes.clone(), |(_, axes)| axes.clone()))
        });
        let spec = sound(Spec::new(dims, partial));
        self.like(name, input, spec)
    }

    /// All-gather of `dim` over the axes at the end of its subscript.
    pub(super) fn gather(&mut self, name: &'static str, input: TensorId, dim: Dim, axes: &[Axis]) -> TensorId {
        let rest = without(self.spec(input).axes(dim), axes);
        self.moved(name, Collective::AllGather, axes, input, &[(dim, rest)])
    }

    /// Reduce-scatter onto the end of `dim`'s subscript.
    pub(super) fn scatter(&mut self, name: &'static str, input: TensorId, dim: Dim, axes: &[Axis]) -> TensorId {
        let grown = [self.spec(input).axes(dim), axes].concat();
        self.moved(name, Collective::ReduceScatter, axes, input, &[(dim, grown)])
    }

    pub(super) fn all_reduce(&mut self, name: &'static str, input: TensorId, axes: &[Axis]) -> TensorId {
        self.moved(name, Collective::AllReduce, axes, input, &[])
    }

    /// All-to-all that takes `axes` from `from` and appends `appended`, the same axes in any order, to `to`.
    pub(super) fn exchange(
        &mut self,
        name: &'static str,
        input: TensorId,
        (from, axes): (Dim, &[Axis]),
        (to, appended): (Dim, &[Axis]),
    ) -> TensorId {
        let less = without(self.spec(input).axes(from), axes);
        let more = [self.spec(input).axes(to), appended].concat();
        self.moved(name, Collective::AllToAll, axes, input, &[(from, less), (to, more)])
    }

    /// A rank's block along `dim`; the same tensor if there is no axis.
    pub(super) fn split(&mut self, name: &'static str, input: TensorId, dim: Dim, axes: &[Axis]) -> TensorId {
        if axes.is_empty() {
            return input;
        }
        let grown = [self.spec(input).axes(dim), axes].concat();
        let spec = sound(self.spec(input).with(dim, &grown));
        let output = self.like(name, input, spec);
        self.step(Op::Split { input, output });
        output
    }

    /// The weights as they are used: gathered over the plan's `w`, all of one message. `whole` lists dimensions that are
    /// gathered over all their axes.
    pub(super) fn gathered<const N: usize>(
        &mut self,
        part: Part,
        weights: [(&'static str, TensorId); N],
        whole: &[Dim],
    ) -> [TensorId; N] {
        if self.plan.w.is_empty() {
            return weights.map(|(_, id)| id);
        }
        let w = self.plan.w.clone();
        let mut axes = Vec::new();
        let outputs = weights.map(|(name, id)| {
            let spec = self.spec(id).clone();
            let kept = |dim| if whole.contains(&dim) { vec![] } else { without(spec.axes(dim), &w) };
            let to: Vec<_> = spec.dims().iter().map(|d| (d.dim, kept(d.dim))).collect();
            axes = spec.dims().iter().flat_map(|d| without(&d.axes, &kept(d.dim))).collect();
            self.after(name, Collective::AllGather, &axes, id, &to)
        });
        let moves: Vec<_> =
            weights.iter().zip(outputs).map(|(&(_, input), output)| (part, Move { input, output })).collect();
        self.collective(Collective::AllGather, &axes, &moves);
        outputs
    }
}
