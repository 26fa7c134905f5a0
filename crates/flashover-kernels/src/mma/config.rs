//! Tiles, and what of a problem is compiled into a kernel.

use super::tile::{PIECE, PIECE_LEN, padded, pitch};
use crate::block_plan::TileSize;
use crate::device::DeviceTensor;
use crate::family::element::has_options;
use crate::family::tile_shape::TileShape;
use crate::family::two_passes::FEW_KEYS;
use crate::problem::{Element, Problem};
use crate::score::ScoreCode;

/// Rows of one matrix instruction.
pub(crate) const ROWS: usize = 16;

/// Columns of one matrix instruction.
pub(crate) const COLS: usize = 8;

/// Units of a warp.
pub(crate) const WARP: usize = 32;

/// Tiles that are held at a time: one is worked on while the next arrives.
pub(crate) const STAGES: usize = 2;

/// Head dimension, padded, beyond which the sums of a row take twice the registers.
pub(crate) const WIDE: usize = 128;

/// Sizes of a cube's tile, known when a kernel is compiled. Rows are what the cube owns, columns what it walks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MmaTile {
    /// Warps of a cube, one below the other.
    pub warps: usize,
    /// Blocks of 16 rows of a warp: a block of the other operand is read from shared memory once for all of them.
    pub blocks: usize,
    /// Columns of the tile.
    pub cols: usize,
    /// Columns whose scores a forward holds in registers at a time.
    pub part: usize,
}

impl MmaTile {
    /// Rows of the tile.
    pub const fn rows(&self) -> usize {
        self.warps * self.blocks * ROWS
    }

    /// Units of a cube.
    pub const fn units(&self) -> usize {
        self.warps * WARP
    }

    /// Rows and columns.
    pub(crate) const fn shape(&self) -> TileShape {
        TileShape { rows: self.rows(), cols: self.cols }
    }

    /// Whether a forward needs no more than the [plain](super::forward_plain) kernel has: elements of 16 bits, no options, no plan, no dense
    /// mask, and whole tiles of keys and of values copied in passes in which each unit takes one 16-byte piece and keeps its column. Padded,
    /// the dimensions are then 16, 32, 64, 128 or 256.
    pub(crate) fn has_plain_form(&self, problem: &Problem) -> bool {
        let in_passes = |dim: usize| {
            let per_row = padded(dim) / PIECE_LEN;
            self.units().is_multiple_of(per_row) && self.cols.is_multiple_of(self.units() / per_row)
        };
        problem.element != Element::F32
            && !has_options(problem)
            && problem.plan.is_none()
            && problem.mask.is_none()
            && in_passes(problem.head_dim)
            && in_passes(problem.value_dim)
    }

    /// Shared memory in bytes of a forward's cube: the queries, whose place the output takes, and stages of keys and values.
    pub(crate) fn forward_shared_bytes(&self, problem: &Problem) -> usize {
        let (k, v) = pitches(problem);
        self.rows() * k.max(v) + STAGES * self.cols * (k + v)
    }

    /// Shared memory in bytes of a cube that owns queries in a backward: they and the gradients of their outputs, and stages
    /// of keys and values.
    pub(crate) fn queries_shared_bytes(&self, problem: &Problem) -> usize {
        let (k, v) = pitches(problem);
        (self.rows() + STAGES * self.cols) * (k + v)
    }

    /// Shared memory in bytes of a cube that owns keys in a backward: they and their values, and stages of queries, gradients of
    /// their outputs, and two statistics.
    pub(crate) fn keys_shared_bytes(&self, problem: &Problem) -> usize {
        self.queries_shared_bytes(problem) + STAGES * statistics_bytes(self)
    }
}

impl core::fmt::Display for MmaTile {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "tile {}x{}, {} warps", self.rows(), self.cols, self.warps)
    }
}

/// Bytes between rows of keys and of values in shared memory.
fn pitches(problem: &Problem) -> (usize, usize) {
    let of = |dim| pitch(padded(dim), problem.element);
    (of(problem.head_dim), of(problem.value_dim))
}

/// Bytes of a stage's log-sum-exps and deltas.
pub(crate) const fn statistics_bytes(tile: &MmaTile) -> usize {
    2 * size_of::<f32>() * tile.cols
}

/// The tiles of a problem's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MmaConfig {
    /// Of the forward.
    pub forward: MmaTile,
    /// Of the backward's kernel that owns queries.
    pub queries: MmaTile,
    /// Of the backward's kernel that owns keys.
    pub keys: MmaTile,
}

