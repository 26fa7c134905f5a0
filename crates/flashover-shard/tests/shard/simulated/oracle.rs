//! The unsharded model in f32 against the same model written down in f64, without Burn.

use burn::tensor::Device;
use flashover_shard::architecture::Block;
use flashover_shard::model::{Unsharded, weight};

use super::case::{SEED, small, tokens};
use crate::execute::model;

#[test]
fn the_unsharded_model_is_the_one_in_f64() {
    for block in [Block::Serial, Block::Parallel] {
        for (heads, kv_heads) in [(4, 4), (6, 2), (3, 1)] {
            let shape = small(heads, kv_heads, block);
            let tokens = tokens(3, 7);
            let found = Unsharded::new(shape.clone(), SEED, &Device::flex()).unwrap().logits(&tokens).unwrap();
            let found: Vec<f64> = found.into_data().iter::<f64>().collect();
            let weights =
                |name: &str, layer: usize, index: &[usize]| f64::from(weight(&shape, SEED, name, layer, index));
            let sequences = tokens.iter().map(|sequence| {
                let sequence: Vec<_> = sequence.iter().map(|&token| token as usize).collect();
                model::logits(&shape, &weights, &sequence)
            });
            let expected: Vec<f64> = sequences.flatten().flatten().collect();
            assert_eq!(found.len(), expected.len());
            let largest = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
            for (i, (a, b)) in found.iter().zip(&expected).enumerate() {
                assert!((a - b).abs() <= 1e-5 * largest, "{shape:?}, {i}: {a}, not {b}");
            }
        }
    }
}
