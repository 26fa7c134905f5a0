//! Attention under a block plan is attention under the dense mask that says the same: output, log-sum-exp and gradients,
//! with every kind of mask, combined with every other option.

use burn::tensor::{Device, Tensor};
use flashover::kernels::block_plan::{BlockPlan, TileSize};
use flashover::kernels::dropout::Dropout;
use flashover::kernels::mask::{Band, BlockTable, Extent, Mask, UNBOUNDED};
use flashover::kernels::problem::{Element, Problem};
use flashover::{AttentionOptions, SparsePlan, TopK, attention};
use flashover_testing::bridge;
use flashover_testing::data::{Case, Inputs, Rng};
use flashover_testing::sparse::{KINDS, SparseCase, combination, kind, kinds_of_tiles};
use flashover_testing::strategy::cases;
use flashover_testing::tolerance::References;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};

use crate::devices;

/// Runs a case by its plan on each device and holds the results against the dense-masked oracle.
pub fn check(case: &SparseCase, devices: &[Device]) -> Result<(), String> {
    check_inputs(case, &case.case.inputs(), devices)
}

fn check_inputs(case: &SparseCase, inputs: &Inputs, devices: &[Device]) -> Result<(), String> {
    #[cfg(any(feature = "cuda", feature = "webgpu"))]
    flashover::kernels::device::poison_new_tensors();
    let (problem, dense_inputs) = case.dense(inputs);
    let references = References::of(&problem, &dense_inputs);
    let plan = SparsePlan::from(case.plan());
    let failures = devices.iter().filter_map(|device| {
        let (problem, lse_gradient) = (&case.case.problem, case.case.lse_gradient);
        let results =
            bridge::run_with(problem, inputs, lse_gradient, &device.clone().autodiff(), |options| options.plan(&plan));
        let checked = results.map_err(|error| format!("refused: {error}")).and_then(|results| {
            references.check_forward(&results.o, &results.lse)?;
            references.check_gradients(results.gradients)
        });
        checked.err().map(|message| format!("{} under {plan:?} on {device:?}:\n{message}", case.case.name()))
    });
    let failures: Vec<String> = failures.collect();
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

fn all_agree(cases: impl Iterator<Item = (String, SparseCase)>, devices: &[Device]) {
    let (mut failures, mut count) = (Vec::new(), 0);
    for (name, case) in cases {
        count += 1;
        if let Err(message) = check(&case, devices) {
            println!("FAILED {name}: {message}");
            failures.push(format!("{name}: {message}\n{:?}", case.mask));
        }
    }
    let shown = failures.iter().take(5).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {count} cases failed, the first:\n{shown}", failures.len());
}

fn runner() -> TestRunner {
    TestRunner::new_with_rng(Config::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha))
}

/// A random case of any options, with at least 64 queries and keys.
fn long_case(element: Element, runner: &mut TestRunner) -> Case {
    loop {
        let case = cases(element).new_tree(runner).expect("a case").current();
        if case.problem.seq_q.min(case.problem.seq_kv) >= 64 {
            return case;
        }
    }
}

/// Tiles of any size of which each length has at least eight.
fn small_tiles(problem: &Problem, rng: &mut Rng) -> TileSize {
    let mut size = |length: usize| {
        let most = (length - 1) / 7;
        (most / 2 + 1 + rng.below(most - most / 2)) as u32
    };
    TileSize { bq: size(problem.seq_q), bk: size(problem.seq_kv) }
}

const ELEMENTS: [Element; 5] = [Element::F32, Element::F32, Element::F64, Element::BF16, Element::F32];

#[test]
fn every_kind_of_mask_agrees_on_flex() {
    let (mut runner, mut rng) = (runner(), Rng::new(1));
    let mut cases = Vec::new();
    for n in 0..3 * KINDS.len() {
        let case = long_case(ELEMENTS[n % ELEMENTS.len()], &mut runner);
        let tile = small_tiles(&case.problem, &mut rng);
        let mask = kind(n % KINDS.len(), Extent::from(&case.problem), tile, &mut rng);
        cases.push((KINDS[n % KINDS.len()].to_string(), SparseCase { case, mask, tile }));
    }
    all_agree(cases.into_iter(), &[devices::flex()]);
}

