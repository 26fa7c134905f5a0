//! The full sweep against the clock, in a binary of its own: no other test takes its cores.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use flashover_shard::planner::{Query, Sweep, sweep};
use flashover_shard::{hardware, models};

/// The full sweep: every ordered factorization of every number of chips from 64 to 256, batches 1 to 1024, every layout,
/// three types of weights, both phases.
#[test]
fn the_full_sweep_takes_less_than_a_second() {
    let query = Query::new(models::by_name("palm-540b").unwrap(), hardware::by_name("tpu-v4").unwrap());
    let mut best = Duration::MAX;
    let mut found = None;
    for _ in 0..3 {
        let start = Instant::now();
        found = Some(sweep(&query).unwrap());
        best = best.min(start.elapsed());
    }
    let found: Sweep = found.unwrap();
    println!("{} costed, {} refused, {} meshes, {best:?}", found.costed, found.refused, query.meshes.len());
    let all = query.meshes.len() * query.layouts.len() * query.batches.len() * query.weights.len() * 2;
    assert_eq!(found.costed + found.refused, all);
    assert!(found.costed > 100_000, "{}", found.costed);
    let counts: BTreeSet<_> = found.plans.iter().map(|plan| plan.point.chips).collect();
    // Of 64 to 256, those that divide E = 2^11·9 and F = 2^13·9.
    assert!([64, 72, 96, 128, 144, 192, 256].iter().all(|n| counts.contains(n)), "{counts:?}");
    if cfg!(not(debug_assertions)) {
        assert!(best < Duration::from_secs(1), "{best:?}");
    }
}
