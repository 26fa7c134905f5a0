//! The grid of cases: mask kind × grouping of heads × lengths × head dimensions × score options, in every element type.
//!
//! [`all_pairs`] meets every pair of levels of every two factors in about a hundred problems, [`full`] takes every
//! combination of the first four factors. Both are lists in a fixed order; the seed of a case is its place.

use flashover_kernels::dropout::Dropout;
use flashover_kernels::mask::{Band, UNBOUNDED};
use flashover_kernels::problem::{Element, Problem};

use crate::data::{Case, Rng};

/// Lengths of queries and of keys.
pub const LENGTHS: [usize; 8] = [0, 1, 63, 64, 65, 113, 211, 1023];

/// Head dimensions.
pub const HEAD_DIMS: [usize; 10] = [32, 40, 59, 64, 96, 111, 128, 160, 192, 256];

/// `(Hq, Hkv)`: groups of 1, 2 and 4 query heads, the last of them one key head for all.
const HEADS: [(usize, usize); 3] = [(2, 2), (4, 2), (4, 1)];

/// What a query may see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MaskKind {
    None,
    Causal,
    Window,
    SlidingWindow,
    SlidingWindowSinks,
    Dense,
    KeyLengths,
    CausalKeyLengthsDense,
}

const MASK_KINDS: [MaskKind; 8] = [
    MaskKind::None,
    MaskKind::Causal,
    MaskKind::Window,
    MaskKind::SlidingWindow,
    MaskKind::SlidingWindowSinks,
    MaskKind::Dense,
    MaskKind::KeyLengths,
    MaskKind::CausalKeyLengthsDense,
];

/// Which dimensions of `[B, Hq, Sq, Skv]` a bias has; the others are 1. The first is no bias.
const BIASES: [Option<[bool; 4]>; 8] = [
    None,
    Some([true, true, true, true]),
    Some([false, true, true, true]),
    Some([false, false, true, true]),
    Some([true, false, false, true]),
    Some([false, true, false, true]),
    Some([true, true, true, false]),
    Some([false, false, false, false]),
];

/// Likewise of a dense mask.
const MASKS: [[bool; 4]; 5] = [
    [true, true, true, true],
    [true, false, false, true],
    [false, false, true, true],
    [false, true, false, true],
    [true, false, true, false],
];

/// A level of each factor, in the order of [`LEVELS`].
type Levels = [usize; FACTORS];

const FACTORS: usize = 15;

/// Levels of each factor: mask kind, heads, queries, keys, head dimension, value dimension (equal or not), batch, bias,
/// shape of a dense mask, and scale, softcap, ALiBi, learned sinks, dropout, gradient of `lse`, each off or on.
const LEVELS: Levels = [
    MASK_KINDS.len(),
    HEADS.len(),
    LENGTHS.len(),
    LENGTHS.len(),
    HEAD_DIMS.len(),
    2,
    2,
    BIASES.len(),
    MASKS.len(),
    2,
    2,
    2,
    2,
    2,
    2,
];

/// Problems in which every pair of levels of any two factors occurs, with lengths up to `max_len`: a covering array of
/// strength 2. [`all_pairs_cases`] also switches the gradient of `lse`, which a problem does not know.
pub fn all_pairs(element: Element, max_len: usize) -> Vec<Problem> {
    all_pairs_cases(element, max_len).into_iter().map(|case| case.problem).collect()
}

/// [`all_pairs`] with seeds, and with the gradient of `lse` on or off as one more factor.
pub fn all_pairs_cases(element: Element, max_len: usize) -> Vec<Case> {
    let mut levels = LEVELS;
    let lengths = LENGTHS.iter().filter(|&&length| length <= max_len).count();
    (levels[2], levels[3]) = (lengths, lengths);
    let rows = covering_array(&levels);
    rows.iter().enumerate().map(|(seed, row)| case(element, row, seed as u64)).collect()
}

/// Every mask kind × grouping of heads × pair of lengths × head dimension: 8 × 3 × 24 × 10 = 5760 problems. The
/// pairs of lengths are each length with itself, and with another one either way round. The other factors take
/// their levels in turn, so that each occurs, and plain problems too.
pub fn full(element: Element) -> Vec<Problem> {
    full_cases(element).into_iter().map(|case| case.problem).collect()
}

/// [`full`] with seeds, and with the gradient of `lse` on or off.
pub fn full_cases(element: Element) -> Vec<Case> {
    let mut cases = Vec::new();
    for mask in 0..MASK_KINDS.len() {
        for heads in 0..HEADS.len() {
            for (seq_q, seq_kv) in length_pairs() {
                for head_dim in 0..HEAD_DIMS.len() {
                    let seed = cases.len() as u64;
                    // Drawn, not counted: a counter would run in step with one of the loops.
                    let mut rng = Rng::new(seed);
                    let mut row = LEVELS.map(|levels| rng.below(levels));
                    row[..5].copy_from_slice(&[mask, heads, seq_q, seq_kv, head_dim]);
                    // Half of the problems have no bias, a quarter have each of the other score options.
                    row[7] *= rng.below(2);
                    for level in &mut row[9..14] {
                        *level *= rng.below(2);
                    }
                    cases.push(case(element, &row, seed));
                }
            }
        }
    }
    cases
}

