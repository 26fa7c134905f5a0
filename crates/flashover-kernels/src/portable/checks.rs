//! What the portable kernels are refused for: a device that cannot run the problem.

use super::iterations::iterations;
use super::tile::TileConfig;
use crate::device::{DeviceLimits, KernelError};
use crate::family::checks::{check_limit, check_room};
use crate::problem::Problem;

/// Whether the portable kernels can run the problem in these tiles on a device.
pub fn check_limits(problem: &Problem, limits: &DeviceLimits, tile: TileConfig) -> Result<(), KernelError> {
    if !limits.elements.contains(&problem.element) {
        return Err(KernelError::Element {
            expected: limits.elements.clone(),
            device: limits.name.clone(),
            found: problem.element,
        });
    }
    check_room("portable", limits, tile.shared_bytes(), tile.units())?;
    let what = "loop iterations of a unit";
    check_limit("portable", limits, what, limits.max_iterations, iterations(problem, tile))?;
    if let Some(plan) = problem.plan
        && !tile.divides(plan.tile)
    {
        let (rows, cols) = (tile.rows() as u32, tile.cols() as u32);
        let found = [plan.tile.bq, plan.tile.bk];
        return Err(KernelError::PlanTile { kernel: "portable", expected: [rows.max(cols); 2], found });
    }
    Ok(())
}
