//! [`MultiHeadAttention`]: burn-nn's module of that name, fused.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::{Bool, Device, Tensor, assert_shape};

use super::attention::{Heads, assert_head_dim};
use super::{Attention, AttentionConfig, KvCache, MhaCache, merge, project};

/// Configuration of [`MultiHeadAttention`]. Without `min_float`: see the [module page](super).
#[derive(Config, Debug)]
pub struct MultiHeadAttentionConfig {
    /// Features of the inputs and of the output.
    pub d_model: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads, a divisor of `n_heads`; as many unless given.
    pub n_heads_kv: Option<usize>,
    /// Dimension of a head's queries and keys, 1 to 256; `d_model / n_heads` unless given.
    pub d_k: Option<usize>,
    /// Dimension of a head's values, 1 to 256; that of its keys unless given.
    pub d_v: Option<usize>,
    /// Probability of dropping an attention probability in training.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// Adds 1 to the softmax's denominator, so that a head may attend to nothing
    /// (<https://www.evanmiller.org/attention-is-off-by-one.html>).
    #[config(default = false)]
    pub quiet_softmax: bool,
    /// How parameters are initialized.
    #[config(default = "Initializer::KaimingUniform { gain: 1.0 / f64::sqrt(3.0), fan_out_only: false }")]
    pub initializer: Initializer,
    /// Whether the projection of the queries has a bias.
    #[config(default = true)]
    pub query_bias: bool,
    /// Whether the projection of the keys has a bias.
    #[config(default = true)]
    pub key_bias: bool,
    /// Whether the projection of the values has a bias.
    #[config(default = true)]
    pub value_bias: bool,
    /// Whether the output's projection has a bias.
    #[config(default = true)]
    pub output_bias: bool,
    /// Masks by position, score functions, sinks, rotary embedding.
    #[config(default = "AttentionConfig::new()")]
    pub attention: AttentionConfig,
}

impl MultiHeadAttentionConfig {
    /// A module with fresh parameters.
    ///
    /// # Panics
    ///
    /// If `d_model` is not a multiple of `n_heads` (and `d_k` is not given), `n_heads` is not one of `n_heads_kv`, or a
    /// setting of [`AttentionConfig`] is out of range.
    pub fn init(&self, device: &Device) -> MultiHeadAttention {
        let (d_model, n_heads) = (self.d_model, self.n_heads);
        let n_heads_kv = self.n_heads_kv.unwrap_or(n_heads);
        assert_groups(n_heads, n_heads_kv);
        let d_k = self.d_k.unwrap_or_else(|| {
            assert!(
                d_model.is_multiple_of(n_heads),
                "multi-head attention: expected d_model to be a multiple of n_heads ({n_heads}), got {d_model}"
            );
            d_model / n_heads
        });
        let d_v = self.d_v.unwrap_or(d_k);
        assert_head_dim(d_v);
        let linear = |d_input, d_output, bias| {
            let config = LinearConfig::new(d_input, d_output).with_bias(bias);
            config.with_initializer(self.initializer.clone()).init(device)
        };
        MultiHeadAttention {
            query: linear(d_model, n_heads * d_k, self.query_bias),
            key: linear(d_model, n_heads_kv * d_k, self.key_bias),
            value: linear(d_model, n_heads_kv * d_v, self.value_bias),
            output: linear(n_heads * d_v, d_model, self.output_bias),
            attention: self.attention.init(n_heads, d_k, self.dropout, self.quiet_softmax, device),
            d_model,
            n_heads,
            n_heads_kv,
            d_k,
            d_v,
        }
    }
}

/// Panics unless query heads divide among key heads.
pub(super) fn assert_groups(n_heads: usize, n_heads_kv: usize) {
    assert!(
        n_heads > 0 && n_heads_kv > 0 && n_heads.is_multiple_of(n_heads_kv),
        "attention: expected n_heads to be a multiple of n_heads_kv ({n_heads_kv}), both at least 1, got {n_heads}"
    );
}

