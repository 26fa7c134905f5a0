//! Seconds of a pass through the model, from the counts of its program and the rates of a chip.
//!
//! A [`Sheet`] lists what a program costs on one mesh at the smallest batch that it accepts. Every count of a step is
//! either proportional to the batch or, where weights are read or moved, independent of it, so a sheet gives the cost of
//! any batch and any type of weights without counting again.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::architecture::{Architecture, Block, Mlp};
use crate::calibrate::Calibration;
use crate::count::{Counter, Memory};
use crate::error::ShardError;
use crate::hardware::Hardware;
use crate::layout::{Layout, LayoutOptions};
use crate::mesh::Mesh;
use crate::precision::{Precision, Storage, WeightType};
use crate::program::{Collective, Op, Part, Program};
use crate::spec::Sizes;
use crate::workload::Workload;

/// What is assumed.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The assumptions of the paper's closed forms (§3.2, A.1, A.2): only the feed-forward layer communicates, and it has
    /// two matrices; payloads are whole, not `(K − 1)/K`; one network bandwidth whatever the axes; no latency. Time is
    /// `max(compute, memory) + communication` of the whole pass.
    Paper,
    /// Everything that the program does: all collectives with what is really sent, bandwidth and latency by axes, the
    /// model's own feed-forward layer, and `max(compute, memory)` of each step.
    Physical,
    /// The physical terms with factors fitted to measured points.
    Calibrated(Calibration),
}

/// Whether communication and matrix products run at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Overlap {
    /// One after the other.
    None,
    /// Looped collective einsum (§3.5; Wang et al., ASPLOS 2023): all-gathers, reduce-scatters and sends are cut into as
    /// many pieces as their group has chips, and all but one piece hides behind the products of the same pass, as far as
    /// those last. What it can hide at best.
    Looped,
}

/// Seconds of a pass, and where they go.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Cost {
    /// Seconds in all.
    pub seconds: f64,
    /// Seconds of matrix products at peak rate.
    pub compute: f64,
    /// Seconds of reading weights, cache and, except in [`Mode::Paper`], activations.
    pub memory: f64,
    /// Of them, seconds of reading the cache.
    pub cache: f64,
    /// Seconds of communication, before overlap.
    pub communication: f64,
    /// Bytes that a chip sends (in [`Mode::Paper`]: payload bytes).
    pub sent: f64,
    /// Throughput over throughput at peak, `2N` FLOPs a token, `N` the unpadded parameters.
    pub mfu: f64,
    /// Chip-seconds a token: `n · seconds / (B·L)`.
    pub chip_seconds_per_token: f64,
    /// Tokens a second and chip.
    pub tokens_per_second_per_chip: f64,
}

/// A line of a sheet: a step at the sheet's batch.
#[derive(Debug, Clone, Copy)]
struct Line {
    part: Part,
    times: f64,
    flops: f64,
    /// Bytes of weights at 16 bits.
    weight_bytes: f64,
    cache_bytes: f64,
    activation_bytes: f64,
    transfer: Option<Transfer>,
}

/// A collective of a sheet.
#[derive(Debug, Clone, Copy)]
struct Transfer {
    /// Moves weights, so that its bytes follow their type and not the batch.
    of_weights: bool,
    /// Bytes of the payload, weights at 16 bits.
    payload: f64,
    /// Bytes sent.
    sent: f64,
    /// Seconds that do not depend on the bytes.
    latency: f64,
    /// Seconds in all.
    seconds: f64,
    /// Part of it that looped collective einsum can hide.
    hideable: f64,
}

/// MFU of `tokens` tokens that took `seconds` on `chips` chips: `2N` FLOPs a token over what the chips could have done
/// (§2). `parameters` is `N`, without padding.
pub fn mfu(parameters: u64, tokens: usize, seconds: f64, chips: usize, peak_flops: f64) -> f64 {
    2.0 * parameters as f64 * tokens as f64 / (seconds * chips as f64 * peak_flops)
}

