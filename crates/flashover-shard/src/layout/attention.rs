//! Attention between the projections, under every attention layout (§3.3).
//!
//! Queries come from their projection as `B_wLH_fQ partialsum-e`, and `o` goes back as `B_wLH_fQ` (axes after the gather
//! of weights). Between them they lie as the layout asks.

use super::AttentionLayout;
use super::builder::{Builder, spec};
use super::plan::without;
use crate::mesh::Axis;
use crate::precision::Storage;
use crate::program::{Collective, Move, Op, Part, Role, Step, TensorId};
use crate::spec::Dim;
use crate::workload::Phase;

/// What the queries' projection is followed by, over the axes `e`.
pub(super) enum QueryMove {
    /// Reduce-scatter onto this dimension.
    Scatter(Dim),
    /// All-reduce.
    Reduce,
}

impl Builder<'_> {
    /// Whether attention when decoding runs over a part of the cache's length.
    fn merges(&self) -> bool {
        self.plan.attention == AttentionLayout::Sequence && self.plan.phase == Phase::Decode
    }

    /// How the sum that the query projection owes is paid.
    pub(super) fn query_move(&self) -> QueryMove {
        match self.plan.attention {
            AttentionLayout::Heads if self.plan.heads_over_e => QueryMove::Scatter(Dim::H),
            AttentionLayout::Heads => QueryMove::Reduce,
            AttentionLayout::Batch | AttentionLayout::HeadsAndBatch => QueryMove::Scatter(Dim::B),
            AttentionLayout::Sequence if self.merges() => QueryMove::Reduce,
            AttentionLayout::Sequence => QueryMove::Scatter(Dim::L),
        }
    }

    /// The queries after [`query_move`](Self::query_move), and the move; nothing moves if `e` has no axes.
    pub(super) fn queries(&mut self, input: TensorId) -> (TensorId, Option<(Collective, Move)>) {
        let e = self.plan.e1();
        if e.is_empty() {
            return (input, None);
        }
        let (kind, to) = match self.query_move() {
            QueryMove::Scatter(dim) => {
                let grown = [self.spec(input).axes(dim), &e].concat();
                (Collective::ReduceScatter, vec![(dim, grown)])
            }
            QueryMove::Reduce => (Collective::AllReduce, vec![]),
        };
        let output = self.after("q.summed", kind, &e, input, &to);
        (output, Some((kind, Move { input, output })))
    }

    /// Keys and values from the block's input `xn`, `B_wLE_e`, as attention needs them.
    pub(super) fn keys_and_values(&mut self, xn: TensorId, rotary: bool) -> [TensorId; 2] {
        let plan = self.plan;
        let (kv, rest, rest1) = (&plan.kv, without(&plan.f, &plan.kv), plan.rest1());
        let stored = [&plan.e[..], &rest].concat();
        let weights = ["k.weight", "v.weight"]
            .map(|name| self.weight(name, [(Dim::E, &stored[..]), (Dim::K, &kv[..]), (Dim::Q, &[])]));
        let [wk, wv] = self.gathered(
            Part::Attention,
            [("k.weight.gathered", weights[0]), ("v.weight.gathered", weights[1])],
            &[Dim::E],
        );
        // Gathering `E` whole and taking back a part keeps the rest of the axes at work without a strided gather.
        let part = if plan.w.is_empty() { Vec::new() } else { rest1.clone() };
        let (wk, wv) = (self.split("k.weight.part", wk, Dim::E, &part), self.split("v.weight.part", wv, Dim::E, &part));
        let x = self.split("x.for_keys", xn, Dim::E, &rest1);
        let out = [Dim::B, Dim::L, Dim::K, Dim::Q];
        let (k, v) = (self.einsum("k.terms", x, wk, &out), self.einsum("v.terms", x, wv, &out));
        let [k, v] = self.place_keys(k, v);
        if !rotary {
            return [k, v];
        }
        let output = self.activation("k.rotated", self.spec(k).clone());
        self.step(Op::Rotary { input: k, output });
        [output, v]
    }

    /// Pays the sums that keys and values owe, and moves them to where attention reads them.
    fn place_keys(&mut self, k: TensorId, v: TensorId) -> [TensorId; 2] {
        let plan = self.plan;
        let owed = [plan.e1(), plan.rest1()].concat();
        let reduce = |b: &mut Self, axes: &[Axis]| b.both(["k", "v"], Collective::AllReduce, axes, [k, v], &[]);
        match plan.attention {
            AttentionLayout::Heads if plan.rest1().is_empty() && plan.keys_over_e => {
                let heads = [plan.kv1(), owed.clone()].concat();
                self.both(["k", "v"], Collective::ReduceScatter, &owed, [k, v], &[(Dim::K, heads)])
            }
            AttentionLayout::Heads => reduce(self, &owed),
            AttentionLayout::Sequence if self.merges() => reduce(self, &owed),
            AttentionLayout::Batch | AttentionLayout::HeadsAndBatch | AttentionLayout::Sequence => {
                let tokens = plan.tokens();
                let mut rest = plan.rest1();
                rest.sort_unstable();
                let owed = [plan.e1(), rest].concat();
                let held = [self.spec(k).axes(tokens), &owed].concat();
                let kv = self.both(["k", "v"], Collective::ReduceScatter, &owed, [k, v], &[(tokens, held.clone())]);
                if plan.attention != AttentionLayout::Batch {
                    return kv;
                }
                let mut heads = plan.kv1();
                heads.sort_unstable();
                let to = [(Dim::K, vec![]), (tokens, [held, heads.clone()].concat())];
                self.both(["k.exchanged", "v.exchanged"], Collective::AllToAll, &heads, kv, &to)
            }
        }
    }

    /// The same collective for keys and values.
    fn both(
        &mut self,
        names: [&'static str; 2],
        kind: Collective,
        axes: &[Axis],
        input: [TensorId; 2],
        to: &[(Dim, Vec<Axis>)],
    ) -> [TensorId; 2] {
        if axes.is_empty() {
            return input;
        }
        let output = [0, 1].map(|i| self.after(names[i], kind, axes, input[i], to));
        let moves = [0, 1].map(|i| (Part::Attention, Move { input: input[i], output: output[i] }));
        self.collective(kind, axes, &moves);
        output
    }

    /// Attention of `q`, after [`queries`](Self::queries), with the new keys and values: `o` as `B_wLH_feQ` or
    /// `B_weLH_fQ`, whose axes `e` are still to be gathered from the dimension that is given back.
    pub(super) fn attend(&mut self, q: TensorId, [k, v]: [TensorId; 2], rotary: bool) -> (TensorId, Dim) {
        let plan = self.plan;
        let q = if rotary {
            let output = self.activation("q.rotated", self.spec(q).clone());
            self.step(Op::Rotary { input: q, output });
            output
        } else {
            q
        };
        let grown = self.spec(k).renamed(Dim::L, Dim::M).expect("keys have no M");
        let length = if self.merges() { plan.cache_axes() } else { grown.axes(Dim::M).to_vec() };
        let grown = grown.with(Dim::M, &length).expect("the cache's axes shard nothing else of it");
        let caches = ["k.cache", "v.cache"].map(|name| self.tensor(name, grown.clone(), Role::Cache, Storage::Cache));
        self.step(Op::Append { new: k, cache: caches[0] });
        self.step(Op::Append { new: v, cache: caches[1] });
        if self.merges() && !length.is_empty() {
            return self.merged(q, caches);
        }
        let tokens = plan.tokens();
        let moved = plan.moved();
        // The suffix of `H` that moves, in the order in which it stands there.
        let suffix = without(&plan.f1(), &plan.head_axes());
        let q = self.exchange("q.exchanged", q, (Dim::H, &suffix), (tokens, &moved));
        let o = if length.is_empty() { self.whole(q, caches) } else { self.ring(q, caches, &length) };
        let o = self.exchange("o.exchanged", o, (tokens, &moved), (Dim::H, &suffix));
        (o, if plan.attention == AttentionLayout::Heads { Dim::H } else { tokens })
    }

    /// Every query sees all of its keys on its own rank.
    fn whole(&mut self, q: TensorId, [k, v]: [TensorId; 2]) -> TensorId {
        let output = self.activation("o", self.spec(q).clone());
        self.step(Op::Attention { q, k, v, output, lse: None });
        output
    }

    /// One number a row of attention.
    fn rows(&mut self, name: &'static str, o: TensorId) -> TensorId {
        let s = self.spec(o);
        let rows = spec([Dim::B, Dim::L, Dim::H].map(|dim| (dim, s.axes(dim))), s.partial());
        self.tensor(name, rows, Role::Temporary, Storage::Statistic)
    }

    /// Ring attention (Liu et al., arXiv 2310.01889): blocks of keys and values go round the ring, and every rank merges
    /// what its queries find in each. Blocks carry their positions: after `i` sends a rank holds those of rank `index − i`.
    fn ring(&mut self, q: TensorId, caches: [TensorId; 2], axes: &[Axis]) -> TensorId {
        let q_spec = self.spec(q).clone();
        // Copies, so that the ring does not turn the cache itself away from its owner.
        let held = ["k.held", "v.held"].map(|name| self.activation(name, self.spec(caches[0]).clone()));
        self.step(Op::Split { input: caches[0], output: held[0] });
        self.step(Op::Split { input: caches[1], output: held[1] });
        let o = self.activation("o", q_spec.clone());
        let lse = self.rows("lse", o);
        self.step(Op::Attention { q, k: held[0], v: held[1], output: o, lse: Some(lse) });
        let outer = core::mem::take(&mut self.steps);
        let sent = ["k.sent", "v.sent"].map(|name| self.activation(name, self.spec(held[0]).clone()));
        let moves = [0, 1].map(|i| (Part::Attention, Move { input: held[i], output: sent[i] }));
        self.collective(Collective::Send, axes, &moves);
        let block = self.activation("o.block", q_spec.clone());
        let block_lse = self.rows("lse.block", block);
        self.step(Op::Attention { q, k: sent[0], v: sent[1], output: block, lse: Some(block_lse) });
        let merged = self.activation("o.merged", q_spec);
        let merged_lse = self.rows("lse.merged", merged);
        self.step(Op::Merge { a: (o, lse), b: (block, block_lse), output: (merged, merged_lse) });
        let body = core::mem::replace(&mut self.steps, outer);
        let carried = vec![(sent[0], held[0]), (sent[1], held[1]), (merged, o), (merged_lse, lse)];
        self.steps.push(Step { part: self.part, op: Op::Repeat { axes: axes.to_vec(), body, carried } });
        o
    }

    /// One query over a cache that is sharded over its length: every rank attends to its part, and the partial softmaxes
    /// are merged by their log-sum-exps.
    fn merged(&mut self, q: TensorId, [k, v]: [TensorId; 2]) -> (TensorId, Dim) {
        let plan = self.plan;
        let length = plan.cache_axes();
        let suffix = plan.rest1();
        let q = self.gather("q.gathered", q, Dim::H, &suffix);
        let partial = self.spec(q).with_partial(&length).expect("the cache's axes shard nothing of the queries");
        let o = self.activation("o.part", partial.clone());
        let lse = self.rows("lse", o);
        self.step(Op::Attention { q, k, v, output: o, lse: Some(lse) });
        let max = self.moved("lse.max", Collective::AllReduceMax, &length, lse, &[]);
        let scaled = self.activation("o.scaled", partial);
        let weight = self.rows("weight", scaled);
        self.step(Op::Rescale { o, lse, max, output: scaled, weight });
        let e = plan.e1();
        let (scaled, weight) = if plan.heads_over_e {
            (scaled, weight)
        } else {
            (self.all_reduce("o.over_e", scaled, &e), self.all_reduce("weight.over_e", weight, &e))
        };
        let onto = if plan.heads_over_e { [&suffix[..], &e].concat() } else { suffix };
        let scaled = self.scatter("o.summed", scaled, Dim::H, &onto);
        let weight = self.scatter("weight.summed", weight, Dim::H, &onto);
        let output = self.activation("o", self.spec(scaled).clone());
        self.step(Op::Divide { o: scaled, weight, output });
        (output, Dim::H)
    }
}
