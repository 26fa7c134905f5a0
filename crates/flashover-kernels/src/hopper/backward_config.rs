//! Tiles of the Hopper backward.

use super::backward_messages::{LINE, LINES};
use super::config::{HopperConfig, PIECE, ROWS, SHARED, WARPGROUP};
use crate::block_plan::TileSize;
use crate::family::tile_shape::TileShape;
use crate::problem::{Element, Problem};

/// Warpgroups that compute.
const CONSUMERS: usize = 2;

/// Tiles of queries in flight, and of gradients of outputs where there is room.
const STAGES: usize = 2;

/// Parts of dq on their way from the consumers to memory, one of either unit that adds: those of two steps, or a piece of each warpgroup.
pub(crate) const DQ_SLOTS: usize = 2;

/// Largest head dimension of which a warpgroup holds dk and dv of its keys.
const NARROW: usize = 128;

/// Head dimensions that products are made for. Others are padded to the next; the copy engine writes the zeros. Of 96 the compiler makes
/// products one by one (ptxas says C7512), so it is padded too.
const HEAD_DIMS: [usize; 4] = [64, 128, 192, 256];

/// Shape of a backward: known when a kernel is compiled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct HopperBackwardConfig {
    /// Element type of the operands.
    pub element: Element,
    /// Queries of a tile.
    pub bq: usize,
    /// Head dimension of queries and keys, padded to what a product takes.
    pub head_dim: usize,
    /// Head dimension of values, likewise.
    pub value_dim: usize,
    /// Whether only a scale changes a score, and no dense mask hides: what else there is costs registers.
    pub plain: bool,
    /// Whether a block plan lists the tiles.
    pub listed: bool,
    /// Whether cubes add to dq as they come, not in turns.
    pub unordered: bool,
}

