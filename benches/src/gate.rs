//! No figure without a right answer: each case, shortened to what the oracle can do quickly, against f64.

use burn::tensor::Device;
use flashover::SparsePlan;
use flashover_testing::bridge;
use flashover_testing::data::Inputs;
use flashover_testing::sparse::SparseCase;
use flashover_testing::tolerance::References;

use crate::case::Case;

/// Length to which a case is shortened.
const GATE_LENGTH: usize = 300;

/// Checks output, log-sum-exp and all gradients of the shortened case.
pub fn check(case: &Case, device: &Device) -> Result<(), String> {
    let short = case.shortened(GATE_LENGTH);
    let problem = &short.problem;
    let inputs = Inputs::random(problem, 17);
    let actual = bridge::run(problem, &inputs, true, &device.clone().autodiff()).map_err(|error| error.to_string())?;
    let references = References::of(problem, &inputs);
    references.check_forward(&actual.o, &actual.lse)?;
    references.check_gradients(actual.gradients)?;
    Ok(())
}

/// The same of a case under its plan, against the dense mask that says the same.
pub fn check_plan(case: &SparseCase, device: &Device) -> Result<(), String> {
    let inputs = case.case.inputs();
    let (problem, dense) = case.dense(&inputs);
    let plan = SparsePlan::from(case.plan());
    let device = device.clone().autodiff();
    let actual = bridge::run_with(&case.case.problem, &inputs, true, &device, |options| options.plan(&plan));
    let actual = actual.map_err(|error| error.to_string())?;
    let references = References::of(&problem, &dense);
    references.check_forward(&actual.o, &actual.lse)?;
    references.check_gradients(actual.gradients)?;
    Ok(())
}
