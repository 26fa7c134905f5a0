//! Every layout on every mesh at every batch, costed; what fits, what is best, and why the others are not.

mod frontier;
mod sweep;

use serde::Serialize;

use crate::architecture::Architecture;
use crate::cost::{Cost, Mode, Overlap};
use crate::count::Memory;
use crate::error::ShardError;
use crate::hardware::Hardware;
use crate::layout::{AttentionLayout, Layout, LayoutOptions, WeightLayout};
use crate::mesh::Mesh;
use crate::precision::{Precision, WeightType};
use crate::workload::{Phase, Workload};

pub use frontier::{Crossover, crossovers, pareto};
pub use sweep::{sweep, sweep_with};

/// What to plan.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Query {
    /// The model.
    pub model: Architecture,
    /// The chips.
    pub hardware: Hardware,
    /// Meshes to try.
    pub meshes: Vec<Mesh>,
    /// Numbers of sequences to try.
    pub batches: Vec<usize>,
    /// Types of weights to try.
    pub weights: Vec<WeightType>,
    /// Phases to plan.
    pub phases: Vec<Phase>,
    /// Layouts to try.
    pub layouts: Vec<Layout>,
    /// Input tokens of each sequence.
    pub input: usize,
    /// Generated tokens of each sequence. Decoding is costed at the last of them, which has the longest context.
    pub output: usize,
    /// Element types of everything but the weights.
    pub precision: Precision,
    /// Assumptions.
    pub mode: Mode,
    /// Overlap of communication with products.
    pub overlap: Overlap,
    /// Choices of layout.
    #[serde(skip)]
    pub options: LayoutOptions,
}

impl Query {
    /// Both phases and every layout of a model on 64 to 256 chips, every mesh of every number of them, batches of 1 to
    /// 1024 in powers of two, every type of weights, 2048 input and 64 output tokens (Table 2).
    pub fn new(model: Architecture, hardware: Hardware) -> Self {
        Query {
            model,
            hardware,
            meshes: (64..=256).flat_map(Mesh::factorizations).collect(),
            batches: (0..=10).map(|i| 1 << i).collect(),
            weights: WeightType::ALL.to_vec(),
            phases: vec![Phase::Prefill, Phase::Decode],
            layouts: Layout::all().collect(),
            input: 2048,
            output: 64,
            precision: Precision::new(WeightType::Bf16),
            mode: Mode::Physical,
            overlap: Overlap::None,
            options: LayoutOptions::default(),
        }
    }

    /// The workload of a phase at a batch.
    pub fn workload(&self, phase: Phase, batch: usize) -> Workload {
        match phase {
            Phase::Prefill => Workload::prefill(batch, self.input),
            Phase::Decode => Workload::decode(batch, self.input + self.output),
        }
    }

    /// Checks what does not depend on a mesh.
    ///
    /// # Errors
    ///
    /// If a list is empty or a size is zero.
    pub fn validate(&self) -> Result<(), ShardError> {
        self.model.validate()?;
        for (field, empty) in [
            ("meshes", self.meshes.is_empty()),
            ("batches", self.batches.is_empty()),
            ("weights", self.weights.is_empty()),
            ("phases", self.phases.is_empty()),
            ("layouts", self.layouts.is_empty()),
        ] {
            if empty {
                return Err(ShardError::field(field, "at least one", "none"));
            }
        }
        for &batch in &self.batches {
            self.phases.iter().try_for_each(|&phase| self.workload(phase, batch).validate())?;
        }
        if self.output == 0 {
            return Err(ShardError::field("output", "at least 1 token", 0));
        }
        Ok(())
    }
}

/// An operating point: a phase at a batch, on so many chips, with a type of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Point {
    /// The phase.
    pub phase: Phase,
    /// Chips.
    pub chips: usize,
    /// Sequences.
    pub batch: usize,
    /// Type of weights.
    pub weights: WeightType,
}

/// A layout at an operating point, on the mesh that suits it best.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    /// The operating point.
    pub point: Point,
    /// Its weights.
    pub weight_layout: WeightLayout,
    /// Its attention.
    pub attention_layout: AttentionLayout,
    /// The mesh on which it takes the least time; of those, the first.
    pub mesh: Mesh,
    /// What a pass costs.
    pub cost: Cost,
    /// What a chip must hold.
    pub memory: Memory,
    /// Whether that fits.
    pub fits: bool,
}

impl Plan {
    /// The layout.
    pub fn layout(&self) -> Layout {
        Layout { weights: self.weight_layout, attention: self.attention_layout }
    }
}

/// Why a layout has no plan at an operating point.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Refusal {
    /// The phase.
    pub phase: Phase,
    /// The layout.
    pub layout: Layout,
    /// Chips.
    pub chips: usize,
    /// Sequences, if the reason depends on them.
    pub batch: Option<usize>,
    /// The message of the last mesh that was tried.
    pub reason: String,
}

/// The outcome of a sweep.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Sweep {
    /// Meshes × layouts × batches × types of weights × phases that have a cost.
    pub costed: usize,
    /// Those that a dimension, the batch or the network refuses.
    pub refused: usize,
    /// Of every layout at every operating point, the plan on its best mesh, also where it does not fit. Sorted by
    /// operating point, and within it what fits first, then by seconds.
    pub plans: Vec<Plan>,
    /// Layouts that no mesh accepts at an operating point.
    pub refusals: Vec<Refusal>,
}

impl Sweep {
    /// The plans of an operating point, the best first.
    pub fn at(&self, point: Point) -> &[Plan] {
        let start = self.plans.partition_point(|plan| plan.point < point);
        let end = self.plans.partition_point(|plan| plan.point <= point);
        &self.plans[start..end]
    }

    /// The best plan of an operating point, if one fits.
    pub fn best(&self, point: Point) -> Option<&Plan> {
        self.at(point).first().filter(|plan| plan.fits)
    }

    /// The best plan of every operating point that has one.
    pub fn winners(&self) -> impl Iterator<Item = &Plan> {
        let first = |i: usize| i == 0 || self.plans[i - 1].point != self.plans[i].point;
        (0..self.plans.len()).filter(move |&i| first(i) && self.plans[i].fits).map(|i| &self.plans[i])
    }
}
