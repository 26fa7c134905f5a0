//! What the modules keep between calls of an autoregressive decoder.

use burn::tensor::Tensor;

/// Keys `[B, Hkv, S, Dk]` (rotated already, if the module rotates) and values `[B, Hkv, S, Dv]` of the positions so far.
#[derive(Debug, Clone, Default)]
pub struct KvCache(Option<(Tensor<4>, Tensor<4>)>);

impl KvCache {
    /// Without positions.
    pub fn new() -> Self {
        Self::default()
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.0.as_ref().map_or(0, |(k, _)| k.dims()[2])
    }

    /// Whether it holds no position.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds positions and gives all of them.
    pub(super) fn append(&mut self, k: Tensor<4>, v: Tensor<4>) -> (Tensor<4>, Tensor<4>) {
        let grown = match self.0.take() {
            None => (k, v),
            Some((old_k, old_v)) => (Tensor::cat(vec![old_k, k], 2), Tensor::cat(vec![old_v, v], 2)),
        };
        self.0.insert(grown).clone()
    }

    /// What it holds, or else what `make` makes, which it then holds.
    pub(super) fn get_or_insert(&mut self, make: impl FnOnce() -> (Tensor<4>, Tensor<4>)) -> (Tensor<4>, Tensor<4>) {
        self.0.get_or_insert_with(make).clone()
    }
}

/// Cache of [`MultiHeadAttention::forward_cache`](super::MultiHeadAttention::forward_cache).
#[derive(Debug, Clone)]
pub struct MhaCache {
    pub(super) kv: KvCache,
    /// Outputs of the positions so far, `[B, S, d_model]`.
    pub(super) output: Option<Tensor<3>>,
    /// Whether the keys and values of the first call stay.
    pub(super) fixed: bool,
}

impl MhaCache {
    /// For autoregressive inference: keys and values grow with each call.
    pub fn autoregressive() -> Self {
        MhaCache { kv: KvCache::new(), output: None, fixed: false }
    }

    /// For autoregressive inference over a fixed memory: keys and values are those of the first call.
    pub fn autoregressive_cross_attention() -> Self {
        MhaCache { fixed: true, ..Self::autoregressive() }
    }

    /// Positions whose outputs it holds.
    pub(super) fn outputs(&self) -> usize {
        self.output.as_ref().map_or(0, |output| output.dims()[1])
    }

    /// Adds outputs and gives all of them.
    pub(super) fn append_output(&mut self, output: Tensor<3>) -> Tensor<3> {
        let grown = match self.output.take() {
            None => output,
            Some(old) => Tensor::cat(vec![old, output], 1),
        };
        self.output.insert(grown).clone()
    }
}

/// Cache of [`CrossAttention::forward_cache`](super::CrossAttention::forward_cache): the keys and values of the first
/// call's context.
#[derive(Debug, Clone, Default)]
pub struct CrossAttentionCache {
    pub(super) kv: KvCache,
}

impl CrossAttentionCache {
    /// Without a context.
    pub fn new() -> Self {
        Self::default()
    }
}
