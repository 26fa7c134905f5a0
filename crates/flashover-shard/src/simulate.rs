//! A small model of a kind, run under a layout on a mesh of logical chips, and held against the unsharded model and
//! against the bytes that the layout's specs promise.

use burn::tensor::{Device, Tensor};
use serde::Serialize;

use crate::architecture::Architecture;
use crate::error::ShardError;
use crate::layout::{AttentionLayout, Layout, WeightLayout};
use crate::mesh::Mesh;
use crate::model::{Output, ShardedModel, Unsharded, check_ranks, greedy};
use crate::transport::{Row, Section};
use crate::workload::Phase;

/// The largest difference of a logit, as a part of the largest logit, that f32 sums in another order may make.
pub const TOLERANCE: f64 = 1e-5;

/// Tokens that are generated after the prompt.
const GENERATED: usize = 3;

/// A run of a small model under one layout.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Simulation {
    /// The small model.
    pub model: Architecture,
    /// The logical chips.
    pub mesh: Mesh,
    /// Sequences.
    pub batch: usize,
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Seed of weights and prompt.
    pub seed: u64,
    /// Collective steps that moved the cache from where prefill left it to where decoding reads it, if it lies otherwise.
    pub moved: Vec<Row>,
    /// Prefill, then decoding.
    pub phases: Vec<PhaseRun>,
}

impl Simulation {
    /// The largest [`PhaseRun::difference`]; NaN if one is.
    pub fn difference(&self) -> f64 {
        self.phases.iter().map(|phase| phase.difference).fold(0.0, larger)
    }

    /// Whether logits, tokens and bytes are as they must be.
    pub fn agrees(&self) -> bool {
        self.moved.iter().all(Row::agrees) && self.phases.iter().all(PhaseRun::agrees)
    }
}

/// What a phase moved and gave.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PhaseRun {
    /// The phase.
    pub phase: Phase,
    /// Its layout.
    pub layout: Layout,
    /// The largest difference of a logit from the unsharded model's, as a part of the largest logit.
    pub difference: f64,
    /// Whether the likeliest tokens are the same.
    pub same_tokens: bool,
    /// Every collective step of one pass; of decoding, of the last.
    pub rows: Vec<Row>,
}

impl PhaseRun {
    /// Payload bytes a block and chip: derived, and the least and the most that a chip counted.
    pub fn layer_payload(&self) -> (u64, u64, u64) {
        let rows = || self.rows.iter().filter(|row| row.section == Section::Layer);
        (
            rows().map(|row| row.predicted_payload).sum(),
            rows().map(|row| row.least.payload).sum(),
            rows().map(|row| row.most.payload).sum(),
        )
    }

    /// Sent bytes a block and chip, in the same way.
    pub fn layer_sent(&self) -> (u64, u64, u64) {
        let rows = || self.rows.iter().filter(|row| row.section == Section::Layer);
        (
            rows().map(|row| row.predicted_sent).sum(),
            rows().map(|row| row.least.sent).sum(),
            rows().map(|row| row.most.sent).sum(),
        )
    }

    /// Whether logits, tokens and bytes are as they must be.
    pub fn agrees(&self) -> bool {
        self.difference <= TOLERANCE && self.same_tokens && self.rows.iter().all(Row::agrees)
    }
}

/// A model of the same kind (block, norm, feed-forward layer, number of heads) that is small and divides by the mesh:
/// two blocks, heads of 8, `E` about 64, a vocabulary of 97 that has to be padded.
///
/// # Errors
///
/// If the model is not sound or the mesh has more chips than can be simulated.
pub fn small(model: &Architecture, mesh: &Mesh) -> Result<Architecture, ShardError> {
    model.validate()?;
    check_ranks(mesh)?;
    let model_dim = 64_usize.next_multiple_of(mesh.chips());
    Ok(Architecture {
        name: format!("small-{}", model.name),
        layers: model.layers.min(2),
        model_dim,
        ff_dim: 2 * model_dim,
        head_dim: 8,
        vocabulary: 97,
        ..model.clone()
    })
}

/// The layout that decodes after a prefill under `layout` if none is asked for: itself; where weights are gathered and the
/// sequence is sharded, the 2D weight-stationary one, because one token cannot be sharded.
pub fn decoding_after(layout: Layout) -> Layout {
    let stationary = matches!(layout.weights, WeightLayout::Stationary1D | WeightLayout::Stationary2D);
    let ring = layout.attention == AttentionLayout::Sequence;
    let weights = if ring && !stationary { WeightLayout::Stationary2D } else { layout.weights };
    Layout { weights, ..layout }
}