impl MmaConfig {
    /// The tiles for a problem, and why.
    pub fn of(problem: &Problem) -> (Self, &'static str) {
        let tile = |warps, blocks, cols| MmaTile { warps, blocks, cols, part: cols };
        let small_plan =
            problem.plan.is_some_and(|plan| !plan.tile.bq.is_multiple_of(128) || !plan.tile.bk.is_multiple_of(128));
        let (deep, small) = (tile(4, 1, 32), tile(4, 1, 64));
        let all = |tile| MmaConfig { forward: tile, queries: tile, keys: tile };
        let dim = padded(problem.head_dim.max(problem.value_dim));
        if problem.element == Element::F32 {
            return Self::of_f32(problem, dim, small_plan);
        }
        // Which tile is fastest was measured: docs/measurements.md.
        if dim > WIDE {
            (all(deep), "more registers go to a row of so many elements")
        } else if small_plan {
            (all(small), "the tiles of the block plan are no multiple of larger ones")
        } else if problem.seq_q <= small.rows() {
            (all(small), "few queries")
        } else if dim > WIDE / 2 {
            let narrow = tile(4, 2, 32);
            let forward = MmaTile { part: 32, ..tile(4, 2, 64) };
            (MmaConfig { forward, queries: narrow, keys: small }, "the tiles measured fastest for such heads")
        } else {
            let narrow = tile(4, 2, 32);
            let large = MmaConfig { forward: tile(4, 2, 64), queries: narrow, keys: narrow };
            (large, "the tiles measured fastest for small heads")
        }
    }

    /// Those for elements of f32, which take twice the shared memory, and the registers of both their parts: up to 128 elements a row what
    /// a forward takes fits twice into 200 KB.
    fn of_f32(problem: &Problem, dim: usize, small_plan: bool) -> (Self, &'static str) {
        let tile = |blocks, cols| MmaTile { warps: 4, blocks, cols, part: cols };
        let (deep, small) = (tile(1, 16), tile(1, 32));
        let (forward, backward, why) = if dim > WIDE {
            (deep, deep, "more registers and memory go to a row of so many elements")
        } else if dim > WIDE / 2 {
            (small, deep, "two cubes of such heads share a multiprocessor")
        } else if small_plan {
            (small, small, "the tiles of the block plan are no multiple of larger ones")
        } else if problem.seq_q <= small.rows() {
            (small, small, "few queries")
        } else {
            (tile(2, 32), small, "small heads: values are taken apart once for two blocks of queries")
        };
        (MmaConfig { forward, queries: backward, keys: backward }, why)
    }

    /// Whether a tile of a plan consists of whole tiles, whichever way they lie.
    pub const fn divides(&self, plan: TileSize) -> bool {
        let (queries, keys) = (self.queries.shape(), self.keys.shape());
        self.forward.shape().divides(plan) && queries.divides(plan) && keys.divides(plan)
    }

    /// Units of the largest cube.
    pub fn units(&self) -> usize {
        self.forward.units().max(self.queries.units()).max(self.keys.units())
    }

    /// Shared memory of the largest cube in bytes.
    pub fn shared_bytes(&self, problem: &Problem) -> usize {
        let backward = self.queries.queries_shared_bytes(problem).max(self.keys.keys_shared_bytes(problem));
        self.forward.forward_shared_bytes(problem).max(backward)
    }
}

impl core::fmt::Display for MmaConfig {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "forward {}; backward {} and {}", self.forward, self.queries, self.keys)
    }
}

/// What of a problem and its tensors is compiled in, because it costs registers or changes how memory is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Compiled {
    pub tile: MmaTile,
    pub element: Element,
    /// Padded dimensions.
    pub head_dim: usize,
    pub value_dim: usize,
    /// Whether rows are read in 16-byte pieces.
    pub q_pieces: bool,
    pub k_pieces: bool,
    pub v_pieces: bool,
    /// Likewise the gradient of the output.
    pub do_pieces: bool,
    /// Whether a score is more than a product by a positive scale, or its probability is dropped.
    pub options: bool,
    /// The user's score function: one of the options.
    pub function: Option<ScoreCode>,
    /// Whether this is a backward with fewer keys than [`FEW_KEYS`], of 16 bits each.
    pub few_keys: bool,
}

impl Compiled {
    pub fn of(problem: &Problem, tile: MmaTile, [q, k, v]: [&DeviceTensor; 3], do_: Option<&DeviceTensor>) -> Self {
        let Problem { element, head_dim, value_dim, score, .. } = *problem;
        Compiled {
            tile,
            element,
            head_dim: padded(head_dim),
            value_dim: padded(value_dim),
            q_pieces: in_pieces(q),
            k_pieces: in_pieces(k),
            v_pieces: in_pieces(v),
            do_pieces: do_.is_none_or(in_pieces),
            options: has_options(problem),
            function: score.map(|score| score.code),
            few_keys: do_.is_some() && problem.seq_kv < FEW_KEYS && element != Element::F32,
        }
    }

