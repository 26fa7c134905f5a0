//! Tiles of the Hopper kernels.

use super::messages::LINE;
use super::sections::tile_costs;
use crate::block_plan::TileSize;
use crate::family::tile_shape::TileShape;
use crate::problem::{Element, Problem};

/// Elements of a row of a piece: 128 bytes, the width that the copy engine swizzles.
pub(crate) const PIECE: usize = 64;

/// Threads of a warpgroup.
pub(crate) const WARPGROUP: usize = 128;

/// Rows of a warpgroup's products.
pub(crate) const ROWS: usize = 64;

/// Shared memory that a cube may have on sm90, in bytes.
pub(super) const SHARED: usize = 232_448;

/// Head dimensions that products are made for. Others are padded to the next; the copy engine writes the zeros.
const HEAD_DIMS: [usize; 5] = [64, 96, 128, 192, 256];

/// Keys a query sees, from which on three warpgroups were measured to be faster than two (docs/measurements.md).
const LONG: usize = 4096;

/// Query tiles of a head from which on less than an eighth of their rows are past the end: packing heads has nothing to save.
const MANY_TILES: usize = 8;

/// What a barrier tells of: that a buffer of queries, a stage of keys or one of values has arrived, or that its place is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    Queries,
    Keys,
    Values,
    FreeQueries,
    FreeKeys,
    FreeValues,
}

/// Keys that a query sees on average, as far as the band tells.
fn mean_keys(problem: &Problem) -> usize {
    let Problem { seq_q, seq_kv, band, .. } = *problem;
    let hidden = if band.causal { seq_q.min(seq_kv) / 2 } else { 0 };
    let window = band.left as usize + band.right as usize + 1 + band.sinks as usize;
    (seq_kv - hidden).min(window)
}

/// Shape of a forward: known when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HopperConfig {
    /// Element type of the operands.
    pub element: Element,
    /// Warpgroups that compute, of 64 queries each.
    pub consumers: usize,
    /// Keys of a tile.
    pub bk: usize,
    /// Head dimension of queries and keys, padded to what a product takes.
    pub head_dim: usize,
    /// Head dimension of values, likewise.
    pub value_dim: usize,
    /// Tiles of keys in flight.
    pub stages: usize,
    /// Whether only a positive scale changes a score, and no dense mask hides: what else there is costs registers.
    pub plain: bool,
    /// Whether a block plan lists the tiles.
    pub listed: bool,
    /// Query heads, of those that share a key head, whose queries lie in one tile; 1 where each head has tiles of its own.
    /// FlashAttention-3 calls more PackGQA.
    pub packed: usize,
}

impl HopperConfig {
    /// Tiles for a problem whose head dimensions are multiples of 8, and why.
    pub fn of(problem: &Problem) -> (Self, String) {
        let (config, why) = Self::unpacked(problem);
        let cost = |packed: usize| {
            let packed_config = HopperConfig { packed, ..config };
            let steps: usize = tile_costs(problem, packed_config).into_iter().sum();
            problem.heads_q / packed * steps
        };
        let group = problem.group();
        if group == 1 || problem.seq_q >= MANY_TILES * config.rows() {
            return (config, why.into());
        }
        let alone = cost(1);
        let choices = (2..=group.min(config.rows())).filter(|&packed| group.is_multiple_of(packed));
        let (least, packed) = choices.map(|packed| (cost(packed), packed)).min().unwrap_or((alone, 1));
        // A smaller difference is not worth a kernel of its own.
        if 8 * least > 7 * alone {
            (config, why.into())
        } else if config.listed {
            (config, format!("{why}; heads keep tiles of their own, for which the plan lists blocks"))
        } else {
            let why = format!("{why}; heads that share keys share tiles: {least} steps a batch element, not {alone}");
            (HopperConfig { packed, ..config }, why)
        }
    }

