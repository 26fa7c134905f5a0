//! Score functions of a user's: values, every gradient, and that of their parameters, beside every other option.

use burn::tensor::{DType, Device, Tensor, TensorData};
use flashover::kernels::block_plan::TileSize;
use flashover::kernels::cubecl;
use flashover::kernels::cubecl::prelude::*;
use flashover::kernels::dropout::Dropout;
use flashover::kernels::mask::{Band, Extent, UNBOUNDED};
use flashover::kernels::problem::{Element, Problem};
use flashover::kernels::score::{Position, ScoreFunction, ScoreUse};
use flashover::kernels::select::KernelChoice;
use flashover::{AttentionOptions, attention};
#[cfg(feature = "cuda")]
use flashover::{SparsePlan, explain};
use flashover_testing::bridge;
use flashover_testing::data::{Case, Inputs, Rng};
use flashover_testing::score::{Buckets, Waves, with_buckets, with_waves};
use flashover_testing::sparse::{SparseCase, combination};
use flashover_testing::strategy::cases;
use flashover_testing::tolerance::References;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::devices;
use crate::grid::check;
#[cfg(feature = "cuda")]
use crate::grid::{Call, check_call};
use crate::sparse;

fn with_function(n: usize, problem: Problem) -> Problem {
    if n.is_multiple_of(2) { with_waves(problem) } else { with_buckets(problem) }
}

fn all_agree(cases: impl Iterator<Item = Case>, devices: &[Device]) {
    let failures: Vec<String> = cases.filter_map(|case| check(&case, devices).err()).collect();
    assert!(failures.is_empty(), "{} cases failed, the first:\n{}", failures.len(), failures[0]);
}

#[test]
fn random_problems_agree_on_flex() {
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let elements = [Element::F32, Element::F16, Element::F32, Element::BF16, Element::F32];
    let cases = (0..120).map(|n| {
        let case = cases(elements[n % 5]).new_tree(&mut runner).expect("a case").current();
        Case { problem: with_function(n, case.problem), ..case }
    });
    all_agree(cases, &[devices::flex()]);
}

/// Four tiles of 32 a side, not all whole, with each of the other options.
fn gpu_case(n: usize, element: Element) -> Case {
    sized_case(n, element, [100 + 7 * (n % 4), 139 - 11 * (n % 3)], [16, 24])
}

/// So many queries and keys, and such head dimensions, with each of the other options.
fn sized_case(n: usize, element: Element, [q, k]: [usize; 2], [d, dv]: [usize; 2]) -> Case {
    let [b, hq, hkv] = [[2, 4, 2], [1, 2, 1], [2, 2, 2]][n % 3];
    let plain = Problem::new([b, hq, q, d], [b, hkv, k, d], [b, hkv, k, dv], element).expect("sound");
    let problem = match n % 8 {
        0 | 1 => plain,
        2 => Problem { band: Band { causal: true, left: 50, right: UNBOUNDED, sinks: 20 }, ..plain },
        3 => Problem { alibi: true, key_lengths: true, softcap: Some(2.0), ..plain },
        4 => Problem { bias: Some([1, hq, 1, k]), mask: Some([b, 1, q, k]), ..plain },
        5 => Problem { dropout: Some(Dropout { probability: 0.3, seed: 5 }), learned_sinks: true, ..plain },
        6 => Problem { bias: Some([b, 1, q, k]), band: Band::causal(), alibi: true, ..plain },
        _ => Problem { softcap: Some(3.0), bias: Some([1, 1, q, 1]), band: Band::causal(), ..plain },
    };
    // Both functions with each.
    let problem = with_function(n % 8 + n / 8, problem);
    Case { lse_gradient: n.is_multiple_of(3), ..Case::new(problem, n as u64) }
}

#[test]
fn every_option_agrees_on_the_gpu() {
    let Some(device) = devices::gpu() else {
        return devices::skip("scores::every_option_agrees_on_the_gpu", "this build has no GPU backend");
    };
    all_agree((0..16).map(|n| gpu_case(n, Element::F32)), std::slice::from_ref(&device));
    match device.supports_dtype(DType::F16) {
        true => all_agree((0..4).map(|n| gpu_case(n, Element::F16)), &[device]),
        false => devices::skip("scores::every_option_agrees_on_the_gpu", "the GPU has no f16"),
    }
}

