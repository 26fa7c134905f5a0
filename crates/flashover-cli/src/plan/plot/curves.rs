//! What the pictures show, as numbers.

use flashover_shard::cost::Sheet;
use flashover_shard::layout::{AttentionLayout, Layout, WeightLayout};
use flashover_shard::mesh::Mesh;
use flashover_shard::paper;
use flashover_shard::planner::{Query, Sweep, pareto};
use flashover_shard::precision::WeightType;
use flashover_shard::workload::{Phase, Workload};

use crate::plan::PlanError;

/// Curves over common axes.
pub struct Panel {
    pub title: &'static str,
    pub x: &'static str,
    pub y: &'static str,
    pub curves: Vec<Curve>,
    /// Where the curves leave room for the legend.
    pub room_on_the_right: bool,
}

/// A curve, or marks without a line between them.
pub struct Curve {
    pub label: String,
    pub points: Vec<(f64, f64)>,
    pub line: bool,
}

/// Latency against chip-seconds a token of the plans that no other beats, and the paper's measured points if they are of
/// this model and chip. Measured points are not predicted: the label gives their median ratio to the model.
pub fn frontier(query: &Query, sweep: &Sweep) -> Panel {
    let mut curves = Vec::new();
    for &phase in &query.phases {
        let winners = sweep.winners().filter(|plan| plan.point.phase == phase);
        let plans = pareto(winners, |plan| plan.cost.chip_seconds_per_token);
        let point = |seconds: f64, chip_seconds: f64| (seconds * 1e3, chip_seconds * 1e3);
        let points = plans.iter().map(|plan| point(plan.cost.seconds, plan.cost.chip_seconds_per_token)).collect();
        curves.push(Curve { label: format!("{phase}, model"), points, line: true });
        let known = query.model.name == "palm-540b" && query.hardware.name == "tpu-v4";
        let measured: Vec<_> = paper::FIGURE_1.iter().filter(|m| known && m.phase == phase).collect();
        if measured.is_empty() {
            continue;
        }
        let tokens = |m: &paper::Measured| m.workload().total_tokens() as f64;
        let mut ratios: Vec<f64> = measured
            .iter()
            .filter_map(|m| {
                let sheet = m.best_sheet(query.overlap).ok()?.1;
                Some(m.seconds / sheet.cost(m.batch, m.weights, query.mode, query.overlap).seconds)
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        let median = ratios.get(ratios.len() / 2).copied().unwrap_or(f64::NAN);
        curves.push(Curve {
            label: format!("{phase}, measured (Figure 1): {median:.2} x the model"),
            points: measured.iter().map(|m| point(m.seconds, m.chips as f64 * m.seconds / tokens(m))).collect(),
            line: false,
        });
    }
    let (x, y) = ("latency of a pass (ms)", "chip-milliseconds a token");
    Panel { title: "least latency for its cost", x, y, curves, room_on_the_right: true }
}

/// Bytes that a chip moves in the feed-forward layer of a block against the number of tokens, as the paper's Figure 3 draws
/// it, on the most cubic mesh of the fewest chips.
pub fn volumes(query: &Query, sweep: &Sweep) -> Result<Panel, PlanError> {
    let chips = sweep.plans.iter().map(|plan| plan.point.chips).min();
    let longest = |mesh: &Mesh| mesh.axes().iter().map(|&(_, size)| size).max();
    let of_chips = query.meshes.iter().filter(|mesh| Some(mesh.chips()) == chips);
    let mut curves = Vec::new();
    if let Some(mesh) = of_chips.min_by_key(|mesh| longest(mesh)) {
        for weights in WeightLayout::ALL {
            let layout = Layout { weights, attention: AttentionLayout::Heads };
            let unit = layout.batch_unit(&query.model, mesh, Phase::Prefill, query.options)?;
            let workload = Workload::prefill(unit, 1);
            let with = (query.precision, query.options);
            let Ok(sheet) = Sheet::of_layout(layout, &query.model, &query.hardware, mesh, &workload, with) else {
                continue;
            };
            let tokens = (6..22).map(|shift| 1_usize << shift);
            let point = |n: usize| (n as f64, sheet.paper_bytes_per_layer(n, WeightType::Bf16) / 1e9);
            curves.push(Curve { label: weights.name().to_owned(), points: tokens.map(point).collect(), line: true });
        }
    }
    let (x, y) = ("tokens (batch x length)", "GB a block and chip, as the paper counts");
    Ok(Panel { title: "communication of the feed-forward layer", x, y, curves, room_on_the_right: false })
}

/// A bar: GiB of a chip's memory.
pub struct Bar {
    pub label: String,
    pub weights: f64,
    pub cache: f64,
}

/// Bars, and the chip's memory in GiB.
pub struct Bars {
    pub axis: String,
    pub bars: Vec<Bar>,
    pub limit: f64,
}

/// Weights and cache of the fastest plan at each batch, on the fewest chips and with the first type of weights that has
/// one.
pub fn memory(query: &Query, sweep: &Sweep) -> Bars {
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let phase = query.phases.last().copied().unwrap_or(Phase::Decode);
    let of_phase = || sweep.winners().filter(|plan| plan.point.phase == phase);
    let first = of_phase().min_by_key(|plan| (plan.point.chips, plan.point.weights)).map(|plan| plan.point);
    let shown = of_phase().filter(|plan| {
        first.is_some_and(|first| (plan.point.chips, plan.point.weights) == (first.chips, first.weights))
    });
    let bar = |plan: &flashover_shard::planner::Plan| Bar {
        label: plan.point.batch.to_string(),
        weights: gib(plan.memory.weights),
        cache: gib(plan.memory.cache),
    };
    let axis = first.map_or(String::new(), |p| format!("batch ({phase}, {} chips, {} weights)", p.chips, p.weights));
    Bars { axis, bars: shown.map(bar).collect(), limit: gib(query.hardware.memory_bytes) }
}
