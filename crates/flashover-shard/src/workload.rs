//! What the model is asked to do.

use core::fmt;

use serde::{Deserialize, Serialize};

use crate::error::ShardError;

/// Whether many tokens of a sequence go through the model at once, or one (§2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Processing the input tokens.
    Prefill,
    /// Generating one token after the other.
    Decode,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Phase::Prefill => "prefill",
            Phase::Decode => "decode",
        })
    }
}

/// One run of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Workload {
    /// The phase.
    pub phase: Phase,
    /// Sequences `B`.
    pub batch: usize,
    /// Tokens of each sequence that go through the model, `L`; 1 when decoding.
    pub tokens: usize,
    /// Tokens of each sequence that attention can see, `M`: those that went before and the new ones.
    pub context: usize,
    /// Tokens of each sequence whose logits are computed, `T`.
    pub scored: usize,
}

impl Workload {
    /// Prefill of `tokens` tokens of each sequence, with logits of the last.
    pub const fn prefill(batch: usize, tokens: usize) -> Self {
        Workload { phase: Phase::Prefill, batch, tokens, context: tokens, scored: 1 }
    }

    /// One step of generation, `context` tokens in the cache with the new one.
    pub const fn decode(batch: usize, context: usize) -> Self {
        Workload { phase: Phase::Decode, batch, tokens: 1, context, scored: 1 }
    }

    /// Tokens that go through the model: `B·L`.
    pub const fn total_tokens(&self) -> usize {
        self.batch * self.tokens
    }

    /// Checks the sizes.
    ///
    /// # Errors
    ///
    /// If a size is zero or beyond 2²⁸, the context is shorter than the new tokens, more tokens are scored than go
    /// through, or more than one token is decoded.
    pub fn validate(&self) -> Result<(), ShardError> {
        let sizes =
            [("batch", self.batch), ("tokens", self.tokens), ("context", self.context), ("scored", self.scored)];
        for (field, found) in sizes {
            if found == 0 || found > 1 << 28 {
                return Err(ShardError::field(field, "1 to 268435456", found));
            }
        }
        if self.context < self.tokens {
            return Err(ShardError::field("context", format!("at least the {} new tokens", self.tokens), self.context));
        }
        if self.scored > self.tokens {
            return Err(ShardError::field("scored", format!("at most the {} new tokens", self.tokens), self.scored));
        }
        if self.phase == Phase::Decode && self.tokens != 1 {
            return Err(ShardError::field("tokens", "1 when decoding", self.tokens));
        }
        Ok(())
    }
}
