//! Tiles: what a cube holds in shared memory and what a unit holds in registers.
//!
//! A cube is `row_units × col_units` units. Unit `(ty, tx)` owns a 4×4 piece of a tile of `4·row_units` rows and
//! `4·col_units` columns: rows `ty + r·row_units` and columns `tx + c·col_units`. The strides keep neighbouring units
//! on neighbouring banks. Rows are the side that the cube owns (queries in the forward and in dQ, keys in dK and dV),
//! columns are the side that it loops over, so that all kernels are made of the same two products.
//!
//! Shared memory holds two regions of vectors of 4 lanes:
//! - *weights* `[cols][row_units]`: one tile of probabilities or of score gradients, transposed, a vector per 4 rows;
//! - *stage*: the chunk of the operands that is being multiplied.

use cubecl::prelude::*;

use crate::block_plan::TileSize;
use crate::family::tile_shape::TileShape;
use crate::problem::MAX_HEAD_DIM;

/// The one vector of the portable kernels: WGSL has nothing wider.
pub(crate) type V4 = Vector<f32, Const<4>>;

/// Rows, and columns, of a unit's piece of a tile.
pub(crate) const LANES: usize = 4;

/// Elements of a unit's piece of a tile.
pub(crate) const PIECE: usize = LANES * LANES;

/// Steps of the innermost loops that are always unrolled: enough to keep a software GPU from counting its way through
/// them, few enough for its compiler.
pub(crate) const STEP: usize = 4;

/// What the weights tile holds where a score is hidden. A probability never gets there, nor does the gradient of a
/// score that is not about to overflow; a NaN differs from it, so a visible NaN stays visible.
pub(crate) const HIDDEN: f32 = f32::MAX;

/// Whether a weight is [`HIDDEN`]. By its bits, as in all tests here that a NaN may meet: WGSL's comparisons of floats are
/// free to take a NaN for any number.
#[cube]
pub(crate) fn is_hidden(weight: f32) -> bool {
    u32::reinterpret(weight) == 0x7f7f_ffffu32
}

/// Sizes of a cube's tile, known when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TileConfig {
    /// Units along the rows; the tile has four times as many rows.
    pub row_units: usize,
    /// Units along the columns; the tile has four times as many columns.
    pub col_units: usize,
    /// Elements of the head dimension that are multiplied at a time.
    pub depth: usize,
    /// Whether the loops over registers are unrolled: real GPUs need it, a software GPU compiles for ages.
    pub unroll: bool,
}

impl TileConfig {
    /// 64×32 on 128 units: the tile for GPUs.
    pub const LARGE: TileConfig = TileConfig { row_units: 16, col_units: 8, depth: 16, unroll: true };
    /// 32×32 on 64 units: fewer queries, or fewer units.
    pub const SMALL: TileConfig = TileConfig { row_units: 8, col_units: 8, depth: 16, unroll: true };
    /// 32×32 on 64 units for software GPUs, whose compilers choke on unrolled loops.
    pub const SOFTWARE: TileConfig = TileConfig { unroll: false, ..TileConfig::SMALL };

    /// Rows of the tile.
    pub const fn rows(&self) -> usize {
        LANES * self.row_units
    }

    /// Columns of the tile, which is also the width of a chunk of values.
    pub const fn cols(&self) -> usize {
        LANES * self.col_units
    }

    /// Rows and columns.
    pub(crate) const fn shape(&self) -> TileShape {
        TileShape { rows: self.rows(), cols: self.cols() }
    }

    /// Whether a tile of a plan consists of whole tiles, whichever way they lie.
    pub const fn divides(&self, plan: TileSize) -> bool {
        self.shape().divides(plan)
    }

    /// Units of a cube.
    pub const fn units(&self) -> usize {
        self.row_units * self.col_units
    }

    /// Vectors between the columns of the weights: one more than needed, against bank conflicts.
    pub(crate) const fn weights_stride(&self) -> usize {
        self.row_units + 1
    }

    /// Vectors of the weights region.
    pub(crate) const fn weights_len(&self) -> usize {
        self.cols() * self.weights_stride()
    }

    /// Where the second operand of a chunk of scores starts in the stage.
    pub(crate) const fn stage_cols(&self) -> usize {
        self.depth * (self.row_units + 1)
    }

