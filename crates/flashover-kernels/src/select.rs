//! Which kernel runs a problem on a device, in which configuration, and why.

mod run;

use crate::cmma::{self, CmmaConfig};
use crate::device::{DeviceLimits, KernelError};
use crate::family::two_passes::FEW_KEYS;
use crate::hopper::{self, HopperBackwardConfig, HopperConfig};
use crate::mma::{self, MmaConfig, OnePass};
use crate::portable::{self, TileConfig};
use crate::problem::{Precision, Problem};

pub use run::Call;

/// Who chooses the kernel.
///
/// NaN and infinity: the portable family keeps them to the rows that can see them. The others give what is hidden in a tile that is
/// shown in part the weight 0, and 0 times NaN is NaN: there a value of a hidden key reaches the queries of its tile, and a
/// gradient of the output the keys of its tile. They never leave it.
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
mod tests;
