//! Whether the steps of a program fit together, decided from specs alone. No mesh sizes are needed: what is valid here is
//! valid on every mesh that the specs divide.

use super::{Collective, Move, Op, Program, Role, Step, TensorId};
use crate::error::ShardError;
use crate::mesh::Axis;
use crate::spec::{Dim, Spec};

/// Checks a whole program.
pub(super) fn validate(program: &Program) -> Result<(), ShardError> {
    let mut written: Vec<bool> =
        program.tensors.iter().map(|t| matches!(t.role, Role::Input | Role::Weight | Role::Cache)).collect();
    for (name, steps) in [("embed", &program.embed), ("layer", &program.layer), ("head", &program.head)] {
        let mut check = Check { program, written: &mut written, place: name.to_owned(), op: "" };
        check.steps(name, steps)?;
        if name != "head" && !check.writes(steps, Program::RESIDUAL) {
            return Err(check.refuse("residual", "a step that writes it", "none"));
        }
    }
    let unwritten = program.tensors.iter().zip(&written).find(|(_, written)| !**written);
    match unwritten {
        None => Ok(()),
        Some((tensor, _)) => {
            let check = Check { program, written: &mut Vec::new(), place: "end".to_owned(), op: "end" };
            Err(check.refuse(tensor.name, "a step that writes it", "none"))
        }
    }
}

struct Check<'a> {
    program: &'a Program,
    written: &'a mut Vec<bool>,
    place: String,
    op: &'static str,
}

impl<'a> Check<'a> {
    fn writes(&self, steps: &[Step], id: TensorId) -> bool {
        steps.iter().any(|step| step.op.outputs().contains(&id))
    }

