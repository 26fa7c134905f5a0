//! What the kernels are refused for: a device that cannot run the problem.

use super::config::CmmaConfig;
use crate::device::{DeviceLimits, KernelError};
use crate::family::checks::check_room;
use crate::problem::{Element, Problem};

/// Whether the kernels can run the problem in these tiles on a device.
pub fn check_limits(problem: &Problem, limits: &DeviceLimits, config: CmmaConfig) -> Result<(), KernelError> {
    let kernel = "cmma";
    let halves = [Element::F16, Element::BF16];
    let [smallest, largest] = limits.plane_sizes;
    for (what, has) in [
        match problem.element {
            Element::BF16 => (
                "cooperative matrices bf16 x bf16 -> f32, 16x16x16 or 8x8x8",
                limits.cooperative_edge(Element::BF16).is_some(),
            ),
            Element::F16 => (
                "cooperative matrices f16 x f16 -> f32, 16x16x16 or 8x8x8",
                limits.cooperative_edge(Element::F16).is_some(),
            ),
            found => {
                let usable = |element: &Element| limits.cooperative_edge(*element).is_some();
                let expected = halves.into_iter().filter(usable).collect();
                return Err(KernelError::Element { expected, device: limits.name.clone(), found });
            }
        },
        ("operations of planes (votes and shuffles)", limits.plane_operations),
        // Which units make a plane is compiled in.
        ("planes of one size, 32 or 64 units", smallest == largest && [32, 64].contains(&largest)),
    ] {
        if !has {
            return Err(KernelError::Feature { kernel, what, device: limits.name.clone() });
        }
    }
    if !limits.elements.contains(&problem.element) {
        let expected = limits.elements.clone();
        return Err(KernelError::Element { expected, device: limits.name.clone(), found: problem.element });
    }
    check_room(kernel, limits, config.shared_bytes(problem), config.units())?;
    if let Some(plan) = problem.plan
        && !config.divides(plan.tile)
    {
        let tiles = [config.forward, config.queries, config.keys];
        let expected = [tiles.map(|tile| tile.rows().max(tile.cols)).into_iter().max().unwrap_or(0) as u32; 2];
        return Err(KernelError::PlanTile { kernel, expected, found: [plan.tile.bq, plan.tile.bk] });
    }
    Ok(())
}