    /// The same with tiles for each head.
    fn unpacked(problem: &Problem) -> (Self, &'static str) {
        let Problem {
            head_dim,
            value_dim,
            softcap,
            alibi,
            bias,
            score,
            mask,
            plan,
            learned_sinks,
            dropout,
            scale,
            element,
            ..
        } = *problem;
        let shaped = softcap.is_some() || alibi || bias.is_some() || score.is_some() || learned_sinks || scale <= 0.0;
        let plain = !(shaped || mask.is_some() || dropout.is_some());
        let padded = |dim: usize| HEAD_DIMS.into_iter().find(|&native| native >= dim).unwrap_or(dim);
        let config = HopperConfig {
            element,
            consumers: 2,
            bk: 128,
            head_dim: padded(head_dim),
            value_dim: padded(value_dim),
            stages: 2,
            plain,
            listed: plan.is_some(),
            packed: 1,
        };
        let narrow = config.head_dim.max(config.value_dim) == HEAD_DIMS[0];
        if narrow && plain && plan.is_none() && problem.seq_q >= LONG / 2 && mean_keys(problem) >= LONG {
            let why =
                "walks long enough that a third warpgroup pays, which leaves registers for the scores of 112 keys";
            return (HopperConfig { consumers: 3, bk: 112, ..config }, why);
        }
        // A thread holds the scores and weights of `bk` keys beside its output.
        let (bk, why) = match config.value_dim.max(config.head_dim) {
            ..=128 if plain => (128, "registers hold the scores of 128 keys beside the output"),
            ..=192 => (96, "registers hold the scores of 96 keys beside the output"),
            _ => (64, "registers hold the scores of 64 keys beside the output"),
        };
        match plan {
            Some(plan) if !(plan.tile.bk as usize).is_multiple_of(bk) => {
                (HopperConfig { bk: 64, ..config }, "whole tiles of the plan")
            }
            _ => (HopperConfig { bk, ..config }, why),
        }
    }

    /// Rows of a tile.
    pub const fn rows(&self) -> usize {
        self.consumers * ROWS
    }

    /// Queries of a tile, of each of its heads.
    pub const fn bq(&self) -> usize {
        self.rows() / self.packed
    }

    /// Rows of a tile that are a query's: the heads may not divide all.
    pub(crate) const fn boxed_rows(&self) -> usize {
        self.packed * self.bq()
    }

    /// Whether a tile of a plan consists of whole tiles.
    pub const fn divides(&self, plan: TileSize) -> bool {
        let (bq, bk) = (plan.bq as usize, plan.bk as usize);
        bq.is_multiple_of(self.bq()) && bk.is_multiple_of(self.bk)
    }

    pub(crate) const fn shape(&self) -> TileShape {
        TileShape { rows: self.bq(), cols: self.bk }
    }

    /// Pieces of a row of `dim` elements.
    pub(crate) const fn pieces(dim: usize) -> usize {
        dim.div_ceil(PIECE)
    }

    /// Units of a cube: the consumers and the producer.
    pub const fn units(&self) -> usize {
        (self.consumers + 1) * WARPGROUP
    }

    /// Elements of the query tile, of a key tile and of a value tile in shared memory.
    pub(crate) const fn elements(&self) -> [usize; 3] {
        let (d, dv) = (Self::pieces(self.head_dim) * PIECE, Self::pieces(self.value_dim) * PIECE);
        [self.rows() * d, self.bk * d, self.bk * dv]
    }

    /// Query tiles in flight: the next comes while the last is still worked on, where there is room for it.
    pub const fn query_buffers(&self) -> usize {
        if self.bytes_with(2, self.stages) <= SHARED { 2 } else { 1 }
    }

    /// Tiles of values in flight: one more than of keys, which are done with earlier, where there is room for it.
    pub const fn value_stages(&self) -> usize {
        if self.bytes_with(self.query_buffers(), self.stages + 1) <= SHARED { self.stages + 1 } else { self.stages }
    }

