//! The grid of cases against the f64 oracle, on every backend of the build.
//!
//! All pairs of the grid's factors run always. The whole grid runs with `FLASHOVER_GRID=full`, or a part of it with
//! `FLASHOVER_GRID=full:K/N` (cases K, K+N, K+2N, … of each element type), `FLASHOVER_CASES=TEXT` leaving those whose names
//! contain it: at least one.
//!
//! With `FLASHOVER_KERNEL=portable`, `mma`, `cmma`, `hopper` or `tf32x3`, which is `mma` at that precision, the grid runs on the GPU alone and by that kernel, which must refuse what
//! it cannot run and nothing else.

use std::time::Instant;

use burn::tensor::{DType, Device};
use flashover::AttentionOptions;
use flashover::kernels::problem::{Element, Precision, Problem};
use flashover::kernels::select::KernelChoice;
use flashover_testing::bridge::{self, Results, Tensors};
use flashover_testing::data::{Case, Inputs};
use flashover_testing::grid::{all_pairs_cases, full_cases};
use flashover_testing::layout::Layout;
use flashover_testing::strategy::part;
use flashover_testing::tolerance::References;

use crate::devices;

/// Longest sequence of the grid.
const LONGEST: usize = 1023;

/// How a case is called.
#[derive(Debug, Clone, Copy, Default)]
pub struct Call {
    /// By which kernel.
    pub kernel: KernelChoice,
    /// With which products of f32.
    pub precision: Precision,
    /// How q, k and v lie.
    pub layouts: [Layout; 3],
    /// Once more, for the same bits.
    pub twice: bool,
}

/// Runs a case on each device and holds every result against the oracle. The error lists what failed, and where.
pub fn check(case: &Case, devices: &[Device]) -> Result<(), String> {
    check_call(case, Call::default(), devices)
}