/// MFU of several phases together, from the tokens and the MFU of each: what each took is in proportion to their quotient.
pub fn overall_mfu(phases: &[(usize, f64)]) -> f64 {
    let tokens: f64 = phases.iter().map(|&(tokens, _)| tokens as f64).sum();
    let time: f64 = phases.iter().map(|&(tokens, mfu)| tokens as f64 / mfu).sum();
    tokens / time
}

/// What a program costs on a mesh of chips, at any batch and type of weights.
#[derive(Debug, Clone)]
pub struct Sheet {
    lines: Vec<Line>,
    /// The paper's feed-forward layer, for [`Mode::Paper`].
    closed: Vec<Transfer>,
    memory: Memory,
    batch: f64,
    tokens: f64,
    chips: f64,
    layers: f64,
    parameters: u64,
    peak_flops: f64,
    memory_bandwidth: f64,
    total_bandwidth: f64,
    memory_bytes: u64,
}

/// What a [`Sheet`] is made of.
#[derive(Debug, Clone, Copy)]
pub struct SheetInput<'a> {
    /// The model.
    pub model: &'a Architecture,
    /// The chips.
    pub hardware: &'a Hardware,
    /// Their mesh.
    pub mesh: &'a Mesh,
    /// A workload whose batch the layout accepts.
    pub workload: &'a Workload,
    /// Element types; those of the weights are given again with each question.
    pub precision: Precision,
    /// The program and its sizes.
    pub program: (&'a Program, &'a Sizes),
    /// The program of [`paper_twin`] and its sizes; without it, [`Mode::Paper`] has no communication.
    pub twin: Option<(&'a Program, &'a Sizes)>,
}

/// The model that the paper's formulas describe: the same sizes, two matrices, a serial block.
pub fn paper_twin(model: &Architecture) -> Architecture {
    let mlp = Mlp::TwoMatrix(model.mlp.nonlinearity());
    Architecture { mlp, block: Block::Serial, ..model.clone() }
}

impl Sheet {
    /// The sheet of a layout.
    ///
    /// # Errors
    ///
    /// As [`Layout::program`], and if the hardware cannot hold the mesh.
    pub fn of_layout(
        layout: Layout,
        model: &Architecture,
        hardware: &Hardware,
        mesh: &Mesh,
        workload: &Workload,
        (precision, options): (Precision, LayoutOptions),
    ) -> Result<Self, ShardError> {
        let (program, sizes) = layout.program(model, mesh, workload, options)?;
        let (twin, twin_sizes) = layout.program(&paper_twin(model), mesh, workload, options)?;
        Sheet::new(&SheetInput {
            model,
            hardware,
            mesh,
            workload,
            precision,
            program: (&program, &sizes),
            twin: Some((&twin, &twin_sizes)),
        })
    }

    /// Counts the program.
    ///
    /// # Errors
    ///
    /// If the program does not fit the mesh, or the mesh the hardware.
    pub fn new(input: &SheetInput) -> Result<Self, ShardError> {
        let SheetInput { model, hardware, mesh, workload, .. } = *input;
        hardware.accepts(mesh)?;
        let precision = Precision { weights: WeightType::Bf16, ..input.precision };
        let (program, sizes) = input.program;
        let counter = Counter::new(program, mesh, model.layers);
        let mut lines = Vec::new();
        counter.steps(sizes, &precision, |count| {
            lines.push(Line {
                part: count.part,
                times: count.times as f64,
                flops: count.flops as f64,
                weight_bytes: count.weight_bytes as f64,
                cache_bytes: count.cache_bytes as f64,
                activation_bytes: count.activation_bytes as f64,
                transfer: count.moved.and_then(|moved| transfer(program, count.op, &moved, hardware, mesh)),
            });
        })?;
        let mut closed = Vec::new();
        if let Some((twin, sizes)) = input.twin {
            Counter::new(twin, mesh, model.layers).steps(sizes, &precision, |count| {
                let moved = count.moved.filter(|_| count.part == Part::Mlp);
                let one = moved.and_then(|moved| transfer(twin, count.op, &moved, hardware, mesh));
                closed.extend(one.map(|t| Transfer { payload: t.payload * count.times as f64, ..t }));
            })?;
        }
        Ok(Sheet {
            lines,
            closed,
            memory: counter.memory(sizes, &precision)?,
            batch: workload.batch as f64,
            tokens: workload.tokens as f64,
            chips: mesh.chips() as f64,
            layers: model.layers as f64,
            parameters: model.parameters(),
            peak_flops: hardware.peak_flops,
            memory_bandwidth: hardware.memory_bandwidth,
            total_bandwidth: hardware.total_bandwidth(),
            memory_bytes: hardware.memory_bytes,
        })
    }

