//! NaN and infinity reach only what can see them: exactly where the oracle, which sums visible keys only, has them.

use flashover::AttentionOptions;
use flashover::kernels::mask::Band;
use flashover::kernels::problem::{Element, Precision, Problem};
use flashover_testing::bridge;
use flashover_testing::data::{Inputs, Rng};
use flashover_testing::tolerance::References;

use crate::devices;

/// Several tiles a side, heads in groups, and everything that hides keys.
fn problems() -> Vec<Problem> {
    let shape = |heads, seq| [2, heads, seq, 24];
    let plain = Problem::new(shape(4, 90), shape(2, 130), shape(2, 130), Element::F32).expect("sound");
    let masked = Problem { mask: Some([2, 1, 90, 130]), ..plain.clone() };
    vec![
        Problem { band: Band::causal(), ..plain.clone() },
        Problem { band: Band { causal: true, left: 20, right: 0, sinks: 3 }, ..plain.clone() },
        Problem { band: Band { causal: false, left: 10, right: 25, sinks: 0 }, learned_sinks: true, ..plain.clone() },
        Problem { key_lengths: true, alibi: true, ..plain },
        Problem { softcap: Some(3.0), bias: Some([1, 4, 1, 130]), ..masked.clone() },
        Problem { band: Band::causal(), key_lengths: true, ..masked },
    ]
}

/// Puts a few of `bad` into random places of `x`.
fn spoil(x: &mut [f64], bad: f64, rng: &mut Rng) {
    for _ in 0..3 {
        let n = rng.below(x.len());
        x[n] = bad;
    }
}

#[test]
fn non_finite_operands_reach_only_what_sees_them() {
    let (mut spread, mut kept) = (0, 0);
    for (seed, problem) in problems().iter().enumerate() {
        for (which, bad) in [(0, f64::NAN), (1, f64::NAN), (2, f64::NAN), (2, f64::INFINITY), (3, f64::NAN)] {
            let mut inputs = Inputs::random(problem, seed as u64);
            inputs.dlse.fill(0.0);
            let mut rng = Rng::new(seed as u64);
            let operands = &mut inputs.operands;
            let spoilt = [&mut operands.q, &mut operands.k, &mut operands.v, &mut inputs.do_].into_iter().nth(which);
            spoil(spoilt.expect("four tensors"), bad, &mut rng);
            let references = References::of(problem, &inputs);
            for device in devices::native() {
                let results = bridge::run(problem, &inputs, false, &device.clone().autodiff()).expect("sound");
                let all = [&results.o, results.gradients.q.as_ref().expect("tracked")];
                spread += all.iter().flat_map(|x| x.iter()).filter(|x| !x.is_finite()).count();
                kept += all.iter().flat_map(|x| x.iter()).filter(|x| x.is_finite()).count();
                let checks = references.check_forward(&results.o, &results.lse);
                let checks = checks.and_then(|_| references.check_gradients(results.gradients));
                checks.unwrap_or_else(|message| panic!("{problem:?}\noperand {which} {bad} on {device:?}\n{message}"));
            }
        }
    }
    assert!(spread > 1000 && kept > spread, "{spread} elements were not finite, {kept} were");
}

/// Where nothing is hidden, also where products of f32 are made of rounded parts: the rest of ±1 is 0, and 0 times an infinity is NaN.
#[test]
fn rounded_products_keep_infinities() {
    let mut infinite = 0;
    for dim in [24, 128] {
        let shape = |heads, seq| [1, heads, seq, dim];
        let problem = Problem::new(shape(2, 70), shape(1, 90), shape(1, 90), Element::F32).expect("sound");
        for (which, bad) in [(1, f64::NAN), (2, f64::INFINITY), (2, f64::NEG_INFINITY), (3, f64::INFINITY)] {
            let mut inputs = Inputs::random(&problem, 3);
            inputs.dlse.fill(0.0);
            let operands = &mut inputs.operands;
            let mut tensors = [&mut operands.q, &mut operands.k, &mut operands.v, &mut inputs.do_];
            for x in tensors.iter_mut().flat_map(|tensor| tensor.iter_mut()) {
                *x = x.signum();
            }
            spoil(tensors[which], bad, &mut Rng::new(3));
            let references = References::of(&problem, &inputs);
            for device in devices::native() {
                let device = device.clone().autodiff();
                let options = |options: AttentionOptions| options.precision(Precision::Tf32x3);
                let results = bridge::run_with(&problem, &inputs, false, &device, options).expect("sound");
                infinite += results.o.iter().filter(|x| x.is_infinite()).count();
                let checks = references.check_forward(&results.o, &results.lse);
                let checks = checks.and_then(|_| references.check_gradients(results.gradients));
                checks.unwrap_or_else(|message| {
                    panic!("dimension {dim}, operand {which} {bad} on {device:?}\n{message}")
                });
            }
        }
    }
    assert!(infinite > 100, "{infinite} elements were infinite");
}
