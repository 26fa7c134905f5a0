//! A model with what the unsharded one says of it, and a run that is compared with that.

use burn::tensor::{Device, Tensor};
use flashover_shard::ShardError;
use flashover_shard::architecture::{Architecture, Block, Mlp, Nonlinearity, Norm};
use flashover_shard::layout::Layout;
use flashover_shard::mesh::Mesh;
use flashover_shard::model::{Output, ShardedModel, Unsharded, greedy};
use flashover_shard::simulate::{TOLERANCE, decoding_after, difference};
use flashover_shard::spec::Dim;

pub const SEED: u64 = 11;

/// Of Llama's kind if serial, of PaLM's if parallel, but for the heads.
pub fn small(heads: usize, kv_heads: usize, block: Block) -> Architecture {
    let parallel = block == Block::Parallel;
    Architecture {
        name: "small".into(),
        layers: 2,
        model_dim: 32,
        ff_dim: 48,
        heads,
        kv_heads,
        head_dim: 4,
        vocabulary: 37,
        mlp: Mlp::Gated(Nonlinearity::Silu),
        block,
        norm: if parallel { Norm::Layer } else { Norm::Rms },
        rotary: true,
        tied_embeddings: parallel,
    }
}

pub fn kinds() -> Vec<(usize, usize, Block)> {
    let heads = [(8, 8), (8, 2), (8, 1)];
    heads.into_iter().flat_map(|(h, k)| [Block::Serial, Block::Parallel].map(|block| (h, k, block))).collect()
}

/// Every layout, with the one that decodes after it: itself, if one token can be sharded as it wants.
pub fn pairs() -> impl Iterator<Item = (Layout, Layout)> {
    Layout::all().map(|layout| (layout, decoding_after(layout)))
}

pub fn tokens(batch: usize, length: usize) -> Vec<Vec<u32>> {
    (0..batch).map(|b| (0..length).map(|l| ((7 * b + 3 * l * l + 5 * l + 1) % 37) as u32).collect()).collect()
}

/// A prompt, and what the unsharded model says: logits of every token of the prompt and of those that it generates, each
/// the likeliest.
pub struct Case {
    pub model: Architecture,
    pub prompt: Vec<Vec<u32>>,
    pub logits: Tensor<3>,
    pub generated: usize,
    pub device: Device,
}

impl Case {
    pub fn new(model: Architecture, batch: usize, length: usize, generated: usize) -> Self {
        Case::on(Device::flex(), model, batch, length, generated)
    }

    pub fn on(device: Device, model: Architecture, batch: usize, length: usize, generated: usize) -> Self {
        let unsharded = Unsharded::new(model.clone(), SEED, &device).unwrap();
        let prompt: Vec<Vec<u32>> = tokens(batch, length)
            .into_iter()
            .map(|sequence| sequence.into_iter().map(|token| token % model.vocabulary as u32).collect())
            .collect();
        let mut all = prompt.clone();
        for _ in 0..generated {
            let next = greedy(&unsharded.logits(&all).unwrap());
            all.iter_mut().zip(next).for_each(|(sequence, token)| sequence.push(token));
        }
        let logits = unsharded.logits(&all).unwrap();
        Case { model, prompt, logits, generated, device }
    }
}

/// Runs a prompt under one layout and generates under another; each rank's logits, tokens, memory and bytes are compared.
/// Gives whether the cache had to move in between.
pub fn check(case: &Case, mesh: &Mesh, prefill: Layout, decode: Layout) -> Result<bool, ShardError> {
    let Case { model, prompt, logits, generated, device } = case;
    let (batch, length) = (prompt.len(), prompt[0].len());
    let name = format!("{prefill} then {decode} on {mesh}, {model:?}, batch {batch}, prompt {length}");
    let positions = length + generated;
    let mut sharded = ShardedModel::new(model.clone(), mesh.clone(), &[prefill, decode], SEED, positions, device)?;
    let output = sharded.prefill(prefill, prompt, length)?;
    compare(&format!("prefill of {name}"), &output, &logits.clone().narrow(1, 0, length));
    holds(&name, &sharded, &output, mesh);
    let moved = sharded.reshard_cache(decode)?;
    for row in &moved {
        assert!(row.agrees(), "cache of {name}: {row:?}");
    }
    let mut next = output.greedy();
    for i in 0..*generated {
        let output = sharded.decode(decode, &next)?;
        compare(&format!("token {i} of {name}"), &output, &logits.clone().narrow(1, length + i, 1));
        holds(&name, &sharded, &output, mesh);
        next = output.greedy();
    }
    Ok(!moved.is_empty())
}

/// Logits, the likeliest tokens, and the bytes of every step on every rank.
pub fn compare(name: &str, output: &Output, expected: &Tensor<3>) {
    let error = difference(&output.logits, expected);
    assert!(error <= TOLERANCE, "{name}: logits differ by {error:e} of the largest");
    let likeliest = |logits: &Tensor<3>| logits.clone().argmax(2).into_data().iter::<i64>().collect::<Vec<_>>();
    assert_eq!(likeliest(&output.logits), likeliest(expected), "{name}");
    for row in output.rows().unwrap() {
        assert!(row.agrees(), "{name}: {row:?}");
    }
}

/// Every rank holds the bytes of its blocks of the weights and of its part of the cache, and no more while it worked than
/// all tensors of a block take.
fn holds(name: &str, sharded: &ShardedModel, output: &Output, mesh: &Mesh) {
    let (_, cache) = output.program.of_role(flashover_shard::program::Role::Cache).next().unwrap();
    let slots = output.sizes.get(Dim::M) / mesh.group_size(cache.spec.axes(Dim::M)).unwrap();
    for (rank, state) in sharded.states().iter().enumerate() {
        assert_eq!(state.weight_bytes(), output.memory.weights, "{name}: weights of rank {rank}");
        let (tokens, bytes) = (state.cached_tokens() as u64, state.cache_bytes());
        assert!(tokens <= slots as u64, "{name}: {tokens} of {slots} slots of rank {rank}");
        assert_eq!(bytes, output.memory.cache / slots as u64 * tokens, "{name}: cache of rank {rank}");
    }
    assert!(output.working <= output.memory.working, "{name}: {} of {}", output.working, output.memory.working);
}

/// Chunks of a sequence one after the other, each a prefill or, of one token, a step of decoding; logits are compared.
pub fn in_turns(model: &Architecture, mesh: &Mesh, layout: Layout, tokens: &[Vec<u32>], chunks: &[usize]) {
    let device = Device::flex();
    let expected = Unsharded::new(model.clone(), SEED, &device).unwrap().logits(tokens).unwrap();
    let mut sharded =
        ShardedModel::new(model.clone(), mesh.clone(), &[layout], SEED, tokens[0].len(), &device).unwrap();
    let mut at = 0;
    for &length in chunks {
        let part: Vec<Vec<u32>> = tokens.iter().map(|sequence| sequence[at..at + length].to_vec()).collect();
        let output = if length == 1 {
            sharded.decode(layout, &part.concat()).unwrap()
        } else {
            sharded.prefill(layout, &part, length).unwrap()
        };
        let name = format!("{layout} on {mesh}, tokens {at} to {}", at + length);
        compare(&name, &output, &expected.clone().narrow(1, at, length));
        at += length;
    }
}
