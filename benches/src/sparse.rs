//! Block plans of random blocks against density × the time of the same attention without a plan, in the same run.

use burn::tensor::Device;
use flashover::kernels::mask::Mask;
use flashover::kernels::problem::Problem;
use flashover::{AttentionOptions, SparsePlan};
use flashover_testing::sparse::SparseCase;

use crate::case::{Case, Tensors};
use crate::peers::pattern::Pattern;
use crate::report::{Report, Run};
use crate::{gate, timing};

/// Fractions of blocks that are listed.
const DENSITIES: [f64; 4] = [0.5, 0.25, 0.1, 0.05];

/// Random blocks of 128 × 128: so many in each block row of each head.
fn random_blocks(problem: &Problem, density: f64) -> Mask {
    let (heads, seq) = (problem.heads_q, problem.seq_q);
    Pattern::RandomBlocks { listed: Pattern::listed(seq, density) }.mask(heads, seq).expect("blocks are a mask")
}

/// Forward and backward of a dense case at each density: the peer is `density × dense`, so a ratio of 1 is in proportion.
pub fn densities(run: &Run, repeats: usize, case: &Case, device: &Device, report: &mut Report) -> Result<(), String> {
    let short = case.shortened(700);
    for density in DENSITIES {
        let mask = random_blocks(&short.problem, density);
        let case = flashover_testing::data::Case::new(short.problem.clone(), 17);
        gate::check_plan(&SparseCase { case, mask, tile: SparsePlan::TILE }, device)?;
    }
    let device = device.clone().autodiff();
    let t = case.tensors(&device);
    let plans = DENSITIES.map(|density| {
        SparsePlan::new(&random_blocks(&case.problem, density), case.problem.score_shape()).expect("a sound mask")
    });
    let (mut dense_samples, mut samples) = (Vec::new(), Vec::new());
    for repeat in 0..=repeats {
        let dense = forward_backward(case, &t, &device, None);
        let sparse = plans.each_ref().map(|plan| forward_backward(case, &t, &device, Some(plan)));
        if repeat > 0 {
            dense_samples.push(dense);
            samples.push(sparse);
        }
    }
    for (n, plan) in plans.iter().enumerate() {
        let density = plan.block_plan().density();
        let name = format!("{}_density{density:.3}", case.name());
        for (metric, part) in [("forward_ms", 0), ("backward_ms", 1)] {
            let ours = timing::median(samples.iter().map(|sample| sample[n][part]).collect());
            let dense = timing::median(dense_samples.iter().map(|sample| sample[part]).collect());
            report.push(run.less(&name, metric, ours, Some(("density_x_dense", density * dense))))?;
        }
    }
    Ok(())
}

/// Milliseconds of a forward and of a backward.
fn forward_backward(case: &Case, t: &Tensors, device: &Device, plan: Option<&SparsePlan>) -> [f64; 2] {
    let options = plan.map_or_else(AttentionOptions::new, |plan| AttentionOptions::new().plan(plan));
    let sync = || device.sync().expect("the device answers");
    let (o, forward) = timing::milliseconds(|| {
        let o = case.ours_with(t, options);
        sync();
        o
    });
    let loss = o.sum();
    sync();
    let (gradients, backward) = timing::milliseconds(|| {
        let gradients = loss.backward();
        sync();
        gradients
    });
    drop(gradients);
    [forward, backward]
}
