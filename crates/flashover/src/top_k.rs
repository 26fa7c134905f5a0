//! [`TopK`]: a plan chosen from the queries and keys themselves.

use burn::tensor::{DType, Tensor};
use flashover_kernels::block_plan::{BlockPlan, TileSize};
use flashover_kernels::mask::{BlockTable, Extent, Mask, MaskError};

use crate::{AttentionError, SparsePlan};

/// Which key tiles each query tile keeps: those whose mean key scores highest with its mean query, for every head by itself,
/// and besides them always the diagonal and the sinks. (Block selection by pooled scores, as in SeerAttention and MInference.)
///
/// It is an approximation, and of the pattern only: attention over the kept tiles is exact. A mean says little of a tile
/// with one key that matters; what is lost is the probability of the tiles that are left out, `1 − Σ p` over the kept ones.
/// `docs/measurements.md` has what that is on a small trained model: with ALiBi, which is not looked at, the nearest tiles were
/// the better choice.
///
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use flashover::kernels::mask::Mask;
/// use flashover::{AttentionOptions, TopK, attention};
///
/// let x = || Tensor::<4>::random([1, 2, 512, 32], Distribution::Default, &Device::flex());
/// let (q, k, v) = (x(), x(), x());
/// let plan = TopK::new(2).tile(64, 64).sinks(4).plan(q.clone(), k.clone(), &Mask::causal())?;
/// let o = attention(q, k, v, &AttentionOptions::new().plan(&plan))?;
/// # Ok::<(), flashover::AttentionError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TopK {
    blocks: u32,
    sinks: u32,
    tile: TileSize,
}

impl TopK {
    /// Keeps `blocks` key tiles of each query tile; tiles are [`SparsePlan::TILE`], and there are no sinks.
    pub fn new(blocks: u32) -> Self {
        TopK { blocks, sinks: 0, tile: SparsePlan::TILE }
    }

    /// Queries and keys of a tile.
    pub fn tile(mut self, bq: u32, bk: u32) -> Self {
        self.tile = TileSize { bq, bk };
        self
    }

    /// Keeps the tiles of the first `keys` keys as well.
    pub fn sinks(mut self, keys: u32) -> Self {
        self.sinks = keys;
        self
    }

    /// The plan for `q` `[B, Hq, Sq, D]` and `k` `[B, Hkv, Skv, D]`, of the tiles in which `mask` shows anything and of the
    /// points that it shows. Where it shows fewer tiles than are to be kept, it is the plan of the mask.
    ///
    /// Means and scores are taken on the device, in f32; `B · Hq · ⌈Sq / bq⌉ · ⌈Skv / bk⌉` scores are read back, because a
    /// plan is host data. NaN scores lowest. Of equal scores the first tile is kept. The scale and what else shapes scores
    /// are left out. Not differentiable.
    ///
    /// # Errors
    ///
    /// `blocks` of 0; shapes that do not fit each other; and those of [`SparsePlan::with_tile`].
    pub fn plan(&self, q: Tensor<4>, k: Tensor<4>, mask: &Mask) -> Result<SparsePlan, AttentionError> {
        let TopK { blocks, sinks, tile } = *self;
        if blocks == 0 {
            return Err(MaskError::TooSmall { what: "top-k blocks", limit: 1, found: 0 }.into());
        }
        let ([batch, heads, seq_q, _], [_, heads_kv, seq_kv, _]) = (q.dims(), k.dims());
        // Only its checks are needed.
        let element = flashover_kernels::problem::Element::F32;
        flashover_kernels::problem::Problem::new(q.dims(), k.dims(), k.dims(), element)?;
        let [batch_u, heads_u, seq_q_u, seq_kv_u] =
            [batch, heads, seq_q, seq_kv].map(|n| n.try_into().unwrap_or(u32::MAX));
        let extent = Extent { batch: batch_u, heads: heads_u, seq_q: seq_q_u, seq_kv: seq_kv_u };
        let visible = BlockPlan::new(mask, extent, tile)?.refine();
        let (rows, columns) = (visible.query_tiles(), visible.key_tiles());
        if rows == 0 || columns == 0 || batch * heads == 0 {
            return Ok(visible.into());
        }
        let (q, k) = (means(q.detach(), tile.bq), means(k.detach(), tile.bk));
        // The query heads of a key head stand together.
        let q = q.reshape([batch, heads_kv, heads / heads_kv * rows as usize, 0]);
        let scores: Vec<f32> = q.matmul(k.swap_dims(2, 3)).into_data().iter::<f32>().collect();
        let (mut starts, mut kept) = (vec![0], Vec::new());
        for (row, scores) in (0u32..).zip(scores.chunks_exact(columns as usize)) {
            let (plane, i) = (row / rows, row % rows);
            let listed = visible.row(plane / heads_u, plane % heads_u, i);
            let mut candidates: Vec<u32> = listed.full.iter().chain(listed.partial).copied().collect();
            let score = |j: u32| if scores[j as usize].is_nan() { f32::NEG_INFINITY } else { scores[j as usize] };
            candidates.sort_by(|&x, &y| score(y).total_cmp(&score(x)).then(x.cmp(&y)));
            let queries = tile.queries(extent, i);
            let position = |i: u32| i64::from(i) + i64::from(extent.shift());
            let diagonal = position(queries.start)..position(queries.end);
            let mut row: Vec<u32> = Vec::new();
            for (rank, j) in candidates.into_iter().enumerate() {
                let keys = tile.keys(extent, j);
                let on_diagonal = i64::from(keys.start) < diagonal.end && diagonal.start < i64::from(keys.end);
                if rank < blocks as usize || on_diagonal || keys.start < sinks {
                    row.push(j);
                }
            }
            row.sort_unstable();
            kept.append(&mut row);
            starts.push(kept.len() as u32);
        }
        let block = [tile.bq, tile.bk];
        let chosen = Mask::from_blocks(BlockTable { block, batch: batch_u, heads: heads_u, starts, columns: kept });
        SparsePlan::with_tile(&(mask.clone() & chosen), [batch, heads, seq_q, seq_kv], tile)
    }
}

/// The mean of every `size` rows of `[B, H, S, D]`, of those that there are in the last tile, in f32.
fn means(x: Tensor<4>, size: u32) -> Tensor<4> {
    let [b, h, s, d] = x.dims();
    let (size, x) = (size as usize, x.cast(DType::F32));
    let whole = s / size;
    let mut parts = Vec::new();
    if whole > 0 {
        let body = x.clone().slice([0..b, 0..h, 0..whole * size]).reshape([b, h, whole, size, d]);
        parts.push(body.mean_dim(3).reshape([b, h, whole, d]));
    }
    if whole * size < s {
        parts.push(x.slice([0..b, 0..h, whole * size..s]).mean_dim(2));
    }
    Tensor::cat(parts, 2)
}
