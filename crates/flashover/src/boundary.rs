//! The boundary: tensors and options in, a validated problem out, before anything is dispatched. (Fusion defers the
//! call itself, and would lose an error.)

use burn::backend::{Dispatch, DispatchDevice};
use burn::tensor::{DType, Device, Int, IntDType, Tensor};
use flashover_kernels::problem::{Element, Problem};
use flashover_kernels::score::ScoreUse;
use flashover_kernels::select::KernelChoice;

use crate::backend::{AttentionBackend, Extras, MaybeBool, MaybeFloat, MaybeInt, Plan};
use crate::{AttentionError, AttentionOptions, SparsePlan};

/// A call that is ready to be dispatched.
pub(crate) struct Prepared {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    extras: Extras<Dispatch>,
    plan: Plan,
}

impl Prepared {
    /// Checks the call.
    pub(crate) fn new(
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        options: &AttentionOptions,
    ) -> Result<Self, AttentionError> {
        let device = q.device();
        let element = element_of(&q, &device)?;
        same_device(&device, "k", &k.device())?;
        same_device(&device, "v", &v.device())?;
        same_dtype(&q, "k", &k)?;
        same_dtype(&q, "v", &v)?;
        let mut problem = Problem::new(q.dims(), k.dims(), v.dims(), element)?;
        if let Some(scale) = options.scale {
            problem.scale = scale;
        }
        problem.precision = options.precision;
        problem.softcap = options.softcap;
        problem.band = options.checked_band()?;
        problem.dropout = options.dropout.filter(|dropout| dropout.probability != 0.0);
        problem.unordered = options.unordered;
        if let Some(bias) = &options.bias {
            same_device(&device, "bias", &bias.device())?;
            same_dtype(&q, "bias", bias)?;
            problem.bias = Some(bias.dims());
        }
        if let Some(mask) = &options.mask {
            same_device(&device, "mask", &mask.device())?;
            problem.mask = Some(mask.dims());
        }
        for (what, vector) in [("alibi_slopes", &options.alibi_slopes), ("learned_sinks", &options.learned_sinks)] {
            if let Some(vector) = vector {
                same_device(&device, what, &vector.device())?;
                length(what, "one a query head", problem.heads_q, vector.dims()[0])?;
            }
        }
        if let Some(lengths) = &options.key_lengths {
            same_device(&device, "key_lengths", &lengths.device())?;
            length("key_lengths", "one a batch element", problem.batch, lengths.dims()[0])?;
        }
        problem.alibi = options.alibi_slopes.is_some();
        problem.learned_sinks = options.learned_sinks.is_some();
        problem.key_lengths = options.key_lengths.is_some();
        if let Some((code, parameters)) = &options.score_function {
            same_device(&device, "score_parameters", &parameters.device())?;
            score_dtypes(element, parameters.dtype())?;
            problem.score = Some(ScoreUse { code: *code, parameters: parameters.dims()[0] });
        }
        problem.validate()?;
        if let Some(score) = problem.score {
            score.check_parameters(&problem)?;
        }
        let blocks = options.checked_plan()?;
        problem.plan = blocks.map(|blocks| blocks.shape_for(&problem)).transpose()?;
        backend_is_built(&device)?;
        let plan = plan(problem, blocks.cloned(), &device, options.kernel)?;
        let extras = extras(options, element, device.as_dispatch());
        Ok(Prepared { q, k, v, extras, plan })
    }

    /// What will be computed, and by which kernel.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The output alone.
    pub(crate) fn forward(self) -> Tensor<4> {
        let Prepared { q, k, v, extras, plan } = self;
        let o = Dispatch::flashover_forward(q.into_dispatch(), k.into_dispatch(), v.into_dispatch(), extras, plan);
        Tensor::from_dispatch(o)
    }

    /// The output and the log-sum-exp.
    pub(crate) fn forward_lse(self) -> (Tensor<4>, Tensor<3>) {
        let Prepared { q, k, v, extras, plan } = self;
        let (q, k, v) = (q.into_dispatch(), k.into_dispatch(), v.into_dispatch());
        // Autodiff asks for what its backward needs.
        let state = Dispatch::flashover_forward_state(q, k, v, extras, plan, false);
        (Tensor::from_dispatch(state.o), Tensor::from_dispatch(state.lse))
    }
}

/// Chooses the kernel of a CubeCL device.
fn plan(
    problem: Problem,
    blocks: Option<SparsePlan>,
    device: &Device,
    choice: KernelChoice,
) -> Result<Plan, AttentionError> {
    let nothing_to_choose = || match choice {
        KernelChoice::Auto => Ok(()),
        named => Err(AttentionError::Kernel(format!(
            "expected a CubeCL device for a kernel by name ({named:?}), got {device:?}"
        ))),
    };
    #[cfg(feature = "cubecl-backend")]
    {
        use flashover_kernels::device::DeviceLimits;
        use flashover_kernels::select::select;

        let selection = match executing(device.as_dispatch()) {
            DispatchDevice::Cube(device) => {
                let limits = DeviceLimits::of(&device.client());
                let selection = select(&problem, &limits, choice);
                Some(selection.map_err(|error| AttentionError::Kernel(error.to_string()))?)
            }
            #[allow(unreachable_patterns)]
            _ => {
                nothing_to_choose()?;
                None
            }
        };
        Ok(Plan { problem, blocks, selection })
    }
    #[cfg(not(feature = "cubecl-backend"))]
    {
        nothing_to_choose()?;
        Ok(Plan { problem, blocks })
    }
}

