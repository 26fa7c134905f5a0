//! [`CrossAttention`]: burn-nn's module of that name, fused.

use burn::config::Config;
use burn::module::Module;
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::{Bool, Device, Tensor, assert_shape};

use super::attention::Heads;
use super::multi_head::assert_groups;
use super::{Attention, AttentionConfig, CrossAttentionCache, merge, project};

/// Configuration of [`CrossAttention`]. Without `min_float`: see the [module page](super).
#[derive(Config, Debug)]
pub struct CrossAttentionConfig {
    /// Features of the queries and of the output.
    pub d_model: usize,
    /// Features of the context.
    pub d_context: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads, a divisor of `n_heads`.
    pub n_heads_kv: usize,
    /// Dimension of a head, 1 to 256.
    pub d_head: usize,
    /// Probability of dropping an attention probability in training.
    #[config(default = 0.1)]
    pub dropout: f64,
    /// Adds 1 to the softmax's denominator, so that a head may attend to nothing.
    #[config(default = false)]
    pub quiet_softmax: bool,
    /// Masks by position, score functions, sinks, rotary embedding. In all of them the last query stands at the last
    /// position of the context.
    #[config(default = "AttentionConfig::new()")]
    pub attention: AttentionConfig,
}

impl CrossAttentionConfig {
    /// A module with fresh parameters.
    ///
    /// # Panics
    ///
    /// If `n_heads` is not a multiple of `n_heads_kv`, or a setting of [`AttentionConfig`] is out of range.
    pub fn init(&self, device: &Device) -> CrossAttention {
        assert_groups(self.n_heads, self.n_heads_kv);
        let attention = self.attention.init(self.n_heads, self.d_head, self.dropout, self.quiet_softmax, device);
        let gain = 1.0 / (self.d_head as f64).sqrt();
        let linear = |d_input, d_output| {
            let initializer = Initializer::KaimingUniform { gain, fan_out_only: false };
            LinearConfig::new(d_input, d_output).with_initializer(initializer).init(device)
        };
        CrossAttention {
            query: linear(self.d_model, self.n_heads * self.d_head),
            key: linear(self.d_context, self.n_heads_kv * self.d_head),
            value: linear(self.d_context, self.n_heads_kv * self.d_head),
            output: linear(self.n_heads * self.d_head, self.d_model),
            attention,
            n_heads: self.n_heads,
            n_heads_kv: self.n_heads_kv,
            d_head: self.d_head,
        }
    }
}

/// Attention of queries to a context of other features. Loads the records of burn-nn's module of that name, and its own
/// load there.
#[derive(Module, Debug)]
pub struct CrossAttention {
    /// Projection of the queries, `d_model` to `n_heads · d_head`.
    pub query: Linear,
    /// Projection of the keys, `d_context` to `n_heads_kv · d_head`.
    pub key: Linear,
    /// Projection of the values, `d_context` to `n_heads_kv · d_head`.
    pub value: Linear,
    /// Projection of the heads' outputs, `n_heads · d_head` to `d_model`.
    pub output: Linear,
    /// What happens between the projections.
    pub attention: Attention,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_heads_kv: usize,
    /// Dimension of a head.
    pub d_head: usize,
}

impl CrossAttention {
    /// Attention of `query` `[B, Sq, d_model]` to `context` `[B, Skv, d_context]`: `[B, Sq, d_model]`. `mask`
    /// `[B, Skv]` hides where it is `true`.
    ///
    /// # Panics
    ///
    /// If a shape does not fit the module or the other inputs.
    pub fn forward(&self, query: Tensor<3>, context: Tensor<3>, mask: Option<Tensor<2, Bool>>) -> Tensor<3> {
        self.forward_cache(query, context, mask, &mut CrossAttentionCache::new())
    }

    /// [`forward`](Self::forward), and the attention weights `[B, n_heads, Sq, Skv]`; in training after dropout.
    ///
    /// The weights take O(Sq · Skv) memory, which `forward` never does, and one more pass over the keys for each 256 of
    /// them.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_with_weights(
        &self,
        query: Tensor<3>,
        context: Tensor<3>,
        mask: Option<Tensor<2, Bool>>,
    ) -> (Tensor<3>, Tensor<4>) {
        let heads = self.heads(query, context, mask, &mut CrossAttentionCache::new());
        let (o, weights) = self.attention.forward_with_weights(heads);
        (merge(o, &self.output), weights)
    }

    /// [`forward`](Self::forward) over a context that stays: its keys and values are computed in the first call, and
    /// the context of later calls is not read. Each call has its own queries.
    ///
    /// # Panics
    ///
    /// As [`forward`](Self::forward).
    pub fn forward_cache(
        &self,
        query: Tensor<3>,
        context: Tensor<3>,
        mask: Option<Tensor<2, Bool>>,
        cache: &mut CrossAttentionCache,
    ) -> Tensor<3> {
        merge(self.attention.forward(self.heads(query, context, mask, cache)), &self.output)
    }

    fn heads(
        &self,
        query: Tensor<3>,
        context: Tensor<3>,
        mask: Option<Tensor<2, Bool>>,
        cache: &mut CrossAttentionCache,
    ) -> Heads {
        let [batch, _, _] = query.dims();
        assert_shape!(context, [batch, _, _]);
        let (k, v) = cache.kv.get_or_insert(|| {
            let k = project(context.clone(), &self.key, self.n_heads_kv, self.d_head);
            (self.attention.keys(k, 0), project(context, &self.value, self.n_heads_kv, self.d_head))
        });
        let keys = k.dims()[2];
        let q = project(query, &self.query, self.n_heads, self.d_head);
        let mask = mask.and_then(|mask| {
            assert_shape!(mask, [batch, keys]);
            // Where there is nothing to hide, Burn's reshape would read a zero as "the size that was there".
            (batch * keys > 0).then(|| mask.unsqueeze_dims::<4>(&[1, 2]))
        });
        Heads { q: self.attention.queries(q, keys), k, v, mask, before: 0 }
    }
}
