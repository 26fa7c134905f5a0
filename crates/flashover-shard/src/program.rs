//! A layout as a program: a list of steps over named, sharded tensors, the same on every chip.
//!
//! A program is plain data with two readers. The cost model ([`count`](crate::count)) needs only its shapes; an executor
//! runs the same steps on real tensors. Nothing about a layout is said anywhere else.
//!
//! # How to execute one
//!
//! 1. Every rank starts with its [block](crate::spec::Spec::block) of each [weight](Role::Weight) and, from an earlier
//!    run, of each [cache](Role::Cache) tensor, and with all of the [input](Role::Input) (token numbers `BL`).
//! 2. It runs [`embed`](Program::embed) once, [`layer`](Program::layer) once a block of the model, with that block's
//!    weights and cache, and [`head`](Program::head) once. The tensor [`Program::RESIDUAL`] carries from one to the
//!    next.
//! 3. A step reads and writes local tensors; only [`Op::Collective`] reads another rank's. Each says what it does in
//!    terms of its tensors' specs: an all-gather over a group makes of the `before` spec the `after` spec, and the
//!    block that each rank's piece becomes follows from [`Mesh::index`] over the axes in the order of the spec.
//!
//! Every tensor is written by one step (the cache, by [`Op::Append`]; what a [`Op::Repeat`] carries, by its first value
//! and the loop) before it is read. [`Program::validate`] checks this and the specs of every step.
//!
//! Positions: token `l` of `L` new ones has position `M − L + l`. A dimension `L` or `M` that is sharded has its positions
//! in blocks; see [`Op::Append`] for a cache that grows. Padded heads and vocabulary have zero weights, so that they
//! change no number; a padded vocabulary entry's logit must not be picked.

mod validate;

use serde::{Deserialize, Serialize};

use crate::architecture::{Nonlinearity, Norm};
use crate::error::ShardError;
use crate::mesh::{Axis, Mesh};
use crate::precision::Storage;
use crate::spec::{Sizes, Spec};

/// Number of a tensor within its program.
pub type TensorId = usize;

/// Where a tensor's content comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Role {
    /// The token numbers.
    Input,
    /// A weight of every block (or of the embedding or the head), stored as its spec says.
    Weight,
    /// Keys or values of every block, kept between runs.
    Cache,
    /// Made by a step and forgotten after the last that reads it.
    Temporary,
    /// What the program is run for: the logits.
    Output,
}

/// A tensor of a program.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Tensor {
    /// Its name, unique within the program.
    pub name: &'static str,
    /// Its dimensions and how they lie on the mesh.
    pub spec: Spec,
    /// Where its content comes from.
    pub role: Role,
    /// What decides its element type.
    pub storage: Storage,
}

/// Which part of the model a step belongs to, for reports and for comparison with formulas that cover one part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Token embedding.
    Embedding,
    /// Norms with their statistics.
    Norm,
    /// Attention with its projections.
    Attention,
    /// The feed-forward layer; in a parallel block also what attention shares with it: the gather of the block's input
    /// and the scatter of its output.
    Mlp,
    /// Final norm and unembedding.
    Head,
}

/// A collective operation over groups of chips (A.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Collective {
    /// Removes the group's axes from the ends of the subscripts: every rank gets every piece.
    AllGather,
    /// Pays the sum owed over the group and appends the group's axes to a subscript: every rank keeps a piece.
    ReduceScatter,
    /// Pays the sum owed over the group.
    AllReduce,
    /// As an all-reduce, with the maximum.
    AllReduceMax,
    /// Moves the group's axes from the end of one subscript to the end of another; their order may change.
    AllToAll,
    /// Every rank gets what the rank before it in the group had, cyclically: rank `i` receives from `i − 1`.
    Send,
}

impl Collective {
    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Collective::AllGather => "all-gather",
            Collective::ReduceScatter => "reduce-scatter",
            Collective::AllReduce => "all-reduce",
            Collective::AllReduceMax => "all-reduce-max",
            Collective::AllToAll => "all-to-all",
            Collective::Send => "send",
        }
    }
}

