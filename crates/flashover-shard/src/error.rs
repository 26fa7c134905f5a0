//! What can be wrong with a mesh, a spec, a program, a model, a chip or a plan.

use crate::mesh::Axis;
use crate::spec::Dim;

/// Why something was refused. Every message names the field, what was expected and what came.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ShardError {
    /// A mesh that cannot be: no axes, a name twice, a size of zero.
    #[error("mesh: expected {expected}, got {found}")]
    Mesh {
        /// What a mesh must be.
        expected: &'static str,
        /// What came.
        found: String,
    },
    /// An axis that the mesh does not have.
    #[error("axis {axis}: expected one of the mesh {mesh}, got an axis that it does not have")]
    UnknownAxis {
        /// The axis.
        axis: Axis,
        /// The mesh, printed.
        mesh: String,
    },
    /// Text that is not in the notation of specs.
    #[error("spec `{text}`: expected {expected}, got {found}")]
    Notation {
        /// The whole text.
        text: String,
        /// What the notation asks for.
        expected: &'static str,
        /// What stands there.
        found: String,
    },
    /// A spec that names an axis twice.
    #[error("spec {spec}: expected every axis at most once, got {axis} twice")]
    AxisTwice {
        /// The spec, printed.
        spec: String,
        /// The axis.
        axis: Axis,
    },
    /// A spec that names a dimension twice.
    #[error("spec {spec}: expected every dimension at most once, got {dim} twice")]
    DimTwice {
        /// The spec, printed.
        spec: String,
        /// The dimension.
        dim: Dim,
    },
    /// A dimension that its axes do not divide.
    #[error("{what}: dimension {dim} of {spec}: expected a multiple of {by}, got {found}")]
    Indivisible {
        /// Whose dimension: a tensor of the program, or `spec`.
        what: &'static str,
        /// The spec, printed.
        spec: String,
        /// The dimension.
        dim: Dim,
        /// Product of the sizes of its axes.
        by: usize,
        /// The size that came.
        found: usize,
    },
    /// A size of zero, or one that is too large.
    #[error("{field}: expected {expected}, got {found}")]
    Field {
        /// The field.
        field: String,
        /// What it may be.
        expected: String,
        /// What came.
        found: String,
    },
    /// A step whose tensors' specs do not belong together.
    #[error("step {step} ({op}): {what}: expected {expected}, got {found}")]
    Step {
        /// Its place: `embed`, `layer` or `head`, and its number.
        step: String,
        /// The operation.
        op: &'static str,
        /// Which tensor or property.
        what: String,
        /// What the operation makes of its inputs.
        expected: String,
        /// What the program says.
        found: String,
    },
    /// A name that is not known.
    #[error("{what}: expected one of {known}, got `{found}`{hint}")]
    Unknown {
        /// What was named: a model, a chip, a layout.
        what: &'static str,
        /// The names that are known.
        known: String,
        /// The name that came.
        found: String,
        /// `; did you mean ...?`, or nothing.
        hint: String,
    },
    /// A batch that is smaller than what it is sharded over.
    #[error("batch: expected a multiple of {chips}, because {why}, got {batch}")]
    Batch {
        /// Chips that the batch is sharded over.
        chips: usize,
        /// Which part of the layout shards it.
        why: String,
        /// The batch that came.
        batch: usize,
    },
    /// What a chip must hold does not fit its memory.
    #[error("memory: expected at most {available} bytes a chip, got {needed} ({weights} of weights, {cache} of cache)")]
    Memory {
        /// Bytes that a chip has for weights and cache.
        available: u64,
        /// Bytes that the plan needs.
        needed: u64,
        /// Of them weights.
        weights: u64,
        /// Of them keys and values.
        cache: u64,
    },
    /// A rank waits for another that has failed or ended.
    #[error("rank {rank}: expected a tensor of rank {peer}, got none, because that rank has stopped")]
    Stopped {
        /// The rank that waits.
        rank: usize,
        /// The rank that has stopped.
        peer: usize,
    },
    /// Attention on a rank was refused.
    #[error("rank {rank}: {error}")]
    Attention {
        /// The rank.
        rank: usize,
        /// Why.
        error: flashover::AttentionError,
    },
    /// Text in a file format that does not parse.
    #[error("{what}: {message}")]
    Parse {
        /// Which file.
        what: &'static str,
        /// The parser's message, which says where.
        message: String,
    },
}

impl ShardError {
    /// An unknown name, with the nearest known one as a suggestion if it is near at all.
    pub(crate) fn unknown(what: &'static str, found: &str, known: &[&str]) -> Self {
        let similarity = |name: &&&str| strsim::jaro_winkler(&found.to_lowercase(), &name.to_lowercase());
        let nearest = known.iter().max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
        let near = nearest.filter(|name| similarity(name) > 0.7);
        ShardError::Unknown {
            what,
            known: known.join(", "),
            found: found.to_owned(),
            hint: near.map(|name| format!("; did you mean `{name}`?")).unwrap_or_default(),
        }
    }

    /// A field with a value that it cannot have.
    pub(crate) fn field(field: impl Into<String>, expected: impl Into<String>, found: impl ToString) -> Self {
        ShardError::Field { field: field.into(), expected: expected.into(), found: found.to_string() }
    }
}
