//! What the kernels are refused for: a device that cannot run the problem.

use super::config::MmaConfig;
use crate::device::{DeviceLimits, KernelError};
use crate::family::checks::check_room;
use crate::problem::{Element, Precision, Problem};

/// Whether the kernels can run the problem in these tiles on a device.
pub fn check_limits(problem: &Problem, limits: &DeviceLimits, config: MmaConfig) -> Result<(), KernelError> {
    let kernel = "mma";
    // Elements of f32 are multiplied as tf32, and a matrix of them is loaded as one of twice as many elements of 16 bits.
    let multiplied = |element: &Element| match element {
        Element::F32 => limits.matrix_tf32,
        half => limits.matrix_elements.contains(half),
    };
    let loaded = |element: &Element| match element {
        Element::F32 => !limits.matrix_loads.is_empty(),
        half => limits.matrix_loads.contains(half),
    };
    if !multiplied(&problem.element) || !limits.elements.contains(&problem.element) {
        let usable = |element: &Element| multiplied(element) && loaded(element);
        let expected = limits.elements.iter().copied().filter(usable).collect();
        return Err(KernelError::Element { expected, device: limits.name.clone(), found: problem.element });
    }
    if problem.element == Element::F32 && problem.precision != Precision::Tf32x3 {
        return Err(KernelError::Precision { kernel, expected: Precision::Tf32x3, found: problem.precision });
    }
    for (what, has) in [
        ("PTX", limits.ptx),
        ("loads of matrices from shared memory (ldmatrix)", loaded(&problem.element)),
        ("asynchronous copies to shared memory (cp.async)", limits.async_copies),
    ] {
        if !has {
            return Err(KernelError::Feature { kernel, what, device: limits.name.clone() });
        }
    }
    check_room(kernel, limits, config.shared_bytes(problem), config.units())?;
    if let Some(plan) = problem.plan
        && !config.divides(plan.tile)
    {
        let rows = [config.forward, config.queries, config.keys].map(|tile| tile.rows());
        let expected = [rows.into_iter().max().unwrap_or(0) as u32; 2];
        return Err(KernelError::PlanTile { kernel, expected, found: [plan.tile.bq, plan.tile.bk] });
    }
    Ok(())
}
