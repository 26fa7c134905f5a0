//! The same records, the same values as burn-nn.

use burn::module::{Module, Param};
use burn::nn::attention as burn_nn;
use burn::tensor::{Device, Tensor};
use flashover::nn::{
    AttentionConfig, CrossAttention, CrossAttentionCache, CrossAttentionConfig, MhaInput, MultiHeadAttention,
    MultiHeadAttentionConfig, RotaryEmbeddingConfig,
};

use super::{assert_close, assert_panics, holes, normal, padding, transfer};
use crate::devices;

const D: usize = 24;

fn burn_mha(quiet: bool, device: &Device) -> burn_nn::MultiHeadAttention {
    burn_nn::MultiHeadAttentionConfig::new(D, 4).with_quiet_softmax(quiet).init(device)
}

fn our_mha(quiet: bool, device: &Device) -> MultiHeadAttention {
    MultiHeadAttentionConfig::new(D, 4).with_quiet_softmax(quiet).init(device)
}

fn burn_cross(heads_kv: usize, quiet: bool, device: &Device) -> burn_nn::CrossAttention {
    burn_nn::CrossAttentionConfig::new(D, 20, 4, heads_kv, 8).with_quiet_softmax(quiet).init(device)
}

fn our_cross(heads_kv: usize, quiet: bool, device: &Device) -> CrossAttention {
    CrossAttentionConfig::new(D, 20, 4, heads_kv, 8).with_quiet_softmax(quiet).init(device)
}

/// The same operands and masks for both.
fn mha_inputs(pad: bool, attn: bool, device: &Device) -> (MhaInput, burn_nn::MhaInput) {
    let (q, k, v) = (normal([3, 7, D], device), normal([3, 11, D], device), normal([3, 11, D], device));
    let ours = MhaInput::new(q.clone(), k.clone(), v.clone());
    let burns = burn_nn::MhaInput::new(q, k, v);
    let (ours, burns) = match pad {
        true => (ours.mask_pad(padding(3, 11, device)), burns.mask_pad(padding(3, 11, device))),
        false => (ours, burns),
    };
    match attn {
        true => (ours.mask_attn(holes(3, 7, 11, device)), burns.mask_attn(holes(3, 7, 11, device))),
        false => (ours, burns),
    }
}

#[test]
fn multi_head_attention_has_burns_values_and_weights() {
    let device = devices::flex();
    for quiet in [false, true] {
        let burns = burn_mha(quiet, &device);
        let ours = transfer(&burns, our_mha(quiet, &device));
        for (pad, attn) in [(false, false), (true, false), (false, true), (true, true)] {
            let name = format!("quiet {quiet}, pad {pad}, attn {attn}");
            let (our_input, burn_input) = mha_inputs(pad, attn, &device);
            let expected = burns.forward(burn_input);
            assert_close(&name, ours.forward(our_input.clone()).context, expected.context.clone());
            let (output, weights) = ours.forward_with_weights(our_input);
            assert_close(&name, output.context, expected.context);
            assert_close(&name, weights, expected.weights);
        }
    }
}

#[test]
fn multi_head_attention_saves_what_burn_loads() {
    let device = devices::flex();
    let ours = our_mha(false, &device);
    let burns = transfer(&ours, burn_mha(false, &device));
    let (our_input, burn_input) = mha_inputs(true, true, &device);
    assert_close("to burn", burns.forward(burn_input).context, ours.forward(our_input).context);

    // Without some biases, the record lacks them on both sides.
    let burns = burn_nn::MultiHeadAttentionConfig::new(D, 4).with_key_bias(false).with_output_bias(false).init(&device);
    let config = MultiHeadAttentionConfig::new(D, 4).with_key_bias(false).with_output_bias(false);
    let ours = transfer(&burns, config.init(&device));
    let (our_input, burn_input) = mha_inputs(false, false, &device);
    assert_close("fewer biases", ours.forward(our_input).context, burns.forward(burn_input).context);
}

