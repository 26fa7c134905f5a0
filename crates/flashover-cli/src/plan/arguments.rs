//! The arguments of `flashover plan`, and the query that they make.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use flashover_shard::ShardError;
use flashover_shard::architecture::Architecture;
use flashover_shard::cost::{Mode, Overlap};
use flashover_shard::hardware::{self, Hardware};
use flashover_shard::layout::{Layout, WeightLayout};
use flashover_shard::mesh::Mesh;
use flashover_shard::planner::{self, Query};
use flashover_shard::precision::WeightType;
use flashover_shard::workload::Phase;
use flashover_shard::{config, models};

use super::PlanError;

/// Options of `flashover plan`.
#[derive(Args)]
pub struct Arguments {
    /// A built-in model, or the path of a Hugging Face config.json.
    #[arg(long)]
    model: String,
    /// A built-in chip, or the path of a TOML file.
    #[arg(long)]
    hardware: String,
    /// Numbers of chips: `64`, `64,128`, or `64..256` for all between.
    #[arg(long, default_value = "64..256")]
    chips: String,
    /// One mesh instead of all of every number of chips: `4x4x4`.
    #[arg(long, conflicts_with = "chips")]
    mesh: Option<String>,
    /// What to plan.
    #[arg(long, value_enum, default_value_t = Phases::Both)]
    phase: Phases,
    /// Sequences: `64`, `1,64`, or `1..1024` for the powers of two from the first up to the last.
    #[arg(long, default_value = "1..1024")]
    batch: String,
    /// Input tokens of each sequence.
    #[arg(long, default_value_t = 2048)]
    input: usize,
    /// Generated tokens of each sequence; decoding is costed at the last one.
    #[arg(long, default_value_t = 64)]
    output: usize,
    /// Types of weights: `bf16`, `int8`, `int4`, or several.
    #[arg(long, value_delimiter = ',', default_value = "bf16,int8")]
    weights: Vec<String>,
    /// Layouts: weights, as `2d-weight-stationary`, or weights and attention, as `2d-weight-stationary/batch`; several, or
    /// `all`.
    #[arg(long, value_delimiter = ',', default_value = "all")]
    layout: Vec<String>,
    /// Assumptions.
    #[arg(long, value_enum, default_value_t = ModeName::Physical)]
    mode: ModeName,
    /// Overlap of communication with matrix products.
    #[arg(long, value_enum, default_value_t = OverlapName::None)]
    overlap: OverlapName,
    /// Send activations as int8 in all-gathers, all-to-alls and sends.
    #[arg(long)]
    compress: bool,
    /// Print everything as JSON.
    #[arg(long, conflicts_with = "csv")]
    pub(super) json: bool,
    /// Print every plan as CSV.
    #[arg(long)]
    pub(super) csv: bool,
    /// Draw the frontier, the communication volumes and the memory into a PNG or SVG file.
    #[arg(long, value_name = "FILE")]
    pub(super) plot: Option<PathBuf>,
    /// Run a small model under the fastest layout of each phase on as many logical chips, and hold the bytes that move and
    /// the logits against what they must be.
    #[arg(long, conflicts_with = "csv")]
    pub(super) simulate: bool,
    /// Say of every layout what it would have cost and why it lost.
    #[arg(long, conflicts_with_all = ["json", "csv"])]
    pub(super) why: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Phases {
    Prefill,
    Decode,
    Both,
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeName {
    /// The assumptions of the paper's closed forms.
    Paper,
    /// Everything that the program does.
    Physical,
    /// Physical, with factors fitted to the paper's measured points of PaLM 540B on TPU v4.
    Calibrated,
}

#[derive(Clone, Copy, ValueEnum)]
enum OverlapName {
    None,
    Looped,
}

impl Arguments {
    /// What they ask for.
    pub(super) fn query(&self) -> Result<Query, PlanError> {
        let (model, hardware) = (model(&self.model)?, chip(&self.hardware)?);
        let meshes = match &self.mesh {
            Some(mesh) => vec![mesh.parse::<Mesh>()?],
            None => numbers("chips", &self.chips, |from, to| (from..=to).collect())?
                .into_iter()
                .flat_map(Mesh::factorizations)
                .collect(),
        };
        let powers = |from: usize, to: usize| {
            std::iter::successors(Some(from), |n| n.checked_mul(2)).take_while(|&n| n <= to).collect()
        };
        let weights: Vec<WeightType> = self.weights.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
        let overlap = match self.overlap {
            OverlapName::None => Overlap::None,
            OverlapName::Looped => Overlap::Looped,
        };
        let mode = match self.mode {
            ModeName::Paper => Mode::Paper,
            ModeName::Physical => Mode::Physical,
            ModeName::Calibrated => Mode::Calibrated(flashover_shard::paper::calibration(overlap)?),
        };
        let mut query = Query {
            meshes,
            batches: numbers("batch", &self.batch, powers)?,
            weights,
            phases: match self.phase {
                Phases::Prefill => vec![Phase::Prefill],
                Phases::Decode => vec![Phase::Decode],
                Phases::Both => vec![Phase::Prefill, Phase::Decode],
            },
            layouts: layouts(&self.layout)?,
            input: self.input,
            output: self.output,
            mode,
            overlap,
            ..planner::Query::new(model, hardware)
        };
        query.precision.compressed = self.compress;
        query.validate()?;
        Ok(query)
    }
}

/// Whether an argument is the path of a file and not a name.
fn is_path(text: &str, extension: &str) -> bool {
    text.contains(['/', '\\']) || Path::new(text).extension().is_some_and(|found| found == extension)
}

fn read(path: &str) -> Result<String, PlanError> {
    std::fs::read_to_string(path).map_err(|error| PlanError::Read { path: path.into(), error })
}

fn model(text: &str) -> Result<Architecture, PlanError> {
    if is_path(text, "json") { Ok(config::from_json(&read(text)?, text)?) } else { Ok(models::by_name(text)?) }
}

fn chip(text: &str) -> Result<Hardware, PlanError> {
    if is_path(text, "toml") { Ok(Hardware::from_toml(&read(text)?)?) } else { Ok(hardware::by_name(text)?) }
}

fn layouts(names: &[String]) -> Result<Vec<Layout>, ShardError> {
    let mut layouts = Vec::new();
    for name in names {
        if name == "all" {
            layouts.extend(Layout::all());
        } else if name.contains('/') {
            layouts.push(name.parse()?);
        } else {
            let weights: WeightLayout = name.parse()?;
            layouts.extend(Layout::all().filter(|layout| layout.weights == weights));
        }
    }
    layouts.sort_unstable();
    layouts.dedup();
    Ok(layouts)
}

/// Positive numbers: one, several with commas, or a range, whose members `range` gives.
fn numbers(field: &str, text: &str, range: impl Fn(usize, usize) -> Vec<usize>) -> Result<Vec<usize>, ShardError> {
    let refuse = |found: &str| ShardError::Field {
        field: field.to_owned(),
        expected: "positive numbers, as in `64`, `1,64` or `1..1024`".to_owned(),
        found: format!("`{found}`"),
    };
    let number =
        |part: &str| part.trim().parse().ok().filter(|&n: &usize| n > 0 && n <= 1 << 20).ok_or_else(|| refuse(part));
    let mut all = Vec::new();
    for part in text.split(',') {
        match part.split_once("..") {
            Some((from, to)) => {
                let (from, to) = (number(from)?, number(to.trim_start_matches('='))?);
                if from > to {
                    return Err(refuse(part));
                }
                all.extend(range(from, to));
            }
            None => all.push(number(part)?),
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}
