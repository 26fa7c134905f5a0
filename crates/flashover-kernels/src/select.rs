//! Which kernel runs a problem on a device, in which configuration, and why.

use cubecl::prelude::*;

use crate::cmma::{self, CmmaConfig};
use crate::device::{DeviceLimits, DeviceTensor, KernelError};
use crate::family::Outputs;
use crate::hopper::{self, HopperBackwardConfig, HopperConfig};
use crate::mma::{self, FEW_KEYS, MmaConfig, OnePass};
use crate::operands::{Gradients, Operands};
use crate::portable::{self, TileConfig};
use crate::problem::{Precision, Problem};

/// Who chooses the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum KernelChoice {
    /// The fastest family that can run the problem.
    #[default]
    Auto,
    /// The portable family; an error if it cannot run.
    Portable,
    /// The family for NVIDIA's tensor cores; an error if it cannot run.
    Mma,
    /// The family for cooperative matrices, on whichever runtime a device reports them; an error if it cannot run.
    Cmma,
    /// The family for NVIDIA's Hopper GPUs; an error if it cannot run. Where it has no form of the backward, that is
    /// [`Mma`](Self::Mma)'s.
    Hopper,
}

/// A kernel family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// [`portable`]: shared-memory tiles, on every runtime.
    Portable,
    /// [`mma`]: the tensor cores of NVIDIA GPUs from sm80 on.
    Mma,
    /// [`cmma`]: cooperative matrices, on Vulkan, ROCm, Metal and CUDA.
    Cmma,
    /// [`hopper`]: the copy engine and warpgroup products of sm90; the backward where it has a form of it, else that of [`mma`].
    Hopper,
}

impl core::fmt::Display for Kernel {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Kernel::Portable => f.write_str("portable"),
            Kernel::Mma => f.write_str("mma"),
            Kernel::Cmma => f.write_str("cmma"),
            Kernel::Hopper => f.write_str("hopper"),
        }
    }
}

/// A backward that takes the gradients of q, k and v in one pass, from what the forward keeps beside its output: what rounding took
/// from that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnePassBackward {
    /// That of [`hopper`], which reads tensors that [`hopper::reads_in_place`].
    Hopper(HopperBackwardConfig),
    /// That of [`mma`], which reads any.
    Mma(OnePass),
}

impl OnePassBackward {
    /// Launches it: [`hopper::backward`] or [`mma::backward_one_pass`].
    pub fn run(
        self,
        client: &Client,
        problem: &Problem,
        operands: &Operands<DeviceTensor>,
        outputs: &Outputs,
        plan: Option<&DeviceTensor>,
        rest: DeviceTensor,
    ) -> Result<Gradients<DeviceTensor>, KernelError> {
        match self {
            OnePassBackward::Hopper(tiles) => hopper::backward(client, problem, operands, outputs, plan, rest, tiles),
            OnePassBackward::Mma(of) => mma::backward_one_pass(client, problem, operands, outputs, plan, rest, of),
        }
    }
}

/// The outcome of [`select()`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The family.
    pub kernel: Kernel,
    /// Tiles of the portable kernels: they are the family, or take the gradients of bias, slopes, sinks and a score function's
    /// parameters for another.
    pub config: TileConfig,
    /// Tiles of the matrix kernels, if they are the family or take the backward of another.
    pub mma: Option<MmaConfig>,
    /// Tiles of the kernels for cooperative matrices, if they are the family.
    pub cmma: Option<CmmaConfig>,
    /// Tiles of the Hopper forward, if that is the family.
    pub hopper: Option<HopperConfig>,
    /// The backward in one pass, if there is one for the problem. It takes the gradients of q, k and v together; where one is
    /// not wanted, the matrix kernels take the others apart.
    pub one_pass: Option<OnePassBackward>,
    /// Why this family and these tiles, in a sentence.
    pub reason: String,
}

