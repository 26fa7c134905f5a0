//! Random masks for block plans, and the dense problem that says the same: what a plan shows, point by point, in a boolean
//! mask. The points come from [`BoundMask::allows`](flashover_kernels::mask::BoundMask::allows), which the kernels crate holds
//! against definitions, and not from the plan.

use flashover_kernels::block_plan::{BlockPlan, TileSize};
use flashover_kernels::mask::{BigBird, BlockTable, Documents, Extent, Mask};
use flashover_kernels::problem::Problem;

use crate::data::{Case, Inputs, Rng};

/// A case under a mask that a plan stands for.
#[derive(Debug, Clone)]
pub struct SparseCase {
    /// The problem, without the mask.
    pub case: Case,
    /// What the plan is made of.
    pub mask: Mask,
    /// Tiles of the plan.
    pub tile: TileSize,
}

impl SparseCase {
    /// The exact plan.
    ///
    /// # Panics
    /// When the mask does not fit the problem.
    pub fn plan(&self) -> BlockPlan {
        let plan = BlockPlan::new(&self.mask, Extent::from(&self.case.problem), self.tile);
        plan.unwrap_or_else(|error| panic!("{error}: {self:?}")).refine()
    }

    /// Problem and inputs of the oracle: those of the case, and a dense mask that also hides what the plan's mask hides.
    pub fn dense(&self, inputs: &Inputs) -> (Problem, Inputs) {
        let problem = &self.case.problem;
        let shape = problem.score_shape();
        let bound = self.mask.bind(Extent::from(problem)).expect("the mask fits");
        let mut hides = Vec::with_capacity(shape.iter().product());
        for b in 0..shape[0] {
            for h in 0..shape[1] {
                for i in 0..shape[2] {
                    for j in 0..shape[3] {
                        let place = [b, h, i, j];
                        let masked = problem.mask.is_some_and(|shape| {
                            let index =
                                shape.iter().zip(place).fold(0, |x, (&n, at)| x * n + if n == 1 { 0 } else { at });
                            inputs.operands.mask.as_ref().expect("the problem has a mask")[index]
                        });
                        let [b, h, i, j] = place.map(|n| n as u32);
                        hides.push(masked || !bound.allows(b, h, i, j));
                    }
                }
            }
        }
        let plan = self.plan();
        let shape_of_plan = plan.shape(plan.points(), [problem.batch, problem.heads_q]);
        let mut inputs = inputs.clone();
        inputs.operands.mask = Some(hides);
        (Problem { mask: Some(shape), plan: Some(shape_of_plan), ..problem.clone() }, inputs)
    }
}

/// Empty, Full and Partial tiles of a plan, as fractions of all.
pub fn kinds_of_tiles(plan: &BlockPlan) -> [f64; 3] {
    let all = f64::from(plan.batch() * plan.heads()) * f64::from(plan.query_tiles()) * f64::from(plan.key_tiles());
    let (full, partial) = plan.block_counts();
    let (full, partial) = (full as f64 / all.max(1.0), partial as f64 / all.max(1.0));
    [1.0 - full - partial, full, partial]
}

fn scattered(b: u32, h: u32, i: u32, j: u32) -> bool {
    !(i / 29 + j / 23 + b + 2 * h).is_multiple_of(3) && (i * j) % 7 != 1
}

fn stripes(_: u32, _: u32, i: u32, j: u32) -> bool {
    (i / 40 + j / 40).is_multiple_of(2) || i.abs_diff(j) < 9
}

/// Names of the kinds of masks, in the order of [`kind`].
pub const KINDS: [&str; 20] = [
    "everything",
    "nothing",
    "causal",
    "sliding window",
    "window",
    "sinks",
    "prefix lm",
    "documents",
    "dilated",
    "strided",
    "longformer",
    "butterfly",
    "bigbird",
    "blocks",
    "dense",
    "function",
    "function of positions",
    "per head",
    "per batch",
    "not",
];

