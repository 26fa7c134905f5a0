//! The instructions that the kernels are made of, as inline PTX for sm80 and later.
//!
//! Shared memory is addressed by bytes within the shared window, global memory by its 64-bit address: offsets that are known
//! when a kernel is compiled become immediates of the instructions.
//!
//! Register layouts (PTX ISA, "Matrix fragments for mma.m16n8k16"), with `g = lane / 4` and `t = lane % 4`:
//!
//! ```text
//! A    [16, 16]   4 registers of 2:  (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), and the next column each
//! B    [16, 8]    2 registers of 2:  (2t, g), (2t + 8, g), and the next row each
//! C, D [16, 8]    4 floats:          (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
//! ```
//!
//! Of tf32 (m16n8k8), where a matrix of 8×4 floats is loaded as one of 8×8 elements of 16 bits:
//!
//! ```text
//! A    [16, 8]    4 registers:       (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4)
//! B    [8, 8]     2 registers:       (t, g), (t + 4, g)
//! ```

use cubecl::prelude::*;

use crate::family::ptx::value_of;
use crate::problem::Element;

/// Four registers of two elements: an A operand, or two B operands side by side.
pub(crate) type Fragment = Vector<u32, Const<4>>;

/// A lane's part of a 16×8 block of sums.
pub(crate) type Sums = Vector<f32, Const<4>>;

/// `a · b + c` of a 16×16 and a 16×8 block.
#[cube]
pub(crate) fn mma(a: Fragment, b0: u32, b1: u32, c: Sums, #[comptime] element: Element) -> Sums {
    let (a, b0, b1, c) = (value_of::<Fragment>(a), value_of::<u32>(b0), value_of::<u32>(b1), value_of::<Sums>(c));
    let kind = comptime!(element.name());
    let out: Sums;
    gpu_asm!(
        "mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {d}, {a}, {{{b0}, {b1}}}, {c};",
        d = out(_) out, a = in(_) a, b0 = in(_) b0, b1 = in(_) b1, c = in(_) c, options(pure, nomem),
    );
    out
}

/// `a · b + c` of a 16×8 and an 8×8 block of tf32: f32 whose last 13 bits do not count. Sums are cut, not rounded.
#[cube]
pub(crate) fn mma_tf32(a: Fragment, b0: u32, b1: u32, c: Sums) -> Sums {
    let (a, b0, b1, c) = (value_of::<Fragment>(a), value_of::<u32>(b0), value_of::<u32>(b1), value_of::<Sums>(c));
    let out: Sums;
    gpu_asm!(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {d}, {a}, {{{b0}, {b1}}}, {c};",
        d = out(_) out, a = in(_) a, b0 = in(_) b0, b1 = in(_) b1, c = in(_) c, options(pure, nomem),
    );
    out
}

/// Four 8×8 blocks from shared memory; lane `l` names row `l % 8` of block `l / 8`.
#[cube]
pub(crate) fn load_matrix(address: u32, #[comptime] offset: usize) -> Fragment {
    let address = value_of::<u32>(address);
    let out: Fragment;
    gpu_asm!(
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {out}, [{address}+{offset}];",
        out = out(_) out, address = in(_) address,
    );
    out
}

/// [`load_matrix`], each block transposed.
#[cube]
pub(crate) fn load_matrix_transposed(address: u32, #[comptime] offset: usize) -> Fragment {
    let address = value_of::<u32>(address);
    let out: Fragment;
    gpu_asm!(
        "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {out}, [{address}+{offset}];",
        out = out(_) out, address = in(_) address,
    );
    out
}

/// `x` of the lane whose number differs by `mask`.
#[cube]
fn other_lane(x: f32, #[comptime] mask: usize) -> f32 {
    let x = value_of::<f32>(x);
    let out: f32;
    gpu_asm!("shfl.sync.bfly.b32 {out}, {x}, {mask}, 31, -1;", out = out(_) out, x = in(_) x);
    out
}

/// `x`, in a register of its own for as long as it is used: the compiler would otherwise work out again what is made of indices of
/// units, tile by tile.
#[cube]
pub(crate) fn kept(x: u32) -> u32 {
    let x = value_of::<u32>(x);
    let out: u32;
    gpu_asm!("shfl.sync.bfly.b32 {out}, {x}, 0, 31, -1;", out = out(_) out, x = in(_) x);
    out
}