    /// Vectors of the stage: a chunk of both operands of the scores, or a chunk of values.
    pub(crate) const fn stage_len(&self) -> usize {
        let scores = self.stage_cols() + self.depth * (self.col_units + 1);
        let values = self.cols() * self.col_units;
        if scores > values { scores } else { values }
    }

    /// Shared memory of a cube in bytes.
    pub const fn shared_bytes(&self) -> usize {
        (self.weights_len() + self.stage_len()) * LANES * size_of::<f32>()
    }

    /// Chunks of `cols` elements that a unit has accumulators for: those that cover the head dimension where loops over
    /// them are unrolled, else as many as any head has, so that one kernel serves all.
    pub(crate) const fn chunks(&self, dim: usize) -> usize {
        if self.unroll { dim.div_ceil(self.cols()) } else { MAX_HEAD_DIM.div_ceil(self.cols()) }
    }
}

impl core::fmt::Display for TileConfig {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "tile {}x{}, depth {}, {} units", self.rows(), self.cols(), self.depth, self.units())
    }
}

/// Rows of one head in a tensor: element `(row, d)` stands at `base + row·row_stride + d·col_stride`.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Rows {
    pub base: usize,
    pub row_stride: usize,
    pub col_stride: usize,
    /// Rows that exist.
    pub rows: u32,
    /// Elements of a row.
    pub dim: u32,
}

/// The rows of head `head` of batch element `batch` of a `[B, H, S, D]` tensor.
#[cube]
pub(crate) fn head_rows<E: Float>(tensor: &Tensor<E>, batch: u32, head: u32, rows: u32, dim: u32) -> Rows {
    Rows {
        base: batch as usize * tensor.stride(0) + head as usize * tensor.stride(1),
        row_stride: tensor.stride(2),
        col_stride: tensor.stride(3),
        rows,
        dim,
    }
}

/// Chunks of a head dimension of `dim` that there are, of the `chunks` that a unit has accumulators for.
#[cube]
pub(crate) fn chunk_count(dim: u32, #[comptime] chunks: usize, #[comptime] tile: TileConfig) -> usize {
    if tile.unroll { constant(chunks) } else { dim.div_ceil(comptime!(tile.cols() as u32)) as usize }
}

/// A number known when a kernel is compiled, as one of the kernel's own.
#[cube]
fn constant(#[comptime] x: usize) -> usize {
    intrinsic!(|scope| x.into_expand(scope))
}

/// This unit's `(ty, tx)`.
#[cube]
pub(crate) fn unit_place(#[comptime] tile: TileConfig) -> (u32, u32) {
    let col_units = comptime!(tile.col_units as u32);
    (UNIT_POS / col_units, UNIT_POS % col_units)
}

/// Loads `[4·groups rows, depth]` from row `row` and element `d` on, zero outside the tensor, as
/// `stage[at + d·(groups + 1) + g] = rows g, g + groups, g + 2·groups, g + 3·groups`.
#[cube]
pub(crate) fn load_transposed<E: Float>(
    tensor: &Tensor<E>,
    from: Rows,
    row: u32,
    d: u32,
    stage: &mut Shared<[V4]>,
    #[comptime] at: usize,
    #[comptime] groups: usize,
    #[comptime] tile: TileConfig,
) {
    let depth = comptime!(tile.depth as u32);
    let vectors = comptime!((groups * tile.depth) as u32);
    let mut e = UNIT_POS;
    while e < vectors {
        let (g, dd) = (e / depth, e % depth);
        let mut v = V4::new(0.0f32);
        if d + dd < from.dim {
            let column = from.base + (d + dd) as usize * from.col_stride;
            #[unroll]
            for r in 0..LANES {
                let i = row + g + comptime!((r * groups) as u32);
                if i < from.rows {
                    v.insert(r, f32::cast_from(tensor[column + i as usize * from.row_stride]));
                }
            }
        }
        stage[at + (dd * comptime!(groups as u32 + 1) + g) as usize] = v;
        e += comptime!(tile.units() as u32);
    }
}