/// What the matrix kernels are asked for with score functions, which `Auto` does not do: those of the portable kernels, and
/// several of their own tiles a side.
#[cfg(feature = "cuda")]
fn matrix_cases() -> impl Iterator<Item = Case> {
    let element = |n: usize| [Element::BF16, Element::F16][n / 8 % 2];
    let long = (0..8).map(move |n| sized_case(n, element(8 * n), [300 + 9 * n, 410 - 7 * n], [64, 64]));
    (0..16).map(move |n| gpu_case(n, element(n))).chain(long)
}

#[cfg(feature = "cuda")]
fn matrix_kernels_agree(kernel: KernelChoice) {
    let device = devices::gpu().expect("a CUDA build has one");
    let call = Call { kernel, twice: true, ..Call::default() };
    let failures: Vec<String> =
        matrix_cases().filter_map(|case| check_call(&case, call, std::slice::from_ref(&device)).err()).collect();
    assert!(failures.is_empty(), "{} cases failed, the first:\n{}", failures.len(), failures[0]);
}

#[cfg(feature = "cuda")]
#[test]
fn every_option_agrees_by_mma() {
    matrix_kernels_agree(KernelChoice::Mma);
}

#[cfg(feature = "cuda")]
#[test]
fn every_option_agrees_by_cmma() {
    matrix_kernels_agree(KernelChoice::Cmma);
}

#[cfg(feature = "cuda")]
#[test]
fn every_option_agrees_by_hopper() {
    matrix_kernels_agree(KernelChoice::Hopper);
}

/// Gradients that may be added up in any order are held to the same budget, with every option and under plans; only Hopper's backward
/// makes use of it.
#[cfg(feature = "cuda")]
#[test]
fn unordered_gradients_agree_by_the_matrix_kernels() {
    let device = devices::gpu().expect("a CUDA build has one").autodiff();
    for (n, kernel) in (0..8).flat_map(|n| [(n, KernelChoice::Mma), (n, KernelChoice::Hopper)]) {
        let dims = [[64, 128], [256, 192]][n / 4];
        let case = sized_case(n, [Element::BF16, Element::F16][n % 2], [300, 410], dims);
        let case = Case { problem: Problem { unordered: true, ..case.problem }, ..case };
        let inputs = case.inputs();
        let tensors = bridge::Tensors::new(&case.problem, &inputs, &device);
        let options = tensors.options(&case.problem).kernel(kernel);
        let reason = explain(&tensors.q, &tensors.k, &tensors.v, &options).expect("sound").reason;
        assert_eq!(reason.contains("unordered"), kernel == KernelChoice::Hopper, "{reason}");
        let call = Call { kernel, ..Call::default() };
        check_call(&case, call, std::slice::from_ref(&device)).unwrap_or_else(|message| panic!("{message}"));
    }
}

/// Forward and backward of the families.
#[cfg(feature = "cuda")]
#[test]
fn plans_and_score_functions_agree_by_the_matrix_kernels() {
    let device = devices::gpu().expect("a CUDA build has one").autodiff();
    let mut rng = Rng::new(22);
    for (n, kernel) in
        (0..8).flat_map(|n| [KernelChoice::Mma, KernelChoice::Cmma, KernelChoice::Hopper].map(|kernel| (n, kernel)))
    {
        let case = sized_case(n, Element::BF16, [300, 410], [64, 64]);
        let tile = TileSize { bq: 128, bk: 128 };
        let mask = combination(Extent::from(&case.problem), TileSize { bq: 16, bk: 16 }, &mut rng);
        let case = SparseCase { case, mask, tile };
        let (plan, inputs) = (SparsePlan::from(case.plan()), case.case.inputs());
        let (problem, dense) = case.dense(&inputs);
        let references = References::of(&problem, &dense);
        let more = |options: AttentionOptions| options.plan(&plan).kernel(kernel).deterministic(n % 4 != 3);
        let results = bridge::run_with(&case.case.problem, &inputs, case.case.lse_gradient, &device, more);
        let results = results.expect("sound");
        let checked = references.check_forward(&results.o, &results.lse);
        checked
            .and_then(|_| references.check_gradients(results.gradients))
            .unwrap_or_else(|message| panic!("case {n} by {kernel:?}: {message}"));
    }
}

/// Every implementation in the build: the device, the kernel that it is asked for, and an element type that it takes.
fn implementations() -> Vec<(Device, KernelChoice, Element)> {
    #[cfg_attr(not(feature = "cuda"), allow(unused_mut))]
    let mut all: Vec<_> =
        devices::native().into_iter().map(|device| (device, KernelChoice::Auto, Element::F32)).collect();
    #[cfg(feature = "cuda")]
    for kernel in [KernelChoice::Mma, KernelChoice::Cmma, KernelChoice::Hopper] {
        all.push((devices::gpu().expect("a CUDA build has one"), kernel, Element::BF16));
    }
    all
}

