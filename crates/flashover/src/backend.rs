//! The backend extension: what every implementation provides and how Burn routes to it.

// Burn deprecates its NdArray and LibTorch backends, and the extension macro names them.
#![allow(deprecated)]

use burn::backend::tensor::{BoolTensor, FloatTensor, IntTensor};
use burn::backend::{Backend, ExtensionType, backend_extension};
use flashover_kernels::operands::Wanted;
use flashover_kernels::problem::Problem;
#[cfg(feature = "cubecl-backend")]
use flashover_kernels::select::Selection;

use crate::SparsePlan;

/// What is to be computed, and by which kernel.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The validated problem.
    pub problem: Problem,
    /// The block plan, if the problem has one.
    pub blocks: Option<SparsePlan>,
    /// The kernel of a CubeCL device, chosen at the boundary; `None` on other devices.
    #[cfg(feature = "cubecl-backend")]
    pub selection: Option<Selection>,
}

#[cfg(any(feature = "cubecl-backend", feature = "fusion"))]
impl Plan {
    /// Whether the backward asks the forward for more than the output and the log-sum-exp.
    pub(crate) fn keeps_rest(&self) -> bool {
        #[cfg(feature = "cubecl-backend")]
        let keeps = self.selection.as_ref().is_some_and(|selection| selection.one_pass.is_some());
        #[cfg(not(feature = "cubecl-backend"))]
        let keeps = false;
        keeps
    }
}

/// A float tensor that may be absent. (`Option` is not recognized by Burn's extension macros.)
#[derive(Debug, Clone, ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub enum MaybeFloat<B: Backend> {
    /// No tensor.
    Absent,
    /// A tensor.
    Present(FloatTensor<B>),
}

/// A boolean tensor that may be absent.
#[derive(Debug, Clone, ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub enum MaybeBool<B: Backend> {
    /// No tensor.
    Absent,
    /// A tensor.
    Present(BoolTensor<B>),
}

/// An integer tensor that may be absent.
#[derive(Debug, Clone, ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub enum MaybeInt<B: Backend> {
    /// No tensor.
    Absent,
    /// A tensor.
    Present(IntTensor<B>),
}

macro_rules! option_conversions {
    ($maybe:ident, $tensor:ident) => {
        impl<B: Backend> $maybe<B> {
            /// As an `Option`.
            pub fn into_option(self) -> Option<$tensor<B>> {
                match self {
                    $maybe::Absent => None,
                    $maybe::Present(tensor) => Some(tensor),
                }
            }

            /// From an `Option`.
            pub fn from_option(tensor: Option<$tensor<B>>) -> Self {
                tensor.map_or($maybe::Absent, $maybe::Present)
            }
        }
    };
}
option_conversions!(MaybeFloat, FloatTensor);
option_conversions!(MaybeBool, BoolTensor);
option_conversions!(MaybeInt, IntTensor);

/// The optional operands; see [`Operands`](flashover_kernels::operands::Operands) for shapes and dtypes.
#[derive(Debug, Clone, ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub struct Extras<B: Backend> {
    /// Additive bias.
    #[extension_type]
    pub bias: MaybeFloat<B>,
    /// Boolean mask, `true` hides.
    #[extension_type]
    pub mask: MaybeBool<B>,
    /// ALiBi slopes.
    #[extension_type]
    pub alibi_slopes: MaybeFloat<B>,
    /// Learned sink logits.
    #[extension_type]
    pub learned_sinks: MaybeFloat<B>,
    /// Parameters of the user's score function.
    #[extension_type]
    pub score_parameters: MaybeFloat<B>,
    /// Visible keys of each batch element.
    #[extension_type]
    pub key_lengths: MaybeInt<B>,
}

/// What a forward returns that a backward may follow.
#[derive(Debug, Clone, ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub struct ForwardState<B: Backend> {
    /// The output `[B, Hq, Sq, Dv]`.
    pub o: FloatTensor<B>,
    /// The log-sum-exp, f32 `[B, Hq, Sq]`.
    pub lse: FloatTensor<B>,
    /// What rounding took from the output, in its shape and dtype, where the backward asks for it.
    #[extension_type]
    pub rest: MaybeFloat<B>,
}

/// The gradients that were wanted; see [`Gradients`](flashover_kernels::operands::Gradients).
#[derive(Debug, Clone, ExtensionType)]
#[cfg_attr(feature = "fusion", extension_type(fusion))]
pub struct InputGradients<B: Backend> {
    /// Gradient of the queries.
    #[extension_type]
    pub q: MaybeFloat<B>,
    /// Gradient of the keys.
    #[extension_type]
    pub k: MaybeFloat<B>,
    /// Gradient of the values.
    #[extension_type]
    pub v: MaybeFloat<B>,
    /// Gradient of the bias.
    #[extension_type]
    pub bias: MaybeFloat<B>,
    /// Gradient of the ALiBi slopes.
    #[extension_type]
    pub alibi_slopes: MaybeFloat<B>,
    /// Gradient of the learned sinks.
    #[extension_type]
    pub learned_sinks: MaybeFloat<B>,
    /// Gradient of the parameters of the user's score function.
    #[extension_type]
    pub score_parameters: MaybeFloat<B>,
}

