//! What is chosen on which device, and what a refusal says.

use super::*;
use crate::block_plan::{PlanShape, TileSize};
use crate::mask::Band;
use crate::problem::Element;
use crate::score::{Alibi, ScoreCode, ScoreUse};

fn limits() -> DeviceLimits {
    DeviceLimits {
        name: "test".into(),
        max_bindings: 7,
        max_shared_bytes: 16 * 1024,
        max_units: 256,
        elements: vec![Element::F32, Element::F16],
        max_iterations: usize::MAX,
        hardware: true,
        ptx: false,
        matrix_elements: Vec::new(),
        matrix_tf32: false,
        matrix_loads: Vec::new(),
        async_copies: false,
        cooperative: Vec::new(),
        plane_sizes: [32, 32],
        plane_operations: true,
        wgmma: false,
    }
}

fn problem(seq_q: usize, element: Element) -> Problem {
    Problem::new([1, 2, seq_q, 256], [1, 2, 300, 256], [1, 2, 300, 256], element).unwrap()
}

/// An H200 as CubeCL describes it.
fn h200() -> DeviceLimits {
    DeviceLimits { wgmma: true, ..ampere() }
}

/// The same without what only Hopper has.
fn ampere() -> DeviceLimits {
    let matrix = vec![Element::F16, Element::BF16];
    DeviceLimits {
        name: "cuda".into(),
        max_bindings: 1024,
        max_shared_bytes: 227 * 1024,
        max_units: 1024,
        elements: vec![Element::F32, Element::F16, Element::BF16],
        ptx: true,
        matrix_elements: matrix.clone(),
        matrix_tf32: true,
        matrix_loads: matrix,
        async_copies: true,
        cooperative: vec![(Element::F16, 16), (Element::BF16, 16)],
        wgmma: false,
        ..limits()
    }
}

#[test]
fn tensor_cores_are_preferred_where_they_can_run() {
    for (d, dv) in [(1, 1), (64, 64), (128, 128), (72, 40), (256, 256), (16, 256)] {
        for seq_q in [1, 64, 65, 4096] {
            let (q, k, v) = ([1, 2, seq_q, d], [1, 2, 300, d], [1, 2, 300, dv]);
            let problem = Problem::new(q, k, v, Element::BF16).unwrap();
            let auto = select(&problem, &ampere(), KernelChoice::Auto).unwrap();
            assert_eq!((auto.kernel, auto.mma), (Kernel::Mma, Some(MmaConfig::of(&problem).0)));
            let named = select(&problem, &ampere(), KernelChoice::Mma).unwrap();
            assert_ne!(auto.reason, named.reason);
        }
    }
    let f32 = select(&problem(300, Element::F32), &ampere(), KernelChoice::Auto).unwrap();
    assert_eq!((f32.kernel, f32.mma), (Kernel::Portable, None));
    assert!(f32.reason.contains("mma kernel cannot run"), "{}", f32.reason);
}

#[test]
fn the_reason_names_the_plain_forward() {
    let reason = |problem: &Problem| select(problem, &ampere(), KernelChoice::Mma).unwrap().reason;
    let plain = problem(300, Element::BF16);
    assert!(reason(&plain).contains("plain form"), "{}", reason(&plain));
    assert!(!reason(&Problem { alibi: true, ..plain }).contains("plain form"));
}

#[test]
fn a_named_kernel_says_what_the_device_lacks() {
    let refused = |limits: DeviceLimits, element| {
        select(&problem(300, element), &limits, KernelChoice::Mma).unwrap_err().to_string()
    };
    let error = refused(DeviceLimits { async_copies: false, ..ampere() }, Element::F16);
    assert_eq!(
        error,
        "the mma kernel was asked for and cannot run: mma kernel: expected asynchronous copies to shared memory \
             (cp.async), which cuda does not have"
    );
    let error = refused(DeviceLimits { matrix_loads: Vec::new(), ..ampere() }, Element::F16);
    assert!(error.contains("loads of matrices from shared memory (ldmatrix)"), "{error}");
    let error = refused(DeviceLimits { ptx: false, ..ampere() }, Element::BF16);
    assert!(error.contains("expected PTX"), "{error}");
    let error = refused(ampere(), Element::F32);
    assert!(error.ends_with("mma kernel: expected f32 at precision Tf32x3, got precision Exact"), "{error}");
    let error = refused(DeviceLimits { matrix_tf32: false, ..ampere() }, Element::F32);
    assert!(error.contains("element type: expected one of [F16, BF16] on cuda, got F32"), "{error}");
    let error = refused(DeviceLimits { max_shared_bytes: 48 * 1024, ..ampere() }, Element::F16);
    assert!(error.contains("bytes of shared memory"), "{error}");
}

