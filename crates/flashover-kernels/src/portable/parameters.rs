//! Gradients of what shapes the scores: the bias, the ALiBi slopes, the learned sinks. Each is a sum in a fixed order by
//! the one cube that owns it: no atomics, and nothing of the scores' size in memory.

use cubecl::prelude::*;

use super::gradient::{Towards, operand_rows, score_gradients, statistics, two_products};
use super::tile::{PIECE, TileConfig, V4, is_hidden, store_weights, unit_place};
use crate::family::element::{Numbers, head_of, is_minus_infinity};
use crate::family::walk::{Side, single_step};
use crate::score::ScoreCode;

/// The bias's own shape; a size of 1 is broadcast, as is every dimension of that size.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct BiasShape {
    pub batch: u32,
    pub heads: u32,
    pub queries: u32,
    pub keys: u32,
}

/// `dbias = Σ ds` over the dimensions that the bias is broadcast along. The batch elements, heads and query tiles that read
/// a tile of the bias's own shape, in this order, are dealt to `parts` cubes, each of which walks the key tiles and sums in
/// registers. Where there are several parts, [`bias_sum_kernel`] adds them up.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn bias_gradient_kernel<E: Float>(
    q: &Tensor<E>,
    k: &Tensor<E>,
    v: &Tensor<E>,
    d_o: &Tensor<E>,
    bias: &Tensor<E>,
    scratch: &mut [u32],
    mut dbias: ComptimeOption<&mut [E]>,
    shape: BiasShape,
    parts: u32,
    n: Numbers,
    #[comptime] direct: bool,
    #[comptime] across_queries: bool,
    #[comptime] across_keys: bool,
    #[comptime] function: Option<ScoreCode>,
    #[comptime] tile: TileConfig,
    #[define(E)] _dtype: ElemType,
) {
    let (bq, bk) = comptime!((tile.rows() as u32, tile.cols() as u32));
    let (row_tiles, col_tiles) = (shape.queries.div_ceil(bq), shape.keys.div_ceil(bk));
    let (cube, part) = (CUBE_POS / parts as usize, (CUBE_POS % parts as usize) as u32);
    let head_tiles = row_tiles as usize * col_tiles as usize;
    if cube >= shape.batch as usize * shape.heads as usize * head_tiles {
        terminate!();
    }
    let own_head = (cube / head_tiles) as u32;
    let own_tile = cube % head_tiles;
    let own_i = (own_tile / col_tiles as usize) as u32 * bq;
    let own_j = (own_tile % col_tiles as usize) as u32 * bk;
    let (own_b, own_h) = (own_head / shape.heads, own_head % shape.heads);

    let mut weights = Shared::<[V4]>::new_slice(tile.weights_len());
    let mut stage = Shared::<[V4]>::new_slice(tile.stage_len());
    let (ty, tx) = unit_place(tile);
    let mut s = Array::<f32>::new(PIECE);
    let mut dp = Array::<f32>::new(PIECE);
    let mut sums = Array::<f32>::new(PIECE);
    #[unroll(tile.unroll)]
    for e in 0..PIECE {
        sums[e] = 0.0f32;
    }
    let biases = ComptimeOption::new_Some(bias);

    let batches = select(shape.batch == 1, n.batch, 1u32);
    let heads = select(shape.heads == 1, n.heads_q, 1u32);
    let (mut query_tiles, mut key_tiles) = (1u32.runtime(), 1u32.runtime());
    if across_queries {
        query_tiles = n.seq_q.div_ceil(bq);
    }
    if across_keys {
        key_tiles = n.seq_kv.div_ceil(bk);
    }
    let terms = batches * heads * query_tiles;
    let share = terms.div_ceil(parts);
    for term in part * share..min((part + 1) * share, terms) {
        let (x, y) = (term / query_tiles, term % query_tiles);
        let (b, h) = (own_b + x / heads, own_h + x % heads);
        let at = head_of::<E>(b, h, &*scratch, biases, n, true);
        let rows = operand_rows::<E>(q, k, v, d_o, b, h, n);
        let i0 = own_i + y * bq;
        let stats = statistics(i0 + ty, tile.row_units, at, &*scratch, n);
        for z in 0..key_tiles {
            let j0 = own_j + z * bk;
            let step = single_step(i0, j0, at, &*scratch, n, true, tile.shape());
            if !step.empty {
                two_products::<E>(q, k, v, d_o, rows, i0, j0, &mut s, &mut dp, &mut stage, tile);
                score_gradients::<E>(
                    &mut s,
                    &mut dp,
                    &stats,
                    i0 + ty,
                    j0 + tx,
                    step,
                    at,
                    &*scratch,
                    biases,
                    n,
                    Towards::Bias,
                    false,
                    Side::Queries,
                    true,
                    function,
                    tile,
                );
                #[unroll(tile.unroll)]
                for e in 0..PIECE {
                    sums[e] += select(is_hidden(dp[e]), 0.0f32, dp[e]);
                }
            }
        }
    }
    store_weights(&sums, &mut weights, tile);
    sync_cube();

    // The tile's sums, along the rows or the columns where the bias is broadcast along them.
    let base = own_head as usize * shape.queries as usize;
    let elements = shape.batch as usize * shape.heads as usize * shape.queries as usize * shape.keys as usize;
    let (mut rows, mut cols) = (bq.runtime(), bk.runtime());
    if across_queries {
        rows = 1u32.runtime();
    }
    if across_keys {
        cols = 1u32.runtime();
    }
    let mut x = UNIT_POS;
    while x < rows * cols {
        let (row, col) = (x / cols, x % cols);
        if own_i + row < shape.queries && own_j + col < shape.keys {
            let sum = bias_sum(&weights, row, col, across_queries, across_keys, tile);
            let place = (base + (own_i + row) as usize) * shape.keys as usize + (own_j + col) as usize;
            if direct {
                dbias.as_mut().unwrap()[place] = E::cast_from(sum);
            } else {
                scratch[n.bias_partials_at + part as usize * elements + place] = u32::reinterpret(sum);
            }
        }
        x += comptime!(tile.units() as u32);
    }
}

