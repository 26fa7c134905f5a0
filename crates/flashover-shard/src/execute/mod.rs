//! Runs a [program](crate::program) on real tensors: what one rank does, on any Burn device, over any
//! [`Transport`].
//!
//! A rank owns its blocks of the weights and of the cache, and its end of the transport; what it shares with others is
//! the [`Pass`]: the program, sizes and tokens, which are no tensors of another rank. Every local tensor is held against
//! the shape and bytes of its spec when it is written.
//!
//! Tensors have rank 4: the dimensions of the spec in its order, then ones. All are f32.

mod attention;
mod blocks;
mod einsum;
mod local;
mod state;

use burn::tensor::{DType, Device, Tensor};

use crate::architecture::Architecture;
use crate::error::ShardError;
use crate::mesh::{Axis, Mesh};
use crate::program::{Collective, Move, Op, Program, Role, Step, TensorId};
use crate::spec::{Dim, Sizes, Spec};
use crate::transport::{Key, Ledger, Reduction, Section, Transport, bytes};

pub(crate) use local::{embed, nonlinearity, normalize};
pub(crate) use state::rotary;
pub use state::{Cache, State};

/// One run of a program, the same for every rank.
#[derive(Debug)]
pub struct Pass<'a> {
    model: &'a Architecture,
    program: &'a Program,
    mesh: &'a Mesh,
    sizes: &'a Sizes,
    tokens: &'a [Vec<u32>],
    past: usize,
    /// By tensor: the shape of a block, and by rank where it begins.
    shapes: Vec<[usize; 4]>,
    starts: Vec<Vec<[usize; 4]>>,
}

impl<'a> Pass<'a> {
    /// A run over `tokens`, `B` sequences of `L` new tokens, after `past` tokens that the cache holds.
    ///
    /// # Errors
    ///
    /// If the sizes do not fit the mesh or the tokens, or a token is beyond the vocabulary.
    pub fn new(
        model: &'a Architecture,
        (program, sizes): (&'a Program, &'a Sizes),
        mesh: &'a Mesh,
        tokens: &'a [Vec<u32>],
        past: usize,
    ) -> Result<Self, ShardError> {
        let (batch, length) = (sizes.get(Dim::B), sizes.get(Dim::L));
        if tokens.len() != batch || tokens.iter().any(|sequence| sequence.len() != length) {
            let lengths: Vec<_> = tokens.iter().map(Vec::len).collect();
            return Err(ShardError::field("tokens", format!("{batch} sequences of {length}"), format!("{lengths:?}")));
        }
        check_vocabulary(model, tokens)?;
        Pass::without_tokens(model, (program, sizes), mesh, past).map(|pass| Pass { tokens, ..pass })
    }

    /// A run of a program that embeds nothing.
    pub(crate) fn without_tokens(
        model: &'a Architecture,
        (program, sizes): (&'a Program, &'a Sizes),
        mesh: &'a Mesh,
        past: usize,
    ) -> Result<Self, ShardError> {
        program.check(mesh, sizes)?;
        let mut pass = Pass { model, program, mesh, sizes, tokens: &[], past, shapes: vec![], starts: vec![] };
        for tensor in &program.tensors {
            let shape = padded(&tensor.spec.local_shape(mesh, sizes)?, 1);
            let start = |rank| {
                let dims = tensor.spec.dims().iter().zip(shape);
                let at: Vec<_> = dims.map(|(d, n)| Ok(mesh.index(rank, &d.axes)? * n)).collect::<Result<_, _>>()?;
                Ok(padded(&at, 0))
            };
            pass.starts.push((0..mesh.chips()).map(start).collect::<Result<_, ShardError>>()?);
            pass.shapes.push(shape);
        }
        Ok(pass)
    }

    fn spec(&self, id: TensorId) -> &Spec {
        &self.program.tensor(id).spec
    }

    fn dims(&self, id: TensorId) -> Vec<Dim> {
        self.spec(id).dims().iter().map(|d| d.dim).collect()
    }
}

/// Refuses a token that a model does not have.
pub(crate) fn check_vocabulary(model: &Architecture, tokens: &[Vec<u32>]) -> Result<(), ShardError> {
    match tokens.iter().flatten().find(|&&token| token as usize >= model.vocabulary) {
        Some(token) => Err(ShardError::field("token", format!("below the vocabulary of {}", model.vocabulary), token)),
        None => Ok(()),
    }
}

/// Sizes or coordinates of a spec's dimensions as those of a tensor of rank 4. No spec has more dimensions.
pub(crate) fn padded(of: &[usize], with: usize) -> [usize; 4] {
    core::array::from_fn(|i| of.get(i).copied().unwrap_or(with))
}

/// What a rank has after a run.
#[derive(Debug)]
pub struct Outcome {
    /// Its block of the logits `BTV`, and where it begins.
    pub logits: Tensor<4>,
    /// Where in `[B, T, V]` the block begins.
    pub start: [usize; 3],
    /// What it moved.
    pub ledger: Ledger,
    /// The most bytes that its temporary tensors took at once, weights and cache not counted.
    pub working: u64,
}