fn dtype(element: Element) -> DType {
    if element == Element::BF16 { DType::BF16 } else { DType::F32 }
}

#[test]
fn compositions_agree() {
    for (_, device) in devices::chunked() {
        all_agree((0..16).map(|n| gpu_case(n, Element::F32)), &[device]);
    }
}

#[test]
fn plans_and_score_functions_agree() {
    let mut rng = Rng::new(21);
    for n in 0..8 {
        let case = gpu_case(n, Element::F32);
        let tile = TileSize { bq: 32, bk: 32 };
        let mask = combination(Extent::from(&case.problem), TileSize { bq: 16, bk: 16 }, &mut rng);
        let everywhere = devices::native().into_iter().chain(devices::chunked().into_iter().map(|(_, device)| device));
        let case = SparseCase { case, mask, tile };
        sparse::check(&case, &everywhere.collect::<Vec<_>>()).unwrap_or_else(|message| panic!("{message}"));
    }
}

/// More parameters than the sums of a GPU's backward have room for at once: a cube walks several query tiles.
#[test]
fn a_large_table_agrees() {
    let plain = Problem::new([1, 4, 130, 8], [1, 2, 70, 8], [1, 2, 70, 8], Element::F32).expect("sound");
    let problem = with_buckets(plain);
    let score = problem.score.map(|score| ScoreUse { parameters: 20_000, ..score });
    all_agree([Case::new(Problem { score, ..problem }, 4)].into_iter(), &devices::native());
}

/// Entries of −∞ hide, as they do in a bias.
#[test]
fn a_score_of_minus_infinity_is_hidden() {
    let composed = devices::chunked().into_iter().map(|(_, device)| (device, KernelChoice::Auto, Element::F32));
    for (device, kernel, element) in implementations().into_iter().chain(composed) {
        let plain = Problem::new([1, 2, 70, 8], [1, 2, 90, 8], [1, 2, 90, 8], element).expect("sound");
        let case = Case::new(with_buckets(plain), 3);
        let mut inputs = case.inputs();
        let table = inputs.operands.score_parameters.as_mut().expect("a table");
        // Head 0 sees no key within a distance of 7, head 1 none before the query.
        (0..8).chain(17..24).for_each(|bucket| table[bucket] = f64::NEG_INFINITY);
        (1..16).for_each(|bucket| table[32 + bucket] = f64::NEG_INFINITY);
        let references = References::of(&case.problem, &inputs);
        let tracking = device.clone().autodiff();
        let results = bridge::run_with(&case.problem, &inputs, true, &tracking, |options| options.kernel(kernel));
        let results = results.expect("sound");
        let checked = references.check_forward(&results.o, &results.lse);
        checked
            .and_then(|_| references.check_gradients(results.gradients))
            .unwrap_or_else(|m| panic!("{m}\n{device:?} by {kernel:?}"));
    }
}

#[test]
fn runs_give_the_same_bits() {
    let case = gpu_case(2, Element::F32);
    let inputs = case.inputs();
    for device in devices::native().into_iter().map(Device::autodiff) {
        let run = || bridge::run(&case.problem, &inputs, true, &device).expect("sound").gradients.score_parameters;
        let first = run();
        assert!(first.iter().flatten().any(|&x| x != 0.0) && first == run(), "{device:?}");
    }
}

/// A table of any shape, in the middle of other operations.
#[test]
fn the_gradient_of_a_table_is_that_of_finite_differences() {
    for device in devices::native().into_iter().map(Device::autodiff) {
        let normal = |seed, shape: [usize; 4]| bridge::normal(seed, 1.0, shape, &device);
        let (q, k, v) = (normal(3, [2, 2, 65, 8]), normal(4, [2, 1, 97, 8]), normal(5, [2, 1, 97, 8]));
        let weights = normal(6, [2, 2, 65, 8]);
        let table = bridge::normal(7, 1.0, [2, 32], &device);
        let loss = |table: Tensor<2>| {
            let options = AttentionOptions::new().causal().score_function(Buckets, table * 2.0);
            let o = attention(q.clone(), k.clone(), v.clone(), &options).expect("sound");
            (o * weights.clone()).sum()
        };
        let tracked = table.clone().require_grad();
        let gradient = tracked.grad(&loss(tracked.clone()).backward()).expect("tracked");
        assert_eq!(gradient.dims(), [2, 32]);
        let gradient: Vec<f32> = gradient.into_data().iter().collect();
        const STEP: f32 = 0.02;
        for entry in [0, 1, 5, 9, 12, 15, 32, 35, 44] {
            let at = |step: f32| {
                let mut data: Vec<f32> = table.to_data().iter().collect();
                data[entry] += step;
                let moved = Tensor::<2>::from_data(TensorData::new(data, [2, 32]), &device);
                loss(moved).into_scalar::<f32>()
            };
            let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            let error = (gradient[entry] - expected).abs();
            assert!(
                error < 5e-3 * (1.0 + expected.abs()),
                "entry {entry}: {} and {expected} on {device:?}",
                gradient[entry]
            );
        }
        // Causal: no key comes after its query.
        assert!(gradient[17..32].iter().all(|&x| x == 0.0));
    }
}

