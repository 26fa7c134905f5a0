//! The kernels of flashover and the plain data that describes them.
//!
//! This crate knows CubeCL and nothing above it: no Burn, and no runtime is linked, so it builds wherever
//! `cubecl-core` does (wasm32 included). Everything that can be tested without a device is a scalar function
//! over `f32` and `u32` that runs unchanged inside `#[cube]` kernels and on the host.
//!
//! # Glossary
//!
//! The names are those of FlashAttention (Dao et al., arXiv 2205.14135) and FlashAttention-2 (arXiv 2307.08691).
//!
//! | name | meaning |
//! |---|---|
//! | `q`, `k`, `v`, `o` | queries `[B, Hq, Sq, D]`, keys `[B, Hkv, Skv, D]`, values `[B, Hkv, Skv, Dv]`, output `[B, Hq, Sq, Dv]` |
//! | `s`, `p` | scores and probabilities of one tile, `[bq, bk]` |
//! | `m`, `l` | running maximum and running sum of a query row's online softmax |
//! | `lse` | log-sum-exp of a query row, natural logarithm, f32 `[B, Hq, Sq]` |
//! | `delta` | row sum of `do ∘ o`, less the gradient of `lse`, f32 `[B, Hq, Sq]` |
//! | `bq`, `bk` | queries and keys of a tile |
//! | `i`, `j` | index of a query and of a key |
//! | `a` | a query's position on the key axis after bottom-right alignment, `i + Skv − Sq` |

/// For `#[cube]` code of users, which must be of the same version.
pub use cubecl;

pub mod block_plan;
pub mod cmma;
pub mod cost;
pub mod device;
#[allow(missing_docs)] // CubeCL's macros generate public items without docs; ours have theirs. So below.
pub mod dropout;
pub mod family;
#[allow(missing_docs)]
pub mod hopper;
pub mod launch_log;
pub mod mask;
pub mod mma;
pub mod operands;
pub mod portable;
pub mod problem;
#[allow(missing_docs)]
pub mod score;
pub mod select;
#[allow(missing_docs)]
pub mod softmax;
