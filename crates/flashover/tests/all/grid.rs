//! The grid of cases against the f64 oracle, on every backend of the build.
//!
//! All pairs of the grid's factors run always. The whole grid runs with `FLASHOVER_GRID=full`, or a part of it with
//! `FLASHOVER_GRID=full:K/N` (cases K, K+N, K+2N, … of each element type).

use burn::tensor::{DType, Device};
use flashover::kernels::problem::Element;
use flashover_testing::bridge;
use flashover_testing::data::Case;
use flashover_testing::grid::{all_pairs_cases, full_cases};
use flashover_testing::tolerance::{check_forward, check_gradients};

use crate::devices;

/// Runs a case and holds every result against the oracle.
pub fn check(case: &Case, device: &Device) -> Result<(), String> {
    let inputs = case.inputs();
    let results = bridge::run(&case.problem, &inputs, case.lse_gradient, device)
        .map_err(|error| format!("{}: refused: {error}", case.name()))?;
    let forward = check_forward(&case.problem, &inputs, &results.o, &results.lse);
    let backward = check_gradients(&case.problem, &inputs, &results.gradients);
    let missing = [
        ("dq", results.gradients.q.is_none()),
        ("dk", results.gradients.k.is_none()),
        ("dv", results.gradients.v.is_none()),
        ("dbias", results.gradients.bias.is_none() && case.problem.bias.is_some()),
        ("dalibi_slopes", results.gradients.alibi_slopes.is_none() && case.problem.alibi),
        // Without a gradient of any score of the head, there is still one for its sink.
        ("dlearned_sinks", results.gradients.learned_sinks.is_none() && case.problem.learned_sinks),
    ];
    let missing: Vec<_> = missing.iter().filter(|(_, missing)| *missing).map(|(name, _)| *name).collect();
    let missing = if missing.is_empty() { Ok(()) } else { Err(format!("missing: {}", missing.join(", "))) };
    match (forward, backward, missing) {
        (Ok(_), Ok(_), Ok(())) => Ok(()),
        (forward, backward, missing) => {
            let messages = [forward.err(), backward.err(), missing.err()];
            Err(format!("{}:\n{}", case.name(), messages.into_iter().flatten().collect::<Vec<_>>().join("\n")))
        }
    }
}

fn check_all(cases: &[Case], device: &Device) {
    let device = device.clone().autodiff();
    let failures: Vec<String> = cases
        .iter()
        .filter_map(|case| {
            let start = std::time::Instant::now();
            let failure = check(case, &device).err();
            println!("{:.1} s {}", start.elapsed().as_secs_f64(), case.name());
            failure
        })
        .collect();
    let shown = failures.iter().take(10).cloned().collect::<Vec<_>>().join("\n");
    assert!(
        failures.is_empty(),
        "{} of {} cases on {device:?} failed, the first:\n{shown}",
        failures.len(),
        cases.len()
    );
    println!("{} cases on {device:?}", cases.len());
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

fn on_flex(element: Element) {
    check_all(&asked(element).unwrap_or_else(|| all_pairs_cases(element, 1023)), &devices::flex());
}

#[test]
fn flex_f32() {
    on_flex(Element::F32);
}

#[test]
fn flex_f16() {
    on_flex(Element::F16);
}

#[test]
fn flex_bf16() {
    on_flex(Element::BF16);
}

#[test]
fn flex_f64() {
    on_flex(Element::F64);
}

#[test]
fn compositions() {
    for (name, device) in devices::chunked() {
        println!("{name}");
        check_all(&all_pairs_cases(Element::F32, 211), &device);
    }
}

/// Longest sequence on the GPU of the build: a software GPU, which CI has, takes minutes for what a real one does at once.
const GPU_LENGTH: usize = if cfg!(feature = "cuda") { 1023 } else { 113 };

fn on_gpu(name: &str, element: Element, dtype: DType) {
    let Some(device) = devices::gpu() else {
        return devices::skip(name, "this build has no GPU backend");
    };
    if !device.supports_dtype(dtype) {
        return devices::skip(name, "the device has no such dtype");
    }
    check_all(&asked(element).unwrap_or_else(|| all_pairs_cases(element, GPU_LENGTH)), &device);
}

#[test]
fn gpu_f32() {
    on_gpu("grid::gpu_f32", Element::F32, DType::F32);
}

#[test]
fn gpu_f16() {
    on_gpu("grid::gpu_f16", Element::F16, DType::F16);
}

#[test]
fn gpu_bf16() {
    on_gpu("grid::gpu_bf16", Element::BF16, DType::BF16);
}