/// Maximum over the four lanes that share a row of sums.
#[cube]
pub(crate) fn row_maximum(x: f32) -> f32 {
    let x = max(x, other_lane(x, 1usize));
    max(x, other_lane(x, 2usize))
}

/// Sum over the four lanes that share a row of sums.
#[cube]
pub(crate) fn row_sum(x: f32) -> f32 {
    let x = x + other_lane(x, 1usize);
    x + other_lane(x, 2usize)
}

/// Sum over all lanes of the warp.
#[cube]
pub(crate) fn all_lanes_sum(x: f32) -> f32 {
    let x = row_sum(x);
    let x = x + other_lane(x, 4usize);
    let x = x + other_lane(x, 8usize);
    x + other_lane(x, 16usize)
}

/// Whether `x` holds in any lane of the warp.
#[cube]
pub(crate) fn any_lane(x: bool) -> bool {
    let x = value_of::<u32>(u32::cast_from(x));
    let out: u32;
    gpu_asm!(
        "{{ .reg .pred holds; setp.ne.u32 holds, {x}, 0; vote.sync.any.pred holds, holds, -1; selp.u32 {out}, 1, 0, holds; }}",
        out = out(_) out, x = in(_) x,
    );
    out != 0
}

/// Starts copying 16 bytes to shared memory, or zeros where not `valid`.
#[cube]
pub(crate) fn copy_async(to: u32, #[comptime] offset: usize, from: u64, valid: bool) {
    let (to, from) = (value_of::<u32>(to), value_of::<u64>(from));
    let bytes = value_of::<u32>(select(valid, 16u32, 0u32));
    gpu_asm!(
        "cp.async.cg.shared.global [{to}+{offset}], [{from}], 16, {bytes};",
        to = in(_) to, from = in(_) from, bytes = in(_) bytes,
    );
}

/// [`copy_async`] of 4 bytes.
#[cube]
pub(crate) fn copy_word_async(to: u32, from: u64, valid: bool) {
    let (to, from) = (value_of::<u32>(to), value_of::<u64>(from));
    let bytes = value_of::<u32>(select(valid, 4u32, 0u32));
    gpu_asm!(
        "cp.async.ca.shared.global [{to}], [{from}], 4, {bytes};",
        to = in(_) to, from = in(_) from, bytes = in(_) bytes,
    );
}

/// Closes the group of the copies started since the last one.
#[cube]
pub(crate) fn commit_copies() {
    gpu_asm!("cp.async.commit_group;");
}

/// Waits until all but the last `pending` groups of this unit have arrived.
#[cube]
pub(crate) fn wait_copies(#[comptime] pending: usize) {
    gpu_asm!("cp.async.wait_group {pending};", pending = const pending);
}

/// Writes a register to shared memory.
#[cube]
pub(crate) fn store_shared(address: u32, #[comptime] offset: usize, x: u32) {
    let (address, x) = (value_of::<u32>(address), value_of::<u32>(x));
    gpu_asm!("st.shared.b32 [{address}+{offset}], {x};", address = in(_) address, x = in(_) x);
}

/// Waits until `units` units have come to barrier `id`, and what they wrote to shared memory is there. 0 is that of the cube.
#[cube]
pub(crate) fn sync_some(id: u32, #[comptime] units: usize) {
    let id = value_of::<u32>(id);
    gpu_asm!("bar.sync {id}, {units};", id = in(_) id);
}

/// Writes two registers to shared memory.
#[cube]
pub(crate) fn store_shared_8(address: u32, #[comptime] offset: usize, low: u32, high: u32) {
    let (address, low, high) = (value_of::<u32>(address), value_of::<u32>(low), value_of::<u32>(high));
    gpu_asm!(
        "st.shared.v2.b32 [{address}+{offset}], {{{low}, {high}}};",
        address = in(_) address, low = in(_) low, high = in(_) high,
    );
}

/// Reads a register from shared memory.
#[cube]
pub(crate) fn load_shared(address: u32, #[comptime] offset: usize) -> u32 {
    let address = value_of::<u32>(address);
    let out: u32;
    gpu_asm!("ld.shared.b32 {out}, [{address}+{offset}];", out = out(_) out, address = in(_) address);
    out
}

/// Reads two floats from shared memory.
#[cube]
pub(crate) fn load_shared_floats(address: u32, #[comptime] offset: usize) -> Vector<f32, Const<2>> {
    let address = value_of::<u32>(address);
    let out: Vector<f32, Const<2>>;
    gpu_asm!("ld.shared.v2.f32 {out}, [{address}+{offset}];", out = out(_) out, address = in(_) address);
    out
}