/// A tile's sum for element `(row, col)` of the bias: over all rows, or all columns, where it is broadcast along them.
#[cube]
fn bias_sum(
    weights: &Shared<[V4]>,
    row: u32,
    col: u32,
    #[comptime] across_queries: bool,
    #[comptime] across_keys: bool,
    #[comptime] tile: TileConfig,
) -> f32 {
    let mut sum = 0.0f32;
    let (mut row_end, mut col_end) = (row + 1, col + 1);
    if across_queries {
        row_end = comptime!(tile.rows() as u32).runtime();
    }
    if across_keys {
        col_end = comptime!(tile.cols() as u32).runtime();
    }
    for j in col..col_end {
        for i in row..row_end {
            let group = comptime!(tile.row_units as u32);
            let v = weights[(j * comptime!(tile.weights_stride() as u32) + i % group) as usize];
            sum += v.extract_dynamic((i / group) as usize);
        }
    }
    sum
}

/// `dbias` from its partial sums, added in order. A unit an element.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn bias_sum_kernel<E: Float>(
    scratch: &[u32],
    dbias: &mut [E],
    elements: usize,
    parts: u32,
    n: Numbers,
    #[define(E)] _dtype: ElemType,
) {
    let x = ABSOLUTE_POS;
    if x < elements {
        let mut sum = 0.0f32;
        for part in 0..parts {
            sum += f32::reinterpret(scratch[n.bias_partials_at + part as usize * elements + x]);
        }
        dbias[x] = E::cast_from(sum);
    }
}

