//! Rings of tiles in shared memory: which stage is next, the barriers that say that it is full or free, and how a stage is filled.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::config::PIECE;
use crate::family::ptx::value_of;

/// Where a producer or a consumer stands in a ring.
#[derive(CubeType, Clone, Copy)]
#[expand(derive(Clone, Copy))]
pub(crate) struct Ring {
    pub stage: u32,
    /// Parity of the phase that ends when the stage is ready.
    pub parity: u32,
}

/// The first stage. A producer starts with parity 1, so that it finds the stages free.
#[cube]
pub(crate) fn ring_start(parity: u32) -> Ring {
    Ring { stage: 0u32, parity }
}

/// The next stage.
#[cube]
pub(crate) fn advance(ring: &mut Ring, #[comptime] stages: u32) {
    ring.stage += 1;
    if ring.stage == stages {
        ring.stage = 0u32;
        ring.parity ^= 1u32;
    }
}

/// Bytes of a barrier.
pub(crate) const BARRIER: usize = 8;

/// Barriers in a row, whose phases end after so many arrivals. The caller synchronizes before they are used.
#[cube]
pub(crate) fn barrier_row(#[comptime] arrivals: Vec<u32>) -> Shared<[Barrier]> {
    let count = comptime!(arrivals.len());
    let all: Shared<[Barrier]> = Shared::new_aligned_slice(count, BARRIER);
    if UNIT_POS == 0 {
        #[unroll]
        for x in 0..count {
            all[x].init_manual(comptime!(arrivals[x]));
        }
    }
    all
}

/// Address of barrier `number + stage` from that of the first. In one block: the compiler would keep an address for every ring, and
/// registers are short.
#[cube]
pub(crate) fn barrier_at(first: u32, stage: u32, #[comptime] number: usize) -> u32 {
    let (first, stage) = (value_of::<u32>(first), value_of::<u32>(stage));
    let offset = comptime!(BARRIER * number);
    let out: u32;
    gpu_asm!(
        "{{\n.reg .u32 here;\nmad.lo.u32 here, {stage}, {BARRIER}, {first};\nadd.u32 {out}, here, {offset};\n}}",
        out = out(_) out, stage = in(_) stage, first = in(_) first, options(pure, nomem),
    );
    out
}

/// Starts copying rows from `row` on into part `slot` of shared memory, in pieces of 64 elements that are `rows` rows apart; zeros
/// past the ends.
#[cube]
pub(crate) fn copy_pieces<E: Float>(
    from: &TensorMap<E, Tiled>,
    to: &mut Shared<[E]>,
    full: &Barrier,
    #[comptime] slot: usize,
    b: u32,
    h: u32,
    row: u32,
    #[comptime] len: usize,
    #[comptime] rows: usize,
) {
    #[unroll]
    for piece in 0..comptime!(len / (rows * PIECE)) {
        let first = comptime!(slot * len + piece * rows * PIECE);
        let place = &mut to[first..comptime!(first + rows * PIECE)];
        full.tma_load_4d(from, place, b as i32, h as i32, row as i32, comptime!((piece * PIECE) as i32));
    }
}
