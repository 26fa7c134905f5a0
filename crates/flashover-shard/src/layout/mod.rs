//! Layouts: which axes shard what, and the program that follows.
//!
//! One builder makes them all from three lists of axes: `e` shards the model dimension of the stored weights, `f` their
//! feed-forward and head dimensions, and `w` are the axes over which weights are gathered before they are used (empty:
//! weight-stationary). Tokens are sharded over `w`.
//!
//! | layout | e | f | w | weights | activations between blocks |
//! |---|---|---|---|---|---|
//! | 1D weight-stationary | | zyx | | `EF_zyx` | `BLE_zyx` |
//! | 2D weight-stationary | x | zy | | `E_xF_zy` | `BLE_xzy` |
//! | X weight-gathered | x | zy | x | `E_xF_zy` | `B_xLE_zy` |
//! | XY weight-gathered | x | zy | xy | `E_xF_zy` | `B_xyLE_z` |
//! | XYZ weight-gathered | x | zy | xyz | `E_xF_zy` | `B_xyzLE` |
//!
//! As sets these are the paper's (§3.2, A.2); the order zy lets y be gathered from the end of `F_zy`.

mod attention;
mod block;
mod builder;
mod ends;
mod plan;
mod reshard;

use core::fmt;
use core::str::FromStr;
use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::architecture::Architecture;
use crate::error::ShardError;
use crate::mesh::Mesh;
use crate::program::Program;
use crate::spec::Sizes;
use crate::workload::{Phase, Workload};

pub(crate) use plan::Plan;
pub use reshard::{Stage, reshard};

/// How the weights lie and whether they or the activations travel (§3.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WeightLayout {
    /// Weights stay, sharded over `F` on all chips (§3.2.1).
    #[serde(rename = "1d-weight-stationary")]
    Stationary1D,
    /// Weights stay, sharded over `E` on x and over `F` on y and z (§3.2.2).
    #[serde(rename = "2d-weight-stationary")]
    Stationary2D,
    /// Weights are gathered over x (§3.2.3).
    #[serde(rename = "x-weight-gathered")]
    GatheredX,
    /// Weights are gathered over x and y.
    #[serde(rename = "xy-weight-gathered")]
    GatheredXY,
    /// Weights are gathered over all chips.
    #[serde(rename = "xyz-weight-gathered")]
    GatheredXYZ,
}

impl WeightLayout {
    /// All of them.
    pub const ALL: [WeightLayout; 5] = [
        WeightLayout::Stationary1D,
        WeightLayout::Stationary2D,
        WeightLayout::GatheredX,
        WeightLayout::GatheredXY,
        WeightLayout::GatheredXYZ,
    ];

    /// `1d-weight-stationary` to `xyz-weight-gathered`.
    pub const fn name(self) -> &'static str {
        match self {
            WeightLayout::Stationary1D => "1d-weight-stationary",
            WeightLayout::Stationary2D => "2d-weight-stationary",
            WeightLayout::GatheredX => "x-weight-gathered",
            WeightLayout::GatheredXY => "xy-weight-gathered",
            WeightLayout::GatheredXYZ => "xyz-weight-gathered",
        }
    }

    /// The paper's abbreviation: `WS 2D`, `WG XYZ`.
    pub const fn short(self) -> &'static str {
        match self {
            WeightLayout::Stationary1D => "WS 1D",
            WeightLayout::Stationary2D => "WS 2D",
            WeightLayout::GatheredX => "WG X",
            WeightLayout::GatheredXY => "WG XY",
            WeightLayout::GatheredXYZ => "WG XYZ",
        }
    }
}

/// What shards the attention itself and its cache (§3.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttentionLayout {
    /// Query heads over all chips. Key heads are sharded as far as their number allows and replicated beyond.
    Heads,
    /// Sequences over all chips: two all-to-alls, and every chip reads only the cache of its own sequences.
    Batch,
    /// Key heads over the axes that divide their number, sequences over the others.
    HeadsAndBatch,
    /// Key heads over the axes that divide their number, tokens of a sequence over the others: ring attention for many
    /// queries, a merge of partial softmaxes for one.
    Sequence,
}

impl AttentionLayout {
    /// All of them.
    pub const ALL: [AttentionLayout; 4] =
        [AttentionLayout::Heads, AttentionLayout::Batch, AttentionLayout::HeadsAndBatch, AttentionLayout::Sequence];

    /// `heads`, `batch`, `heads-and-batch` or `sequence`.
    pub const fn name(self) -> &'static str {
        match self {
            AttentionLayout::Heads => "heads",
            AttentionLayout::Batch => "batch",
            AttentionLayout::HeadsAndBatch => "heads-and-batch",
            AttentionLayout::Sequence => "sequence",
        }
    }
}

