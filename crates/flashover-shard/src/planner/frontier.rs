//! The Pareto frontier of the winners, and where one layout gives way to another.

use serde::Serialize;

use super::{Plan, Sweep};
use crate::layout::Layout;
use crate::precision::WeightType;
use crate::workload::Phase;

/// Plans that no other plan beats in both seconds and `value` (less is better), by seconds; `value` is for example
/// chip-seconds a token, or MFU with its sign turned.
pub fn pareto<'a>(plans: impl IntoIterator<Item = &'a Plan>, value: impl Fn(&Plan) -> f64) -> Vec<&'a Plan> {
    let mut plans: Vec<_> = plans.into_iter().collect();
    plans.sort_by(|a, b| a.cost.seconds.total_cmp(&b.cost.seconds).then(value(a).total_cmp(&value(b))));
    let mut least = f64::INFINITY;
    plans.retain(|plan| {
        let better = value(plan) < least;
        least = least.min(value(plan));
        better
    });
    plans
}

/// The best layout changes between two batches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Crossover {
    /// The phase.
    pub phase: Phase,
    /// Chips.
    pub chips: usize,
    /// Type of weights.
    pub weights: WeightType,
    /// Largest batch tried at which `before` is best.
    pub last: usize,
    /// Smallest batch tried at which `after` is.
    pub first: usize,
    /// The layout of the smaller batch.
    pub before: Layout,
    /// The layout of the larger batch.
    pub after: Layout,
}

/// Where the best layout changes with the batch, at each number of chips and type of weights.
pub fn crossovers(sweep: &Sweep) -> Vec<Crossover> {
    let mut winners: Vec<_> = sweep.winners().collect();
    winners.sort_by_key(|plan| (plan.point.phase, plan.point.chips, plan.point.weights, plan.point.batch));
    let change = |pair: &[&Plan]| {
        let [a, b] = [pair[0], pair[1]];
        let place = |plan: &Plan| (plan.point.phase, plan.point.chips, plan.point.weights);
        (place(a) == place(b) && a.layout() != b.layout()).then(|| Crossover {
            phase: a.point.phase,
            chips: a.point.chips,
            weights: a.point.weights,
            last: a.point.batch,
            first: b.point.batch,
            before: a.layout(),
            after: b.layout(),
        })
    };
    winners.windows(2).filter_map(change).collect()
}