/// A random mask of a kind, its numbers of the size of the lengths, its blocks of the size of tiles.
///
/// # Panics
/// When there is no such kind.
pub fn kind(kind: usize, extent: Extent, tile: TileSize, rng: &mut Rng) -> Mask {
    let Extent { batch, heads, seq_q, seq_kv } = extent;
    let keys = |rng: &mut Rng, most: u32| rng.below(most.max(1) as usize) as u32;
    match KINDS[kind] {
        "everything" => Mask::Everything,
        "nothing" => Mask::Nothing,
        "causal" => Mask::causal(),
        "sliding window" => Mask::sliding_window(1 + keys(rng, seq_kv)) & Mask::causal(),
        "window" => Mask::window(keys(rng, seq_kv), keys(rng, seq_kv / 2)),
        "sinks" => Mask::sinks(keys(rng, seq_kv)),
        "prefix lm" => Mask::prefix_lm(keys(rng, seq_kv)),
        "documents" => {
            let longest = seq_q.max(seq_kv) as usize;
            let mut ids = Vec::with_capacity(longest);
            while ids.len() < longest {
                let id = rng.below(3) as u32;
                ids.extend(std::iter::repeat_n(id, 1 + rng.below(longest / 2 + 1)));
            }
            let ends = |n: u32| vec![ids[ids.len() - n as usize..].to_vec()];
            Mask::Documents(Documents { queries: ends(seq_q), keys: ends(seq_kv) })
        }
        "dilated" => Mask::dilated(1 + keys(rng, seq_kv / 3), keys(rng, 9), 1 + keys(rng, 4)),
        "strided" => Mask::strided(1 + keys(rng, tile.bk)),
        "longformer" => {
            let tokens = (0..rng.below(4)).map(|_| keys(rng, seq_kv)).collect::<std::collections::BTreeSet<u32>>();
            Mask::longformer(keys(rng, seq_kv / 2), tokens.into_iter().collect())
        }
        "butterfly" => Mask::butterfly(1 + keys(rng, 2 * tile.bk)),
        "bigbird" => Mask::bigbird(BigBird {
            block: 1 + keys(rng, 2 * tile.bq),
            global: keys(rng, 2),
            window: keys(rng, 2),
            random: keys(rng, 4),
            seed: rng.next_u64(),
        }),
        "blocks" => {
            let block = if rng.chance(0.5) { [tile.bq, tile.bk] } else { [1 + keys(rng, 50), 1 + keys(rng, 50)] };
            let (batch, heads) = (if rng.chance(0.5) { 1 } else { batch }, if rng.chance(0.5) { 1 } else { heads });
            let (mut starts, mut columns) = (vec![0], Vec::new());
            for _ in 0..batch * heads * seq_q.div_ceil(block[0]) {
                let density = rng.uniform();
                columns.extend((0..seq_kv.div_ceil(block[1])).filter(|_| rng.chance(density)));
                starts.push(columns.len() as u32);
            }
            Mask::from_blocks(BlockTable { block, batch, heads, starts, columns })
        }
        "dense" => {
            let shape = [if rng.chance(0.5) { 1 } else { batch }, heads, seq_q, seq_kv];
            let all = shape.iter().map(|&n| n as usize).product();
            let runs = rng.chance(0.5);
            let mut visible = Vec::with_capacity(all);
            while visible.len() < all {
                let seen = rng.chance(0.6);
                let run = if runs { 1 + rng.below(3 * seq_kv as usize) } else { 1 };
                visible.extend(std::iter::repeat_n(seen, run.min(all - visible.len())));
            }
            Mask::from_dense(shape, &visible).expect("as many values as points")
        }
        "function" => Mask::function("testing scattered", scattered).expect("the same function"),
        "function of positions" => Mask::function_of_positions("testing stripes", stripes).expect("the same function"),
        "per head" => Mask::per_head((0..heads).map(|_| simple(extent, tile, rng)).collect()),
        "per batch" => Mask::per_batch((0..batch).map(|_| simple(extent, tile, rng)).collect()),
        "not" => !simple(extent, tile, rng),
        other => unreachable!("{other}"),
    }
}

/// A mask of a kind that is not made of others.
fn simple(extent: Extent, tile: TileSize, rng: &mut Rng) -> Mask {
    kind(2 + rng.below(KINDS.len() - 5), extent, tile, rng)
}

/// A random combination of two to four masks of which a plan in such tiles has at least a fifth of each kind of tile.
///
/// # Panics
/// When none is found: the tiles are too few.
pub fn combination(extent: Extent, tile: TileSize, rng: &mut Rng) -> Mask {
    for _ in 0..3000 {
        let mut mask = kind(2 + rng.below(KINDS.len() - 2), extent, tile, rng);
        for _ in 0..1 + rng.below(3) {
            let other = kind(2 + rng.below(KINDS.len() - 2), extent, tile, rng);
            mask = match rng.below(4) {
                0 | 1 => mask & other,
                2 => mask | other,
                _ => mask & !other,
            };
        }
        let plan = BlockPlan::new(&mask, extent, tile).expect("a sound mask").refine();
        if kinds_of_tiles(&plan).iter().all(|&fraction| fraction >= 0.2) {
            return mask;
        }
    }
    panic!("no combination with a fifth of each kind of tile over {extent:?} in {tile:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn combinations_are_found_at_all_sizes() {
        let mut rng = Rng::new(3);
        for (batch, heads, seq_q, seq_kv, bq, bk) in
            [(1, 1, 64, 64, 8, 8), (2, 4, 200, 130, 25, 16), (2, 2, 256, 300, 32, 32), (1, 2, 96, 199, 11, 13)]
        {
            let (extent, tile) = (Extent { batch, heads, seq_q, seq_kv }, TileSize { bq, bk });
            for _ in 0..20 {
                combination(extent, tile, &mut rng);
            }
        }
    }

    #[test]
    fn every_kind_is_sound() {
        let extent = Extent { batch: 2, heads: 4, seq_q: 130, seq_kv: 100 };
        for (n, name) in KINDS.iter().enumerate() {
            for seed in 0..20 {
                let mask = kind(n, extent, TileSize { bq: 16, bk: 9 }, &mut Rng::new(seed));
                mask.bind(extent).unwrap_or_else(|error| panic!("{name}: {error}"));
            }
        }
    }
}
