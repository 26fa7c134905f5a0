//! From a layout, a mesh and a model to lists of axes and padded sizes.

use super::{AttentionLayout, Layout, LayoutOptions, WeightLayout};
use crate::architecture::Architecture;
use crate::error::ShardError;
use crate::mesh::{Axis, Mesh};
use crate::spec::{Dim, Sizes};
use crate::workload::{Phase, Workload};

/// Which axes do what. Equal plans have equal programs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Plan {
    pub phase: Phase,
    pub attention: AttentionLayout,
    pub fused: bool,
    /// Axes over `E` of the stored weights.
    pub e: Vec<Axis>,
    /// Axes over `F` and `H` of the stored weights.
    pub f: Vec<Axis>,
    /// Axes that weights are gathered over, and tokens sharded.
    pub w: Vec<Axis>,
    /// The first axes of `f`, whose sizes divide the number of key heads: they shard `K` of the stored weights. The rest
    /// of `f` shards `E` of the key and value weights instead, so that no chip computes what another computes.
    pub kv: Vec<Axis>,
    /// Whether query heads divide over `f` and `e` together after the gather.
    pub heads_over_e: bool,
    /// Whether key heads do, too.
    pub keys_over_e: bool,
    /// Padded query heads.
    pub heads: usize,
    /// Padded key heads.
    pub kv_heads: usize,
    /// Padding of the vocabulary: chips.
    pub chips: usize,
}

impl Plan {
    pub(crate) fn new(
        layout: Layout,
        model: &Architecture,
        mesh: &Mesh,
        phase: Phase,
        options: LayoutOptions,
    ) -> Result<Self, ShardError> {
        const X: Axis = Axis::X;
        const Y: Axis = Axis::Y;
        const Z: Axis = Axis::Z;
        if mesh.axes().len() != 3 || [X, Y, Z].iter().any(|&axis| mesh.size(axis).is_err()) {
            return Err(ShardError::Mesh { expected: "the axes x, y and z", found: mesh.to_string() });
        }
        if options.heads_multiple == 0 {
            return Err(ShardError::field("heads_multiple", "at least 1", 0));
        }
        let (e, f, w) = match layout.weights {
            WeightLayout::Stationary1D => (vec![], vec![Z, Y, X], vec![]),
            WeightLayout::Stationary2D => (vec![X], vec![Z, Y], vec![]),
            WeightLayout::GatheredX => (vec![X], vec![Z, Y], vec![X]),
            WeightLayout::GatheredXY => (vec![X], vec![Z, Y], vec![X, Y]),
            WeightLayout::GatheredXYZ => (vec![X], vec![Z, Y], vec![X, Y, Z]),
        };
        let one_token = layout.attention == AttentionLayout::Sequence && phase == Phase::Decode;
        if one_token && !w.is_empty() {
            let expected =
                "weight-stationary with sequence attention when decoding, because one token cannot be sharded";
            return Err(ShardError::field("layout", expected, layout.weights.name()));
        }
        let (over_f, over_e) = (mesh.group_size(&f)?, mesh.group_size(&e)?);
        let least = pad_heads(model, lcm(over_f, options.heads_multiple));
        // Over `e` as well, unless that would take more padding than the paper's 48 heads to 64 (§4).
        let wanted = pad_heads(model, lcm(over_f * over_e, options.heads_multiple));
        let scatters = matches!(layout.attention, AttentionLayout::Heads | AttentionLayout::Sequence);
        let over_all = scatters && w.is_empty() && wanted.0 * 3 <= least.0 * 4;
        let (heads, kv_heads) = if over_all { wanted } else { least };
        let mut kv = f.clone();
        while !kv_heads.is_multiple_of(mesh.group_size(&kv)?) {
            kv.pop();
        }
        Ok(Plan {
            phase,
            attention: layout.attention,
            fused: options.fused,
            heads_over_e: heads.is_multiple_of(over_f * over_e),
            keys_over_e: kv_heads.is_multiple_of(over_f * over_e),
            e,
            f,
            w,
            kv,
            heads,
            kv_heads,
            chips: mesh.chips(),
        })
    }

    /// The dimension that token shards are cut from.
    pub(crate) fn tokens(&self) -> Dim {
        if self.attention == AttentionLayout::Sequence { Dim::L } else { Dim::B }
    }

    /// Axes over `E` that remain after the gather.
    pub(crate) fn e1(&self) -> Vec<Axis> {
        without(&self.e, &self.w)
    }

    /// Axes over `F` that remain after the gather.
    pub(crate) fn f1(&self) -> Vec<Axis> {
        without(&self.f, &self.w)
    }

    /// Axes over `K` that remain after the gather.
    pub(crate) fn kv1(&self) -> Vec<Axis> {
        without(&self.kv, &self.w)
    }

    /// The rest of `f` beyond `kv`, after the gather.
    pub(crate) fn rest1(&self) -> Vec<Axis> {
        without(&without(&self.f, &self.kv), &self.w)
    }

    /// Axes of `f` that shard the heads while attention runs.
    pub(crate) fn head_axes(&self) -> Vec<Axis> {
        match self.attention {
            AttentionLayout::Heads => self.f1(),
            AttentionLayout::Batch => Vec::new(),
            AttentionLayout::HeadsAndBatch | AttentionLayout::Sequence => self.kv1(),
        }
    }

