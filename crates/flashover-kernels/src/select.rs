//! Which kernel runs a problem on a device, in which configuration, and why.

use crate::device::{DeviceLimits, KernelError};
use crate::portable::{self, TileConfig};
use crate::problem::Problem;

/// Who chooses the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum KernelChoice {
    /// The fastest family that can run the problem.
    #[default]
    Auto,
    /// The portable family; an error if it cannot run.
    Portable,
}

/// A kernel family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kernel {
    /// [`portable`]: shared-memory tiles, on every runtime.
    Portable,
}

impl Kernel {
    /// Whether it calls a user's own score function.
    pub const fn calls_score_functions(self) -> bool {
        match self {
            Kernel::Portable => true,
        }
    }

    /// Refuses what no configuration of the family can do.
    fn check_options(self, problem: &Problem) -> Result<(), KernelError> {
        match problem.score {
            Some(score) if !self.calls_score_functions() => {
                Err(KernelError::ScoreFunction { kernel: self.to_string(), function: score.code.name() })
            }
            _ => Ok(()),
        }
    }
}

impl core::fmt::Display for Kernel {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Kernel::Portable => f.write_str("portable"),
        }
    }
}

/// The outcome of [`select`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection {
    /// The family.
    pub kernel: Kernel,
    /// Its tiles.
    pub config: TileConfig,
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
    let kernel = Kernel::Portable;
    let (config, tiles) = portable_tile(problem, limits);
    let why_kernel = match choice {
        KernelChoice::Auto => "no other family is built for this device",
        KernelChoice::Portable => "it was asked for by name",
    };
    match kernel.check_options(problem).and_then(|()| portable::check_limits(problem, limits, config)) {
        Ok(()) => Ok(Selection { kernel, config, reason: format!("{kernel}: {why_kernel}; {config}: {tiles}") }),
        Err(why) => Err(match choice {
            KernelChoice::Auto => SelectError::Nothing { device: limits.name.clone(), kernel, why },
            KernelChoice::Portable => SelectError::Named { kernel, why },
        }),
    }
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
mod tests {
    use super::*;
    use crate::mask::Band;
    use crate::problem::Element;

    fn limits() -> DeviceLimits {
        DeviceLimits {
            name: "test".into(),
            max_bindings: 7,
            max_shared_bytes: 16 * 1024,
            max_units: 256,
            elements: vec![Element::F32, Element::F16],
            max_iterations: usize::MAX,
            hardware: true,
        }
    }

    fn problem(seq_q: usize, element: Element) -> Problem {
        Problem::new([1, 2, seq_q, 256], [1, 2, 300, 256], [1, 2, 300, 256], element).unwrap()
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
