//! The copy engine in one dimension, and how cubes share a place of global memory: in turns, or in any order after the first. PTX ISA 8.0, "cp.async.bulk",
//! "cp.reduce.async.bulk" and "Memory Consistency Model".

use cubecl::prelude::*;

use crate::family::ptx::value_of;

/// One arrival at a barrier that then waits for `bytes` more bytes.
#[cube]
pub(crate) fn barrier_expect(barrier: u32, #[comptime] bytes: usize) {
    let barrier = value_of::<u32>(barrier);
    gpu_asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{barrier}], {bytes};", barrier = in(_) barrier);
}

/// Starts copying `bytes` bytes from global to shared memory, which `barrier` counts.
#[cube]
pub(crate) fn bulk_load(to: u32, from: u64, barrier: u32, #[comptime] bytes: usize) {
    let (to, from, barrier) = (value_of::<u32>(to), value_of::<u64>(from), value_of::<u32>(barrier));
    gpu_asm!(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [{from}], {bytes}, [{barrier}];",
        to = in(_) to, from = in(_) from, barrier = in(_) barrier,
    );
}

/// Starts writing `bytes` bytes of shared memory to global memory.
#[cube]
pub(crate) fn bulk_store(to: u64, from: u32, #[comptime] bytes: usize) {
    let (to, from) = (value_of::<u64>(to), value_of::<u32>(from));
    gpu_asm!(
        "cp.async.bulk.global.shared::cta.bulk_group [{to}], [{from}], {bytes};",
        to = in(_) to, from = in(_) from,
    );
}

/// Starts adding `bytes` bytes of floats in shared memory to those in global memory.
#[cube]
pub(crate) fn bulk_add(to: u64, from: u32, #[comptime] bytes: usize) {
    let (to, from) = (value_of::<u64>(to), value_of::<u32>(from));
    gpu_asm!(
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [{to}], [{from}], {bytes};",
        to = in(_) to, from = in(_) from,
    );
}

/// Waits until what this unit started to write has been read from shared memory.
#[cube]
pub(crate) fn bulk_wait_read() {
    gpu_asm!("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;");
}

/// Waits until what this unit started to write stands in global memory.
#[cube]
pub(crate) fn bulk_wait() {
    gpu_asm!("cp.async.bulk.wait_group 0;");
}

/// Makes what this unit wrote to shared memory visible to the copy engine and to `wgmma`.
#[cube]
pub(crate) fn fence_shared() {
    gpu_asm!("fence.proxy.async.shared::cta;");
}

/// Waits until a counter in global memory has reached `turn`: what those before it wrote is visible then.
#[cube]
pub(crate) fn turn_wait(counter: u64, turn: u32) {
    let (counter, turn) = (value_of::<u64>(counter), value_of::<u32>(turn));
    gpu_asm!(
        "{{\n.reg .pred early;\n.reg .b32 now;\nAGAIN:\nld.acquire.gpu.global.u32 now, [{counter}];\n",
        "setp.lt.u32 early, now, {turn};\n@early bra AGAIN;\nfence.proxy.async;\n}}",
        counter = in(_) counter, turn = in(_) turn,
    );
}

/// Gives the turn to the next: adds `by` to a counter in global memory once what this unit wrote is visible.
#[cube]
pub(crate) fn turn_pass(counter: u64, #[comptime] by: u32) {
    let counter = value_of::<u64>(counter);
    gpu_asm!(
        "fence.proxy.async;\nred.release.gpu.global.add.u32 [{counter}], {by};",
        counter = in(_) counter,
    );
}

/// What the counter of a place grows by when who came by first [has written](turn_pass) there; those who come by are counted below it.
pub(crate) const WRITTEN: u32 = 1 << 31;

/// Counts who comes by a place in no order, and whether it is the first, who writes; others may add when this returns.
#[cube]
pub(crate) fn come_by(counter: u64) -> bool {
    let at = value_of::<u64>(counter);
    let before: u32;
    gpu_asm!(
        "atom.acquire.gpu.global.add.u32 {before}, [{at}], 1;\nfence.proxy.async;",
        before = out(_) before, at = in(_) at,
    );
    if before != 0 && before < WRITTEN {
        turn_wait(counter, WRITTEN.runtime());
    }
    before == 0
}

/// Writes four 8×8 matrices of 16-bit elements to shared memory, each transposed; `address` is that of a row of 16 bytes,
/// row `lane % 8` of matrix `lane / 8`.
#[cube]
pub(crate) fn store_transposed(address: u32, #[comptime] offset: usize, a: u32, b: u32, c: u32, d: u32) {
    let address = value_of::<u32>(address);
    let (a, b) = (value_of::<u32>(a), value_of::<u32>(b));
    let (c, d) = (value_of::<u32>(c), value_of::<u32>(d));
    gpu_asm!(
        "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [{address}+{offset}], {{{a}, {b}, {c}, {d}}};",
        address = in(_) address, a = in(_) a, b = in(_) b, c = in(_) c, d = in(_) d,
    );
}
