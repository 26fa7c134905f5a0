//! What the kernels are refused for: a device that cannot run the problem, tensors that the copy engine cannot read.

use super::config::HopperConfig;
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::BINDINGS;
use crate::problem::{Element, Problem};

/// Bytes that addresses and strides of the copy engine are multiples of.
const ALIGNMENT: usize = 16;

/// Whether the kernels can run the problem in these tiles on a device.
pub fn check_limits(problem: &Problem, limits: &DeviceLimits, cfg: HopperConfig) -> Result<(), KernelError> {
    let kernel = "hopper";
    if !limits.wgmma {
        let what = "wgmma and the copy engine of sm90";
        return Err(KernelError::Feature { kernel, what, device: limits.name.clone() });
    }
    let halves = [Element::F16, Element::BF16];
    if !halves.contains(&problem.element) || !limits.elements.contains(&problem.element) {
        let expected = halves.into_iter().filter(|element| limits.elements.contains(element)).collect();
        return Err(KernelError::Element { expected, device: limits.name.clone(), found: problem.element });
    }
    for (what, found) in [("head", problem.head_dim), ("value", problem.value_dim)] {
        if !found.is_multiple_of(ALIGNMENT / size_of::<u16>()) {
            return Err(KernelError::HeadDim { kernel, what, multiple: ALIGNMENT / size_of::<u16>(), found });
        }
    }
    for (what, limit, found) in [
        ("bytes of shared memory", limits.max_shared_bytes, cfg.shared_bytes()),
        ("units", limits.max_units, cfg.units()),
        ("bindings", limits.max_bindings, BINDINGS),
    ] {
        if found > limit {
            return Err(KernelError::Limit { kernel, what, device: limits.name.clone(), limit, found });
        }
    }
    if let Some(plan) = problem.plan
        && !cfg.divides(plan.tile)
    {
        let expected = [cfg.bq() as u32, cfg.bk as u32];
        return Err(KernelError::PlanTile { kernel, expected, found: [plan.tile.bq, plan.tile.bk] });
    }
    Ok(())
}

/// Whether the copy engine can read a tensor of 16-bit elements where it lies: rows without gaps, at multiples of 16 bytes.
/// A tensor that it cannot read must be copied first. Of an empty tensor nothing is read.
pub fn reads_in_place(tensor: &DeviceTensor) -> bool {
    if tensor.elements() == 0 {
        return true;
    }
    let size = tensor.elem.size();
    let last = tensor.shape.len() - 1;
    let strides = tensor.strides.iter().zip(&tensor.shape).enumerate();
    let fits = |(d, (&stride, &len)): (usize, (&usize, &usize))| match d == last {
        _ if len <= 1 => true,
        true => stride == 1,
        false => stride > 0 && (stride * size).is_multiple_of(ALIGNMENT),
    };
    (tensor.handle.offset_start.unwrap_or(0) as usize).is_multiple_of(ALIGNMENT) && strides.into_iter().all(fits)
}