/// Runs a [`small`] model: a prompt under one layout, then token by token under another, with the likeliest token each
/// time. The cache moves in between, if it lies otherwise.
///
/// # Errors
///
/// As [`small`], and if the layouts store weights differently, a dimension does not divide or the run fails.
pub fn simulate(
    model: &Architecture,
    mesh: &Mesh,
    (prefill, decode): (Layout, Layout),
    seed: u64,
    device: &Device,
) -> Result<Simulation, ShardError> {
    let small = small(model, mesh)?;
    let layouts = [prefill, decode];
    let ring = layouts.iter().any(|layout| layout.attention == AttentionLayout::Sequence);
    let prompt = if ring { 8_usize.next_multiple_of(mesh.chips()) } else { 8 };
    let mut sharded = ShardedModel::new(small.clone(), mesh.clone(), &layouts, seed, prompt + GENERATED, device)?;
    let unit = |layout: Layout| layout.batch_unit(&small, mesh, Phase::Prefill, sharded.options());
    // Both are products of axes; where neither divides the other, all chips do for both.
    let (a, b) = (unit(prefill)?, unit(decode)?);
    let unit = if a.max(b).is_multiple_of(a.min(b)) { a.max(b) } else { mesh.chips() };
    let batch = 2_usize.next_multiple_of(unit);
    let unsharded = Unsharded::new(small.clone(), seed, device)?;
    let token = |b: usize, l: usize| ((b * 31 + l * l * 7 + l + seed as usize % 97) % small.vocabulary) as u32;
    let mut tokens: Vec<Vec<u32>> = (0..batch).map(|b| (0..prompt).map(|l| token(b, l)).collect()).collect();

    let found = sharded.prefill(prefill, &tokens, prompt)?;
    let expected = unsharded.logits(&tokens)?;
    let mut phases = vec![run_of(Phase::Prefill, prefill, &found, &expected)?];
    let moved = sharded.reshard_cache(decode)?;
    let mut all: Option<PhaseRun> = None;
    let mut next = greedy(&expected);
    for _ in 0..GENERATED {
        tokens.iter_mut().zip(&next).for_each(|(sequence, &token)| sequence.push(token));
        let found = sharded.decode(decode, &next)?;
        let expected = unsharded.logits(&tokens)?;
        next = greedy(&expected);
        let last = expected.narrow(1, tokens[0].len() - 1, 1);
        let step = run_of(Phase::Decode, decode, &found, &last)?;
        all = Some(match all {
            Some(before) => PhaseRun {
                difference: larger(before.difference, step.difference),
                same_tokens: step.same_tokens && before.same_tokens,
                ..step
            },
            None => step,
        });
    }
    phases.extend(all);
    Ok(Simulation { model: small, mesh: mesh.clone(), batch, prompt, seed, moved, phases })
}

fn run_of(phase: Phase, layout: Layout, found: &Output, expected: &Tensor<3>) -> Result<PhaseRun, ShardError> {
    Ok(PhaseRun {
        phase,
        layout,
        difference: difference(&found.logits, expected),
        same_tokens: found.greedy() == greedy(expected),
        rows: found.rows()?,
    })
}

/// The largest difference of two tensors' elements, as a part of the largest element of `expected`; NaN if one is NaN or the
/// shapes differ.
pub fn difference(found: &Tensor<3>, expected: &Tensor<3>) -> f64 {
    if found.dims() != expected.dims() {
        return f64::NAN;
    }
    let [found, expected] = [found, expected].map(|x| x.to_data().iter::<f64>().collect::<Vec<_>>());
    let largest = expected.iter().map(|x| x.abs()).fold(0.0, larger);
    found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, larger) / largest
}

/// The larger of two numbers, NaN if one is: `f64::max` would drop it.
fn larger(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_is_not_lost() {
        for (numbers, expected) in [(&[1.0, 3.0, 2.0][..], 3.0), (&[][..], 0.0)] {
            assert_eq!(numbers.iter().copied().fold(0.0, larger), expected);
        }
        for numbers in [[f64::NAN, 1.0, 2.0], [1.0, f64::NAN, 2.0], [1.0, 2.0, f64::NAN]] {
            assert!(numbers.into_iter().fold(0.0, larger).is_nan(), "{numbers:?}");
        }
    }
}