/// Runs a pass on the rank whose end `transport` is.
///
/// # Errors
///
/// If a weight is missing, a tensor has another shape than its spec says, a cache lies otherwise than the program wants,
/// attention is refused, or the transport fails.
pub fn run<T: Transport>(pass: &Pass, transport: T, state: &mut State) -> Result<Outcome, ShardError> {
    let mut rank = Rank::new(pass, transport, state)?;
    rank.section(Section::Embed)?;
    for layer in 0..pass.model.layers {
        rank.layer = layer;
        rank.section(Section::Layer)?;
    }
    rank.layer = 0;
    rank.section(Section::Head)?;
    let (id, _) = pass.program.of_role(Role::Output).next().expect("every program has logits");
    let [b, t, v, _] = pass.starts[id][rank.rank];
    let logits = rank.get(id)?;
    Ok(Outcome { logits, start: [b, t, v], ledger: rank.ledger, working: rank.working })
}

/// Runs a pass that only moves the cache, each block's: of every pair, the tensor takes the place of the cache of that
/// name, whose blocks along `M` then have these positions. Gives what the rank moved.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn move_cache<T: Transport>(
    pass: &Pass,
    transport: T,
    state: &mut State,
    moved: [(&'static str, TensorId); 2],
    positions: &[Vec<usize>],
) -> Result<Ledger, ShardError> {
    let mut rank = Rank::new(pass, transport, state)?;
    for layer in 0..pass.model.layers {
        rank.layer = layer;
        rank.section(Section::Layer)?;
        for (name, id) in moved {
            let tensor = rank.get(id)?;
            let spec = pass.spec(id).clone();
            rank.state.set_cache(name, layer, Cache { spec, tensor, positions: positions.to_vec() });
        }
    }
    Ok(rank.ledger)
}

/// A rank at work.
struct Rank<'a, T> {
    pass: &'a Pass<'a>,
    rank: usize,
    device: Device,
    transport: T,
    state: &'a mut State,
    /// Temporaries, by tensor.
    held: Vec<Option<Tensor<4>>>,
    /// Of keys and values, whose block of the positions they are: the index over the axes of `M`. A ring changes it.
    owner: Vec<usize>,
    ledger: Ledger,
    section: Section,
    layer: usize,
    /// Bytes of `held`, and the most that they have been.
    live: u64,
    working: u64,
}

impl<'a, T: Transport> Rank<'a, T> {
    fn new(pass: &'a Pass<'a>, transport: T, state: &'a mut State) -> Result<Self, ShardError> {
        let (tensors, rank) = (pass.program.tensors.len(), transport.rank());
        let owner = (0..tensors).map(|id| pass.mesh.index(rank, pass.spec(id).axes(Dim::M)));
        Ok(Rank {
            pass,
            rank,
            device: state.device().clone(),
            transport,
            owner: owner.collect::<Result<_, _>>()?,
            state,
            held: vec![None; tensors],
            ledger: Ledger::default(),
            section: Section::Embed,
            layer: 0,
            live: 0,
            working: 0,
        })
    }

    fn section(&mut self, section: Section) -> Result<(), ShardError> {
        self.section = section;
        let pass = self.pass;
        let steps = section.steps(pass.program);
        let mut number = 0;
        for (i, step) in steps.iter().enumerate() {
            self.step(step, number)?;
            number += Program::flat(core::slice::from_ref(step)).len();
            self.forget(&steps[i + 1..]);
        }
        Ok(())
    }

    /// Drops what no later step of the section reads, but for what leaves the section.
    fn forget(&mut self, later: &[Step]) {
        let mut kept = vec![false; self.held.len()];
        kept[Program::RESIDUAL] = self.section != Section::Head;
        later.iter().flat_map(|step| step.op.inputs()).for_each(|id| kept[id] = true);
        for (id, held) in self.held.iter_mut().enumerate() {
            if !kept[id] && self.pass.program.tensor(id).role != Role::Output {
                self.live -= held.take().as_ref().map_or(0, bytes);
            }
        }
    }

    /// A step whose number within the section, or whose first step's number, is `number`.
    fn step(&mut self, step: &Step, number: usize) -> Result<(), ShardError> {
        match &step.op {
            Op::Collective { kind, axes, moves } => {
                let before = self.transport.traffic();
                for &one in moves {
                    self.collective(*kind, axes, one)?;
                }
                let key = Key { section: self.section, layer: self.layer, step: number };
                self.ledger.add(key, self.transport.traffic().since(before));
                Ok(())
            }
            Op::Repeat { axes, body, carried } => {
                for _ in 1..self.pass.mesh.group_size(axes)? {
                    let mut at = number;
                    for step in body {
                        self.step(step, at)?;
                        at += Program::flat(core::slice::from_ref(step)).len();
                    }
                    for &(from, to) in carried {
                        let new = self.held[from].take();
                        let old = core::mem::replace(&mut self.held[to], new);
                        self.live -= old.as_ref().map_or(0, bytes);
                        self.owner[to] = self.owner[from];
                    }
                }
                Ok(())
            }
            op => self.local(op),
        }
    }

