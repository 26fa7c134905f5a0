//! Programs on real tensors: every layout on simulated meshes gives the unsharded model's logits and tokens, and moves
//! exactly the bytes that its specs say.

mod case;
mod faults;
mod oracle;
mod random;
mod refused;

use case::{Case, check, kinds, pairs};
use flashover_shard::architecture::Block;
use flashover_shard::layout::{AttentionLayout, Layout, WeightLayout};
use flashover_shard::mesh::Mesh;

/// Every layout × {multi-head, grouped, multiquery} × {serial, parallel} × {prefill, decode} on these meshes of as many
/// chips.
fn every_layout(meshes: &[Mesh]) {
    let chips = meshes[0].chips();
    let mut runs = 0;
    for (heads, kv_heads, block) in kinds() {
        let case = Case::new(case::small(heads, kv_heads, block), chips.max(2), chips.max(4), 2);
        for mesh in meshes {
            for (prefill, decode) in pairs() {
                check(&case, mesh, prefill, decode).unwrap();
                runs += 1;
            }
        }
    }
    println!("{chips} chips: {runs} runs on {} meshes, each a prefill and two tokens", meshes.len());
    assert_eq!(runs, 6 * 20 * meshes.len());
}

fn meshes<const N: usize>(names: [&str; N]) -> Vec<Mesh> {
    names.map(|name| name.parse().unwrap()).to_vec()
}

#[test]
fn one_chip() {
    every_layout(&Mesh::factorizations(1));
}

#[test]
fn two_chips() {
    every_layout(&Mesh::factorizations(2));
}

#[test]
fn four_chips() {
    every_layout(&Mesh::factorizations(4));
}

#[test]
fn eight_chips() {
    every_layout(&Mesh::factorizations(8));
}

#[test]
fn sixteen_chips() {
    every_layout(&meshes(["4x2x2", "2x2x4", "1x4x4"]));
}

/// §3.2.3, §4.4: weights stored once serve a weight-gathered prefill and a 2D weight-stationary decode, and with attention
/// over the batch the cache does too.
#[test]
fn prefill_and_decoding_share_weights_and_cache() {
    for block in [Block::Serial, Block::Parallel] {
        for (heads, kv_heads) in [(8, 2), (6, 1), (3, 3)] {
            let case = Case::new(case::small(heads, kv_heads, block), 8, 4, 2);
            for weights in [WeightLayout::GatheredX, WeightLayout::GatheredXY, WeightLayout::GatheredXYZ] {
                let attention = AttentionLayout::Batch;
                let decode = Layout { weights: WeightLayout::Stationary2D, attention };
                let mesh = "2x2x2".parse().unwrap();
                assert!(!check(&case, &mesh, Layout { weights, attention }, decode).unwrap(), "the cache moves");
            }
        }
    }
}

/// Another backend than Flex, whose attention is composed of its own operations.
#[cfg(feature = "ndarray")]
#[test]
#[allow(deprecated)] // Burn deprecates it; as long as it has it, it is tested.
fn another_backend() {
    for (heads, kv_heads, block) in [(8, 2, Block::Serial), (8, 1, Block::Parallel)] {
        let device = burn::tensor::Device::ndarray();
        let case = Case::on(device, case::small(heads, kv_heads, block), 8, 8, 2);
        for (prefill, decode) in pairs() {
            check(&case, &"2x2x2".parse().unwrap(), prefill, decode).unwrap();
        }
    }
}

/// Prefill under any attention layout, decoding under any other: the cache moves through the transport.
#[test]
fn a_cache_moves_to_where_decoding_reads_it() {
    let mut moved = 0;
    for (heads, kv_heads) in [(8, 8), (8, 2), (6, 1)] {
        let case = Case::new(case::small(heads, kv_heads, Block::Serial), 8, 8, 2);
        for mesh in meshes(["2x2x2", "1x2x4", "8x1x1"]) {
            for (from, to) in AttentionLayout::ALL.into_iter().flat_map(|a| AttentionLayout::ALL.map(|b| (a, b))) {
                let layout = |attention| Layout { weights: WeightLayout::Stationary2D, attention };
                moved += u32::from(check(&case, &mesh, layout(from), layout(to)).unwrap());
            }
        }
    }
    println!("{moved} caches moved");
    assert!(moved > 30, "{moved}");
}

/// A second prompt after decoding: a rank then holds tokens of its block, some that were dealt out one by one, and more of
/// a block.
#[test]
fn a_cache_is_filled_again_after_decoding() {
    let (tokens, mesh) = (case::tokens(2, 12), "1x2x2".parse().unwrap());
    for attention in AttentionLayout::ALL.into_iter().filter(|&a| a != AttentionLayout::Batch) {
        for weights in [WeightLayout::Stationary1D, WeightLayout::Stationary2D] {
            let model = case::small(4, 2, Block::Serial);
            case::in_turns(&model, &mesh, Layout { weights, attention }, &tokens, &[4, 1, 1, 1, 1, 4]);
        }
    }
}
