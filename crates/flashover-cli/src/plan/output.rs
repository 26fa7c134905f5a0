//! A sweep as a table, as JSON, as CSV, and in words.

use std::collections::BTreeSet;
use std::io::Write;

use flashover_shard::ShardError;
use flashover_shard::planner::{Crossover, Plan, Point, Query, Sweep, crossovers, pareto};
use flashover_shard::report::{Seconds, Why, why};
use flashover_shard::simulate::Simulation;
use flashover_shard::workload::Phase;
use serde::Serialize;

use super::PlanError;

/// Of each phase, the plans that no other beats in both latency and chip-seconds a token. MFU is `2N` FLOPs over
/// chip-seconds a token and the peak, so the frontier of latency against MFU has the same plans.
pub fn frontier<'a>(query: &Query, sweep: &'a Sweep) -> Vec<(Phase, Vec<&'a Plan>)> {
    let of = |&phase: &Phase| {
        let winners = sweep.winners().filter(|plan| plan.point.phase == phase);
        (phase, pareto(winners, |plan| plan.cost.chip_seconds_per_token))
    };
    query.phases.iter().map(of).collect()
}

/// Why nothing fits: the plan that comes nearest, or a reason for which a layout is refused.
pub fn nearest(query: &Query, sweep: &Sweep) -> String {
    let needed = |plan: &Plan| plan.memory.weights + plan.memory.cache;
    match sweep.plans.iter().min_by_key(|plan| needed(plan)) {
        Some(plan) => {
            let (available, needed) = (query.hardware.memory_bytes, needed(plan));
            let (weights, cache) = (plan.memory.weights, plan.memory.cache);
            ShardError::Memory { available, needed, weights, cache }.to_string()
        }
        None => sweep.refusals.first().map_or("no candidates".to_owned(), |refusal| refusal.reason.clone()),
    }
}

/// Everything that the table shows, and every plan.
#[derive(Serialize)]
struct Report<'a> {
    query: Summary<'a>,
    costed: usize,
    refused: usize,
    seconds: f64,
    frontier: Vec<&'a Plan>,
    crossovers: Vec<Crossover>,
    plans: &'a [Plan],
    refusals: &'a [flashover_shard::planner::Refusal],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    simulations: &'a [Simulation],
}

/// The query without its thousands of meshes.
#[derive(Serialize)]
struct Summary<'a> {
    model: &'a flashover_shard::architecture::Architecture,
    hardware: &'a flashover_shard::hardware::Hardware,
    chips: Vec<usize>,
    batches: &'a [usize],
    input: usize,
    output: usize,
    mode: flashover_shard::cost::Mode,
    overlap: flashover_shard::cost::Overlap,
}

