//! The comparisons can fail: a collective that does something else, on every rank or on one, and a spec that says
//! something else, each turn them red.

use burn::tensor::{Device, Tensor};
use flashover_shard::ShardError;
use flashover_shard::architecture::Block;
use flashover_shard::layout::{AttentionLayout, Layout, WeightLayout};
use flashover_shard::mesh::{Axis, Mesh};
use flashover_shard::model::ShardedModel;
use flashover_shard::program::{Op, Role};
use flashover_shard::simulate::{TOLERANCE, difference};
use flashover_shard::transport::{Reduction, Simulated, Traffic, Transport};
use flashover_shard::workload::Workload;

use super::case::{Case, SEED, small};

/// A transport whose call number `at` delivers pieces in the wrong order, or what the rank itself has in place of what the
/// others sent.
struct Faulty {
    inner: Simulated,
    calls: usize,
    at: usize,
}

impl Faulty {
    fn is_due(&mut self) -> bool {
        self.calls += 1;
        self.calls == self.at + 1
    }
}

impl Transport for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn all_gather(&mut self, axes: &[Axis], tensor: Tensor<4>) -> Result<Vec<Tensor<4>>, ShardError> {
        let due = self.is_due();
        let mut all = self.inner.all_gather(axes, tensor)?;
        if due {
            all.reverse();
        }
        Ok(all)
    }

    fn reduce_scatter(&mut self, axes: &[Axis], pieces: Vec<Tensor<4>>) -> Result<Tensor<4>, ShardError> {
        let own = pieces[0].clone();
        let sum = self.inner.reduce_scatter(axes, pieces)?;
        Ok(if self.is_due() { own } else { sum })
    }

    fn all_reduce(&mut self, axes: &[Axis], tensor: Tensor<4>, reduction: Reduction) -> Result<Tensor<4>, ShardError> {
        let reduced = self.inner.all_reduce(axes, tensor.clone(), reduction)?;
        Ok(if self.is_due() { tensor } else { reduced })
    }

    fn all_to_all(&mut self, axes: &[Axis], pieces: Vec<Tensor<4>>) -> Result<Vec<Tensor<4>>, ShardError> {
        let due = self.is_due();
        let mut all = self.inner.all_to_all(axes, pieces)?;
        if due {
            all.reverse();
        }
        Ok(all)
    }

    fn send_receive(&mut self, axes: &[Axis], tensor: Tensor<4>) -> Result<Tensor<4>, ShardError> {
        let received = self.inner.send_receive(axes, tensor.clone())?;
        Ok(if self.is_due() { tensor } else { received })
    }

    fn broadcast(&mut self, axes: &[Axis], root: usize, tensor: Option<Tensor<4>>) -> Result<Tensor<4>, ShardError> {
        self.inner.broadcast(axes, root, tensor)
    }

    fn traffic(&self) -> Traffic {
        self.inner.traffic()
    }
}

fn layouts() -> [Layout; 6] {
    use {AttentionLayout as A, WeightLayout as W};
    [
        (W::Stationary1D, A::Heads),
        (W::Stationary2D, A::Heads),
        (W::Stationary2D, A::Sequence),
        (W::GatheredX, A::HeadsAndBatch),
        (W::GatheredXY, A::Batch),
        (W::GatheredXYZ, A::Batch),
    ]
    .map(|(weights, attention)| Layout { weights, attention })
}

const BATCH: usize = 8;
const PROMPT: usize = 8;

fn mesh() -> Mesh {
    "2x2x2".parse().unwrap()
}

fn sharded(case: &Case, layout: Layout) -> ShardedModel {
    ShardedModel::new(case.model.clone(), mesh(), &[layout], SEED, PROMPT + 1, &Device::flex()).unwrap()
}

fn prefill() -> Workload {
    Workload { scored: PROMPT, ..Workload::prefill(BATCH, PROMPT) }
}

/// How far the logits of the prompt and of the next token are off if, in the pass `bad` of these two, call number `at` is
/// wrong on the ranks that `is_bad` picks.
fn off(case: &Case, layout: Layout, bad: usize, at: usize, is_bad: fn(usize) -> bool) -> f64 {
    let mut sharded = sharded(case, layout);
    let ends = |pass: usize| -> Vec<Faulty> {
        let at = |rank| if pass == bad && is_bad(rank) { at } else { usize::MAX - 1 };
        Simulated::ends(&mesh())
            .into_iter()
            .enumerate()
            .map(|(rank, inner)| Faulty { inner, calls: 0, at: at(rank) })
            .collect()
    };
    let found = sharded.pass(layout, prefill(), &case.prompt, ends(0)).unwrap();
    if bad == 0 {
        return difference(&found.logits, &case.logits.clone().narrow(1, 0, PROMPT));
    }
    let next: Vec<_> = found.greedy().into_iter().map(|token| vec![token]).collect();
    let found = sharded.pass(layout, Workload::decode(BATCH, PROMPT + 1), &next, ends(1)).unwrap();
    difference(&found.logits, &case.logits.clone().narrow(1, PROMPT, 1))
}

/// The calls of a pass.
fn calls(case: &Case, layout: Layout, workload: Workload) -> usize {
    let options = sharded(case, layout).options();
    let (program, _) = layout.program(&case.model, &mesh(), &workload, options).unwrap();
    fn count(steps: &[flashover_shard::program::Step]) -> usize {
        let of = |step: &flashover_shard::program::Step| match &step.op {
            Op::Collective { moves, .. } => moves.len(),
            Op::Repeat { axes, body, .. } => (mesh().group_size(axes).unwrap() - 1) * count(body),
            _ => 0,
        };
        steps.iter().map(of).sum()
    }
    // One block is enough.
    count(&program.embed) + count(&program.layer) + count(&program.head)
}