#[test]
fn f32_goes_to_tensor_cores_where_it_may_be_three_products_of_tf32() {
    let exact = |seq_q| problem(seq_q, Element::F32);
    let rounded = |seq_q| Problem { precision: Precision::Tf32x3, ..exact(seq_q) };
    for limits in [ampere(), h200()] {
        for seq_q in [1, 300] {
            let auto = select(&rounded(seq_q), &limits, KernelChoice::Auto).unwrap();
            assert_eq!((auto.kernel, auto.one_pass), (Kernel::Mma, None), "{}", auto.reason);
            assert!(auto.reason.contains("f32 as three products of tf32; not hopper ("), "{}", auto.reason);
            assert!(auto.reason.contains("backward in two passes"), "{}", auto.reason);
            select(&rounded(seq_q), &limits, KernelChoice::Mma).unwrap();
            let auto = select(&exact(seq_q), &limits, KernelChoice::Auto).unwrap();
            assert_eq!(auto.kernel, Kernel::Portable, "{}", auto.reason);
            assert!(auto.reason.contains("expected f32 at precision Tf32x3, got precision Exact"), "{}", auto.reason);
        }
    }
    let error = select(&rounded(300), &h200(), KernelChoice::Hopper).unwrap_err().to_string();
    assert!(error.contains("expected one of [F16, BF16] on cuda, got F32"), "{error}");
    let small = DeviceLimits { max_shared_bytes: 99 * 1024, ..ampere() };
    let auto = select(&rounded(300), &small, KernelChoice::Auto).unwrap();
    assert!(auto.kernel == Kernel::Portable && auto.reason.contains("bytes of shared memory"), "{}", auto.reason);
    let auto = select(&rounded(300), &limits(), KernelChoice::Auto).unwrap();
    assert_eq!(auto.kernel, Kernel::Portable);
    assert!(auto.reason.contains("element type: expected one of [] on test, got F32"), "{}", auto.reason);
    assert!(auto.reason.contains("this one multiplies f32 exactly"), "{}", auto.reason);
}

#[test]
fn few_keys_go_to_the_portable_kernels() {
    for (seq_kv, kernel) in [(0, Kernel::Portable), (15, Kernel::Portable), (16, Kernel::Hopper)] {
        let kv = [1, 2, seq_kv, 64];
        let problem = Problem::new([1, 2, 300, 64], kv, kv, Element::F16).unwrap();
        let auto = select(&problem, &h200(), KernelChoice::Auto).unwrap();
        assert_eq!(auto.kernel, kernel, "{seq_kv}: {}", auto.reason);
    }
}