    /// Whether the forward is the [plain](super::forward_plain) one: of a [plain](MmaTile::has_plain_form) problem, keys and values
    /// in 16-byte pieces, the rows of a tile within the 4 GB that a step in 32 bits reaches.
    pub fn is_plain(&self, problem: &Problem, [k, v]: [&DeviceTensor; 2]) -> bool {
        let near = |tensor: &DeviceTensor| tensor.strides[2].saturating_mul(2 * self.tile.cols) <= u32::MAX as usize;
        self.tile.has_plain_form(problem) && self.k_pieces && self.v_pieces && near(k) && near(v)
    }
}

/// Whether every row of a `[B, H, S, D]` tensor is a whole number of aligned 16-byte pieces.
fn in_pieces(tensor: &DeviceTensor) -> bool {
    let piece_len = PIECE / tensor.elem.size();
    let mut outer = tensor.shape.iter().zip(&tensor.strides).take(3);
    let aligned = outer.all(|(&size, &stride)| size <= 1 || stride.is_multiple_of(piece_len));
    let offset = tensor.handle.offset_start.unwrap_or(0) as usize;
    aligned && tensor.strides[3] == 1 && tensor.shape[3].is_multiple_of(piece_len) && offset.is_multiple_of(PIECE)
}

#[cfg(test)]
mod tests {
    use super::super::tile::DEPTH;
    use super::*;
    use crate::mask::Band;
    use crate::problem::Precision;
    use crate::score::{ScoreCode, ScoreUse, Softcap};

    /// Shared memory that a cube can have on sm86 and sm89, sm80, and sm90.
    const SM86: usize = 99 * 1024;
    const SM80: usize = 163 * 1024;
    const SM90: usize = 227 * 1024;

    #[test]
    fn tiles_of_f32_fit_the_shared_memory() {
        for (dim, forward, backward) in [
            (1, SM86, SM86),
            (64, SM86, SM86),
            (112, SM86, SM86),
            (128, SM86, SM80),
            (192, SM86, SM80),
            (256, SM80, SM90),
        ] {
            for seq_q in [1, 300] {
                let shape = |seq| [1, 2, seq, dim];
                let plain = Problem::new(shape(seq_q), shape(300), shape(300), Element::F32).unwrap();
                let problem = Problem { precision: Precision::Tf32x3, ..plain };
                let (config, why) = MmaConfig::of(&problem);
                let (queries, keys) =
                    (config.queries.queries_shared_bytes(&problem), config.keys.keys_shared_bytes(&problem));
                let found = config.forward.forward_shared_bytes(&problem);
                assert!(found <= forward && queries.max(keys) <= backward, "{dim}: {found}, {queries}, {keys}; {why}");
                assert_eq!(config.shared_bytes(&problem), found.max(queries).max(keys));
            }
        }
    }

    fn has_plain_form(problem: &Problem) -> bool {
        MmaConfig::of(problem).0.forward.has_plain_form(problem)
    }

    #[test]
    fn options_plans_and_masks_have_no_plain_form() {
        let shape = [2, 4, 300, 64];
        let plain = Problem::new(shape, shape, shape, Element::BF16).unwrap();
        let band = Band { causal: true, left: 100, sinks: 4, ..Band::default() };
        let hidden = Problem { band, key_lengths: true, learned_sinks: true, ..plain.clone() };
        assert!(has_plain_form(&plain) && has_plain_form(&hidden));
        let score = ScoreUse { code: ScoreCode::of::<Softcap>(), parameters: 1 };
        for (what, problem) in [
            ("softcap", Problem { softcap: Some(3.0), ..plain.clone() }),
            ("alibi", Problem { alibi: true, ..plain.clone() }),
            ("bias", Problem { bias: Some([1, 1, 300, 300]), ..plain.clone() }),
            ("mask", Problem { mask: Some([1, 1, 300, 300]), ..plain.clone() }),
            ("score", Problem { score: Some(score), ..plain.clone() }),
            ("negative scale", Problem { scale: -1.0, ..plain.clone() }),
            ("scale 0", Problem { scale: 0.0, ..plain.clone() }),
        ] {
            assert!(!has_plain_form(&problem), "{what}");
        }
    }

    #[test]
    fn rows_of_a_power_of_two_have_a_plain_form() {
        let dims = (1..=crate::problem::MAX_HEAD_DIM).filter(|&d| d.next_multiple_of(DEPTH).is_power_of_two());
        let all: Vec<_> = (1..=crate::problem::MAX_HEAD_DIM)
            .filter(|&d| {
                let shape = [1, 1, 300, d];
                has_plain_form(&Problem::new(shape, shape, [1, 1, 300, 64], Element::F16).unwrap())
            })
            .collect();
        assert_eq!(all, dims.collect::<Vec<_>>());
    }
}
