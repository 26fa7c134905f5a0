//! A block of the model: serial, or parallel with its fused projections (§3.4); and the whole program around it.

use super::builder::{Builder, spec};
use super::plan::Plan;
use crate::architecture::{Architecture, Block, Mlp};
use crate::precision::Storage;
use crate::program::{Collective, Move, Op, Part, Program, Role, TensorId};
use crate::spec::Dim;

/// Builds the program of a plan.
pub(crate) fn build(model: &Architecture, plan: &Plan) -> Program {
    let mut b = Builder { plan, tensors: Vec::with_capacity(80), steps: Vec::new(), part: Part::Embedding };
    let scattered = [plan.e1(), plan.f1()].concat();
    let dims = [Dim::B, Dim::L].map(|dim| (dim, if dim == plan.tokens() { &plan.w[..] } else { &[] }));
    let residual = b.activation("residual", spec([dims[0], dims[1], (Dim::E, &scattered)], &[]));
    debug_assert_eq!(residual, Program::RESIDUAL);
    let table = b.embed();
    let embed = core::mem::take(&mut b.steps);
    match model.block {
        Block::Serial => b.serial(model),
        Block::Parallel => b.parallel(model),
    }
    let layer = core::mem::take(&mut b.steps);
    b.head(model, table);
    let head = core::mem::take(&mut b.steps);
    Program { tensors: b.tensors, embed, layer, head }
}

/// Names of the tensors of a norm.
pub(super) struct NormNames {
    pub sums: &'static str,
    pub complete: &'static str,
    pub scale: &'static str,
    pub part: &'static str,
    pub output: &'static str,
}

/// Projections of the feed-forward layer's input.
struct Hidden {
    gate: Option<TensorId>,
    up: TensorId,
}