/// A tensor that a collective moves, before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Move {
    /// The tensor that it reads.
    pub input: TensorId,
    /// The tensor that it writes.
    pub output: TensorId,
}

/// What a step does, on every rank, with local tensors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Op {
    /// Rows of the table for the tokens: `BL`, `VE -> BLE`. Of a table sharded over `V`, a rank knows only some rows; it
    /// gives zeros for the others, and a sum over the axes of `V` is owed.
    Embed {
        /// Token numbers, `BL`.
        tokens: TensorId,
        /// The table, `VE`.
        table: TensorId,
        /// `BLE`.
        output: TensorId,
    },
    /// The last `T` of `L` tokens. Where `L` is sharded, a rank gives zeros for tokens that it does not hold, and a sum
    /// over the axes of `L` is owed.
    Select {
        /// `BLE`.
        input: TensorId,
        /// `BTE`.
        output: TensorId,
    },
    /// Sums of each row over the rank's part of `E`: of the squares (`S` 1), or of the squares and the values (`S` 2, in
    /// this order). A sum over the axes of `E` is owed.
    Statistics {
        /// `BLE`.
        input: TensorId,
        /// `BLS`.
        output: TensorId,
    },
    /// The norm with its scale, from complete statistics.
    Normalize {
        /// Which norm.
        norm: Norm,
        /// `BLE`.
        input: TensorId,
        /// `BLS`.
        statistics: TensorId,
        /// The scale, `E`, sharded as the input's.
        scale: TensorId,
        /// `BLE`.
        output: TensorId,
    },
    /// A product over local blocks, summed over the dimensions that both operands have and the output lacks. If such a
    /// dimension is sharded, a sum over its axes is owed. Dimensions that both and the output have are batched.
    Einsum {
        /// First operand.
        lhs: TensorId,
        /// Second operand; in these layouts the weight.
        rhs: TensorId,
        /// The product.
        output: TensorId,
    },
    /// A rank's block of what it holds more of. Moves nothing.
    Split {
        /// The larger block.
        input: TensorId,
        /// The part: axes appended to subscripts.
        output: TensorId,
    },
    /// Communication over groups that differ only in `axes`; several tensors travel as one message.
    Collective {
        /// Which.
        kind: Collective,
        /// Axes of the groups.
        axes: Vec<Axis>,
        /// The tensors.
        moves: Vec<Move>,
    },
    /// Rotary position embedding of queries or keys, with the positions of the rank's tokens.
    Rotary {
        /// `BLHQ` or `BLKQ`.
        input: TensorId,
        /// The same.
        output: TensorId,
    },
    /// `f(up)`.
    Activate {
        /// `f`.
        function: Nonlinearity,
        /// `BLF`.
        input: TensorId,
        /// `BLF`.
        output: TensorId,
    },
    /// `f(gate) ∘ up`.
    Gate {
        /// `f`.
        function: Nonlinearity,
        /// `BLF`.
        gate: TensorId,
        /// `BLF`.
        up: TensorId,
        /// `BLF`.
        output: TensorId,
    },
    /// The sum of two tensors of one spec; both may owe the same sum.
    Add {
        /// First term.
        lhs: TensorId,
        /// Second term.
        rhs: TensorId,
        /// The sum.
        output: TensorId,
    },
    /// Adds the new keys or values to the cache. Where `L` and `M` are sharded alike, a rank appends its own tokens to
    /// its own part. Where only `M` is sharded (decoding), the rank whose index over the axes of `M` is the position
    /// modulo their number appends the token, and the others none: the parts stay even, and a rank knows the positions
    /// of what it holds.
    Append {
        /// `BLKQ`.
        new: TensorId,
        /// `BMKQ`, of role [`Role::Cache`].
        cache: TensorId,
    },
    /// Causal softmax attention of the rank's queries over the rank's keys, scores scaled by `1/√Q`. Local query head `h`
    /// reads the key head that the global numbers of both, from the blocks of their specs, ask for: `h / (H / K)`.
    Attention {
        /// `BLHQ`.
        q: TensorId,
        /// `BMKQ`.
        k: TensorId,
        /// `BMKQ`.
        v: TensorId,
        /// `BLHQ`. Over a part of the keys (`M` sharded and `L` not), a merge over the axes of `M` is owed.
        output: TensorId,
        /// Log-sum-exp `BLH`, if a merge follows. A row that sees no key has `-inf` and output 0.
        lse: Option<TensorId>,
    },
    /// Merges two results of attention over disjoint keys: `o = (o_a·e^(lse_a) + o_b·e^(lse_b)) / (e^(lse_a) + e^(lse_b))`.
    Merge {
        /// `(o, lse)` of some keys.
        a: (TensorId, TensorId),
        /// `(o, lse)` of others.
        b: (TensorId, TensorId),
        /// `(o, lse)` of both.
        output: (TensorId, TensorId),
    },
    /// First half of a merge over ranks: `weight = e^(lse − max)`, `output = o · weight`. Sums of both are owed. Where the
    /// maximum is `-inf` both are 0.
    Rescale {
        /// `BLHQ`, a merge owed.
        o: TensorId,
        /// `BLH`, a merge owed.
        lse: TensorId,
        /// `BLH`, the maximum over the ranks.
        max: TensorId,
        /// `BLHQ`.
        output: TensorId,
        /// `BLH`.
        weight: TensorId,
    },
    /// Second half: `o / weight`, and 0 where the weight is 0.
    Divide {
        /// `BLHQ`.
        o: TensorId,
        /// `BLH`.
        weight: TensorId,
        /// `BLHQ`.
        output: TensorId,
    },
    /// The body as many times as the group over `axes` has ranks, less one. After each round, `to` becomes `from` for
    /// every `(from, to)` of `carried`; what follows reads `to`.
    Repeat {
        /// Axes of the ring.
        axes: Vec<Axis>,
        /// Steps of a round.
        body: Vec<Step>,
        /// Tensors that the round replaces.
        carried: Vec<(TensorId, TensorId)>,
    },
}

