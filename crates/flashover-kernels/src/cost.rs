//! What each launch costs, computed on the host from the problem alone: the same launches, in the same order, with the
//! same bindings, shared memory and scratch as [`launch_log`](crate::launch_log) records.

use crate::cmma::{CmmaConfig, CmmaTile};
use crate::family::launcher::SUM_UNITS;
use crate::family::tile_shape::TileShape;
use crate::family::turn_buffer::{LIST_STEPS, list_bytes};
use crate::family::two_passes;
use crate::hopper::{self, HopperBackwardConfig, HopperConfig};
use crate::mask::Band;
use crate::mma::{self, MmaConfig, MmaTile, OnePass};
use crate::operands::Wanted;
use crate::portable::{self, TileConfig};
use crate::problem::Problem;

/// A kernel's tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Tile {
    /// Of a portable kernel.
    Portable(TileConfig),
    /// Of a matrix kernel.
    Mma(MmaTile),
    /// Of a kernel for cooperative matrices.
    Cmma(CmmaTile),
    /// Of the matrix kernels' backward in one pass.
    MmaOnePass(OnePass),
    /// Of the Hopper forward.
    Hopper(HopperConfig),
    /// Of the Hopper backward.
    HopperBackward(HopperBackwardConfig),
}

impl core::fmt::Display for Tile {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Tile::Portable(tile) => tile.fmt(f),
            Tile::Mma(tile) => tile.fmt(f),
            Tile::Cmma(tile) => tile.fmt(f),
            Tile::MmaOnePass(tile) => tile.fmt(f),
            Tile::Hopper(tile) => tile.fmt(f),
            Tile::HopperBackward(tile) => tile.fmt(f),
        }
    }
}

/// Cost of one launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    /// The kernel's name.
    pub kernel: &'static str,
    /// Its tiles; `None` for a kernel without matrix products.
    pub tile: Option<Tile>,
    /// Floating point operations of its matrix products, 2 a multiply-add, over the pairs of query and key that are
    /// visible by position. Key lengths and dense masks are not known on the host and count as visible.
    pub flops: u64,
    /// Bytes that must move between memory and chip: every operand and result once.
    pub hbm_bytes: u64,
    /// Storage buffers that it binds.
    pub bindings: usize,
    /// Shared memory of a cube, in bytes.
    pub shared_bytes: usize,
    /// Units of a cube.
    pub units: usize,
    /// Bytes of the scratch buffer, which the launches of one call share.
    pub scratch_bytes: usize,
}

/// Pairs of query and key that are visible by position, over all batch elements and query heads; under a block plan no more
/// than it shows.
pub fn visible_pairs(problem: &Problem) -> u64 {
    let Problem { batch, heads_q, seq_q, seq_kv, .. } = *problem;
    let keys = |i: usize| visible_keys(&problem.band, i as i32 + problem.alignment(), seq_kv as i32);
    let pairs: u64 = (0..seq_q).map(keys).sum();
    let pairs = pairs * (batch * heads_q) as u64;
    problem.plan.map_or(pairs, |plan| plan.points.min(pairs))
}

/// Keys that the query at `a` sees: those of its window, and the sinks before it.
fn visible_keys(band: &Band, a: i32, seq_kv: i32) -> u64 {
    let (ahead, left, right, sinks) = band.scalars();
    let end = (a + right.min(ahead) + 1).clamp(0, seq_kv);
    let start = (a - left).clamp(0, end);
    let sinks = sinks.min(a + ahead + 1).clamp(0, seq_kv);
    // Sinks that also lie in the window count once.
    let both = (sinks.min(end) - start).max(0);
    (end - start + sinks - both) as u64
}

/// Launches of [`portable::forward`].
pub fn portable_forward(problem: &Problem, tile: TileConfig, with_lse: bool) -> Vec<Cost> {
    if problem.is_empty() {
        return Vec::new();
    }
    let model = Model::new(problem, portable::scratch_bytes(problem, None));
    let mut costs = model.fill();
    let written = model.o + if with_lse { model.statistic } else { 0 };
    let bytes = model.q + model.k + model.v + model.bias + written + model.shared_words();
    let bindings = 5 + model.bias_bound + usize::from(with_lse);
    costs.push(model.portable(tile, "forward", model.products(1, 1), bytes, bindings));
    costs
}

