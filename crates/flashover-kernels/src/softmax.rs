//! Online softmax (Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, Algorithm 1): one pass over the keys with
//! a running maximum `m` and a running sum `l`, rescaled when the maximum grows.
//!
//! Hidden keys never enter. The running maximum starts at [`PIVOT`], a finite number: WGSL has no infinity literal, and
//! `exp(m − m)` must be 1 before any key was seen. `l = 0` says that nothing was seen.

use cubecl::prelude::*;

/// Start of the running maximum: the lowest finite number, which models also use to mask, so that a row of nothing else
/// still averages. Differences with scores may overflow to −∞, whose exponential is the 0 that is meant.
pub const PIVOT: f32 = f32::MIN;

/// Running state of one query row.
#[derive(CubeType, Debug, Clone, Copy, PartialEq)]
#[expand(derive(Clone, Copy))]
pub struct OnlineSoftmax {
    /// Running maximum of the visible scores.
    pub m: f32,
    /// Running sum of `exp(s − m)`.
    pub l: f32,
}

/// The state before any key.
#[cube]
pub fn softmax_init() -> OnlineSoftmax {
    OnlineSoftmax { m: PIVOT, l: 0.0f32 }
}

/// The state before any key when a learned sink's logit stands in the denominator.
#[cube]
pub fn softmax_init_sink(logit: f32) -> OnlineSoftmax {
    let m = max(logit, PIVOT);
    OnlineSoftmax { m, l: (logit - m).exp() }
}

/// Factor of everything accumulated under the maximum `m_old` when the maximum becomes `m_new`.
#[cube]
pub fn softmax_rescale(m_old: f32, m_new: f32) -> f32 {
    (m_old - m_new).exp()
}

/// Two partial results of a row become one.
#[cube]
pub fn softmax_merge(x: OnlineSoftmax, y: OnlineSoftmax) -> OnlineSoftmax {
    let m = max(x.m, y.m);
    OnlineSoftmax { m, l: x.l * softmax_rescale(x.m, m) + y.l * softmax_rescale(y.m, m) }
}