    /// Bytes of memory that a chip needs at a batch and with a type of weights. Working memory counts a layer's gathered
    /// weights and activations, nothing freed in between.
    pub fn memory(&self, batch: usize, weights: WeightType) -> Memory {
        let factor = batch as f64 / self.batch;
        Memory {
            weights: self.memory.weights * weights.bits() / WeightType::Bf16.bits(),
            cache: (self.memory.cache as f64 * factor).ceil() as u64,
            working: (self.memory.working as f64 * factor).ceil() as u64,
        }
    }

    /// Refuses what does not fit: weights and cache against the chip's memory. Working memory is not held against a plan,
    /// because how much of it lives at once is up to the executor.
    ///
    /// # Errors
    ///
    /// If it does not fit; the message gives the bytes.
    pub fn check_memory(&self, batch: usize, weights: WeightType) -> Result<Memory, ShardError> {
        let memory = self.memory(batch, weights);
        let needed = memory.weights + memory.cache;
        if needed <= self.memory_bytes {
            return Ok(memory);
        }
        let (weights, cache) = (memory.weights, memory.cache);
        Err(ShardError::Memory { available: self.memory_bytes, needed, weights, cache })
    }

    /// What a batch costs.
    pub fn cost(&self, batch: usize, weights: WeightType, mode: Mode, overlap: Overlap) -> Cost {
        let totals = match mode {
            Mode::Paper => self.paper_totals(batch, weights, overlap),
            Mode::Physical | Mode::Calibrated(_) => self.totals(batch, weights, overlap),
        };
        let seconds = match mode {
            Mode::Calibrated(calibration) => calibration.seconds(self.terms_of(&totals)),
            Mode::Paper | Mode::Physical => totals.busy + totals.communication - totals.hidden,
        };
        let tokens = batch as f64 * self.tokens;
        let chip_seconds = self.chips * seconds;
        Cost {
            seconds,
            compute: totals.compute,
            memory: totals.memory,
            cache: totals.cache,
            communication: totals.communication,
            sent: totals.sent,
            mfu: mfu(self.parameters, tokens as usize, seconds, self.chips as usize, self.peak_flops),
            chip_seconds_per_token: chip_seconds / tokens,
            tokens_per_second_per_chip: tokens / chip_seconds,
        }
    }

    /// The terms of [`Mode::Calibrated`] at a batch: seconds of compute, seconds of memory beyond it, seconds of
    /// communication that is not hidden, and the number of blocks.
    pub fn terms(&self, batch: usize, weights: WeightType, overlap: Overlap) -> [f64; Calibration::TERMS] {
        self.terms_of(&self.totals(batch, weights, overlap))
    }

    fn terms_of(&self, totals: &Totals) -> [f64; Calibration::TERMS] {
        let exposed = totals.communication - totals.hidden;
        [totals.compute, totals.busy - totals.compute, exposed, self.layers]
    }

    /// How much more a batch is than the sheet's, and weights of a type than 16 bits.
    fn scales(&self, batch: usize, weights: WeightType) -> (f64, f64) {
        (batch as f64 / self.batch, weights.bits() as f64 / WeightType::Bf16.bits() as f64)
    }

    fn totals(&self, batch: usize, weights: WeightType, overlap: Overlap) -> Totals {
        let (factor, of_type) = self.scales(batch, weights);
        let mut sum = Totals::default();
        let mut hideable = 0.0;
        for line in &self.lines {
            let compute = line.flops * factor / self.peak_flops;
            let cache = line.cache_bytes * factor / self.memory_bandwidth;
            let others = line.weight_bytes * of_type + line.activation_bytes * factor;
            let memory = others / self.memory_bandwidth + cache;
            sum.compute += line.times * compute;
            sum.memory += line.times * memory;
            sum.cache += line.times * cache;
            sum.busy += line.times * compute.max(memory);
            if let Some(t) = line.transfer {
                let seconds = t.seconds_at(factor, of_type);
                sum.communication += line.times * seconds;
                sum.sent += line.times * t.sent * if t.of_weights { of_type } else { factor };
                hideable += line.times * seconds * t.hideable;
            }
        }
        sum.hide(hideable, overlap);
        sum
    }