/// No kernel can run the problem on the device.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum SelectError {
    /// The kernel that was asked for by name cannot run.
    #[error("the {kernel} kernel was asked for and cannot run: {why}")]
    Named {
        /// The kernel.
        kernel: Kernel,
        /// What stands against it.
        why: KernelError,
    },
    /// `Auto` found no kernel.
    #[error("no kernel can run on {device}; the last one tried was the {kernel} kernel: {why}")]
    Nothing {
        /// The device.
        device: String,
        /// The kernel that asks for least.
        kernel: Kernel,
        /// What stands against it.
        why: KernelError,
    },
}

/// Chooses a kernel and its configuration. A kernel asked for by name is that kernel or an error.
pub fn select(problem: &Problem, limits: &DeviceLimits, choice: KernelChoice) -> Result<Selection, SelectError> {
    let named = "it was asked for by name";
    let nothing =
        |why: KernelError| SelectError::Nothing { device: limits.name.clone(), kernel: Kernel::Portable, why };
    let refused = |kernel: Kernel| move |why: KernelError| SelectError::Named { kernel, why };
    match choice {
        KernelChoice::Hopper => select_hopper(problem, limits, named).map_err(refused(Kernel::Hopper)),
        KernelChoice::Mma => select_mma(problem, limits, named).map_err(refused(Kernel::Mma)),
        KernelChoice::Cmma => select_cmma(problem, limits, named).map_err(refused(Kernel::Cmma)),
        KernelChoice::Portable => select_portable(problem, limits, named).map_err(refused(Kernel::Portable)),
        // Of the matrix kernels' tiles of 64 keys or more nearly all would be empty.
        KernelChoice::Auto if problem.seq_kv < FEW_KEYS => {
            let why_kernel = "few keys: a tile of a matrix product would be mostly empty";
            select_portable(problem, limits, why_kernel).map_err(nothing)
        }
        KernelChoice::Auto => {
            let mma = select_hopper(problem, limits, "a Hopper GPU, and this element type").or_else(|faster| {
                let what = match problem.precision {
                    Precision::Tf32x3 => "the tensor cores multiply f32 as three products of tf32",
                    Precision::Exact => "the tensor cores multiply this element type",
                };
                let why = format!("{what}; not hopper ({faster})");
                select_mma(problem, limits, &why)
            });
            mma.or_else(|faster| {
                let why_kernel = format!("the device multiplies matrices of this element type; not mma ({faster})");
                select_cmma(problem, limits, &why_kernel).or_else(|cooperative| {
                    let mut why_kernel =
                        format!("the mma kernel cannot run ({faster}), nor can the cmma kernel ({cooperative})");
                    if problem.precision == Precision::Tf32x3 {
                        why_kernel += ", and this one multiplies f32 exactly";
                    }
                    select_portable(problem, limits, &why_kernel).map_err(nothing)
                })
            })
        }
    }
}

fn select_hopper(problem: &Problem, limits: &DeviceLimits, why_kernel: &str) -> Result<Selection, KernelError> {
    let (kernel, (tiles, why)) = (Kernel::Hopper, HopperConfig::of(problem));
    hopper::check_limits(problem, limits, tiles)?;
    let rest = select_mma(problem, limits, "the backward")?;
    let form = match problem.seq_kv < FEW_KEYS {
        true => Err("so few keys: what is left of their gradients is mostly rounding"),
        false => HopperBackwardConfig::of(problem),
    };
    let (one_pass, backward) = match form {
        Ok((tiles, why)) => (Some(OnePassBackward::Hopper(tiles)), format!("{tiles}: {why}")),
        Err(what) => (rest.one_pass, format!("{}, for {kernel} has no form of it with {what}", rest.reason)),
    };
    let reason = format!("{kernel}: {why_kernel}; {tiles}: {why}; backward: {backward}");
    Ok(Selection { kernel, hopper: Some(tiles), one_pass, reason, ..rest })
}

