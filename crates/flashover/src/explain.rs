//! Which kernel runs a call on its device, in which configuration, why, and what it costs: answered from shapes and
//! options alone, without running anything.

use std::fmt;

use burn::tensor::Tensor;
use flashover_kernels::cost;
use flashover_kernels::launch_log::Launch;
use flashover_kernels::operands::Wanted;
use flashover_kernels::problem::Problem;

use crate::boundary::Prepared;
use crate::{AttentionError, AttentionOptions};

/// The answer of [`explain`]. Its `Display` is a few lines for people.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Explanation {
    /// The device, as Burn names it.
    pub device: String,
    /// The kernel family: `flex`, `portable`, `cmma`, `mma`, `hopper`, or `composition`.
    pub kernel: String,
    /// Why this family and configuration, in a sentence.
    pub reason: String,
    /// The launches of a forward, in order; none for a composition, which launches nothing of ours.
    pub forward: Vec<Step>,
    /// The launches of a backward for every float operand of the call, in order; none off an autodiff device.
    pub backward: Vec<Step>,
    /// Floating-point operations of the forward's two products, over the scores that are visible by position and in a block
    /// plan.
    pub forward_flops: u64,
}

/// One launch.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Step {
    /// The launch, as the [launch log](flashover_kernels::launch_log) will record it.
    pub launch: Launch,
    /// Floating-point operations of its products, over the scores that are visible by position and in a block plan.
    pub flops: u64,
    /// Bytes that must move: operands read once, results written once.
    pub bytes: u64,
}