#[test]
fn random_combinations_agree_on_flex() {
    let (mut runner, mut rng) = (runner(), Rng::new(2));
    let cases = (0..500).map(|n| {
        let case = long_case(ELEMENTS[n % ELEMENTS.len()], &mut runner);
        let tile = small_tiles(&case.problem, &mut rng);
        let mask = combination(Extent::from(&case.problem), tile, &mut rng);
        let case = SparseCase { case, mask, tile };
        let plan = case.plan();
        assert!(plan.query_tiles() >= 8 && plan.key_tiles() >= 8, "{plan}");
        assert!(kinds_of_tiles(&plan).iter().all(|&fraction| fraction >= 0.2), "{plan}");
        (format!("combination {n}"), case)
    });
    all_agree(cases, &[devices::flex()]);
}

/// Tiles that several of Flex's own make up, in queries and in keys, with lengths that end within them.
#[test]
fn large_tiles_agree_on_flex() {
    let mut rng = Rng::new(3);
    let mut cases = Vec::new();
    for (n, (bq, bk)) in [(64, 64), (128, 128), (128, 256), (96, 160), (192, 40), (256, 128)].into_iter().enumerate() {
        let (seq_q, seq_kv) = (500 + 131 * n % 300, 700 - 97 * n % 300);
        let problem = gpu_problem([1, 2, 1], [seq_q, seq_kv], Element::F32);
        let tile = TileSize { bq, bk };
        let mask = combination(Extent::from(&problem), TileSize { bq: 32, bk: 32 }, &mut rng);
        let problem = Problem { band: Band { causal: true, left: 300, right: UNBOUNDED, sinks: 5 }, ..problem };
        cases.push((format!("{tile:?}"), SparseCase { case: Case::new(problem, n as u64), mask, tile }));
    }
    all_agree(cases.into_iter(), &[devices::flex()]);
}

/// `[B, Hq, Hkv]` and `[Sq, Skv]`.
fn gpu_problem([b, hq, hkv]: [usize; 3], [seq_q, seq_kv]: [usize; 2], element: Element) -> Problem {
    Problem::new([b, hq, seq_q, 16], [b, hkv, seq_kv, 16], [b, hkv, seq_kv, 24], element).expect("sound")
}

/// What is put beside a plan on a GPU and on what composes.
fn options(n: usize, plain: Problem) -> Problem {
    let [b, h, q, k] = plain.score_shape();
    match n % 8 {
        0 => plain,
        1 => Problem { band: Band { causal: true, left: 100, right: UNBOUNDED, sinks: 40 }, ..plain },
        2 => Problem { alibi: true, key_lengths: true, ..plain },
        3 => Problem { bias: Some([1, h, 1, k]), mask: Some([b, 1, q, k]), ..plain },
        4 => Problem { dropout: Some(Dropout { probability: 0.3, seed: 5 }), learned_sinks: true, ..plain },
        5 => Problem { bias: Some([b, 1, q, k]), softcap: Some(2.0), ..plain },
        6 => Problem { bias: Some([1, 1, q, 1]), band: Band::causal(), key_lengths: true, ..plain },
        _ => Problem { learned_sinks: true, band: Band::causal(), softcap: Some(3.0), alibi: true, ..plain },
    }
}

const GPU_TILES: [(u32, u32); 3] = [(32, 32), (64, 32), (32, 64)];

/// Tiles that the matrix kernels walk.
#[cfg(feature = "cuda")]
const MATRIX_TILES: [(u32, u32); 3] = [(128, 128), (128, 64), (256, 128)];

fn gpu_case(n: usize, element: Element, tiles: [(u32, u32); 3], rng: &mut Rng) -> SparseCase {
    let (bq, bk) = tiles[n % tiles.len()];
    let heads = [[1, 2, 1], [2, 2, 2], [1, 4, 2], [2, 1, 1]][n % 4];
    // At least eight tiles a side, ending within one or with one.
    let length =
        |size: u32, rng: &mut Rng| size as usize * 8 - if rng.chance(0.7) { rng.below(size as usize) } else { 0 };
    let lengths = [length(bq, rng), length(bk, rng)];
    let problem = options(n, gpu_problem(heads, lengths, element));
    let tile = TileSize { bq, bk };
    let mask = combination(Extent::from(&problem), tile, rng);
    SparseCase { case: Case { lse_gradient: n.is_multiple_of(2), ..Case::new(problem, n as u64) }, mask, tile }
}

#[test]
fn random_combinations_agree_on_the_gpu() {
    let Some(device) = devices::gpu() else {
        return devices::skip("sparse::random_combinations_agree_on_the_gpu", "this build has no GPU backend");
    };
    let count = std::env::var("FLASHOVER_SPARSE_GPU").ok().and_then(|n| n.parse().ok()).unwrap_or(40);
    let mut rng = Rng::new(4);
    let cases = (0..count).map(|n| (format!("combination {n}"), gpu_case(n, Element::F32, GPU_TILES, &mut rng)));
    all_agree(cases, &[device]);
}