fn chips(query: &Query) -> Vec<usize> {
    query.meshes.iter().map(|mesh| mesh.chips()).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Writes one JSON object.
///
/// # Errors
///
/// If the output cannot be written.
pub fn json(
    out: &mut impl Write,
    query: &Query,
    (sweep, frontier): (&Sweep, &[(Phase, Vec<&Plan>)]),
    simulations: &[Simulation],
    seconds: f64,
) -> Result<(), PlanError> {
    let report = Report {
        query: Summary {
            model: &query.model,
            hardware: &query.hardware,
            chips: chips(query),
            batches: &query.batches,
            input: query.input,
            output: query.output,
            mode: query.mode,
            overlap: query.overlap,
        },
        costed: sweep.costed,
        refused: sweep.refused,
        seconds,
        frontier: frontier.iter().flat_map(|(_, plans)| plans.iter().copied()).collect(),
        crossovers: crossovers(sweep),
        plans: &sweep.plans,
        refusals: &sweep.refusals,
        simulations,
    };
    serde_json::to_writer_pretty(&mut *out, &report)?;
    writeln!(out)?;
    Ok(())
}

/// Writes every plan as a line of CSV.
///
/// # Errors
///
/// If the output cannot be written.
pub fn csv(out: &mut impl Write, sweep: &Sweep) -> Result<(), PlanError> {
    writeln!(
        out,
        "phase,chips,batch,weights,weight_layout,attention_layout,x,y,z,fits,seconds,compute_seconds,memory_seconds,\
         cache_seconds,communication_seconds,sent_bytes,mfu,chip_seconds_per_token,tokens_per_second_per_chip,\
         weight_bytes,cache_bytes,working_bytes"
    )?;
    for plan in &sweep.plans {
        let Plan { point, cost, memory, .. } = plan;
        let mesh: Vec<_> = plan.mesh.axes().iter().map(|(_, size)| size.to_string()).collect();
        writeln!(
            out,
            "{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{},{}",
            point.phase,
            point.chips,
            point.batch,
            point.weights,
            plan.weight_layout.name(),
            plan.attention_layout.name(),
            mesh.join(","),
            plan.fits,
            cost.seconds,
            cost.compute,
            cost.memory,
            cost.cache,
            cost.communication,
            cost.sent,
            cost.mfu,
            cost.chip_seconds_per_token,
            cost.tokens_per_second_per_chip,
            memory.weights,
            memory.cache,
            memory.working
        )?;
    }
    Ok(())
}

/// Writes the frontier of each phase and where layouts give way to others.
///
/// # Errors
///
/// If the output cannot be written.
pub fn table(
    out: &mut impl Write,
    query: &Query,
    sweep: &Sweep,
    frontier: &[(Phase, Vec<&Plan>)],
    seconds: f64,
) -> Result<(), PlanError> {
    let chips = chips(query);
    let range = match chips[..] {
        [one] => format!("{one}"),
        [first, .., last] => format!("{first} to {last}"),
        [] => String::new(),
    };
    let Query { model, hardware, input, output, .. } = query;
    writeln!(out, "{} on {range} {}, {input} input and {output} output tokens", model.name, hardware.name)?;
    writeln!(
        out,
        "{} candidates costed in {seconds:.2} s, on {} meshes; {} more do not divide",
        sweep.costed,
        query.meshes.len(),
        sweep.refused
    )?;
    for (phase, plans) in frontier {
        writeln!(out, "\n{phase}: least latency for its cost, and least cost for its latency")?;
        writeln!(
            out,
            "{:>5} {:<12} {:>5} {:<5} {:<7} {:<16} {:>10} {:>10} {:>6} {:>12} {:>9} {:>9}",
            "chips",
            "mesh",
            "batch",
            "type",
            "weights",
            "attention",
            "latency",
            "of it comm",
            "MFU %",
            "chip-ms/tok",
            "weights",
            "cache"
        )?;
        for plan in plans {
            row(out, plan)?;
        }
        if plans.is_empty() {
            writeln!(out, "nothing fits")?;
        }
    }
    changes(out, query, sweep, &chips)
}

fn row(out: &mut impl Write, plan: &Plan) -> Result<(), PlanError> {
    let Plan { point, cost, memory, .. } = plan;
    let gib = |bytes: u64| format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30));
    writeln!(
        out,
        "{:>5} {:<12} {:>5} {:<5} {:<7} {:<16} {:>10} {:>10} {:>6.1} {:>12.4} {:>9} {:>9}",
        point.chips,
        plan.mesh.to_string().replace(['=', 'x', 'y', 'z'], "").replace(',', "x"),
        point.batch,
        point.weights,
        plan.weight_layout.short(),
        plan.attention_layout.name(),
        Seconds(cost.seconds).to_string(),
        Seconds(cost.communication).to_string(),
        100.0 * cost.mfu,
        1e3 * cost.chip_seconds_per_token,
        gib(memory.weights),
        gib(memory.cache)
    )?;
    Ok(())
}

/// Crossovers of the fewest and of the most chips; the rest is in the JSON.
fn changes(out: &mut impl Write, query: &Query, sweep: &Sweep, chips: &[usize]) -> Result<(), PlanError> {
    let ends = [chips.first(), chips.last()];
    let shown = |c: &Crossover| ends.contains(&Some(&c.chips)) && Some(&c.weights) == query.weights.first();
    let changes: Vec<_> = crossovers(sweep).into_iter().filter(shown).collect();
    if !changes.is_empty() {
        writeln!(out, "\nthe fastest layout changes with the batch ({} weights):", query.weights[0])?;
    }
    for c in changes {
        writeln!(
            out,
            "  {} on {:>3} chips, batch {} to {}: {} -> {}",
            c.phase, c.chips, c.last, c.first, c.before, c.after
        )?;
    }
    Ok(())
}

/// Writes what every layout would have cost: at the operating point that was asked for, or at the fastest and the cheapest
/// plan of each phase.
///
/// # Errors
///
/// If the output cannot be written.
pub fn reasons(
    out: &mut impl Write,
    query: &Query,
    sweep: &Sweep,
    frontier: &[(Phase, Vec<&Plan>)],
) -> Result<(), PlanError> {
    let mut points: Vec<Point> = Vec::new();
    for (_, plans) in frontier {
        points.extend(plans.first().into_iter().chain(plans.last()).map(|plan| plan.point));
    }
    points.dedup();
    writeln!(out)?;
    for point in points {
        let why: Why = why(sweep, &query.hardware, point);
        writeln!(out, "{why}")?;
    }
    Ok(())
}