/// Explains a call of [`attention`](crate::attention); on an autodiff device, one with everything tracked.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use flashover::{AttentionOptions, explain};
///
/// let q = Tensor::<4>::zeros([1, 8, 256, 64], &Device::flex());
/// let answer = explain(&q, &q, &q, &AttentionOptions::new().causal())?;
/// assert_eq!(answer.kernel, "flex");
/// println!("{answer}");
/// # Ok::<(), flashover::AttentionError>(())
/// ```
///
/// # Errors
///
/// As the call itself.
pub fn explain(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    options: &AttentionOptions,
) -> Result<Explanation, AttentionError> {
    let device = q.device();
    let prepared = Prepared::new(q.clone(), k.clone(), v.clone(), options)?;
    let plan = prepared.plan();
    let problem = &plan.problem;
    let tracked = device.is_autodiff();
    let wanted = Wanted {
        q: tracked,
        k: tracked,
        v: tracked,
        bias: tracked && problem.bias.is_some(),
        alibi_slopes: tracked && problem.alibi,
        learned_sinks: tracked && problem.learned_sinks,
        score_parameters: tracked && problem.score.is_some(),
    };
    let mut answer = Explanation {
        device: format!("{device:?}"),
        kernel: "composition".into(),
        reason: "no kernel of ours runs there: the backend's own operations do, a chunk of queries at a time".into(),
        forward: Vec::new(),
        backward: Vec::new(),
        forward_flops: products(problem, 1, 1),
    };
    #[cfg(feature = "cubecl-backend")]
    if let Some(selection) = &plan.selection {
        use flashover_kernels::select::OnePassBackward;
        let step = |cost: cost::Cost| Step {
            launch: Launch {
                kernel: cost.kernel,
                config: cost.tile.map_or_else(|| format!("{} units", cost.units), |tile| tile.to_string()),
                bindings: cost.bindings,
                shared_bytes: cost.shared_bytes,
                units: cost.units,
                scratch_bytes: cost.scratch_bytes,
            },
            flops: cost.flops,
            bytes: cost.hbm_bytes,
        };
        answer.kernel = selection.kernel.to_string();
        answer.reason = selection.reason.clone();
        let forward = match (selection.hopper, selection.mma, selection.cmma) {
            (Some(tiles), ..) => cost::hopper_forward(problem, tiles, tracked, tracked && plan.keeps_rest()),
            (None, Some(tiles), _) => cost::mma_forward(problem, tiles, tracked, tracked && plan.keeps_rest()),
            (None, None, Some(tiles)) => cost::cmma_forward(problem, tiles, tracked),
            (None, None, None) => cost::portable_forward(problem, selection.config, tracked),
        };
        answer.forward = forward.into_iter().map(step).collect();
        if tracked {
            let of = match (selection.mma, selection.cmma) {
                (Some(tiles), _) => Some(match selection.one_pass.filter(|_| wanted.operands_together()) {
                    Some(OnePassBackward::Hopper(tiles)) => cost::hopper_backward(problem, tiles, false),
                    Some(OnePassBackward::Mma(of)) => cost::mma_one_pass(problem, of, false),
                    Some(other) => unreachable!("the boundary selects no {other:?}"),
                    None => cost::mma_backward(problem, tiles, wanted, false),
                }),
                (None, Some(tiles)) => Some(cost::cmma_backward(problem, tiles, wanted, false)),
                (None, None) => None,
            };
            // What is not the matrix kernels' is the portable ones'.
            let rest = if of.is_some() { wanted.parameters() } else { wanted };
            let mut backward = of.unwrap_or_default();
            backward.extend(cost::portable_backward(problem, selection.config, rest, false));
            answer.backward = backward.into_iter().map(step).collect();
        }
    }
    #[cfg(feature = "flex")]
    if crate::boundary::is_flex(&device) {
        answer.kernel = "flex".into();
        answer.reason = format!("native code for the CPU, here with {}", crate::flex_simd());
        let bytes = operand_bytes(problem);
        let flops = products(problem, 1, 1);
        answer.forward = vec![Step { launch: crate::flex::forward_launch(problem), flops, bytes }];
        if tracked {
            // S twice, dQ and dK over D; dP twice and dV over Dv: delta takes S and dP for itself.
            // A score function's parameters take both once more.
            let more = u64::from(wanted.score_parameters);
            let flops = products(problem, 4 + more, 3 + more);
            let launch = crate::flex::backward_launch(problem, wanted);
            answer.backward = vec![Step { launch, flops, bytes: 2 * bytes }];
        }
    }
    let _ = wanted;
    if let Some(blocks) = &plan.blocks {
        let (blocks, visits) = (blocks.block_plan(), answer.kernel != "composition");
        let what =
            if visits { "only the tiles of a block plan are visited" } else { "a block plan hides, and saves no time" };
        answer.reason += &format!("; {what}, {:.1} % of all", 100.0 * blocks.density());
    }
    if let Some(score) = problem.score {
        let host = if answer.kernel == "composition" { ", called on the host" } else { "" };
        answer.reason += &format!("; scores pass {} with {} parameters{host}", score.code.name(), score.parameters);
    }
    Ok(answer)
}

/// Floating-point operations of products over visible scores: so many of depth `D` and so many of depth `Dv`.
fn products(problem: &Problem, of_head_dim: u64, of_value_dim: u64) -> u64 {
    let depth = of_head_dim * problem.head_dim as u64 + of_value_dim * problem.value_dim as u64;
    2 * cost::visible_pairs(problem) * depth
}

/// Bytes of q, k, v and o.
#[cfg(feature = "flex")]
fn operand_bytes(problem: &Problem) -> u64 {
    let p = problem;
    let dims = p.head_dim + p.value_dim;
    let elements = p.batch * (p.heads_q * p.seq_q + p.heads_kv * p.seq_kv) * dims;
    (elements * p.element.bytes()) as u64
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} on {}: {}", self.kernel, self.device, self.reason)?;
        writeln!(f, "forward: {:.3} GFLOP", self.forward_flops as f64 / 1e9)?;
        for (part, steps) in [("forward", &self.forward), ("backward", &self.backward)] {
            for step in steps {
                let Launch { kernel, config, scratch_bytes, .. } = &step.launch;
                writeln!(
                    f,
                    "  {part}: {kernel} [{config}] {:.3} GFLOP, {:.2} MiB moved at least, {:.2} MiB scratch",
                    step.flops as f64 / 1e9,
                    step.bytes as f64 / (1 << 20) as f64,
                    *scratch_bytes as f64 / (1 << 20) as f64,
                )?;
            }
        }
        Ok(())
    }
}