impl HopperBackwardConfig {
    /// Tiles for a problem, and why; or what the kernel has no form for.
    pub fn of(problem: &Problem) -> Result<(Self, &'static str), &'static str> {
        let Problem {
            head_dim, value_dim, element, softcap, alibi, bias, score, mask, dropout, plan, unordered, ..
        } = *problem;
        let shaped = softcap.is_some() || alibi || bias.is_some() || score.is_some();
        let plain = !(shaped || mask.is_some() || dropout.is_some());
        let padded = |dim: usize| HEAD_DIMS.into_iter().find(|&native| native >= dim).unwrap_or(dim);
        let (head_dim, value_dim) = (padded(head_dim), padded(value_dim));
        let (bq, why) = match head_dim + value_dim {
            _ if head_dim.max(value_dim) > NARROW => {
                (64, "one warpgroup's registers hold dk of 64 keys, the other's dv")
            }
            ..=128 if plain => (128, "registers hold the scores of 128 queries beside dk and dv"),
            _ => (64, "registers hold the scores of 64 queries beside dk and dv"),
        };
        let config =
            HopperBackwardConfig { element, bq, head_dim, value_dim, plain, listed: plan.is_some(), unordered };
        match plan {
            Some(plan) if !config.divides(plan.tile) => Err(match (bq, config.bk()) {
                (64, 64) => "a block plan whose tiles are no multiples of 64 queries and 64 keys",
                (64, _) => "a block plan whose tiles are no multiples of 64 queries and 128 keys",
                _ => "a block plan whose tiles are no multiples of 128 queries and 128 keys",
            }),
            _ => Ok((config, why)),
        }
    }

    /// Whether head dimensions are so large that dk is one warpgroup's and dv the other's, of the same keys; else each has
    /// both, of keys of its own.
    pub(crate) const fn wide(&self) -> bool {
        self.head_dim > NARROW || self.value_dim > NARROW
    }

    /// Keys of a tile.
    pub const fn bk(&self) -> usize {
        if self.wide() { ROWS } else { CONSUMERS * ROWS }
    }

    /// Whether a tile of a plan consists of whole tiles.
    pub const fn divides(&self, plan: TileSize) -> bool {
        let (bq, bk) = (plan.bq as usize, plan.bk as usize);
        bq.is_multiple_of(self.bq) && bk.is_multiple_of(self.bk())
    }

    /// As a tile of a cube that owns keys.
    pub(crate) const fn shape(&self) -> TileShape {
        TileShape { rows: self.bk(), cols: self.bq }
    }

    /// Units of a cube: the consumers, and a warpgroup that copies.
    pub const fn units(&self) -> usize {
        (CONSUMERS + 1) * WARPGROUP
    }

    pub(crate) const fn stages(&self) -> usize {
        STAGES
    }

    /// Tiles of gradients of outputs in flight.
    pub(crate) const fn do_stages(&self) -> usize {
        if self.bytes(STAGES) > SHARED { 1 } else { STAGES }
    }

    /// Elements in shared memory of a tile of keys, of values, of queries, and of gradients of outputs.
    pub(crate) const fn elements(&self) -> [usize; 4] {
        let (d, dv) = (HopperConfig::pieces(self.head_dim) * PIECE, HopperConfig::pieces(self.value_dim) * PIECE);
        [self.bk() * d, self.bk() * dv, self.bq * d, self.bq * dv]
    }

    /// Elements of a tile of gradients of scores.
    pub(crate) const fn score_elements(&self) -> usize {
        self.bq * self.bk()
    }

    /// Tiles of gradients of scores in shared memory.
    pub(crate) const fn score_buffers(&self) -> usize {
        if self.wide() { 1 } else { 2 }
    }

    /// Pieces of 64 elements of the head dimension, the last perhaps padded.
    pub(crate) const fn dq_pieces(&self) -> usize {
        HopperConfig::pieces(self.head_dim)
    }

    /// Floats of a tile of dq, which each thread of the consumers has a part of.
    pub(crate) const fn dq_elements(&self) -> usize {
        self.bq * self.dq_pieces() * PIECE
    }

    /// Floats of dq that a thread has at a time.
    pub(crate) const fn dq_registers(&self) -> usize {
        if self.wide() { self.bq * PIECE / WARPGROUP } else { self.dq_elements() / (CONSUMERS * WARPGROUP) }
    }

    /// Pieces of dq of which a warpgroup has every other, and how many of the warpgroups have any: for large head dimensions.
    pub(crate) const fn wide_pieces(&self, warpgroup: usize) -> usize {
        (self.dq_pieces() + 1 - warpgroup) / CONSUMERS
    }

    /// Units of a cube that add to a query tile, each with a counter of its own.
    pub(crate) const fn counters(&self) -> usize {
        if self.wide() && self.wide_pieces(1) > 0 { CONSUMERS } else { 1 }
    }

    /// Floats in shared memory that consumers write: dq, and for large head dimensions the weights that one hands the other.
    pub(crate) const fn written_floats(&self) -> usize {
        if self.wide() { DQ_SLOTS * self.bq * PIECE + self.score_elements() } else { DQ_SLOTS * self.dq_elements() }
    }

    /// Queries that a warpgroup's product for dq covers: all, of a piece or half of the head dimension, or half of them.
    pub(crate) const fn dq_columns(&self) -> usize {
        if self.wide() { self.bq } else { self.dq_elements() / (CONSUMERS * ROWS) }
    }

    /// Statistics of a query: its log-sum-exp, its `delta` and, where dropout may ask for it, its hash.
    pub(crate) const fn statistics(&self) -> usize {
        if self.plain { 2 } else { 3 }
    }

    /// Bytes of the statistics of a tile of queries.
    pub(crate) const fn statistics_bytes(&self) -> usize {
        self.statistics() * self.bq * size_of::<f32>()
    }

    /// Words of shared memory beside tiles and barriers: the line of the work, and under a plan those of steps.
    pub(crate) const fn words(&self) -> usize {
        if self.listed { (1 + LINES) * LINE } else { LINE }
    }

    /// Shared memory of a cube in bytes, barriers included.
    pub const fn shared_bytes(&self) -> usize {
        self.bytes(self.do_stages())
    }

    /// The same with so many tiles of gradients of outputs in flight.
    const fn bytes(&self, do_stages: usize) -> usize {
        let [k, v, q, d_o] = self.elements();
        let elements = k + v + STAGES * q + do_stages * d_o + self.score_buffers() * self.score_elements();
        let floats = self.written_floats() * size_of::<f32>() + STAGES * self.statistics_bytes();
        let barriers = self.barriers(do_stages);
        elements * size_of::<u16>() + floats + barriers * size_of::<u64>() + self.words() * size_of::<u32>()
    }

    /// Registers a thread of the consumers, and of the warpgroup that copies: 64,512 in all. Who copies spills with fewer than 40, and
    /// consumers with fewer than 232, but with fewer than 240 products of 256 elements are made one by one (ptxas says C7512).
    pub(crate) const fn registers(&self) -> (u32, u32) {
        let widest = self.head_dim > 192 || self.value_dim > 192;
        if widest { (240, 24) } else { (232, 40) }
    }

    /// Registers, in powers of 2 as vectors want them, of a thread's scores, dk, dv, part of dq and packed weights.
    pub(crate) const fn lanes(&self) -> [usize; 5] {
        [
            (self.bq / 2).next_power_of_two(),
            (self.head_dim / 2).next_power_of_two(),
            (self.value_dim / 2).next_power_of_two(),
            self.dq_registers().next_power_of_two(),
            (self.bq / 4).next_power_of_two(),
        ]
    }
}

impl core::fmt::Display for HopperBackwardConfig {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let HopperBackwardConfig { bq, head_dim, value_dim, .. } = self;
        write!(f, "tile {bq}x{}, {CONSUMERS} warpgroups, head {head_dim}, values {value_dim}", self.bk())?;
        f.write_str(if self.listed { ", listed" } else { "" })?;
        f.write_str(if self.unordered { ", unordered" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_head_dimension_fits() {
        for d in (8..=256).step_by(8) {
            for dv in (8..=256).step_by(8) {
                let p = Problem::new([1, 2, 300, d], [1, 2, 300, d], [1, 2, 300, dv], Element::BF16).unwrap();
                let (plain, _) = HopperBackwardConfig::of(&p).unwrap();
                let config = HopperBackwardConfig { listed: true, ..plain };
                assert!(config.shared_bytes() <= SHARED, "{config}: {}", config.shared_bytes());
                assert!(config.head_dim >= d && config.value_dim >= dv);
                // dk and dv, scores of two products, and the part of dq.
                let sums = match config.wide() {
                    true => config.head_dim.max(config.value_dim) / 2,
                    false => (config.head_dim + config.value_dim) / 2,
                };
                let held = sums + config.bq + config.bq / 4;
                assert!(held <= config.registers().0 as usize, "{config}: {held}");
                assert!(config.wide() || config.do_stages() == STAGES, "{config}");
                assert!(config.dq_columns().is_multiple_of(8));
                assert_eq!(config.wide_pieces(0) + config.wide_pieces(1), config.dq_pieces());
            }
        }
    }
}
