//! Random weights as a function of their name and place, so that a rank makes its block without seeing another's.

use burn::tensor::{DType, Device, Tensor, TensorData};

use crate::architecture::Architecture;
use crate::execute::padded;
use crate::spec::{Dim, Sizes};

/// Names and dimensions of the weights outside of the blocks.
pub(super) const OUTER: [(&str, &[Dim]); 3] =
    [("embedding", &[Dim::V, Dim::E]), ("unembedding", &[Dim::V, Dim::E]), ("head.norm.scale", &[Dim::E])];

/// Names and dimensions of the weights of a block.
pub(super) const INNER: [(&str, &[Dim]); 9] = [
    ("norm.scale", &[Dim::E]),
    ("mlp.norm.scale", &[Dim::E]),
    ("q.weight", &[Dim::E, Dim::H, Dim::Q]),
    ("k.weight", &[Dim::E, Dim::K, Dim::Q]),
    ("v.weight", &[Dim::E, Dim::K, Dim::Q]),
    ("o.weight", &[Dim::H, Dim::Q, Dim::E]),
    ("gate.weight", &[Dim::E, Dim::F]),
    ("up.weight", &[Dim::E, Dim::F]),
    ("down.weight", &[Dim::F, Dim::E]),
];

/// The size of a dimension of a weight, without padding.
pub(super) fn size(model: &Architecture, dim: Dim) -> usize {
    match dim {
        Dim::V => model.vocabulary,
        Dim::E => model.model_dim,
        Dim::F => model.ff_dim,
        Dim::H => model.heads,
        Dim::K => model.kv_heads,
        Dim::Q => model.head_dim,
        Dim::B | Dim::L | Dim::M | Dim::T | Dim::S => unreachable!("no dimension of a weight"),
    }
}

/// An element of a weight: uniform with a variance of one over what a product sums over, scales of norms around 1.
/// `index` is without padding; weights outside of the blocks have layer 0.
pub fn weight(model: &Architecture, seed: u64, name: &str, layer: usize, index: &[usize]) -> f32 {
    let dims = OUTER.iter().chain(&INNER).find(|(known, _)| *known == name).map_or(&[][..], |(_, dims)| dims);
    let stream = Stream::new(model, seed, name, layer);
    stream.at(index.iter().zip(dims).fold(0, |flat, (&i, &dim)| flat * size(model, dim) + i))
}

/// The elements of one weight by their flat index.
struct Stream {
    state: u64,
    center: f32,
    range: f32,
}

impl Stream {
    fn new(model: &Architecture, seed: u64, name: &str, layer: usize) -> Self {
        let summed = match name {
            "o.weight" => model.heads * model.head_dim,
            "down.weight" => model.ff_dim,
            _ => model.model_dim,
        };
        let is_scale = name.ends_with("scale");
        let (center, range) = if is_scale { (1.0, 0.25) } else { (0.0, (3.0 / summed as f32).sqrt()) };
        let state = name.bytes().fold(mix(seed) ^ mix(layer as u64 + 1), |state, byte| mix(state ^ u64::from(byte)));
        Stream { state, center, range }
    }

    fn at(&self, flat: usize) -> f32 {
        let bits = mix(self.state.wrapping_add((flat as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        // 24 bits: every value is an f32.
        let unit = (bits >> 40) as f32 / (1_u32 << 23) as f32 - 1.0;
        self.center + self.range * unit
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A block of a weight, f32, its dimensions followed by ones: of `shape`, from `start` on in the padded weight. Padding
/// is zero.
pub(super) fn block(
    (model, seed, device): (&Architecture, u64, &Device),
    (name, layer): (&str, usize),
    dims: &[Dim],
    sizes: &Sizes,
    start: &[usize],
    shape: &[usize],
) -> Tensor<4> {
    let stream = Stream::new(model, seed, name, layer);
    // Of each dimension, where in the weight without padding each place of the block is.
    let place = |(d, &dim): (usize, &Dim)| {
        (start[d]..start[d] + shape[d]).map(|i| unpadded(model, sizes, dim, i)).collect::<Vec<_>>()
    };
    let places: Vec<_> = dims.iter().enumerate().map(place).collect();
    let mut flat: Vec<Option<usize>> = vec![Some(0)];
    for (place, &dim) in places.iter().zip(dims) {
        let width = size(model, dim);
        let longer = |&at: &Option<usize>| place.iter().map(move |i| Some(at? * width + (*i)?));
        flat = flat.iter().flat_map(longer).collect();
    }
    let values: Vec<f32> = flat.into_iter().map(|at| at.map_or(0.0, |at| stream.at(at))).collect();
    Tensor::from_data(TensorData::new(values, padded(shape, 1)), (device, DType::F32))
}

/// An index without padding, or `None` for padding: behind the vocabulary and multi-head attention's heads, and behind
/// each group of grouped attention's.
fn unpadded(model: &Architecture, sizes: &Sizes, dim: Dim, i: usize) -> Option<usize> {
    let Architecture { heads, kv_heads, vocabulary, .. } = *model;
    match dim {
        Dim::V => (i < vocabulary).then_some(i),
        Dim::K => (i < kv_heads).then_some(i),
        Dim::H if heads == kv_heads => (i < heads).then_some(i),
        Dim::H => {
            let (padded, group) = (sizes.get(Dim::H) / kv_heads, heads / kv_heads);
            (i % padded < group).then_some(i / padded * group + i % padded)
        }
        _ => Some(i),
    }
}
