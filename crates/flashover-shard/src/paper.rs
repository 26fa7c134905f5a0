//! What Pope et al. (arXiv 2211.05102) measured, for comparison and calibration. None of it is predicted here, and only
//! [`Mode::Calibrated`] reads it.

use serde::Serialize;

use crate::calibrate::{Calibration, Point};
use crate::cost::{Mode, Overlap, Sheet};
use crate::error::ShardError;
use crate::layout::{Layout, LayoutOptions};
use crate::mesh::Mesh;
use crate::precision::{Precision, WeightType};
use crate::workload::{Phase, Workload};
use crate::{hardware, models};

/// A measured pass of PaLM 540B on TPU v4.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// Where the paper gives it.
    pub source: &'static str,
    /// The phase.
    pub phase: Phase,
    /// Chips.
    pub chips: usize,
    /// Sequences.
    pub batch: usize,
    /// Input tokens of each sequence.
    pub input: usize,
    /// Tokens of each sequence that the cache holds at most.
    pub context: usize,
    /// Type of weights.
    pub weights: WeightType,
    /// Seconds of a pass: the whole prefill, or one step of generation.
    pub seconds: f64,
    /// MFU in percent, as printed.
    pub mfu: f64,
}

impl Measured {
    /// The workload of the pass.
    pub const fn workload(&self) -> Workload {
        match self.phase {
            Phase::Prefill => Workload::prefill(self.batch, self.input),
            Phase::Decode => Workload::decode(self.batch, self.context),
        }
    }

    /// The mesh that the authors use for so many chips: 4×4×4, and 8×4×4 for 128.
    ///
    /// # Errors
    ///
    /// Never for the points of this file.
    pub fn mesh(&self) -> Result<Mesh, ShardError> {
        Mesh::torus(self.chips / 16, 4, 4)
    }

    /// The cheapest sheet of any layout on that mesh in [`Mode::Physical`]: the paper does not say which layout each of
    /// its points used.
    ///
    /// # Errors
    ///
    /// If no layout accepts the workload.
    pub fn best_sheet(&self, overlap: Overlap) -> Result<(Layout, Sheet), ShardError> {
        let (model, chip) = (models::by_name("palm-540b")?, hardware::by_name("tpu-v4")?);
        let (mesh, workload) = (self.mesh()?, self.workload());
        let with = (Precision::new(WeightType::Bf16), LayoutOptions::default());
        let sheet = |layout| Some((layout, Sheet::of_layout(layout, &model, &chip, &mesh, &workload, with).ok()?));
        let seconds = |sheet: &Sheet| sheet.cost(self.batch, self.weights, Mode::Physical, overlap).seconds;
        let best = Layout::all().filter_map(sheet).min_by(|a, b| seconds(&a.1).total_cmp(&seconds(&b.1)));
        best.ok_or_else(|| ShardError::field("batch", "one that some layout accepts", self.batch))
    }

    /// The pass as a point to fit.
    ///
    /// # Errors
    ///
    /// As [`best_sheet`](Self::best_sheet).
    pub fn point(&self, overlap: Overlap) -> Result<Point, ShardError> {
        let terms = self.best_sheet(overlap)?.1.terms(self.batch, self.weights, overlap);
        let name =
            format!("{} {} {} chips, batch {}, {}", self.source, self.phase, self.chips, self.batch, self.weights);
        Ok(Point { name, terms, seconds: self.seconds })
    }
}

/// The points of [`FIGURE_1`], ready to be fitted.
///
/// # Errors
///
/// Never for the points of this file.
pub fn points(overlap: Overlap) -> Result<Vec<Point>, ShardError> {
    FIGURE_1.iter().map(|measured| measured.point(overlap)).collect()
}

/// Factors fitted to [`FIGURE_1`].
///
/// # Errors
///
/// Never for the points of this file.
pub fn calibration(overlap: Overlap) -> Result<Calibration, ShardError> {
    Calibration::fit(&points(overlap)?)
}

const fn prefill(source: &'static str, batch: usize, input: usize, weights: WeightType, s: f64, mfu: f64) -> Measured {
    Measured { source, phase: Phase::Prefill, chips: 64, batch, input, context: input, weights, seconds: s, mfu }
}

const fn decode(chips: usize, batch: usize, weights: WeightType, ms: f64, mfu: f64) -> Measured {
    let (source, phase, seconds) = ("Figure 1", Phase::Decode, ms / 1e3);
    Measured { source, phase, chips, batch, input: 2048, context: 2112, weights, seconds, mfu }
}

