//! Random problems for proptest, and the proof that a run of them was worth something.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use flashover_kernels::dropout::Dropout;
use flashover_kernels::mask::{Band, UNBOUNDED};
use flashover_kernels::problem::{Element, Problem};
use proptest::option;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::data::{Case, Rng};
use crate::layout::Layout;

/// Longest sequence of a random problem.
pub const MAX_LENGTH: usize = 200;

/// Both lengths of every other problem are at least this: three tiles of 64 a side.
pub const LONG: usize = 192;

/// Most queries where they are few: more than half of a tile of 128.
pub const FEW: usize = 70;

/// Largest head dimension of a random problem.
pub const MAX_DIM: usize = 96;

/// How large random problems are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Most queries, and keys.
    pub longest: usize,
    /// Least queries and keys of every other problem.
    pub long: usize,
    /// Head and value dimension; any up to [`MAX_DIM`] if `None`.
    pub dims: Option<(usize, usize)>,
    /// Whether there are at most [`FEW`] queries, of up to 12 heads that share a key head, as where a model decodes.
    pub few_queries: bool,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes { longest: MAX_LENGTH, long: LONG, dims: None, few_queries: false }
    }
}

/// Random cases: a problem of [`problems`], any seed, with or without a gradient of `lse`.
pub fn cases(element: Element) -> impl Strategy<Value = Case> {
    cases_of(element, Sizes::default())
}

/// [`cases`] of other sizes.
pub fn cases_of(element: Element, sizes: Sizes) -> impl Strategy<Value = Case> {
    (problems_of(element, sizes), any::<u64>(), any::<bool>()).prop_map(|(problem, seed, lse_gradient)| Case {
        problem,
        seed,
        lse_gradient,
    })
}

/// Random case `n` of these sizes, and how its q, k and v lie: the same in every run.
pub fn numbered(n: usize, element: Element, sizes: Sizes) -> (Case, [Layout; 3]) {
    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&(n as u64).to_le_bytes());
    let mut runner = TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    let mut rng = Rng::new(n as u64);
    let case = cases_of(element, sizes).new_tree(&mut runner).expect("a case").current();
    // Mostly alike, as projections leave them: whether rows are aligned is compiled in, and each mixture is another kernel.
    let all = Layout::random(&mut rng);
    let layouts = if rng.chance(0.08) { std::array::from_fn(|_| Layout::random(&mut rng)) } else { [all; 3] };
    (case, layouts)
}

/// The part of all cases that a variable asks for, `full` or `full:K/N`: K and N. `None` where it is not set.
///
/// # Panics
/// When it is set to anything else.
pub fn part(variable: &str) -> Option<(usize, usize)> {
    let asked = std::env::var(variable).ok()?;
    Some(match asked.strip_prefix("full") {
        Some("") => (0, 1),
        Some(rest) => rest
            .strip_prefix(':')
            .and_then(|rest| rest.split_once('/'))
            .and_then(|(k, n)| Some((k.parse().ok()?, n.parse::<usize>().ok().filter(|&n| n > 0)?)))
            .unwrap_or_else(|| panic!("{variable}: expected `full` or `full:K/N`, got {asked:?}")),
        None => panic!("{variable}: expected `full` or `full:K/N`, got {asked:?}"),
    })
}

/// Random problems: up to [`MAX_LENGTH`] queries and keys, head dimensions from 1 to [`MAX_DIM`], each option on or off
/// by itself. Half of them have at least [`LONG`] queries and keys, and of any a quarter have as many queries as keys.
pub fn problems(element: Element) -> impl Strategy<Value = Problem> {
    problems_of(element, Sizes::default())
}

fn problems_of(element: Element, sizes: Sizes) -> impl Strategy<Value = Problem> {
    (shapes(element, sizes), bands(), options()).prop_map(|(plain, band, options)| {
        let shape = |has: [bool; 4]| std::array::from_fn(|axis| if has[axis] { plain.score_shape()[axis] } else { 1 });
        Problem {
            scale: options.scale.unwrap_or(plain.scale),
            softcap: options.softcap,
            alibi: options.alibi,
            bias: options.bias.map(shape),
            mask: options.mask.map(shape),
            key_lengths: options.key_lengths,
            learned_sinks: options.learned_sinks,
            dropout: options.dropout,
            band,
            ..plain
        }
    })
}

