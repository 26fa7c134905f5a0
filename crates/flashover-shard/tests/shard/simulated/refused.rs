//! What a sharded model refuses, and in which words.

use burn::tensor::Device;
use flashover_shard::architecture::{Architecture, Block};
use flashover_shard::layout::{AttentionLayout, Layout, WeightLayout};
use flashover_shard::model::{ShardedModel, Unsharded};
use flashover_shard::simulate::{simulate, small as small_of};
use flashover_shard::{ShardError, models};

use super::case::{SEED, small, tokens};

const HEADS: Layout = Layout { weights: WeightLayout::Stationary2D, attention: AttentionLayout::Heads };
const BATCH: Layout = Layout { weights: WeightLayout::Stationary2D, attention: AttentionLayout::Batch };
const ONE_D: Layout = Layout { weights: WeightLayout::Stationary1D, attention: AttentionLayout::Heads };

fn sharded(model: Architecture, mesh: &str, layouts: &[Layout]) -> Result<ShardedModel, ShardError> {
    ShardedModel::new(model, mesh.parse().unwrap(), layouts, SEED, 8, &Device::flex())
}

fn message<T>(found: Result<T, ShardError>) -> String {
    found.map(drop).unwrap_err().to_string()
}

#[test]
fn models_and_meshes() {
    let model = || small(4, 2, Block::Serial);
    assert_eq!(message(sharded(model(), "2x2x2", &[])), "layouts: expected at least one, got none");
    assert!(message(sharded(model(), "5x1x1", &[HEADS])).contains("dimension E"));
    assert_eq!(message(sharded(model(), "2000x1x1", &[HEADS])), "mesh: expected at most 1024 logical chips, got 2000");
    let odd = Architecture { head_dim: 3, ..model() };
    assert_eq!(
        message(sharded(odd, "2x1x1", &[HEADS])),
        "head_dim: expected an even number with rotary positions, got 3"
    );
    let found = message(sharded(model(), "2x2x2", &[HEADS, ONE_D]));
    let expected =
        "1d-weight-stationary/heads: embedding: expected V_zyE_x of [40, 32], as stored, got V_zyxE of [40, 32]";
    assert_eq!(found, expected);
    let palm = models::by_name("palm-540b").unwrap();
    assert!(message(small_of(&palm, &"64x64x1".parse().unwrap())).starts_with("mesh: expected at most 1024"));
    let mesh = "x=2,y=2".parse().unwrap();
    assert!(
        message(simulate(&palm, &mesh, (HEADS, HEADS), 1, &Device::flex()))
            .starts_with("mesh: expected the axes x, y and z")
    );
}

#[test]
fn tokens_and_batches() {
    let mut model = sharded(small(4, 2, Block::Serial), "2x2x1", &[HEADS, BATCH]).unwrap();
    let mut ragged = tokens(4, 3);
    ragged[1].pop();
    assert_eq!(message(model.prefill(HEADS, &ragged, 1)), "tokens: expected 4 sequences of 3, got [3, 2, 3, 3]");
    assert_eq!(message(model.prefill(HEADS, &[], 1)), "batch: expected 1 to 268435456, got 0");
    assert_eq!(message(model.prefill(HEADS, &[vec![37]], 1)), "token: expected below the vocabulary of 37, got 37");
    assert!(message(model.prefill(BATCH, &tokens(3, 3), 1)).starts_with("batch: expected a multiple of 4"));
    assert_eq!(message(model.prefill(HEADS, &tokens(4, 9), 1)), "context: expected at most 8 positions, got 9");
    assert!(message(model.reshard_cache(BATCH)).starts_with("cache: expected one that prefill left"));
    // What was refused has left nothing behind.
    model.prefill(HEADS, &tokens(4, 3), 1).unwrap();
    let found = message(model.decode(BATCH, &[1, 2, 3, 4]));
    assert!(found.ends_with("k.cache: expected BMK_zyQ, got B_xyzMKQ"), "{found}");
    assert!(model.reshard_cache(BATCH).unwrap().iter().all(|row| row.agrees()));
    model.decode(BATCH, &[1, 2, 3, 4]).unwrap();
    let unsharded = Unsharded::new(small(4, 2, Block::Serial), SEED, &Device::flex()).unwrap();
    assert_eq!(
        message(unsharded.logits(&ragged)),
        "tokens: expected sequences of one positive length, got [3, 2, 3, 3]"
    );
    assert_eq!(message(unsharded.logits(&[vec![1, 99]])), "token: expected below the vocabulary of 37, got 99");
}
