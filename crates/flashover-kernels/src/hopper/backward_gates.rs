//! The mbarriers of a cube of the backward, in a row, so that one address is all that is kept of them.

use cubecl::prelude::*;

use super::backward_config::{DQ_SLOTS, HopperBackwardConfig};
use super::backward_works::ADDERS;
use super::ring::{BARRIER, barrier_at};

/// Warps of the warpgroups that compute, each of which arrives at a barrier once.
const WARPS: usize = 8;

/// What barriers say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Gate {
    /// All are told of a work.
    Told,
    /// Keys are there, values, queries with their statistics, gradients of outputs, a part of dq.
    Keys,
    Values,
    Queries,
    Gradients,
    Sums,
    /// Keys are free, once the units that add know of their key tile too; and so on.
    FreeKeys,
    FreeValues,
    FreeQueries,
    FreeGradients,
    FreeSums,
}

use Gate::*;

const GATES: [Gate; 11] =
    [Told, Keys, Values, Queries, Gradients, Sums, FreeKeys, FreeValues, FreeQueries, FreeGradients, FreeSums];

impl HopperBackwardConfig {
    /// Barriers of a gate, and arrivals that end a phase of each. Of large head dimensions one of the two warpgroups has the values, and each parts of
    /// dq of its own.
    const fn gate(&self, gate: Gate) -> (usize, usize) {
        let some = if self.wide() { WARPS / 2 } else { WARPS };
        match gate {
            Told | Keys | Values => (1, 1),
            Queries => (self.stages(), 1),
            Gradients => (self.do_stages(), 1),
            Sums => (DQ_SLOTS, some),
            FreeKeys => (1, WARPS + ADDERS as usize),
            FreeValues => (1, some),
            FreeQueries => (self.stages(), WARPS),
            FreeGradients => (self.do_stages(), WARPS),
            FreeSums => (DQ_SLOTS, 1),
        }
    }

    /// The number of a gate's first barrier.
    pub(crate) fn first_barrier(&self, gate: Gate) -> usize {
        GATES.into_iter().take_while(|&other| other != gate).map(|other| self.gate(other).0).sum()
    }

    /// Arrivals that end a phase, of every barrier.
    pub(crate) fn arrivals(&self) -> Vec<u32> {
        let of_gate = |gate| {
            let (barriers, arrivals) = self.gate(gate);
            core::iter::repeat_n(arrivals as u32, barriers)
        };
        GATES.into_iter().flat_map(of_gate).collect()
    }

    /// How many barriers there are where so many tiles of gradients of outputs are in flight.
    pub(crate) const fn barriers(&self, do_stages: usize) -> usize {
        5 + 2 * (DQ_SLOTS + self.stages() + do_stages)
    }
}

/// Address of the barrier of a stage, from that of the first of all.
#[cube]
pub(crate) fn gate_at(first: u32, stage: u32, #[comptime] gate: Gate, #[comptime] cfg: HopperBackwardConfig) -> u32 {
    barrier_at(first, stage, comptime!(cfg.first_barrier(gate)))
}

/// The same of a gate with one barrier.
#[cube]
pub(crate) fn gate_of(first: u32, #[comptime] gate: Gate, #[comptime] cfg: HopperBackwardConfig) -> u32 {
    first + comptime!((BARRIER * cfg.first_barrier(gate)) as u32)
}
