//! Modules with a mask: the same as under a dense mask that says the same, and calls with a cache give the rows of a call without.

use burn::module::Module;
use burn::tensor::{Bool, Device, Tensor, TensorData};
use flashover::kernels::mask::{BigBird, Documents, Extent, Mask};
use flashover::nn::{
    AttentionConfig, CrossAttentionConfig, KvCache, MhaCache, MhaInput, MultiHeadAttention, MultiHeadAttentionConfig,
    TransformerEncoderConfig, TransformerEncoderInput,
};

use super::{assert_close, assert_panics, floats, normal, padding, transfer};
use crate::devices;

const D: usize = 24;

fn stripes(_: u32, _: u32, i: u32, j: u32) -> bool {
    (i / 9 + j / 11).is_multiple_of(2) || i % 40 == j % 40
}

/// Masks by position and by index, none of which tells heads apart.
fn masks() -> Vec<Mask> {
    vec![
        Mask::causal() & (Mask::sliding_window(40) | Mask::sinks(5)),
        Mask::bigbird(BigBird { block: 16, global: 1, window: 1, random: 1, seed: 7 }),
        Mask::function_of_positions("nn masks: stripes", stripes).expect("the same function"),
        Mask::Nothing,
    ]
}

fn module(attention: AttentionConfig, device: &Device) -> MultiHeadAttention {
    MultiHeadAttentionConfig::new(D, 4)
        .with_dropout(0.0)
        .with_n_heads_kv(Some(2))
        .with_attention(attention)
        .init(device)
}

/// `[B, Sq, Skv]`, `true` hides.
fn dense(mask: &Mask, [batch, queries, keys]: [usize; 3], device: &Device) -> Tensor<3, Bool> {
    let extent = Extent { batch: batch as u32, heads: 4, seq_q: queries as u32, seq_kv: keys as u32 };
    let bound = mask.bind(extent).expect("sound");
    let mut hides = Vec::new();
    for b in 0..batch as u32 {
        for i in 0..queries as u32 {
            hides.extend((0..keys as u32).map(|j| !bound.allows(b, 0, i, j)));
        }
    }
    Tensor::from_data(TensorData::new(hides, [batch, queries, keys]), device)
}

fn tiled(mask: &Mask) -> AttentionConfig {
    AttentionConfig::new().with_mask(Some(mask.clone())).with_mask_tile([32, 32])
}

#[test]
fn a_masked_module_is_the_dense_masked_module() {
    for device in devices::native().into_iter().map(Device::autodiff) {
        for mask in masks() {
            let masked = module(tiled(&mask), &device);
            let plain = transfer(&masked, module(AttentionConfig::new(), &device));
            let (x, context) = (normal([2, 100, D], &device), normal([2, 130, D], &device));
            let pad = padding(2, 130, &device);
            let run = |mha: &MultiHeadAttention, dense: Option<Tensor<3, Bool>>| {
                let (x, context) = (x.clone().require_grad(), context.clone().require_grad());
                let mut input = MhaInput::new(x.clone(), context.clone(), context.clone()).mask_pad(pad.clone());
                if let Some(dense) = dense {
                    input = input.mask_attn(dense);
                }
                let o = mha.forward(input).context;
                let grads = o.clone().sin().sum().backward();
                let weight = mha.key.weight.val();
                let of_weight = weight.grad(&grads).expect("a parameter").unsqueeze::<3>();
                [o.inner(), x.grad(&grads).expect("tracked"), context.grad(&grads).expect("tracked"), of_weight]
            };
            let found = run(&masked, None);
            let expected = run(&plain, Some(dense(&mask, [2, 100, 130], &device)));
            for (name, (found, expected)) in
                ["o", "dx", "dcontext", "dkey"].into_iter().zip(found.into_iter().zip(expected))
            {
                assert_close(&format!("{name} under {mask:?} on {device:?}"), found, expected);
            }
            // Again, by the plan that was kept.
            let again = run(&masked, None);
            assert_close(
                "again",
                again.into_iter().next().expect("o"),
                run(&masked.clone(), None).into_iter().next().expect("o"),
            );
        }
    }
}

#[test]
fn calls_with_a_cache_give_the_same_rows() {
    let device = devices::flex();
    for mask in masks().into_iter().chain([Mask::per_head(vec![
        Mask::causal(),
        Mask::window(9, 0),
        Mask::sinks(3) & Mask::causal(),
        Mask::sliding_window(30) & Mask::causal(),
    ])]) {
        let mha = module(tiled(&(mask.clone() & Mask::causal())).with_causal(true), &device);
        let x = normal([2, 70, D], &device);
        let (mut cache, mut kv) = (MhaCache::autoregressive(), KvCache::new());
        let mut start = 0;
        for end in [1, 33, 34, 70] {
            let so_far = MhaInput::self_attn(x.clone().slice_dim(1, 0..end));
            // A function of indices sees other positions in a longer call, so each is held against its own length.
            let all = mha.forward(so_far.clone()).context;
            let expected = all.slice_dim(1, start..end);
            let cached = mha.forward_cache(so_far, &mut cache).context.slice_dim(1, start..end);
            assert_close(&format!("forward_cache {start}..{end} under {mask:?}"), cached, expected.clone());
            let new = mha.forward_autoregressive(x.clone().slice_dim(1, start..end), &mut kv);
            assert_close(&format!("forward_autoregressive {start}..{end} under {mask:?}"), new, expected);
            start = end;
        }
    }
}

