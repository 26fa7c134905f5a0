//! What the kernels are refused for: a device that cannot run the problem.

use super::config::MmaConfig;
use crate::device::{DeviceLimits, KernelError};
use crate::family::BINDINGS;
use crate::problem::{Element, Problem};

/// Whether the kernels can run the problem in these tiles on a device.
pub fn check_limits(problem: &Problem, limits: &DeviceLimits, config: MmaConfig) -> Result<(), KernelError> {
    let kernel = "mma";
    let usable = |element: &Element| limits.matrix_elements.contains(element) && limits.matrix_loads.contains(element);
    if !limits.matrix_elements.contains(&problem.element) || !limits.elements.contains(&problem.element) {
        let expected = limits.elements.iter().copied().filter(usable).collect();
        return Err(KernelError::Element { expected, device: limits.name.clone(), found: problem.element });
    }
    for (what, has) in [
        ("PTX", limits.ptx),
        ("loads of matrices from shared memory (ldmatrix)", limits.matrix_loads.contains(&problem.element)),
        ("asynchronous copies to shared memory (cp.async)", limits.async_copies),
    ] {
        if !has {
            return Err(KernelError::Feature { kernel, what, device: limits.name.clone() });
        }
    }
    for (what, limit, found) in [
        ("bytes of shared memory", limits.max_shared_bytes, config.shared_bytes(problem)),
        ("units", limits.max_units, config.units()),
        ("bindings", limits.max_bindings, BINDINGS),
    ] {
        if found > limit {
            return Err(KernelError::Limit { kernel, what, device: limits.name.clone(), limit, found });
        }
    }
    if let Some(plan) = problem.plan
        && !config.divides(plan.tile)
    {
        let rows = [config.forward, config.queries, config.keys].map(|tile| tile.rows());
        let expected = [rows.into_iter().max().unwrap_or(0) as u32; 2];
        return Err(KernelError::PlanTile { kernel, expected, found: [plan.tile.bq, plan.tile.bk] });
    }
    Ok(())
}
