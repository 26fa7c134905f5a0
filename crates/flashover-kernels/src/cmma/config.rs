//! Tiles, and what of a problem is compiled into a kernel.

use super::tile::{EDGE, LANES, padded, pitch, score_pitch};
use crate::block_plan::TileSize;
use crate::device::{DeviceLimits, DeviceTensor};
use crate::family::element::has_options;
use crate::family::tile_shape::TileShape;
use crate::family::two_passes::FEW_KEYS;
use crate::problem::{Element, Problem};
use crate::score::ScoreCode;

/// Keys that one word of a plan's bitmap tells of: a tile takes whole words.
const WORD: usize = 32;

/// Registers of a unit that the sums of one operand may take: half of what NVIDIA's GPUs give it, the largest number of all.
const SUMS: usize = 128;

/// Sizes of a cube's tile, known when a kernel is compiled. Rows are what the cube owns, columns what it walks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CmmaTile {
    /// Planes of a cube, one below the other.
    pub planes: usize,
    /// Units of a plane.
    pub plane: usize,
    /// Blocks of 16 rows of a plane: a matrix of the other operand is read from shared memory once for all of them.
    pub blocks: usize,
    /// Columns of the tile.
    pub cols: usize,
    /// Rows, columns and depth of a matrix.
    pub edge: usize,
    /// Whether the two operands that the cube walks lie in shared memory side by side, or one after the other.
    pub apart: bool,
}

impl CmmaTile {
    /// Rows of the tile.
    pub const fn rows(&self) -> usize {
        self.planes * self.plane_rows()
    }

    /// Rows of a plane.
    pub(crate) const fn plane_rows(&self) -> usize {
        self.blocks * EDGE
    }

    /// Units of a cube.
    pub const fn units(&self) -> usize {
        self.planes * self.plane
    }

    /// Units that share a row.
    pub(crate) const fn row_units(&self) -> usize {
        self.plane / self.plane_rows()
    }

    /// Vectors of a row's scores that are one unit's.
    pub(crate) const fn row_vectors(&self) -> usize {
        self.cols / LANES / self.row_units()
    }

    /// Rows and columns.
    pub(crate) const fn shape(&self) -> TileShape {
        TileShape { rows: self.rows(), cols: self.cols }
    }

    /// Elements of the rows that the cube walks: where the second operand starts, and how many there are.
    pub(crate) const fn walked(&self, head_dim: usize, value_dim: usize) -> (usize, usize) {
        let (k, v) = (self.cols * pitch(head_dim), self.cols * pitch(value_dim));
        if self.apart { (k, k + v) } else { (0, if k > v { k } else { v }) }
    }

    /// Bytes of `tiles` tiles of scores and one of weights, and of what the cube walks.
    const fn working_bytes(&self, head_dim: usize, value_dim: usize, tiles: usize) -> usize {
        let scores = self.rows() * score_pitch(self.cols) * size_of::<f32>();
        2 * self.walked(head_dim, value_dim).1 + tiles * scores + 2 * self.rows() * pitch(self.cols)
    }

    /// Shared memory in bytes of a forward's cube: queries, keys, values, scores and probabilities.
    pub(crate) fn forward_shared_bytes(&self, problem: &Problem) -> usize {
        let (d, dv) = (padded(problem.head_dim), padded(problem.value_dim));
        2 * self.rows() * pitch(d) + self.working_bytes(d, dv, 1)
    }

    /// Shared memory in bytes of a cube that owns queries in a backward: they and the gradients of their outputs, keys, values,
    /// scores and their gradients, and weights.
    pub(crate) fn queries_shared_bytes(&self, problem: &Problem) -> usize {
        let (d, dv) = (padded(problem.head_dim), padded(problem.value_dim));
        2 * self.rows() * (pitch(d) + pitch(dv)) + self.working_bytes(d, dv, 2)
    }

    /// Shared memory in bytes of a cube that owns keys in a backward: likewise, and two statistics of each query.
    pub(crate) fn keys_shared_bytes(&self, problem: &Problem) -> usize {
        self.queries_shared_bytes(problem) + 2 * self.cols * size_of::<f32>()
    }
}

impl core::fmt::Display for CmmaTile {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "tile {}x{}, {} planes of {} units", self.rows(), self.cols, self.planes, self.plane)
    }
}

/// The tiles of a problem's kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CmmaConfig {
    /// Of the forward.
    pub forward: CmmaTile,
    /// Of the backward's kernel that owns queries.
    pub queries: CmmaTile,
    /// Of the backward's kernel that owns keys.
    pub keys: CmmaTile,
}