/// The optional operands, cast to the element types that implementations expect.
fn extras(options: &AttentionOptions, element: Element, device: &DispatchDevice) -> Extras<Dispatch> {
    let statistic = if element == Element::F64 { DType::F64 } else { DType::F32 };
    let float =
        |tensor: &Option<Tensor<1>>| MaybeFloat::from_option(tensor.clone().map(|t| t.cast(statistic).into_dispatch()));
    Extras {
        bias: MaybeFloat::from_option(options.bias.clone().map(Tensor::into_dispatch)),
        mask: MaybeBool::from_option(options.mask.clone().map(Tensor::into_dispatch)),
        alibi_slopes: float(&options.alibi_slopes),
        learned_sinks: float(&options.learned_sinks),
        score_parameters: MaybeFloat::from_option(
            options.score_function.clone().map(|(_, parameters)| parameters.into_dispatch()),
        ),
        key_lengths: MaybeInt::from_option(options.key_lengths.clone().map(|lengths: Tensor<1, Int>| {
            // A composition takes any integers, and LibTorch has no others than its own.
            let lengths = if runs_kernels(device) { lengths.cast(IntDType::I32) } else { lengths };
            lengths.into_dispatch()
        })),
    }
}

fn element_of(q: &Tensor<4>, device: &Device) -> Result<Element, AttentionError> {
    let wrong = |expected: &str| AttentionError::DType { what: "q", expected: expected.into(), found: q.dtype() };
    match q.dtype() {
        DType::F32 => Ok(Element::F32),
        DType::F16 => Ok(Element::F16),
        DType::BF16 => Ok(Element::BF16),
        DType::F64 if runs_f64(device.as_dispatch()) => Ok(Element::F64),
        DType::F64 => Err(wrong("f32, f16 or bf16 (f64 runs on the CPU only)")),
        _ => Err(wrong("f32, f16, bf16, or f64 on the CPU")),
    }
}

fn same_dtype(q: &Tensor<4>, what: &'static str, other: &Tensor<4>) -> Result<(), AttentionError> {
    if other.dtype() == q.dtype() {
        return Ok(());
    }
    Err(AttentionError::DType { what, expected: format!("that of q, {:?}", q.dtype()), found: other.dtype() })
}

/// A score function is f32 code with f32 parameters.
fn score_dtypes(element: Element, parameters: DType) -> Result<(), AttentionError> {
    let wrong = |what, expected: &str, found| Err(AttentionError::DType { what, expected: expected.into(), found });
    match (element, parameters) {
        (Element::F64, _) => wrong("q", "f32, f16 or bf16 with a score function, which is f32 code", DType::F64),
        (_, DType::F32) => Ok(()),
        (_, found) => wrong("score_parameters", "F32", found),
    }
}

fn same_device(q: &Device, what: &'static str, other: &Device) -> Result<(), AttentionError> {
    if other == q {
        return Ok(());
    }
    Err(AttentionError::Device { what, expected: format!("{q:?}"), found: format!("{other:?}") })
}

fn length(what: &'static str, unit: &'static str, expected: usize, found: usize) -> Result<(), AttentionError> {
    if found == expected { Ok(()) } else { Err(AttentionError::Length { what, unit, expected, found }) }
}

/// The device below autodiff.
fn executing(device: &DispatchDevice) -> &DispatchDevice {
    match device {
        #[cfg(feature = "autodiff")]
        DispatchDevice::Autodiff(inner) => executing(inner),
        other => other,
    }
}

/// Whether the native CPU path runs on the device.
#[cfg(feature = "flex")]
pub(crate) fn is_flex(device: &Device) -> bool {
    matches!(executing(device.as_dispatch()), DispatchDevice::Flex(_))
}

/// Whether kernels of ours run on the device; elsewhere a composition of the backend's own operations does.
fn runs_kernels(device: &DispatchDevice) -> bool {
    #[allow(unreachable_patterns)]
    match executing(device) {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => true,
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(_) => true,
        _ => false,
    }
}

fn runs_f64(device: &DispatchDevice) -> bool {
    match executing(device) {
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(_) => false,
        _ => true,
    }
}

/// Other crates of a build can turn on Burn backends that flashover was not built for: Burn's dispatch would panic.
fn backend_is_built(device: &Device) -> Result<(), AttentionError> {
    execution_backend_is_built(device, executing(device.as_dispatch()))
}

fn execution_backend_is_built(device: &Device, execution: &DispatchDevice) -> Result<(), AttentionError> {
    #[allow(unreachable_patterns)]
    match execution {
        #[cfg(feature = "flex")]
        DispatchDevice::Flex(_) => Ok(()),
        #[cfg(feature = "cubecl-backend")]
        DispatchDevice::Cube(_) => Ok(()),
        #[cfg(feature = "ndarray")]
        DispatchDevice::NdArray(_) => Ok(()),
        #[cfg(feature = "tch")]
        DispatchDevice::LibTorch(_) => Ok(()),
        #[cfg(feature = "remote")]
        DispatchDevice::Remote(_) => Ok(()),
        _ => Err(AttentionError::BackendNotBuilt { device: format!("{device:?}"), features: built_features() }),
    }
}

fn built_features() -> String {
    let all = [
        ("flex", cfg!(feature = "flex")),
        ("cuda", cfg!(feature = "cuda")),
        ("rocm", cfg!(feature = "rocm")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("webgpu", cfg!(feature = "webgpu")),
        ("metal", cfg!(feature = "metal")),
        ("ndarray", cfg!(feature = "ndarray")),
        ("tch", cfg!(feature = "tch")),
        ("remote", cfg!(feature = "remote")),
        ("autodiff", cfg!(feature = "autodiff")),
    ];
    all.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect::<Vec<_>>().join(", ")
}
