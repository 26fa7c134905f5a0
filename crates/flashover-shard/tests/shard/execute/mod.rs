//! Programs run: every layout on meshes of 1 to 8 chips gives the logits of the unsharded model, in prefill and then token
//! by token.

pub mod model;
mod ranks;
mod tensor;

use flashover_shard::ShardError;
use flashover_shard::architecture::{Architecture, Block, Mlp, Nonlinearity, Norm};
use flashover_shard::layout::{AttentionLayout, Layout, LayoutOptions, WeightLayout};
use flashover_shard::mesh::Mesh;
use flashover_shard::spec::Spec;
use flashover_shard::workload::Workload;
use ranks::{Caches, Ranks};

const BATCH: usize = 8;
const PROMPT: usize = 8;

fn small(heads: usize, kv_heads: usize, block: Block) -> Architecture {
    let parallel = block == Block::Parallel;
    Architecture {
        name: "small".into(),
        layers: 2,
        model_dim: 8,
        ff_dim: 8,
        heads,
        kv_heads,
        head_dim: 2,
        vocabulary: 11,
        mlp: if parallel { Mlp::Gated(Nonlinearity::Silu) } else { Mlp::TwoMatrix(Nonlinearity::Relu) },
        block,
        norm: if parallel { Norm::Layer } else { Norm::Rms },
        rotary: true,
        tied_embeddings: parallel,
    }
}

fn tokens() -> Vec<Vec<usize>> {
    (0..BATCH).map(|b| (0..PROMPT + 2).map(|l| (7 * b + 3 * l * l + 1) % 11).collect()).collect()
}

/// A model and its logits of every token, computed once.
struct Case {
    model: Architecture,
    expected: Vec<Vec<Vec<f64>>>,
}

fn case(heads: usize, kv_heads: usize, block: Block) -> Case {
    let model = small(heads, kv_heads, block);
    let expected = tokens().iter().map(|sequence| model::logits(&model, &model::weight, sequence)).collect();
    Case { model, expected }
}

/// Runs one pass and compares its logits with the unsharded model's.
fn check(
    name: &str,
    layout: Layout,
    Case { model, expected }: &Case,
    mesh: &Mesh,
    workload: Workload,
    (options, caches): (LayoutOptions, &mut Caches),
) -> Result<(), ShardError> {
    let (program, sizes) = layout.program(model, mesh, &workload, options)?;
    let (tokens, past) = (tokens(), workload.context - workload.tokens);
    let logits = Ranks::new(model, mesh, (&program, sizes), past, &tokens, caches).run();
    for (b, expected) in expected.iter().enumerate() {
        let largest = expected.iter().flatten().fold(0.0_f64, |m, x| m.max(x.abs()));
        for t in 0..workload.scored {
            for (v, expected) in expected[workload.context - workload.scored + t].iter().enumerate() {
                let found = logits.at(&[b, t, v]);
                let error = (found - expected).abs();
                assert!(
                    error <= 1e-9 * largest,
                    "{name}, {:?}: [{b}, {t}, {v}] is {found}, not {expected}",
                    workload.phase
                );
            }
        }
    }
    Ok(())
}

/// How a layout's program keeps its keys.
fn cache(layout: Layout, model: &Architecture, mesh: &Mesh, workload: Workload, options: LayoutOptions) -> Spec {
    let (program, _) = layout.program(model, mesh, &workload, options).unwrap();
    program.tensor(program.find("k.cache").unwrap()).spec.clone()
}