impl CmmaConfig {
    /// The tiles for a problem on a device, and why: of those that fit its shared memory the largest. Where none does they are the
    /// smallest, and [`check_limits`](super::check_limits) says what is missing.
    pub fn of(problem: &Problem, limits: &DeviceLimits) -> (Self, &'static str) {
        let edge = limits.cooperative_edge(problem.element).unwrap_or(EDGE);
        let plane = limits.plane_sizes[1].max(EDGE);
        // One block of rows a plane in a backward: two sums of up to 128 elements share its registers.
        let sizes = [
            (4, 2, 32, true),
            (4, 1, 32, true),
            (2, 1, 32, true),
            (2, 1, 32, false),
            (1, 1, 32, false),
            (1, 1, 16, false),
        ];
        let tiles = sizes.map(|(planes, blocks, cols, apart)| CmmaTile { planes, plane, blocks, cols, edge, apart });
        let fitting = |bytes: &dyn Fn(&CmmaTile) -> usize, usable: &dyn Fn(&CmmaTile) -> bool| {
            let fits = |tile: &&CmmaTile| {
                tile.units() <= limits.max_units
                    && bytes(tile) <= limits.max_shared_bytes
                    && problem.plan.is_none_or(|plan| tile.shape().divides(plan.tile))
                    && usable(tile)
            };
            let last = || tiles.iter().rfind(|tile| usable(tile)).unwrap_or(&tiles[0]);
            *tiles.iter().find(fits).unwrap_or_else(last)
        };
        let listed = problem.plan.is_some();
        let sums = |tile: &CmmaTile| tile.plane_rows() * padded(problem.value_dim) / plane;
        let whole = |size: usize| !listed || size.is_multiple_of(WORD);
        let many = problem.seq_q > 4 * EDGE;
        let config = CmmaConfig {
            forward: fitting(&|tile| tile.forward_shared_bytes(problem), &|tile| {
                (tile.blocks == 1 || many && sums(tile) <= SUMS) && whole(tile.cols)
            }),
            queries: fitting(&|tile| tile.queries_shared_bytes(problem), &|tile| tile.blocks == 1 && whole(tile.cols)),
            keys: fitting(&|tile| tile.keys_shared_bytes(problem), &|tile| tile.blocks == 1 && whole(tile.rows())),
        };
        let why = if config.forward.blocks == 2 {
            "the largest tiles whose sums stay in registers"
        } else if !many {
            "few queries"
        } else if config.forward.planes == 4 {
            "more registers go to a row of so many elements, or the device holds no larger tile"
        } else {
            "the device or the block plan takes no larger tile"
        };
        (config, why)
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

impl core::fmt::Display for CmmaConfig {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "forward {}; backward {} and {}", self.forward, self.queries, self.keys)
    }
}

/// What of a problem is compiled in, because it costs registers or changes how memory is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Compiled {
    pub tile: CmmaTile,
    /// Padded dimensions.
    pub head_dim: usize,
    pub value_dim: usize,
    /// Whether a score is more than a product by a positive scale, or its probability is dropped.
    pub options: bool,
    /// The user's score function: one of the options.
    pub function: Option<ScoreCode>,
    /// Whether a bias or a function may hide a score by −∞.
    pub hides: bool,
    /// Whether this is a backward with fewer keys than [`FEW_KEYS`].
    pub few_keys: bool,
}

impl Compiled {
    pub fn of(problem: &Problem, tile: CmmaTile, backward: bool) -> Self {
        let Problem { head_dim, value_dim, score, .. } = *problem;
        Compiled {
            tile,
            head_dim: padded(head_dim),
            value_dim: padded(value_dim),
            // Maxima are taken of products.
            options: has_options(problem),
            function: score.map(|score| score.code),
            hides: problem.bias.is_some() || score.is_some(),
            few_keys: backward && problem.seq_kv < FEW_KEYS,
        }
    }
}

