//! How many bits the elements of each kind of tensor have.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::ShardError;

/// What a tensor is for, which decides its element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Storage {
    /// Token numbers; never moved by a collective.
    Index,
    /// Weights, as they are stored.
    Weight,
    /// Activations.
    Activation,
    /// Keys and values of the cache.
    Cache,
    /// Sums and log-sum-exps of rows, f32.
    Statistic,
}

/// Element type of the weights as they lie in memory and travel. The matrix products are of activations' type (§3.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightType {
    /// 32 bits: what simulated meshes compute with. Not among [`ALL`](Self::ALL), because nobody serves large models in it.
    F32,
    /// 16 bits.
    Bf16,
    /// 8 bits; scales are not counted.
    Int8,
    /// 4 bits; scales are not counted.
    Int4,
}

impl WeightType {
    /// Those that are planned with.
    pub const ALL: [WeightType; 3] = [WeightType::Bf16, WeightType::Int8, WeightType::Int4];

    /// Bits of an element.
    pub const fn bits(self) -> u64 {
        match self {
            WeightType::F32 => 32,
            WeightType::Bf16 => 16,
            WeightType::Int8 => 8,
            WeightType::Int4 => 4,
        }
    }

    /// `f32`, `bf16`, `int8` or `int4`.
    pub const fn name(self) -> &'static str {
        match self {
            WeightType::F32 => "f32",
            WeightType::Bf16 => "bf16",
            WeightType::Int8 => "int8",
            WeightType::Int4 => "int4",
        }
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for WeightType {
    type Err = ShardError;

    fn from_str(text: &str) -> Result<Self, ShardError> {
        let found = WeightType::ALL.into_iter().find(|weights| weights.name() == text);
        found.ok_or_else(|| ShardError::unknown("weight type", text, &WeightType::ALL.map(WeightType::name)))
    }
}

/// Bits of an element of each kind of tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Precision {
    /// Weights.
    pub weights: WeightType,
    /// Bits of an activation.
    pub activation_bits: u64,
    /// Bits of a cached key or value.
    pub cache_bits: u64,
    /// Whether activations travel as int8 in all-gathers, all-to-alls and sends. Sums travel uncompressed: adding
    /// rounded terms is another algorithm.
    pub compressed: bool,
}

impl Precision {
    /// bf16 activations and cache, these weights, nothing compressed.
    pub const fn new(weights: WeightType) -> Self {
        Precision { weights, activation_bits: 16, cache_bits: 16, compressed: false }
    }

    /// f32 everywhere, nothing compressed: what an executor without quantization holds and moves.
    pub const fn f32() -> Self {
        Precision { weights: WeightType::F32, activation_bits: 32, cache_bits: 32, compressed: false }
    }

    /// Bits of an element at rest.
    pub const fn bits(&self, storage: Storage) -> u64 {
        match storage {
            Storage::Weight => self.weights.bits(),
            Storage::Activation => self.activation_bits,
            Storage::Cache => self.cache_bits,
            Storage::Index | Storage::Statistic => 32,
        }
    }
}
