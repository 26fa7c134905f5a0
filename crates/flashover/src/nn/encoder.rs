//! [`TransformerEncoder`]: pre-norm blocks over [`MultiHeadAttention`].

use burn::config::Config;
use burn::module::Module;
use burn::nn::transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig};
use burn::nn::{Dropout, DropoutConfig, Initializer, LayerNorm, LayerNormConfig};
use burn::tensor::{Bool, Device, Tensor, assert_shape};

use super::{AttentionConfig, KvCache, MhaInput, MultiHeadAttention, MultiHeadAttentionConfig};

/// Configuration of a [`TransformerEncoder`].
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use flashover::nn::{AttentionConfig, RotaryEmbeddingConfig, TransformerEncoderConfig, TransformerEncoderInput};
///
/// let device = Device::flex();
/// let rotary = RotaryEmbeddingConfig::new(1024);
/// let decoder = TransformerEncoderConfig::new(64, 256, 4, 2)
///     .with_attention(AttentionConfig::new().with_causal(true).with_rotary(Some(rotary)))
///     .init(&device);
///
/// // All at once, as in training…
/// let embedded = Tensor::<3>::random([1, 10, 64], Distribution::Default, &device);
/// let all = decoder.forward(TransformerEncoderInput::new(embedded.clone()));
///
/// // …or a prompt, then token after token.
/// let mut cache = decoder.new_autoregressive_cache();
/// let prompt = decoder.forward_autoregressive(embedded.clone().narrow(1, 0, 9), &mut cache);
/// let next = decoder.forward_autoregressive(embedded.narrow(1, 9, 1), &mut cache);
/// assert_eq!((prompt.dims(), next.dims()), ([1, 9, 64], [1, 1, 64]));
/// all.narrow(1, 9, 1).into_data().assert_approx_eq::<f32>(&next.into_data(), burn::tensor::Tolerance::default());
/// ```
#[derive(Config, Debug)]
pub struct TransformerEncoderConfig {
    /// Features of the input and of the output.
    pub d_model: usize,
    /// Features inside the feed-forward network.
    pub d_ff: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Blocks.
    pub n_layers: usize,
    /// Key and value heads, a divisor of `n_heads`; as many unless given.
    pub n_heads_kv: Option<usize>,
    /// Probability of dropping, in training: attention probabilities, features inside the feed-forward network, and
    /// what a sub-layer adds to the residual path.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// Adds 1 to the softmax's denominator.
    #[config(default = false)]
    pub quiet_softmax: bool,
    /// Whether a layer norm follows the last block.
    #[config(default = true)]
    pub final_norm: bool,
    /// How the parameters of linear layers are initialized.
    #[config(default = "Initializer::KaimingUniform { gain: 1.0 / f64::sqrt(3.0), fan_out_only: false }")]
    pub initializer: Initializer,
    /// Epsilon of the layer norms.
    #[config(default = 1e-5)]
    pub layer_norm_eps: f64,
    /// Masks by position, score functions, sinks, rotary embedding.
    #[config(default = "AttentionConfig::new()")]
    pub attention: AttentionConfig,
}

impl TransformerEncoderConfig {
    /// An encoder with fresh parameters.
    ///
    /// # Panics
    ///
    /// As [`MultiHeadAttentionConfig::init`].
    pub fn init(&self, device: &Device) -> TransformerEncoder {
        TransformerEncoder {
            layers: (0..self.n_layers).map(|_| self.init_layer(device)).collect(),
            norm: self.final_norm.then(|| self.init_norm(device)),
            d_model: self.d_model,
        }
    }

    fn init_layer(&self, device: &Device) -> TransformerEncoderLayer {
        let mha = MultiHeadAttentionConfig::new(self.d_model, self.n_heads)
            .with_n_heads_kv(self.n_heads_kv)
            .with_dropout(self.dropout)
            .with_quiet_softmax(self.quiet_softmax)
            .with_initializer(self.initializer.clone())
            .with_attention(self.attention.clone());
        let pwff = PositionWiseFeedForwardConfig::new(self.d_model, self.d_ff)
            .with_dropout(self.dropout)
            .with_initializer(self.initializer.clone());
        TransformerEncoderLayer {
            mha: mha.init(device),
            pwff: pwff.init(device),
            norm_1: self.init_norm(device),
            norm_2: self.init_norm(device),
            dropout: DropoutConfig::new(self.dropout).init(),
        }
    }

    fn init_norm(&self, device: &Device) -> LayerNorm {
        LayerNormConfig::new(self.d_model).with_epsilon(self.layer_norm_eps).init(device)
    }
}

/// Input of a [`TransformerEncoder`]. Masks follow Burn's convention: `true` hides.
#[derive(Debug, Clone)]
pub struct TransformerEncoderInput {
    tensor: Tensor<3>,
    mask_pad: Option<Tensor<2, Bool>>,
    mask_attn: Option<Tensor<3, Bool>>,
}

impl TransformerEncoderInput {
    /// Embedded positions, `[B, S, d_model]`.
    pub fn new(tensor: Tensor<3>) -> Self {
        TransformerEncoderInput { tensor, mask_pad: None, mask_attn: None }
    }