/// Launches of [`portable::backward`]; `with_dlse` if the loss depends on the log-sum-exp.
pub fn portable_backward(problem: &Problem, tile: TileConfig, wanted: Wanted, with_dlse: bool) -> Vec<Cost> {
    let Wanted { q, k, v, .. } = wanted;
    let slopes = wanted.alibi_slopes && problem.alibi;
    let sinks = wanted.learned_sinks && problem.learned_sinks;
    let bias = wanted.bias && problem.bias.is_some();
    let parameters = problem.score.filter(|_| wanted.score_parameters);
    let scores = !problem.is_empty() && problem.seq_kv > 0;
    if problem.is_empty() || !(sinks || scores && (q || k || v || slopes || bias || parameters.is_some())) {
        return Vec::new();
    }
    let reductions = portable::Reductions::of(problem, wanted, tile);
    let model = Model::new(problem, portable::scratch_bytes(problem, Some(&reductions)));
    let mut costs = model.fill();
    let statistics = 2 * model.statistic;
    let dlse = if with_dlse { model.statistic } else { 0 };
    let read = model.q + model.k + model.v + model.o + model.bias + statistics + model.shared_words();
    let bytes = model.statistic + dlse + statistics;
    costs.push(model.small("row_statistics", bytes, 2 + usize::from(with_dlse), 0));
    if scores {
        costs.push(model.portable(tile, "delta", model.products(1, 1), read + model.statistic, 5 + model.bias_bound));
        let heads = (problem.heads_q * size_of::<f32>()) as u64;
        let partials = (reductions.slope_partials * size_of::<f32>()) as u64;
        if q || slopes {
            let written = if q { model.q } else { 0 } + if slopes { partials } else { 0 };
            let bindings = 5 + model.bias_bound + usize::from(q);
            let flops = model.products(1 + u64::from(q), 1);
            costs.push(model.portable(tile, "backward_queries", flops, read + written, bindings));
        }
        if slopes {
            costs.push(model.small("backward_slopes", partials + heads, 2, SUM_UNITS * size_of::<f32>()));
        }
        for (k, v) in if portable::keys_fused(problem) { vec![(k, v)] } else { vec![(k, false), (false, v)] } {
            if k || v {
                let written = if k { model.k } else { 0 } + if v { model.v } else { 0 };
                let unread = if k { 0 } else { model.v };
                let bindings = 4 + 2 * usize::from(k) + usize::from(v) + model.bias_bound;
                let flops = model.products(1 + u64::from(k), u64::from(k) + u64::from(v));
                costs.push(model.portable(tile, "backward_keys", flops, read + written - unread, bindings));
            }
        }
        if bias {
            let partials = (reductions.partials(problem).bias * size_of::<f32>()) as u64;
            if reductions.bias_rows {
                let bindings = 2 + usize::from(with_dlse);
                let shared = SUM_UNITS * size_of::<f32>();
                costs.push(model.small("backward_bias_rows", statistics + dlse + model.bias, bindings, shared));
            } else if reductions.bias_parts == 1 {
                costs.push(model.portable(tile, "backward_bias", model.products(1, 1), read + model.bias, 7));
            } else {
                costs.push(model.portable(tile, "backward_bias", model.products(1, 1), read + partials, 6));
                costs.push(model.small("bias_sum", partials + model.bias, 2, 0));
            }
        }
    }
    if let Some(score) = parameters.filter(|_| scores) {
        let partials = (reductions.parameter_words * size_of::<f32>()) as u64;
        let gradient = (score.parameters * size_of::<f32>()) as u64;
        let bindings = 5 + model.bias_bound;
        costs.push(model.portable(tile, "backward_parameters", model.products(1, 1), read + partials, bindings));
        costs.push(model.small("parameter_sum", partials + gradient, 2, SUM_UNITS * size_of::<f32>()));
    }
    if sinks {
        let bytes = statistics + 2 * (problem.heads_q * size_of::<f32>()) as u64;
        costs.push(model.small("backward_sinks", bytes, 2, SUM_UNITS * size_of::<f32>()));
    }
    costs
}

/// Launches of [`mma::forward`]; `with_rest` if a backward in one pass follows.
pub fn mma_forward(problem: &Problem, config: MmaConfig, with_lse: bool, with_rest: bool) -> Vec<Cost> {
    let tile = config.forward;
    let (shared, units) = (tile.forward_shared_bytes(problem), tile.units());
    matrix_forward(problem, "forward_mma", Tile::Mma(tile), shared, units, with_lse, with_rest)
}

