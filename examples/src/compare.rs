//! Burn's own attention against flashover's on the same batch: error, time and memory at growing lengths.

use std::time::{Duration, Instant};

use burn::tensor::module::attention as burn_attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Distribution, Tensor, TensorData};
use flashover::AttentionOptions;

use crate::Result;
use crate::memory::{self, Counted};
use crate::reference::{Reference, max_error};

/// Heads of the batch.
pub const HEADS: usize = 8;
/// Size of a head.
pub const HEAD_DIM: usize = 64;
/// Up to this length the error is that of all heads; beyond, of fewer, for the reference takes O(S²).
const ALL_HEADS_UP_TO: usize = 1024;
/// Rounds of a case: at least, at most, and for how long.
const ROUNDS: (usize, usize, Duration) = (3, 15, Duration::from_secs(2));
/// Runs of a case that takes the fewest: a warm-up and the rounds.
const RUNS: u32 = ROUNDS.0 as u32 + 1;

/// What is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Without autodiff.
    Forward,
    /// Under autodiff: the forward, and the gradients of q, k and v.
    ForwardBackward,
}

/// Whose attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `burn::tensor::module::attention`.
    Burn,
    /// `flashover::attention`.
    Flashover,
}

/// Figures of one side.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// Median time of a run.
    pub seconds: f64,
    /// Peak memory beyond the operands, results included.
    pub peak_bytes: Option<usize>,
    /// Largest |difference| from the f64 reference: of o, or of dq, dk and dv.
    pub error: f64,
}

/// One length and pass; a side that was skipped says why.
#[derive(Debug, Clone)]
pub struct Row {
    /// Queries and keys.
    pub length: usize,
    /// What was timed.
    pub pass: Pass,
    /// Burn's.
    pub burn: Result<Figures, String>,
    /// Ours.
    pub flashover: Figures,
}

/// Heads whose error is taken at a length.
pub fn checked_heads(length: usize) -> usize {
    (HEADS * ALL_HEADS_UP_TO * ALL_HEADS_UP_TO / (length * length)).clamp(1, HEADS)
}

/// q, k, v and the output's gradient: `[1, HEADS, S, HEAD_DIM]` of f32.
struct Batch {
    tensors: [Tensor<4>; 4],
    reference: Reference,
}

impl Batch {
    fn new(length: usize, device: &Device) -> Result<Self> {
        let host = Device::flex();
        host.seed(length as u64);
        let shape = [1, HEADS, length, HEAD_DIM];
        let random = || Tensor::<4>::random(shape, Distribution::Normal(0.0, 1.0), &host).into_data();
        let data: [TensorData; 4] = [random(), random(), random(), random()];
        let part = checked_heads(length) * length * HEAD_DIM;
        let mut values = Vec::new();
        for data in &data {
            let all = data.clone().try_into_vec::<f32>().map_err(|error| format!("comparison: {error:?}"))?;
            values.push(all[..part].to_vec());
        }
        let reference = Reference::new(&values[0], &values[1], &values[2], &values[3], length, HEAD_DIM);
        Ok(Batch { tensors: data.map(|data| Tensor::from_data(data, device)), reference })
    }

    /// Runs a pass: o, or dq, dk and dv.
    fn run(&self, side: Side, pass: Pass) -> Vec<Tensor<4>> {
        let [q, k, v, do_] = self.tensors.clone();
        match pass {
            Pass::Forward => vec![attend(side, q, k, v)],
            Pass::ForwardBackward => {
                let [q, k, v] = [q, k, v].map(|leaf| leaf.autodiff().require_grad());
                let o = attend(side, q.clone(), k.clone(), v.clone());
                let gradients = (o * do_.autodiff()).sum().backward();
                [q, k, v].iter().map(|leaf| leaf.grad(&gradients).expect("a gradient of every operand")).collect()
            }
        }
    }

    fn error(&self, outputs: Vec<Tensor<4>>) -> Result<f64> {
        let Reference { o, dq, dk, dv } = &self.reference;
        let expected = if outputs.len() == 1 { vec![o] } else { vec![dq, dk, dv] };
        let mut worst = 0.0;
        for (output, expected) in outputs.into_iter().zip(expected) {
            let found = output.into_data().try_into_vec::<f32>().map_err(|error| format!("comparison: {error:?}"))?;
            let error = max_error(&found[..expected.len()], expected);
            worst = if error > worst || error.is_nan() { error } else { worst };
        }
        Ok(worst)
    }
}

