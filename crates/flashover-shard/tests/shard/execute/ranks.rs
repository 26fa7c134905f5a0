//! A plain executor of programs: every rank's tensors side by side, one step after the other on all of them. It shows that a
//! program says all that an executor needs; it is not fast, and it measures nothing.

use std::collections::HashMap;

use flashover_shard::architecture::Architecture;
use flashover_shard::mesh::{Axis, Mesh};
use flashover_shard::program::{Collective, Move, Op, Program, Role, Step, TensorId};
use flashover_shard::spec::{Dim, Sizes};

use super::model::{nonlinearity, normalize, rotate, weight};
use super::tensor::{Tensor, step};

/// What ranks keep between runs: by layer, name and rank.
pub type Caches = HashMap<(usize, &'static str, usize), Tensor>;

pub struct Ranks<'a> {
    pub model: &'a Architecture,
    pub mesh: &'a Mesh,
    pub program: &'a Program,
    pub sizes: Sizes,
    /// Tokens in the cache before this run.
    pub past: usize,
    pub tokens: &'a [Vec<usize>],
    pub caches: &'a mut Caches,
    layer: usize,
    held: Vec<HashMap<TensorId, Tensor>>,
}

impl<'a> Ranks<'a> {
    pub fn new(
        model: &'a Architecture,
        mesh: &'a Mesh,
        (program, sizes): (&'a Program, Sizes),
        past: usize,
        tokens: &'a [Vec<usize>],
        caches: &'a mut Caches,
    ) -> Self {
        let held = vec![HashMap::new(); mesh.chips()];
        Ranks { model, mesh, program, sizes, past, tokens, caches, layer: 0, held }
    }

    /// Runs the program; logits `[B, T, V]`, put together from all ranks.
    pub fn run(mut self) -> Tensor {
        self.steps(&self.program.embed);
        for layer in 0..self.model.layers {
            self.layer = layer;
            self.steps(&self.program.layer);
        }
        self.layer = 0;
        self.steps(&self.program.head);
        let logits = self.program.find("logits").unwrap();
        let shape = [Dim::B, Dim::T, Dim::V].map(|dim| self.sizes.get(dim));
        let mut whole = Tensor::zeros(&shape).map(|_| f64::NAN);
        for rank in 0..self.mesh.chips() {
            let local = &self.held[rank][&logits];
            let start = self.start(rank, logits);
            let mut index = vec![0; 3];
            for &x in &local.data {
                let at = whole.offset(&[start[0] + index[0], start[1] + index[1], start[2] + index[2]]);
                whole.data[at] = x;
                step(&mut index, &local.shape);
            }
        }
        whole
    }

    fn shape(&self, id: TensorId) -> Vec<usize> {
        self.program.tensor(id).spec.local_shape(self.mesh, &self.sizes).unwrap()
    }

    /// Where a rank's block begins.
    fn start(&self, rank: usize, id: TensorId) -> Vec<usize> {
        let block = self.program.tensor(id).spec.block(self.mesh, &self.sizes, rank).unwrap();
        block.into_iter().map(|range| range.start).collect()
    }

    fn steps(&mut self, steps: &[Step]) {
        for step in steps {
            match &step.op {
                Op::Collective { kind, axes, moves } => moves.iter().for_each(|&m| self.collective(*kind, axes, m)),
                Op::Repeat { axes, body, carried } => {
                    for _ in 1..self.mesh.group_size(axes).unwrap() {
                        self.steps(body);
                        for held in &mut self.held {
                            carried.iter().for_each(|(from, to)| {
                                let value = held[from].clone();
                                held.insert(*to, value);
                            });
                        }
                    }
                }
                op => (0..self.mesh.chips()).for_each(|rank| self.local(rank, op)),
            }
        }
    }

    fn get(&self, rank: usize, id: TensorId) -> Tensor {
        let tensor = self.program.tensor(id);
        match tensor.role {
            Role::Weight => self.stored(rank, id),
            Role::Cache => self.caches[&(self.layer, tensor.name, rank)].clone(),
            _ => self.held[rank][&id].clone(),
        }
    }

    fn put(&mut self, rank: usize, id: TensorId, tensor: Tensor) {
        // What grows with the cache has fewer tokens than its slots at first.
        if !self.program.tensor(id).spec.has(Dim::M) {
            assert_eq!(tensor.shape, self.shape(id), "{}", self.program.tensor(id).name);
        }
        self.held[rank].insert(id, tensor);
    }

    /// A rank's block of a weight; zero where heads or vocabulary are padding.
    fn stored(&self, rank: usize, id: TensorId) -> Tensor {
        let tensor = self.program.tensor(id);
        let start = self.start(rank, id);
        let layer = if self.program.is_per_layer(id) { self.layer } else { 0 };
        let dims: Vec<Dim> = tensor.spec.dims().iter().map(|d| d.dim).collect();
        Tensor::from_fn(&self.shape(id), |index| {
            let real: Option<Vec<usize>> =
                dims.iter().zip(index.iter().zip(&start)).map(|(&dim, (i, s))| self.unpadded(dim, i + s)).collect();
            real.map_or(0.0, |index| weight(tensor.name, layer, &index))
        })
    }

    /// The index without padding, or `None` for padding.
    fn unpadded(&self, dim: Dim, i: usize) -> Option<usize> {
        let Architecture { heads, kv_heads, vocabulary, .. } = *self.model;
        match dim {
            Dim::V => (i < vocabulary).then_some(i),
            Dim::K => (i < kv_heads).then_some(i),
            Dim::H if heads == kv_heads => (i < heads).then_some(i),
            Dim::H => {
                let (padded, group) = (self.sizes.get(Dim::H) / kv_heads, heads / kv_heads);
                (i % padded < group).then_some(i / padded * group + i % padded)
            }
            _ => Some(i),
        }
    }

    /// A collective in global coordinates: what a rank's output block covers comes from the input blocks of its group.
    fn collective(&mut self, kind: Collective, axes: &[Axis], Move { input, output }: Move) {
        let chips = self.mesh.chips();
        let mut results = Vec::with_capacity(chips);
        for rank in 0..chips {
            let group = self.mesh.group(rank, axes).unwrap();
            results.push(match kind {
                Collective::Send => {
                    let index = self.mesh.index(rank, axes).unwrap();
                    self.get(group[(index + group.len() - 1) % group.len()], input)
                }
                Collective::AllGather | Collective::AllToAll => self.collect(rank, &group, input, output),
                Collective::ReduceScatter | Collective::AllReduce => {
                    self.reduce(rank, &group, input, output, |a, b| a + b)
                }
                Collective::AllReduceMax => self.reduce(rank, &group, input, output, f64::max),
            });
        }
        for (rank, tensor) in results.into_iter().enumerate() {
            self.put(rank, output, tensor);
        }
    }

    fn collect(&self, rank: usize, group: &[usize], input: TensorId, output: TensorId) -> Tensor {
        let start = self.start(rank, output);
        let size = self.shape(input);
        let members: Vec<_> = group.iter().map(|&r| (self.start(r, input), self.get(r, input))).collect();
        Tensor::from_fn(&self.shape(output), |index| {
            let global: Vec<_> = index.iter().zip(&start).map(|(i, s)| i + s).collect();
            let holds = |from: &[usize]| (0..global.len()).all(|d| (from[d]..from[d] + size[d]).contains(&global[d]));
            let (from, tensor) = members.iter().find(|(from, _)| holds(from)).expect("a member holds every element");
            tensor.at(&global.iter().zip(from).map(|(g, f)| g - f).collect::<Vec<_>>())
        })
    }

    fn reduce(
        &self,
        rank: usize,
        group: &[usize],
        input: TensorId,
        output: TensorId,
        f: fn(f64, f64) -> f64,
    ) -> Tensor {
        let start = self.start(rank, output);
        let members: Vec<_> = group.iter().map(|&r| (self.start(r, input), self.get(r, input))).collect();
        Tensor::from_fn(&self.shape(output), |index| {
            let of = |(from, tensor): &(Vec<usize>, Tensor)| {
                tensor.at(&(0..index.len()).map(|d| index[d] + start[d] - from[d]).collect::<Vec<_>>())
            };
            members.iter().map(of).reduce(f).unwrap()
        })
    }

    fn local(&mut self, rank: usize, op: &Op) {
        match op {
            Op::Embed { table, output, .. } => {
                let (rows, from) = (self.get(rank, *table), self.start(rank, *table)[0]);
                let (tokens, held) = (self.tokens, from..from + rows.shape[0]);
                let out = Tensor::from_fn(&self.shape(*output), |i| {
                    let token = tokens[i[0]][self.past + i[1]];
                    if held.contains(&token) { rows.at(&[token - from, i[2]]) } else { 0.0 }
                });
                self.put(rank, *output, out);
            }
            Op::Select { input, output } => {
                let (x, from) = (self.get(rank, *input), self.start(rank, *input)[1]);
                let first = self.sizes.get(Dim::L) - self.sizes.get(Dim::T);
                let held = from..from + x.shape[1];
                let out = Tensor::from_fn(&self.shape(*output), |i| {
                    let l = first + i[1];
                    if held.contains(&l) { x.at(&[i[0], l - from, i[2]]) } else { 0.0 }
                });
                self.put(rank, *output, out);
            }
            Op::Statistics { input, output } => {
                let x = self.get(rank, *input);
                let out = Tensor::from_fn(&self.shape(*output), |i| {
                    let row = (0..x.shape[2]).map(|e| x.at(&[i[0], i[1], e]));
                    if i[2] == 0 { row.map(|x| x * x).sum() } else { row.sum() }
                });
                self.put(rank, *output, out);
            }
            Op::Normalize { norm, input, statistics, scale, output } => {
                let [x, sums, scale] = [*input, *statistics, *scale].map(|id| self.get(rank, id));
                let e = self.sizes.get(Dim::E);
                let out = Tensor::from_fn(&x.shape, |i| {
                    let squares = sums.at(&[i[0], i[1], 0]);
                    let sum = if sums.shape[2] > 1 { sums.at(&[i[0], i[1], 1]) } else { 0.0 };
                    normalize(*norm, x.at(i), squares, sum, e) * scale.at(&[i[2]])
                });
                self.put(rank, *output, out);
            }
            Op::Einsum { lhs, rhs, output } => {
                let out = self.einsum(rank, *lhs, *rhs, *output);
                self.put(rank, *output, out);
            }
            Op::Split { input, output } => {
                let x = self.get(rank, *input);
                let (from, to) = (self.start(rank, *input), self.start(rank, *output));
                let out = if from == to && self.shape(*input) == self.shape(*output) {
                    x
                } else {
                    Tensor::from_fn(&self.shape(*output), |i| {
                        x.at(&(0..i.len()).map(|d| i[d] + to[d] - from[d]).collect::<Vec<_>>())
                    })
                };
                self.put(rank, *output, out);
            }
            Op::Rotary { input, output } => {
                let (x, from) = (self.get(rank, *input), self.past + self.start(rank, *input)[1]);
                let head = |i: &[usize]| (0..x.shape[3]).map(|q| x.at(&[i[0], i[1], i[2], q])).collect::<Vec<_>>();
                let out = Tensor::from_fn(&x.shape, |i| rotate(&head(i), from + i[1])[i[3]]);
                self.put(rank, *output, out);
            }
            Op::Activate { function, input, output } => {
                let out = self.get(rank, *input).map(|x| nonlinearity(*function, x));
                self.put(rank, *output, out);
            }
            Op::Gate { function, gate, up, output } => {
                let out = self.get(rank, *gate).zip(&self.get(rank, *up), |g, u| nonlinearity(*function, g) * u);
                self.put(rank, *output, out);
            }
            Op::Add { lhs, rhs, output } => {
                let out = self.get(rank, *lhs).zip(&self.get(rank, *rhs), |a, b| a + b);
                self.put(rank, *output, out);
            }
            Op::Append { new, cache } => self.append(rank, *new, *cache),
            Op::Attention { q, k, v, output, lse } => self.attention(rank, [*q, *k, *v, *output], *lse),
            Op::Merge { a, b, output } => {
                let [(oa, la), (ob, lb)] = [a, b].map(|&(o, lse)| (self.get(rank, o), self.get(rank, lse)));
                let both = la.zip(&lb, |a, b| {
                    let m = a.max(b);
                    if m == f64::NEG_INFINITY { m } else { m + ((a - m).exp() + (b - m).exp()).ln() }
                });
                let share = |l: f64, all: f64| if all == f64::NEG_INFINITY { 0.0 } else { (l - all).exp() };
                let o = Tensor::from_fn(&oa.shape, |i| {
                    let all = both.at(&i[..3]);
                    oa.at(i) * share(la.at(&i[..3]), all) + ob.at(i) * share(lb.at(&i[..3]), all)
                });
                self.put(rank, output.0, o);
                self.put(rank, output.1, both);
            }
            Op::Rescale { o, lse, max, output, weight } => {
                let [x, lse, max] = [*o, *lse, *max].map(|id| self.get(rank, id));
                let w = lse.zip(&max, |l, m| if m == f64::NEG_INFINITY { 0.0 } else { (l - m).exp() });
                let out = Tensor::from_fn(&x.shape, |i| x.at(i) * w.at(&i[..3]));
                self.put(rank, *output, out);
                self.put(rank, *weight, w);
            }
            Op::Divide { o, weight, output } => {
                let (x, w) = (self.get(rank, *o), self.get(rank, *weight));
                let out = Tensor::from_fn(&x.shape, |i| {
                    let w = w.at(&i[..3]);
                    if w == 0.0 { 0.0 } else { x.at(i) / w }
                });
                self.put(rank, *output, out);
            }
            other => panic!("{} is not a local step", other.name()),
        }
    }

    fn einsum(&self, rank: usize, lhs: TensorId, rhs: TensorId, output: TensorId) -> Tensor {
        let dims = |id: TensorId| self.program.tensor(id).spec.dims().iter().map(|d| d.dim).collect::<Vec<_>>();
        let (l, r, out) = (dims(lhs), dims(rhs), dims(output));
        let (a, b) = (self.get(rank, lhs), self.get(rank, rhs));
        let summed: Vec<Dim> = l.iter().copied().filter(|dim| r.contains(dim) && !out.contains(dim)).collect();
        let sizes: Vec<usize> = summed.iter().map(|dim| a.shape[l.iter().position(|x| x == dim).unwrap()]).collect();
        Tensor::from_fn(&self.shape(output), |index| {
            let mut inner = vec![0; summed.len()];
            let mut sum = 0.0;
            for _ in 0..sizes.iter().product() {
                let find = |dim: &Dim| match out.iter().position(|x| x == dim) {
                    Some(place) => index[place],
                    None => inner[summed.iter().position(|x| x == dim).unwrap()],
                };
                let at = |dims: &[Dim]| dims.iter().map(find).collect::<Vec<_>>();
                sum += a.at(&at(&l)) * b.at(&at(&r));
                step(&mut inner, &sizes);
            }
            sum
        })
    }

    fn append(&mut self, rank: usize, new: TensorId, cache: TensorId) {
        let x = self.get(rank, new);
        let (new_spec, cache_spec) = (&self.program.tensor(new).spec, &self.program.tensor(cache).spec);
        let from = self.past + self.start(rank, new)[1];
        let shards = cache_spec.axes(Dim::M);
        let spread = new_spec.axes(Dim::L).is_empty() && !shards.is_empty();
        let (chips, index) = (self.mesh.group_size(shards).unwrap(), self.mesh.index(rank, shards).unwrap());
        let mine: Vec<usize> = (0..x.shape[1]).filter(|l| !spread || (from + l) % chips == index).collect();
        let key = (self.layer, self.program.tensor(cache).name, rank);
        let empty = Tensor::zeros(&[x.shape[0], 0, x.shape[2], x.shape[3]]);
        let old = self.caches.remove(&key).unwrap_or(empty);
        let length = old.shape[1];
        let shape = [x.shape[0], length + mine.len(), x.shape[2], x.shape[3]];
        let mut grown = Tensor::from_fn(&shape, |i| {
            if i[1] < length { old.at(i) } else { x.at(&[i[0], mine[i[1] - length], i[2], i[3]]) }
        });
        grown.positions = old.positions.iter().copied().chain(mine.iter().map(|l| from + l)).collect();
        self.caches.insert(key, grown);
    }

    fn attention(&mut self, rank: usize, [q, k, v, output]: [TensorId; 4], lse: Option<TensorId>) {
        let (qs, ks, vs) = (self.get(rank, q), self.get(rank, k), self.get(rank, v));
        let (start, kv_start) = (self.start(rank, q), self.start(rank, k)[2]);
        let group = self.sizes.get(Dim::H) / self.sizes.get(Dim::K);
        let width = qs.shape[3];
        let mut out = Tensor::zeros(&qs.shape);
        let mut sums = Tensor::zeros(&qs.shape[..3]);
        let mut index = vec![0; 3];
        for row in 0..sums.data.len() {
            let [b, l, h] = index[..] else { unreachable!() };
            let kv = (start[2] + h) / group - kv_start;
            let seen = (0..ks.shape[1]).filter(|&m| ks.positions[m] <= self.past + start[1] + l);
            let score = |m: usize| (0..width).map(|i| qs.at(&[b, l, h, i]) * ks.at(&[b, m, kv, i])).sum::<f64>();
            let weights: Vec<_> = seen.map(|m| (m, (score(m) / (width as f64).sqrt()).exp())).collect();
            let sum: f64 = weights.iter().map(|(_, w)| w).sum();
            sums.data[row] = sum.ln();
            for i in 0..width {
                let o: f64 = weights.iter().map(|&(m, w)| w * vs.at(&[b, m, kv, i])).sum();
                out.data[row * width + i] = if sum > 0.0 { o / sum } else { 0.0 };
            }
            step(&mut index, &qs.shape[..3]);
        }
        self.put(rank, output, out);
        if let Some(lse) = lse {
            self.put(rank, lse, sums);
        }
    }
}