fn shapes(element: Element, sizes: Sizes) -> impl Strategy<Value = Problem> {
    let Sizes { longest, long, dims, few_queries } = sizes;
    let lengths = |range: RangeInclusive<usize>| {
        let equal = range.clone().prop_map(|length| (length, length));
        prop_oneof![3 => (range.clone(), range), 1 => equal]
    };
    let dims = match dims {
        Some(dims) => Just(dims).boxed(),
        None => prop_oneof![(1..=MAX_DIM, 1..=MAX_DIM), (1..=MAX_DIM).prop_map(|dim| (dim, dim))].boxed(),
    };
    let heads = match few_queries {
        false => prop_oneof![Just((1, 1)), Just((2, 2)), Just((2, 1)), Just((4, 2))].boxed(),
        true => prop_oneof![Just((4, 2)), Just((3, 1)), Just((8, 1)), Just((10, 2)), Just((12, 1))].boxed(),
    };
    (1..=2usize, heads, prop_oneof![lengths(0..=longest), lengths(long..=longest)], dims).prop_map(
        move |(batch, (heads_q, heads_kv), (seq_q, seq_kv), (head_dim, value_dim))| {
            let seq_q = if few_queries { seq_q % (FEW + 1) } else { seq_q };
            let q = [batch, heads_q, seq_q, head_dim];
            let k = [batch, heads_kv, seq_kv, head_dim];
            Problem::new(q, k, [batch, heads_kv, seq_kv, value_dim], element).expect("random shapes are sound")
        },
    )
}

/// Causal or not; no window, a sliding one or one of any sides; visible sinks with half of the windows.
fn bands() -> impl Strategy<Value = Band> {
    let side = || prop_oneof![3 => 0..=100u32, 1 => Just(UNBOUNDED)];
    let window = prop_oneof![(0..=100u32).prop_map(|left| (left, 0)), (0..=100u32, side()), (side(), 0..=100u32)];
    (any::<bool>(), option::of((window, option::of(1..=70u32)))).prop_map(|(causal, window)| match window {
        Some(((left, right), sinks)) => Band { causal, left, right, sinks: sinks.unwrap_or(0) },
        None => Band { causal, ..Band::default() },
    })
}

/// The options of a problem that do not depend on its shape.
#[derive(Debug, Clone)]
struct Options {
    scale: Option<f64>,
    softcap: Option<f64>,
    alibi: bool,
    bias: Option<[bool; 4]>,
    mask: Option<[bool; 4]>,
    key_lengths: bool,
    learned_sinks: bool,
    dropout: Option<Dropout>,
}

fn options() -> impl Strategy<Value = Options> {
    let scale = option::of(prop_oneof![0.01..0.5f64, -0.3..-0.01f64]);
    let softcap = option::of(0.5..20.0f64);
    let dropout =
        option::of((0.01..0.9f64, any::<u64>()).prop_map(|(probability, seed)| Dropout { probability, seed }));
    let shape = || option::of(any::<[bool; 4]>());
    (scale, softcap, any::<bool>(), shape(), shape(), any::<bool>(), any::<bool>(), dropout).prop_map(
        |(scale, softcap, alibi, bias, mask, key_lengths, learned_sinks, dropout)| Options {
            scale,
            softcap,
            alibi,
            bias,
            mask,
            key_lengths,
            learned_sinks,
            dropout,
        },
    )
}

/// Whether a case uses an option.
type Uses = fn(&Case) -> bool;

/// The options that are counted.
const OPTIONS: [(&str, Uses); 15] = [
    ("causal", |case| case.problem.band.causal),
    ("window", |case| has_window(&case.problem.band)),
    ("visible sinks", |case| has_window(&case.problem.band) && case.problem.band.sinks > 0),
    ("scale", |case| (case.problem.scale - 1.0 / (case.problem.head_dim as f64).sqrt()).abs() > 1e-9),
    ("softcap", |case| case.problem.softcap.is_some()),
    ("alibi", |case| case.problem.alibi),
    ("bias", |case| case.problem.bias.is_some()),
    ("mask", |case| case.problem.mask.is_some()),
    ("key lengths", |case| case.problem.key_lengths),
    ("learned sinks", |case| case.problem.learned_sinks),
    ("dropout", |case| case.problem.dropout.is_some()),
    ("lse gradient", |case| case.lse_gradient),
    ("grouped heads", |case| case.problem.group() > 1),
    ("unequal lengths", |case| case.problem.seq_q != case.problem.seq_kv),
    ("unequal dimensions", |case| case.problem.head_dim != case.problem.value_dim),
];

fn has_window(band: &Band) -> bool {
    band.left != UNBOUNDED || band.right != UNBOUNDED
}

/// Counts which options met in cases of several tiles a side, so that a run of random cases can say what it covered.
///
/// 256 random cases miss a pair about once in 10⁷ runs; far fewer are a coin toss.
#[derive(Debug, Clone)]
pub struct PairCoverage {
    min_length: usize,
    cases: usize,
    spanning: usize,
    together: BTreeMap<(&'static str, &'static str), usize>,
}