/// Levels of `(Sq, Skv)`: equal, fewer queries, more queries, for each length.
fn length_pairs() -> Vec<(usize, usize)> {
    let n = LENGTHS.len();
    (0..n).flat_map(|i| [(i, i), (i, (i + 3) % n), ((i + 3) % n, i)]).collect()
}

/// The problem that a row of levels stands for.
fn case(element: Element, row: &Levels, seed: u64) -> Case {
    let [mask, heads, seq_q, seq_kv, head_dim, value_dim, batch, bias, mask_shape, switches @ ..] = *row;
    let [scale, softcap, alibi, learned_sinks, dropout, lse_gradient] = switches.map(|level| level == 1);
    let (heads_q, heads_kv) = HEADS[heads];
    let (seq_q, seq_kv, batch) = (LENGTHS[seq_q], LENGTHS[seq_kv], batch + 1);
    let value_dim = HEAD_DIMS[(head_dim + 3 * value_dim) % HEAD_DIMS.len()];
    let head_dim = HEAD_DIMS[head_dim];
    let kind = MASK_KINDS[mask];
    let plain = Problem::new(
        [batch, heads_q, seq_q, head_dim],
        [batch, heads_kv, seq_kv, head_dim],
        [batch, heads_kv, seq_kv, value_dim],
        element,
    )
    .expect("the shapes of the grid are sound");
    let shape = |has: [bool; 4]| std::array::from_fn(|axis| if has[axis] { plain.score_shape()[axis] } else { 1 });
    let problem = Problem {
        scale: if scale { 0.7 * plain.scale } else { plain.scale },
        softcap: softcap.then_some(2.0),
        alibi,
        bias: BIASES[bias].map(shape),
        mask: matches!(kind, MaskKind::Dense | MaskKind::CausalKeyLengthsDense).then(|| shape(MASKS[mask_shape])),
        band: band(kind, seq_kv as u32),
        key_lengths: matches!(kind, MaskKind::KeyLengths | MaskKind::CausalKeyLengthsDense),
        learned_sinks,
        dropout: dropout.then_some(Dropout { probability: 0.25, seed: 0x5eed_0000_0000 + seed }),
        ..plain
    };
    problem.validate().unwrap_or_else(|error| panic!("{}: {error}", case_name(&problem)));
    Case { problem, seed, lse_gradient }
}

/// Windows are a share of the keys, so that long problems have tiles that are empty, partial and full.
fn band(kind: MaskKind, seq_kv: u32) -> Band {
    let sliding = Band { causal: true, left: seq_kv / 3, right: 0, sinks: 0 };
    match kind {
        MaskKind::None | MaskKind::Dense | MaskKind::KeyLengths => Band::default(),
        MaskKind::Causal | MaskKind::CausalKeyLengthsDense => Band::causal(),
        MaskKind::Window => Band { causal: false, left: seq_kv / 3, right: seq_kv / 7, sinks: 0 },
        MaskKind::SlidingWindow => sliding,
        MaskKind::SlidingWindowSinks => Band { sinks: 4, ..sliding },
    }
}

/// Rows in which every pair of levels of any two factors occurs. Greedy: a row starts with the first pair that is still
/// missing, and every other factor takes the level that adds most missing pairs with those already chosen.
fn covering_array(levels: &Levels) -> Vec<Levels> {
    let mut missing = Pairs::new(levels);
    let mut rows = Vec::new();
    while let Some((x, y)) = missing.first() {
        let mut row = [None; FACTORS];
        (row[x.0], row[y.0]) = (Some(x.1), Some(y.1));
        // Factors of many levels first: they are the ones that make the array long.
        let mut order: Vec<usize> = (0..FACTORS).filter(|&factor| row[factor].is_none()).collect();
        order.sort_by_key(|&factor| std::cmp::Reverse(levels[factor]));
        for factor in order {
            let gain = |level: usize| {
                let chosen = row.iter().enumerate().filter_map(|(other, &level)| Some((other, level?)));
                chosen.filter(|&other| missing.contains((factor, level), other)).count()
            };
            // Ties go to a level that moves on with the rows, else the first ones would crowd.
            let turned = (0..levels[factor]).map(|level| (level + rows.len()) % levels[factor]);
            row[factor] = turned.rev().max_by_key(|&level| gain(level));
        }
        let row = row.map(|level| level.expect("every factor has a level"));
        missing.remove(&row);
        rows.push(row);
    }
    rows
}

/// A factor and a level.
type Place = (usize, usize);

/// Pairs of levels of two factors that no row has yet.
struct Pairs {
    /// First number of each factor's levels.
    offsets: Vec<usize>,
    /// `[level][level]`, over the levels of all factors.
    missing: Vec<Vec<bool>>,
}

