//! Caches: burn-nn's semantics, computed for new positions only.

use burn::nn::attention as burn_nn;
use burn::tensor::Tensor;
use flashover::nn::{
    AttentionConfig, KvCache, MhaCache, MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, RotaryConvention,
    RotaryEmbeddingConfig,
};

use super::{assert_close, assert_panics, holes, normal, padding, transfer};
use crate::devices;

const D: usize = 24;
const S: usize = 9;

fn causal_module(attention: AttentionConfig) -> MultiHeadAttention {
    let config = MultiHeadAttentionConfig::new(D, 4).with_n_heads_kv(Some(2));
    config.with_attention(attention.with_causal(true)).init(&devices::flex())
}

/// Causal modules with all that depends on positions.
fn causal_modules() -> Vec<MultiHeadAttention> {
    let config = AttentionConfig::new;
    let rotary = |convention| Some(RotaryEmbeddingConfig::new(S).with_convention(convention));
    vec![
        causal_module(config()),
        causal_module(config().with_window(Some((3, 0))).with_visible_sinks(1)),
        causal_module(config().with_alibi(true).with_learned_sinks(true)),
        causal_module(config().with_rotary(rotary(RotaryConvention::Interleaved))),
        causal_module(config().with_rotary(rotary(RotaryConvention::HalfRotated))),
    ]
}

#[test]
fn forward_cache_is_burns_step_by_step() {
    let device = devices::flex();
    let burns = burn_nn::MultiHeadAttentionConfig::new(D, 4).init(&device);
    let ours = transfer(&burns, MultiHeadAttentionConfig::new(D, 4).init(&device));
    let x = normal([3, S, D], &device);
    // From the first position, and after a prompt of 4 (which burn-nn lets see all of itself).
    for first in [1, 4] {
        let (mut our_cache, mut burn_cache) = (MhaCache::autoregressive(), burn_nn::MhaCache::autoregressive());
        for length in first..=S {
            let x = x.clone().narrow(1, 0, length);
            // Other masks in each call: earlier rows stay what they were.
            let (attn, pad) = (holes(3, length, length, &device), holes(1, 3, length, &device).squeeze_dim::<2>(0));
            let ours_in = MhaInput::self_attn(x.clone()).mask_attn(attn.clone()).mask_pad(pad.clone());
            let burns_in = burn_nn::MhaInput::self_attn(x).mask_attn(attn).mask_pad(pad);
            let found = ours.forward_cache(ours_in, &mut our_cache).context;
            assert_close(&format!("{length} positions"), found, burns.forward_cache(burns_in, &mut burn_cache).context);
        }
    }
}

#[test]
fn forward_cache_is_burns_over_a_fixed_memory() {
    let device = devices::flex();
    let burns = burn_nn::MultiHeadAttentionConfig::new(D, 4).init(&device);
    let ours = transfer(&burns, MultiHeadAttentionConfig::new(D, 4).init(&device));
    let (x, memory) = (normal([3, S, D], &device), normal([3, 5, D], &device));
    let mut our_cache = MhaCache::autoregressive_cross_attention();
    let mut burn_cache = burn_nn::MhaCache::autoregressive_cross_attention();
    for length in 1..=S {
        let x = x.clone().narrow(1, 0, length);
        // Later calls may bring another memory: it is not read.
        let memory = if length == 1 { memory.clone() } else { normal([3, 5, D], &device) };
        let ours_in = MhaInput::new(x.clone(), memory.clone(), memory.clone()).mask_pad(padding(3, 5, &device));
        let burns_in = burn_nn::MhaInput::new(x, memory.clone(), memory).mask_pad(padding(3, 5, &device));
        let found = ours.forward_cache(ours_in, &mut our_cache).context;
        assert_close(&format!("{length} positions"), found, burns.forward_cache(burns_in, &mut burn_cache).context);
    }
}

#[test]
fn causal_forward_cache_equals_forward_for_any_steps() {
    let device = devices::flex();
    for (n, mha) in causal_modules().into_iter().enumerate() {
        let x = normal([2, S, D], &device);
        let mask = holes(2, S, S, &device);
        let masked = |length: usize| {
            let mask = mask.clone().narrow(1, 0, length).narrow(2, 0, length);
            MhaInput::self_attn(x.clone().narrow(1, 0, length)).mask_attn(mask)
        };
        let all = mha.forward(masked(S)).context;
        for steps in [vec![1, 2, 3, 4, 5, 6, 7, 8, 9], vec![5, 6, 9], vec![9]] {
            let mut cache = MhaCache::autoregressive();
            for &length in &steps {
                let so_far = mha.forward_cache(masked(length), &mut cache).context;
                let expected = all.clone().narrow(1, 0, length);
                assert_close(&format!("module {n}, steps {steps:?}, {length} positions"), so_far, expected);
            }
        }
    }
}

#[test]
fn forward_autoregressive_gives_the_new_rows() {
    let device = devices::flex();
    for (n, mha) in causal_modules().into_iter().enumerate() {
        let x = normal([2, S, D], &device);
        let all = mha.forward(MhaInput::self_attn(x.clone())).context;
        let mut cache = KvCache::new();
        for (start, length) in [(0, 4), (4, 1), (5, 1), (6, 3)] {
            assert_eq!(cache.len(), start);
            let rows = mha.forward_autoregressive(x.clone().narrow(1, start, length), &mut cache);
            assert_close(&format!("module {n} from {start}"), rows, all.clone().narrow(1, start, length));
        }
    }
}

#[test]
fn misuse_of_a_cache_panics() {
    let device = devices::flex();
    let zeros = |length| Tensor::<3>::zeros([2, length, D], &device);
    let mha = MultiHeadAttentionConfig::new(D, 4).init(&device);
    assert_panics("expected a causal module", || mha.forward_autoregressive(zeros(1), &mut KvCache::new()));
    let mut cache = MhaCache::autoregressive();
    mha.forward_cache(MhaInput::self_attn(zeros(3)), &mut cache);
    // More queries over the same keys are no misuse.
    let grown = mha.forward_cache(MhaInput::new(zeros(4), zeros(3), zeros(3)), &mut cache).context;
    assert_eq!(grown.dims(), [2, 4, D]);
    assert_panics("more than the 4 in the cache, got 1", || {
        mha.forward_cache(MhaInput::self_attn(zeros(1)), &mut cache)
    });
    assert_panics("at least the 3 keys in the cache, got 2", || {
        mha.forward_cache(MhaInput::new(zeros(5), zeros(2), zeros(2)), &mut cache)
    });
}