impl Op {
    /// Its name in reports.
    pub const fn name(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::Select { .. } => "select",
            Op::Statistics { .. } => "statistics",
            Op::Normalize { .. } => "normalize",
            Op::Einsum { .. } => "einsum",
            Op::Split { .. } => "split",
            Op::Collective { kind, .. } => kind.name(),
            Op::Rotary { .. } => "rotary",
            Op::Activate { .. } => "activate",
            Op::Gate { .. } => "gate",
            Op::Add { .. } => "add",
            Op::Append { .. } => "append",
            Op::Attention { .. } => "attention",
            Op::Merge { .. } => "merge",
            Op::Rescale { .. } => "rescale",
            Op::Divide { .. } => "divide",
            Op::Repeat { .. } => "repeat",
        }
    }

    /// Tensors that it reads, in a fixed order. Of a [`Op::Repeat`], those that its body reads.
    pub fn inputs(&self) -> Vec<TensorId> {
        match self {
            Op::Embed { tokens, table, .. } => vec![*tokens, *table],
            Op::Select { input, .. }
            | Op::Statistics { input, .. }
            | Op::Split { input, .. }
            | Op::Rotary { input, .. }
            | Op::Activate { input, .. } => vec![*input],
            Op::Normalize { input, statistics, scale, .. } => vec![*input, *statistics, *scale],
            Op::Einsum { lhs, rhs, .. } | Op::Add { lhs, rhs, .. } => vec![*lhs, *rhs],
            Op::Collective { moves, .. } => moves.iter().map(|m| m.input).collect(),
            Op::Gate { gate, up, .. } => vec![*gate, *up],
            Op::Append { new, .. } => vec![*new],
            Op::Attention { q, k, v, .. } => vec![*q, *k, *v],
            Op::Merge { a, b, .. } => vec![a.0, a.1, b.0, b.1],
            Op::Rescale { o, lse, max, .. } => vec![*o, *lse, *max],
            Op::Divide { o, weight, .. } => vec![*o, *weight],
            Op::Repeat { body, .. } => body.iter().flat_map(|step| step.op.inputs()).collect(),
        }
    }

    /// Tensors that it writes, in a fixed order. Of a [`Op::Repeat`], those that its body writes.
    pub fn outputs(&self) -> Vec<TensorId> {
        match self {
            Op::Embed { output, .. }
            | Op::Select { output, .. }
            | Op::Statistics { output, .. }
            | Op::Normalize { output, .. }
            | Op::Einsum { output, .. }
            | Op::Split { output, .. }
            | Op::Rotary { output, .. }
            | Op::Activate { output, .. }
            | Op::Gate { output, .. }
            | Op::Add { output, .. }
            | Op::Divide { output, .. } => vec![*output],
            Op::Collective { moves, .. } => moves.iter().map(|m| m.output).collect(),
            Op::Append { cache, .. } => vec![*cache],
            Op::Attention { output, lse, .. } => [Some(*output), *lse].into_iter().flatten().collect(),
            Op::Merge { output, .. } => vec![output.0, output.1],
            Op::Rescale { output, weight, .. } => vec![*output, *weight],
            Op::Repeat { body, .. } => body.iter().flat_map(|step| step.op.outputs()).collect(),
        }
    }
}

