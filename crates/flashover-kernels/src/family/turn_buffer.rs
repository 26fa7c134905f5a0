//! The buffer of a backward in one pass: the ticket counter, counters of query tiles, and behind them, under a plan, the
//! [lists](super::listed) of steps and, without turns, the orders of key tiles.

use cubecl::prelude::*;

use super::launcher::{Launcher, SUM_UNITS, binding_facts, numbers};
use super::listed::{LINE, ListsLaunch, list_steps_kernel};
use super::scratch::Layout;
use super::tile_shape::TileShape;
use crate::device::DeviceTensor;
use crate::problem::Problem;

/// Name of the kernel that lists steps.
pub(crate) const LIST_STEPS: &str = "list_steps";

/// See the module.
pub(crate) struct TurnBuffer {
    /// u32.
    pub words: DeviceTensor,
    /// Counters at its start.
    pub counters: usize,
    /// The first line of lists, and how many lines those of a batch element take.
    at: usize,
    each: usize,
    /// The first line of orders.
    orders: usize,
    ordered: bool,
}

impl TurnBuffer {
    /// Room for the ticket counter and so many more, and for the lists of a problem's key tiles of `tile`. Cubes take turns if
    /// `ordered`. Nothing is written yet.
    pub fn new(client: &Client, problem: &Problem, counters: usize, tile: TileShape, ordered: bool) -> Self {
        let counters = counters + 1;
        let (at, (copies, each)) = (counters.div_ceil(LINE), lines(problem, tile));
        let orders = at + copies * each;
        let lines = orders + order_lines(problem, tile, ordered);
        TurnBuffer {
            words: DeviceTensor::empty(client, &[lines * LINE], u32::elem_type_native()),
            counters,
            at,
            each,
            orders,
            ordered,
        }
    }

    /// What the backward is told of the lists.
    pub fn lists(&self) -> ListsLaunch {
        ListsLaunch::new(self.at as u32, self.each as u32, self.orders as u32)
    }

    /// Lists the steps of every key tile, if the problem has a plan; with turns, if cubes take them.
    pub fn list_steps(
        &self,
        launcher: &Launcher,
        problem: &Problem,
        scratch: &DeviceTensor,
        layout: &Layout,
        elem: ElemType,
        tile: TileShape,
    ) {
        let Some(plan) = problem.plan else { return };
        let (bindings, address) = binding_facts([scratch, &self.words].into_iter());
        launcher.note_small(LIST_STEPS, bindings, 0);
        let cubes = problem.batch * plan.planes[1] * problem.seq_kv.div_ceil(tile.rows);
        // SAFETY: a list has a line a block that the plan has for its key tile and one more, which the buffer was made for;
        // lines of 16 bytes start where the buffer does.
        unsafe {
            list_steps_kernel::launch_unchecked(
                launcher.client,
                launcher.cubes(cubes),
                CubeDim::new_1d(SUM_UNITS as u32),
                address,
                scratch.buffer(),
                BufferArg::from_raw_parts(self.words.handle.clone(), self.words.elements() / LINE),
                numbers(problem, layout),
                self.lists(),
                problem.bias.is_some(),
                self.ordered,
                tile,
                elem,
            );
        }
    }
}

/// Copies of the lists, and lines of each: one a step, as if every word of the plan's were a block, and one a list.
fn lines(problem: &Problem, tile: TileShape) -> (usize, usize) {
    let Some(plan) = problem.plan else { return (0, 0) };
    let [batch, heads] = plan.planes;
    let copies = if batch == 1 { problem.batch } else { 1 };
    let tiles = plan.tile.bk as usize / tile.rows * (plan.tile.bq as usize / tile.cols);
    (copies, plan.column_words * tiles + batch * heads * problem.seq_kv.div_ceil(tile.rows))
}

/// Lines of orders: one for each key tile in every plane of the plan, if there are no turns.
fn order_lines(problem: &Problem, tile: TileShape, ordered: bool) -> usize {
    let Some(plan) = problem.plan.filter(|_| !ordered) else { return 0 };
    plan.planes.iter().product::<usize>() * problem.seq_kv.div_ceil(tile.rows)
}

/// Bytes of the lists and orders of a problem under a plan.
pub(crate) fn list_bytes(problem: &Problem, tile: TileShape, ordered: bool) -> u64 {
    let (copies, each) = lines(problem, tile);
    ((copies * each + order_lines(problem, tile, ordered)) * LINE * size_of::<u32>()) as u64
}

#[cfg(test)]
mod tests {
    use super::super::element::Head;
    use super::super::listed::{Lists, list_of, tests::numbers};
    use super::*;
    use crate::block_plan::{BlockPlan, TileSize};
    use crate::mask::{Band, Extent, Mask};
    use crate::problem::Element;

    /// No list overlaps another, and the last ends within the buffer.
    #[test]
    fn lists_do_not_overlap() {
        let spots = Mask::function("turn_buffer_spots", |b, h, i, j| (i / 3 + j / 5 + b + h) % 3 > 0).unwrap();
        let tile = TileShape { rows: 8, cols: 4 };
        for (mask, planes) in [(Mask::causal(), 1), (spots, 2)] {
            for (bq, bk) in [(4, 8), (8, 24)] {
                let (seq_q, seq_kv) = (50, 90);
                let extent = Extent { batch: planes, heads: planes, seq_q, seq_kv };
                let plan = BlockPlan::new(&mask, extent, TileSize { bq, bk }).unwrap();
                let shape = |seq: u32| [2, 2, seq as usize, 8];
                let mut problem = Problem::new(shape(seq_q), shape(seq_kv), shape(seq_kv), Element::F16).unwrap();
                problem.plan = Some(plan.shape(plan.points(), [2, 2]));
                let scratch: Vec<u32> = core::iter::once(0).chain(plan.to_words()).collect();
                let n = numbers(Extent { batch: 2, heads: 2, ..extent }, Band::default());
                let (copies, each) = lines(&problem, tile);
                let lists = Lists { at: 3, each: each as u32, orders: 0 };
                let mut taken = vec![false; copies * each];
                for (batch, head) in (0..2).flat_map(|b| (0..plan.heads()).map(move |h| (b, h))) {
                    for j in 0..seq_kv.div_ceil(tile.rows as u32) {
                        let at = Head { batch, head, keys: seq_kv as i32, slope: 0.0, mask_at: 0, bias_at: 0 };
                        let first = list_of(j * tile.rows as u32, at, lists, &scratch, n, tile) as usize - 3;
                        let blocks = plan.column(batch % plan.batch(), head, j * tile.rows as u32 / bk).len();
                        for line in &mut taken[first..=first + blocks * bq as usize / tile.cols] {
                            assert!(!core::mem::replace(line, true), "batch {batch}, head {head}, key tile {j}");
                        }
                    }
                }
            }
        }
    }
}
