//! `--simulate`: the chosen layouts run with a small model on logical chips.

use std::io::Write;

use burn::tensor::Device;
use flashover_shard::ShardError;
use flashover_shard::architecture::Architecture;
use flashover_shard::layout::WeightLayout;
use flashover_shard::planner::{Plan, Query};
use flashover_shard::simulate::{PhaseRun, Simulation, TOLERANCE, decoding_after, simulate};
use flashover_shard::transport::{Row, Section};
use flashover_shard::workload::Phase;

use super::PlanError;

/// Seed of weights and prompts.
const SEED: u64 = 1;

/// Runs the fastest plan of each phase: prefill, then decoding, if they share mesh and stored weights; each with its own
/// prefill and decoding otherwise.
///
/// # Errors
///
/// If a small model of the layout cannot be made or run.
pub fn run(query: &Query, points: &[(Phase, Vec<&Plan>)]) -> Result<Vec<Simulation>, ShardError> {
    let fastest: Vec<_> = points.iter().filter_map(|(_, plans)| plans.first().copied()).collect();
    let runs = match fastest[..] {
        [prefill, decode] if prefill.mesh == decode.mesh && share_weights(prefill, decode) => {
            vec![(&prefill.mesh, (prefill.layout(), decode.layout()))]
        }
        _ => fastest.iter().map(|plan| (&plan.mesh, (plan.layout(), decoding_after(plan.layout())))).collect(),
    };
    let device = Device::flex();
    runs.into_iter().map(|(mesh, layouts)| simulate(&query.model, mesh, layouts, SEED, &device)).collect()
}

/// Whether two plans store weights alike: all do but the one-dimensional layout.
fn share_weights(a: &Plan, b: &Plan) -> bool {
    let one_dimensional = |plan: &Plan| plan.weight_layout == WeightLayout::Stationary1D;
    one_dimensional(a) == one_dimensional(b)
}

/// Writes bytes and logits of every run.
///
/// # Errors
///
/// If the output cannot be written.
pub fn table(out: &mut impl Write, simulations: &[Simulation]) -> Result<(), PlanError> {
    for Simulation { model, mesh, batch, prompt, moved, phases, .. } in simulations {
        let Architecture { name, layers, model_dim, ff_dim, heads, kv_heads, .. } = model;
        writeln!(
            out,
            "\nsimulated in f32 on {mesh}: {name} of {layers} blocks, E {model_dim}, F {ff_dim}, {heads} heads, {kv_heads} key \
             heads; {batch} sequences of {prompt} tokens"
        )?;
        for (i, phase) in phases.iter().enumerate() {
            if i > 0 && !moved.is_empty() {
                writeln!(out, "cache moved from prefill's layout to decoding's, bytes a block and chip:")?;
                rows(out, moved)?;
            }
            one(out, phase)?;
        }
    }
    Ok(())
}

fn one(out: &mut impl Write, phase: &PhaseRun) -> Result<(), PlanError> {
    writeln!(
        out,
        "{} {}, bytes a block and chip, counted by the least and the most of the chips:",
        phase.phase, phase.layout
    )?;
    rows(out, &phase.rows)?;
    let ((payload, least, most), (sent, sent_least, sent_most)) = (phase.layer_payload(), phase.layer_sent());
    writeln!(
        out,
        "  {:<14} {:<5} {payload:>10} {least:>10} {most:>10} {sent:>10} {sent_least:>10} {sent_most:>10}",
        "all", ""
    )?;
    writeln!(
        out,
        "  largest logit difference from the unsharded model: {:.1e} of the largest logit; tokens {}",
        phase.difference,
        if phase.same_tokens { "equal" } else { "differ" }
    )?;
    Ok(())
}

fn rows(out: &mut impl Write, rows: &[Row]) -> Result<(), PlanError> {
    writeln!(
        out,
        "  {:<14} {:<5} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}  tensors",
        "step", "axes", "payload", "least", "most", "sent", "least", "most"
    )?;
    for row in rows.iter().filter(|row| row.section == Section::Layer) {
        let axes: String = row.axes.iter().map(|axis| axis.letter()).collect();
        writeln!(
            out,
            "  {:<14} {axes:<5} {:>10} {:>10} {:>10} {:>10} {:>10} {:>10}  {}",
            row.collective,
            row.predicted_payload,
            row.least.payload,
            row.most.payload,
            row.predicted_sent,
            row.least.sent,
            row.most.sent,
            row.tensors.join(" ")
        )?;
    }
    Ok(())
}

/// Refuses a run whose bytes, logits or tokens are not as they must be.
///
/// # Errors
///
/// If there is one; the message counts what is wrong.
pub fn verdict(simulations: &[Simulation]) -> Result<(), PlanError> {
    if simulations.iter().all(Simulation::agrees) {
        return Ok(());
    }
    let phases = || simulations.iter().flat_map(|simulation| &simulation.phases);
    let rows =
        phases().flat_map(|phase| &phase.rows).chain(simulations.iter().flat_map(|simulation| &simulation.moved));
    let differences: Vec<_> = simulations.iter().map(|run| format!("{:.1e}", run.difference())).collect();
    Err(PlanError::Simulation(format!(
        "expected the derived bytes, the unsharded model's tokens, and logits within {TOLERANCE:e}; got {} steps with other \
         bytes, {} phases with other tokens, logits off by {}",
        rows.filter(|row| !row.agrees()).count(),
        phases().filter(|phase| !phase.same_tokens).count(),
        differences.join(" and ")
    )))
}