#[test]
fn every_collective_that_goes_wrong_is_seen() {
    let mut planted = 0;
    for (case, layouts) in [
        (Case::new(one_block(8, 2, Block::Serial), BATCH, PROMPT, 1), layouts()),
        (Case::new(one_block(8, 1, Block::Parallel), BATCH, PROMPT, 1), layouts()),
    ] {
        for layout in layouts {
            // Nothing planted, nothing found.
            assert!(off(&case, layout, 0, usize::MAX - 1, |_| true) <= TOLERANCE);
            let passes = [prefill(), Workload::decode(BATCH, PROMPT + 1)];
            for (pass, workload) in passes.into_iter().enumerate() {
                // Where weights are gathered, one token cannot be sharded over the sequence; here no such layout is.
                for at in 0..calls(&case, layout, workload) {
                    let found = off(&case, layout, pass, at, |_| true);
                    assert!(
                        found > TOLERANCE,
                        "{layout}, {}: call {at} of pass {pass}: {found:e}",
                        case.model.kv_heads
                    );
                    planted += 1;
                }
            }
        }
    }
    println!("{planted} wrong collectives, all seen");
}

/// One rank of eight is enough.
#[test]
fn one_rank_that_goes_wrong_is_seen() {
    let case = Case::new(one_block(8, 2, Block::Serial), BATCH, PROMPT, 1);
    let layout = Layout { weights: WeightLayout::Stationary2D, attention: AttentionLayout::Batch };
    for at in 0..calls(&case, layout, prefill()) {
        let found = off(&case, layout, 0, at, |rank| rank == 6);
        assert!(found > TOLERANCE, "call {at}: {found:e}");
    }
}

fn one_block(heads: usize, kv_heads: usize, block: Block) -> flashover_shard::architecture::Architecture {
    flashover_shard::architecture::Architecture { layers: 1, ..small(heads, kv_heads, block) }
}

/// A spec with one axis less does not follow from the steps, or not from how the weights are stored.
#[test]
fn every_spec_that_says_something_else_is_refused() {
    let case = Case::new(one_block(8, 2, Block::Serial), BATCH, PROMPT, 1);
    let mut planted = 0;
    for layout in layouts() {
        let mut sharded = sharded(&case, layout);
        let (program, sizes) = layout.program(&case.model, &mesh(), &prefill(), sharded.options()).unwrap();
        for (id, tensor) in program.tensors.iter().enumerate() {
            for dim in tensor.spec.dims().iter().filter(|d| !d.axes.is_empty()) {
                let mut wrong = program.clone();
                wrong.tensors[id].spec = tensor.spec.with(dim.dim, &dim.axes[1..]).unwrap();
                let found = sharded.run((wrong, sizes), prefill(), &case.prompt, Simulated::ends(&mesh()));
                let error = found.map(drop).expect_err(&format!("{layout}: {} is accepted", tensor.name)).to_string();
                let who =
                    if tensor.role == Role::Weight { format!("program: {}", tensor.name) } else { "step ".into() };
                assert!(error.starts_with(&who), "{layout}: {error}");
                planted += 1;
            }
        }
    }
    println!("{planted} wrong specs, all refused");
}

/// A transport that delivers a piece too few.
struct Short(Simulated);

impl Transport for Short {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn all_gather(&mut self, axes: &[Axis], tensor: Tensor<4>) -> Result<Vec<Tensor<4>>, ShardError> {
        let mut all = self.0.all_gather(axes, tensor)?;
        all.pop();
        Ok(all)
    }

    fn reduce_scatter(&mut self, axes: &[Axis], pieces: Vec<Tensor<4>>) -> Result<Tensor<4>, ShardError> {
        self.0.reduce_scatter(axes, pieces)
    }

    fn all_reduce(&mut self, axes: &[Axis], tensor: Tensor<4>, reduction: Reduction) -> Result<Tensor<4>, ShardError> {
        self.0.all_reduce(axes, tensor, reduction)
    }

    fn all_to_all(&mut self, axes: &[Axis], pieces: Vec<Tensor<4>>) -> Result<Vec<Tensor<4>>, ShardError> {
        self.0.all_to_all(axes, pieces)
    }

    fn send_receive(&mut self, axes: &[Axis], tensor: Tensor<4>) -> Result<Tensor<4>, ShardError> {
        self.0.send_receive(axes, tensor)
    }

    fn broadcast(&mut self, axes: &[Axis], root: usize, tensor: Option<Tensor<4>>) -> Result<Tensor<4>, ShardError> {
        self.0.broadcast(axes, root, tensor)
    }

    fn traffic(&self) -> Traffic {
        self.0.traffic()
    }
}

/// What a rank holds is measured against the bytes of its spec.
#[test]
fn a_block_of_another_size_is_refused() {
    let case = Case::new(one_block(8, 2, Block::Serial), BATCH, PROMPT, 1);
    let layout = Layout { weights: WeightLayout::Stationary2D, attention: AttentionLayout::Batch };
    let ends = Simulated::ends(&mesh()).into_iter().map(Short).collect();
    let error = sharded(&case, layout).pass(layout, prefill(), &case.prompt, ends).unwrap_err().to_string();
    // BLE_x of 8·8·32/2 f32, of which three of four pieces came.
    let expected = "x BLE_x: expected [8, 8, 16, 1] of f32, 4096 bytes, got [8, 8, 12, 1] of F32, 3072 bytes";
    assert!(error.contains(expected), "{error}");
}