/// On what the matrix kernels run on; on a software GPU these would be hours.
#[cfg(feature = "cuda")]
#[test]
fn matrix_kernels_agree_under_a_plan() {
    let device = devices::gpu().expect("a CUDA build has one");
    let mut rng = Rng::new(6);
    let elements = [Element::BF16, Element::F16];
    let cases = (0..48).map(|n| {
        let case = gpu_case(n, elements[n / 3 % 2], MATRIX_TILES, &mut rng);
        (format!("combination {n}"), case)
    });
    all_agree(cases, &[device]);
}

#[test]
fn every_kind_of_mask_agrees_on_the_gpu() {
    let Some(device) = devices::gpu() else {
        return devices::skip("sparse::every_kind_of_mask_agrees_on_the_gpu", "this build has no GPU backend");
    };
    let mut rng = Rng::new(5);
    let cases = (0..KINDS.len()).map(|n| {
        let problem = options(n, gpu_problem([2, 2, 1], [100, 139], Element::F32));
        let tile = TileSize { bq: 32, bk: 32 };
        let mask = kind(n, Extent::from(&problem), tile, &mut rng);
        (KINDS[n].to_string(), SparseCase { case: Case::new(problem, n as u64), mask, tile })
    });
    all_agree(cases, &[device]);
}

#[test]
fn compositions_agree() {
    for (name, device) in devices::chunked() {
        let mut rng = Rng::new(6);
        let cases = (0..16).map(|n| (format!("{name} {n}"), gpu_case(n, Element::F32, GPU_TILES, &mut rng)));
        all_agree(cases, &[device]);
    }
}

/// A block row without blocks, and a block column without.
fn with_gaps(extent: Extent) -> Mask {
    let (rows, columns) = (extent.seq_q.div_ceil(32), extent.seq_kv.div_ceil(32));
    let (mut starts, mut listed) = (vec![0], Vec::new());
    for row in 0..rows {
        listed.extend((0..columns).filter(|column| row != 1 && *column != 2 && !(row + column).is_multiple_of(3)));
        starts.push(listed.len() as u32);
    }
    Mask::from_blocks(BlockTable { block: [32, 32], batch: 1, heads: 1, starts, columns: listed })
}

#[test]
fn what_no_block_shows_is_zero_and_minus_infinity() {
    let problem = gpu_problem([1, 4, 2], [130, 200], Element::F32);
    let inputs = Inputs::random(&problem, 9);
    let (tile, extent) = (TileSize { bq: 32, bk: 32 }, Extent::from(&problem));
    let everywhere = devices::native().into_iter().chain(devices::chunked().into_iter().map(|(_, device)| device));
    for device in everywhere.map(Device::autodiff) {
        for mask in [Mask::Nothing, with_gaps(extent)] {
            let plan = SparsePlan::with_tile(&mask, problem.score_shape(), tile).expect("sound");
            let results =
                bridge::run_with(&problem, &inputs, true, &device, |options| options.plan(&plan)).expect("sound");
            let rows = if mask == Mask::Nothing { 0..130 } else { 32..64 };
            let keys = if mask == Mask::Nothing { 0..200 } else { 64..96 };
            let (dq, dk, dv) = (results.gradients.q, results.gradients.k, results.gradients.v);
            let mut zeros = 0;
            for (x, length, width, hidden) in [
                (&results.o, 130, 24, &rows),
                (dq.as_ref().expect("tracked"), 130, 16, &rows),
                (dk.as_ref().expect("tracked"), 200, 16, &keys),
                (dv.as_ref().expect("tracked"), 200, 24, &keys),
            ] {
                for (n, x) in x.chunks_exact(width).enumerate() {
                    let seen = !hidden.contains(&(n % length));
                    assert_eq!(x.iter().any(|&x| x != 0.0), seen, "row {n} of {length} on {device:?}: {x:?}");
                    zeros += usize::from(!seen);
                }
            }
            assert!(zeros > 0);
            for (n, &lse) in results.lse.iter().enumerate() {
                assert_eq!(lse == f64::NEG_INFINITY, rows.contains(&(n % 130)), "lse {n} on {device:?}: {lse}");
                assert!(!lse.is_nan());
            }
        }
    }
}

