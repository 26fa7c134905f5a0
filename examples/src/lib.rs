//! What the example programs are made of.
//!
//! `top_k` measures what block selection loses on such a model's attention ([`top_k`]).
//!
//! `quickstart` trains a byte-level language model ([`data`], [`model`], [`train`], [`sample`]) and then compares Burn's
//! own attention with flashover's ([`compare`], [`mod@reference`], [`memory`], [`report`], [`plot`]).

pub mod compare;
pub mod data;
pub mod device;
pub mod memory;
pub mod metric;
pub mod model;
pub mod plot;
pub mod progress;
pub mod reference;
pub mod report;
pub mod run_dir;
pub mod sample;
pub mod top_k;
pub mod train;

/// A result whose error is a message for the user.
pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;