/// A step and the part of the model that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// The part.
    pub part: Part,
    /// What it does.
    pub op: Op,
}

/// The steps of a transformer under one layout, on every mesh with the same axes on which its specs fit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Program {
    /// Every tensor; steps name them by their place here.
    pub tensors: Vec<Tensor>,
    /// From the tokens to the residual, once.
    pub embed: Vec<Step>,
    /// One block of the model, from the residual to the residual.
    pub layer: Vec<Step>,
    /// From the residual to the logits, once.
    pub head: Vec<Step>,
}

impl Program {
    /// The tensor that the embedding writes, every block reads first and writes last, and the head reads.
    pub const RESIDUAL: TensorId = 0;

    /// A tensor by number.
    pub fn tensor(&self, id: TensorId) -> &Tensor {
        &self.tensors[id]
    }

    /// A tensor's number by name.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        self.tensors.iter().position(|tensor| tensor.name == name)
    }

    /// Tensors of a role, with their numbers.
    pub fn of_role(&self, role: Role) -> impl Iterator<Item = (TensorId, &Tensor)> {
        self.tensors.iter().enumerate().filter(move |(_, tensor)| tensor.role == role)
    }

    /// Whether a weight belongs to every block, and not to the embedding or the head.
    pub fn is_per_layer(&self, id: TensorId) -> bool {
        self.layer.iter().any(|step| step.op.inputs().contains(&id) || step.op.outputs().contains(&id))
    }

    /// Steps in order, those of a repeat in its place and once: what numbers them.
    pub fn flat(steps: &[Step]) -> Vec<&Step> {
        fn flat(step: &Step) -> Vec<&Step> {
            match &step.op {
                Op::Repeat { body, .. } => Program::flat(body),
                _ => vec![step],
            }
        }
        steps.iter().flat_map(flat).collect()
    }

    /// Checks that every tensor fits the mesh and the sizes.
    ///
    /// # Errors
    ///
    /// If an axis is missing or does not divide its dimension; the message names the tensor.
    pub fn check(&self, mesh: &Mesh, sizes: &Sizes) -> Result<(), ShardError> {
        self.tensors.iter().try_for_each(|tensor| tensor.spec.check(tensor.name, mesh, sizes))
    }

    /// Checks that the steps fit together: every tensor is written before it is read, and the specs of what a step writes
    /// are what the operation makes of the specs that it reads.
    ///
    /// # Errors
    ///
    /// At the first step that does not fit.
    pub fn validate(&self) -> Result<(), ShardError> {
        validate::validate(self)
    }
}
