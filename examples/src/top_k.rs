//! What [`TopK`] loses on the attention of a trained model: probability that is left out, error of the output, bits per byte.

use burn::nn::loss::CrossEntropyLossConfig;
use burn::tensor::{Device, Int, Tensor, TensorData};
use flashover::kernels::block_plan::TileSize;
use flashover::kernels::mask::{BlockTable, Mask};
use flashover::{SparsePlan, TopK, attention_with_lse};

use crate::Result;
use crate::model::ByteModel;

/// Which key tiles a query tile keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// All of the causal ones.
    Dense,
    /// The best by pooled scores, and besides them the diagonal and the first.
    Best(u32),
    /// As many of the last ones, and the first.
    Last(u32),
}

/// What a choice of tiles does to a model, over all blocks, heads and queries.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The choice.
    pub choice: Choice,
    /// Tiles that are kept, of the causal ones.
    pub density: f64,
    /// Mean probability that dense attention has on what is kept.
    pub mass: f64,
    /// That of the head that loses most.
    pub worst_head: f64,
    /// `‖o − o dense‖ / ‖o dense‖` of attention's outputs, given the same operands.
    pub error: f64,
    /// Bits per byte of the model with this attention in all of its blocks.
    pub bits: f64,
}

/// Measures a choice on windows `[B, S + 1]` of text, with square tiles of `tile`.
///
/// # Errors
///
/// Attention's.
pub fn measure(model: &ByteModel, windows: &[Vec<u8>], tile: u32, choice: Choice, device: &Device) -> Result<Row> {
    let (rows, length) = (windows.len(), windows[0].len() - 1);
    let part = |from: usize| {
        let bytes = windows.iter().flat_map(|window| &window[from..from + length]);
        let bytes: Vec<i32> = bytes.map(|&byte| byte.into()).collect();
        Tensor::<2, Int>::from_data(TensorData::new(bytes, [rows, length]), device)
    };
    let (mut kept, mut all) = (0.0, 0.0);
    let (mut mass, mut blocks, mut worst_head) = (0.0, 0.0, 1.0f64);
    let (mut wrong, mut right) = (0.0, 0.0);
    // What the model does with it is measured as it goes on with it; error and mass, block by block, on the same operands.
    let logits = model.forward_by(part(0), |[q, k, v], options| {
        let (dense, dense_lse) = attention_with_lse(q.clone(), k.clone(), v.clone(), &options)?;
        let [batch, heads, queries, _] = q.dims();
        let causal = plan(Choice::Dense, &q, &k, tile)?;
        let plan = plan(choice, &q, &k, tile)?;
        let tiles = |plan: &SparsePlan| {
            let plan = plan.block_plan();
            let (full, partial) = plan.block_counts();
            (full + partial) as f64 / f64::from(plan.batch() * plan.heads())
        };
        (kept, all) = (kept + tiles(&plan), all + tiles(&causal));
        let (o, lse) = attention_with_lse(q, k, v, &options.plan(&plan))?;
        let squares = |x: Tensor<4>| f64::from(x.powi_scalar(2).sum().into_scalar::<f32>());
        wrong += squares(o.clone() - dense.clone());
        right += squares(dense);
        let per_head = (lse - dense_lse).exp().swap_dims(0, 1).reshape([heads, batch * queries]).mean_dim(1);
        let per_head: Vec<f32> = per_head.into_data().iter().collect();
        mass += per_head.iter().map(|&x| f64::from(x)).sum::<f64>() / heads as f64;
        worst_head = per_head.iter().fold(worst_head, |worst, &x| worst.min(x.into()));
        blocks += 1.0;
        Ok(o)
    })?;
    let logits = logits.reshape([rows * length, 256]);
    let loss = CrossEntropyLossConfig::new().init(device).forward(logits, part(1).reshape([rows * length]));
    Ok(Row {
        choice,
        density: kept / all,
        mass: mass / blocks,
        worst_head,
        error: f64::sqrt(wrong / right),
        bits: f64::from(loss.into_scalar::<f32>()) / std::f64::consts::LN_2,
    })
}

fn plan(choice: Choice, q: &Tensor<4>, k: &Tensor<4>, tile: u32) -> Result<SparsePlan> {
    let shape = [1, 1, q.dims()[2], k.dims()[2]];
    let size = TileSize { bq: tile, bk: tile };
    Ok(match choice {
        Choice::Dense => SparsePlan::with_tile(&Mask::causal(), shape, size)?,
        Choice::Best(blocks) => {
            TopK::new(blocks).tile(tile, tile).sinks(1).plan(q.clone(), k.clone(), &Mask::causal())?
        }
        Choice::Last(blocks) => {
            // Whole tiles: query tile i sees those from i + 1 − blocks on, and the first.
            let (mut starts, mut columns) = (vec![0], Vec::new());
            for i in 0..shape[2].div_ceil(tile as usize) as u32 {
                columns.extend((0..=i).filter(|&j| j == 0 || i - j < blocks));
                starts.push(columns.len() as u32);
            }
            let table = BlockTable { block: [tile; 2], batch: 1, heads: 1, starts, columns };
            SparsePlan::with_tile(&(Mask::causal() & Mask::from_blocks(table)), shape, size)?
        }
    })
}

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let choice = match self.choice {
            Choice::Dense => "all".to_string(),
            Choice::Best(blocks) => format!("best {blocks}"),
            Choice::Last(blocks) => format!("last {blocks}"),
        };
        let Row { density, mass, worst_head, error, bits, .. } = self;
        write!(f, "| {choice} | {density:.3} | {mass:.3} | {worst_head:.3} | {error:.3} | {bits:.3} |")
    }
}