/// A layout of a model on a mesh with axes x, y and z.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Layout {
    /// The weights.
    pub weights: WeightLayout,
    /// The attention.
    pub attention: AttentionLayout,
}

impl Layout {
    /// Every pair of a weight layout and an attention layout.
    pub fn all() -> impl Iterator<Item = Layout> {
        WeightLayout::ALL
            .into_iter()
            .flat_map(|weights| AttentionLayout::ALL.into_iter().map(move |attention| Layout { weights, attention }))
    }

    /// The program of this layout, and the sizes of its dimensions with padding.
    ///
    /// Heads are padded, zero weights added, to a multiple of the chips that the stored weights' heads are sharded over,
    /// and to one of `options.heads_multiple`; multi-head attention pads keys alike, grouped attention the queries of
    /// each group. The vocabulary is padded to a multiple of the chips.
    ///
    /// # Errors
    ///
    /// If the model or the workload is not sound, the mesh has other axes than x, y and z, a dimension does not divide,
    /// or the batch is smaller than what it is sharded over.
    pub fn program(
        self,
        model: &Architecture,
        mesh: &Mesh,
        workload: &Workload,
        options: LayoutOptions,
    ) -> Result<(Program, Sizes), ShardError> {
        model.validate()?;
        workload.validate()?;
        let plan = Plan::new(self, model, mesh, workload.phase, options)?;
        let sizes = plan.sizes(model, mesh, workload)?;
        plan.check_batch(mesh, workload)?;
        let program = block::build(model, &plan);
        program.check(mesh, &sizes)?;
        Ok((program, sizes))
    }

    /// The number that the batch must be a multiple of.
    ///
    /// # Errors
    ///
    /// If the mesh has other axes than x, y and z.
    pub fn batch_unit(
        self,
        model: &Architecture,
        mesh: &Mesh,
        phase: Phase,
        options: LayoutOptions,
    ) -> Result<usize, ShardError> {
        mesh.group_size(&Plan::new(self, model, mesh, phase, options)?.batch_axes().0)
    }
}

impl fmt::Display for Layout {
    /// `2d-weight-stationary/batch`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.weights.name(), self.attention.name()))
    }
}

impl FromStr for WeightLayout {
    type Err = ShardError;

    fn from_str(text: &str) -> Result<Self, ShardError> {
        let found = WeightLayout::ALL.into_iter().find(|layout| layout.name() == text || layout.short() == text);
        found.ok_or_else(|| ShardError::unknown("layout", text, &WeightLayout::ALL.map(WeightLayout::name)))
    }
}

impl FromStr for AttentionLayout {
    type Err = ShardError;

    fn from_str(text: &str) -> Result<Self, ShardError> {
        let found = AttentionLayout::ALL.into_iter().find(|layout| layout.name() == text);
        found.ok_or_else(|| {
            ShardError::unknown("attention layout", text, &AttentionLayout::ALL.map(AttentionLayout::name))
        })
    }
}

impl FromStr for Layout {
    type Err = ShardError;

    /// Parses `2d-weight-stationary/batch`.
    fn from_str(text: &str) -> Result<Self, ShardError> {
        let (weights, attention) = text
            .split_once('/')
            .ok_or_else(|| ShardError::field("layout", "WEIGHTS/ATTENTION", format!("`{text}`")))?;
        Ok(Layout { weights: weights.parse()?, attention: attention.parse()? })
    }
}

/// Programs of one model, each built once for all meshes and batches on which it is the same.
#[derive(Debug, Default)]
pub(crate) struct ProgramCache {
    programs: HashMap<Plan, Program>,
}

impl ProgramCache {
    /// The program of a plan. All calls must be of the same model.
    pub(crate) fn get(&mut self, plan: &Plan, model: &Architecture) -> &Program {
        self.programs.entry(plan.without_sizes()).or_insert_with_key(|plan| block::build(model, plan))
    }
}

/// Choices that change no number of the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayoutOptions {
    /// Whether tensors that a collective moves over the same axes at the same place travel as one message (§3.4: fused
    /// projections). The bytes are the same.
    pub fused: bool,
    /// Padded query heads are a multiple of this, so that two layouts can share stored weights: the least common
    /// multiple of what both need.
    pub heads_multiple: usize,
}

impl Default for LayoutOptions {
    fn default() -> Self {
        LayoutOptions { fused: true, heads_multiple: 1 }
    }
}