/// Attention as a backend provides it. The plan's problem is validated and the tensors match it: [`attention`](crate::attention)
/// has seen to that.
#[backend_extension(
    Flex: cfg(feature = "flex"),
    Cube: cfg(feature = "cubecl-backend"),
    NdArray: cfg(feature = "ndarray"),
    LibTorch: cfg(feature = "tch"),
    Remote: cfg(feature = "remote"),
    Fusion: cfg(feature = "fusion"),
    Autodiff: cfg(feature = "autodiff"),
)]
pub trait AttentionBackend: Backend {
    /// The output `[B, Hq, Sq, Dv]` alone.
    #[fusion(meta = |q: &TensorSpec, _k: &TensorSpec, _v: &TensorSpec, _extras: &ExtrasMetadata, plan: &Plan| {
        output_spec(q, &plan.problem)
    })]
    fn flashover_forward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] extras: Extras<Self>,
        plan: Plan,
    ) -> FloatTensor<Self>;

    /// The output, the log-sum-exp and, if `for_backward`, what else the backward asks for.
    #[fusion(meta = |q: &TensorSpec, _k: &TensorSpec, _v: &TensorSpec, _extras: &ExtrasMetadata, plan: &Plan, for_backward: &bool| {
        state_specs(q, plan, *for_backward)
    })]
    fn flashover_forward_state(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] extras: Extras<Self>,
        plan: Plan,
        for_backward: bool,
    ) -> ForwardState<Self>;

    /// The gradients that are wanted, from what the forward returned and the gradients of its output and log-sum-exp.
    #[fusion(meta = backward_specs)]
    #[allow(clippy::too_many_arguments)]
    fn flashover_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        #[extension_type] extras: Extras<Self>,
        #[extension_type] state: ForwardState<Self>,
        do_: FloatTensor<Self>,
        #[extension_type] dlse: MaybeFloat<Self>,
        plan: Plan,
        wanted: Wanted,
    ) -> InputGradients<Self>;
}

#[cfg(feature = "fusion")]
use specs::*;

#[cfg(feature = "fusion")]
mod specs {
    //! Shapes and dtypes of the outputs, which Fusion needs before anything runs.

    pub(super) use burn::backend::fusion::custom::TensorSpec;

    use burn::tensor::DType;

    use super::*;

    pub(super) fn output_spec(q: &TensorSpec, problem: &Problem) -> TensorSpec {
        TensorSpec::new(problem.output_shape().into(), q.dtype)
    }

    pub(super) fn state_specs(q: &TensorSpec, plan: &Plan, for_backward: bool) -> ForwardStateMetadata {
        let o = output_spec(q, &plan.problem);
        let rest = match for_backward && plan.keeps_rest() {
            true => MaybeFloatMetadata::Present(o.clone()),
            false => MaybeFloatMetadata::Absent,
        };
        let lse = TensorSpec::new(plan.problem.lse_shape().into(), DType::F32);
        ForwardStateMetadata { o, lse, rest }
    }

    #[allow(clippy::too_many_arguments)]
    pub(super) fn backward_specs(
        q: &TensorSpec,
        k: &TensorSpec,
        v: &TensorSpec,
        extras: &ExtrasMetadata,
        _state: &ForwardStateMetadata,
        _do: &TensorSpec,
        _dlse: &MaybeFloatMetadata,
        _plan: &Plan,
        wanted: &Wanted,
    ) -> InputGradientsMetadata {
        let like = |wanted: bool, spec: &TensorSpec| match wanted {
            true => MaybeFloatMetadata::Present(spec.clone()),
            false => MaybeFloatMetadata::Absent,
        };
        let like_extra = |wanted: bool, extra: &MaybeFloatMetadata| match wanted {
            true => extra.clone(),
            false => MaybeFloatMetadata::Absent,
        };
        InputGradientsMetadata {
            q: like(wanted.q, q),
            k: like(wanted.k, k),
            v: like(wanted.v, v),
            bias: like_extra(wanted.bias, &extras.bias),
            alibi_slopes: like_extra(wanted.alibi_slopes, &extras.alibi_slopes),
            learned_sinks: like_extra(wanted.learned_sinks, &extras.learned_sinks),
            score_parameters: like_extra(wanted.score_parameters, &extras.score_parameters),
        }
    }
}