fn select_mma(problem: &Problem, limits: &DeviceLimits, why_kernel: &str) -> Result<Selection, KernelError> {
    let (kernel, (tiles, why)) = (Kernel::Mma, MmaConfig::of(problem));
    mma::check_limits(problem, limits, tiles)?;
    let (config, _) = portable_tile(problem, limits);
    check_parameters(problem, limits, config)?;
    let mut reason = format!("{kernel}: {why_kernel}; {tiles}: {why}");
    if tiles.forward.has_plain_form(problem) {
        reason += "; the forward's plain form, where rows of keys and values are whole 16-byte pieces";
    }
    let one_pass = match OnePass::of(problem, limits) {
        Ok((of, why)) => {
            reason += &format!("; backward: {of}: {why}");
            Some(OnePassBackward::Mma(of))
        }
        Err(what) => {
            reason += &format!("; backward in two passes, for there is no other with {what}");
            None
        }
    };
    Ok(Selection { kernel, config, mma: Some(tiles), cmma: None, hopper: None, one_pass, reason })
}

fn select_cmma(problem: &Problem, limits: &DeviceLimits, why_kernel: &str) -> Result<Selection, KernelError> {
    let (kernel, (tiles, why)) = (Kernel::Cmma, CmmaConfig::of(problem, limits));
    cmma::check_limits(problem, limits, tiles)?;
    let (config, _) = portable_tile(problem, limits);
    check_parameters(problem, limits, config)?;
    let reason = format!("{kernel}: {why_kernel}; {tiles}: {why}");
    Ok(Selection { kernel, config, mma: None, cmma: Some(tiles), hopper: None, one_pass: None, reason })
}

/// Whether the portable kernels can take the gradients that are not the matrix kernels': of bias, slopes, sinks and a score
/// function's parameters.
fn check_parameters(problem: &Problem, limits: &DeviceLimits, config: TileConfig) -> Result<(), KernelError> {
    if problem.bias.is_some() || problem.alibi || problem.learned_sinks || problem.score.is_some() {
        portable::check_limits(problem, limits, config)?;
    }
    Ok(())
}

fn select_portable(problem: &Problem, limits: &DeviceLimits, why_kernel: &str) -> Result<Selection, KernelError> {
    let kernel = Kernel::Portable;
    let (config, why) = portable_tile(problem, limits);
    portable::check_limits(problem, limits, config)?;
    Ok(Selection {
        kernel,
        config,
        mma: None,
        cmma: None,
        hopper: None,
        one_pass: None,
        reason: format!("{kernel}: {why_kernel}; {config}: {why}"),
    })
}

/// Tiles of the portable kernels, and why.
fn portable_tile(problem: &Problem, limits: &DeviceLimits) -> (TileConfig, &'static str) {
    let fits = |tile: TileConfig| tile.units() <= limits.max_units && tile.shared_bytes() <= limits.max_shared_bytes;
    if !limits.hardware {
        (TileConfig::SOFTWARE, "a software GPU, whose compiler is slow on unrolled loops")
    } else if problem.seq_q <= TileConfig::SMALL.rows() {
        (TileConfig::SMALL, "few queries")
    } else if problem.plan.is_some_and(|plan| !TileConfig::LARGE.divides(plan.tile)) {
        (TileConfig::SMALL, "the tiles of the block plan are no multiple of larger ones")
    } else if fits(TileConfig::LARGE) {
        (TileConfig::LARGE, "the most work per byte of shared memory that 16 KB allow")
    } else {
        (TileConfig::SMALL, "the device holds no larger tile")
    }
}

#[cfg(test)]
mod cooperative_tests;

#[cfg(test)]
mod tests {
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
                assert!(
                    auto.reason.contains("expected f32 at precision Tf32x3, got precision Exact"),
                    "{}",
                    auto.reason
                );
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
        assert!(
            error(&even, &ampere()).contains("expected wgmma and the copy engine of sm90, which cuda does not have")
        );
        assert!(error(&problem(300, Element::F32), &h200()).contains("expected one of [F16, BF16] on cuda, got F32"));
        let plan =
            PlanShape { tile: TileSize { bq: 64, bk: 64 }, words: 16, points: 1, planes: [1, 1], column_words: 0 };
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
        let plan =
            |bq, bk| PlanShape { tile: TileSize { bq, bk }, words: 16, points: 1, planes: [1, 1], column_words: 0 };
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
}