    /// Axes of `f` that move from the heads to the tokens while attention runs, sorted: the tokens then lie over
    /// `w`, `e`, and these, in the same order under every weight layout, so that they share caches.
    pub(crate) fn moved(&self) -> Vec<Axis> {
        let mut moved = without(&self.f1(), &self.head_axes());
        moved.sort_unstable();
        moved
    }

    /// Axes that shard the cache over its length when decoding.
    pub(crate) fn cache_axes(&self) -> Vec<Axis> {
        [self.w.clone(), self.e1(), self.moved()].concat()
    }

    /// The same plan on any other mesh: what its program depends on.
    pub(crate) fn without_sizes(&self) -> Self {
        Plan { heads: 0, kv_heads: 0, chips: 0, ..self.clone() }
    }

    /// Sizes of every dimension, with padding. A cache that is sharded over its length has a whole number of slots on
    /// every chip.
    pub(crate) fn sizes(&self, model: &Architecture, mesh: &Mesh, workload: &Workload) -> Result<Sizes, ShardError> {
        let slots = match (self.attention, self.phase) {
            (AttentionLayout::Sequence, Phase::Decode) => mesh.group_size(&self.cache_axes())?,
            _ => 1,
        };
        Ok(Sizes::ones()
            .with(Dim::B, workload.batch)
            .with(Dim::L, workload.tokens)
            .with(Dim::M, workload.context.next_multiple_of(slots))
            .with(Dim::T, workload.scored)
            .with(Dim::E, model.model_dim)
            .with(Dim::F, model.ff_dim)
            .with(Dim::H, self.heads)
            .with(Dim::K, self.kv_heads)
            .with(Dim::Q, model.head_dim)
            .with(Dim::V, model.vocabulary.next_multiple_of(self.chips))
            .with(Dim::S, model.norm.statistics()))
    }

    /// Axes that the batch is sharded over, and what shards it.
    pub(crate) fn batch_axes(&self) -> (Vec<Axis>, &'static str) {
        match self.attention {
            AttentionLayout::Heads => (self.w.clone(), "weight-gathered layouts shard tokens over the gathered axes"),
            AttentionLayout::Batch | AttentionLayout::HeadsAndBatch => {
                (self.cache_axes(), "the attention shards the batch")
            }
            AttentionLayout::Sequence => (Vec::new(), "nothing shards it"),
        }
    }

    /// The batch must be a multiple of the chips that it is sharded over.
    pub(crate) fn check_batch(&self, mesh: &Mesh, workload: &Workload) -> Result<(), ShardError> {
        let (axes, why) = self.batch_axes();
        let chips = mesh.group_size(&axes)?;
        if workload.batch.is_multiple_of(chips) {
            return Ok(());
        }
        let letters: String = axes.iter().map(|axis| axis.letter()).collect();
        Err(ShardError::Batch { chips, why: format!("{why} ({letters})"), batch: workload.batch })
    }
}

/// `axes` less those of `other`, in order.
pub(crate) fn without(axes: &[Axis], other: &[Axis]) -> Vec<Axis> {
    axes.iter().copied().filter(|axis| !other.contains(axis)).collect()
}

/// Query and key heads, padded so that query heads are a multiple of `multiple`.
fn pad_heads(model: &Architecture, multiple: usize) -> (usize, usize) {
    let Architecture { heads, kv_heads, .. } = *model;
    if heads == kv_heads {
        let padded = heads.next_multiple_of(multiple);
        return (padded, padded);
    }
    // The group of every key head grows alike: head h must keep reading key head h / group.
    let group = (heads / kv_heads).next_multiple_of(multiple / gcd(multiple, kv_heads));
    (kv_heads * group, kv_heads)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn lcm(a: usize, b: usize) -> usize {
    a / gcd(a, b) * b
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::models;

    #[test]
    fn heads_are_padded_within_their_groups() {
        let model = |heads, kv_heads| Architecture { heads, kv_heads, ..models::by_name("llama-2-7b").unwrap() };
        for (heads, kv_heads, multiple, expected) in [
            (48, 48, 64, (64, 64)),
            (48, 1, 64, (64, 1)),
            (6, 2, 4, (8, 2)),
            (6, 2, 2, (6, 2)),
            (12, 4, 16, (16, 4)),
            (3, 1, 4, (4, 1)),
            (8, 8, 4, (8, 8)),
        ] {
            assert_eq!(pad_heads(&model(heads, kv_heads), multiple), expected, "{heads} {kv_heads} {multiple}");
        }
    }

    #[test]
    fn palm_540b_is_padded_as_in_the_paper() {
        let model = models::by_name("palm-540b").unwrap();
        let layout = Layout { weights: WeightLayout::Stationary2D, attention: AttentionLayout::Heads };
        let plan = |mesh: &str, layout| {
            Plan::new(layout, &model, &mesh.parse().unwrap(), Phase::Decode, LayoutOptions::default()).unwrap()
        };
        // §4: 48 heads become 64 on 64 chips.
        assert_eq!(plan("4x4x4", layout).heads, 64);
        // On 256 chips heads go over y and z only: 256 heads would cost more than they save.
        assert_eq!((plan("4x8x8", layout).heads, plan("4x8x8", layout).heads_over_e), (64, false));
        // Sharded over the batch, no head needs a chip of its own.
        assert_eq!(plan("4x4x4", Layout { attention: AttentionLayout::Batch, ..layout }).heads, 48);
    }
}