impl Pairs {
    fn new(levels: &Levels) -> Self {
        let offsets: Vec<usize> = (0..FACTORS).map(|factor| levels[..factor].iter().sum()).collect();
        let factor_of: Vec<usize> = (0..FACTORS).flat_map(|factor| vec![factor; levels[factor]]).collect();
        let missing = factor_of.iter().map(|x| factor_of.iter().map(|y| x < y).collect()).collect();
        Pairs { offsets, missing }
    }

    fn number(&self, (factor, level): Place) -> usize {
        self.offsets[factor] + level
    }

    fn place(&self, number: usize) -> Place {
        let factor = self.offsets.partition_point(|&offset| offset <= number) - 1;
        (factor, number - self.offsets[factor])
    }

    fn first(&self) -> Option<(Place, Place)> {
        let rows = self.missing.iter().enumerate();
        let (x, y) = rows.filter_map(|(x, row)| Some((x, row.iter().position(|&missing| missing)?))).next()?;
        Some((self.place(x), self.place(y)))
    }

    fn contains(&self, x: Place, y: Place) -> bool {
        self.missing[self.number(x.min(y))][self.number(x.max(y))]
    }

    fn remove(&mut self, row: &Levels) {
        for (x, &level_x) in row.iter().enumerate() {
            for (y, &level_y) in row.iter().enumerate().skip(x + 1) {
                let (x, y) = (self.number((x, level_x)), self.number((y, level_y)));
                self.missing[x][y] = false;
            }
        }
    }
}

/// The problem in one word: `causal_b1_hq8_hkv8_s4096_d64_f32`, `full_…`, `window1024_…` (a causal sliding window, in
/// keys), or `window_l20_r9_…` and `causal_window_…` for other windows (`all` for an open side).
///
/// Unequal lengths are `_sq63_skv211`, a value dimension of its own is `_dv32`. Options follow the element type:
/// `_scale`, `_softcap`, `_alibi`, `_bias`, `_mask`, `_lengths`, `_sinks4`, `_learned`, `_dropout`. A bias or mask that
/// broadcasts names the dimensions that it has, of `bhqk`: `_bias_hqk`, or `_bias_1` if none.
pub fn case_name(problem: &Problem) -> String {
    let Problem { batch, heads_q, heads_kv, seq_q, seq_kv, head_dim, value_dim, band, .. } = *problem;
    let lengths = if seq_q == seq_kv { format!("s{seq_q}") } else { format!("sq{seq_q}_skv{seq_kv}") };
    let dims = if head_dim == value_dim { format!("d{head_dim}") } else { format!("d{head_dim}_dv{value_dim}") };
    let mut name =
        format!("{}_b{batch}_hq{heads_q}_hkv{heads_kv}_{lengths}_{dims}_{}", band_name(&band), problem.element.name());
    let default_scale = 1.0 / (head_dim as f64).sqrt();
    for (on, option) in [
        ((problem.scale - default_scale).abs() > 1e-9, "_scale".to_string()),
        (problem.softcap.is_some(), "_softcap".to_string()),
        (problem.alibi, "_alibi".to_string()),
        (problem.bias.is_some(), format!("_bias{}", dimensions(problem, problem.bias))),
        (problem.mask.is_some(), format!("_mask{}", dimensions(problem, problem.mask))),
        (problem.key_lengths, "_lengths".to_string()),
        (band.sinks > 0, format!("_sinks{}", band.sinks)),
        (problem.learned_sinks, "_learned".to_string()),
        (problem.dropout.is_some(), "_dropout".to_string()),
        (problem.score.is_some(), format!("_{}", problem.score.map_or("", |score| score.code.name()).to_lowercase())),
    ] {
        if on {
            name += &option;
        }
    }
    name
}

fn band_name(band: &Band) -> String {
    let side = |reach: u32| if reach == UNBOUNDED { "all".to_string() } else { reach.to_string() };
    let Band { causal, left, right, .. } = *band;
    match (causal, left != UNBOUNDED || right != UNBOUNDED) {
        (false, false) => "full".to_string(),
        (true, false) => "causal".to_string(),
        (true, true) if right == 0 && left != UNBOUNDED => format!("window{}", left + 1),
        (true, true) => format!("causal_window_l{}_r{}", side(left), side(right)),
        (false, true) => format!("window_l{}_r{}", side(left), side(right)),
    }
}

/// The dimensions that a broadcast tensor has, empty if it has all.
fn dimensions(problem: &Problem, shape: Option<[usize; 4]>) -> String {
    let Some(shape) = shape.filter(|&shape| shape != problem.score_shape()) else { return String::new() };
    let letters: String = "bhqk".chars().zip(shape).filter(|&(_, size)| size != 1).map(|(letter, _)| letter).collect();
    format!("_{}", if letters.is_empty() { "1" } else { &letters })
}

#[cfg(test)]
mod tests;
