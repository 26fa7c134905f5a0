//! The family for cooperative matrices: where it is chosen, and what it is refused for.

use super::*;
use crate::problem::Element;

/// A GPU behind Vulkan that reports matrices of 16-bit floats.
fn vulkan() -> DeviceLimits {
    DeviceLimits {
        name: "wgpu<spirv>".into(),
        max_bindings: 7,
        max_shared_bytes: 48 * 1024,
        max_units: 1024,
        elements: vec![Element::F32, Element::F16, Element::BF16],
        max_iterations: usize::MAX,
        hardware: true,
        ptx: false,
        matrix_elements: Vec::new(),
        matrix_tf32: false,
        matrix_loads: Vec::new(),
        async_copies: false,
        cooperative: vec![(Element::F16, 16)],
        plane_sizes: [32, 32],
        plane_operations: true,
        wgmma: false,
    }
}

fn problem(element: Element) -> Problem {
    Problem::new([1, 2, 300, 64], [1, 2, 300, 64], [1, 2, 300, 64], element).unwrap()
}

#[test]
fn cooperative_matrices_come_before_the_portable_kernels() {
    let f16 = problem(Element::F16);
    let auto = select(&f16, &vulkan(), KernelChoice::Auto).unwrap();
    let tiles = CmmaConfig::of(&f16, &vulkan()).0;
    assert_eq!((auto.kernel, auto.cmma, auto.mma), (Kernel::Cmma, Some(tiles), None), "{}", auto.reason);
    assert!(auto.reason.starts_with("cmma: the device multiplies matrices of this element type; not mma"));
    let named = select(&f16, &vulkan(), KernelChoice::Cmma).unwrap();
    assert!(named.cmma == auto.cmma && named.reason != auto.reason);
    // Of another element type it reports none.
    for element in [Element::BF16, Element::F32] {
        let auto = select(&problem(element), &vulkan(), KernelChoice::Auto).unwrap();
        assert_eq!((auto.kernel, auto.cmma), (Kernel::Portable, None));
        assert!(auto.reason.contains("nor can the cmma kernel ("), "{}", auto.reason);
    }
    let few = Problem { seq_kv: 15, ..f16.clone() };
    assert_eq!(select(&few, &vulkan(), KernelChoice::Auto).unwrap().kernel, Kernel::Portable);
    assert_eq!(select(&few, &vulkan(), KernelChoice::Cmma).unwrap().kernel, Kernel::Cmma);
}

/// Metal's matrices are of 8 rows, columns and depth; larger ones are preferred where both are.
#[test]
fn the_largest_matrices_are_taken() {
    for (reported, edge) in [(vec![8], 8), (vec![16], 16), (vec![8, 16], 16)] {
        let cooperative = reported.into_iter().map(|edge| (Element::F16, edge)).collect();
        let limits = DeviceLimits { cooperative, max_shared_bytes: 32 * 1024, ..vulkan() };
        let selection = select(&problem(Element::F16), &limits, KernelChoice::Cmma).unwrap();
        assert_eq!(selection.cmma.unwrap().forward.edge, edge);
    }
}

#[test]
fn the_family_says_what_the_device_lacks() {
    let refused =
        |limits: DeviceLimits, element| select(&problem(element), &limits, KernelChoice::Cmma).unwrap_err().to_string();
    assert_eq!(
        refused(vulkan(), Element::BF16),
        "the cmma kernel was asked for and cannot run: cmma kernel: expected cooperative matrices bf16 x bf16 -> f32, \
         16x16x16 or 8x8x8, which wgpu<spirv> does not have"
    );
    let error = refused(DeviceLimits { cooperative: Vec::new(), ..vulkan() }, Element::F16);
    assert!(error.contains("expected cooperative matrices f16 x f16 -> f32, 16x16x16 or 8x8x8, which wgpu"), "{error}");
    let error = refused(vulkan(), Element::F32);
    assert!(error.contains("element type: expected one of [F16] on wgpu<spirv>, got F32"), "{error}");
    let error = refused(DeviceLimits { plane_sizes: [32, 64], ..vulkan() }, Element::F16);
    assert!(error.contains("expected planes of one size, 32 or 64 units"), "{error}");
    let error = refused(DeviceLimits { plane_operations: false, ..vulkan() }, Element::F16);
    assert!(error.contains("expected operations of planes"), "{error}");
    let error = refused(DeviceLimits { max_shared_bytes: 4096, ..vulkan() }, Element::F16);
    assert!(error.contains("expected at most 4096 bytes of shared memory"), "{error}");
    // The gradient of slopes is the portable kernels', whose limits therefore hold.
    let slopes = Problem { alibi: true, ..problem(Element::F16) };
    let cramped = DeviceLimits { max_iterations: 1, ..vulkan() };
    let error = select(&slopes, &cramped, KernelChoice::Cmma).unwrap_err().to_string();
    assert!(error.contains("portable kernel: expected at most 1 loop iterations"), "{error}");
}
