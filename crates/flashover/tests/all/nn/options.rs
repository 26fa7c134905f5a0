//! A module's configuration reaches attention as the oracle understands it.

use burn::config::Config;
use burn::module::{Module, ModuleMapper, Param};
use burn::nn::Linear;
use burn::tensor::{DType, Device, Tensor, TensorData};
use flashover::kernels::mask::Band;
use flashover::kernels::operands::Operands;
use flashover::kernels::problem::{Element, Problem};
use flashover::nn::{
    AttentionConfig, CrossAttentionConfig, MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, RotaryConvention,
    RotaryEmbeddingConfig,
};
use flashover_testing::data::Inputs;
use flashover_testing::oracle;

use super::{assert_close, normal};
use crate::devices;

const D: usize = 24;
const BATCH: usize = 2;
const QUERIES: usize = 9;
const KEYS: usize = 13;

fn heads(x: &Tensor<3>, linear: &Linear, heads: usize) -> Tensor<4> {
    let x = linear.forward(x.clone());
    let [batch, length, width] = x.dims();
    x.reshape([batch, length, heads, width / heads]).swap_dims(1, 2)
}

fn values<const D: usize>(x: &Tensor<D>) -> Vec<f64> {
    x.to_data().iter::<f64>().collect()
}

/// The module's output as the oracle has it: `set` puts the options into the problem.
fn expected(
    mha: &MultiHeadAttention,
    (query, key, value): (&Tensor<3>, &Tensor<3>, &Tensor<3>),
    slopes: Option<Vec<f64>>,
    sinks: Option<Vec<f64>>,
    set: impl FnOnce(&mut Problem),
) -> Tensor<3> {
    let q = heads(query, &mha.query, mha.n_heads);
    let k = heads(key, &mha.key, mha.n_heads_kv);
    let v = heads(value, &mha.value, mha.n_heads_kv);
    let mut problem = Problem::new(q.dims(), k.dims(), v.dims(), Element::F32).unwrap();
    problem.alibi = slopes.is_some();
    problem.learned_sinks = sinks.is_some();
    set(&mut problem);
    let operands = Operands {
        q: values(&q),
        k: values(&k),
        v: values(&v),
        bias: None,
        mask: None,
        alibi_slopes: slopes,
        learned_sinks: sinks,
        score_parameters: None,
        key_lengths: None,
    };
    let zeros = |shape: &[usize]| vec![0.0; shape.iter().product()];
    let (do_, dlse) = (zeros(&problem.output_shape()), zeros(&problem.lse_shape()));
    let (o, _) = oracle::forward(&problem, &Inputs { operands, do_, dlse });
    let o: Vec<f32> = o.into_iter().map(|x| x as f32).collect();
    let o = Tensor::<4>::from_data(TensorData::new(o, problem.output_shape()), &query.device());
    let [batch, heads, length, dim] = problem.output_shape();
    mha.output.forward(o.swap_dims(1, 2).reshape([batch, length, heads * dim]))
}

fn check(
    name: &str,
    mha: MultiHeadAttention,
    slopes: Option<Vec<f64>>,
    sinks: Option<Vec<f64>>,
    set: impl FnOnce(&mut Problem),
) {
    let device = devices::flex();
    let (q, k, v) =
        (normal([BATCH, QUERIES, D], &device), normal([BATCH, KEYS, D], &device), normal([BATCH, KEYS, D], &device));
    let expected = expected(&mha, (&q, &k, &v), slopes, sinks, set);
    let input = MhaInput::new(q, k, v.clone());
    assert_close(name, mha.forward(input.clone()).context, expected.clone());

    // The weights are those that make the output.
    let (_, weights) = mha.forward_with_weights(input);
    let v = heads(&v, &mha.value, mha.n_heads_kv);
    let [batch, _, keys, dim] = v.dims();
    let group = mha.n_heads / mha.n_heads_kv;
    let v = v.reshape([batch, mha.n_heads_kv, 1, keys, dim]).expand([batch, mha.n_heads_kv, group, keys, dim]);
    let o = weights.matmul(v.reshape([batch, mha.n_heads, keys, dim]));
    let o = mha.output.forward(o.swap_dims(1, 2).reshape([batch, QUERIES, mha.n_heads * dim]));
    assert_close(&format!("{name}, weights"), o, expected);
}

fn module(attention: AttentionConfig, device: &Device) -> MultiHeadAttention {
    MultiHeadAttentionConfig::new(D, 4).with_attention(attention).init(device)
}

#[test]
fn positions_and_scores_are_shaped_as_configured() {
    let device = devices::flex();
    let config = AttentionConfig::new;
    check("plain", module(config(), &device), None, None, |_| ());
    check("causal", module(config().with_causal(true), &device), None, None, |p| p.band = Band::causal());
    check("window", module(config().with_window(Some((2, 1))), &device), None, None, |p| {
        p.band = Band { left: 2, right: 1, ..Band::default() }
    });
    let sliding = config().with_sliding_window(Some(3)).with_visible_sinks(2);
    check("sliding window, sinks", module(sliding, &device), None, None, |p| {
        p.band = Band { causal: true, left: 2, right: 0, sinks: 2 }
    });
    check("softcap", module(config().with_softcap(Some(1.5)), &device), None, None, |p| p.softcap = Some(1.5));
    check("scale", module(config().with_scale(Some(0.9)), &device), None, None, |p| p.scale = 0.9);
    let slopes = vec![0.25, 0.0625, 0.015625, 0.00390625];
    check("alibi", module(config().with_alibi(true), &device), Some(slopes), None, |_| ());
}

