//! Rotary embedding in both conventions.

use burn::nn::RotaryEncodingConfig;
use burn::tensor::{Device, Tensor, TensorData};
use flashover::nn::{AttentionConfig, MhaInput, MultiHeadAttentionConfig, RotaryConvention, RotaryEmbeddingConfig};

use super::{assert_close, assert_panics, floats, normal};
use crate::devices;

/// `y_i = x_i cos − x_(i+d/2) sin`, `y_(i+d/2) = x_i sin + x_(i+d/2) cos` of the last dimension, in f64.
fn half_rotated(x: &Tensor<4>, start: usize, theta: f64) -> Tensor<4> {
    let [batch, heads, length, d] = x.dims();
    let x_values: Vec<f64> = x.to_data().iter::<f64>().collect();
    let mut y = vec![0f32; x_values.len()];
    for (row, x) in x_values.chunks(d).enumerate() {
        for i in 0..d / 2 {
            let angle = (start + row % length) as f64 / theta.powf(2.0 * i as f64 / d as f64);
            y[row * d + i] = (x[i] * angle.cos() - x[i + d / 2] * angle.sin()) as f32;
            y[row * d + i + d / 2] = (x[i] * angle.sin() + x[i + d / 2] * angle.cos()) as f32;
        }
    }
    Tensor::from_data(TensorData::new(y, [batch, heads, length, d]), &x.device())
}

#[test]
fn interleaved_is_burns_rotary_encoding() {
    let device = devices::flex();
    for theta in [10000.0, 500.0] {
        let burns = RotaryEncodingConfig::new(40, 12).with_theta(theta).init(&device);
        let ours = RotaryEmbeddingConfig::new(40).with_theta(theta.into()).init(12, &device);
        let x = normal([2, 3, 17, 12], &device);
        assert_close("from 0", ours.forward(x.clone()), burns.forward(x.clone()));
        assert_close("from 23", ours.apply(x.clone(), 23), burns.apply(x.clone(), 23));
        // As the modules pass it, with heads and positions swapped in memory.
        let swapped = x.swap_dims(1, 2);
        assert_close("strided", ours.apply(swapped.clone(), 5), burns.apply(swapped, 5));
        let flat = normal([17, 12], &device);
        assert_close("two dimensions", ours.apply(flat.clone(), 5), burns.apply(flat, 5));
    }
}

#[test]
fn half_rotated_pairs_features_half_the_head_apart() {
    let device = devices::flex();
    let config = RotaryEmbeddingConfig::new(5000).with_theta(1e6).with_convention(RotaryConvention::HalfRotated);
    let rotary = config.init(8, &device);
    let x = normal([2, 3, 9, 8], &device);
    for start in [0, 7, 4991] {
        assert_close("half rotated", rotary.apply(x.clone(), start), half_rotated(&x, start, 1e6));
    }
    let empty = Tensor::<4>::zeros([2, 3, 0, 8], &device);
    assert_eq!(rotary.apply(empty, 3).dims(), [2, 3, 0, 8]);
}

#[test]
fn frequencies_can_be_scaled() {
    let device = devices::flex();
    let config = RotaryEmbeddingConfig::new(64);
    // Positions interpolated by 4: row 4i is row i of the plain embedding.
    let scaled = config.init_with_frequency_scaling(8, |_, frequency| frequency / 4.0, &device);
    let row = normal([1, 1, 1, 8], &device);
    assert_close("interpolated", scaled.apply(row.clone(), 20), config.init(8, &device).apply(row.clone(), 5));

    // Only the last pair turns, and by 1 a position: the third feature of pairs (2i, 2i + 1) stays, the last two turn.
    let last = config.init_with_frequency_scaling(8, |i, _| if i == 3 { 1.0 } else { 0.0 }, &device);
    let turned = floats(last.apply(row.clone(), 2));
    let x = floats(row);
    assert_eq!(turned[..6], x[..6]);
    let (sin, cos) = 2f32.sin_cos();
    let expected = [x[6] * cos - x[7] * sin, x[6] * sin + x[7] * cos];
    let close = turned[6..].iter().zip(expected).all(|(found, expected)| (found - expected).abs() < 1e-5);
    assert!(close, "{turned:?}, expected at the end {expected:?}");
}

#[test]
fn positions_and_features_are_checked() {
    let device = devices::flex();
    let rotary = RotaryEmbeddingConfig::new(10).init(8, &device);
    let x = |length, d| Tensor::<3>::zeros([1, length, d], &device);
    assert_panics("at most 10 positions, got 11", || rotary.apply(x(4, 8), 7));
    assert_panics("axis 2 expected 8, got 6", || rotary.forward(x(4, 6)));
    assert_panics("even number of features, got 7", || RotaryEmbeddingConfig::new(10).init(7, &device));
    assert_panics("positive theta, got 0", || RotaryEmbeddingConfig::new(10).with_theta(0.0).init(8, &device));
    let rotary = AttentionConfig::new().with_rotary(Some(RotaryEmbeddingConfig::new(10)));
    let mha = MultiHeadAttentionConfig::new(16, 2).with_attention(rotary).init(&device);
    assert_panics("at most as many queries as keys (3)", || mha.forward(MhaInput::new(x(4, 16), x(3, 16), x(3, 16))));
}

/// Rotated queries and keys know their distance only: the last queries over all keys, and all queries over all keys.
#[test]
fn queries_stand_at_the_last_keys() {
    let device = Device::flex();
    for convention in [RotaryConvention::Interleaved, RotaryConvention::HalfRotated] {
        let rotary = RotaryEmbeddingConfig::new(16).with_convention(convention);
        let attention = AttentionConfig::new().with_causal(true).with_rotary(Some(rotary));
        let mha = MultiHeadAttentionConfig::new(16, 2).with_attention(attention.clone()).init(&device);
        let x = normal([2, 12, 16], &device);
        let all = mha.forward(MhaInput::self_attn(x.clone())).context;
        let last = mha.forward(MhaInput::new(x.clone().narrow(1, 8, 4), x.clone(), x.clone())).context;
        assert_close("last queries", last, all.clone().narrow(1, 8, 4));

        // And it matters: without it the same parameters give something else.
        let plain = MultiHeadAttentionConfig::new(16, 2).with_attention(attention.with_rotary(None)).init(&device);
        let plain = super::transfer(&mha, plain).forward(MhaInput::self_attn(x)).context;
        assert!((plain - all).abs().max().into_scalar::<f32>() > 0.01);
    }
}