    /// Hides positions, `[B, S]`.
    pub fn mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// Hides positions from positions, `[B, S, S]`. Causal order needs no such mask: set it in [`AttentionConfig`].
    pub fn mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.mask_attn = Some(mask_attn);
        self
    }
}

/// A stack of pre-norm blocks; with a causal [`AttentionConfig`], a decoder-only language model's trunk.
///
/// Without `final_norm` it loads the records of burn-nn's encoder that was configured with `norm_first`.
#[derive(Module, Debug)]
pub struct TransformerEncoder {
    /// The blocks.
    pub layers: Vec<TransformerEncoderLayer>,
    /// The norm after the last block, if configured.
    pub norm: Option<LayerNorm>,
    /// Features of the input and of the output.
    pub d_model: usize,
}

impl TransformerEncoder {
    /// `[B, S, d_model]` to the same shape.
    ///
    /// # Panics
    ///
    /// If a shape does not fit.
    pub fn forward(&self, input: TransformerEncoderInput) -> Tensor<3> {
        let TransformerEncoderInput { tensor, mask_pad, mask_attn } = input;
        assert_shape!(tensor, [_, _, self.d_model]);
        let x = self.layers.iter().fold(tensor, |x, layer| layer.forward(x, mask_pad.clone(), mask_attn.clone()));
        self.finish(x)
    }

    /// The outputs of new positions `[B, n, d_model]`, which follow those in the cache: the rows that
    /// [`forward`](Self::forward) over all of them has. Adds them to the cache.
    ///
    /// # Panics
    ///
    /// If the encoder is not causal, the cache is another encoder's, or the shape does not fit.
    pub fn forward_autoregressive(
        &self,
        new: Tensor<3>,
        cache: &mut TransformerEncoderAutoregressiveCache,
    ) -> Tensor<3> {
        assert_shape!(new, [_, _, self.d_model]);
        let (layers, cached) = (self.layers.len(), cache.layers.len());
        assert_eq!(layers, cached, "forward_autoregressive: expected a cache of {layers} layers, got {cached}");
        let x =
            self.layers.iter().zip(&mut cache.layers).fold(new, |x, (layer, kv)| layer.forward_autoregressive(x, kv));
        self.finish(x)
    }

    /// A cache without positions.
    pub fn new_autoregressive_cache(&self) -> TransformerEncoderAutoregressiveCache {
        TransformerEncoderAutoregressiveCache { layers: vec![KvCache::new(); self.layers.len()] }
    }

    fn finish(&self, x: Tensor<3>) -> Tensor<3> {
        match &self.norm {
            Some(norm) => norm.forward(x),
            None => x,
        }
    }
}

/// One pre-norm block: `x + attention(norm(x))`, then `x + feed-forward(norm(x))`.
#[derive(Module, Debug)]
pub struct TransformerEncoderLayer {
    /// Self-attention.
    pub mha: MultiHeadAttention,
    /// Feed-forward network with GELU.
    pub pwff: PositionWiseFeedForward,
    /// Before the feed-forward network (the numbering is burn-nn's).
    pub norm_1: LayerNorm,
    /// Before the attention.
    pub norm_2: LayerNorm,
    /// Of what a sub-layer adds.
    pub dropout: Dropout,
}

impl TransformerEncoderLayer {
    /// `[B, S, d_model]` to the same shape, under the masks of [`TransformerEncoderInput`].
    ///
    /// # Panics
    ///
    /// If a shape does not fit.
    pub fn forward(
        &self,
        x: Tensor<3>,
        mask_pad: Option<Tensor<2, Bool>>,
        mask_attn: Option<Tensor<3, Bool>>,
    ) -> Tensor<3> {
        self.block(x, |x| {
            let mut input = MhaInput::self_attn(x);
            if let Some(mask_pad) = mask_pad {
                input = input.mask_pad(mask_pad);
            }
            if let Some(mask_attn) = mask_attn {
                input = input.mask_attn(mask_attn);
            }
            self.mha.forward(input).context
        })
    }

    /// The outputs of new positions; see [`TransformerEncoder::forward_autoregressive`].
    ///
    /// # Panics
    ///
    /// If the layer is not causal, or the shape does not fit.
    pub fn forward_autoregressive(&self, new: Tensor<3>, cache: &mut KvCache) -> Tensor<3> {
        self.block(new, |x| self.mha.forward_autoregressive(x, cache))
    }

    fn block(&self, x: Tensor<3>, attention: impl FnOnce(Tensor<3>) -> Tensor<3>) -> Tensor<3> {
        let x = x.clone() + self.dropout.forward(attention(self.norm_2.forward(x)));
        x.clone() + self.dropout.forward(self.pwff.forward(self.norm_1.forward(x)))
    }
}

/// Cache of [`TransformerEncoder::forward_autoregressive`]: keys and values of each layer.
#[derive(Debug, Clone)]
pub struct TransformerEncoderAutoregressiveCache {
    layers: Vec<KvCache>,
}

impl TransformerEncoderAutoregressiveCache {
    /// Positions held.
    pub fn len(&self) -> usize {
        self.layers.first().map_or(0, KvCache::len)
    }

    /// Whether it holds no position.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