#[test]
fn hopper_takes_rows_of_whole_16_bytes() {
    for (d, dv, named, auto) in [
        (64, 64, true, Kernel::Hopper),
        (192, 192, true, Kernel::Hopper),
        (8, 256, true, Kernel::Hopper),
        (72, 40, true, Kernel::Hopper),
        (128, 60, false, Kernel::Mma),
        (1, 64, false, Kernel::Mma),
    ] {
        let problem = Problem::new([1, 2, 300, d], [1, 2, 300, d], [1, 2, 300, dv], Element::F16).unwrap();
        let chosen = select(&problem, &h200(), KernelChoice::Auto).unwrap();
        assert_eq!(chosen.kernel, auto, "{d}, {dv}: {}", chosen.reason);
        assert!(chosen.mma.is_some(), "some of the gradients are mma's");
        let by_name = select(&problem, &h200(), KernelChoice::Hopper);
        assert_eq!(by_name.is_ok(), named, "{d}, {dv}");
        for selection in [Ok(chosen), by_name].into_iter().flatten() {
            let backward = matches!(selection.one_pass, Some(OnePassBackward::Hopper(_)));
            let hopper = (selection.hopper.is_some(), backward);
            assert_eq!(hopper, (named, named), "{d}, {dv}");
        }
    }
    let error = |problem: &Problem, limits: &DeviceLimits| {
        select(problem, limits, KernelChoice::Hopper).unwrap_err().to_string()
    };
    let odd = Problem::new([1, 2, 300, 60], [1, 2, 300, 60], [1, 2, 300, 64], Element::F16).unwrap();
    assert_eq!(
        error(&odd, &h200()),
        "the hopper kernel was asked for and cannot run: hopper kernel: expected a head dimension that is a multiple of 8, \
             got 60"
    );
    let even = problem(300, Element::F16);
    assert!(error(&even, &ampere()).contains("expected wgmma and the copy engine of sm90, which cuda does not have"));
    assert!(error(&problem(300, Element::F32), &h200()).contains("expected one of [F16, BF16] on cuda, got F32"));
    let plan = PlanShape { tile: TileSize { bq: 64, bk: 64 }, words: 16, points: 1, planes: [1, 1], column_words: 0 };
    let planned = Problem { plan: Some(plan), ..even.clone() };
    assert!(error(&planned, &h200()).contains("plan: expected tiles of a multiple of [128, 64]"));
    let whole = PlanShape { tile: TileSize { bq: 128, bk: 128 }, ..plan };
    let whole = Problem { plan: Some(whole), ..even };
    assert_eq!(select(&whole, &h200(), KernelChoice::Hopper).unwrap().kernel, Kernel::Hopper);
    let narrow = Problem { head_dim: 64, value_dim: 128, ..whole.clone() };
    let chosen = select(&narrow, &h200(), KernelChoice::Hopper).unwrap();
    let listed = matches!(chosen.one_pass, Some(OnePassBackward::Hopper(tiles)) if tiles.listed);
    assert!(listed, "{}", chosen.reason);
    let tile = TileSize { bq: 128, bk: 64 };
    let halved = Problem { plan: narrow.plan.map(|plan| PlanShape { tile, ..plan }), ..narrow };
    let chosen = select(&halved, &h200(), KernelChoice::Hopper).unwrap();
    assert!(chosen.one_pass.is_none() && chosen.reason.contains("whose tiles are no multiples of"));
    // A cube of mma owns 64 keys of such heads.
    let chosen = select(&Problem { value_dim: 64, ..halved }, &h200(), KernelChoice::Hopper).unwrap();
    let of_mma = matches!(chosen.one_pass, Some(OnePassBackward::Mma(_)));
    assert!(of_mma && chosen.reason.contains("whose tiles are no multiples of"), "{}", chosen.reason);
    let few = Problem { plan: None, seq_kv: 15, ..whole.clone() };
    let few = select(&few, &h200(), KernelChoice::Hopper).unwrap();
    assert!(few.one_pass.is_none() && few.reason.contains("so few keys"), "{}", few.reason);
    for (problem, kernel) in [(planned, Kernel::Mma), (whole, Kernel::Hopper)] {
        let auto = select(&problem, &h200(), KernelChoice::Auto).unwrap();
        assert_eq!(auto.kernel, kernel, "{}", auto.reason);
    }
}

#[test]
fn score_functions_run_in_every_family() {
    let score = ScoreUse { code: ScoreCode::of::<Alibi>(), parameters: 2 };
    let problem = |element| Problem { score: Some(score), ..problem(300, element) };
    let chosen = |limits, choice, kernel| {
        let chosen = select(&problem(Element::BF16), &limits, choice).unwrap();
        assert_eq!((chosen.kernel, chosen.mma.is_some()), (kernel, true), "{}", chosen.reason);
        chosen
    };
    chosen(ampere(), KernelChoice::Auto, Kernel::Mma);
    chosen(h200(), KernelChoice::Mma, Kernel::Mma);
    for choice in [KernelChoice::Auto, KernelChoice::Hopper] {
        assert!(!chosen(h200(), choice, Kernel::Hopper).hopper.unwrap().plain);
    }
    let narrow = Problem { head_dim: 64, value_dim: 64, ..problem(Element::BF16) };
    let narrow = select(&narrow, &h200(), KernelChoice::Hopper).unwrap();
    let Some(OnePassBackward::Hopper(backward)) = narrow.one_pass else { panic!("{:?}", narrow.one_pass) };
    assert!(!backward.plain);
    // The gradient of the parameters is the portable kernels', whose limits therefore hold.
    let cramped = DeviceLimits { max_iterations: 1, ..h200() };
    let error = select(&problem(Element::BF16), &cramped, KernelChoice::Mma).unwrap_err().to_string();
    assert!(error.contains("portable kernel: expected at most 1 loop iterations"), "{error}");
}

