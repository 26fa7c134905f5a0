//! A transformer on a mesh: random weights stored once in blocks, a cache, and passes under any layout that wants both as
//! they lie. Of Llama's kind (RMSNorm, rotary positions, grouped queries, SwiGLU, serial) or of PaLM's (multiquery, a
//! parallel block), as the [`Architecture`] says.
//!
//! ```
//! use burn::tensor::Device;
//! use flashover_shard::layout::{AttentionLayout, Layout, WeightLayout};
//! use flashover_shard::model::ShardedModel;
//! use flashover_shard::{mesh::Mesh, models, simulate};
//!
//! // §4.4: prefill gathers weights, decoding leaves them; both share weights and cache.
//! let [prefill, decode] = [WeightLayout::GatheredXYZ, WeightLayout::Stationary2D]
//!     .map(|weights| Layout { weights, attention: AttentionLayout::Batch });
//! let mesh = Mesh::torus(2, 2, 1)?;
//! let small = simulate::small(&models::by_name("palm-540b")?, &mesh)?;
//! let mut model = ShardedModel::new(small, mesh, &[prefill, decode], 7, 32, &Device::flex())?;
//! let prompt = vec![vec![1, 2, 3]; 4];
//! let first = model.prefill(prefill, &prompt, 1)?;
//! assert!(model.reshard_cache(decode)?.is_empty());
//! let second = model.decode(decode, &first.greedy())?;
//! assert_eq!(second.logits.dims()[..2], [4, 1]);
//! # Ok::<(), flashover_shard::ShardError>(())
//! ```

mod reshard;
mod unsharded;
mod weights;

use burn::tensor::{DType, Device, Tensor};

use crate::architecture::Architecture;
use crate::count::{Counter, Memory};
use crate::error::ShardError;
use crate::execute::{Outcome, Pass, State, run};
use crate::layout::{Layout, LayoutOptions, Plan};
use crate::mesh::Mesh;
use crate::precision::Precision;
use crate::program::{Program, Role};
use crate::spec::{Dim, Sizes};
use crate::transport::{Ledger, Row, Simulated, Transport, rows};
use crate::workload::{Phase, Workload};

pub use unsharded::Unsharded;
pub use weights::weight;

/// Logical chips that a mesh may have: each is a thread.
pub const MAX_RANKS: usize = 1024;

/// A model in blocks on the ranks of a mesh.
#[derive(Debug)]
pub struct ShardedModel {
    model: Architecture,
    mesh: Mesh,
    options: LayoutOptions,
    device: Device,
    /// A program that stores weights as they lie here, and its sizes.
    stored: (Program, Sizes),
    states: Vec<State>,
    past: usize,
    positions: usize,
}

/// What a pass gives.
#[derive(Debug)]
pub struct Output {
    /// Logits of the scored tokens, f32 `[B, T, V]`, put together from all ranks, without padding.
    pub logits: Tensor<3>,
    /// What each rank moved.
    pub ledgers: Vec<Ledger>,
    /// Bytes derived from the specs: weights and cache as they must lie on a chip after the pass, and the bound of what a
    /// block's tensors take.
    pub memory: Memory,
    /// The most bytes that temporary tensors took at once on a rank.
    pub working: u64,
    /// The program that was run.
    pub program: Program,
    /// Its sizes.
    pub sizes: Sizes,
    mesh: Mesh,
    layers: usize,
}

impl Output {
    /// The likeliest token after each sequence.
    pub fn greedy(&self) -> Vec<u32> {
        greedy(&self.logits)
    }

    /// Every collective step, derived bytes beside counted ones.
    ///
    /// # Errors
    ///
    /// If a ledger has an entry that is no collective step of the program.
    pub fn rows(&self) -> Result<Vec<Row>, ShardError> {
        rows(&self.program, &self.mesh, &self.sizes, self.layers, &self.ledgers)
    }
}

/// The likeliest token after the last of each sequence, from logits `[B, T, V]`.
pub fn greedy(logits: &Tensor<3>) -> Vec<u32> {
    let [batch, tokens, _] = logits.dims();
    let best = logits.clone().narrow(1, tokens - 1, 1).argmax(2).reshape([batch]);
    best.into_data().iter::<i64>().map(|token| token as u32).collect()
}