fn attend(side: Side, q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    match side {
        Side::Burn => {
            let options = AttentionModuleOptions { is_causal: true, ..Default::default() };
            burn_attention(q, k, v, None, None, options)
        }
        Side::Flashover => {
            flashover::attention(q, k, v, &AttentionOptions::new().causal()).expect("a sound attention problem")
        }
    }
}

/// Measures all `lengths`, which grow, and hands every row to `show` as it comes. Burn's side is skipped where the
/// lengths before let expect that it takes more than `limit`, or more memory than is free.
///
/// # Errors
///
/// If the device fails.
pub fn compare(device: &Device, lengths: &[usize], limit: Duration, mut show: impl FnMut(&Row)) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = Vec::new();
    for &length in lengths {
        let batch = Batch::new(length, device)?;
        for pass in [Pass::Forward, Pass::ForwardBackward] {
            let before = rows.iter().rev().find(|row| row.pass == pass);
            let row = match before.and_then(|before| too_much(before, length, limit)) {
                None => {
                    let [burn, flashover] = measure(&batch, pass, [Side::Burn, Side::Flashover], device)?;
                    Row { length, pass, burn: Ok(burn), flashover }
                }
                Some(reason) => {
                    let [flashover] = measure(&batch, pass, [Side::Flashover], device)?;
                    Row { length, pass, burn: Err(reason), flashover }
                }
            };
            show(&row);
            rows.push(row);
        }
    }
    Ok(rows)
}

/// Figures of the sides, their rounds interleaved, so that a change of the machine's pace meets both.
fn measure<const N: usize>(batch: &Batch, pass: Pass, sides: [Side; N], device: &Device) -> Result<[Figures; N]> {
    let mut figures = Vec::new();
    for side in sides {
        let error = batch.error(batch.run(side, pass))?;
        figures.push(Figures { seconds: 0.0, peak_bytes: None, error });
    }
    let mut times: [Vec<f64>; N] = std::array::from_fn(|_| Vec::new());
    let (least, most, span) = ROUNDS;
    let start = Instant::now();
    for round in 0..most {
        if round >= least && start.elapsed() > span {
            break;
        }
        for ((side, figures), times) in sides.iter().zip(&mut figures).zip(&mut times) {
            if round == 0 && Counted::on(device) == Counted::Pools {
                // Emptied pools would slow a timed run.
                figures.peak_bytes = memory::peak_extra(device, || timed(batch, *side, pass, device)).1;
            }
            let (seconds, peak) = match Counted::on(device) {
                Counted::Allocator => memory::peak_extra(device, || timed(batch, *side, pass, device)),
                Counted::Pools | Counted::Not => (timed(batch, *side, pass, device), figures.peak_bytes),
            };
            times.push(seconds?);
            figures.peak_bytes = peak;
        }
    }
    for (figures, times) in figures.iter_mut().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        figures.seconds = times[times.len() / 2];
    }
    Ok(std::array::from_fn(|at| figures[at]))
}

fn timed(batch: &Batch, side: Side, pass: Pass, device: &Device) -> Result<f64> {
    let start = Instant::now();
    let outputs = batch.run(side, pass);
    device.sync().map_err(|error| format!("comparison: {error}"))?;
    let seconds = start.elapsed().as_secs_f64();
    drop(outputs);
    Ok(seconds)
}

/// Why Burn's side would be too much at `length`, going by a row before it: its time and memory grow as S².
fn too_much(before: &Row, length: usize, limit: Duration) -> Option<String> {
    let figures = match &before.burn {
        Ok(figures) => figures,
        Err(reason) => return Some(reason.clone()),
    };
    let growth = (length as f64 / before.length as f64).powi(2);
    let seconds = figures.seconds * growth * f64::from(RUNS);
    if seconds > limit.as_secs_f64() {
        let limit = limit.as_secs();
        return Some(format!("skipped: {RUNS} runs would take about {seconds:.0} s (limit {limit} s, --limit)"));
    }
    let bytes = figures.peak_bytes? as f64 * growth;
    let free = available_memory()? as f64;
    let gib = f64::from(1 << 30);
    (bytes > 0.8 * free)
        .then(|| format!("skipped: needs about {:.1} GiB of memory, {:.1} GiB are free", bytes / gib, free / gib))
}

/// Bytes that Linux could give without swapping; `None` elsewhere.
fn available_memory() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()? << 10)
}