    /// Barriers that tell that something has arrived; as many behind them tell that its place is free.
    pub(crate) const fn barriers(&self) -> usize {
        self.query_buffers() + self.stages + self.value_stages()
    }

    /// Arrivals that end a phase, of every barrier: one tells that something has arrived, every warp of the consumers that its place is free.
    pub(crate) fn arrivals(&self) -> Vec<u32> {
        let each = |arrivals| core::iter::repeat_n(arrivals, self.barriers());
        each(1).chain(each(4 * self.consumers as u32)).collect()
    }

    /// Which barrier is the first of a kind.
    pub(crate) const fn first_barrier(&self, gate: Gate) -> usize {
        match gate {
            Gate::Queries => 0,
            Gate::Keys => self.query_buffers(),
            Gate::Values => self.query_buffers() + self.stages,
            Gate::FreeQueries => self.barriers(),
            Gate::FreeKeys => self.barriers() + self.query_buffers(),
            Gate::FreeValues => self.barriers() + self.query_buffers() + self.stages,
        }
    }

    /// Shared memory of a cube in bytes, barriers and messages included.
    pub const fn shared_bytes(&self) -> usize {
        self.bytes_with(self.query_buffers(), self.value_stages())
    }

    const fn bytes_with(&self, query_buffers: usize, value_stages: usize) -> usize {
        let [q, k, v] = self.elements();
        let tiles = (query_buffers * q + self.stages * k + value_stages * v) * size_of::<u16>();
        let lines = LINE * size_of::<u32>() * (query_buffers + self.stages);
        tiles + lines + 2 * (query_buffers + self.stages + value_stages) * size_of::<u64>()
    }

    /// Registers a thread of the consumers, and of the producer, once they are dealt out: 65,536 in all. The producer's
    /// addresses take 56; a wide output takes what they can do without.
    pub(crate) const fn registers(&self) -> (u32, u32) {
        match (self.consumers, self.value_dim) {
            (2, ..=128) => (224, 56),
            (2, _) => (240, 24),
            _ => (152, 56),
        }
    }

    /// Whether registers hold the weights of a step in f32 beside the scores of the next: then they are packed while those are
    /// multiplied.
    pub(crate) const fn packs_late(&self) -> bool {
        self.consumers == 2 && self.bk + self.value_dim / 2 <= 160
    }

    /// Registers, in powers of 2 as vectors want them, of a thread's scores, output and packed weights.
    pub(crate) const fn lanes(&self) -> [usize; 3] {
        [(self.bk / 2).next_power_of_two(), (self.value_dim / 2).next_power_of_two(), (self.bk / 4).next_power_of_two()]
    }
}

