//! A drop-in for `burn::tensor::module`: change the import, keep the call.

use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Bool, Tensor};

use crate::AttentionOptions;

/// Scaled dot-product attention with the signature of `burn::tensor::module::attention`.
///
/// Shapes as in [`crate::attention`]; additionally to Burn's, the key heads may be fewer than the query heads, the mask
/// and the bias broadcast, and the call is fused under autodiff.
///
/// # Panics
///
/// As Burn's does, on operands that do not fit; with the message of [`AttentionError`](crate::AttentionError).
pub fn attention(
    query: Tensor<4>,
    key: Tensor<4>,
    value: Tensor<4>,
    mask: Option<Tensor<4, Bool>>,
    attn_bias: Option<Tensor<4>>,
    options: AttentionModuleOptions,
) -> Tensor<4> {
    let mut ours = AttentionOptions::new();
    if let Some(scale) = options.scale {
        ours = ours.scale(scale);
    }
    if let Some(cap) = options.softcap {
        ours = ours.softcap(cap);
    }
    if options.is_causal {
        ours = ours.causal();
    }
    if let Some(mask) = mask {
        ours = ours.mask(mask);
    }
    if let Some(bias) = attn_bias {
        ours = ours.bias(bias);
    }
    crate::attention(query, key, value, &ours).unwrap_or_else(|error| panic!("flashover::module::attention: {error}"))
}