/// [`check`] of a call that says more.
pub fn check_call(case: &Case, call: Call, devices: &[Device]) -> Result<(), String> {
    let start = Instant::now();
    #[cfg(any(feature = "cuda", feature = "webgpu"))]
    flashover::kernels::device::poison_new_tensors();
    let inputs = case.inputs();
    let references = References::of(&case.problem, &inputs);
    let mut times = vec![start.elapsed().as_secs_f64()];
    let mut failures = Vec::new();
    for device in devices {
        let start = Instant::now();
        if let Err(message) = check_on(case, call, &inputs, &references, device) {
            let failure = format!("{} on {device:?}:\n{message}", case.name());
            println!("FAILED {failure}");
            failures.push(failure);
        }
        times.push(start.elapsed().as_secs_f64());
    }
    println!("{times:.1?} s {}", case.name());
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

fn check_on(case: &Case, call: Call, inputs: &Inputs, references: &References, device: &Device) -> Result<(), String> {
    let tensors = Tensors::laid_out(&case.problem, inputs, call.layouts, &device.clone().autodiff());
    let options = |options: AttentionOptions| options.kernel(call.kernel).precision(call.precision);
    let run = || bridge::run_on(&case.problem, &tensors, case.lse_gradient, options);
    let results = run().map_err(|error| format!("refused: {error}"))?;
    let again =
        if call.twice { Some(run().map_err(|error| format!("refused the second time: {error}"))?) } else { None };
    let g = &results.gradients;
    let missing = [
        ("dq", g.q.is_none()),
        ("dk", g.k.is_none()),
        ("dv", g.v.is_none()),
        ("dbias", g.bias.is_none() && case.problem.bias.is_some()),
        ("dalibi_slopes", g.alibi_slopes.is_none() && case.problem.alibi),
        ("dscore_parameters", g.score_parameters.is_none() && case.problem.score.is_some()),
        // Without a gradient of any score of the head, there is still one for its sink.
        ("dlearned_sinks", g.learned_sinks.is_none() && case.problem.learned_sinks),
    ];
    let missing: Vec<_> = missing.iter().filter(|(_, missing)| *missing).map(|(name, _)| *name).collect();
    let differ = again.map_or(Vec::new(), |again| differing(&results, &again));
    let messages = [
        references.check_forward(&results.o, &results.lse).err(),
        references.check_gradients(results.gradients).err(),
        (!missing.is_empty()).then(|| format!("missing: {}", missing.join(", "))),
        (!differ.is_empty()).then(|| format!("other bits the second time: {}", differ.join(", "))),
    ];
    let messages: Vec<_> = messages.into_iter().flatten().collect();
    if messages.is_empty() { Ok(()) } else { Err(messages.join("\n")) }
}

/// Results that are not the same, bit for bit.
fn differing(first: &Results, second: &Results) -> Vec<&'static str> {
    let of = |results: &Results| {
        let g = results.gradients.clone();
        [
            ("o", Some(results.o.clone())),
            ("lse", Some(results.lse.clone())),
            ("dq", g.q),
            ("dk", g.k),
            ("dv", g.v),
            ("dbias", g.bias),
            ("dalibi_slopes", g.alibi_slopes),
            ("dlearned_sinks", g.learned_sinks),
            ("dscore_parameters", g.score_parameters),
        ]
    };
    let bits = |x: &Option<Vec<f64>>| x.as_ref().map(|x| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    let pairs = of(first).into_iter().zip(of(second));
    pairs.filter(|((_, x), (_, y))| bits(x) != bits(y)).map(|((name, _), _)| name).collect()
}

fn check_all(cases: &[Case], devices: &[Device]) {
    let failures: Vec<String> = cases.iter().filter_map(|case| check(case, devices).err()).collect();
    let shown = failures.iter().take(10).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {} cases failed, the first:\n{shown}", failures.len(), cases.len());
    println!("{} cases agree on {devices:?}", cases.len());
}

/// The part of the whole grid that was asked for.
fn asked(element: Element) -> Option<Vec<Case>> {
    let (part, parts) = part("FLASHOVER_GRID")?;
    let mut cases: Vec<Case> = full_cases(element).into_iter().skip(part).step_by(parts).collect();
    if let Ok(text) = std::env::var("FLASHOVER_CASES") {
        cases.retain(|case| case.name().contains(&text));
        assert!(!cases.is_empty(), "FLASHOVER_CASES: no name of a case contains {text:?}");
    }
    Some(cases)
}

/// The call by the kernel that was asked for by name.
fn kernel_asked() -> Option<Call> {
    let name = std::env::var("FLASHOVER_KERNEL").ok()?;
    let (kernel, precision) = match name.as_str() {
        "portable" => (KernelChoice::Portable, Precision::Exact),
        "mma" => (KernelChoice::Mma, Precision::Exact),
        "tf32x3" => (KernelChoice::Mma, Precision::Tf32x3),
        "cmma" => (KernelChoice::Cmma, Precision::Exact),
        "hopper" => (KernelChoice::Hopper, Precision::Exact),
        _ => panic!("FLASHOVER_KERNEL: expected portable, mma, cmma, tf32x3 or hopper, got {name:?}"),
    };
    Some(Call { kernel, precision, ..Call::default() })
}

/// Whether a kernel must refuse a problem, on a GPU that has what the kernel needs.
fn refuses(call: Call, problem: &Problem) -> bool {
    let halves = matches!(problem.element, Element::F16 | Element::BF16);
    let eights = [problem.head_dim, problem.value_dim].iter().all(|dim| dim.is_multiple_of(8));
    match call.kernel {
        KernelChoice::Mma if call.precision == Precision::Tf32x3 => problem.element != Element::F32,
        KernelChoice::Mma => !halves,
        KernelChoice::Hopper => !(halves && eights),
        _ => false,
    }
}

/// Every case by one kernel on the GPU: it refuses what it must, by a message that names it, and nothing else.
fn check_by_name(cases: Vec<Case>, call: Call) {
    let Call { kernel, precision, .. } = call;
    let device = devices::gpu().expect("FLASHOVER_KERNEL asks for a kernel of GPUs, and this build has no GPU backend");
    let (refused, taken): (Vec<Case>, Vec<Case>) = cases.into_iter().partition(|case| refuses(call, &case.problem));
    for case in &refused {
        let options = |options: AttentionOptions| options.kernel(kernel).precision(precision);
        let error = bridge::run_with(&case.problem, &case.inputs(), false, &device, options);
        let message = error.map(drop).expect_err("this kernel cannot run that").to_string();
        let expected = match precision {
            Precision::Exact => {
                format!("kernel: the {} kernel was asked for and cannot run: ", format!("{kernel:?}").to_lowercase())
            }
            _ => format!("precision {precision:?}: expected elements of type F32, got "),
        };
        assert!(message.starts_with(&expected), "{message}");
    }
    println!("{} cases are refused, as they must be", refused.len());
    let failures: Vec<String> =
        taken.iter().filter_map(|case| check_call(case, call, std::slice::from_ref(&device)).err()).collect();
    let shown = failures.iter().take(10).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {} cases failed, the first:\n{shown}", failures.len(), taken.len());
    println!("{} cases agree by {kernel:?} at precision {precision:?}", taken.len());
}

/// The native CPU path, and the GPU of the build where it has the element type.
fn grid(name: &str, element: Element, dtype: DType) {
    if let Some(call) = kernel_asked() {
        return check_by_name(asked(element).unwrap_or_else(|| all_pairs_cases(element, LONGEST)), call);
    }
    let mut on = vec![devices::flex()];
    match devices::gpu() {
        None => devices::skip(name, "this build has no GPU backend"),
        Some(device) if !device.supports_dtype(dtype) => devices::skip(name, "the GPU has no such dtype"),
        Some(device) => on.push(device),
    }
    check_all(&asked(element).unwrap_or_else(|| all_pairs_cases(element, LONGEST)), &on);
}

#[test]
fn f32() {
    grid("grid::f32", Element::F32, DType::F32);
}

#[test]
fn f16() {
    grid("grid::f16", Element::F16, DType::F16);
}

#[test]
fn bf16() {
    grid("grid::bf16", Element::BF16, DType::BF16);
}

/// The contract has f64 on the native CPU path only.
#[test]
fn f64() {
    check_all(&asked(Element::F64).unwrap_or_else(|| all_pairs_cases(Element::F64, LONGEST)), &[devices::flex()]);
}

#[test]
fn compositions() {
    for (name, device) in devices::chunked() {
        println!("{name}");
        check_all(&all_pairs_cases(Element::F32, 211), &[device]);
    }
}