impl core::fmt::Display for HopperConfig {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let HopperConfig { consumers, bk, head_dim, value_dim, stages, packed, .. } = self;
        write!(f, "tile {}x{bk}, ", self.rows())?;
        if *packed > 1 {
            write!(f, "{packed} heads of {} queries, ", self.bq())?;
        }
        write!(f, "{consumers} warpgroups, {stages} stages, head {head_dim}, values {value_dim}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block_plan::PlanShape;
    use crate::mask::Band;

    #[test]
    fn every_head_dimension_fits() {
        for d in (8..=256).step_by(8) {
            for dv in (8..=256).step_by(8) {
                let p = Problem::new([1, 2, 300, d], [1, 2, 300, d], [1, 2, 300, dv], Element::BF16).unwrap();
                for p in [Problem { softcap: Some(3.0), ..p.clone() }, p] {
                    let (config, _) = HopperConfig::of(&p);
                    assert!(config.shared_bytes() <= SHARED, "{config}: {}", config.shared_bytes());
                    assert!(config.head_dim >= d && config.value_dim >= dv && config.bk.is_multiple_of(16));
                    // Scores, weights and output, and as much for addresses and bounds as the compiler was seen to take.
                    let held = config.bk / 2 + config.bk / 4 + config.value_dim / 2;
                    assert!(held + 60 <= config.registers().0 as usize, "{config}: {held}");
                }
            }
        }
    }

    #[test]
    fn long_walks_take_three_warpgroups() {
        let of = |seq: usize, causal: bool| {
            let p = Problem::new([1, 2, seq, 64], [1, 2, seq, 64], [1, 2, seq, 64], Element::BF16).unwrap();
            HopperConfig::of(&Problem { band: Band { causal, ..p.band }, ..p }).0
        };
        for (seq, causal, consumers) in [(4096, false, 3), (4096, true, 2), (8192, true, 3), (2048, false, 2)] {
            let config = of(seq, causal);
            assert_eq!(config.consumers, consumers, "{seq} {causal}");
            assert!(config.shared_bytes() <= SHARED && config.bk.is_multiple_of(16));
        }
    }

    #[test]
    fn heads_share_tiles_where_that_leaves_fewer_steps() {
        let of = |heads_q: usize, heads_kv: usize, seq_q: usize, seq_kv: usize| {
            let q = [2, heads_q, seq_q, 128];
            Problem::new(q, [2, heads_kv, seq_kv, 128], [2, heads_kv, seq_kv, 128], Element::BF16).unwrap()
        };
        let packed = |p: &Problem| {
            let (config, why) = HopperConfig::of(p);
            assert!(config.boxed_rows() <= config.rows() && p.group().is_multiple_of(config.packed));
            assert_eq!(config.packed > 1, why.contains("share tiles"), "{why}");
            (config.packed, config.bq())
        };
        // Query heads, key heads, queries: heads of a tile, queries of each.
        for (heads, queries, expected) in [
            ((32, 4), 1, (8, 16)),
            ((32, 4), 16, (8, 16)),
            // 17 queries are a whole tile of 4 heads, and two of 8.
            ((32, 4), 17, (4, 32)),
            ((32, 4), 64, (2, 64)),
            // Two tiles of one head hold 256 rows, three of 8 heads with 16 queries each the 1040 of all.
            ((32, 4), 130, (8, 16)),
            ((28, 4), 1, (7, 18)),
            ((28, 4), 19, (7, 18)),
            ((12, 2), 30, (3, 42)),
            ((71, 1), 1, (71, 1)),
            ((256, 1), 1, (128, 1)),
            ((8, 8), 1, (1, 128)),
            ((32, 4), 128, (1, 128)),
            ((32, 4), 4096, (1, 128)),
            // Seven heads do not fill a tile of 128 rows either.
            ((28, 4), 120, (1, 128)),
        ] {
            assert_eq!(packed(&of(heads.0, heads.1, queries, 1000)), expected, "{heads:?} {queries}");
        }
        let short = of(32, 4, 16, 1000);
        let (alone, why) = (32 * (8 + 2), HopperConfig::of(&short).1);
        assert!(why.ends_with(&format!("{} steps a batch element, not {alone}", alone / 8)), "{why}");
        let tile = TileSize { bq: 128, bk: 128 };
        let plan = PlanShape { tile, words: 16, points: 1, planes: [1, 1], column_words: 0 };
        let (config, why) = HopperConfig::of(&Problem { plan: Some(plan), ..short });
        assert!(config.packed == 1 && why.contains("heads keep tiles of their own"), "{why}");
    }

    #[test]
    fn options_leave_the_plain_kernel() {
        let p = Problem::new([1, 2, 300, 64], [1, 2, 300, 64], [1, 2, 300, 64], Element::F16).unwrap();
        assert!(HopperConfig::of(&p).0.plain);
        assert!(!HopperConfig::of(&Problem { scale: -1.0, ..p.clone() }).0.plain);
        assert!(!HopperConfig::of(&Problem { alibi: true, ..p }).0.plain);
    }
}
