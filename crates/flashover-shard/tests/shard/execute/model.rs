//! The unsharded model, written without programs: what every layout must give. Weights are a function of their name and
//! index, so that nothing has to be cut up.

use flashover_shard::architecture::{Architecture, Block, Mlp, Nonlinearity, Norm};

pub const THETA: f64 = 10_000.0;

/// A number between −1 and 1 for every element of every weight.
pub fn weight(name: &str, layer: usize, index: &[usize]) -> f64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64 ^ layer as u64;
    for byte in name.bytes().chain(index.iter().flat_map(|i| i.to_le_bytes())) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash ^= hash >> 31;
    hash = hash.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (hash >> 11) as f64 / (1_u64 << 52) as f64 - 1.0
}

pub fn nonlinearity(f: Nonlinearity, x: f64) -> f64 {
    match f {
        Nonlinearity::Silu => x / (1.0 + (-x).exp()),
        Nonlinearity::Gelu => 0.5 * x * (1.0 + (0.797_884_560_8 * (x + 0.044_715 * x * x * x)).tanh()),
        Nonlinearity::Relu => x.max(0.0),
    }
}

/// A row's norm from its sums over `E` elements.
pub fn normalize(norm: Norm, x: f64, squares: f64, sum: f64, e: usize) -> f64 {
    match norm {
        Norm::Rms => x / (squares / e as f64 + 1e-6).sqrt(),
        Norm::Layer => {
            let mean = sum / e as f64;
            (x - mean) / (squares / e as f64 - mean * mean + 1e-6).sqrt()
        }
    }
}

/// Rotates a head at a position.
pub fn rotate(head: &[f64], position: usize) -> Vec<f64> {
    let half = head.len() / 2;
    let mut out = head.to_vec();
    for i in 0..half {
        let angle = position as f64 / THETA.powf(i as f64 / half as f64);
        let (sin, cos) = angle.sin_cos();
        out[i] = head[i] * cos - head[i + half] * sin;
        out[i + half] = head[i] * sin + head[i + half] * cos;
    }
    out
}

/// Weights by name, layer and index.
type Weights<'a> = &'a dyn Fn(&str, usize, &[usize]) -> f64;

fn norm(model: &Architecture, weight: Weights, name: &str, layer: usize, x: &[f64]) -> Vec<f64> {
    let (squares, sum) = (x.iter().map(|x| x * x).sum(), x.iter().sum());
    let scaled =
        |(e, &x): (usize, &f64)| normalize(model.norm, x, squares, sum, model.model_dim) * weight(name, layer, &[e]);
    x.iter().enumerate().map(scaled).collect()
}

fn add(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Attention of one block over a sequence of normed rows.
fn attention(model: &Architecture, weight: Weights, layer: usize, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let Architecture { heads, kv_heads, head_dim, model_dim, .. } = *model;
    let project = |name: &str, x: &[f64], head: usize| -> Vec<f64> {
        (0..head_dim).map(|q| x.iter().enumerate().map(|(e, x)| x * weight(name, layer, &[e, head, q])).sum()).collect()
    };
    let turn = |head: Vec<f64>, position| if model.rotary { rotate(&head, position) } else { head };
    let mut out = vec![vec![0.0; model_dim]; rows.len()];
    for h in 0..heads {
        let kv = h / (heads / kv_heads);
        let keys: Vec<_> = rows.iter().enumerate().map(|(m, x)| turn(project("k.weight", x, kv), m)).collect();
        let values: Vec<_> = rows.iter().map(|x| project("v.weight", x, kv)).collect();
        for (l, x) in rows.iter().enumerate() {
            let q = turn(project("q.weight", x, h), l);
            let score = |k: &Vec<f64>| q.iter().zip(k).map(|(a, b)| a * b).sum::<f64>() / (head_dim as f64).sqrt();
            let weights: Vec<f64> = keys[..=l].iter().map(|k| score(k).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for i in 0..head_dim {
                let o = weights.iter().zip(&values).map(|(w, v)| w * v[i]).sum::<f64>() / sum;
                for (e, y) in out[l].iter_mut().enumerate() {
                    *y += o * weight("o.weight", layer, &[h, i, e]);
                }
            }
        }
    }
    out
}

fn mlp(model: &Architecture, weight: Weights, layer: usize, x: &[f64]) -> Vec<f64> {
    let Architecture { ff_dim, model_dim, .. } = *model;
    let project =
        |name: &str, f: usize| x.iter().enumerate().map(|(e, x)| x * weight(name, layer, &[e, f])).sum::<f64>();
    let hidden = |f: usize| match model.mlp {
        Mlp::TwoMatrix(function) => nonlinearity(function, project("up.weight", f)),
        Mlp::Gated(function) => nonlinearity(function, project("gate.weight", f)) * project("up.weight", f),
    };
    let hidden: Vec<_> = (0..ff_dim).map(hidden).collect();
    let out = |e: usize| hidden.iter().enumerate().map(|(f, h)| h * weight("down.weight", layer, &[f, e])).sum();
    (0..model_dim).map(out).collect()
}

/// Logits of every token of a sequence.
pub fn logits(model: &Architecture, weight: Weights, tokens: &[usize]) -> Vec<Vec<f64>> {
    let embed = |&token: &usize| (0..model.model_dim).map(|e| weight("embedding", 0, &[token, e])).collect::<Vec<_>>();
    let mut rows: Vec<Vec<f64>> = tokens.iter().map(embed).collect();
    for layer in 0..model.layers {
        let normed: Vec<_> = rows.iter().map(|x| norm(model, weight, "norm.scale", layer, x)).collect();
        let attended = attention(model, weight, layer, &normed);
        for (l, x) in rows.iter_mut().enumerate() {
            let middle = add(x, &attended[l]);
            *x = match model.block {
                Block::Parallel => add(&middle, &mlp(model, weight, layer, &normed[l])),
                Block::Serial => {
                    add(&middle, &mlp(model, weight, layer, &norm(model, weight, "mlp.norm.scale", layer, &middle)))
                }
            };
        }
    }
    let table = if model.tied_embeddings { "embedding" } else { "unembedding" };
    let logit = |x: &[f64], v: usize| x.iter().enumerate().map(|(e, x)| x * weight(table, 0, &[v, e])).sum::<f64>();
    let head = |x: &Vec<f64>| {
        let x = norm(model, weight, "head.norm.scale", 0, x);
        (0..model.vocabulary).map(|v| logit(&x, v)).collect()
    };
    rows.iter().map(head).collect()
}
