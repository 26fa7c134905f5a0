//! What the kernels are refused for: a device that cannot run the problem, tensors that the copy engine cannot read.

use super::backward_config::HopperBackwardConfig;
use super::config::HopperConfig;
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::checks::{check_limit, check_room};
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
    check_room(kernel, limits, cfg.shared_bytes(), cfg.units())?;
    // A plan lists blocks for each head.
    let heads = if problem.plan.is_some() { 1 } else { problem.group() };
    if cfg.packed == 0 || cfg.packed > cfg.rows() || !heads.is_multiple_of(cfg.packed) {
        let expected = format!("a number of heads that divides {heads}, in {} rows", cfg.rows());
        return Err(KernelError::Tiles { kernel, expected, found: format!("tiles for {} heads", cfg.packed) });
    }
    if let Some(plan) = problem.plan
        && !cfg.divides(plan.tile)
    {
        let expected = [cfg.bq() as u32, cfg.bk as u32];
        return Err(KernelError::PlanTile { kernel, expected, found: [plan.tile.bq, plan.tile.bk] });
    }
    Ok(())
}

/// Whether the backward can run the problem in these tiles on a device.
pub fn check_backward(problem: &Problem, limits: &DeviceLimits, cfg: HopperBackwardConfig) -> Result<(), KernelError> {
    let kernel = "backward_hopper";
    check_limits(problem, limits, HopperConfig::of(problem).0)?;
    let (own, _) = HopperBackwardConfig::of(problem).map_err(|what| KernelError::Form { kernel, what })?;
    let HopperBackwardConfig { bq, plain, .. } = cfg;
    if (HopperBackwardConfig { bq, plain: plain && own.plain, ..own }) != cfg {
        return Err(KernelError::Tiles { kernel, expected: own.to_string(), found: cfg.to_string() });
    }
    if let Some(plan) = problem.plan
        && !cfg.divides(plan.tile)
    {
        let expected = [cfg.bq as u32, cfg.bk() as u32];
        return Err(KernelError::PlanTile { kernel, expected, found: [plan.tile.bq, plan.tile.bk] });
    }
    check_limit(kernel, limits, "bytes of shared memory", limits.max_shared_bytes, cfg.shared_bytes())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_plan::{PlanShape, TileSize};

    fn hopper() -> DeviceLimits {
        DeviceLimits {
            name: "test".into(),
            max_bindings: 1024,
            max_shared_bytes: 227 * 1024,
            max_units: 1024,
            elements: vec![Element::BF16],
            max_iterations: usize::MAX,
            hardware: true,
            ptx: true,
            matrix_elements: vec![Element::BF16],
            matrix_tf32: true,
            matrix_loads: vec![Element::BF16],
            async_copies: true,
            cooperative: Vec::new(),
            plane_sizes: [32, 32],
            plane_operations: true,
            wgmma: true,
        }
    }

    #[test]
    fn a_forward_says_what_heads_it_cannot_pack() {
        let p = Problem::new([1, 12, 5, 64], [1, 2, 300, 64], [1, 2, 300, 64], Element::BF16).unwrap();
        let (cfg, _) = HopperConfig::of(&p);
        check_limits(&p, &hopper(), cfg).unwrap();
        let plan =
            PlanShape { tile: TileSize { bq: 128, bk: 128 }, words: 16, points: 1, planes: [1, 1], column_words: 0 };
        let planned = Problem { plan: Some(plan), ..p.clone() };
        for (p, packed, expected) in [(&p, 0, "divides 6"), (&p, 4, "divides 6"), (&planned, 2, "divides 1,")] {
            let error = check_limits(p, &hopper(), HopperConfig { packed, ..cfg }).unwrap_err().to_string();
            assert!(error.contains(expected) && error.contains(&format!("for {packed} heads")), "{error}");
        }
    }

    #[test]
    fn a_backward_says_what_it_cannot_run() {
        let limits = hopper();
        let shape = |d: usize| [1, 2, 300, d];
        let problem = |d, dv| Problem::new(shape(d), shape(d), shape(dv), Element::BF16).unwrap();
        let plain = problem(64, 64);
        let (cfg, _) = HopperBackwardConfig::of(&plain).unwrap();
        check_backward(&plain, &limits, cfg).unwrap();
        let error = |p: &Problem, cfg| check_backward(p, &limits, cfg).unwrap_err().to_string();
        let planned = |bq: u32, bk: u32| {
            let plan = PlanShape { tile: TileSize { bq, bk }, words: 16, points: 1, planes: [1, 1], column_words: 0 };
            Problem { plan: Some(plan), ..plain.clone() }
        };
        let (listed, _) = HopperBackwardConfig::of(&planned(128, 128)).unwrap();
        check_backward(&planned(128, 128), &limits, listed).unwrap();
        check_backward(&planned(256, 384), &limits, listed).unwrap();
        // Tiles that know of no plan, and a plan for a problem without.
        assert!(error(&planned(128, 128), cfg).contains("expected tiles for tile 128x128"));
        assert!(error(&plain, listed).contains("expected tiles for tile 128x128"));
        assert_eq!(
            error(&planned(128, 64), listed),
            "backward_hopper kernel: expected a problem without a block plan whose tiles are no multiples of 128 queries and \
             128 keys"
        );
        assert!(error(&planned(64, 128), listed).contains("plan: expected tiles of a multiple of [128, 128]"));
        // Tiles of smaller heads.
        assert!(
            error(&problem(192, 64), cfg).contains("expected tiles for tile 64x64, 2 warpgroups, head 192, values 64")
        );
        // Tiles that know of no option, for a problem that has one.
        let capped = Problem { softcap: Some(5.0), ..plain.clone() };
        assert!(error(&capped, cfg).contains("expected tiles for tile 64x128"), "{}", error(&capped, cfg));
        assert!(error(&problem(128, 128), cfg).contains("head 128, values 128"));
        let small = DeviceLimits { max_shared_bytes: 100 * 1024, ..limits.clone() };
        assert!(check_backward(&plain, &small, cfg).unwrap_err().to_string().contains("bytes of shared memory"));
        check_backward(&plain, &limits, HopperBackwardConfig { plain: false, ..cfg }).unwrap();
    }
}
