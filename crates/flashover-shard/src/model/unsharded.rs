//! The same model on one device, without programs: what every layout must give.

use burn::tensor::{Device, Tensor};
use flashover::nn::RotaryEmbedding;
use flashover::{AttentionOptions, attention};

use super::weights::{INNER, OUTER, block, size};
use crate::architecture::{Architecture, Block, Mlp};
use crate::error::ShardError;
use crate::execute::{check_vocabulary, embed, nonlinearity, normalize, rotary};
use crate::spec::{Dim, Sizes};

/// A transformer whose weights lie whole on one device, f32. It keeps no cache: every call goes through all tokens.
#[derive(Debug)]
pub struct Unsharded {
    model: Architecture,
    seed: u64,
    device: Device,
}

impl Unsharded {
    /// A model with the random weights of a seed: those of [`ShardedModel`](super::ShardedModel) with the same one.
    ///
    /// # Errors
    ///
    /// If the model is not sound.
    pub fn new(model: Architecture, seed: u64, device: &Device) -> Result<Self, ShardError> {
        model.validate()?;
        Ok(Unsharded { model, seed, device: device.clone() })
    }

    /// A weight `[rows, columns]`, the first `leading` of its dimensions being rows.
    fn matrix(&self, name: &str, layer: usize, leading: usize) -> Tensor<2> {
        let (_, dims) = OUTER.iter().chain(&INNER).find(|(known, _)| *known == name).expect("a known weight");
        let shape: Vec<_> = dims.iter().map(|&dim| size(&self.model, dim)).collect();
        let sizes = Sizes::ones().with(Dim::H, self.model.heads);
        let whole =
            block((&self.model, self.seed, &self.device), (name, layer), dims, &sizes, &vec![0; dims.len()], &shape);
        let rows = shape[..leading].iter().product::<usize>();
        whole.reshape([rows, shape.iter().product::<usize>() / rows])
    }

    fn norm(&self, name: &str, layer: usize, x: &Tensor<3>) -> Tensor<3> {
        let scale = self.matrix(name, layer, 1).reshape([1, 1, self.model.model_dim]);
        let x: Tensor<4> = x.clone().unsqueeze_dim(3);
        let sums = vec![(x.clone() * x.clone()).sum_dim(2), x.clone().sum_dim(2)];
        let normed: Tensor<3> =
            normalize(self.model.norm, x, Tensor::cat(sums, 2), self.model.model_dim).squeeze_dim(3);
        normed * scale
    }

    /// Logits of every token, f32 `[B, L, V]`.
    ///
    /// # Errors
    ///
    /// If sequences differ in length or are empty, a token is beyond the vocabulary, or attention is refused.
    pub fn logits(&self, tokens: &[Vec<u32>]) -> Result<Tensor<3>, ShardError> {
        let model = &self.model;
        let length = tokens.first().map_or(0, Vec::len);
        if length == 0 || tokens.iter().any(|sequence| sequence.len() != length) {
            let lengths: Vec<_> = tokens.iter().map(Vec::len).collect();
            return Err(ShardError::field("tokens", "sequences of one positive length", format!("{lengths:?}")));
        }
        check_vocabulary(model, tokens)?;
        let shape = [tokens.len(), length, model.model_dim];
        let rotary = model.rotary.then(|| rotary(model, length, &self.device));
        let table = self.matrix("embedding", 0, 1);
        let mut x = embed(table.clone(), 0, tokens.iter().flatten()).reshape(shape);
        for layer in 0..model.layers {
            let normed = self.norm("norm.scale", layer, &x);
            let middle = x + self.attend(layer, normed.clone(), rotary.as_ref())?;
            let input = match model.block {
                Block::Parallel => normed,
                Block::Serial => self.norm("mlp.norm.scale", layer, &middle),
            };
            x = middle + self.mlp(layer, input);
        }
        let table = if model.tied_embeddings { table } else { self.matrix("unembedding", 0, 1) };
        Ok(self.norm("head.norm.scale", 0, &x).matmul(table.transpose().unsqueeze()))
    }

    fn attend(&self, layer: usize, x: Tensor<3>, rotary: Option<&RotaryEmbedding>) -> Result<Tensor<3>, ShardError> {
        let Architecture { heads, kv_heads, head_dim, model_dim, .. } = self.model;
        let [batch, length, _] = x.dims();
        let project = |name: &str, heads: usize| {
            let made = x.clone().matmul(self.matrix(name, layer, 1).unsqueeze());
            made.reshape([batch, length, heads, head_dim]).swap_dims(1, 2)
        };
        let turn = |x: Tensor<4>| rotary.map_or(x.clone(), |rotary| rotary.forward(x));
        let (q, k) = (turn(project("q.weight", heads)), turn(project("k.weight", kv_heads)));
        let v = project("v.weight", kv_heads);
        let o = attention(q, k, v, &AttentionOptions::new().causal())
            .map_err(|error| ShardError::Attention { rank: 0, error })?;
        let o = o.swap_dims(1, 2).reshape([batch, length, heads * head_dim]);
        Ok(o.matmul(self.matrix("o.weight", layer, 2).unsqueeze()).reshape([batch, length, model_dim]))
    }

    fn mlp(&self, layer: usize, x: Tensor<3>) -> Tensor<3> {
        let project = |name: &str| x.clone().matmul(self.matrix(name, layer, 1).unsqueeze());
        let hidden = match self.model.mlp {
            Mlp::TwoMatrix(f) => nonlinearity(f, project("up.weight")),
            Mlp::Gated(f) => nonlinearity(f, project("gate.weight")) * project("up.weight"),
        };
        hidden.matmul(self.matrix("down.weight", layer, 1).unsqueeze())
    }
}
