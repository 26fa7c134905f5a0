//! Gradients and dropout.

use burn::module::{Module, ModuleVisitor, Param};
use burn::nn::attention as burn_nn;
use burn::tensor::{Device, Gradients, Tensor};
use flashover::nn::{
    AttentionConfig, CrossAttentionConfig, MhaInput, MultiHeadAttention, MultiHeadAttentionConfig,
    RotaryEmbeddingConfig, TransformerEncoderConfig, TransformerEncoderInput,
};

use super::{assert_close, floats, holes, normal, transfer};
use crate::devices;

const D: usize = 24;

fn training_device() -> Device {
    devices::flex().autodiff()
}

/// Asserts that every parameter of a module has a gradient that is finite and not zero.
struct EachHasAGradient<'a> {
    gradients: &'a Gradients,
    path: Vec<String>,
    seen: usize,
}

impl ModuleVisitor for EachHasAGradient<'_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let gradient = param.val().grad(self.gradients).unwrap_or_else(|| panic!("{path} has no gradient"));
        let size = gradient.abs().max().into_scalar::<f32>();
        assert!(size.is_finite() && size > 1e-6, "{path}: gradient {size}");
        self.seen += 1;
    }
}

/// The number of parameters of `module`, each of which has a gradient of `output`.
pub(super) fn parameters_with_gradients<M: Module>(module: &M, output: Tensor<3>) -> usize {
    let direction = normal(output.dims(), &output.device());
    let gradients = (output * direction).sum().backward();
    let mut visitor = EachHasAGradient { gradients: &gradients, path: Vec::new(), seen: 0 };
    module.visit(&mut visitor);
    visitor.seen
}

#[test]
fn gradients_reach_every_parameter() {
    let device = training_device();
    // Sinks and rotary make the keys' bias matter, which a plain softmax cancels.
    let attention = AttentionConfig::new()
        .with_causal(true)
        .with_softcap(Some(5.0))
        .with_learned_sinks(true)
        .with_rotary(Some(RotaryEmbeddingConfig::new(16)));
    let config = MultiHeadAttentionConfig::new(D, 4).with_n_heads_kv(Some(2)).with_attention(attention.clone());
    let mha = config.init(&device);
    let output = mha.forward(MhaInput::self_attn(normal([2, 11, D], &device))).context;
    assert_eq!(parameters_with_gradients(&mha, output), 9);

    let cross = CrossAttentionConfig::new(D, 20, 4, 2, 8).with_attention(attention).init(&device);
    let output = cross.forward(normal([2, 7, D], &device), normal([2, 11, 20], &device), None);
    assert_eq!(parameters_with_gradients(&cross, output), 9);
}

#[test]
fn gradients_are_burns() {
    let device = training_device();
    let burns = burn_nn::MultiHeadAttentionConfig::new(D, 4).with_dropout(0.0).init(&device);
    let ours = transfer(&burns, MultiHeadAttentionConfig::new(D, 4).with_dropout(0.0).init(&device));
    let x = normal([2, 11, D], &device);
    let direction = normal([2, 11, D], &device);
    let ours_out = ours.forward(MhaInput::self_attn(x.clone())).context;
    let burns_out = burns.forward(burn_nn::MhaInput::self_attn(x)).context;
    let our_gradients = (ours_out * direction.clone()).sum().backward();
    let burn_gradients = (burns_out * direction).sum().backward();
    for (name, ours, burns) in [
        ("query", &ours.query, &burns.query),
        ("key", &ours.key, &burns.key),
        ("value", &ours.value, &burns.value),
        ("output", &ours.output, &burns.output),
    ] {
        let found = ours.weight.val().grad(&our_gradients).unwrap();
        assert_close(name, found, burns.weight.val().grad(&burn_gradients).unwrap());
        let found = ours.bias.as_ref().unwrap().val().grad(&our_gradients).unwrap();
        assert_close(name, found, burns.bias.as_ref().unwrap().val().grad(&burn_gradients).unwrap());
    }
}

#[test]
fn the_gradient_of_the_weights_flows_too() {
    let device = training_device();
    let mha = MultiHeadAttentionConfig::new(D, 4).with_dropout(0.0).init(&device);
    let burns = transfer(&mha, burn_nn::MultiHeadAttentionConfig::new(D, 4).with_dropout(0.0).init(&device));
    let x = normal([1, 6, D], &device);
    let direction = normal([1, 4, 6, 6], &device);
    let (_, weights) = mha.forward_with_weights(MhaInput::self_attn(x.clone()));
    let ours = (weights * direction.clone()).sum().backward();
    let expected = (burns.forward(burn_nn::MhaInput::self_attn(x)).weights * direction).sum().backward();
    let gradient = burns.query.weight.val().grad(&expected).unwrap();
    assert_close("query", mha.query.weight.val().grad(&ours).unwrap(), gradient);
}

