//! The pre-norm encoder: against burn-nn's, generation, gradients.

use burn::module::Module;
use burn::nn::transformer as burn_nn;
use burn::tensor::Tensor;
use flashover::nn::{
    AttentionConfig, RotaryConvention, RotaryEmbeddingConfig, TransformerEncoderConfig, TransformerEncoderInput,
};

use super::training::parameters_with_gradients;
use super::{assert_close, assert_panics, holes, normal, padding, transfer};
use crate::devices;

const D: usize = 24;
const S: usize = 10;

fn config() -> TransformerEncoderConfig {
    TransformerEncoderConfig::new(D, 40, 4, 3)
}

fn decoder() -> TransformerEncoderConfig {
    let rotary = RotaryEmbeddingConfig::new(S).with_convention(RotaryConvention::HalfRotated);
    let attention = AttentionConfig::new().with_sliding_window(Some(6)).with_visible_sinks(1).with_rotary(Some(rotary));
    config().with_n_heads_kv(Some(2)).with_attention(attention)
}

#[test]
fn without_the_last_norm_it_is_burns_pre_norm_encoder() {
    let device = devices::flex();
    for quiet in [false, true] {
        let burns = burn_nn::TransformerEncoderConfig::new(D, 40, 4, 3);
        let burns = burns.with_norm_first(true).with_quiet_softmax(quiet).init(&device);
        let ours = config().with_final_norm(false).with_quiet_softmax(quiet).init(&device);
        let ours = transfer(&burns, ours);
        let x = normal([3, S, D], &device);
        let (pad, holes) = (padding(3, S, &device), holes(3, S, S, &device));
        let expected = burns.forward(burn_nn::TransformerEncoderInput::new(x.clone()));
        assert_close("plain", ours.forward(TransformerEncoderInput::new(x.clone())), expected);
        let input = burn_nn::TransformerEncoderInput::new(x.clone()).mask_pad(pad.clone()).mask_attn(holes.clone());
        let expected = burns.forward(input);
        let input = TransformerEncoderInput::new(x).mask_pad(pad).mask_attn(holes);
        assert_close("masked", ours.forward(input), expected);
    }
}

#[test]
fn the_last_norm_normalizes() {
    let device = devices::flex();
    let encoder = config().init(&device);
    let y = encoder.forward(TransformerEncoderInput::new(normal([3, S, D], &device)));
    let mean = y.clone().mean_dim(2);
    assert_close("mean", mean, Tensor::zeros([3, S, 1], &device));
    assert_close("variance", y.powi_scalar(2).mean_dim(2), Tensor::ones([3, S, 1], &device));
}

#[test]
fn generation_equals_the_forward_pass() {
    let device = devices::flex();
    for config in [config().with_attention(AttentionConfig::new().with_causal(true)), decoder()] {
        let encoder = config.init(&device);
        let x = normal([2, S, D], &device);
        let all = encoder.forward(TransformerEncoderInput::new(x.clone()));
        for steps in [vec![1; S], vec![4, 1, 1, 4], vec![S]] {
            let mut cache = encoder.new_autoregressive_cache();
            for length in steps {
                let start = cache.len();
                let rows = encoder.forward_autoregressive(x.clone().narrow(1, start, length), &mut cache);
                assert_close(&format!("from {start}"), rows, all.clone().narrow(1, start, length));
            }
            assert_eq!(cache.len(), S);
        }
    }
}

#[test]
fn training_reaches_every_parameter() {
    let device = devices::flex().autodiff();
    let encoder = decoder().with_dropout(0.2).with_quiet_softmax(true).init(&device);
    let output = encoder.forward(TransformerEncoderInput::new(normal([2, S, D], &device)));
    // Each layer: 4 projections, 2 feed-forward layers and 2 norms of 2 parameters; and the last norm.
    assert_eq!(parameters_with_gradients(&encoder, output), 3 * 16 + 2);
    assert_eq!(encoder.valid().into_record().len(), 3 * 16 + 2);
}

#[test]
fn misuse_panics() {
    let device = devices::flex();
    let x = || Tensor::<3>::zeros([1, 1, D], &device);
    let encoder = config().init(&device);
    let mut cache = encoder.new_autoregressive_cache();
    assert_panics("expected a causal module", || encoder.forward_autoregressive(x(), &mut cache));
    let shallow = TransformerEncoderConfig::new(D, 40, 4, 2).init(&device);
    assert_panics("expected a cache of 2 layers, got 3", || shallow.forward_autoregressive(x(), &mut cache));
    let narrow = TransformerEncoderInput::new(Tensor::zeros([1, 2, D - 1], &device));
    assert_panics("axis 2 expected 24, got 23", || encoder.forward(narrow));
    assert_panics("multiple of n_heads (5), got 24", || TransformerEncoderConfig::new(D, 40, 5, 1).init(&device));
}
