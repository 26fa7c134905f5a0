//! What every family is held to.

use flashover_kernels::block_plan::TileSize;
use flashover_kernels::dropout::Dropout;
use flashover_kernels::launch_log::Launch;
use flashover_kernels::mask::{Band, Extent, Mask};
use flashover_kernels::operands::Wanted;
use flashover_kernels::problem::Problem;
use flashover_testing::data::{Case, Rng};
use flashover_testing::layout::Layout;
use flashover_testing::score::{with_buckets, with_waves};
use flashover_testing::sparse::{SparseCase, combination};
use flashover_testing::strategy::{Sizes, numbered, part};
use flashover_testing::tolerance::References;

use crate::attention::{Call, Family};
use crate::check::{agree, check_against, sparse_agree};
use crate::problems::{DIMS, nearly_nothing, of_dims, options, plain};

/// The tests that every family has, of its call.
macro_rules! every_family {
    ($call:expr) => {
        #[test]
        fn strides_are_followed() {
            $crate::suite::strides($call);
        }

        #[test]
        fn where_there_is_nothing_to_see_there_are_zeros() {
            $crate::suite::nothing_to_see($call);
        }

        #[test]
        fn nan_stays_within_tiles() {
            $crate::not_finite::stays_within_tiles($call);
        }

        #[test]
        fn random_problems_agree() {
            $crate::suite::random($call);
        }
    };
}
pub(crate) use every_family;

/// Each option, the first ones twice for the same bits.
pub fn each_option(call: Call) -> Vec<Launch> {
    let (twice, once): (Vec<_>, Vec<_>) =
        options(call.family.elements()[0]).into_iter().partition(|case| case.seed < 2);
    let mut launches = agree(twice, Call { twice: true, ..call });
    launches.extend(agree(once, call));
    launches
}

/// Dimensions that the others do not have, with the elements in turn.
pub fn dimensions<const N: usize>(dims: [[usize; 2]; N], call: Call) -> Vec<Launch> {
    let elements = call.family.elements();
    agree(dims.into_iter().enumerate().map(|(n, dims)| of_dims(dims, elements[(n + 1) % 2])), call)
}

/// q, k and v where projections leave them, with gaps, and where no row is aligned.
pub fn strides(call: Call) {
    let inner = Layout { heads_inner: true, ..Layout::default() };
    let element = call.family.elements()[0];
    for (seed, layouts) in [
        [inner; 3],
        [Layout { before: 8, after: 16, ..inner }, Layout { after: 8, ..Layout::default() }, inner],
        [Layout { before: 3, ..Layout::default() }; 3],
    ]
    .into_iter()
    .enumerate()
    {
        let problem = Problem { band: Band::causal(), ..plain([2, 2, 2], [130, 150], DIMS, element) };
        agree([Case::new(problem, 40 + seed as u64)], Call { layouts, ..call });
    }
}

/// Where there is little to see, or nothing.
pub fn nothing_to_see(call: Call) {
    agree(nearly_nothing(call.family.elements()[0]), call);
    // A batch element without keys, beside one with all.
    let problem = Problem { key_lengths: true, ..plain([2, 2, 1], [200, 150], DIMS, call.family.elements()[0]) };
    let problem = call.family.problem(&problem);
    let mut inputs = Case::new(problem.clone(), 30).inputs();
    inputs.operands.key_lengths = Some(vec![0, 150]);
    let checked = check_against(&References::of(&problem, &inputs), &problem, &inputs, None, call);
    checked.unwrap_or_else(|message| panic!("{message}"));
}

/// Both functions of the tests, one beside other options.
pub fn score_functions(call: Call) -> Vec<Launch> {
    let plain = plain([1, 2, 1], [200, 150], DIMS, call.family.elements()[0]);
    let dropout = Some(Dropout { probability: 0.3, seed: 8 });
    let waves = with_waves(Problem { dropout, softcap: Some(3.0), band: Band::causal(), ..plain.clone() });
    agree([Case::new(waves, 50), Case { lse_gradient: false, ..Case::new(with_buckets(plain), 51) }], call)
}

/// Plans with tiles of all kinds, in tiles of these sizes; one beside other options, and one that shows nothing.
pub fn plans(tiles: [u32; 2], call: Call) -> Vec<Launch> {
    let of = |lengths| plain([1, 2, 1], lengths, DIMS, call.family.elements()[0]);
    let band = Band { left: 200, sinks: 3, ..Band::causal() };
    let other = Problem { alibi: true, key_lengths: true, band, ..of([290, 270]) };
    let mut cases = vec![planned(of([300, 410]), 60, tiles), planned(other, 61, tiles)];
    cases.push(SparseCase { mask: Mask::Nothing, case: Case::new(of([130, 140]), 62), ..cases[0] });
    sparse_agree(cases, call)
}

/// A problem under a plan in tiles of these sizes, of a mask in smaller blocks, so that there are Partial tiles.
pub fn planned(problem: Problem, seed: u64, [bq, bk]: [u32; 2]) -> SparseCase {
    let blocks = TileSize { bq: 16, bk: 16 };
    let mask = combination(Extent::from(&problem), blocks, &mut Rng::new(seed));
    SparseCase { case: Case::new(problem, seed), mask, tile: TileSize { bq, bk } }
}

/// Each of the gradients of q, k and v without the others.
pub fn gradients_alone(call: Call) {
    let case = of_dims(DIMS, call.family.elements()[0]);
    for n in 0..3 {
        let wanted = Wanted { q: n == 0, k: n == 1, v: n == 2, ..Wanted::default() };
        agree([case.clone()], Call { wanted, ..call });
    }
}

/// Random problems, each twice: of a thousand a few with the dimensions and the element type of other tests, all with
/// `FLASHOVER_RANDOM=full`, those that leave K when divided by N with `full:K/N`.
pub fn random(call: Call) {
    /// A multiple of the numbers of dimensions and of elements.
    const STEP: usize = 330;
    let eights = |dim: usize| if call.family == Family::Hopper { dim.next_multiple_of(8) } else { dim };
    let (part, parts) = part("FLASHOVER_RANDOM").unwrap_or((0, STEP));
    let (mut count, mut failures) = (0, Vec::new());
    for n in (part..1000).step_by(parts) {
        let dims = [(64, 64), (128, 128), (40, 72), (59, 111), (192, 128)][n % 5];
        let sizes = Sizes { dims: Some((eights(dims.0), eights(dims.1))), ..Sizes::default() };
        let (case, layouts) = numbered(n, call.family.elements()[n / 5 % 2], sizes);
        let problem = call.family.problem(&case.problem);
        let inputs = case.inputs();
        let call = Call { layouts, twice: true, ..call };
        if let Err(message) = check_against(&References::of(&problem, &inputs), &problem, &inputs, None, call) {
            failures.push(format!("problem {n}, {layouts:?}: {}: {message}", case.name()));
        }
        count += 1;
    }
    let shown = failures.iter().take(5).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty() && count > 0, "{} of {count} random problems failed:\n{shown}", failures.len());
}