    fn get(&self, id: TensorId) -> Result<Tensor<4>, ShardError> {
        let tensor = self.pass.program.tensor(id);
        let found = match tensor.role {
            Role::Weight => {
                let layer = if self.section == Section::Layer { self.layer } else { 0 };
                self.state.weight(tensor.name, layer)
            }
            Role::Cache => self.state.cache(tensor.name, self.layer).map(|cache| cache.tensor.clone()),
            _ => self.held[id].clone(),
        };
        found.ok_or_else(|| {
            ShardError::field(format!("rank {}: {}", self.rank, tensor.name), "a tensor that was made", "none")
        })
    }

    /// Keeps what a step made, if it is what the spec says that a chip holds.
    fn put(&mut self, id: TensorId, tensor: Tensor<4>) -> Result<(), ShardError> {
        self.check(id, &tensor)?;
        self.live += bytes(&tensor);
        let old = self.held[id].replace(tensor);
        self.live -= old.as_ref().map_or(0, bytes);
        self.working = self.working.max(self.live);
        Ok(())
    }

    /// Holds a tensor against the shape and the bytes of its spec. Of a cache whose length is sharded, a chip may have
    /// fewer tokens than slots.
    fn check(&self, id: TensorId, tensor: &Tensor<4>) -> Result<(), ShardError> {
        let of = self.pass.program.tensor(id);
        let (mut expected, found) = (self.pass.shapes[id], tensor.dims());
        if let Some(m) = of.spec.position(Dim::M)
            && !of.spec.axes(Dim::M).is_empty()
        {
            expected[m] = expected[m].min(found[m]);
        }
        let allowed = of.spec.local_bytes(self.pass.mesh, self.pass.sizes, 32)?;
        if found == expected && tensor.dtype() == DType::F32 && bytes(tensor) <= allowed {
            return Ok(());
        }
        let field = format!("rank {}: {} {}", self.rank, of.name, of.spec);
        let expected = format!("{expected:?} of f32, {allowed} bytes");
        Err(ShardError::field(field, expected, format!("{found:?} of {:?}, {} bytes", tensor.dtype(), bytes(tensor))))
    }

    fn collective(&mut self, kind: Collective, axes: &[Axis], Move { input, output }: Move) -> Result<(), ShardError> {
        let x = self.get(input)?;
        let group = self.pass.mesh.group(self.rank, axes)?;
        let made = match kind {
            Collective::AllGather => {
                let all = self.transport.all_gather(axes, x)?;
                blocks::assemble(group.iter().map(|&from| self.pass.starts[input][from]).zip(all))
            }
            Collective::ReduceScatter => {
                let pieces = group.iter().map(|&to| self.overlap(&x, (input, self.rank), (output, to)));
                let pieces = pieces.collect::<Result<_, _>>()?;
                self.transport.reduce_scatter(axes, pieces)?
            }
            Collective::AllToAll => {
                let pieces = group.iter().map(|&to| self.overlap(&x, (input, self.rank), (output, to)));
                let pieces = pieces.collect::<Result<_, _>>()?;
                let all = self.transport.all_to_all(axes, pieces)?;
                let from = |&from: &usize| {
                    let (a, b) = (self.pass.starts[input][from], self.pass.starts[output][self.rank]);
                    core::array::from_fn(|d| a[d].max(b[d]))
                };
                blocks::assemble(group.iter().map(from).zip(all))
            }
            Collective::AllReduce => self.transport.all_reduce(axes, x, Reduction::Sum)?,
            Collective::AllReduceMax => self.transport.all_reduce(axes, x, Reduction::Max)?,
            Collective::Send => {
                let chips = self.pass.mesh.group_size(axes)?;
                self.owner[output] = (self.owner[input] + chips - 1) % chips;
                self.transport.send_receive(axes, x)?
            }
        };
        self.put(output, made)
    }

    /// What the block that a rank holds of one tensor has of the block that a rank holds of another with the same
    /// dimensions.
    fn overlap(
        &self,
        x: &Tensor<4>,
        (from, holder): (TensorId, usize),
        (to, rank): (TensorId, usize),
    ) -> Result<Tensor<4>, ShardError> {
        let pass = self.pass;
        let (a, b) = (pass.starts[from][holder], pass.starts[to][rank]);
        let cut = blocks::overlap(x, a, (b, pass.shapes[to]));
        cut.ok_or_else(|| {
            let field = format!("rank {}: {}", self.rank, pass.program.tensor(to).name);
            let expected = format!("a block that overlaps with that of {}", pass.program.tensor(from).name);
            ShardError::field(field, expected, format!("none for rank {rank}"))
        })
    }
}