impl ShardedModel {
    /// A model with the random weights of a seed, in the blocks that all of `layouts` store; positions go up to
    /// `positions`.
    ///
    /// # Errors
    ///
    /// If there is no layout, the layouts store weights differently, a dimension does not divide, or the mesh has more
    /// than [`MAX_RANKS`] ranks.
    pub fn new(
        model: Architecture,
        mesh: Mesh,
        layouts: &[Layout],
        seed: u64,
        positions: usize,
        device: &Device,
    ) -> Result<Self, ShardError> {
        check_ranks(&mesh)?;
        let options = shared_options(&model, &mesh, layouts)?;
        let stored = |layout: Layout| {
            let batch = layout.batch_unit(&model, &mesh, Phase::Prefill, options)?;
            layout.program(&model, &mesh, &Workload::prefill(batch, mesh.chips()), options)
        };
        let first = *layouts.first().ok_or_else(|| ShardError::field("layouts", "at least one", "none"))?;
        let (program, sizes) = stored(first)?;
        for &layout in layouts {
            let (other, other_sizes) = stored(layout)?;
            same_weights((&program, &sizes), (&other, &other_sizes), &layout.to_string())?;
        }
        let mut states = Vec::with_capacity(mesh.chips());
        for rank in 0..mesh.chips() {
            let mut state = State::new(&model, positions, device)?;
            for (id, tensor) in program.of_role(Role::Weight) {
                let ranges = tensor.spec.block(&mesh, &sizes, rank)?;
                let start: Vec<_> = ranges.iter().map(|range| range.start).collect();
                let shape: Vec<_> = ranges.iter().map(|range| range.len()).collect();
                let dims: Vec<_> = tensor.spec.dims().iter().map(|d| d.dim).collect();
                for layer in 0..if program.is_per_layer(id) { model.layers } else { 1 } {
                    let key = (tensor.name, layer);
                    let block = weights::block((&model, seed, device), key, &dims, &sizes, &start, &shape);
                    state.set_weight(tensor.name, layer, block);
                }
            }
            states.push(state);
        }
        let stored = (program, sizes);
        Ok(ShardedModel { model, mesh, options, device: device.clone(), stored, states, past: 0, positions })
    }

    /// The choices that let the layouts share weights.
    pub fn options(&self) -> LayoutOptions {
        self.options
    }

    /// What each rank holds.
    pub fn states(&self) -> &[State] {
        &self.states
    }

    /// Processes `B` sequences of `L` tokens each, and gives the logits of the last `scored` of each. A run that fails after
    /// it has begun leaves a cache that no later one accepts.
    ///
    /// # Errors
    ///
    /// If the sequences differ in length, the layout does not fit them, stores weights or caches otherwise than they lie,
    /// or positions run out.
    pub fn prefill(&mut self, layout: Layout, tokens: &[Vec<u32>], scored: usize) -> Result<Output, ShardError> {
        let length = tokens.first().map_or(0, Vec::len);
        let prefill = Workload { scored, ..Workload::prefill(tokens.len(), length) };
        let workload = Workload { context: self.past + length, ..prefill };
        self.pass(layout, workload, tokens, Simulated::ends(&self.mesh))
    }

    /// Processes one token more of each sequence.
    ///
    /// # Errors
    ///
    /// As [`prefill`](Self::prefill).
    pub fn decode(&mut self, layout: Layout, tokens: &[u32]) -> Result<Output, ShardError> {
        let tokens: Vec<_> = tokens.iter().map(|&token| vec![token]).collect();
        let workload = Workload::decode(tokens.len(), self.past + 1);
        self.pass(layout, workload, &tokens, Simulated::ends(&self.mesh))
    }

    /// Runs one workload over the ends of a transport, one for each rank in order.
    ///
    /// # Errors
    ///
    /// As [`prefill`](Self::prefill), and if the ends are not those of the mesh.
    pub fn pass<T: Transport + Send>(
        &mut self,
        layout: Layout,
        workload: Workload,
        tokens: &[Vec<u32>],
        ends: Vec<T>,
    ) -> Result<Output, ShardError> {
        let (program, sizes) = layout.program(&self.model, &self.mesh, &workload, self.options)?;
        self.run((program, sizes), workload, tokens, ends)
    }

