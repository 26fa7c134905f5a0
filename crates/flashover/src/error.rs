//! What can be wrong with a call, found before anything is launched.

use burn::tensor::DType;
use flashover_kernels::mask::MaskError;
use flashover_kernels::problem::ProblemError;

/// Why an attention call was refused. Every message gives what was expected and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttentionError {
    /// The shapes or options do not make a sound problem.
    #[error(transparent)]
    Problem(#[from] ProblemError),
    /// A mask or a block plan is not sound, or not one for this call.
    #[error(transparent)]
    Mask(#[from] MaskError),
    /// A tensor has another element type than the queries (or than its role asks for).
    #[error("dtype of {what}: expected {expected}, got {found:?}")]
    DType {
        /// Which tensor.
        what: &'static str,
        /// What was expected.
        expected: String,
        /// What came.
        found: DType,
    },
    /// A tensor lives on another device than the queries.
    #[error("device of {what}: expected that of q, {expected}, got {found}")]
    Device {
        /// Which tensor.
        what: &'static str,
        /// The device of the queries.
        expected: String,
        /// The device that came.
        found: String,
    },
    /// A one-dimensional operand has the wrong length.
    #[error("length of {what}: expected {expected} ({unit}), got {found}")]
    Length {
        /// Which tensor.
        what: &'static str,
        /// What it holds one of.
        unit: &'static str,
        /// Expected length.
        expected: usize,
        /// The length that came.
        found: usize,
    },
    /// The device's backend was not compiled into flashover.
    #[error("backend of {device}: expected one that flashover was built with (features: {features}), got another")]
    BackendNotBuilt {
        /// The device of the queries.
        device: String,
        /// The backend features of this build.
        features: String,
    },
    /// The chosen kernel cannot run the problem on the device.
    #[error("kernel: {0}")]
    Kernel(String),
}
