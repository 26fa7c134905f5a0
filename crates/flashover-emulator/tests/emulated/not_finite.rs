//! NaN and infinity: what they reach, and what they do not.

use flashover_kernels::mask::Band;
use flashover_kernels::problem::Problem;
use flashover_testing::data::{Case, Inputs, Rng};
use flashover_testing::tolerance::References;

use crate::attention::{Call, Family, Results, run};
use crate::check::check_against;
use crate::problems::{DIMS, plain};

/// The tensor of q, k, v and do that has a number.
fn tensor(inputs: &mut Inputs, which: usize) -> &mut [f64] {
    let x = &mut inputs.operands;
    [&mut x.q, &mut x.k, &mut x.v, &mut inputs.do_].into_iter().nth(which).expect("four tensors")
}

/// Where nothing is hidden they are exactly where the oracle has them.
pub fn spread_as_the_oracle_says(call: Call) {
    let problem = call.family.problem(&plain([1, 2, 1], [70, 90], DIMS, call.family.elements()[0]));
    for which in 0..4 {
        let mut inputs = Inputs::random(&problem, 70);
        inputs.dlse.fill(0.0);
        let (spoilt, mut rng) = (tensor(&mut inputs, which), Rng::new(which as u64));
        let place = rng.below(spoilt.len());
        spoilt[place] = f64::NAN;
        let references = References::of(&problem, &inputs);
        check_against(&references, &problem, &inputs, None, call)
            .unwrap_or_else(|message| panic!("NaN in operand {which}, at {place}:\n{message}"));
    }
}

/// Products of f32 in parts keep infinities: the rest of ±1 is 0, and 0 times an infinity is NaN.
pub fn infinities_are_kept(call: Call) {
    assert_eq!(call.family, Family::Tf32);
    let problem = call.family.problem(&plain([1, 2, 1], [70, 90], DIMS, call.family.elements()[0]));
    for (which, bad) in [(2, f64::INFINITY), (2, f64::NEG_INFINITY), (3, f64::INFINITY)] {
        let mut inputs = Inputs::random(&problem, 3);
        inputs.dlse.fill(0.0);
        for n in 0..4 {
            tensor(&mut inputs, n).iter_mut().for_each(|x| *x = x.signum());
        }
        let (spoilt, mut rng) = (tensor(&mut inputs, which), Rng::new(3));
        for _ in 0..3 {
            let place = rng.below(spoilt.len());
            spoilt[place] = bad;
        }
        let references = References::of(&problem, &inputs);
        check_against(&references, &problem, &inputs, None, call)
            .unwrap_or_else(|message| panic!("{bad} in operand {which}:\n{message}"));
    }
}

/// Queries and keys of a causal problem, and of the largest tile.
const LENGTH: usize = 384;
const TILE: usize = 128;

/// A value of a hidden key reaches no query of a tile that sees none of the key's tile, and likewise a gradient of the
/// output. Within a tile that is hidden in part they may: the kernels say so.
pub fn stays_within_tiles(call: Call) {
    let element = call.family.elements()[0];
    let problem = Problem { band: Band::causal(), ..plain([1, 2, 2], [LENGTH, LENGTH], DIMS, element) };
    let problem = call.family.problem(&problem);
    let mut clean = Case::new(problem.clone(), 80).inputs();
    clean.dlse.fill(0.0);
    let references = References::of(&problem, &clean);
    let expected = flashover_testing::oracle::forward(&problem, &clean).0;
    let gradients = flashover_testing::oracle::backward(&problem, &clean);

    // Column 5 of key 300 of head 0.
    let mut inputs = clean.clone();
    inputs.operands.v[300 * DIMS[1] + 5] = f64::NAN;
    let Results { mut o, lse, .. } = run(&problem, &inputs, None, call).unwrap_or_else(|message| panic!("{message}")).0;
    for i in 300 / TILE * TILE..LENGTH {
        let at = i * DIMS[1] + 5;
        assert!(o[at].is_nan() || i < 300, "query {i} sees the NaN: {}", o[at]);
        o[at] = expected[at];
    }
    references.check_forward(&o, &lse).unwrap_or_else(|message| panic!("a value of key 300:\n{message}"));

    // Column 9 of query 100 of head 0.
    let mut inputs = clean.clone();
    inputs.do_[100 * DIMS[1] + 9] = f64::NAN;
    let Results { gradients: found, .. } =
        run(&problem, &inputs, None, call).unwrap_or_else(|message| panic!("{message}")).0;
    let (mut dq, mut dk, mut dv) = (found.q.expect("wanted"), found.k.expect("wanted"), found.v.expect("wanted"));
    let reached = |x: &mut [f64], expected: &Option<Vec<f64>>, places: std::ops::Range<usize>, what: &str| {
        for at in places {
            assert!(x[at].is_nan(), "{what}: expected NaN, got {}", x[at]);
            x[at] = expected.as_ref().expect("wanted")[at];
        }
    };
    reached(&mut dq, &gradients.q, 100 * DIMS[0]..101 * DIMS[0], "dq of query 100");
    reached(&mut dk, &gradients.k, 0..101 * DIMS[0], "dk of what it sees");
    // Keys of the tile that the query does not see: a gradient of a score there is 0 times NaN.
    let unseen = 101 * DIMS[0]..TILE * DIMS[0];
    for (found, &expected) in dk[unseen.clone()].iter_mut().zip(&gradients.k.as_ref().expect("wanted")[unseen]) {
        *found = if found.is_nan() { expected } else { *found };
    }
    for key in 0..TILE {
        let at = key * DIMS[1] + 9;
        assert!(dv[at].is_nan() || key > 100, "dv of key {key}, which query 100 sees: {}", dv[at]);
        dv[at] = if dv[at].is_nan() { gradients.v.as_ref().expect("wanted")[at] } else { dv[at] };
    }
    let found = flashover_kernels::operands::Gradients { q: Some(dq), k: Some(dk), v: Some(dv), ..found };
    references.check_gradients(found).unwrap_or_else(|message| panic!("a gradient of query 100:\n{message}"));
}
