//! Partitioned inference for transformers that do not fit one chip: layouts as programs over sharded tensors, what they
//! cost, and which one to take.
//!
//! The method is that of Pope et al., "Efficiently Scaling Transformer Inference" (arXiv 2211.05102); sections, tables and
//! figures without another source are that paper's.
//!
//! # Glossary
//!
//! | name | meaning |
//! |---|---|
//! | `B`, `L`, `M`, `T` | sequences, new tokens of each, tokens of each in the cache, tokens of each that are scored |
//! | `E`, `F`, `V` | model dimension, feed-forward dimension, vocabulary |
//! | `H`, `K`, `Q` | query heads, key and value heads, head dimension |
//! | `x`, `y`, `z`, `n` | mesh axes, and the number of chips `XYZ` |
//! | `BLE_xyz` | a spec: `[B, L, E]`, the last dimension split over x, y and z |
//! | `partialsum-x` | a sum over x is owed |
//! | MFU | model FLOPs utilization: throughput over that at peak, 2 FLOPs a parameter and token |

pub mod architecture;
pub mod calibrate;
pub mod config;
pub mod cost;
pub mod count;
pub mod error;
pub mod execute;
pub mod hardware;
pub mod layout;
pub mod mesh;
pub mod model;
pub mod models;
pub mod paper;
pub mod planner;
pub mod precision;
pub mod program;
pub mod report;
pub mod simulate;
pub mod spec;
pub mod transport;
pub mod workload;

pub use error::ShardError;
