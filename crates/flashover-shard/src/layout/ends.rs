//! What stands before and after the blocks: token embedding and unembedding, with the same table `V_fE_e` under every
//! layout, so that prefill and decoding share it.

use super::block::NormNames;
use super::builder::{Builder, spec};
use super::plan::without;
use crate::architecture::Architecture;
use crate::precision::Storage;
use crate::program::{Collective, Move, Op, Part, Program, Role, Step, TensorId};
use crate::spec::Dim;

const NORM: NormNames = NormNames {
    sums: "head.norm.sums",
    complete: "head.norm.statistics",
    scale: "head.norm.scale",
    part: "head.norm.scale.part",
    output: "head.x.normed",
};

impl Builder<'_> {
    /// From the tokens to the residual; gives the table. A rank looks up the rows that it holds, `BLE_e partialsum-f`;
    /// then tokens go to the ranks that work on them, and the sum is paid onto the residual's axes.
    pub(super) fn embed(&mut self) -> TensorId {
        let plan = self.plan;
        let tokens = self.tensor("tokens", spec([(Dim::B, &[]), (Dim::L, &[])], &[]), Role::Input, Storage::Index);
        let table = self.weight("embedding", [(Dim::V, &plan.f[..]), (Dim::E, &plan.e[..])]);
        let rows = spec([(Dim::B, &[]), (Dim::L, &[]), (Dim::E, &plan.e)], &plan.f);
        let output = self.activation("embedded", rows);
        self.step(Op::Embed { tokens, table, output });
        let dim = plan.tokens();
        let x = if plan.w.is_empty() {
            output
        } else {
            self.exchange("embedded.exchanged", output, (Dim::E, &plan.e), (dim, &plan.e))
        };
        let x = self.scatter("embedded.tokens", x, dim, &without(&plan.w, &plan.e));
        self.last_onto_residual(x, output);
        table
    }

    /// The last collective of the embedding writes the residual itself.
    fn last_onto_residual(&mut self, x: TensorId, embedded: TensorId) {
        let f = self.plan.f1();
        if !f.is_empty() {
            let one = Move { input: x, output: Program::RESIDUAL };
            self.collective(Collective::ReduceScatter, &f, &[(Part::Embedding, one)]);
            return;
        }
        debug_assert_ne!(x, embedded, "a layout that gathers all weights has moved the tokens");
        // What was built as a temporary is the residual.
        if let Some(Step { op: Op::Collective { moves, .. }, .. }) = self.steps.last_mut() {
            moves[0].output = Program::RESIDUAL;
        }
        self.tensors.pop();
    }

    /// From the residual to the logits of the last tokens, `BTV_fe`.
    pub(super) fn head(&mut self, model: &Architecture, table: TensorId) {
        let plan = self.plan;
        self.part = Part::Head;
        let from = self.spec(Program::RESIDUAL).clone();
        let owed = from.axes(Dim::L).to_vec();
        let selected = spec([(Dim::B, from.axes(Dim::B)), (Dim::T, &[]), (Dim::E, from.axes(Dim::E))], &owed);
        let output = self.activation("head.selected", selected);
        self.step(Op::Select { input: Program::RESIDUAL, output });
        let x = self.all_reduce("head.summed", output, &owed);
        let x = self.gather("head.x", x, Dim::E, &plan.f1());
        let xn = self.norm(model, &NORM, x);
        // From here on the weights stay and the few tokens travel, whatever the blocks do.
        let sequences = self.spec(xn).axes(Dim::B).to_vec();
        let xn = self.gather("head.all_sequences", xn, Dim::B, &sequences);
        let part = if plan.w.is_empty() { Vec::new() } else { plan.e.clone() };
        let xn = self.split("head.x.part", xn, Dim::E, &part);
        let table = if model.tied_embeddings {
            table
        } else {
            self.weight("unembedding", [(Dim::V, &plan.f[..]), (Dim::E, &plan.e[..])])
        };
        let terms = self.einsum("logits.terms", xn, table, &[Dim::B, Dim::T, Dim::V]);
        let logits = self.scatter("logits", terms, Dim::V, &plan.e);
        self.tensors[logits].role = Role::Output;
        if plan.e.is_empty() {
            self.tensors[logits].name = "logits";
        }
    }
}
