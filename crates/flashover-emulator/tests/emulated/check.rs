//! Cases held against the oracle: output, log-sum-exp and each gradient apart, within the budget of
//! [`flashover_testing::tolerance`].

use std::time::Instant;

use flashover_kernels::block_plan::BlockPlan;
use flashover_kernels::launch_log::Launch;
use flashover_kernels::problem::Problem;
use flashover_testing::data::{Case, Inputs};
use flashover_testing::grid::case_name;
use flashover_testing::sparse::SparseCase;
use flashover_testing::tolerance::References;

use crate::attention::{Call, run, wanted};

/// Runs cases and holds every result against the oracle; what was launched for all of them.
///
/// # Panics
/// When one fails: then with the messages of all.
pub fn agree(cases: impl IntoIterator<Item = Case>, call: Call) -> Vec<Launch> {
    all(cases.into_iter().map(|case| (case.name(), check(&case, call))), call)
}

/// [`agree`] of cases under plans.
pub fn sparse_agree(cases: impl IntoIterator<Item = SparseCase>, call: Call) -> Vec<Launch> {
    let name = |case: &SparseCase| format!("{} under {}", case.case.name(), case.plan());
    all(cases.into_iter().map(|case| (name(&case), check_sparse(&case, call))), call)
}

fn all(checked: impl Iterator<Item = (String, Result<Vec<Launch>, String>)>, call: Call) -> Vec<Launch> {
    let (mut launches, mut failures, mut count) = (Vec::new(), Vec::new(), 0);
    for (name, result) in checked {
        count += 1;
        match result {
            Ok(launched) => launches.extend(launched),
            Err(message) => failures.push(format!("{name}: {message}")),
        }
    }
    let shown = failures.iter().take(10).cloned().collect::<Vec<_>>().join("\n");
    assert!(failures.is_empty(), "{} of {count} cases failed by {:?}:\n{shown}", failures.len(), call.family);
    launches
}

/// Runs a case and holds its results against the oracle.
fn check(case: &Case, call: Call) -> Result<Vec<Launch>, String> {
    let inputs = case.inputs();
    let problem = call.family.problem(&case.problem);
    check_against(&References::of(&problem, &inputs), &problem, &inputs, None, call)
}

/// The same of a case under a plan, against the dense mask that says the same.
fn check_sparse(case: &SparseCase, call: Call) -> Result<Vec<Launch>, String> {
    let inputs = case.case.inputs();
    let (dense, dense_inputs) = case.dense(&inputs);
    let dense = call.family.problem(&dense);
    let references = References::of(&dense, &dense_inputs);
    let problem = Problem { mask: case.case.problem.mask, ..dense.clone() };
    check_against(&references, &problem, &inputs, Some(&case.plan()), call)
}

/// Runs a problem and holds the results against what is expected.
pub fn check_against(
    expected: &References,
    problem: &Problem,
    inputs: &Inputs,
    plan: Option<&BlockPlan>,
    call: Call,
) -> Result<Vec<Launch>, String> {
    let start = Instant::now();
    let (results, launches) = run(problem, inputs, plan, call)?;
    let again = if call.twice { Some(run(problem, inputs, plan, call)?.0) } else { None };
    println!("{:.1} s {:?} {}", start.elapsed().as_secs_f64(), call.family, case_name(problem));
    let wanted = wanted(problem, call);
    let due = [
        ("dq", wanted.q),
        ("dk", wanted.k),
        ("dv", wanted.v),
        ("dbias", wanted.bias),
        ("dalibi_slopes", wanted.alibi_slopes),
        ("dlearned_sinks", wanted.learned_sinks),
        ("dscore_parameters", wanted.score_parameters),
    ];
    let found = results.named().map(|(name, x)| (name, x.is_some()));
    let wrong: Vec<_> = due.iter().zip(&found[2..]).filter(|(due, found)| due != found).map(|(due, _)| due.0).collect();
    let differ = again.map_or(Vec::new(), |again| results.differing(&again));
    let messages = [
        expected.check_forward(&results.o, &results.lse).err(),
        expected.check_gradients(results.gradients).err(),
        (!wrong.is_empty()).then(|| format!("missing, or not wanted: {}", wrong.join(", "))),
        (!differ.is_empty()).then(|| format!("other bits the second time: {}", differ.join(", "))),
    ];
    let messages: Vec<_> = messages.into_iter().flatten().collect();
    if messages.is_empty() { Ok(launches) } else { Err(messages.join("\n")) }
}