/// Launches of [`cmma::forward`](crate::cmma::forward).
pub fn cmma_forward(problem: &Problem, config: CmmaConfig, with_lse: bool) -> Vec<Cost> {
    let tile = config.forward;
    let (shared, units) = (tile.forward_shared_bytes(problem), tile.units());
    matrix_forward(problem, "forward_cmma", Tile::Cmma(tile), shared, units, with_lse, false)
}

/// Launches of [`hopper::forward`], likewise; copies of operands that its copy engine cannot read are not counted.
pub fn hopper_forward(problem: &Problem, config: HopperConfig, with_lse: bool, with_rest: bool) -> Vec<Cost> {
    let (shared, units) = (config.shared_bytes(), config.units());
    matrix_forward(problem, "forward_hopper", Tile::Hopper(config), shared, units, with_lse, with_rest)
}

/// Launches of [`hopper::backward`], which takes the gradients of q, k and v; `with_dlse` if the loss depends on the log-sum-exp.
pub fn hopper_backward(problem: &Problem, config: HopperBackwardConfig, with_dlse: bool) -> Vec<Cost> {
    if problem.is_empty() || problem.seq_kv == 0 {
        return Vec::new();
    }
    let model = Model::new(problem, portable::scratch_bytes(problem, None));
    let mut costs = model.fill();
    let tile = Some(Tile::HopperBackward(config));
    let dlse = if with_dlse { model.statistic } else { 0 };
    let read = 3 * model.o + model.statistic + dlse;
    let (bindings, units) = (6 + usize::from(with_dlse), hopper::ROW_UNITS);
    costs.push(model.around(tile, "statistics_hopper", read + 2 * model.statistic, bindings, units));
    costs.extend(model.list_steps(config.shape(), !config.unordered));
    let (shared, units) = (config.shared_bytes(), config.units());
    let kernel = model.one_pass(tile, "backward_hopper", 11, shared, units);
    // It ends dq itself, whose sums it finds in the second-level cache.
    costs.push(Cost { hbm_bytes: kernel.hbm_bytes + model.q, ..kernel });
    costs
}

/// Launches of [`mma::backward_one_pass`], likewise.
pub fn mma_one_pass(problem: &Problem, of: OnePass, with_dlse: bool) -> Vec<Cost> {
    if problem.is_empty() || problem.seq_kv == 0 {
        return Vec::new();
    }
    let model = Model::new(problem, two_passes::scratch_bytes(problem));
    let mut costs = model.fill();
    let tile = Some(Tile::MmaOnePass(of));
    let dlse = if with_dlse { model.statistic } else { 0 };
    costs.push(model.small("row_statistics", 3 * model.statistic + dlse, 2 + usize::from(with_dlse), 0));
    let moved = 3 * model.o + 3 * model.statistic;
    costs.push(model.around(tile, "delta_mma", moved, 5, mma::ROW_UNITS));
    costs.extend(model.list_steps(of.tile.shape(), true));
    costs.push(model.one_pass(tile, "backward_mma", 9, of.shared_bytes(), of.tile.units()));
    costs.push(model.around(tile, "finish_mma", 3 * model.q, 3, mma::ROW_UNITS));
    costs
}

fn matrix_forward(
    problem: &Problem,
    kernel: &'static str,
    tile: Tile,
    shared_bytes: usize,
    units: usize,
    with_lse: bool,
    with_rest: bool,
) -> Vec<Cost> {
    if problem.is_empty() {
        return Vec::new();
    }
    let model = Model::new(problem, portable::scratch_bytes(problem, None));
    let mut costs = model.fill();
    let written = model.o * (1 + u64::from(with_rest)) + if with_lse { model.statistic } else { 0 };
    let hbm_bytes = model.q + model.k + model.v + model.bias + written + model.shared_words();
    let bindings = 5 + model.bias_bound + usize::from(with_lse) + usize::from(with_rest);
    let (flops, scratch_bytes, tile) = (model.products(1, 1), model.scratch_bytes, Some(tile));
    costs.push(Cost { kernel, tile, flops, hbm_bytes, bindings, shared_bytes, units, scratch_bytes });
    costs
}