impl PairCoverage {
    /// Counts cases with at least `tiles` tiles of `tile` queries and as many of `tile` keys.
    pub fn new(tiles: usize, tile: usize) -> Self {
        PairCoverage { min_length: tiles * tile, cases: 0, spanning: 0, together: BTreeMap::new() }
    }

    /// Notes a case. Call it once the case has passed.
    pub fn record(&mut self, case: &Case) {
        self.cases += 1;
        if case.problem.seq_q.min(case.problem.seq_kv) < self.min_length {
            return;
        }
        self.spanning += 1;
        let used: Vec<&str> = OPTIONS.iter().filter(|(_, uses)| uses(case)).map(|&(name, _)| name).collect();
        for (index, x) in used.iter().enumerate() {
            for y in &used[index + 1..] {
                *self.together.entry((x, y)).or_default() += 1;
            }
        }
    }

    /// Pairs of options that never occurred together.
    pub fn missing(&self) -> Vec<(&'static str, &'static str)> {
        let pairs = (0..OPTIONS.len()).flat_map(|x| (x + 1..OPTIONS.len()).map(move |y| (OPTIONS[x].0, OPTIONS[y].0)));
        pairs.filter(|pair| !self.together.contains_key(pair)).collect()
    }

    /// Panics unless every pair of options occurred together in a case of enough tiles a side.
    pub fn assert_complete(&self) {
        let PairCoverage { min_length, cases, spanning, .. } = self;
        let missing = self.missing();
        assert!(
            missing.is_empty(),
            "{cases} cases, {spanning} with {min_length} queries and keys; options that never met there: {missing:?}"
        );
    }
}

#[cfg(test)]
mod tests {
    use flashover_kernels::hopper::HopperConfig;

    use super::*;

    fn sample(n: usize) -> Vec<Case> {
        let mut runner = TestRunner::deterministic();
        (0..n).map(|_| cases(Element::F32).new_tree(&mut runner).unwrap().current()).collect()
    }

    #[test]
    fn random_problems_are_sound_and_small() {
        for Case { problem, .. } in sample(2000) {
            problem.validate().unwrap();
            assert!(
                problem.seq_q.max(problem.seq_kv) <= MAX_LENGTH && problem.head_dim.max(problem.value_dim) <= MAX_DIM
            );
        }
    }

    #[test]
    fn heads_of_few_queries_share_tiles_of_the_hopper_forward() {
        let sizes = Sizes { dims: Some((64, 64)), few_queries: true, ..Sizes::default() };
        let mut runner = TestRunner::deterministic();
        let mut draw = || cases_of(Element::BF16, sizes).new_tree(&mut runner).unwrap().current().problem;
        let packed: Vec<usize> = (0..1000).map(|_| HopperConfig::of(&draw()).0.packed).collect();
        for heads in [2, 3, 4, 5, 8, 12] {
            let met = packed.iter().filter(|&&packed| packed == heads).count();
            assert!(met >= 30, "{heads} heads of a tile: {met} of 1000");
        }
    }

    #[test]
    fn every_option_is_off_and_on_by_itself() {
        let cases = sample(2000);
        for (name, uses) in OPTIONS {
            let on = cases.iter().filter(|case| uses(case)).count();
            assert!((300..1700).contains(&on), "{name}: {on} of 2000");
        }
        for ((x, uses_x), (y, uses_y)) in OPTIONS.iter().flat_map(|x| OPTIONS.iter().map(move |y| (*x, *y))) {
            // Visible sinks mean something only beside a window.
            if x != y && (x, y) != ("visible sinks", "window") {
                assert!(cases.iter().any(|case| uses_x(case) && !uses_y(case)), "{x} without {y}");
            }
        }
    }

    #[test]
    fn coverage_is_complete_after_256_cases() {
        let mut coverage = PairCoverage::new(3, 64);
        sample(256).iter().for_each(|case| coverage.record(case));
        coverage.assert_complete();
        let least = coverage.together.values().min().unwrap();
        assert!(*least >= 5, "the rarest pair occurred {least} times");
    }

    #[test]
    fn short_cases_do_not_count() {
        let mut coverage = PairCoverage::new(3, 64);
        let short = sample(1000).into_iter().filter(|case| case.problem.seq_q < 192 || case.problem.seq_kv < 192);
        short.for_each(|case| coverage.record(&case));
        assert!(coverage.cases > 300);
        assert_eq!((coverage.spanning, coverage.missing().len()), (0, 15 * 14 / 2));
    }

    #[test]
    #[should_panic(expected = "options that never met there: [(\"causal\", \"softcap\")]")]
    fn a_pair_that_never_occurs_is_named() {
        let mut coverage = PairCoverage::new(3, 64);
        for case in sample(1000).iter().filter(|case| !(case.problem.band.causal && case.problem.softcap.is_some())) {
            coverage.record(case);
        }
        coverage.assert_complete();
    }
}