/// Elements that are read at a time: 4 if every row of every tensor is a whole number of aligned vectors, else 1.
pub(crate) fn vector_size(tensors: &[&DeviceTensor]) -> usize {
    let whole = |tensor: &&DeviceTensor| {
        let mut outer = tensor.shape.iter().zip(&tensor.strides).take(3);
        let aligned = outer.all(|(&size, &stride)| size <= 1 || stride.is_multiple_of(LANES));
        let offset = tensor.handle.offset_start.unwrap_or(0) as usize;
        let row = (tensor.strides[3] == 1 || tensor.shape[3] == 1) && tensor.shape[3].is_multiple_of(LANES);
        aligned && row && offset.is_multiple_of(LANES * Element::F16.bytes())
    };
    if tensors.iter().all(whole) { LANES } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_plan::PlanShape;
    use crate::cmma::check_limits;

    fn limits(kilobytes: usize, plane: usize, edge: usize) -> DeviceLimits {
        DeviceLimits {
            name: "test".into(),
            max_bindings: 7,
            max_shared_bytes: kilobytes << 10,
            max_units: 1024,
            elements: vec![Element::F32, Element::F16],
            max_iterations: usize::MAX,
            hardware: true,
            ptx: false,
            matrix_elements: Vec::new(),
            matrix_tf32: false,
            matrix_loads: Vec::new(),
            async_copies: false,
            cooperative: vec![(Element::F16, edge)],
            plane_sizes: [plane; 2],
            plane_operations: true,
            wgmma: false,
        }
    }

    fn problem(seq_q: usize, d: usize, dv: usize) -> Problem {
        Problem::new([1, 2, seq_q, d], [1, 2, 300, d], [1, 2, 300, dv], Element::F16).unwrap()
    }

    #[test]
    fn some_tile_fits_every_dimension_on_every_device() {
        let dims = [1, 16, 17, 40, 59, 64, 72, 96, 128, 129, 192, 256];
        for (kilobytes, plane, edge) in
            [32, 48, 64, 100, 227].into_iter().flat_map(|kb| [(kb, 32, 16), (kb, 64, 16), (kb, 32, 8)])
        {
            let limits = limits(kilobytes, plane, edge);
            for (d, dv) in dims.into_iter().flat_map(|d| dims.map(|dv| (d, dv))) {
                for seq_q in [1, 64, 65, 4096] {
                    let problem = problem(seq_q, d, dv);
                    let (config, _) = CmmaConfig::of(&problem, &limits);
                    check_limits(&problem, &limits, config).unwrap_or_else(|error| panic!("{d}, {dv}: {error}"));
                    for tile in [config.forward, config.queries, config.keys] {
                        assert_eq!(tile.edge, edge);
                        assert!(tile.row_units().is_power_of_two(), "{tile}");
                        assert_eq!(tile.row_units() * tile.row_vectors() * LANES, tile.cols, "{tile}");
                        assert!(tile.cols.is_multiple_of(edge) && tile.plane_rows().is_multiple_of(edge), "{tile}");
                    }
                    let rows = config.forward.plane_rows();
                    assert!(rows * padded(dv) / plane <= SUMS, "{d}, {dv}: {}", config.forward);
                }
            }
        }
    }

    #[test]
    fn more_shared_memory_never_makes_tiles_smaller() {
        for (d, dv) in [(64, 64), (128, 128), (192, 128), (256, 256)] {
            let rows = [32, 48, 64, 100, 227].map(|kilobytes| {
                let (config, _) = CmmaConfig::of(&problem(4096, d, dv), &limits(kilobytes, 32, 16));
                [config.forward, config.queries, config.keys].map(|tile| tile.rows() * tile.cols)
            });
            for (smaller, larger) in rows.iter().zip(&rows[1..]) {
                assert!(smaller.iter().zip(larger).all(|(x, y)| x <= y), "{d}, {dv}: {rows:?}");
            }
            assert_ne!(rows[0], rows[4]);
        }
    }

    /// A word of a plan's bitmap is 32 keys: no cube may start within one.
    #[test]
    fn tiles_under_a_plan_are_whole_words() {
        for (side, kilobytes) in [32, 64, 128].into_iter().flat_map(|side| [(side, 48), (side, 100)]) {
            let plan = PlanShape {
                tile: TileSize { bq: side, bk: side },
                words: 16,
                points: 1,
                planes: [1, 1],
                column_words: 0,
            };
            let (problem, limits) = (Problem { plan: Some(plan), ..problem(300, 128, 128) }, limits(kilobytes, 32, 16));
            let (config, _) = CmmaConfig::of(&problem, &limits);
            check_limits(&problem, &limits, config).unwrap();
            assert!(config.forward.cols.is_multiple_of(WORD) && config.queries.cols.is_multiple_of(WORD), "{config}");
            assert!(config.keys.rows().is_multiple_of(WORD), "{config}");
        }
        // Nothing that whole words allow fits such heads there: the error says what is missing.
        let plan = TileSize { bq: 32, bk: 32 };
        let plan = PlanShape { tile: plan, words: 16, points: 1, planes: [1, 1], column_words: 0 };
        let (problem, limits) = (Problem { plan: Some(plan), ..problem(300, 256, 256) }, limits(32, 32, 16));
        let (config, _) = CmmaConfig::of(&problem, &limits);
        let error = check_limits(&problem, &limits, config).unwrap_err().to_string();
        assert!(error.starts_with("cmma kernel: expected at most 32768 bytes of shared memory on test"), "{error}");
    }
}