#[test]
fn a_plan_is_used_again_and_again() {
    let mask = Mask::causal() & Mask::window(70, 0);
    let plan = SparsePlan::with_tile(&mask, [1, 2, 200, 200], TileSize { bq: 32, bk: 64 }).expect("sound");
    for device in devices::native().into_iter().map(Device::autodiff) {
        let run = |options: &AttentionOptions, heads: usize| {
            let q = Tensor::<4>::ones([2, heads, 200, 16], &device).cumsum(2).sin().require_grad();
            let o = attention(q.clone(), q.clone(), q.clone(), options).expect("sound");
            let gradients = o.clone().sin().sum().backward();
            [o.into_data(), q.grad(&gradients).expect("tracked").into_data()]
        };
        let options = AttentionOptions::new().plan(&plan);
        let first = run(&options, 2);
        // A call with other heads in between: the mask is the same for all of them.
        run(&options, 4);
        let fresh = SparsePlan::from(plan.block_plan().clone());
        for again in [run(&options, 2), run(&AttentionOptions::new().plan(&fresh), 2)] {
            for (first, again) in first.iter().zip(again) {
                again.assert_eq(first, true);
            }
        }
        // The same by an option that needs no plan.
        let window = AttentionOptions::new().causal().window(70, 0);
        for (first, dense) in first.iter().zip(run(&window, 2)) {
            dense.assert_approx_eq::<f32>(first, burn::tensor::Tolerance::absolute(1e-5));
        }
    }
}

#[test]
fn a_plan_can_come_from_a_tensor() {
    let mut rng = Rng::new(8);
    let hides: Vec<bool> = (0..70 * 90).map(|_| rng.chance(0.5)).collect();
    let tile = TileSize { bq: 32, bk: 32 };
    for device in devices::native() {
        let mask = Tensor::from_data(burn::tensor::TensorData::new(hides.clone(), [1, 1, 70, 90]), &device);
        let plan = SparsePlan::from_tensor(mask, tile).expect("sound");
        let visible: Vec<bool> = hides.iter().map(|hides| !hides).collect();
        let expected = BlockPlan::from_dense([1, 1, 70, 90], &visible, tile).expect("sound").refine();
        assert_eq!(plan.block_plan(), &expected);
    }
}

#[test]
fn non_finite_operands_reach_only_what_a_plan_shows() {
    let mut rng = Rng::new(7);
    for n in 0..8 {
        let case = gpu_case(n, Element::F32, GPU_TILES, &mut rng);
        // As the other test of non-finite operands: without dropout, of which the oracle keeps 0 · NaN.
        let problem = Problem { dropout: None, ..case.case.problem.clone() };
        let mut inputs = Inputs::random(&problem, n as u64);
        inputs.dlse.fill(0.0);
        let operands = &mut inputs.operands;
        let spoilt = [&mut operands.q, &mut operands.k, &mut operands.v, &mut inputs.do_].into_iter().nth(n % 4);
        let spoilt = spoilt.expect("four tensors");
        for _ in 0..3 {
            let place = rng.below(spoilt.len());
            spoilt[place] = f64::NAN;
        }
        let case = SparseCase { case: Case { problem, seed: n as u64, lse_gradient: false }, ..case };
        check_inputs(&case, &inputs, &devices::native()).unwrap_or_else(|message| panic!("{message}"));
    }
}

fn refused(options: AttentionOptions, device: &Device) -> String {
    let q = Tensor::<4>::zeros([2, 4, 70, 8], device);
    let k = Tensor::<4>::zeros([2, 2, 90, 8], device);
    attention(q, k.clone(), k, &options).expect_err("the call should be refused").to_string()
}

#[test]
fn a_plan_for_something_else_is_refused() {
    let device = devices::flex();
    let plan = |mask: &Mask, shape| SparsePlan::new(mask, shape).expect("sound");
    let of = |mask: &Mask, shape| refused(AttentionOptions::new().plan(&plan(mask, shape)), &device);
    let causal = Mask::causal();
    assert_eq!(of(&causal, [2, 4, 70, 91]), "plan: expected [Sq, Skv] = [70, 90], got [70, 91]");
    assert_eq!(of(&causal, [2, 4, 90, 70]), "plan: expected [Sq, Skv] = [70, 90], got [90, 70]");
    let per_head = Mask::per_head(vec![Mask::causal(), Mask::sinks(3)]);
    assert_eq!(of(&per_head, [2, 2, 70, 90]), "plan: expected heads of 4 or 1, got 2");
    let per_batch = Mask::per_batch(vec![Mask::causal(), Mask::sinks(3), Mask::Nothing]);
    assert_eq!(of(&per_batch, [3, 4, 70, 90]), "plan: expected batch of 2 or 1, got 3");
    let other = Mask::sliding_window(5);
    let (expected, found) = (other.fingerprint(), causal.fingerprint());
    assert_eq!(
        refused(AttentionOptions::new().plan_of(&plan(&causal, [2, 4, 70, 90]), &other), &device),
        format!("plan: expected one for the mask {expected:#018x}, got one for {found:#018x}")
    );
    let q = Tensor::<4>::zeros([2, 4, 70, 8], &device);
    let options = AttentionOptions::new().plan_of(&plan(&causal, [2, 4, 70, 70]), &causal);
    attention(q.clone(), q.clone(), q, &options).expect("the plan is of this mask");
    assert_eq!(
        SparsePlan::with_tile(&causal, [1, 1, 9, 9], TileSize { bq: 0, bk: 4 }).expect_err("no queries").to_string(),
        "queries of a tile: expected at least 1, got 0"
    );
}

