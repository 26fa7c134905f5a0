//! The grid of cases against the f64 oracle, on every backend of the build.
//!
//! All pairs of the grid's factors run always. The whole grid runs with `FLASHOVER_GRID=full`, or a part of it with
//! `FLASHOVER_GRID=full:K/N` (cases K, K+N, K+2N, … of each element type).

use std::time::Instant;

use burn::tensor::{DType, Device};
use flashover::kernels::problem::Element;
use flashover_testing::bridge;
use flashover_testing::data::{Case, Inputs};
use flashover_testing::grid::{all_pairs_cases, full_cases};
use flashover_testing::tolerance::References;

use crate::devices;

/// Longest sequence of the grid.
const LONGEST: usize = 1023;

/// Runs a case on each device and holds every result against the oracle. The error lists what failed, and where.
pub fn check(case: &Case, devices: &[Device]) -> Result<(), String> {
    let start = Instant::now();
    #[cfg(any(feature = "cuda", feature = "webgpu"))]
    flashover::kernels::device::poison_new_tensors();
    let inputs = case.inputs();
    let references = References::of(&case.problem, &inputs);
    let mut times = vec![start.elapsed().as_secs_f64()];
    let mut failures = Vec::new();
    for device in devices {
        let start = Instant::now();
        if let Err(message) = check_on(case, &inputs, &references, device) {
            let failure = format!("{} on {device:?}:\n{message}", case.name());
            println!("FAILED {failure}");
            failures.push(failure);
        }
        times.push(start.elapsed().as_secs_f64());
    }
    println!("{times:.1?} s {}", case.name());
    if failures.is_empty() { Ok(()) } else { Err(failures.join("\n")) }
}

fn check_on(case: &Case, inputs: &Inputs, references: &References, device: &Device) -> Result<(), String> {
    let results = bridge::run(&case.problem, inputs, case.lse_gradient, &device.clone().autodiff())
        .map_err(|error| format!("refused: {error}"))?;
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
    let messages = [
        references.check_forward(&results.o, &results.lse).err(),
        references.check_gradients(results.gradients).err(),
        (!missing.is_empty()).then(|| format!("missing: {}", missing.join(", "))),
    ];
    let messages: Vec<_> = messages.into_iter().flatten().collect();
    if messages.is_empty() { Ok(()) } else { Err(messages.join("\n")) }
}

fn check_all(cases: &[Case], devices: &[Device]) {
    let failures: Vec<String> = cases.iter().filter_map(|case| check(case, devices).err()).collect();
    let shown = failures.iter().take(10).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {} cases failed, the first:\n{shown}", failures.len(), cases.len());
    println!("{} cases agree on {devices:?}", cases.len());
}

/// The part of the whole grid that was asked for.
fn asked(element: Element) -> Option<Vec<Case>> {
    let asked = std::env::var("FLASHOVER_GRID").ok()?;
    let (part, parts) = match asked.strip_prefix("full") {
        Some("") => (0, 1),
        Some(rest) => rest
            .strip_prefix(':')
            .and_then(|rest| rest.split_once('/'))
            .and_then(|(k, n)| Some((k.parse().ok()?, n.parse::<usize>().ok().filter(|&n| n > 0)?)))
            .unwrap_or_else(|| panic!("FLASHOVER_GRID: expected `full` or `full:K/N`, got {asked:?}")),
        None => panic!("FLASHOVER_GRID: expected `full` or `full:K/N`, got {asked:?}"),
    };
    Some(full_cases(element).into_iter().skip(part).step_by(parts).collect())
}

/// The native CPU path, and the GPU of the build where it has the element type.
fn grid(name: &str, element: Element, dtype: DType) {
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
