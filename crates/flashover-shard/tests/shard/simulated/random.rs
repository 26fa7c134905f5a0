//! Random shapes, meshes and layouts, among them heads that do not divide their axes.

use std::cell::Cell;

use flashover_shard::architecture::{Architecture, Block, Mlp, Nonlinearity, Norm};
use flashover_shard::layout::{AttentionLayout, Layout, WeightLayout};
use flashover_shard::mesh::{Axis, Mesh};
use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestRng, TestRunner};

use super::case::{Case, check, pairs};

const CASES: u32 = 200;

fn nonlinearity() -> impl Strategy<Value = Nonlinearity> {
    prop_oneof![Just(Nonlinearity::Silu), Just(Nonlinearity::Gelu), Just(Nonlinearity::Relu)]
}

fn mesh() -> impl Strategy<Value = Mesh> {
    (1..=4_usize, 1..=4_usize, 1..=4_usize)
        .prop_filter("at most 16 chips", |(x, y, z)| x * y * z <= 16)
        .prop_map(|(x, y, z)| Mesh::torus(x, y, z).unwrap())
}

/// A model that the mesh divides, but for its heads and vocabulary.
fn model(chips: usize) -> impl Strategy<Value = Architecture> {
    let sizes = (1..=3_usize, 1..=3_usize, 1..=3_usize, 5..40_usize);
    let heads = (1..=5_usize, 1..=4_usize);
    let kinds =
        (nonlinearity(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), 1..=2_usize);
    (sizes, heads, kinds).prop_map(move |((e, f, q, vocabulary), (kv_heads, group), kinds)| {
        let (function, gated, parallel, rms, rotary, tied_embeddings, layers) = kinds;
        Architecture {
            name: "random".into(),
            layers,
            model_dim: e * 16_usize.next_multiple_of(chips),
            ff_dim: f * 12_usize.next_multiple_of(chips),
            heads: kv_heads * group,
            kv_heads,
            head_dim: 2 * q,
            vocabulary,
            mlp: if gated { Mlp::Gated(function) } else { Mlp::TwoMatrix(function) },
            block: if parallel { Block::Parallel } else { Block::Serial },
            norm: if rms { Norm::Rms } else { Norm::Layer },
            rotary,
            tied_embeddings,
        }
    })
}

fn case() -> impl Strategy<Value = (Mesh, Architecture, (Layout, Layout), usize, usize)> {
    mesh().prop_flat_map(|mesh| {
        let chips = mesh.chips();
        let layouts = proptest::sample::select(pairs().collect::<Vec<_>>());
        (Just(mesh), model(chips), layouts, 1..=5_usize, 1..=6_usize).prop_map(
            move |(mesh, model, layouts, batch, prompt)| {
                let whole = layouts.0.attention == AttentionLayout::Heads
                    && matches!(layouts.0.weights, WeightLayout::Stationary1D | WeightLayout::Stationary2D);
                let ring = layouts.0.attention == AttentionLayout::Sequence;
                // What shards the batch, or the prompt, takes a multiple of the chips.
                let batch = if whole || ring { batch } else { chips * batch.div_ceil(3) };
                let prompt = if ring { chips * prompt.div_ceil(3) } else { prompt };
                (mesh, model, layouts, batch, prompt)
            },
        )
    })
}

#[test]
fn random_shapes_and_meshes() {
    let config = ProptestConfig { cases: CASES, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let (padded, moved) = (Cell::new(0_u32), Cell::new(0_u32));
    let result = runner.run(&case(), |(mesh, model, (prefill, decode), batch, prompt)| {
        let axes = mesh.group_size(&[Axis::Y, Axis::Z]).unwrap();
        padded.set(padded.get() + u32::from(!model.heads.is_multiple_of(axes)));
        let case = Case::new(model, batch, prompt, 2);
        moved.set(moved.get() + u32::from(check(&case, &mesh, prefill, decode).unwrap()));
        Ok(())
    });
    result.unwrap();
    let (padded, moved) = (padded.get(), moved.get());
    println!("{CASES} cases, {padded} with heads that do not divide, {moved} whose cache moved");
    assert!(padded >= CASES / 10, "{padded}");
}