#[test]
fn only_tracked_parameters_get_a_gradient() {
    for device in devices::native().into_iter().map(Device::autodiff) {
        let q = Tensor::<4>::ones([1, 2, 40, 8], &device).cumsum(2).sin();
        let table = Tensor::<2>::ones([2, 32], &device);
        let run = |q: &Tensor<4>, table: &Tensor<2>| {
            let options = AttentionOptions::new().score_function(Buckets, table.clone());
            let grads = attention(q.clone(), q.clone(), q.clone(), &options).expect("sound").sin().sum().backward();
            (q.grad(&grads).is_some(), table.grad(&grads).is_some())
        };
        let (tracked_q, tracked_table) = (q.clone().require_grad(), table.clone().require_grad());
        assert_eq!(run(&tracked_q, &table), (true, false));
        assert_eq!(run(&q, &tracked_table), (false, true));
        assert_eq!(run(&tracked_q, &tracked_table), (true, true));
    }
}

#[test]
fn bad_input_is_refused() {
    let device = devices::flex();
    let q = |dtype: DType| Tensor::<4>::zeros([1, 2, 40, 8], (&device, dtype));
    let refused = |q: Tensor<4>, options: AttentionOptions| {
        attention(q.clone(), q.clone(), q, &options).expect_err("the call should be refused").to_string()
    };
    let plain = AttentionOptions::new;
    let table = |entries: usize| Tensor::<1>::zeros([entries], &device);
    for (options, message) in [
        (
            plain().score_function(Buckets, table(0)),
            "score function Buckets: expected 1 to 2147483647 parameters, got 0",
        ),
        (
            plain().score_function(Buckets, Tensor::<2>::zeros([0, 32], &device)),
            "score function Buckets: expected 1 to 2147483647 parameters, got 0",
        ),
        (
            plain().score_function(Buckets, table(32)),
            "score function Buckets: expected an index below its 32 parameters, got 32 for query 0 and key 0 of head 1",
        ),
        (
            plain().score_function(Waves, table(10)),
            "score function Waves: expected an index below its 10 parameters, got 10 for query 0 and key 35 of head 1",
        ),
        (
            plain().score_function(Waves, Tensor::<1>::zeros([11], (&device, DType::F16))),
            "dtype of score_parameters: expected F32, got F16",
        ),
    ] {
        let found = refused(q(DType::F32), options);
        assert!(found == message, "{found}");
    }
    assert_eq!(
        refused(q(DType::F64), plain().score_function(Waves, table(11))),
        "dtype of q: expected f32, f16 or bf16 with a score function, which is f32 code, got F64"
    );
    for (_, other) in devices::chunked() {
        let message = refused(q(DType::F32), plain().score_function(Waves, Tensor::<1>::zeros([11], &other)));
        assert!(message.starts_with("device of score_parameters: expected that of q"), "{message}");
    }
    // A later call replaces the function, and what position hides need not have a parameter: of one query that sees itself.
    let options = plain().score_function(Waves, table(3)).score_function(Buckets, table(33)).window(0, 0);
    attention(q(DType::F32), q(DType::F32), q(DType::F32), &options).expect("bucket 0 of both heads");
}

#[test]
fn without_keys_or_queries_there_is_nothing_to_score() {
    let everywhere = devices::native().into_iter().chain(devices::chunked().into_iter().map(|(_, device)| device));
    for device in everywhere.map(Device::autodiff) {
        for (queries, keys) in [(0, 5), (5, 0)] {
            let zeros = |length: usize| Tensor::<4>::zeros([1, 2, length, 8], &device).require_grad();
            let table = Tensor::<1>::ones([64], &device).require_grad();
            let options = AttentionOptions::new().score_function(Buckets, table.clone());
            let o = attention(zeros(queries), zeros(keys), zeros(keys), &options).expect("sound");
            let gradient = table.grad(&o.sum().backward()).expect("tracked");
            assert!(gradient.into_data().iter::<f32>().all(|x| x == 0.0), "{device:?}");
        }
    }
}

