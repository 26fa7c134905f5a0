//! What a planner must know of a decoder-only transformer: its shape, not its weights.

use serde::{Deserialize, Serialize};

use crate::error::ShardError;

/// How the attention and the feed-forward layer of a block stand to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Block {
    /// One after the other, each with its norm and its residual.
    Serial,
    /// Side by side behind one norm, added together (§3.4): one all-reduce less.
    Parallel,
}

/// The function between the matrices of the feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Nonlinearity {
    /// `x · σ(x)`.
    Silu,
    /// The Gaussian error linear unit.
    Gelu,
    /// `max(x, 0)`.
    Relu,
}

/// The feed-forward layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mlp {
    /// `f(x·W_up)·W_down`: the two matrices of the paper's formulas.
    TwoMatrix(Nonlinearity),
    /// `(f(x·W_gate) ∘ x·W_up)·W_down`: SwiGLU and its relatives, three matrices.
    Gated(Nonlinearity),
}

impl Mlp {
    /// Matrices of `E·F` elements.
    pub const fn matrices(self) -> usize {
        match self {
            Mlp::TwoMatrix(_) => 2,
            Mlp::Gated(_) => 3,
        }
    }

    /// The function.
    pub const fn nonlinearity(self) -> Nonlinearity {
        match self {
            Mlp::TwoMatrix(f) | Mlp::Gated(f) => f,
        }
    }
}

/// The norm before each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// Root mean square: one statistic a row.
    Rms,
    /// Mean and variance: two statistics a row.
    Layer,
}

impl Norm {
    /// Sums over a row that the norm needs.
    pub const fn statistics(self) -> usize {
        match self {
            Norm::Rms => 1,
            Norm::Layer => 2,
        }
    }
}

/// Shape of a decoder-only transformer. Sizes are those of the model, without padding.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Architecture {
    /// Name, as in `palm-540b`.
    pub name: String,
    /// Blocks.
    pub layers: usize,
    /// Model dimension `E`.
    pub model_dim: usize,
    /// Feed-forward dimension `F`.
    pub ff_dim: usize,
    /// Query heads `H`.
    pub heads: usize,
    /// Key and value heads `K`: `H` for multi-head attention, 1 for multiquery.
    pub kv_heads: usize,
    /// Head dimension `Q`.
    pub head_dim: usize,
    /// Vocabulary `V`.
    pub vocabulary: usize,
    /// The feed-forward layer.
    pub mlp: Mlp,
    /// Serial or parallel.
    pub block: Block,
    /// The norm.
    pub norm: Norm,
    /// Whether positions enter by rotating queries and keys.
    pub rotary: bool,
    /// Whether one table embeds and unembeds.
    pub tied_embeddings: bool,
}

impl Architecture {
    /// Checks the sizes.
    ///
    /// # Errors
    ///
    /// If a size is zero, or the heads are not a multiple of the key heads.
    pub fn validate(&self) -> Result<(), ShardError> {
        for (field, found) in [
            ("layers", self.layers),
            ("model_dim", self.model_dim),
            ("ff_dim", self.ff_dim),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vocabulary", self.vocabulary),
        ] {
            if found == 0 || found > 1 << 28 {
                return Err(ShardError::field(field, "1 to 268435456", found));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a multiple of the {} key heads", self.kv_heads);
            return Err(ShardError::field("heads", expected, self.heads));
        }
        Ok(())
    }

    /// Elements of the matrices of one block: `E·(m·F + 2·H·Q + 2·K·Q)`, with `m` matrices in the feed-forward layer.
    pub fn layer_parameters(&self) -> u64 {
        let columns = self.mlp.matrices() * self.ff_dim + 2 * (self.heads + self.kv_heads) * self.head_dim;
        self.model_dim as u64 * columns as u64
    }

    /// Elements of all matrices: the blocks and the embedding, the unembedding too if it has a table of its own. Biases,
    /// norms and learned positions are not counted: a ten-thousandth of a large model.
    pub fn parameters(&self) -> u64 {
        let tables = if self.tied_embeddings { 1 } else { 2 };
        self.layers as u64 * self.layer_parameters() + tables * (self.vocabulary * self.model_dim) as u64
    }

    /// The same model with `heads` query heads and, for multi-head attention, as many key heads: how the paper pads
    /// PaLM 540B from 48 to 64 heads (§4).
    #[must_use]
    pub fn with_heads(&self, heads: usize) -> Self {
        let kv_heads = if self.kv_heads == self.heads { heads } else { self.kv_heads };
        Architecture { heads, kv_heads, ..self.clone() }
    }

    /// Key and value elements of one token in all layers: `2·layers·K·Q`.
    pub fn cache_elements_per_token(&self) -> u64 {
        2 * (self.layers * self.kv_heads * self.head_dim) as u64
    }
}