    /// Runs a program, whoever made it.
    ///
    /// # Errors
    ///
    /// As [`pass`](Self::pass), and if its steps do not fit together.
    pub fn run<T: Transport + Send>(
        &mut self,
        (program, sizes): (Program, Sizes),
        workload: Workload,
        tokens: &[Vec<u32>],
        ends: Vec<T>,
    ) -> Result<Output, ShardError> {
        if workload.context > self.positions {
            return Err(ShardError::field(
                "context",
                format!("at most {} positions", self.positions),
                workload.context,
            ));
        }
        if workload.context != self.past + workload.tokens {
            let expected = format!("the {} tokens of the cache and the new ones", self.past);
            return Err(ShardError::field("context", expected, workload.context));
        }
        if !ends.iter().map(Transport::rank).eq(0..self.mesh.chips()) {
            return Err(ShardError::field(
                "ends",
                format!("those of {} ranks in order", self.mesh.chips()),
                ends.len(),
            ));
        }
        same_weights((&self.stored.0, &self.stored.1), (&program, &sizes), "program")?;
        program.validate()?;
        let memory = Counter::new(&program, &self.mesh, self.model.layers).memory(&sizes, &Precision::f32())?;
        let pass = Pass::new(&self.model, (&program, &sizes), &self.mesh, tokens, self.past)?;
        let outcomes = on_every_rank(ends, &mut self.states, |end, state| run(&pass, end, state))?;
        self.past = workload.context;
        let logits = self.gather(&outcomes, &sizes);
        let working = outcomes.iter().map(|outcome| outcome.working).max().unwrap_or(0);
        let ledgers = outcomes.into_iter().map(|outcome| outcome.ledger).collect();
        let (mesh, layers) = (self.mesh.clone(), self.model.layers);
        Ok(Output { logits, ledgers, memory, working, program, sizes, mesh, layers })
    }

    /// The logits as a host reads them from the ranks; this is not traffic of the mesh.
    fn gather(&self, outcomes: &[Outcome], sizes: &Sizes) -> Tensor<3> {
        let [b, t, v] = [Dim::B, Dim::T, Dim::V].map(|dim| sizes.get(dim));
        let mut all = Tensor::<3>::full([b, t, v], f32::NAN, (&self.device, DType::F32));
        for Outcome { logits, start, .. } in outcomes {
            let [lb, lt, lv, _] = logits.dims();
            let ranges = [(0, lb), (1, lt), (2, lv)].map(|(d, length)| start[d]..start[d] + length);
            all = all.slice_assign(ranges, logits.clone().reshape([lb, lt, lv]));
        }
        all.narrow(2, 0, self.model.vocabulary)
    }
}

/// Runs every rank on a thread of its own: no rank has another's tensors but through its end of the transport.
fn on_every_rank<T: Transport + Send, R: Send>(
    ends: Vec<T>,
    states: &mut [State],
    run: impl Fn(T, &mut State) -> Result<R, ShardError> + Sync,
) -> Result<Vec<R>, ShardError> {
    let results: Vec<_> = std::thread::scope(|scope| {
        let (ranks, run) = (ends.into_iter().zip(states), &run);
        let threads: Vec<_> = ranks.map(|(end, state)| scope.spawn(move || run(end, state))).collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        threads.into_iter().map(join).collect()
    });
    // Ranks that only waited for one that failed say less than that one.
    let (made, mut failed): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    failed.sort_by_key(|result| matches!(result, Err(ShardError::Stopped { .. })));
    failed.into_iter().next().map_or(Ok(()), |first| first.map(drop))?;
    made.into_iter().collect()
}

/// Refuses a mesh of more than [`MAX_RANKS`] chips.
pub(crate) fn check_ranks(mesh: &Mesh) -> Result<(), ShardError> {
    match mesh.chips() {
        ..=MAX_RANKS => Ok(()),
        chips => Err(ShardError::field("mesh", format!("at most {MAX_RANKS} logical chips"), chips)),
    }
}

/// Options under which the padded heads of all layouts agree: those that each would take, or else the number of chips.
fn shared_options(model: &Architecture, mesh: &Mesh, layouts: &[Layout]) -> Result<LayoutOptions, ShardError> {
    model.validate()?;
    let options = LayoutOptions::default();
    let heads = |&layout: &Layout| Ok(Plan::new(layout, model, mesh, Phase::Prefill, options)?.heads);
    let heads: Vec<usize> = layouts.iter().map(heads).collect::<Result<_, ShardError>>()?;
    let agree = heads.windows(2).all(|pair| pair[0] == pair[1]);
    Ok(if agree { options } else { LayoutOptions { heads_multiple: mesh.chips(), ..options } })
}

/// Every weight of `other` must be stored as by `program`; `whose` names the former.
fn same_weights(
    (program, sizes): (&Program, &Sizes),
    (other, other_sizes): (&Program, &Sizes),
    whose: &str,
) -> Result<(), ShardError> {
    for (_, tensor) in other.of_role(Role::Weight) {
        let stored = program.find(tensor.name).map(|id| &program.tensor(id).spec);
        let size = |sizes: &Sizes| tensor.spec.dims().iter().map(|d| sizes.get(d.dim)).collect::<Vec<_>>();
        if stored != Some(&tensor.spec) || size(sizes) != size(other_sizes) {
            let expected = stored.map_or("none".into(), |spec| format!("{spec} of {:?}, as stored", size(sizes)));
            let found = format!("{} of {:?}", tensor.spec, size(other_sizes));
            return Err(ShardError::field(format!("{whose}: {}", tensor.name), expected, found));
        }
    }
    Ok(())
}