#[test]
fn tiles_that_a_gpu_kernel_cannot_walk_are_refused() {
    let Some(device) = devices::gpu() else {
        return devices::skip(
            "sparse::tiles_that_a_gpu_kernel_cannot_walk_are_refused",
            "this build has no GPU backend",
        );
    };
    let tile = TileSize { bq: 48, bk: 64 };
    let plan = SparsePlan::with_tile(&Mask::causal(), [2, 4, 70, 90], tile).expect("sound");
    let message = refused(AttentionOptions::new().plan(&plan), &device);
    let expected =
        "plan: expected tiles of a multiple of [32, 32] queries and keys for the portable kernel, got [48, 64]";
    assert!(message.starts_with("kernel: ") && message.ends_with(expected), "{message}");
}

#[test]
fn top_k_keeps_the_best_tiles_the_diagonal_and_the_sinks() {
    let (tile, sinks, blocks) = (TileSize { bq: 32, bk: 16 }, 20u32, 3usize);
    let problem = Problem::new([2, 4, 150, 8], [2, 2, 170, 8], [2, 2, 170, 8], Element::F32).expect("sound");
    let inputs = Inputs::random(&problem, 12);
    let (extent, mask) = (Extent::from(&problem), Mask::causal());
    let base = BlockPlan::new(&mask, extent, tile).expect("sound");
    let mean = |x: &[f64], head: usize, length: usize, rows: std::ops::Range<u32>| -> Vec<f64> {
        let row = |r: u32| &x[(head * length + r as usize) * 8..][..8];
        (0..8).map(|d| rows.clone().map(|r| row(r)[d]).sum::<f64>() / rows.len() as f64).collect()
    };
    for device in devices::native() {
        let t = bridge::Tensors::new(&problem, &inputs, &device);
        let top_k = TopK::new(blocks as u32).tile(tile.bq, tile.bk).sinks(sinks);
        let plan = top_k.plan(t.q.clone(), t.k.clone(), &mask).expect("sound");
        let mut left_out = 0;
        for (b, h) in [(0, 0), (0, 3), (1, 1), (1, 2)] {
            for i in 0..base.query_tiles() {
                let queries = tile.queries(extent, i);
                let q = mean(&inputs.operands.q, (b * 4 + h) as usize, 150, queries.clone());
                let listed = base.row(b, h, i);
                let mut best: Vec<(f64, u32)> = listed
                    .full
                    .iter()
                    .chain(listed.partial)
                    .map(|&j| {
                        let k = mean(&inputs.operands.k, (b * 2 + h / 2) as usize, 170, tile.keys(extent, j));
                        (-q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>(), j)
                    })
                    .collect();
                best.sort_by(|x, y| x.0.total_cmp(&y.0));
                let mut expected: Vec<u32> = best.iter().take(blocks).map(|&(_, j)| j).collect();
                // Query i stands at i + 20.
                let on_diagonal = |j: u32| j * 16 < queries.end + 20 && (j + 1) * 16 > queries.start + 20;
                expected.extend(best.iter().map(|&(_, j)| j).filter(|&j| on_diagonal(j) || j * 16 < sinks));
                expected.sort_unstable();
                expected.dedup();
                left_out += best.len() - expected.len();
                let row = plan.block_plan().row(b, h, i);
                let mut found = [row.full, row.partial].concat();
                found.sort_unstable();
                assert_eq!(found, expected, "query tile {i} of head {h} of batch element {b} on {device:?}");
            }
        }
        assert!(left_out > 20, "{left_out}");
        let refused = TopK::new(0).plan(t.q.clone(), t.k.clone(), &mask).expect_err("no blocks");
        assert_eq!(refused.to_string(), "top-k blocks: expected at least 1, got 0");
        let all = TopK::new(1000).tile(tile.bq, tile.bk).plan(t.q, t.k, &mask).expect("sound");
        assert_eq!(all.block_plan().row(1, 2, 4), base.row(0, 0, 4), "what the mask shows");
    }
}