/// Prefill under one layout, two steps of decoding under another, with the same weights and, as they lie, the same caches.
/// Where the second keeps its cache otherwise, only prefill is checked; gives whether both were.
fn check_both(prefill: Layout, decode: Layout, case: &Case, mesh: &Mesh, fused: bool, heads_multiple: usize) -> bool {
    let model = &case.model;
    let name = format!("{prefill} then {decode} on {mesh}, {} of {} heads", model.kv_heads, model.heads);
    let options = LayoutOptions { fused, heads_multiple };
    let mut caches = Caches::new();
    let prompt = Workload { scored: PROMPT, ..Workload::prefill(BATCH, PROMPT) };
    check(&name, prefill, case, mesh, prompt, (options, &mut caches)).unwrap();
    let step = |context| Workload::decode(BATCH, context);
    if cache(prefill, model, mesh, prompt, options) != cache(decode, model, mesh, step(PROMPT + 1), options) {
        return false;
    }
    for context in [PROMPT + 1, PROMPT + 2] {
        check(&name, decode, case, mesh, step(context), (options, &mut caches)).unwrap();
    }
    true
}

fn cases() -> Vec<Case> {
    let heads = [(4, 4), (4, 2), (4, 1), (3, 3), (6, 2), (3, 1)];
    heads.into_iter().flat_map(|(h, k)| [Block::Serial, Block::Parallel].map(|block| case(h, k, block))).collect()
}

fn all_layouts(chips: usize) {
    let cases = cases();
    for mesh in Mesh::factorizations(chips) {
        for (i, case) in cases.iter().enumerate() {
            for layout in Layout::all() {
                let ring = layout.attention == AttentionLayout::Sequence;
                let gathered = !layout.weights.name().ends_with("stationary");
                // One token cannot be sharded: a ring's cache is read by a weight-stationary layout.
                let weights = if ring && gathered { WeightLayout::Stationary2D } else { layout.weights };
                let both = check_both(layout, Layout { weights, ..layout }, case, &mesh, i % 2 == 0, chips);
                assert!(both || (ring && gathered), "{layout} keeps two kinds of caches");
            }
        }
    }
}

#[test]
fn one_chip_is_the_unsharded_model() {
    all_layouts(1);
}

#[test]
fn two_chips_give_the_same_logits() {
    all_layouts(2);
}

#[test]
fn four_chips_give_the_same_logits() {
    all_layouts(4);
}

#[test]
fn eight_chips_give_the_same_logits() {
    let mesh = Mesh::torus(2, 2, 2).unwrap();
    for case in [case(4, 2, Block::Serial), case(3, 1, Block::Parallel), case(6, 6, Block::Parallel)] {
        for layout in Layout::all().filter(|layout| layout.attention != AttentionLayout::Sequence) {
            assert!(check_both(layout, layout, &case, &mesh, true, 1));
        }
        for weights in [WeightLayout::Stationary1D, WeightLayout::Stationary2D] {
            let layout = Layout { weights, attention: AttentionLayout::Sequence };
            assert!(check_both(layout, layout, &case, &mesh, true, 1));
        }
    }
}

/// §3.2.3, §4.4: a weight-gathered prefill and a 2D weight-stationary decode share weights, and with attention sharded over
/// the batch also the cache.
#[test]
fn a_gathered_prefill_feeds_a_stationary_decode() {
    let mesh = Mesh::torus(2, 2, 2).unwrap();
    let attention = AttentionLayout::Batch;
    for case in [case(4, 2, Block::Serial), case(4, 1, Block::Parallel)] {
        for weights in [WeightLayout::GatheredX, WeightLayout::GatheredXY, WeightLayout::GatheredXYZ] {
            let decode = Layout { weights: WeightLayout::Stationary2D, attention };
            assert!(check_both(Layout { weights, attention }, decode, &case, &mesh, true, 8));
        }
    }
}

#[test]
fn one_token_cannot_be_sharded() {
    let layout = Layout { weights: WeightLayout::GatheredX, attention: AttentionLayout::Sequence };
    let (mesh, model) = (Mesh::torus(2, 2, 2).unwrap(), small(4, 1, Block::Serial));
    let workload = Workload::decode(BATCH, PROMPT);
    let error = layout.program(&model, &mesh, &workload, LayoutOptions::default()).unwrap_err().to_string();
    assert!(error.starts_with("layout: expected weight-stationary with sequence attention when decoding"), "{error}");
}