/// Figure 1: points of the Pareto frontiers of PaLM 540B, decoding with 2048 tokens of context and prefill of 2048 tokens.
/// The type of weights of the prefill points is not given beside them; Table 2 has int8 at batch 1 and bf16 at 512.
pub const FIGURE_1: [Measured; 16] = [
    decode(128, 64, WeightType::Bf16, 32.92, 6.0),
    decode(64, 64, WeightType::Bf16, 36.23, 10.8),
    decode(64, 128, WeightType::Bf16, 44.49, 17.7),
    decode(64, 256, WeightType::Bf16, 56.88, 27.6),
    decode(64, 512, WeightType::Bf16, 92.16, 34.1),
    decode(64, 1024, WeightType::Bf16, 182.9, 34.4),
    decode(64, 64, WeightType::Int8, 27.85, 14.1),
    decode(64, 128, WeightType::Int8, 35.99, 21.8),
    decode(64, 256, WeightType::Int8, 54.99, 28.6),
    decode(64, 512, WeightType::Int8, 94.52, 33.2),
    prefill("Figure 1", 1, 2048, WeightType::Int8, 0.288, 43.7),
    prefill("Figure 1", 2, 2048, WeightType::Int8, 0.539, 46.6),
    prefill("Figure 1", 4, 2048, WeightType::Int8, 1.073, 46.8),
    prefill("Figure 1", 128, 2048, WeightType::Bf16, 29.5, 54.6),
    prefill("Figure 1", 256, 2048, WeightType::Bf16, 43.5, 74.0),
    prefill("Figure 1", 512, 2048, WeightType::Bf16, 83.6, 76.9),
];

/// A column of Table D.2: 20 input and 8 output tokens. Milliseconds and MFU in percent at each batch that it has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Column {
    /// Its head.
    pub name: &'static str,
    /// The model.
    pub model: &'static str,
    /// Chips.
    pub chips: usize,
    /// The chip.
    pub hardware: &'static str,
    /// Tokens of each sequence that the time is for.
    pub tokens: usize,
    /// Batch, milliseconds, percent.
    pub cells: &'static [(usize, f64, f64)],
}

/// Table D.2: FasterTransformer's MT-NLG on A100, and PaLM 540B and MT-NLG on 64 TPU v4.
pub const TABLE_D2: [Column; 7] = [
    Column {
        name: "FasterTransformer TP16",
        model: "mt-nlg-530b",
        chips: 16,
        hardware: "a100",
        tokens: 28,
        cells: &[
            (1, 565.0, 1.0),
            (2, 598.0, 2.0),
            (4, 616.0, 4.0),
            (8, 660.0, 7.0),
            (16, 730.0, 13.0),
            (32, 865.0, 22.0),
            (64, 1191.0, 32.0),
            (128, 1862.0, 41.0),
            (256, 3341.0, 46.0),
        ],
    },
    Column {
        name: "FasterTransformer TP32",
        model: "mt-nlg-530b",
        chips: 32,
        hardware: "a100",
        tokens: 28,
        cells: &[
            (1, 431.0, 1.0),
            (2, 455.0, 1.0),
            (4, 493.0, 2.0),
            (8, 523.0, 5.0),
            (16, 575.0, 8.0),
            (32, 672.0, 14.0),
            (64, 942.0, 20.0),
            (128, 1431.0, 27.0),
            (256, 2483.0, 31.0),
        ],
    },
    Column {
        name: "FasterTransformer PP3/TP8",
        model: "mt-nlg-530b",
        chips: 24,
        hardware: "a100",
        tokens: 28,
        cells: &[
            (1, 842.0, 0.0),
            (2, 860.0, 1.0),
            (4, 867.0, 2.0),
            (8, 929.0, 3.0),
            (16, 1049.0, 6.0),
            (32, 1283.0, 10.0),
            (64, 1722.0, 15.0),
            (128, 2124.0, 24.0),
            (256, 3140.0, 32.0),
        ],
    },
    Column {
        name: "PaLM prefill",
        model: "palm-540b",
        chips: 64,
        hardware: "tpu-v4",
        tokens: 20,
        cells: &[
            (4, 34.0, 14.0),
            (8, 40.0, 25.0),
            (16, 58.0, 34.0),
            (32, 99.0, 40.0),
            (64, 186.0, 42.0),
            (128, 356.0, 44.0),
            (256, 668.0, 47.0),
            (512, 1366.0, 46.0),
            (1024, 2785.0, 45.0),
        ],
    },
    Column {
        name: "PaLM generate",
        model: "palm-540b",
        chips: 64,
        hardware: "tpu-v4",
        tokens: 8,
        cells: &[
            (4, 255.0, 1.0),
            (8, 226.0, 2.0),
            (16, 234.0, 3.0),
            (32, 235.0, 7.0),
            (64, 265.0, 12.0),
            (128, 312.0, 20.0),
            (256, 415.0, 30.0),
            (512, 671.0, 37.0),
            (1024, 1257.0, 40.0),
        ],
    },
    Column {
        name: "PaLM total",
        model: "palm-540b",
        chips: 64,
        hardware: "tpu-v4",
        tokens: 28,
        cells: &[
            (4, 289.0, 2.0),
            (8, 265.0, 5.0),
            (16, 292.0, 9.0),
            (32, 334.0, 16.0),
            (64, 451.0, 24.0),
            (128, 668.0, 33.0),
            (256, 1083.0, 41.0),
            (512, 2037.0, 43.0),
            (1024, 4041.0, 44.0),
        ],
    },
    Column {
        name: "MT-NLG total",
        model: "mt-nlg-530b",
        chips: 64,
        hardware: "tpu-v4",
        tokens: 28,
        cells: &[
            (4, 289.0, 2.0),
            (8, 304.0, 4.0),
            (16, 339.0, 8.0),
            (32, 420.0, 13.0),
            (64, 532.0, 20.0),
            (128, 740.0, 29.0),
            (256, 1151.0, 38.0),
            (512, 2151.0, 40.0),
            (1024, 4082.0, 42.0),
        ],
    },
];