#[test]
fn learned_sinks_are_the_only_addition_to_a_record() {
    let device = devices::flex();
    let attention = AttentionConfig::new().with_learned_sinks(true);
    let with_sinks = || MultiHeadAttentionConfig::new(D, 4).with_attention(attention.clone()).init(&device);
    let burns = burn_mha(true, &device);
    let record = burns.clone().into_record();
    assert!(with_sinks().try_load_record(record.clone()).is_err(), "the record has no sinks");

    // Sinks start at zero, which is quiet softmax.
    let mut ours = with_sinks().load_record(record.allow_partial(true));
    let (our_input, burn_input) = mha_inputs(false, false, &device);
    assert_close("sinks at zero", ours.forward(our_input.clone()).context, burns.forward(burn_input).context);

    ours.attention.learned_sinks = Some(Param::from_tensor(normal([4], &device)));
    let loaded = transfer(&ours, with_sinks());
    assert_close("own record", loaded.forward(our_input.clone()).context, ours.forward(our_input).context);
}

#[test]
fn grouped_heads_equal_repeated_ones() {
    let device = devices::flex();
    let ours = MultiHeadAttentionConfig::new(D, 4).with_n_heads_kv(Some(2)).init(&device);
    let mut burns = burn_mha(false, &device);
    // Query heads 0 and 1 read key head 0, 2 and 3 read key head 1.
    let repeat = |weight: Tensor<2>| {
        let [rows, columns] = weight.dims();
        let heads = weight.reshape([rows, 2, 1, columns / 2]).expand([rows, 2, 2, columns / 2]);
        Param::from_tensor(heads.reshape([rows, 2 * columns]))
    };
    burns.query = ours.query.clone();
    burns.output = ours.output.clone();
    for (grouped, repeated) in [(&ours.key, &mut burns.key), (&ours.value, &mut burns.value)] {
        repeated.weight = repeat(grouped.weight.val());
        let bias = grouped.bias.as_ref().unwrap().val().unsqueeze::<2>();
        repeated.bias = Some(repeat(bias).map(|bias| bias)).map(|bias| Param::from_tensor(bias.val().squeeze_dim(0)));
    }
    let (our_input, burn_input) = mha_inputs(true, true, &device);
    assert_close("grouped", ours.forward(our_input).context, burns.forward(burn_input).context);
}

#[test]
fn cross_attention_has_burns_values_and_records() {
    let device = devices::flex();
    for (heads_kv, quiet) in [(4, false), (2, true), (1, false)] {
        let burns = burn_cross(heads_kv, quiet, &device);
        let ours = transfer(&burns, our_cross(heads_kv, quiet, &device));
        let back = transfer(&ours, burn_cross(heads_kv, quiet, &device));
        let (query, context) = (normal([3, 7, D], &device), normal([3, 11, 20], &device));
        for mask in [None, Some(padding(3, 11, &device))] {
            let name = format!("{heads_kv} key heads, quiet {quiet}, mask {}", mask.is_some());
            let found = ours.forward(query.clone(), context.clone(), mask.clone());
            assert_close(&name, found.clone(), burns.forward(query.clone(), context.clone(), mask.clone()));
            assert_close(&name, found.clone(), back.forward(query.clone(), context.clone(), mask.clone()));
            let (output, weights) = ours.forward_with_weights(query.clone(), context.clone(), mask);
            assert_close(&name, output, found);
            assert_eq!(weights.dims(), [3, 4, 7, 11]);
        }
    }
}

#[test]
fn cross_attention_reads_the_context_once() {
    let device = devices::flex();
    let burns = burn_cross(2, false, &device);
    let ours = transfer(&burns, our_cross(2, false, &device));
    let (mut our_cache, mut burn_cache) = (CrossAttentionCache::new(), burn_nn::CrossAttentionCache::new());
    let context = normal([3, 11, 20], &device);
    let mask = padding(3, 11, &device);
    for call in 0..3 {
        let query = normal([3, 1 + call, D], &device);
        // The context of later calls is not read.
        let context = if call == 0 { context.clone() } else { normal([3, 11, 20], &device) };
        let found = ours.forward_cache(query.clone(), context.clone(), Some(mask.clone()), &mut our_cache);
        let expected = burns.forward_cache(query, context, Some(mask.clone()), &mut burn_cache);
        assert_close(&format!("call {call}"), found, expected);
    }
}

#[test]
fn a_query_that_sees_nothing_gives_the_output_bias() {
    let device = devices::flex();
    let ours = our_mha(false, &device);
    let everything = Tensor::<2>::ones([2, 5], &device).bool();
    let input = MhaInput::self_attn(normal([2, 5, D], &device)).mask_pad(everything);
    let (output, weights) = ours.forward_with_weights(input);
    let bias = ours.output.bias.as_ref().unwrap().val().reshape([1, 1, D]).expand([2, 5, D]);
    assert_close("context", output.context, bias);
    assert_eq!(weights.abs().max().into_scalar::<f32>(), 0.0);
}

