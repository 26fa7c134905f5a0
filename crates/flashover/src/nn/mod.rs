//! Modules that stand in the place of burn-nn's: they load its records, give its values, and never store the scores.
//!
//! | here | in burn-nn 0.22 | beyond it |
//! |---|---|---|
//! | [`MultiHeadAttention`] | `attention::MultiHeadAttention` | grouped heads, head dimensions, [`AttentionConfig`] |
//! | [`CrossAttention`] | `attention::CrossAttention` | [`AttentionConfig`] |
//! | [`RotaryEmbedding`] | `RotaryEncoding` | both conventions |
//! | [`TransformerEncoder`] | `transformer::TransformerEncoder` with `norm_first` | generation that passes new tokens only |
//!
//! A record holds a module's parameters by their path; the paths here are burn-nn's, so a state saved from one loads
//! into the other. Parameters that burn-nn does not have (`attention.learned_sinks`, the encoder's last `norm`) exist
//! only when they are configured.
//!
//! What differs from burn-nn:
//!
//! - **Weights** are returned only by the methods named `forward_with_weights`; `forward` never makes them.
//! - **A query that may see nothing** gives zeros (then the output projection), where burn-nn averages all values:
//!   masked scores are −∞ here, not `min_float`, and there is no such setting.
//! - **A mask** of [`AttentionConfig`] is walked by block plans, in time of what it shows; see
//!   [`mask`](AttentionConfig::mask).
//! - **Dropout** of the probabilities is a pure function of a seed. Each forward call in training takes a fresh one: a
//!   counter that starts at random, drawn from the device at the first of them, so that
//!   [`Device::seed`](burn::tensor::Device::seed) before it makes a run repeatable. Clones of a module share its
//!   counter; records do not hold it. As in burn-nn, "in training" means on an autodiff device with the dropout's flag
//!   not frozen.
//!
//! ```standalone_crate
//! use burn::tensor::{Device, Distribution, Tensor, TensorData};
//! use flashover::nn::{MhaInput, MultiHeadAttentionConfig};
//!
//! let device = Device::flex().autodiff();
//! let run = || -> Vec<TensorData> {
//!     device.seed(42);
//!     let mha = MultiHeadAttentionConfig::new(32, 4).with_dropout(0.5).init(&device);
//!     let x = Tensor::<3>::random([2, 10, 32], Distribution::Default, &device);
//!     (0..2).map(|_| mha.forward(MhaInput::self_attn(x.clone())).context.into_data()).collect()
//! };
//! let (first, again) = (run(), run());
//! assert_ne!(first[0], first[1]); // each call drops anew
//! assert_eq!(first, again); // and each run does the same
//! ```
//!
//! Like burn-nn's, these modules panic on shapes that do not fit, with what was expected and what came.

mod attention;
mod cache;
mod cross;
mod encoder;
mod multi_head;
mod plans;
mod rotary;

pub use attention::{Attention, AttentionConfig};
pub use cache::{CrossAttentionCache, KvCache, MhaCache};
pub use cross::{CrossAttention, CrossAttentionConfig};
pub use encoder::{
    TransformerEncoder, TransformerEncoderAutoregressiveCache, TransformerEncoderConfig, TransformerEncoderInput,
    TransformerEncoderLayer,
};
pub use multi_head::{MhaInput, MhaOutput, MultiHeadAttention, MultiHeadAttentionConfig};
pub use rotary::{RotaryConvention, RotaryEmbedding, RotaryEmbeddingConfig};

use burn::nn::Linear;
use burn::tensor::{Tensor, assert_shape};

/// Projects `[B, S, _]` to heads, `[B, heads, S, dim]`.
fn project(x: Tensor<3>, linear: &Linear, heads: usize, dim: usize) -> Tensor<4> {
    let [batch, length, _] = x.dims();
    let x = apply(linear, x);
    assert_shape!(x, [_, _, heads * dim]);
    x.reshape([batch, length, heads, dim]).swap_dims(1, 2)
}

/// Lays heads `[B, heads, S, dim]` side by side and projects them.
fn merge(o: Tensor<4>, linear: &Linear) -> Tensor<3> {
    let [batch, heads, length, dim] = o.dims();
    apply(linear, o.swap_dims(1, 2).reshape([batch, length, heads * dim]))
}

/// The layer, also for an empty batch: there burn-flex 0.22.1 multiplies a matrix that does not exist.
fn apply(linear: &Linear, x: Tensor<3>) -> Tensor<3> {
    match x.dims() {
        [0, length, _] => Tensor::zeros([0, length, linear.weight.dims()[1]], (&x.device(), x.dtype())),
        _ => linear.forward(x),
    }
}
