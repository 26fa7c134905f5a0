//! How many heads are worked on side by side: as many as leave their keys and values in the second-level cache, and such a
//! number that the cubes end together.

use super::config::HopperConfig;
use crate::problem::Problem;

/// Bytes of keys and values that a section of heads may take of the second-level cache.
const CACHE_BYTES: usize = 24 << 20;

/// What a query tile costs beside its steps, in steps.
const TILE_COST: usize = 2;

/// Works after which no section is looked at any more.
const WORKS: usize = 8192;

/// Heads of a section, packed ones counted as one, for `cubes` cubes.
pub(crate) fn section(problem: &Problem, cfg: HopperConfig, cubes: usize) -> usize {
    let Problem { batch, heads_q, seq_kv, head_dim, value_dim, element, .. } = *problem;
    let heads = batch * heads_q / cfg.packed;
    let bytes = seq_kv * (head_dim + value_dim) * element.bytes();
    let cached = (CACHE_BYTES / bytes.max(1)).max(1).saturating_mul(problem.group() / cfg.packed).clamp(1, heads);
    let costs = tile_costs(problem, cfg);
    // Where all tiles cost the same, or each cube takes one, the order does not matter for their ends.
    if problem.plan.is_some() || costs.iter().all(|&cost| cost == costs[0]) || heads * costs.len() <= cubes {
        return cached;
    }
    let fewer = (6..=12).rev().map(|twelfths| (cached * twelfths / 12).max(1));
    // Many cubes to a head walk its keys together, whatever the cache holds.
    let all = (4 * heads <= cubes).then_some(heads);
    let mut best = (usize::MAX, cached);
    for section in fewer.chain(all) {
        let unevenness = unevenness(&costs, heads, section, cubes);
        if unevenness < best.0 {
            best = (unevenness, section);
        }
        if unevenness <= 1020 {
            break;
        }
    }
    best.1
}

/// What each query tile of a head, or of heads that share their tiles, costs, in steps, as far as the band tells: key lengths are not known here.
pub(super) fn tile_costs(problem: &Problem, cfg: HopperConfig) -> Vec<usize> {
    let (ahead, left, right, sinks) = problem.band.scalars();
    let (ahead, left, right, sinks) = (ahead as i64, left as i64, right as i64, sinks as i64);
    let (shift, keys, bk) = (problem.alignment() as i64, problem.seq_kv as i64, cfg.bk as i64);
    let tiles = (0..problem.seq_q).step_by(cfg.bq());
    let cost = |i0: usize| {
        let (a0, a1) = (i0 as i64 + shift, (i0 + cfg.bq()).min(problem.seq_q) as i64 - 1 + shift);
        let sink_tiles = (sinks.min(a1 + ahead + 1).min(keys).max(0) + bk - 1) / bk;
        let (first, last) = ((a0 - left).max(0), (a1 + right.min(ahead)).min(keys - 1));
        let band_tiles = if first <= last { last / bk + 1 - (first / bk).max(sink_tiles) } else { 0 };
        (sink_tiles + band_tiles.max(0)) as usize + TILE_COST
    };
    tiles.map(cost).collect()
}

/// Thousandths of an even share that the cube with the most to do is given, in the order of
/// [`sectioned_work`](crate::family::walk::sectioned_work), every other round backwards.
fn unevenness(costs: &[usize], heads: usize, section: usize, cubes: usize) -> usize {
    let mut given = vec![0; cubes];
    let (mut place, mut backwards, mut works, mut sum) = (0, false, 0, 0);
    for first in (0..heads).step_by(section) {
        for &cost in costs.iter().rev() {
            for _ in first..heads.min(first + section) {
                given[if backwards { cubes - 1 - place } else { place }] += cost;
                sum += cost;
                place += 1;
                if place == cubes {
                    (place, backwards) = (0, !backwards);
                }
                works += 1;
            }
        }
        if works >= WORKS {
            break;
        }
    }
    given.into_iter().max().unwrap_or(0) * 1000 * cubes / sum.max(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::Band;
    use crate::problem::Element;

    const CUBES: usize = 132;

    fn causal(batch: usize, heads: usize, seq: usize) -> (Problem, HopperConfig) {
        let shape = [batch, heads, seq, 128];
        let p = Problem::new(shape, shape, shape, Element::BF16).unwrap();
        let p = Problem { band: Band { causal: true, ..Band::default() }, ..p };
        let cfg = HopperConfig::of(&p).0;
        (p, cfg)
    }

    #[test]
    fn cubes_end_together_under_causal_order() {
        for (batch, seq) in [(4, 4096), (1, 16384), (16, 1024), (2, 8192), (8, 2048)] {
            let (p, cfg) = causal(batch, 16, seq);
            let (costs, heads) = (tile_costs(&p, cfg), batch * 16);
            let section = section(&p, cfg, CUBES);
            let unevenness = unevenness(&costs, heads, section, CUBES);
            assert!(unevenness <= 1020, "{batch} x {seq}, {section} heads: {unevenness} thousandths");
        }
    }

    #[test]
    fn costs_are_those_of_the_walk() {
        let (p, cfg) = causal(1, 1, 1000);
        assert_eq!(tile_costs(&p, cfg), [3, 4, 5, 6, 7, 8, 9, 10]);
        let window = Problem { band: Band { left: 100, sinks: 5, ..p.band }, ..p };
        assert_eq!(tile_costs(&window, cfg), [3, 4, 5, 5, 5, 5, 5, 5]);
    }
}