/// A NaN among the parameters reaches the rows that read it, and no others.
#[test]
fn a_parameter_of_nan_reaches_only_who_reads_it() {
    for (device, kernel, element) in implementations() {
        let q = Tensor::<4>::ones([1, 2, 70, 8], &device).cumsum(2).sin().cast(dtype(element));
        let mut table = vec![0.0f32; 64];
        // Head 1, distances of 91 and more, which only the last queries have; and a parameter that nobody reads.
        (table[32 + 15], table[31]) = (f32::NAN, f32::NAN);
        let k = Tensor::<4>::ones([1, 2, 100, 8], &device).cumsum(2).cos().cast(dtype(element));
        let table = Tensor::<1>::from_data(TensorData::new(table, [64]), &device);
        let options = AttentionOptions::new().causal().kernel(kernel).score_function(Buckets, table);
        let o: Vec<f32> = attention(q, k.clone(), k, &options).expect("sound").into_data().iter().collect();
        for (row, o) in o.chunks(8).enumerate() {
            // Query i stands at i + 30.
            let reads = row >= 70 && row - 70 + 30 >= 91;
            assert_eq!(o[0].is_nan(), reads, "row {row} on {device:?} by {kernel:?}: {o:?}");
        }
    }
}

/// A number of a table for each key and each query, by turns.
struct PerPlace;

#[cube]
impl ScoreFunction for PerPlace {
    fn parameter(at: Position) -> u32 {
        select(at.j % 2 == 0, at.j, at.a) as u32
    }

    fn value(s: f32, _at: Position, parameter: f32) -> f32 {
        s + parameter
    }

    fn derivative(_s: f32, _at: Position, parameter: f32) -> f32 {
        // NaN where the parameter is.
        1.0f32 + parameter * 0.0f32
    }

    fn parameter_derivative(_s: f32, _at: Position, _parameter: f32) -> f32 {
        1.0f32
    }
}

/// Tiles reach past the queries and the keys, where no parameter is: the NaN that is read there reaches nobody.
#[test]
fn what_lies_past_the_ends_reaches_nobody() {
    const LENGTH: usize = 100;
    for (device, kernel, element) in implementations() {
        let device = device.autodiff();
        let x = || Tensor::<4>::ones([1, 2, LENGTH, 8], &device).cumsum(2).cast(dtype(element));
        // Numbers that every element type holds.
        let entry = |n: usize| (n * 5 % 9) as f32 / 4.0 - 1.0;
        let table: Vec<f32> = (0..LENGTH).map(entry).collect();
        let places = (0..LENGTH * LENGTH).map(|at| (at / LENGTH, at % LENGTH));
        let bias: Vec<f32> = places.map(|(i, j)| entry(if j % 2 == 0 { j } else { i })).collect();
        let table = Tensor::<1>::from_data(TensorData::new(table, [LENGTH]), &device);
        let bias = Tensor::<4>::from_data(TensorData::new(bias, [1, 1, LENGTH, LENGTH]), &device).cast(dtype(element));
        let plain = || AttentionOptions::new().kernel(kernel);
        let run = |options: AttentionOptions| {
            let operands = [x().sin(), x().cos(), (x() * 3.0).sin()].map(|x| x.detach().require_grad());
            let [q, k, v] = operands.clone();
            let o = attention(q, k, v, &options).expect("sound");
            let grads = (o.clone() * (x() * 2.0).cos()).sum().backward();
            let results = operands.iter().map(|x| x.grad(&grads).expect("tracked")).chain([o.inner()]);
            results.flat_map(|x| x.into_data().iter::<f32>().collect::<Vec<_>>()).collect::<Vec<f32>>()
        };
        let found = run(plain().score_function(PerPlace, table));
        let expected = run(plain().bias(bias));
        let tolerance = if element == Element::F32 { 1e-4 } else { 0.05 };
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() <= tolerance, "{found} and {expected} on {device:?} by {kernel:?}");
        }
    }
}

/// Inputs with another draw for the parameters alone change the output: they are read.
#[test]
fn parameters_matter() {
    let case = gpu_case(0, Element::F32);
    let inputs = case.inputs();
    let mut other = inputs.clone();
    other.operands.score_parameters = Inputs::random(&case.problem, 99).operands.score_parameters;
    for device in devices::native() {
        let run = |inputs: &Inputs| bridge::run(&case.problem, inputs, false, &device).expect("sound").o;
        assert_ne!(run(&inputs), run(&other));
    }
}
