//! Attention on the CPU: native code over plain slices, tiled, forward and backward, never N×N in memory.
//!
//! [`forward`] and [`backward`] take a validated [`Problem`](flashover_kernels::problem::Problem) and views with any
//! strides. They use rayon's current thread pool, and the vector instructions that the machine has. Results do not
//! depend on the number of threads, bit for bit.

mod backend;
mod backward;
mod bias_gradient;
mod context;
mod delta;
mod forward;
mod gemm;
mod pages;
mod parallel;
mod real;
mod score_gradient;
mod sweep;
mod tiles;
mod view;

#[cfg(test)]
mod tests;

use flashover_kernels::block_plan::BlockPlan;
use flashover_kernels::launch_log::Launch;
use flashover_kernels::operands::Wanted;
use flashover_kernels::problem::{Element, Problem};

pub use backward::backward;
pub use forward::forward;
pub use real::Float;
pub use view::View;

/// Operands of attention, as [`Operands`](flashover_kernels::operands::Operands) describes them.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a, T: Float> {
    /// Queries `[B, Hq, Sq, D]`.
    pub q: View<'a, T>,
    /// Keys `[B, Hkv, Skv, D]`.
    pub k: View<'a, T>,
    /// Values `[B, Hkv, Skv, Dv]`.
    pub v: View<'a, T>,
    /// Additive bias, each dimension that of `[B, Hq, Sq, Skv]` or 1.
    pub bias: Option<View<'a, T>>,
    /// Mask, likewise; anything but 0 hides.
    pub mask: Option<View<'a, u8>>,
    /// ALiBi slopes `[Hq]`.
    pub alibi_slopes: Option<&'a [T::Compute]>,
    /// Learned sink logits `[Hq]`.
    pub learned_sinks: Option<&'a [T::Compute]>,
    /// Parameters of the user's score function.
    pub score_parameters: Option<&'a [f32]>,
    /// Visible keys of each batch element `[B]`; below 0 counts as 0, beyond `Skv` as `Skv`.
    pub key_lengths: Option<&'a [i32]>,
    /// The block plan, if the problem has one.
    pub plan: Option<&'a BlockPlan>,
}

/// The launch that [`forward`] will note for a problem.
pub fn forward_launch(problem: &Problem) -> Launch {
    match problem.element {
        Element::F64 => forward::launch::<f64>(problem),
        Element::F32 => forward::launch::<f32>(problem),
        Element::F16 => forward::launch::<half::f16>(problem),
        Element::BF16 => forward::launch::<half::bf16>(problem),
    }
}

/// The launch that [`backward`] will note.
pub fn backward_launch(problem: &Problem, wanted: Wanted) -> Launch {
    match problem.element {
        Element::F64 => backward::launch::<f64>(problem, wanted),
        Element::F32 => backward::launch::<f32>(problem, wanted),
        Element::F16 => backward::launch::<half::f16>(problem, wanted),
        Element::BF16 => backward::launch::<half::bf16>(problem, wanted),
    }
}

/// The instruction set that is used here, as `explain` and the launch log name it.
pub fn simd_name() -> &'static str {
    struct Name;
    impl pulp::WithSimd for Name {
        type Output = &'static str;

        fn with_simd<S: pulp::Simd>(self, _: S) -> &'static str {
            let name = std::any::type_name::<S>();
            match name.rsplit("::").next().unwrap_or(name) {
                "V4" => "avx512",
                "V3" => "avx2",
                "Neon" | "NeonFcma" => "neon",
                "Simd128" | "RelaxedSimd" => "wasm128",
                "Scalar" => "scalar",
                other => other,
            }
        }
    }
    pulp::Arch::new().dispatch(Name)
}