    fn refuse(&self, what: &str, expected: impl ToString, found: impl ToString) -> ShardError {
        ShardError::Step {
            step: self.place.clone(),
            op: self.op,
            what: what.to_owned(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }

    fn spec(&self, id: TensorId) -> &'a Spec {
        &self.program.tensors[id].spec
    }

    /// The tensor's spec must be `expected`.
    fn same(&self, id: TensorId, expected: &Spec) -> Result<(), ShardError> {
        let tensor = &self.program.tensors[id];
        if tensor.spec == *expected { Ok(()) } else { Err(self.refuse(tensor.name, expected, &tensor.spec)) }
    }

    /// No sum over the tensor may be owed.
    fn complete(&self, id: TensorId) -> Result<(), ShardError> {
        let tensor = &self.program.tensors[id];
        if tensor.spec.partial().is_empty() {
            Ok(())
        } else {
            Err(self.refuse(tensor.name, "a complete sum", &tensor.spec))
        }
    }

    /// The tensor's dimensions must be these, in this order.
    fn dims(&self, id: TensorId, dims: &[Dim]) -> Result<(), ShardError> {
        let tensor = &self.program.tensors[id];
        if tensor.spec.dims().iter().map(|d| d.dim).eq(dims.iter().copied()) {
            Ok(())
        } else {
            let letters: String = dims.iter().map(|dim| dim.to_string()).collect();
            Err(self.refuse(tensor.name, format!("dimensions {letters}"), &tensor.spec))
        }
    }

    fn steps(&mut self, section: &str, steps: &[Step]) -> Result<(), ShardError> {
        for (i, step) in steps.iter().enumerate() {
            self.place = format!("{section} {i}");
            self.op = step.op.name();
            if let Op::Repeat { axes, body, carried } = &step.op {
                self.repeat(axes, body, carried)?;
                continue;
            }
            for id in step.op.inputs() {
                if !self.written[id] {
                    return Err(self.refuse(
                        self.program.tensors[id].name,
                        "a tensor written before",
                        "an unwritten one",
                    ));
                }
            }
            self.step(&step.op)?;
            for id in step.op.outputs() {
                self.written[id] = true;
            }
        }
        Ok(())
    }

    fn repeat(&mut self, axes: &[Axis], body: &[Step], carried: &[(TensorId, TensorId)]) -> Result<(), ShardError> {
        distinct(axes).map_err(|axis| self.refuse("axes", "every axis once", axis))?;
        let (place, op) = (self.place.clone(), self.op);
        self.steps(&format!("{place}, round"), body)?;
        (self.place, self.op) = (place, op);
        for &(from, to) in carried {
            if !self.writes(body, from) || !self.written[to] {
                return Err(self.refuse("carried", "a tensor of the body, and one written before it", from));
            }
            self.same(from, self.spec(to))?;
        }
        Ok(())
    }

    fn step(&self, op: &Op) -> Result<(), ShardError> {
        match op {
            Op::Embed { tokens, table, output } => self.embed(*tokens, *table, *output),
            Op::Select { input, output } => self.select(*input, *output),
            Op::Statistics { input, output } => self.statistics(*input, *output),
            Op::Normalize { input, statistics, scale, output, .. } => {
                self.complete(*input)?;
                let e = self.spec(*input).axes(Dim::E);
                self.same(*statistics, &self.spec(*input).with(Dim::E, &[])?.renamed(Dim::E, Dim::S)?)?;
                self.same(*scale, &Spec::new([(Dim::E, e.to_vec())], [])?)?;
                self.same(*output, self.spec(*input))
            }
            Op::Einsum { lhs, rhs, output } => self.einsum(*lhs, *rhs, *output),
            Op::Split { input, output } => self.split(*input, *output),
            Op::Collective { kind, axes, moves } => {
                distinct(axes).map_err(|axis| self.refuse("axes", "every axis once", axis))?;
                moves.iter().try_for_each(|m| self.collective(*kind, axes, *m))
            }
            Op::Rotary { input, output } | Op::Activate { input, output, .. } => {
                self.complete(*input)?;
                self.same(*output, self.spec(*input))
            }
            Op::Gate { gate, up, output, .. } => {
                self.complete(*gate)?;
                self.same(*up, self.spec(*gate))?;
                self.same(*output, self.spec(*gate))
            }
            Op::Add { lhs, rhs, output } => {
                self.same(*rhs, self.spec(*lhs))?;
                self.same(*output, self.spec(*lhs))
            }
            Op::Append { new, cache } => self.append(*new, *cache),
            Op::Attention { q, k, v, output, lse } => self.attention(*q, *k, *v, *output, *lse),
            Op::Merge { a, b, output } => {
                self.complete(a.0)?;
                self.same(a.1, &self.rows(a.0)?)?;
                for pair in [b, output] {
                    self.same(pair.0, self.spec(a.0))?;
                    self.same(pair.1, self.spec(a.1))?;
                }
                Ok(())
            }
            Op::Rescale { o, lse, max, output, weight } => {
                let rows = self.rows(*o)?;
                self.same(*lse, &rows)?;
                self.same(*max, &rows.with_partial(&[])?)?;
                self.same(*output, self.spec(*o))?;
                self.same(*weight, &rows)
            }
            Op::Divide { o, weight, output } => {
                self.complete(*o)?;
                self.same(*weight, &self.rows(*o)?)?;
                self.same(*output, self.spec(*o))
            }
            Op::Repeat { .. } => Ok(()),
        }
    }

    /// `BLHQ` without `Q`: one number a row of attention.
    fn rows(&self, o: TensorId) -> Result<Spec, ShardError> {
        self.dims(o, &[Dim::B, Dim::L, Dim::H, Dim::Q])?;
        let spec = self.spec(o);
        let dims = [Dim::B, Dim::L, Dim::H].map(|dim| (dim, spec.axes(dim).to_vec()));
        Spec::new(dims, spec.partial().iter().copied())
    }

    fn embed(&self, tokens: TensorId, table: TensorId, output: TensorId) -> Result<(), ShardError> {
        self.same(tokens, &Spec::new([(Dim::B, vec![]), (Dim::L, vec![])], [])?)?;
        self.dims(table, &[Dim::V, Dim::E])?;
        self.complete(table)?;
        let (v, e) = (self.spec(table).axes(Dim::V).to_vec(), self.spec(table).axes(Dim::E).to_vec());
        self.same(output, &Spec::new([(Dim::B, vec![]), (Dim::L, vec![]), (Dim::E, e)], v)?)
    }

    fn select(&self, input: TensorId, output: TensorId) -> Result<(), ShardError> {
        self.complete(input)?;
        let spec = self.spec(input);
        self.same(output, &spec.with(Dim::L, &[])?.with_partial(spec.axes(Dim::L))?.renamed(Dim::L, Dim::T)?)
    }

    fn statistics(&self, input: TensorId, output: TensorId) -> Result<(), ShardError> {
        self.complete(input)?;
        let spec = self.spec(input);
        self.same(output, &spec.with(Dim::E, &[])?.with_partial(spec.axes(Dim::E))?.renamed(Dim::E, Dim::S)?)
    }

    fn einsum(&self, lhs: TensorId, rhs: TensorId, output: TensorId) -> Result<(), ShardError> {
        self.complete(lhs)?;
        self.complete(rhs)?;
        let (l, r, out) = (self.spec(lhs), self.spec(rhs), self.spec(output));
        let mut partial = Vec::new();
        for d in l.dims().iter().chain(r.dims()) {
            let both = l.has(d.dim) && r.has(d.dim);
            if both && l.axes(d.dim) != r.axes(d.dim) {
                let expected = format!("{} sharded as in {l}", d.dim);
                return Err(self.refuse(self.program.tensors[rhs].name, expected, r));
            }
            if !out.has(d.dim) {
                if !both {
                    let what = self.program.tensors[output].name;
                    return Err(self.refuse(what, format!("{}, which only one operand has", d.dim), out));
                }
                for &axis in &d.axes {
                    if !partial.contains(&axis) {
                        partial.push(axis);
                    }
                }
            }
        }
        let dim = |dim: Dim| {
            let operand = if l.has(dim) { l } else { r };
            if operand.has(dim) { Ok((dim, operand.axes(dim).to_vec())) } else { Err(dim) }
        };
        let dims = out.dims().iter().map(|d| dim(d.dim)).collect::<Result<Vec<_>, _>>();
        let dims = dims.map_err(|dim| self.refuse("output", format!("no {dim}, which no operand has"), out))?;
        self.same(output, &Spec::new(dims, partial)?)
    }

    fn split(&self, input: TensorId, output: TensorId) -> Result<(), ShardError> {
        self.complete(input)?;
        let change = self.change(input, output)?;
        if change.removed.is_empty() && change.same_partial {
            Ok(())
        } else {
            let expected = format!("{} with axes appended", self.spec(input));
            Err(self.refuse(self.program.tensors[output].name, expected, self.spec(output)))
        }
    }

    fn append(&self, new: TensorId, cache: TensorId) -> Result<(), ShardError> {
        self.dims(new, &[Dim::B, Dim::L, Dim::K, Dim::Q])?;
        self.complete(new)?;
        let grown = self.spec(new).renamed(Dim::L, Dim::M)?;
        if self.spec(new).axes(Dim::L).is_empty() {
            // The cache may be sharded over its length while the new tokens are whole.
            self.same(cache, &grown.with(Dim::M, self.spec(cache).axes(Dim::M))?)
        } else {
            self.same(cache, &grown)
        }
    }

    fn attention(
        &self,
        q: TensorId,
        k: TensorId,
        v: TensorId,
        output: TensorId,
        lse: Option<TensorId>,
    ) -> Result<(), ShardError> {
        self.dims(q, &[Dim::B, Dim::L, Dim::H, Dim::Q])?;
        self.dims(k, &[Dim::B, Dim::M, Dim::K, Dim::Q])?;
        [q, k].into_iter().try_for_each(|id| self.complete(id))?;
        self.same(v, self.spec(k))?;
        let (qs, ks) = (self.spec(q), self.spec(k));
        let name = self.program.tensors[k].name;
        if !qs.axes(Dim::Q).is_empty() || !ks.axes(Dim::Q).is_empty() || qs.axes(Dim::B) != ks.axes(Dim::B) {
            return Err(self.refuse(name, format!("the batch sharded as in {qs}, and Q whole"), ks));
        }
        if !qs.axes(Dim::H).starts_with(ks.axes(Dim::K)) {
            return Err(self.refuse(name, format!("K over the first axes of H in {qs}"), ks));
        }
        let (l, m) = (qs.axes(Dim::L), ks.axes(Dim::M));
        if !l.is_empty() && l != m {
            return Err(self.refuse(name, format!("M sharded as L in {qs}"), ks));
        }
        if !m.is_empty() && lse.is_none() {
            return Err(self.refuse(name, "a log-sum-exp, because a rank sees only a part of the keys", "none"));
        }
        self.same(output, &if l == m { qs.clone() } else { qs.with_partial(m)? })?;
        lse.map_or(Ok(()), |lse| self.same(lse, &self.rows(output)?))
    }

    fn collective(&self, kind: Collective, axes: &[Axis], Move { input, output }: Move) -> Result<(), ShardError> {
        let change = self.change(input, output)?;
        let paid = |from: &Spec, to: &Spec| {
            let rest: Vec<_> = from.partial().iter().filter(|axis| !axes.contains(axis)).copied().collect();
            axes.iter().all(|axis| from.partial().contains(axis)) && to.partial() == rest
        };
        let sums = paid(self.spec(input), self.spec(output));
        let (removed, added) = (is_set(&change.removed, axes), is_set(&change.added, axes));
        let (kept, none_added) = (change.removed.is_empty(), change.added.is_empty());
        let ok = match kind {
            Collective::AllGather => removed && none_added && change.same_partial,
            Collective::ReduceScatter => added && kept && sums,
            Collective::AllReduce | Collective::AllReduceMax => kept && none_added && sums,
            Collective::AllToAll => removed && added && change.same_partial,
            Collective::Send => kept && none_added && change.same_partial,
        };
        if ok {
            return Ok(());
        }
        let letters: String = axes.iter().map(|axis| axis.letter()).collect();
        let expected = format!("what {}({letters}) makes of {}", kind.name(), self.spec(input));
        Err(self.refuse(self.program.tensors[output].name, expected, self.spec(output)))
    }

    /// What distinguishes two specs of the same dimensions.
    fn change(&self, input: TensorId, output: TensorId) -> Result<Change, ShardError> {
        let (from, to) = (self.spec(input), self.spec(output));
        self.dims(output, &from.dims().iter().map(|d| d.dim).collect::<Vec<_>>())?;
        let mut change = Change { same_partial: from.partial() == to.partial(), ..Change::default() };
        for (a, b) in from.dims().iter().zip(to.dims()) {
            let common = a.axes.iter().zip(&b.axes).take_while(|(a, b)| a == b).count();
            change.removed.extend(&a.axes[common..]);
            change.added.extend(&b.axes[common..]);
        }
        Ok(change)
    }
}

/// Axes that left the ends of subscripts, and that were appended to them.
#[derive(Default)]
struct Change {
    removed: Vec<Axis>,
    added: Vec<Axis>,
    same_partial: bool,
}

fn is_set(a: &[Axis], b: &[Axis]) -> bool {
    a.len() == b.len() && a.iter().all(|axis| b.contains(axis))
}

fn distinct(axes: &[Axis]) -> Result<(), Axis> {
    (1..axes.len()).find(|&i| axes[..i].contains(&axes[i])).map_or(Ok(()), |i| Err(axes[i]))
}