/// The gradient of a bias that is the same for all keys: a sum over whole rows. `Σⱼ dsⱼ` of a row is `dlse + delta · σ`, with `σ`
/// the share of the learned sink in the denominator: probabilities times `dp` sum to `delta + dlse`, and probabilities to
/// `1 − σ`. Summed element by element the same is what is left of a cancellation. A cube an element: every
/// unit sums its stride of the rows, then the first one adds the units up.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn bias_rows_kernel<E: Float>(
    scratch: &[u32],
    dlse: ComptimeOption<&Tensor<f32>>,
    dbias: &mut [E],
    shape: BiasShape,
    terms: u32,
    n: Numbers,
    #[comptime] with_dlse: bool,
    #[comptime] units: usize,
    #[define(E)] _dtype: ElemType,
) {
    let element = CUBE_POS as u32;
    if element >= shape.batch * shape.heads * shape.queries {
        terminate!();
    }
    let (own_i, own_head) = (element % shape.queries, element / shape.queries);
    let (own_h, own_b) = (own_head % shape.heads, own_head / shape.heads);
    let queries = select(shape.queries == 1, n.seq_q, 1u32);
    let heads = n.heads_q / shape.heads;
    let mut sum = 0.0f32;
    let mut term = UNIT_POS;
    while term < terms {
        // Dimensions of size 1 are summed over, the others are the element's own.
        let (i, head) = (own_i + term % queries, term / queries);
        let (h, b) = (own_h + head % heads, own_b + head / heads);
        let row = (b as usize * n.heads_q as usize + h as usize) * n.seq_q as usize + i as usize;
        let lse = f32::reinterpret(scratch[n.lse_at + row]);
        if !is_minus_infinity(lse) {
            let mut share = 0.0f32;
            if n.sinks_at != 0 {
                share = sink_share(lse, h as usize, row, scratch, n);
            }
            sum += f32::reinterpret(scratch[n.delta_at + row]) * share;
            if with_dlse {
                let dlse = dlse.unwrap();
                sum += dlse[b as usize * dlse.stride(0) + h as usize * dlse.stride(1) + i as usize * dlse.stride(2)];
            }
        }
        term += comptime!(units as u32);
    }
    let total = sum_of_units(sum, units);
    if UNIT_POS == 0 {
        dbias[element as usize] = E::cast_from(total);
    }
}

/// The learned sink's share of a row's denominator.
#[cube]
fn sink_share(lse: f32, head: usize, row: usize, scratch: &[u32], n: Numbers) -> f32 {
    let sink = f32::reinterpret(scratch[n.sinks_at + head]);
    (sink - lse).exp() * f32::reinterpret(scratch[n.norm_at + row])
}

/// The sum of what the units of a cube hold, in their order: the first unit's to use, 0 elsewhere.
#[cube]
pub(super) fn sum_of_units(sum: f32, #[comptime] units: usize) -> f32 {
    let mut partial = Shared::<[f32]>::new_slice(units);
    partial[UNIT_POS as usize] = sum;
    sync_cube();
    let mut total = 0.0f32;
    if UNIT_POS == 0 {
        for unit in 0..units {
            total += partial[unit];
        }
    }
    total
}

/// What [`head_sums_kernel`] adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum HeadSum {
    /// `dsink = −Σ exp(sink − lse) · delta` over the rows of a head.
    Sinks,
    /// The query tiles' shares of the slope's gradient.
    Slopes,
}

/// The gradient of a number per query head, a sum over the batch and over `rows` entries of each batch element. A cube a
/// head: every unit sums its stride of the entries, then the first one adds the units up.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn head_sums_kernel(
    scratch: &[u32],
    gradient: &mut [f32],
    rows: u32,
    n: Numbers,
    #[comptime] what: HeadSum,
    #[comptime] units: usize,
) {
    let h = CUBE_POS;
    if h >= n.heads_q as usize {
        terminate!();
    }
    let mut sum = 0.0f32;
    for b in 0..n.batch {
        let base = (b as usize * n.heads_q as usize + h) * rows as usize;
        let mut x = UNIT_POS;
        while x < rows {
            let at = base + x as usize;
            match comptime!(what) {
                HeadSum::Sinks => {
                    let lse = f32::reinterpret(scratch[n.lse_at + at]);
                    if !is_minus_infinity(lse) {
                        let p = sink_share(lse, h, at, scratch, n);
                        sum -= p * f32::reinterpret(scratch[n.delta_at + at]);
                    }
                }
                HeadSum::Slopes => {
                    sum += f32::reinterpret(scratch[n.slope_partials_at + at]);
                }
            }
            x += comptime!(units as u32);
        }
    }
    let total = sum_of_units(sum, units);
    if UNIT_POS == 0 {
        gradient[h] = total;
    }
}