/// Writes 16 bytes to global memory.
#[cube]
pub(crate) fn store_global_16(address: u64, x: Fragment) {
    let (address, x) = (value_of::<u64>(address), value_of::<Fragment>(x));
    gpu_asm!("st.global.v4.b32 [{address}], {x};", address = in(_) address, x = in(_) x);
}

/// Writes 2 bytes, the lower half of a register, to global memory.
#[cube]
pub(crate) fn store_global_2(address: u64, x: u32) {
    let (address, x) = (value_of::<u64>(address), value_of::<u32>(x));
    gpu_asm!(
        "{{ .reg .b16 low, high; mov.b32 {{low, high}}, {x}; st.global.b16 [{address}], low; }}",
        address = in(_) address, x = in(_) x,
    );
}

/// Writes a lane's block of sums `offset` bytes behind an address of 16 bytes of global memory.
#[cube]
pub(crate) fn store_floats(address: u64, #[comptime] offset: usize, x: Sums) {
    let (address, x) = (value_of::<u64>(address), value_of::<Sums>(x));
    gpu_asm!("st.global.v4.f32 [{address}+{offset}], {x};", address = in(_) address, x = in(_) x);
}

/// Adds a block of sums to what stands there, in one access where the device has it (sm90).
#[cube]
pub(crate) fn add_floats(address: u64, #[comptime] offset: usize, x: Sums, #[comptime] vector: bool) {
    let address = value_of::<u64>(address);
    if vector {
        let x = value_of::<Sums>(x);
        gpu_asm!("red.global.add.v4.f32 [{address}+{offset}], {x};", address = in(_) address, x = in(_) x);
    } else {
        #[unroll]
        for z in 0..4usize {
            let y = value_of::<f32>(x.extract(z));
            let here = comptime!(offset + 4 * z);
            gpu_asm!("red.global.add.f32 [{address}+{here}], {y};", address = in(_) address, y = in(_) y);
        }
    }
}

/// How many have had their turn; asked for early, the answer is there when it is needed.
#[cube]
pub(crate) fn turn_now(counter: u64) -> u32 {
    let counter = value_of::<u64>(counter);
    let out: u32;
    gpu_asm!("ld.relaxed.gpu.global.u32 {out}, [{counter}];", out = out(_) out, counter = in(_) counter);
    out
}

/// Waits until a counter, which was `now` before, has reached `turn`. What is added after it is added after what others added
/// before: additions take place in the second-level cache, and none is begun before the counter is known.
#[cube]
pub(crate) fn turn_wait(counter: u64, now: u32, turn: u32) {
    let (counter, now, turn) = (value_of::<u64>(counter), value_of::<u32>(now), value_of::<u32>(turn));
    gpu_asm!(
        "{{\n.reg .pred early;\n.reg .b32 here;\nmov.b32 here, {now};\nsetp.lt.u32 early, here, {turn};\n@!early bra DONE;\nAGAIN:\n",
        "ld.relaxed.gpu.global.u32 here, [{counter}];\nsetp.lt.u32 early, here, {turn};\n@early bra AGAIN;\nDONE:\n}}",
        counter = in(_) counter, now = in(_) now, turn = in(_) turn,
    );
}

/// Gives the turn at a counter, if it is one, to the next; the leader counts, after a barrier of all. The barrier orders what all have added
/// before the leader's release, and a release covers all that is ordered before it, not only what its own unit did (PTX ISA, "Memory
/// consistency model", causality order).
#[cube]
pub(crate) fn turn_pass(counter: u64, leader: bool) {
    if leader && counter != 0 {
        let counter = value_of::<u64>(counter);
        gpu_asm!("red.release.gpu.global.add.u32 [{counter}], 1;", counter = in(_) counter);
    }
}

/// Where shared memory starts, in bytes within the shared window.
#[cube]
pub(crate) fn shared_address(memory: &Shared<[Fragment]>) -> u32 {
    // SAFETY: only the start is taken; what is read and written lies within the lengths that the config gives.
    let pointer = unsafe { memory.as_slice().as_ptr_unchecked() };
    let out: u32;
    gpu_asm!(
        "{{ .reg .u64 window; cvta.to.shared.u64 window, {p}; cvt.u32.u64 {out}, window; }}",
        p = in(_) pointer, out = out(_) out,
    );
    out
}