/// Launches of [`mma::backward`], which takes no gradients but those of q, k and v; `with_dlse` if the loss depends on the
/// log-sum-exp.
pub fn mma_backward(problem: &Problem, config: MmaConfig, wanted: Wanted, with_dlse: bool) -> Vec<Cost> {
    let MmaConfig { queries, keys, .. } = config;
    let owner = |kernel, tile: MmaTile, shared| Owner { kernel, tile: Tile::Mma(tile), shared, units: tile.units() };
    let owners = [
        owner("backward_queries_mma", queries, queries.queries_shared_bytes(problem)),
        owner("backward_keys_mma", keys, keys.keys_shared_bytes(problem)),
    ];
    in_two_passes(problem, owners, wanted, with_dlse)
}

/// Launches of [`cmma::backward`](crate::cmma::backward), likewise.
pub fn cmma_backward(problem: &Problem, config: CmmaConfig, wanted: Wanted, with_dlse: bool) -> Vec<Cost> {
    let CmmaConfig { queries, keys, .. } = config;
    let owner = |kernel, tile: CmmaTile, shared| Owner { kernel, tile: Tile::Cmma(tile), shared, units: tile.units() };
    let owners = [
        owner("backward_queries_cmma", queries, queries.queries_shared_bytes(problem)),
        owner("backward_keys_cmma", keys, keys.keys_shared_bytes(problem)),
    ];
    in_two_passes(problem, owners, wanted, with_dlse)
}

/// One of the two kernels of a backward in two passes: what it owns gives it its name.
struct Owner {
    kernel: &'static str,
    tile: Tile,
    shared: usize,
    units: usize,
}

/// A backward of q, k and v in two passes, by the owners of queries and of keys.
fn in_two_passes(problem: &Problem, [queries, keys]: [Owner; 2], wanted: Wanted, with_dlse: bool) -> Vec<Cost> {
    let Wanted { q, k, v, .. } = wanted;
    if problem.is_empty() || problem.seq_kv == 0 || !(q || k || v) {
        return Vec::new();
    }
    let model = Model::new(problem, two_passes::scratch_bytes(problem));
    let mut costs = model.fill();
    let statistics = 2 * model.statistic;
    let dlse = if with_dlse { model.statistic } else { 0 };
    let read = model.q + model.k + model.v + model.o + model.bias + statistics + model.shared_words();
    let bytes = model.statistic + dlse + statistics;
    costs.push(model.small("row_statistics", bytes, 2 + usize::from(with_dlse), 0));
    if q || k {
        let written = if q { model.q } else { 0 } + model.statistic;
        let flops = model.products(1 + 2 * u64::from(q), 1 + u64::from(q));
        costs.push(model.owner(&queries, flops, read + written, 5 + model.bias_bound + usize::from(q)));
    }
    for (k, v) in if two_passes::keys_fused(problem) { vec![(k, v)] } else { vec![(k, false), (false, v)] } {
        if k || v {
            let written = if k { model.k } else { 0 } + if v { model.v } else { 0 };
            let unread = if k { 0 } else { model.v };
            let bindings = 4 + 2 * usize::from(k) + usize::from(v) + model.bias_bound;
            let flops = model.products(1 + u64::from(k), u64::from(k) + u64::from(v));
            costs.push(model.owner(&keys, flops, read + written - unread, bindings));
        }
    }
    costs
}

/// Sizes of a problem's tensors in bytes, and what its launches share.
struct Model<'a> {
    problem: &'a Problem,
    pairs: u64,
    q: u64,
    k: u64,
    v: u64,
    o: u64,
    /// A statistic of every row.
    statistic: u64,
    bias: u64,
    bias_bound: usize,
    scratch_bytes: usize,
}

