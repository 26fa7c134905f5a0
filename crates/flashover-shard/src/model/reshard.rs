//! Moving the cache from where prefill left it to where decoding reads it.

use super::{ShardedModel, on_every_rank};
use crate::error::ShardError;
use crate::execute::{Pass, move_cache};
use crate::layout::{Layout, Stage, reshard};
use crate::mesh::Mesh;
use crate::precision::Storage;
use crate::program::{Move, Op, Part, Program, Role, Step, Tensor, TensorId};
use crate::spec::{Dim, Sizes, Spec};
use crate::transport::{Row, Simulated, rows};
use crate::workload::Workload;

/// Names of keys and values in every layout's program.
const CACHES: [&str; 2] = ["k.cache", "v.cache"];

/// Names of keys and values after each stage; three axes leave at most one by one, then comes a split.
const NAMES: [[&str; 2]; 4] =
    [["k.moved.1", "v.moved.1"], ["k.moved.2", "v.moved.2"], ["k.moved.3", "v.moved.3"], ["k.moved.4", "v.moved.4"]];

impl ShardedModel {
    /// Moves the cache of every block to where a layout reads it when decoding, through the transport: derived bytes
    /// beside counted ones, and no rows where it lies so already.
    ///
    /// # Errors
    ///
    /// If there is no cache yet, a dimension does not divide, or a block would hold its positions out of order (tokens
    /// that were dealt out one by one).
    pub fn reshard_cache(&mut self, decode: Layout) -> Result<Vec<Row>, ShardError> {
        let cache = self.states[0].cache(CACHES[0], 0);
        let cache = cache.ok_or_else(|| ShardError::field("cache", "one that prefill left", "none"))?;
        let (from, mut positions) = (cache.spec.clone(), cache.positions.clone());
        let by = self.mesh.group_size(from.axes(Dim::B))?;
        let batch = cache.tensor.dims()[0] * by;
        let workload = Workload::decode(batch, self.past + 1);
        let (program, sizes) = decode.program(&self.model, &self.mesh, &workload, self.options)?;
        let to = program.of_role(Role::Cache).next().map_or(from.clone(), |(_, tensor)| tensor.spec.clone());
        let stages = reshard(&from, &to)?;
        if stages.is_empty() {
            return Ok(Vec::new());
        }
        let sizes = sizes.with(Dim::M, self.past);
        if from.axes(Dim::M) != to.axes(Dim::M) {
            positions = regroup(&positions, &self.mesh, &to)?;
        }
        let (program, moved) = program_of(&from, &stages)?;
        self.move_cache((&program, &sizes), moved, &positions)
    }

    fn move_cache(
        &mut self,
        (program, sizes): (&Program, &Sizes),
        moved: [TensorId; 2],
        positions: &[Vec<usize>],
    ) -> Result<Vec<Row>, ShardError> {
        let pass = Pass::without_tokens(&self.model, (program, sizes), &self.mesh, self.past)?;
        let ends = Simulated::ends(&self.mesh);
        let run = |end, state: &mut _| {
            move_cache(&pass, end, state, [(CACHES[0], moved[0]), (CACHES[1], moved[1])], positions)
        };
        let ledgers = on_every_rank(ends, &mut self.states, run)?;
        rows(program, &self.mesh, sizes, self.model.layers, &ledgers)
    }
}

/// The stages as the steps of a block, and which tensor each cache becomes.
fn program_of(from: &Spec, stages: &[Stage]) -> Result<(Program, [TensorId; 2]), ShardError> {
    let tensor = |name, spec: &Spec, role| Tensor { name, spec: spec.clone(), role, storage: Storage::Cache };
    let mut tensors: Vec<_> = CACHES.map(|name| tensor(name, from, Role::Cache)).to_vec();
    let mut layer = Vec::new();
    let names =
        NAMES.get(..stages.len()).ok_or_else(|| ShardError::field("reshard", "at most 4 stages", stages.len()))?;
    for (i, (stage, names)) in stages.iter().zip(names).enumerate() {
        let role = if i + 1 == stages.len() { Role::Output } else { Role::Temporary };
        let (Stage::Collective(_, _, spec) | Stage::Split(spec)) = stage;
        let first = tensors.len();
        tensors.extend(names.map(|name| tensor(name, spec, role)));
        let moves = [0, 1].map(|one| Move { input: first - 2 + one, output: first + one });
        let ops = match stage {
            Stage::Collective(kind, axes, _) => {
                vec![Op::Collective { kind: *kind, axes: axes.clone(), moves: moves.to_vec() }]
            }
            Stage::Split(_) => moves.map(|one| Op::Split { input: one.input, output: one.output }).to_vec(),
        };
        layer.extend(ops.into_iter().map(|op| Step { part: Part::Attention, op }));
    }
    let last = tensors.len() - 2;
    Ok((Program { tensors, embed: Vec::new(), layer, head: Vec::new() }, [last, last + 1]))
}

/// Positions of the blocks along `M` after a move: what lies one after the other is cut anew.
fn regroup(positions: &[Vec<usize>], mesh: &Mesh, to: &Spec) -> Result<Vec<Vec<usize>>, ShardError> {
    let all = positions.concat();
    let blocks = mesh.group_size(to.axes(Dim::M))?;
    if !all.is_sorted() {
        return Err(ShardError::field("cache", "positions in order, to be cut anew", "tokens dealt out one by one"));
    }
    if !all.len().is_multiple_of(blocks) {
        return Err(ShardError::field("cache", format!("a multiple of {blocks} tokens"), all.len()));
    }
    Ok(all.chunks(all.len() / blocks).map(<[usize]>::to_vec).collect())
}