/// Multi-head attention (Vaswani et al., arXiv 1706.03762): projections to heads, [`attention`](crate::attention), and
/// a projection back. Loads the records of burn-nn's module of that name, and its own load there.
#[derive(Module, Debug)]
pub struct MultiHeadAttention {
    /// Projection of the queries, `d_model` to `n_heads · d_k`.
    pub query: Linear,
    /// Projection of the keys, `d_model` to `n_heads_kv · d_k`.
    pub key: Linear,
    /// Projection of the values, `d_model` to `n_heads_kv · d_v`.
    pub value: Linear,
    /// Projection of the heads' outputs, `n_heads · d_v` to `d_model`.
    pub output: Linear,
    /// What happens between the projections.
    pub attention: Attention,
    /// Features of the inputs and of the output.
    pub d_model: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_heads_kv: usize,
    /// Dimension of a head's queries and keys.
    pub d_k: usize,
    /// Dimension of a head's values.
    pub d_v: usize,
}

/// Input of [`MultiHeadAttention`]. Masks follow Burn's convention: `true` hides.
#[derive(Debug, Clone)]
pub struct MhaInput {
    query: Tensor<3>,
    key: Tensor<3>,
    value: Tensor<3>,
    mask_pad: Option<Tensor<2, Bool>>,
    mask_attn: Option<Tensor<3, Bool>>,
}

impl MhaInput {
    /// Self-attention of `[B, S, d_model]`.
    pub fn self_attn(tensor: Tensor<3>) -> Self {
        Self::new(tensor.clone(), tensor.clone(), tensor)
    }

    /// Attention of `query` `[B, Sq, d_model]` to `key` and `value`, both `[B, Skv, d_model]`.
    pub fn new(query: Tensor<3>, key: Tensor<3>, value: Tensor<3>) -> Self {
        MhaInput { query, key, value, mask_pad: None, mask_attn: None }
    }

    /// Hides keys, `[B, Skv]`.
    pub fn mask_pad(mut self, mask_pad: Tensor<2, Bool>) -> Self {
        self.mask_pad = Some(mask_pad);
        self
    }

    /// Hides keys from queries, `[B, Sq, Skv]`.
    pub fn mask_attn(mut self, mask_attn: Tensor<3, Bool>) -> Self {
        self.mask_attn = Some(mask_attn);
        self
    }

    /// One mask of both for the queries from `first` on, `[B, 1, Sq − first or 1, Skv]`.
    fn mask(&self, first: usize, keys: usize) -> Option<Tensor<4, Bool>> {
        let [batch, queries, _] = self.query.dims();
        if let Some(mask_pad) = &self.mask_pad {
            assert_shape!(mask_pad, [batch, keys]);
        }
        if let Some(mask_attn) = &self.mask_attn {
            assert_shape!(mask_attn, [batch, queries, keys]);
        }
        if batch * queries * keys == 0 {
            // Nothing to hide, and Burn's reshape reads a zero as "the size that was there".
            return None;
        }
        let pad = self.mask_pad.clone().map(|mask| mask.unsqueeze_dims::<4>(&[1, 2]));
        let attn = self.mask_attn.clone().map(|mask| mask.slice_dim(1, first..queries).unsqueeze_dim::<4>(1));
        match (pad, attn) {
            (Some(pad), Some(attn)) => Some(pad.expand(attn.dims()).bool_or(attn)),
            (pad, attn) => pad.or(attn),
        }
    }
}

/// Output of [`MultiHeadAttention`]. The weights come from
/// [`forward_with_weights`](MultiHeadAttention::forward_with_weights) only.
#[derive(Debug, Clone)]
pub struct MhaOutput {
    /// `[B, Sq, d_model]`
    pub context: Tensor<3>,
}

impl MultiHeadAttention {
    /// Attention of the queries to the keys and values.
    ///
    /// # Panics
    ///
    /// If a shape does not fit the module or the other inputs.
    pub fn forward(&self, input: MhaInput) -> MhaOutput {
        MhaOutput { context: merge(self.attention.forward(self.heads(input)), &self.output) }
    }