impl Builder<'_> {
    /// The norm of a tensor whose `E` is sharded over `e` at most.
    pub(super) fn norm(&mut self, model: &Architecture, names: &NormNames, input: TensorId) -> TensorId {
        let axes = self.spec(input).axes(Dim::E).to_vec();
        let from = self.spec(input);
        let name = if from.has(Dim::L) { Dim::L } else { Dim::T };
        let sums = spec([(Dim::B, from.axes(Dim::B)), (name, from.axes(name)), (Dim::S, &[])], &axes);
        let sums = self.tensor(names.sums, sums, Role::Temporary, Storage::Statistic);
        let part = core::mem::replace(&mut self.part, Part::Norm);
        self.step(Op::Statistics { input, output: sums });
        let statistics = self.all_reduce(names.complete, sums, &axes);
        let scale = self.weight(names.scale, [(Dim::E, &[])]);
        let scale = self.split(names.part, scale, Dim::E, &axes);
        let output = self.activation(names.output, self.spec(input).clone());
        self.step(Op::Normalize { norm: model.norm, input, statistics, scale, output });
        self.part = part;
        output
    }

    /// Attention, then the feed-forward layer, each with its norm and residual.
    fn serial(&mut self, model: &Architecture) {
        let (e, f) = (self.plan.e1(), self.plan.f1());
        self.part = Part::Attention;
        let x = self.gather("x", Program::RESIDUAL, Dim::E, &f);
        let xn = self.norm(model, &ATTENTION_NORM, x);
        let wq = self.query_weight();
        let [wq] = self.gathered(Part::Attention, [("q.weight.gathered", wq)], &[]);
        let terms = self.einsum("q.terms", xn, wq, &[Dim::B, Dim::L, Dim::H, Dim::Q]);
        let (q, moved) = self.queries(terms);
        if let Some((kind, one)) = moved {
            self.collective(kind, &e, &[(Part::Attention, one)]);
        }
        let kv = self.keys_and_values(xn, model.rotary);
        let (o, dim) = self.attend(q, kv, model.rotary);
        let gathers = self.still_over_e(o, dim);
        let o = if gathers { self.gather("o.gathered", o, dim, &e) } else { o };
        let wo = self.output_weight();
        let [wo] = self.gathered(Part::Attention, [("o.weight.gathered", wo)], &[]);
        let y = self.einsum("attention.terms", o, wo, &[Dim::B, Dim::L, Dim::E]);
        let y = self.scatter("attention.output", y, Dim::E, &f);
        let middle = self.activation("residual.middle", self.spec(Program::RESIDUAL).clone());
        self.step(Op::Add { lhs: Program::RESIDUAL, rhs: y, output: middle });

        self.part = Part::Mlp;
        let x = self.gather("mlp.x", middle, Dim::E, &f);
        let xn = self.norm(model, &MLP_NORM, x);
        let weights = self.hidden_weights(model);
        let weights = self.gathered_hidden(weights, None).0;
        let terms = self.hidden_terms(xn, &weights);
        let (hidden, moves) = self.scattered_hidden(&terms);
        self.collective(Collective::ReduceScatter, &e, &moves);
        let h = self.activate(model, &hidden);
        let h = self.gather("h.gathered", h, Dim::F, &e);
        let down = self.weight("down.weight", [(Dim::F, &self.plan.f.clone()), (Dim::E, &self.plan.e.clone())]);
        let [down] = self.gathered(Part::Mlp, [("down.weight.gathered", down)], &[]);
        let y = self.einsum("mlp.terms", h, down, &[Dim::B, Dim::L, Dim::E]);
        let y = self.scatter("mlp.output", y, Dim::E, &f);
        self.step(Op::Add { lhs: middle, rhs: y, output: Program::RESIDUAL });
    }

    /// Attention and the feed-forward layer side by side, their collectives shared.
    fn parallel(&mut self, model: &Architecture) {
        let (e, f) = (self.plan.e1(), self.plan.f1());
        self.part = Part::Mlp;
        let x = self.gather("x", Program::RESIDUAL, Dim::E, &f);
        let xn = self.norm(model, &ATTENTION_NORM, x);
        let weights = self.hidden_weights(model);
        let wq = self.query_weight();
        let (weights, wq) = self.gathered_hidden(weights, Some(wq));
        let terms = self.hidden_terms(xn, &weights);
        self.part = Part::Attention;
        let wq = wq.expect("one goes in");
        let q_terms = self.einsum("q.terms", xn, wq, &[Dim::B, Dim::L, Dim::H, Dim::Q]);
        let (q, q_move) = self.queries(q_terms);
        let (hidden, mut moves) = self.scattered_hidden(&terms);
        match q_move {
            Some((Collective::ReduceScatter, one)) => moves.push((Part::Attention, one)),
            Some((kind, one)) => self.collective(kind, &e, &[(Part::Attention, one)]),
            None => {}
        }
        self.part = Part::Mlp;
        self.collective(Collective::ReduceScatter, &e, &moves);
        let h = self.activate(model, &hidden);

        self.part = Part::Attention;
        let kv = self.keys_and_values(xn, model.rotary);
        let (o, dim) = self.attend(q, kv, model.rotary);
        let (h, o) = self.gathered_outputs(h, o, dim);
        let (down, wo) = (
            self.weight("down.weight", [(Dim::F, &self.plan.f.clone()), (Dim::E, &self.plan.e.clone())]),
            self.output_weight(),
        );
        let [down, wo] = self.gathered(Part::Mlp, [("down.weight.gathered", down), ("o.weight.gathered", wo)], &[]);
        self.part = Part::Mlp;
        let y = self.einsum("mlp.terms", h, down, &[Dim::B, Dim::L, Dim::E]);
        self.part = Part::Attention;
        let a = self.einsum("attention.terms", o, wo, &[Dim::B, Dim::L, Dim::E]);
        self.part = Part::Mlp;
        let sum = self.activation("block.terms", self.spec(y).clone());
        self.step(Op::Add { lhs: y, rhs: a, output: sum });
        let y = self.scatter("block.output", sum, Dim::E, &f);
        self.step(Op::Add { lhs: Program::RESIDUAL, rhs: y, output: Program::RESIDUAL });
    }

    fn query_weight(&mut self) -> TensorId {
        self.weight("q.weight", [(Dim::E, &self.plan.e), (Dim::H, &self.plan.f), (Dim::Q, &[])])
    }

    fn output_weight(&mut self) -> TensorId {
        self.weight("o.weight", [(Dim::H, &self.plan.f), (Dim::Q, &[]), (Dim::E, &self.plan.e)])
    }

    fn hidden_weights(&mut self, model: &Architecture) -> Hidden {
        let dims = [(Dim::E, &self.plan.e[..]), (Dim::F, &self.plan.f[..])];
        let gated = matches!(model.mlp, Mlp::Gated(_));
        Hidden { gate: gated.then(|| self.weight("gate.weight", dims)), up: self.weight("up.weight", dims) }
    }

    /// The weights of the feed-forward layer's first half as they are used, and with them another that travels along.
    fn gathered_hidden(&mut self, weights: Hidden, with: Option<TensorId>) -> (Hidden, Option<TensorId>) {
        let (gate, up) = (("gate.weight.gathered", weights.gate), ("up.weight.gathered", weights.up));
        let with = with.map(|id| ("q.weight.gathered", id));
        match (gate.1, with) {
            (Some(id), Some(with)) => {
                let [gate, up, with] = self.gathered(Part::Mlp, [(gate.0, id), up, with], &[]);
                (Hidden { gate: Some(gate), up }, Some(with))
            }
            (Some(id), None) => {
                let [gate, up] = self.gathered(Part::Mlp, [(gate.0, id), up], &[]);
                (Hidden { gate: Some(gate), up }, None)
            }
            (None, Some(with)) => {
                let [up, with] = self.gathered(Part::Mlp, [up, with], &[]);
                (Hidden { gate: None, up }, Some(with))
            }
            (None, None) => {
                let [up] = self.gathered(Part::Mlp, [up], &[]);
                (Hidden { gate: None, up }, None)
            }
        }
    }

    fn hidden_terms(&mut self, xn: TensorId, weights: &Hidden) -> Hidden {
        let out = [Dim::B, Dim::L, Dim::F];
        let gate = weights.gate.map(|gate| self.einsum("gate.terms", xn, gate, &out));
        Hidden { gate, up: self.einsum("up.terms", xn, weights.up, &out) }
    }

    /// The hidden activations with their sums over `e` paid, and the moves that pay them.
    fn scattered_hidden(&mut self, terms: &Hidden) -> (Hidden, Vec<(Part, Move)>) {
        let e = self.plan.e1();
        let mut moves = Vec::new();
        let mut scatter = |b: &mut Self, name, input: TensorId| {
            if e.is_empty() {
                return input;
            }
            let grown = [b.spec(input).axes(Dim::F), &e].concat();
            let output = b.after(name, Collective::ReduceScatter, &e, input, &[(Dim::F, grown)]);
            moves.push((Part::Mlp, Move { input, output }));
            output
        };
        let gate = terms.gate.map(|gate| scatter(self, "gate", gate));
        let up = scatter(self, "up", terms.up);
        (Hidden { gate, up }, moves)
    }

    fn activate(&mut self, model: &Architecture, hidden: &Hidden) -> TensorId {
        let part = core::mem::replace(&mut self.part, Part::Mlp);
        let output = self.activation("h", self.spec(hidden.up).clone());
        let function = model.mlp.nonlinearity();
        self.step(match hidden.gate {
            Some(gate) => Op::Gate { function, gate, up: hidden.up, output },
            None => Op::Activate { function, input: hidden.up, output },
        });
        self.part = part;
        output
    }

    /// Whether the axes `e` are still at the end of the subscript of `dim`.
    fn still_over_e(&self, o: TensorId, dim: Dim) -> bool {
        let e = self.plan.e1();
        !e.is_empty() && self.spec(o).axes(dim).ends_with(&e)
    }

    /// The outputs of both halves of a parallel block gathered over `e`.
    fn gathered_outputs(&mut self, h: TensorId, o: TensorId, dim: Dim) -> (TensorId, TensorId) {
        let e = self.plan.e1();
        if e.is_empty() {
            return (h, o);
        }
        let h_axes = super::plan::without(self.spec(h).axes(Dim::F), &e);
        let all_h = self.after("h.gathered", Collective::AllGather, &e, h, &[(Dim::F, h_axes)]);
        let mut moves = vec![(Part::Mlp, Move { input: h, output: all_h })];
        let mut all_o = o;
        if self.still_over_e(o, dim) {
            let o_axes = super::plan::without(self.spec(o).axes(dim), &e);
            all_o = self.after("o.gathered", Collective::AllGather, &e, o, &[(dim, o_axes)]);
            moves.push((Part::Attention, Move { input: o, output: all_o }));
        }
        self.collective(Collective::AllGather, &e, &moves);
        (all_h, all_o)
    }
}

const ATTENTION_NORM: NormNames = NormNames {
    sums: "norm.sums",
    complete: "norm.statistics",
    scale: "norm.scale",
    part: "norm.scale.part",
    output: "x.normed",
};

const MLP_NORM: NormNames = NormNames {
    sums: "mlp.norm.sums",
    complete: "mlp.norm.statistics",
    scale: "mlp.norm.scale",
    part: "mlp.norm.scale.part",
    output: "mlp.x.normed",
};