/// Loads `[cols rows, cols elements]` from row `row` and element `d` on, zero outside the tensor, as
/// `stage[j·col_units + x] = elements 4x .. 4x + 4 of row j`.
#[cube]
pub(crate) fn load_values<E: Float>(
    tensor: &Tensor<E>,
    from: Rows,
    row: u32,
    d: u32,
    stage: &mut Shared<[V4]>,
    #[comptime] tile: TileConfig,
) {
    let col_units = comptime!(tile.col_units as u32);
    let mut e = UNIT_POS;
    while e < comptime!((tile.cols() * tile.col_units) as u32) {
        let (j, x) = (row + e / col_units, d + (e % col_units) * comptime!(LANES as u32));
        let mut v = V4::new(0.0f32);
        if j < from.rows {
            let start = from.base + j as usize * from.row_stride;
            #[unroll]
            for lane in 0..LANES {
                let x = x + comptime!(lane as u32);
                if x < from.dim {
                    v.insert(lane, f32::cast_from(tensor[start + x as usize * from.col_stride]));
                }
            }
        }
        stage[e as usize] = v;
        e += comptime!(tile.units() as u32);
    }
}

/// `piece = A · Bᵀ` over the head dimension: `A` from row `row_a` on, `B` from row `row_b` on.
///
/// `piece[c·4 + r]` is the score of this unit's row `r` and column `c`.
#[cube]
pub(crate) fn product_scores<E: Float>(
    a: &Tensor<E>,
    from_a: Rows,
    row_a: u32,
    b: &Tensor<E>,
    from_b: Rows,
    row_b: u32,
    piece: &mut Array<f32>,
    stage: &mut Shared<[V4]>,
    #[comptime] tile: TileConfig,
) {
    let (ty, tx) = unit_place(tile);
    let mut sums = Array::<V4>::new(LANES);
    let mut sum = Array::<V4>::new(LANES); // of this chunk: short sums lose less to rounding than one long one
    #[unroll]
    for c in 0..LANES {
        sums[c] = V4::new(0.0f32);
    }
    let mut d = 0u32;
    while d < from_a.dim {
        #[unroll]
        for c in 0..LANES {
            sum[c] = V4::new(0.0f32);
        }
        sync_cube();
        load_transposed::<E>(a, from_a, row_a, d, stage, 0usize, tile.row_units, tile);
        load_transposed::<E>(b, from_b, row_b, d, stage, tile.stage_cols(), tile.col_units, tile);
        sync_cube();
        #[unroll(tile.unroll)]
        for step in 0..comptime!(tile.depth / STEP) {
            #[unroll]
            for part in 0..STEP {
                let dd = step * STEP + part;
                let x = stage[dd * comptime!(tile.row_units + 1) + ty as usize];
                let y = stage[comptime!(tile.stage_cols()) + dd * comptime!(tile.col_units + 1) + tx as usize];
                #[unroll]
                for c in 0..LANES {
                    sum[c] += x * V4::new(y.extract(c));
                }
            }
        }
        #[unroll]
        for c in 0..LANES {
            sums[c] += sum[c];
        }
        d += comptime!(tile.depth as u32);
    }
    #[unroll]
    for c in 0..LANES {
        #[unroll]
        for r in 0..LANES {
            piece[comptime!(c * LANES + r)] = sums[c].extract(r);
        }
    }
}

/// Stores this unit's piece of a tile as weights. The caller synchronizes before and after.
#[cube]
pub(crate) fn store_weights(piece: &Array<f32>, weights: &mut Shared<[V4]>, #[comptime] tile: TileConfig) {
    let (ty, tx) = unit_place(tile);
    #[unroll]
    for c in 0..LANES {
        let mut v = V4::new(0.0f32);
        #[unroll]
        for r in 0..LANES {
            v.insert(r, piece[comptime!(c * LANES + r)]);
        }
        let j = tx as usize + comptime!(c * tile.col_units);
        weights[j * comptime!(tile.weights_stride()) + ty as usize] = v;
    }
}