    fn paper_totals(&self, batch: usize, weights: WeightType, overlap: Overlap) -> Totals {
        let (factor, of_type) = self.scales(batch, weights);
        let mut sum = Totals::default();
        let mut hideable = 0.0;
        for line in &self.lines {
            let cache = line.cache_bytes * factor / self.memory_bandwidth;
            sum.compute += line.times * line.flops * factor / self.peak_flops;
            sum.memory += line.times * (line.weight_bytes * of_type / self.memory_bandwidth + cache);
            sum.cache += line.times * cache;
        }
        for t in &self.closed {
            let payload = t.payload * if t.of_weights { of_type } else { factor };
            sum.sent += payload;
            sum.communication += payload / self.total_bandwidth;
            hideable += payload / self.total_bandwidth * t.hideable;
        }
        sum.busy = sum.compute.max(sum.memory);
        sum.hide(hideable, overlap);
        sum
    }

    /// Seconds of communication of each part of the model at a batch, in [`Mode::Physical`], before overlap.
    pub fn communication_by_part(&self, batch: usize, weights: WeightType) -> BTreeMap<Part, f64> {
        let (factor, of_type) = self.scales(batch, weights);
        let mut parts = BTreeMap::new();
        for (line, t) in self.lines.iter().filter_map(|line| Some((line, line.transfer?))) {
            *parts.entry(line.part).or_default() += line.times * t.seconds_at(factor, of_type);
        }
        parts
    }

    /// Payload bytes of the paper's feed-forward layer in one block at a batch: what Figure 3 draws.
    pub fn paper_bytes_per_layer(&self, batch: usize, weights: WeightType) -> f64 {
        self.paper_totals(batch, weights, Overlap::None).sent / self.layers
    }
}

/// Sums over the steps of a pass, in seconds and bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Totals {
    compute: f64,
    memory: f64,
    cache: f64,
    /// Seconds in which a chip computes or reads.
    busy: f64,
    communication: f64,
    /// Seconds of communication behind which a chip is busy.
    hidden: f64,
    sent: f64,
}

impl Totals {
    fn hide(&mut self, hideable: f64, overlap: Overlap) {
        self.hidden = match overlap {
            Overlap::None => 0.0,
            Overlap::Looped => hideable.min(self.busy),
        };
    }
}

impl Transfer {
    fn seconds_at(&self, factor: f64, of_type: f64) -> f64 {
        self.latency + (self.seconds - self.latency) * if self.of_weights { of_type } else { factor }
    }
}

fn transfer(
    program: &Program,
    op: &Op,
    moved: &crate::count::Moved,
    hardware: &Hardware,
    mesh: &Mesh,
) -> Option<Transfer> {
    if moved.group == 1 {
        return None;
    }
    let of_weights = op.inputs().iter().any(|&id| program.tensor(id).storage == Storage::Weight);
    // The pieces of an all-reduce are rounded up; without that, bytes are in proportion to the batch.
    let group = moved.group as f64;
    let sent = match moved.kind {
        Collective::AllReduce | Collective::AllReduceMax => moved.payload as f64 * (group - 1.0) / group,
        _ => moved.sent as f64,
    };
    let seconds = hardware.collective_seconds(moved.kind, mesh, moved.axes, sent);
    // The seconds are linear in the bytes, so two points give the part that is not.
    let twice = hardware.collective_seconds(moved.kind, mesh, moved.axes, 2.0 * sent);
    let loops = matches!(moved.kind, Collective::AllGather | Collective::ReduceScatter | Collective::Send);
    Some(Transfer {
        of_weights,
        payload: moved.payload as f64,
        sent,
        latency: 2.0 * seconds - twice,
        seconds,
        hideable: if loops { 1.0 - 1.0 / group } else { 0.0 },
    })
}