#[test]
fn a_plan_that_no_tile_divides_goes_to_another_family() {
    let plan = |bq, bk| PlanShape { tile: TileSize { bq, bk }, words: 16, points: 1, planes: [1, 1], column_words: 0 };
    let planned = |bq, bk| Problem { plan: Some(plan(bq, bk)), ..problem(300, Element::BF16) };
    for (bq, bk, kernel) in [(128, 128, Kernel::Mma), (64, 64, Kernel::Mma), (64, 32, Kernel::Cmma)] {
        let auto = select(&planned(bq, bk), &ampere(), KernelChoice::Auto).unwrap();
        assert_eq!(auto.kernel, kernel, "{bq}x{bk}: {}", auto.reason);
    }
    let without = DeviceLimits { cooperative: Vec::new(), ..ampere() };
    assert_eq!(select(&planned(64, 32), &without, KernelChoice::Auto).unwrap().kernel, Kernel::Portable);
    let error = select(&planned(64, 32), &ampere(), KernelChoice::Mma).unwrap_err();
    assert!(error.to_string().contains("plan: expected tiles of a multiple of [64, 64]"), "{error}");
}

#[test]
fn every_tile_fits_what_webgpu_grants() {
    for tile in [TileConfig::LARGE, TileConfig::SMALL, TileConfig::SOFTWARE] {
        assert!(tile.shared_bytes() <= 16 * 1024 && tile.units() <= 256, "{tile}: {} bytes", tile.shared_bytes());
        portable::check_limits(&problem(300, Element::F32), &limits(), tile).unwrap();
    }
}

#[test]
fn the_choice_says_why() {
    for choice in [KernelChoice::Auto, KernelChoice::Portable] {
        let large = select(&problem(300, Element::F16), &limits(), choice).unwrap();
        assert_eq!((large.kernel, large.config), (Kernel::Portable, TileConfig::LARGE));
        let few = select(&problem(3, Element::F16), &limits(), choice).unwrap();
        assert_eq!(few.config, TileConfig::SMALL);
        let software = DeviceLimits { hardware: false, ..limits() };
        let software = select(&problem(300, Element::F32), &software, choice).unwrap();
        assert_eq!(software.config, TileConfig::SOFTWARE);
        assert_ne!(large.reason, few.reason);
        assert_ne!(large.reason, software.reason);
    }
}

#[test]
fn what_cannot_run_is_an_error_that_says_why() {
    let error = select(&problem(9, Element::BF16), &limits(), KernelChoice::Portable).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the portable kernel was asked for and cannot run: element type: expected one of [F32, F16] on test, got BF16"
    );
    let cramped = DeviceLimits { max_shared_bytes: 4096, ..limits() };
    let error = select(&problem(99, Element::F32), &cramped, KernelChoice::Auto).unwrap_err();
    assert!(error.to_string().contains("expected at most 4096 bytes of shared memory on test"), "{error}");
    let software = DeviceLimits { max_iterations: 65_535, hardware: false, ..limits() };
    select(&problem(300, Element::F32), &software, KernelChoice::Auto).unwrap();
    let long = [1, 2, 100_000, 64];
    let long = Problem::new(long, long, long, Element::F32).unwrap();
    let error = select(&long, &software, KernelChoice::Auto).unwrap_err();
    assert!(error.to_string().contains("expected at most 65535 loop iterations of a unit on test"), "{error}");
    let window = Band { causal: true, left: 1023, ..Band::default() };
    select(&Problem { band: window, ..long }, &software, KernelChoice::Auto).unwrap();
}
