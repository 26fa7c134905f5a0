//! Why a layout wins and what each of the others would have cost, as data and in words.

use core::fmt;

use serde::Serialize;

use crate::hardware::Hardware;
use crate::layout::Layout;
use crate::planner::{Plan, Point, Sweep};

/// The best plan of an operating point, and every other layout.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Why {
    /// The operating point.
    pub point: Point,
    /// What wins, if anything fits.
    pub winner: Option<Plan>,
    /// The others, the cheapest first; those without a cost last.
    pub losers: Vec<Loser>,
}

/// A layout that is not the best.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Loser {
    /// The layout.
    pub layout: Layout,
    /// Its plan on its best mesh, if any mesh accepts it.
    pub plan: Option<Plan>,
    /// Its seconds over the winner's.
    pub ratio: Option<f64>,
    /// Why it lost.
    pub reason: String,
}

/// Explains an operating point of a sweep.
pub fn why(sweep: &Sweep, hardware: &Hardware, point: Point) -> Why {
    let plans = sweep.at(point);
    let winner = sweep.best(point);
    let beaten = plans.iter().filter(|plan| Some(*plan) != winner).map(|plan| Loser {
        layout: plan.layout(),
        plan: Some(plan.clone()),
        ratio: winner.map(|winner| plan.cost.seconds / winner.cost.seconds),
        reason: reason(winner, plan, hardware),
    });
    let refused = sweep.refusals.iter().filter(|refusal| {
        (refusal.phase, refusal.chips) == (point.phase, point.chips)
            && refusal.batch.is_none_or(|batch| batch == point.batch)
    });
    let refused = refused.map(|refusal| Loser {
        layout: refusal.layout,
        plan: None,
        ratio: None,
        reason: refusal.reason.clone(),
    });
    Why { point, winner: winner.cloned(), losers: beaten.chain(refused).collect() }
}

/// What weighs most against a plan.
fn reason(winner: Option<&Plan>, plan: &Plan, hardware: &Hardware) -> String {
    if !plan.fits {
        let (weights, cache) = (plan.memory.weights, plan.memory.cache);
        return format!(
            "does not fit: {} bytes a chip ({weights} of weights, {cache} of cache), {} available",
            weights + cache,
            hardware.memory_bytes
        );
    }
    let Some(winner) = winner else { return "nothing to compare with".to_owned() };
    let (a, b) = (&winner.cost, &plan.cost);
    if b.seconds <= a.seconds * (1.0 + 1e-12) {
        return "as fast".to_owned();
    }
    let terms = [
        ("communication", a.communication, b.communication),
        ("reading the cache", a.cache, b.cache),
        ("reading weights and activations", a.memory - a.cache, b.memory - b.cache),
        ("computing", a.compute, b.compute),
    ];
    let (name, before, after) =
        terms.into_iter().max_by(|x, y| (x.2 - x.1).total_cmp(&(y.2 - y.1))).expect("there are terms");
    if after <= before {
        return "no term is larger: products and reads alternate less well".to_owned();
    }
    format!("{name} takes {} instead of {}", Seconds(after), Seconds(before))
}

/// Seconds with a unit that keeps three or four digits.
#[derive(Debug, Clone, Copy)]
pub struct Seconds(pub f64);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = match self.0 {
            s if s >= 1.0 => (s, "s"),
            s if s >= 1e-3 || s == 0.0 => (s * 1e3, "ms"),
            s => (s * 1e6, "us"),
        };
        f.pad(&if value >= 100.0 { format!("{value:.0} {unit}") } else { format!("{value:.2} {unit}") })
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Point { phase, chips, batch, weights } = self.point;
        writeln!(f, "{phase}, {chips} chips, batch {batch}, {weights} weights")?;
        match &self.winner {
            None => writeln!(f, "  no layout fits")?,
            Some(plan) => {
                let cost = &plan.cost;
                writeln!(f, "  best: {} on {}: {}", plan.layout(), plan.mesh, Seconds(cost.seconds))?;
                writeln!(
                    f,
                    "    compute {}, memory {} ({} of it cache), communication {}; MFU {:.1} %",
                    Seconds(cost.compute),
                    Seconds(cost.memory),
                    Seconds(cost.cache),
                    Seconds(cost.communication),
                    100.0 * cost.mfu
                )?;
            }
        }
        for loser in &self.losers {
            let layout = loser.layout.to_string();
            match (&loser.plan, loser.ratio) {
                (Some(plan), Some(ratio)) => {
                    let seconds = Seconds(plan.cost.seconds).to_string();
                    writeln!(f, "  {layout:<38} {seconds:>10} ({ratio:.2}x) on {}: {}", plan.mesh, loser.reason)?;
                }
                (Some(plan), None) => {
                    let seconds = Seconds(plan.cost.seconds).to_string();
                    writeln!(f, "  {layout:<38} {seconds:>10} on {}: {}", plan.mesh, loser.reason)?;
                }
                _ => writeln!(f, "  {layout:<38} {:>10} {}", "refused", loser.reason)?,
            }
        }
        Ok(())
    }
}