impl<'a> Model<'a> {
    fn new(problem: &'a Problem, scratch_bytes: usize) -> Self {
        let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim, .. } = *problem;
        let bytes = |elements: usize| (elements * problem.element.bytes()) as u64;
        let bias = problem.bias.filter(|_| seq_kv > 0);
        Model {
            problem,
            pairs: visible_pairs(problem),
            q: bytes(batch * heads_q * seq_q * head_dim),
            k: bytes(batch * heads_kv * seq_kv * head_dim),
            v: bytes(batch * heads_kv * seq_kv * value_dim),
            o: bytes(batch * heads_q * seq_q * value_dim),
            statistic: (batch * heads_q * seq_q * size_of::<f32>()) as u64,
            bias: bytes(bias.map_or(0, |shape| shape.iter().product())),
            bias_bound: usize::from(bias.is_some()),
            scratch_bytes,
        }
    }

    /// Operations of `d` products over the head dimension and `dv` over the value dimension.
    fn products(&self, d: u64, dv: u64) -> u64 {
        2 * self.pairs * (d * self.problem.head_dim as u64 + dv * self.problem.value_dim as u64)
    }

    /// Words of per-head numbers, key lengths and packed mask, in bytes.
    fn shared_words(&self) -> u64 {
        portable::scratch_bytes(self.problem, None) as u64
    }

    /// Launches that fill the scratch buffer from operands.
    fn fill(&self) -> Vec<Cost> {
        let Problem { batch, heads_q, alibi, learned_sinks, key_lengths, .. } = *self.problem;
        let word = size_of::<u32>();
        let mut costs = Vec::new();
        for (on, words) in [(alibi, heads_q), (learned_sinks, heads_q), (key_lengths, batch)] {
            if on {
                costs.push(self.small("copy", (2 * words * word) as u64, 2, 0));
            }
        }
        if let Some(score) = self.problem.score.filter(|_| self.problem.seq_kv > 0) {
            costs.push(self.small("copy", (2 * score.parameters * word) as u64, 2, 0));
        }
        if let Some(plan) = self.problem.plan.filter(|_| self.problem.seq_kv > 0) {
            costs.push(self.small("copy", (2 * plan.words * word) as u64, 2, 0));
        }
        if let Some(shape) = self.problem.mask.filter(|_| self.problem.seq_kv > 0) {
            // Booleans are one byte or four, as the backend stores them; one is counted.
            let elements: usize = shape.iter().product();
            let words: usize = shape[..3].iter().product::<usize>() * shape[3].div_ceil(32);
            costs.push(self.small("pack_mask", (elements + words * word) as u64, 2, 0));
        }
        costs
    }

    fn portable(&self, tile: TileConfig, kernel: &'static str, flops: u64, hbm_bytes: u64, bindings: usize) -> Cost {
        let (shared_bytes, units) = (tile.shared_bytes(), tile.units());
        let tile = Some(Tile::Portable(tile));
        Cost { kernel, tile, flops, hbm_bytes, bindings, shared_bytes, units, scratch_bytes: self.scratch_bytes }
    }

    fn owner(&self, owner: &Owner, flops: u64, hbm_bytes: u64, bindings: usize) -> Cost {
        let (&Owner { kernel, tile, shared: shared_bytes, units }, scratch_bytes) = (owner, self.scratch_bytes);
        Cost { kernel, tile: Some(tile), flops, hbm_bytes, bindings, shared_bytes, units, scratch_bytes }
    }

    /// A kernel of a backward in one pass that is not its main one.
    fn around(&self, tile: Option<Tile>, kernel: &'static str, hbm_bytes: u64, bindings: usize, units: usize) -> Cost {
        let (flops, shared_bytes, scratch_bytes) = (0, 0, self.scratch_bytes);
        Cost { kernel, tile, flops, hbm_bytes, bindings, shared_bytes, units, scratch_bytes }
    }

    /// The kernel of a backward in one pass, which adds up dq in f32.
    fn one_pass(
        &self,
        tile: Option<Tile>,
        kernel: &'static str,
        bindings: usize,
        shared_bytes: usize,
        units: usize,
    ) -> Cost {
        let (sums, statistics) = (2 * self.q, 2 * self.statistic);
        let moved = self.q + 2 * (self.k + self.v) + self.o + statistics + sums + self.shared_words() + self.bias;
        let (flops, bindings) = (self.products(3, 2), bindings + self.bias_bound);
        let scratch_bytes = self.scratch_bytes;
        Cost { kernel, tile, flops, hbm_bytes: moved, bindings, shared_bytes, units, scratch_bytes }
    }

    /// The kernel that lists the steps of every key tile, under a plan: read again by the one that takes them.
    fn list_steps(&self, shape: TileShape, ordered: bool) -> Option<Cost> {
        let plan = self.problem.plan?;
        let moved = (plan.words * size_of::<u32>()) as u64 + 2 * list_bytes(self.problem, shape, ordered);
        Some(self.small(LIST_STEPS, moved, 2, 0))
    }

    /// A kernel without matrix products.
    fn small(&self, kernel: &'static str, hbm_bytes: u64, bindings: usize, shared_bytes: usize) -> Cost {
        let (units, scratch_bytes) = (SUM_UNITS, self.scratch_bytes);
        Cost { kernel, tile: None, flops: 0, hbm_bytes, bindings, shared_bytes, units, scratch_bytes }
    }
}

#[cfg(test)]
mod tests;