#[test]
fn sinks_heads_and_dimensions_are_as_configured() {
    let device = devices::flex();
    let quiet = MultiHeadAttentionConfig::new(D, 4).with_quiet_softmax(true).init(&device);
    check("quiet softmax", quiet, None, Some(vec![0.0; 4]), |_| ());

    let mut learned = module(AttentionConfig::new().with_learned_sinks(true), &device);
    let sinks = normal([4], &device);
    learned.attention.learned_sinks = Some(Param::from_tensor(sinks.clone()));
    check("learned sinks", learned, None, Some(values(&sinks)), |_| ());

    let config = MultiHeadAttentionConfig::new(D, 6).with_n_heads_kv(Some(2)).with_d_k(Some(5)).with_d_v(Some(7));
    let mha = config.init(&device);
    let dims = |linear: &Linear| linear.weight.dims();
    assert_eq!([&mha.query, &mha.key, &mha.value, &mha.output].map(dims), [[D, 30], [D, 10], [D, 14], [42, D]]);
    check("dimensions", mha, None, None, |_| ());
}

#[test]
fn weights_of_many_keys_come_in_several_blocks() {
    let device = devices::flex();
    let mha = module(AttentionConfig::new().with_causal(true), &device);
    let (q, k) = (normal([1, 5, D], &device), normal([1, 600, D], &device));
    let (_, weights) = mha.forward_with_weights(MhaInput::new(q.clone(), k.clone(), k.clone()));
    assert_eq!(weights.dims(), [1, 4, 5, 600]);
    let scores = heads(&q, &mha.query, 4).matmul(heads(&k, &mha.key, 4).transpose()) / 6f64.sqrt();
    let hidden = Tensor::<2, burn::tensor::Bool>::tril_mask([5, 600], 595, &device).unsqueeze::<4>();
    let scores = scores.mask_fill(hidden.expand([1, 4, 5, 600]), f32::NEG_INFINITY);
    assert_close("weights", weights, burn::tensor::activation::softmax(scores, 3));
}

#[test]
fn cross_attention_takes_the_same_options() {
    let device = devices::flex();
    let rotary = RotaryEmbeddingConfig::new(16).with_convention(RotaryConvention::HalfRotated);
    let attention = AttentionConfig::new()
        .with_causal(true)
        .with_softcap(Some(3.0))
        .with_learned_sinks(true)
        .with_rotary(Some(rotary));
    let mut mha =
        MultiHeadAttentionConfig::new(D, 4).with_n_heads_kv(Some(2)).with_attention(attention.clone()).init(&device);
    mha.attention.learned_sinks = Some(Param::from_tensor(normal([4], &device)));
    let cross = CrossAttentionConfig::new(D, D, 4, 2, 6).with_attention(attention).init(&device);
    let cross = super::transfer(&mha, cross);
    let (query, context) = (normal([BATCH, QUERIES, D], &device), normal([BATCH, KEYS, D], &device));
    let expected = mha.forward(MhaInput::new(query.clone(), context.clone(), context.clone())).context;
    assert_close("cross", cross.forward(query, context, None), expected);
}

#[test]
fn configurations_survive_serialization() {
    let rotary = RotaryEmbeddingConfig::new(64).with_theta(5e5).with_convention(RotaryConvention::HalfRotated);
    let attention = AttentionConfig::new().with_window(Some((3, 4))).with_rotary(Some(rotary));
    let config = MultiHeadAttentionConfig::new(D, 4).with_n_heads_kv(Some(2)).with_attention(attention);
    let read = MultiHeadAttentionConfig::load_binary(config.to_string().as_bytes()).unwrap();
    assert_eq!(read.to_string(), config.to_string());
    assert_eq!(read.attention.rotary.unwrap().convention, RotaryConvention::HalfRotated);
    assert_eq!(read.attention.window, Some((3, 4)));
}

struct ToBf16;

impl ModuleMapper for ToBf16 {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(|tensor| tensor.cast(DType::BF16))
    }
}

/// Tables and slopes are f32; what meets the parameters follows their dtype.
#[test]
fn parameters_may_be_of_half_precision() {
    let device = devices::flex();
    let attention = AttentionConfig::new()
        .with_causal(true)
        .with_alibi(true)
        .with_learned_sinks(true)
        .with_rotary(Some(RotaryEmbeddingConfig::new(16)));
    let whole = module(attention, &device);
    let half = whole.clone().map(&mut ToBf16);
    let x = normal([BATCH, KEYS, D], &device);
    let (expected, expected_weights) = whole.forward_with_weights(MhaInput::self_attn(x.clone()));
    let (found, weights) = half.forward_with_weights(MhaInput::self_attn(x.cast(DType::BF16)));
    assert_eq!((found.context.dtype(), weights.dtype()), (DType::BF16, DType::BF16));
    for (found, expected) in [
        (found.context.cast(DType::F32).reshape([-1]), expected.context.reshape([-1])),
        (weights.cast(DType::F32).reshape([-1]), expected_weights.reshape([-1])),
    ] {
        let difference: f32 = (found - expected as Tensor<1>).abs().max().into_scalar();
        assert!(difference < 0.05, "off by {difference}");
    }
}
