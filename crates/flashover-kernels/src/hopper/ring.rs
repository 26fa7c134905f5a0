//! Rings of tiles in shared memory: which stage is next, the barriers that say that it is full or free, and how a stage is filled.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use super::config::PIECE;
use super::ptx::barrier_address;
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

/// `count` barriers whose phases end after `arrivals` arrivals. The caller synchronizes before they are used.
#[cube]
pub(crate) fn barriers(#[comptime] count: usize, #[comptime] arrivals: u32) -> Sequence<Shared<Barrier>> {
    let mut all = Sequence::<Shared<Barrier>>::new();
    #[unroll]
    for _ in 0..count {
        let barrier = Barrier::shared_uninit();
        if UNIT_POS == 0 {
            barrier.init_manual(arrivals);
        }
        all.push(barrier);
    }
    all
}

/// Bytes of a barrier.
pub(crate) const BARRIER: usize = 8;

/// Barriers in a row: those that tell that something has arrived wait for one arrival, as many behind them, which tell that its place
/// is free, for `arrivals`. The caller synchronizes before they are used.
#[cube]
pub(crate) fn barrier_row(#[comptime] count: usize, #[comptime] arrivals: u32) -> Shared<[Barrier]> {
    let all: Shared<[Barrier]> = Shared::new_aligned_slice(comptime!(2 * count), BARRIER);
    if UNIT_POS == 0 {
        #[unroll]
        for x in 0..comptime!(2 * count) {
            all[x].init_manual(comptime!(if x < count { 1 } else { arrivals }));
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

/// Addresses of barriers, taken once.
#[cube]
pub(crate) fn addresses(barriers: &Sequence<Shared<Barrier>>, #[comptime] count: usize) -> Sequence<u32> {
    let mut all = Sequence::<u32>::new();
    #[unroll]
    for s in 0..count {
        all.push(barrier_address(&barriers[s]));
    }
    all
}

/// Address of the barrier of a stage.
#[cube]
pub(crate) fn address_at(addresses: &Sequence<u32>, stage: u32, #[comptime] stages: usize) -> u32 {
    let mut address = addresses[0];
    #[unroll]
    for s in 1..stages {
        address = select(stage == comptime!(s as u32), addresses[s], address);
    }
    address
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