#[test]
fn empty_inputs_give_empty_outputs() {
    let device = devices::flex();
    let rotary = AttentionConfig::new().with_rotary(Some(RotaryEmbeddingConfig::new(8)));
    let rotating = MultiHeadAttentionConfig::new(D, 4).with_attention(rotary).init(&device);
    let zeros = |batch, length| Tensor::<3>::zeros([batch, length, D], &device);
    for (batch, queries, keys) in [(2, 0, 0), (2, 0, 3), (0, 2, 3)] {
        for mha in [our_mha(false, &device), rotating.clone()] {
            let input = MhaInput::new(zeros(batch, queries), zeros(batch, keys), zeros(batch, keys));
            let pad = Tensor::<2>::zeros([batch, keys], &device).bool();
            let input =
                input.mask_pad(pad.clone()).mask_attn(Tensor::<3>::zeros([batch, queries, keys], &device).bool());
            let (output, weights) = mha.forward_with_weights(input);
            assert_eq!((output.context.dims(), weights.dims()), ([batch, queries, D], [batch, 4, queries, keys]));
            let context = Tensor::zeros([batch, keys, 20], &device);
            let output = our_cross(2, false, &device).forward(zeros(batch, queries), context, Some(pad));
            assert_eq!(output.dims(), [batch, queries, D]);
        }
    }
    let (output, weights) =
        our_mha(false, &device).forward_with_weights(MhaInput::new(zeros(2, 3), zeros(2, 0), zeros(2, 0)));
    assert_eq!((output.context.dims(), weights.dims()), ([2, 3, D], [2, 4, 3, 0]));
}

#[test]
fn wrong_shapes_and_settings_panic_with_what_was_expected() {
    let device = devices::flex();
    let mha = |config: MultiHeadAttentionConfig| config.init(&device);
    let plain = || MultiHeadAttentionConfig::new(D, 4);
    assert_panics("expected d_model to be a multiple of n_heads (5), got 24", || {
        mha(MultiHeadAttentionConfig::new(D, 5))
    });
    assert_panics("multiple of n_heads_kv (3), both at least 1, got 4", || mha(plain().with_n_heads_kv(Some(3))));
    assert_panics("head dimension of 1 to 256, got 300", || mha(plain().with_d_k(Some(300))));
    assert_panics("head dimension of 1 to 256, got 257", || mha(plain().with_d_v(Some(257))));
    let attention = |config: AttentionConfig| mha(plain().with_attention(config));
    assert_panics("got both", || {
        attention(AttentionConfig::new().with_window(Some((1, 1))).with_sliding_window(Some(3)))
    });
    assert_panics("sliding_window of at least 1 key, got 0", || {
        attention(AttentionConfig::new().with_sliding_window(Some(0)))
    });
    assert_panics("learned_sinks (trained from zero), got both", || {
        mha(plain().with_quiet_softmax(true).with_attention(AttentionConfig::new().with_learned_sinks(true)))
    });
    assert_panics("multiple of n_heads_kv (3)", || CrossAttentionConfig::new(D, 20, 4, 3, 8).init(&device));

    let zeros = |batch: usize, length: usize, width: usize| Tensor::<3>::zeros([batch, length, width], &device);
    let forward = |q, k, v| our_mha(false, &device).forward(MhaInput::new(q, k, v));
    assert_panics("axis 2 expected 24, got 23", || forward(zeros(2, 3, 23), zeros(2, 3, D), zeros(2, 3, D)));
    assert_panics("axis 0 expected 2, got 1", || forward(zeros(2, 3, D), zeros(1, 3, D), zeros(1, 3, D)));
    assert_panics("axis 1 expected 3, got 4", || forward(zeros(2, 3, D), zeros(2, 3, D), zeros(2, 4, D)));
    let input = || MhaInput::self_attn(zeros(2, 3, D));
    assert_panics("axis 1 expected 3, got 4", || {
        our_mha(false, &device).forward(input().mask_pad(padding(2, 4, &device)))
    });
    assert_panics("axis 2 expected 3, got 4", || {
        our_mha(false, &device).forward(input().mask_attn(holes(2, 3, 4, &device)))
    });
    assert_panics("axis 1 expected 5, got 4", || {
        our_cross(2, false, &device).forward(zeros(2, 3, D), zeros(2, 5, 20), Some(padding(2, 4, &device)))
    });
}