#[test]
fn padding_and_a_mask_meet_in_a_cached_call() {
    let device = devices::flex();
    let mha = module(tiled(&(Mask::window(20, 0) & Mask::causal())), &device);
    let x = normal([3, 50, D], &device);
    let input = |end: usize| {
        let pad = padding(3, 50, &device).slice_dim(1, 0..end);
        MhaInput::self_attn(x.clone().slice_dim(1, 0..end)).mask_pad(pad)
    };
    let mut cache = MhaCache::autoregressive();
    mha.forward_cache(input(49), &mut cache);
    let cached = mha.forward_cache(input(50), &mut cache).context.slice_dim(1, 49..50);
    assert_close("the last row", cached, mha.forward(input(50)).context.slice_dim(1, 49..50));
}

#[test]
fn cross_attention_and_the_encoder_take_a_mask() {
    let device = devices::flex();
    let mask = Mask::bigbird(BigBird { block: 16, global: 1, window: 1, random: 1, seed: 3 });
    let mha = module(tiled(&mask), &device);
    let cross = CrossAttentionConfig::new(D, D, 4, 2, 6).with_attention(tiled(&mask)).with_dropout(0.0).init(&device);
    let cross = transfer(&mha, cross);
    let (query, context) = (normal([2, 90, D], &device), normal([2, 70, D], &device));
    let expected = mha.forward(MhaInput::new(query.clone(), context.clone(), context.clone())).context;
    assert_close("cross", cross.forward(query, context, None), expected);

    let encoder = |attention| TransformerEncoderConfig::new(D, 48, 4, 2).with_dropout(0.0).with_attention(attention);
    let masked = encoder(tiled(&mask)).init(&device);
    let plain = transfer(&masked, encoder(AttentionConfig::new()).init(&device));
    let x = normal([2, 80, D], &device);
    let dense = dense(&mask, [2, 80, 80], &device);
    let expected = plain.forward(TransformerEncoderInput::new(x.clone()).mask_attn(dense));
    assert_close("encoder", masked.forward(TransformerEncoderInput::new(x)), expected);
}

#[test]
fn weights_are_hidden_by_the_mask() {
    let device = devices::flex();
    let mask = Mask::causal() & Mask::window(10, 0);
    let (_, weights) =
        module(tiled(&mask), &device).forward_with_weights(MhaInput::self_attn(normal([1, 60, D], &device)));
    let hides = dense(&mask, [1, 60, 60], &device).unsqueeze_dim::<4>(1).expand([1, 4, 60, 60]);
    assert!(floats(weights.clone().mask_fill(hides.clone().bool_not(), 0.0)).iter().all(|&x| x == 0.0));
    assert!(floats(weights.mask_fill(hides, 1.0)).iter().all(|&x| x > 0.0));
}

#[test]
fn records_know_nothing_of_a_mask_and_configurations_keep_it() {
    let device = devices::flex();
    let attention = tiled(&masks()[1]);
    let masked = module(attention.clone(), &device);
    let plain = module(AttentionConfig::new(), &device);
    assert_eq!(masked.num_params(), plain.num_params());
    let read: AttentionConfig = burn::config::Config::load_binary(attention.to_string().as_bytes()).expect("readable");
    assert_eq!((read.mask, read.mask_tile), (attention.mask, [32, 32]));
}

#[test]
fn a_mask_for_other_lengths_or_heads_is_refused() {
    let device = devices::flex();
    let x = |length: usize| MhaInput::self_attn(normal([1, length, D], &device));
    let documents = Mask::Documents(Documents { queries: vec![vec![0; 40]], keys: vec![vec![0; 40]] });
    let mha = module(tiled(&documents), &device);
    mha.forward(x(40));
    assert_panics("attention: ", || mha.forward(x(41)));
    let mut cache = MhaCache::autoregressive();
    assert_panics("attention: ", || mha.forward_cache(x(39), &mut cache));
    assert_panics("attention: ", || module(tiled(&Mask::per_head(vec![Mask::causal(); 3])), &device).forward(x(40)));
    assert_panics("attention: ", || module(tiled(&Mask::causal()).with_mask_tile([0, 32]), &device).forward(x(40)));
}
