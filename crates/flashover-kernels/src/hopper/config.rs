//! Tiles of the Hopper kernels.

use super::messages::LINE;
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
}

impl HopperConfig {
    /// Tiles for a problem whose head dimensions are multiples of 8, and why.
    pub fn of(problem: &Problem) -> (Self, &'static str) {
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

    /// Queries of a tile.
    pub const fn bq(&self) -> usize {
        self.consumers * ROWS
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
        [self.bq() * d, self.bk * d, self.bk * dv]
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
        let HopperConfig { consumers, bk, head_dim, value_dim, stages, .. } = self;
        write!(
            f,
            "tile {}x{bk}, {consumers} warpgroups, {stages} stages, head {head_dim}, values {value_dim}",
            self.bq()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn options_leave_the_plain_kernel() {
        let p = Problem::new([1, 2, 300, 64], [1, 2, 300, 64], [1, 2, 300, 64], Element::F16).unwrap();
        assert!(HopperConfig::of(&p).0.plain);
        assert!(!HopperConfig::of(&Problem { scale: -1.0, ..p.clone() }).0.plain);
        assert!(!HopperConfig::of(&Problem { alibi: true, ..p }).0.plain);
    }
}
