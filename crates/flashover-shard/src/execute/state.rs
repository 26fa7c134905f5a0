//! What a rank keeps between runs: its blocks of the weights, and its part of the keys and values.

use std::collections::HashMap;

use burn::tensor::{Device, Tensor};
use flashover::nn::{RotaryConvention, RotaryEmbedding, RotaryEmbeddingConfig};

use crate::architecture::Architecture;
use crate::error::ShardError;
use crate::spec::{Dim, Spec};
use crate::transport::bytes;

/// Base of the rotary frequencies.
pub(crate) const THETA: f64 = 10_000.0;

/// Keys or values of one block of the model.
#[derive(Debug, Clone)]
pub struct Cache {
    /// How it lies on the mesh, `BMKQ`.
    pub spec: Spec,
    /// This rank's part, f32 `[B, M, K, Q]`; fewer tokens than slots where the length is sharded.
    pub tensor: Tensor<4>,
    /// Of every block along `M`, not only this rank's, the positions of its tokens in order: a rule, and no data of
    /// another rank.
    pub positions: Vec<Vec<usize>>,
}

/// One rank's weights and caches, on its device.
#[derive(Debug)]
pub struct State {
    device: Device,
    weights: HashMap<(&'static str, usize), Tensor<4>>,
    caches: HashMap<(&'static str, usize), Cache>,
    rotary: Option<RotaryEmbedding>,
}

impl State {
    /// A rank without weights. Positions go up to `positions`.
    ///
    /// # Errors
    ///
    /// If positions rotate pairs of a head of odd size.
    pub fn new(model: &Architecture, positions: usize, device: &Device) -> Result<Self, ShardError> {
        if model.rotary && !model.head_dim.is_multiple_of(2) {
            return Err(ShardError::field("head_dim", "an even number with rotary positions", model.head_dim));
        }
        let rotary = model.rotary.then(|| rotary(model, positions, device));
        Ok(State { device: device.clone(), weights: HashMap::new(), caches: HashMap::new(), rotary })
    }

    /// The device that holds everything.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Puts a block of a weight, f32, its dimensions followed by ones. Weights outside of the blocks have layer 0.
    pub fn set_weight(&mut self, name: &'static str, layer: usize, tensor: Tensor<4>) {
        self.weights.insert((name, layer), tensor);
    }

    /// The rank's block of a weight.
    pub fn weight(&self, name: &'static str, layer: usize) -> Option<Tensor<4>> {
        self.weights.get(&(name, layer)).cloned()
    }

    /// The rank's part of the keys or values of a block of the model.
    pub fn cache(&self, name: &'static str, layer: usize) -> Option<&Cache> {
        self.caches.get(&(name, layer))
    }

    pub(super) fn set_cache(&mut self, name: &'static str, layer: usize, cache: Cache) {
        self.caches.insert((name, layer), cache);
    }

    /// Rotates `[B, L, H, Q]`, the first token at position `start`; a model without rotary positions changes nothing.
    pub(super) fn rotate(&self, x: Tensor<4>, start: usize) -> Tensor<4> {
        match &self.rotary {
            Some(rotary) => rotary.apply(x.swap_dims(1, 2), start).swap_dims(1, 2),
            None => x,
        }
    }

    /// Bytes of the weights.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.values().map(bytes).sum()
    }

    /// Bytes of the keys and values.
    pub fn cache_bytes(&self) -> u64 {
        self.caches.values().map(|cache| bytes(&cache.tensor)).sum()
    }

    /// The most tokens that the rank holds of a sequence.
    pub fn cached_tokens(&self) -> usize {
        self.caches.values().map(|cache| cache.tensor.dims()[1]).max().unwrap_or(0)
    }
}

/// The rotation of a model's heads, pairs `(i, i + Q/2)` as Hugging Face stores them.
pub(crate) fn rotary(model: &Architecture, positions: usize, device: &Device) -> RotaryEmbedding {
    RotaryEmbeddingConfig::new(positions)
        .with_theta(THETA)
        .with_convention(RotaryConvention::HalfRotated)
        .init(model.head_dim, device)
}

/// The positions of every block along `M` after `new` tokens more: in blocks if the tokens are sharded as the cache, one
/// after the other to the block that its position modulo their number names if only the cache is.
pub(super) fn grow(positions: &mut [Vec<usize>], past: usize, new: usize, spread: bool) {
    let blocks = positions.len();
    for l in 0..new {
        let block = if spread { (past + l) % blocks } else { l * blocks / new };
        positions[block].push(past + l);
    }
}

/// Whether tokens are dealt to the blocks of the cache one by one.
pub(super) fn is_spread(new: &Spec, cache: &Spec) -> bool {
    new.axes(Dim::L).is_empty() && !cache.axes(Dim::M).is_empty()
}