    /// [`forward`](Self::forward), and the attention weights `[B, n_heads, Sq, Skv]`; in training after dropout, like
    /// burn-nn's.
    ///
    /// The weights take O(Sq · Skv) memory, which `forward` never does, and one more pass over the keys for each 256 of
    /// them: for inspection, not for training at length.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_with_weights(&self, input: MhaInput) -> (MhaOutput, Tensor<4>) {
        let (o, weights) = self.attention.forward_with_weights(self.heads(input));
        (MhaOutput { context: merge(o, &self.output) }, weights)
    }

    /// [`forward`](Self::forward) for a decoder that passes all positions so far in each call, with burn-nn's shapes:
    /// inputs and output (and masks) cover all of them.
    ///
    /// Only what the cache does not hold is computed: projections of new positions, and attention of the new queries to
    /// all keys. Outputs of earlier positions are those of the call that brought them. A new row is therefore the same
    /// row of [`forward`](Self::forward) with the same input; and all rows are, if no query sees a later key (causal, or
    /// by `mask_attn`). burn-nn takes one new position a call; here any number is right.
    ///
    /// Over a cache made by [`MhaCache::autoregressive_cross_attention`], keys and values after the first call are not
    /// read; masks cover the first call's keys.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward); and if there is no new query, or there are fewer keys than in the cache.
    pub fn forward_cache(&self, input: MhaInput, cache: &mut MhaCache) -> MhaOutput {
        self.check(&input);
        let seen = cache.outputs();
        let queries = input.query.dims()[1];
        assert!(
            queries > seen,
            "forward_cache: expected all positions so far, more than the {seen} in the cache, got {queries}"
        );
        let (k, v) = match cache.fixed {
            true => cache.kv.get_or_insert(|| self.keys_values(input.key.clone(), input.value.clone(), 0)),
            false => {
                let (known, keys) = (cache.kv.len(), input.key.dims()[1]);
                assert!(keys >= known, "forward_cache: expected at least the {known} keys in the cache, got {keys}");
                let new = |x: &Tensor<3>| x.clone().slice_dim(1, known..keys);
                let (k, v) = self.keys_values(new(&input.key), new(&input.value), known);
                cache.kv.append(k, v)
            }
        };
        let keys = k.dims()[2];
        let mask = input.mask(seen, keys);
        let q = self.queries(input.query.slice_dim(1, seen..queries), keys);
        let new = merge(self.attention.forward(Heads { q, k, v, mask, before: seen }), &self.output);
        MhaOutput { context: cache.append_output(new) }
    }

    /// Self-attention of new positions `[B, n, d_model]` to those in the cache and themselves, as the rows of
    /// [`forward`](Self::forward) over all of them; adds them to the cache.
    ///
    /// # Panics
    ///
    /// If the module is not causal, or the shape does not fit.
    pub fn forward_autoregressive(&self, new: Tensor<3>, cache: &mut KvCache) -> Tensor<3> {
        assert!(self.attention.is_causal(), "forward_autoregressive: expected a causal module, got one that is not");
        assert_shape!(new, [_, _, self.d_model]);
        let before = cache.len();
        let (k, v) = self.keys_values(new.clone(), new.clone(), before);
        let (k, v) = cache.append(k, v);
        let q = self.queries(new, k.dims()[2]);
        merge(self.attention.forward(Heads { q, k, v, mask: None, before }), &self.output)
    }

    fn check(&self, input: &MhaInput) {
        let MhaInput { query, key, value, .. } = input;
        let ([batch, _, _], [_, keys, _]) = (query.dims(), key.dims());
        assert_shape!(query, [_, _, self.d_model]);
        assert_shape!(key, [batch, _, self.d_model]);
        assert_shape!(value, [batch, keys, self.d_model]);
    }

    fn heads(&self, input: MhaInput) -> Heads {
        self.check(&input);
        let keys = input.key.dims()[1];
        let mask = input.mask(0, keys);
        let q = self.queries(input.query, keys);
        let (k, v) = self.keys_values(input.key, input.value, 0);
        Heads { q, k, v, mask, before: 0 }
    }

    fn queries(&self, query: Tensor<3>, keys: usize) -> Tensor<4> {
        self.attention.queries(project(query, &self.query, self.n_heads, self.d_k), keys)
    }

    fn keys_values(&self, key: Tensor<3>, value: Tensor<3>, start: usize) -> (Tensor<4>, Tensor<4>) {
        let k = project(key, &self.key, self.n_heads_kv, self.d_k);
        (self.attention.keys(k, start), project(value, &self.value, self.n_heads_kv, self.d_v))
    }
}