fn dropping(device: &Device) -> MultiHeadAttention {
    MultiHeadAttentionConfig::new(D, 4).with_dropout(0.25).init(device)
}

#[test]
fn dropout_keeps_its_share_and_scales_the_rest() {
    let device = training_device();
    let mha = dropping(&device);
    let input = MhaInput::self_attn(normal([4, 50, D], &device));
    let (_, dropped) = mha.forward_with_weights(input.clone());
    let (_, whole) = mha.clone().freeze().forward_with_weights(input);
    let dropped = floats(dropped);
    let whole = floats(whole);
    let mut zeros = 0;
    for (&dropped, whole) in dropped.iter().zip(whole) {
        match dropped {
            0.0 => zeros += 1,
            _ => assert!((dropped - whole / 0.75).abs() < 1e-5, "{dropped} of {whole}"),
        }
    }
    // Four standard deviations of 40,000 draws.
    let share = f64::from(zeros) / dropped.len() as f64;
    assert_eq!(dropped.len(), 40_000);
    assert!((share - 0.25).abs() < 4.0 * (0.25f64 * 0.75 / 40_000.0).sqrt(), "{share}");
}

#[test]
fn dropout_is_new_in_each_call_and_one_within_a_call() {
    let device = training_device();
    let mha = dropping(&device);
    let x = normal([2, 11, D], &device);
    let input = || MhaInput::self_attn(x.clone());
    let calls: Vec<_> = (0..3).map(|_| floats(mha.forward(input()).context)).collect();
    assert_ne!(calls[0], calls[1]);
    assert_ne!(calls[1], calls[2]);
    // A clone goes on where the module is.
    assert_ne!(floats(mha.clone().forward(input()).context), floats(mha.forward(input()).context));

    // The weights that are returned are those that made the output.
    let (output, weights) = mha.forward_with_weights(input());
    let v = mha.value.forward(x.clone()).reshape([2, 11, 4, 6]).swap_dims(1, 2);
    let o = weights.matmul(v).swap_dims(1, 2).reshape([2, 11, D]);
    assert_close("context", output.context, mha.output.forward(o));
}

#[test]
fn inference_and_frozen_modules_do_not_drop() {
    let device = training_device();
    let mha = dropping(&device);
    let plain = transfer(&mha, MultiHeadAttentionConfig::new(D, 4).with_dropout(0.0).init(&device));
    let x = normal([2, 11, D], &device);
    let expected = plain.forward(MhaInput::self_attn(x.clone())).context.inner();

    let frozen = mha.clone().freeze();
    assert_close("frozen", frozen.forward(MhaInput::self_attn(x.clone())).context.inner(), expected.clone());
    let valid = mha.valid();
    let input = || MhaInput::self_attn(x.clone().inner());
    assert_close("valid", valid.forward(input()).context, expected.clone());
    // And back to training, where it drops again.
    let training = valid.train().forward(MhaInput::self_attn(x)).context.inner();
    assert!((training - expected).abs().max().into_scalar::<f32>() > 1e-3);
}

/// Everything that a device makes itself (tables, slopes, sinks, seeds, masks) is right on a GPU as well.
#[test]
fn a_gpu_gives_what_flex_gives() {
    let Some(gpu) = devices::gpu() else {
        return devices::skip("nn::a_gpu_gives_what_flex_gives", "no GPU backend in this build");
    };
    let attention = AttentionConfig::new()
        .with_causal(true)
        .with_alibi(true)
        .with_learned_sinks(true)
        .with_rotary(Some(RotaryEmbeddingConfig::new(300)));
    let config = TransformerEncoderConfig::new(D, 40, 4, 2).with_n_heads_kv(Some(2)).with_attention(attention);
    let flex = config.clone().with_dropout(0.0).init(&devices::flex());
    let x = normal([2, 11, D], &devices::flex());
    let mask = || holes(2, 11, 11, &devices::flex());
    let expected = flex.forward(TransformerEncoderInput::new(x.clone()).mask_attn(mask()));

    let model = transfer(&flex, config.with_dropout(0.3).init(&gpu));
    let input = || TransformerEncoderInput::new(Tensor::from_data(x.to_data(), &gpu));
    let mask = Tensor::from_data(mask().into_data(), &gpu);
    let found = model.forward(input().mask_attn(mask)).into_data();
    assert_close("inference", Tensor::from_data(found, &devices::flex()), expected);

    let training = gpu.autodiff();
    let model = model.train();
    let input = || TransformerEncoderInput::new(Tensor::from_data(x.to_data(), &training));
    let output = model.forward(input());
    assert_ne!(floats(output.clone()), floats(model.forward(input())));
    assert_eq!(parameters_with_gradients(&model, output), 2 * 17 + 2);
}