/// `sums += W · B`: the weights times the rows of `B` from `row` on, `chunks` chunks of its elements.
///
/// `sums[chunk·4 + r]` are the elements `chunk·cols + 4·tx ..+ 4` of this unit's row `r`. Where `tested`, hidden weights
/// are skipped, so that what stands in rows of `B` that a row does not see (NaN, say) never reaches it.
#[cube]
pub(crate) fn product_values<E: Float>(
    weights: &Shared<[V4]>,
    b: &Tensor<E>,
    from: Rows,
    row: u32,
    tested: bool,
    sums: &mut Array<V4>,
    stage: &mut Shared<[V4]>,
    #[comptime] chunks: usize,
    #[comptime] tile: TileConfig,
) {
    let (ty, tx) = unit_place(tile);
    #[unroll(tile.unroll)]
    for chunk in 0..chunk_count(from.dim, chunks, tile) {
        sync_cube();
        load_values::<E>(b, from, row, chunk as u32 * comptime!(tile.cols() as u32), stage, tile);
        sync_cube();
        let mut sum = Array::<V4>::new(LANES); // of this tile: short sums lose less to rounding than one long one
        #[unroll]
        for r in 0..LANES {
            sum[r] = V4::new(0.0f32);
        }
        if tested {
            for step in 0..comptime!(tile.cols() / STEP) {
                #[unroll]
                for part in 0..STEP {
                    let j = step * STEP + part;
                    let w = weights[j * comptime!(tile.weights_stride()) + ty as usize];
                    let v = stage[j * tile.col_units + tx as usize];
                    #[unroll]
                    for r in 0..LANES {
                        if !is_hidden(w.extract(r)) {
                            sum[r] += v * V4::new(w.extract(r));
                        }
                    }
                }
            }
        } else {
            for step in 0..comptime!(tile.cols() / STEP) {
                #[unroll]
                for part in 0..STEP {
                    let j = step * STEP + part;
                    let w = weights[j * comptime!(tile.weights_stride()) + ty as usize];
                    let v = stage[j * tile.col_units + tx as usize];
                    #[unroll]
                    for r in 0..LANES {
                        sum[r] += v * V4::new(w.extract(r));
                    }
                }
            }
        }
        #[unroll]
        for r in 0..LANES {
            sums[chunk * LANES + r] += sum[r];
        }
    }
}

/// Writes 4 neighbouring elements from `d` on of a row of a contiguous tensor: `x · factor`, or 0 where not `seen`.
#[cube]
pub(crate) fn store_lanes<E: Float>(x: V4, factor: f32, seen: bool, out: &mut [E], row: usize, d: u32, dim: u32) {
    #[unroll]
    for lane in 0..LANES {
        let d = d + comptime!(lane as u32);
        if d < dim {
            out[row * dim as usize + d as usize] = E::cast_from(select(seen, x.extract(lane) * factor, 0.0f32));
        }
    }
}

/// `x` of each row becomes its maximum over the units that share the row. The weights are free before and after.
#[cube]
pub(crate) fn share_maximum(x: &mut Array<f32>, weights: &mut Shared<[V4]>, #[comptime] tile: TileConfig) {
    let (ty, tx) = unit_place(tile);
    weights[(tx * comptime!(tile.row_units as u32) + ty) as usize] = lanes_of(&*x);
    sync_cube();
    for other in 0..tile.col_units {
        let y = weights[other * tile.row_units + ty as usize];
        #[unroll]
        for r in 0..LANES {
            x[r] = max(x[r], y.extract(r));
        }
    }
    sync_cube();
}

/// `x` of each row becomes its sum over the units that share the row, in their order.
#[cube]
pub(crate) fn share_sum(x: &mut Array<f32>, weights: &mut Shared<[V4]>, #[comptime] tile: TileConfig) {
    let (ty, tx) = unit_place(tile);
    sync_cube();
    weights[(tx * comptime!(tile.row_units as u32) + ty) as usize] = lanes_of(&*x);
    sync_cube();
    let mut sum = V4::new(0.0f32);
    for other in 0..tile.col_units {
        sum += weights[other * tile.row_units + ty as usize];
    }
    #[unroll]
    for r in 0..LANES {
        x[r] = sum.extract(r);
    }
}

#[cube]
fn lanes_of(x: &Array<f32>) -> V4 {
    let mut v = V4::new(0.0f32);
    #[unroll]
    for r in 0..LANES {
        v.insert(r, x[r]);
    }
    v
}
