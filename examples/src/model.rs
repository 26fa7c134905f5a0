//! A small causal language model over bytes.

use burn::config::Config;
use burn::module::{Initializer, Module};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{Embedding, EmbeddingConfig};
use burn::tensor::{Device, Int, Tensor};
use burn::train::{InferenceStep, TrainOutput, TrainStep};
use flashover::AttentionOptions;
use flashover::nn::{
    AttentionConfig, TransformerEncoder, TransformerEncoderAutoregressiveCache, TransformerEncoderConfig,
    TransformerEncoderInput,
};

use crate::Result;
use crate::data::Batch;
use crate::metric::StepOutput;

/// Values of a byte.
const BYTES: usize = 256;

/// The shape of a [`ByteModel`].
#[derive(Config, Debug, PartialEq)]
pub struct ModelConfig {
    /// Width of the residual stream.
    pub d_model: usize,
    /// Features inside the feed-forward networks.
    pub d_ff: usize,
    /// Attention heads of a block; a divisor of `d_model`.
    pub heads: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Bytes of a training window.
    pub context: usize,
    /// Positions by ALiBi; without it the model knows only what came before, and in no order but by causality.
    #[config(default = true)]
    pub alibi: bool,
}

/// Byte embedding, pre-norm transformer blocks, final norm, and a head tied to the embedding.
#[derive(Module, Debug)]
pub struct ByteModel {
    embedding: Embedding,
    trunk: TransformerEncoder,
}

/// What [`ByteModel::forward_next`] remembers of the bytes so far.
pub type Memory = TransformerEncoderAutoregressiveCache;

impl ModelConfig {
    /// A model with random weights.
    pub fn init(&self, device: &Device) -> ByteModel {
        // Shared by embedding and head: of this size the logits start at about 1, and so does what `embed` gives.
        let normal = Initializer::Normal { mean: 0.0, std: (self.d_model as f64).powf(-0.5) };
        let attention = AttentionConfig::new().with_causal(true).with_alibi(self.alibi);
        ByteModel {
            embedding: EmbeddingConfig::new(BYTES, self.d_model).with_initializer(normal).init(device),
            trunk: TransformerEncoderConfig::new(self.d_model, self.d_ff, self.heads, self.layers)
                .with_dropout(0.0)
                .with_attention(attention)
                .init(device),
        }
    }
}

impl ByteModel {
    /// Logits of the next byte, `[B, S, 256]`, of bytes `[B, S]`.
    pub fn forward(&self, bytes: Tensor<2, Int>) -> Tensor<3> {
        let x = TransformerEncoderInput::new(self.embed(bytes));
        self.head(self.trunk.forward(x))
    }

    /// [`forward`](Self::forward) with attention by `attend`, which is given the queries, keys and values
    /// `[B, heads, S, d_model / heads]` of one block after the other and the model's options.
    pub fn forward_by(
        &self,
        bytes: Tensor<2, Int>,
        mut attend: impl FnMut([Tensor<4>; 3], AttentionOptions) -> Result<Tensor<4>>,
    ) -> Result<Tensor<3>> {
        let mut x = self.embed(bytes);
        let [batch, length, width] = x.dims();
        for layer in &self.trunk.layers {
            let (mha, normed) = (&layer.mha, layer.norm_2.forward(x.clone()));
            let heads = [&mha.query, &mha.key, &mha.value].map(|linear| {
                linear.forward(normed.clone()).reshape([batch, length, mha.n_heads, mha.d_k]).swap_dims(1, 2)
            });
            let mut options = AttentionOptions::new().causal();
            if let Some(slopes) = &mha.attention.alibi_slopes {
                options = options.alibi_slopes(slopes.clone());
            }
            let o = attend(heads, options)?.swap_dims(1, 2).reshape([batch, length, width]);
            x = x + mha.output.forward(o);
            x = x.clone() + layer.pwff.forward(layer.norm_1.forward(x));
        }
        if let Some(norm) = &self.trunk.norm {
            x = norm.forward(x);
        }
        Ok(self.head(x))
    }

    /// [`forward`](Self::forward) of bytes that follow those in `memory`, which then holds them too.
    pub fn forward_next(&self, bytes: Tensor<2, Int>, memory: &mut Memory) -> Tensor<3> {
        self.head(self.trunk.forward_autoregressive(self.embed(bytes), memory))
    }

    /// A memory of no bytes.
    pub fn new_memory(&self) -> Memory {
        self.trunk.new_autoregressive_cache()
    }

    fn embed(&self, bytes: Tensor<2, Int>) -> Tensor<3> {
        self.embedding.forward(bytes) * (self.trunk.d_model as f64).sqrt()
    }

    fn head(&self, x: Tensor<3>) -> Tensor<3> {
        x.matmul(self.embedding.weight.val().transpose().unsqueeze())
    }

    fn loss(&self, batch: Batch) -> StepOutput {
        let [b, s] = batch.inputs.dims();
        let logits = self.forward(batch.inputs).reshape([b * s, BYTES]);
        let loss = CrossEntropyLossConfig::new().init(&logits.device());
        StepOutput { loss: loss.forward(logits, batch.targets.reshape([b * s])), bytes: b * s }
    }
}

impl TrainStep for ByteModel {
    type Input = Batch;
    type Output = StepOutput;

    fn step(&self, batch: Batch) -> TrainOutput<StepOutput> {
        let output = self.loss(batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for ByteModel {
    type Input = Batch;
    type Output = StepOutput;

    fn step(&self, batch: Batch) -> StepOutput {
        self.loss(batch)
    }
}
