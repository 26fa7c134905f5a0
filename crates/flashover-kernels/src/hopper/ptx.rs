//! The instructions of sm90 that CubeCL has no words for: `wgmma`, mbarriers by address, register reallocation, named
//! barriers. PTX ISA 8.0, sections "Asynchronous Warpgroup Level Matrix Instructions" and "mbarrier".
//!
//! A `wgmma` is issued in one block and waited for in another, so that other work stands between them. The accumulator
//! goes in and comes out by value; the compiler gives both the same registers.

use cubecl::prelude::barrier::Barrier;
use cubecl::prelude::*;

use crate::family::ptx::value_of;

/// Accumulators of a warpgroup's 64 rows: `n / 2` registers of each thread for `n` columns. Register `e` of thread `t`
/// is row `16·(t / 32) + (t % 32) / 4 + 8·((e / 2) % 2)` and column `8·(e / 4) + 2·(t % 4) + e % 2`.
pub(crate) type Accumulator<N> = Vector<f32, N>;

/// Address of shared memory in its own window.
#[cube]
pub(crate) fn shared_address<T: CubePrimitive>(pointer: *const T) -> u32 {
    let address: u32;
    gpu_asm!(
        "{{ .reg .u64 window; cvta.to.shared.u64 window, {pointer}; cvt.u32.u64 {address}, window; }}",
        pointer = mem_in(_) pointer, address = out(_) address, options(explicit_mem),
    );
    address
}

/// Address of an mbarrier.
#[cube]
pub(crate) fn barrier_address(barrier: &Barrier) -> u32 {
    let address: u32;
    gpu_asm!(
        "{{ .reg .u64 window; cvta.to.shared.u64 window, {barrier}; cvt.u32.u64 {address}, window; }}",
        barrier = mem_in(_) barrier, address = out(_) address, options(explicit_mem),
    );
    address
}

/// The first lane's `x`. The compiler knows that it is the same in all lanes: branches on it do not diverge, and addresses
/// from it stay in uniform registers.
#[cube]
pub(crate) fn uniform(x: u32) -> u32 {
    let x = value_of::<u32>(x);
    let out: u32;
    gpu_asm!("shfl.sync.idx.b32 {out}, {x}, 0, 31, 0xffffffff;", out = out(_) out, x = in(_) x);
    out
}

/// Waits for the end of the phase of that parity.
#[cube]
pub(crate) fn barrier_wait(barrier: u32, parity: u32) {
    let barrier = value_of::<u32>(barrier);
    let parity = value_of::<u32>(parity);
    gpu_asm!(
        "{{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [{barrier}], {parity};\n",
        "@done bra DONE;\nbra AGAIN;\nDONE:\n}}",
        barrier = in(_) barrier, parity = in(_) parity,
    );
}

/// One arrival of each thread for which `counts` holds. Predicated, not branched around: the compiler then orders
/// what stands around it as one block.
#[cube]
pub(crate) fn barrier_arrive(barrier: u32, counts: bool) {
    let barrier = value_of::<u32>(barrier);
    let counts = u32::cast_from(counts);
    gpu_asm!(
        "{{\n.reg .pred counts;\nsetp.ne.u32 counts, {counts}, 0;\n",
        "@counts mbarrier.arrive.shared::cta.b64 _, [{barrier}];\n}}",
        counts = in(_) counts, barrier = in(_) barrier,
    );
}

/// Makes initialized mbarriers visible to the copy engine.
#[cube]
pub(crate) fn fence_barriers() {
    gpu_asm!("fence.mbarrier_init.release.cluster;");
}

/// Waits at named barrier `id` for `threads` threads, those that only arrive counted.
#[cube]
pub(crate) fn named_wait(id: u32, #[comptime] threads: u32) {
    let id = value_of::<u32>(id);
    gpu_asm!("barrier.sync {id}, {threads};", id = in(_) id);
}

/// Arrives at named barrier `id` and goes on.
#[cube]
pub(crate) fn named_arrive(id: u32, #[comptime] threads: u32) {
    let id = value_of::<u32>(id);
    gpu_asm!("barrier.arrive {id}, {threads};", id = in(_) id);
}

/// Gives registers back down to `count` a thread.
#[cube]
pub(crate) fn registers_decrease(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.dec.sync.aligned.u32 {count};");
}

/// Takes registers up to `count` a thread.
#[cube]
pub(crate) fn registers_increase(#[comptime] count: u32) {
    gpu_asm!("setmaxnreg.inc.sync.aligned.u32 {count};");
}

/// Descriptor of a matrix in shared memory whose rows are 128 bytes and swizzled as the copy engine does it, groups of
/// 8 rows following each other. `leading` is the distance in bytes between pieces of 64 columns, used where rows run along the
/// columns of the result.
#[cube]
pub(crate) fn descriptor(address: u32, #[comptime] leading: u32) -> u64 {
    // Bits 0..14 address, 16..30 leading offset, 32..46 stride of 8 rows (1024 bytes), all over 16; 62..64 swizzle of 128.
    let high = comptime!((1u64 << 62) | ((1024u64 >> 4) << 32) | ((leading as u64 >> 4) << 16));
    u64::cast_from((address & 0x3FFFFu32) >> 4u32) | high
}

/// `A · Bᵀ`, both in shared memory. `text` is [`score_text`]'s.
#[cube]
pub(crate) fn issue_scores<N: Size>(a: u64, b: u64, #[comptime] text: &str) -> Accumulator<N> {
    let a = value_of::<u64>(a);
    let b = value_of::<u64>(b);
    let out: Accumulator<N>;
    gpu_asm!("{text}// {out} {a} {b}\n", out = out(_) out, a = in(_) a, b = in(_) b);
    out
}

/// `acc += A · B`: `A` in registers, `B` in shared memory with its rows along the sum. `text` is [`value_text`]'s.
#[cube]
pub(crate) fn issue_values<N: Size, P: Size>(
    acc: Accumulator<N>,
    a: Vector<u32, P>,
    b: u64,
    #[comptime] text: &str,
) -> Accumulator<N> {
    let b = value_of::<u64>(b);
    let acc = value_of::<Accumulator<N>>(acc);
    let a = value_of::<Vector<u32, P>>(a);
    let out: Accumulator<N>;
    gpu_asm!(
        "{text}// {out} {acc} {a} {b}\n",
        out = out(_) out, acc = in(_) acc, a = in(_) a, b = in(_) b,
    );
    out
}

/// Waits until at most `pending` groups of products are in flight and gives the accumulator of one that is not.
#[cube]
pub(crate) fn wait_products<N: Size>(acc: Accumulator<N>, #[comptime] text: &str) -> Accumulator<N> {
    let acc = value_of::<Accumulator<N>>(acc);
    let out: Accumulator<N>;
    gpu_asm!("{text}// {out} {acc}\n", out = out(_) out, acc = in(_) acc);
    out
}

/// [`wait_products`] that the compiler cannot take to before `x` and `y` are known, so that what they come from runs while
/// the products do. `text` is [`wait_after_text`]'s.
#[cube]
pub(crate) fn wait_products_after<N: Size>(
    acc: Accumulator<N>,
    x: f32,
    y: f32,
    #[comptime] text: &str,
) -> Accumulator<N> {
    let acc = value_of::<Accumulator<N>>(acc);
    let x = value_of::<f32>(x);
    let y = value_of::<f32>(y);
    let out: Accumulator<N>;
    gpu_asm!("{text}// {out} {acc} {x} {y}\n", out = out(_) out, acc = in(_) acc, x = in(_) x, y = in(_) y);
    out
}

/// `mov`s from the accumulator that comes in to the one that goes out, `lanes` registers each of which `used` matter.
fn moves(lanes: usize, used: usize) -> String {
    (0..used).map(|e| format!("mov.b32 %{e}, %{};\n", lanes + e)).collect()
}

fn register_list(from: usize, count: usize) -> String {
    let names: Vec<String> = (from..from + count).map(|e| format!("%{e}")).collect();
    format!("{{{}}}", names.join(", "))
}

/// The block of [`issue_scores`]: 64 rows times `n` columns over `depth` elements of type `ty`. A and B lie in pieces of 64
/// elements, `piece_a` and `piece_b` bytes apart.
pub(crate) fn score_text(lanes: usize, n: usize, depth: usize, piece_a: usize, piece_b: usize, ty: &str) -> String {
    shared_text(lanes, n, depth, |step| step / 4 * piece_a + step % 4 * 32, piece_b, 0, ty)
}

/// The same where A lies with its rows along the sum: 64 columns of a matrix whose rows are 128 bytes.
pub(crate) fn transposed_text(lanes: usize, n: usize, depth: usize, piece_b: usize, ty: &str) -> String {
    shared_text(lanes, n, depth, |step| step * 16 * 128, piece_b, 1, ty)
}

/// A product of matrices in shared memory; `offset_a` is where a step's part of A starts, in bytes.
fn shared_text(
    lanes: usize,
    n: usize,
    depth: usize,
    offset_a: impl Fn(usize) -> usize,
    piece_b: usize,
    transposed_a: u32,
    ty: &str,
) -> String {
    let mut text = String::from("{\n.reg .pred keep;\n.reg .u64 da, db;\nwgmma.fence.sync.aligned;\n");
    let out = register_list(0, n / 2);
    let (a, b) = (lanes, lanes + 1);
    for step in 0..depth / 16 {
        text += &format!("setp.ne.b32 keep, {}, 0;\n", u32::from(step > 0));
        text += &format!("add.u64 da, %{a}, {};\n", offset_a(step) / 16);
        text += &format!("add.u64 db, %{b}, {};\n", (step / 4 * piece_b + step % 4 * 32) / 16);
        text += &format!(
            "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ty}.{ty} {out}, da, db, keep, 1, 1, {transposed_a}, 0;\n"
        );
    }
    text + "wgmma.commit_group.sync.aligned;\n}\n"
}

/// The block of [`issue_values`]: 64 rows times `n` columns over `depth` rows of B, which are 128 bytes long.
pub(crate) fn value_text(lanes: usize, lanes_a: usize, n: usize, depth: usize, ty: &str) -> String {
    let out = register_list(0, n / 2);
    register_text(&moves(lanes, n / 2), &out, 2 * lanes, lanes_a, n, depth, ty)
}

/// A product that is added to the registers `out`; A is in those from `first_a` on, behind them stands B. `before` comes first.
fn register_text(before: &str, out: &str, first_a: usize, lanes_a: usize, n: usize, depth: usize, ty: &str) -> String {
    let mut text = String::from("{\n.reg .pred keep;\n.reg .u64 db;\nsetp.eq.b32 keep, 0, 0;\n");
    text += before;
    text += "wgmma.fence.sync.aligned;\n";
    for step in 0..depth / 16 {
        let a = register_list(first_a + 4 * step, 4);
        text += &format!("add.u64 db, %{}, {};\n", first_a + lanes_a, step * 16 * 128 / 16);
        text += &format!("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{ty}.{ty} {out}, {a}, db, keep, 1, 1, 1;\n");
    }
    text + "wgmma.commit_group.sync.aligned;\n}\n"
}

/// The block of [`wait_products`].
pub(crate) fn wait_text(lanes: usize, n: usize, pending: usize) -> String {
    format!("{{\nwgmma.wait_group.sync.aligned {pending};\n{}}}\n", moves(lanes, n / 2))
}

/// The block of [`wait_products_after`], for numbers that are not negative: before the wait stands a nap, if exactly one of
/// them has its sign set.
pub(crate) fn wait_after_text(lanes: usize, n: usize, pending: usize) -> String {
    let (x, y) = (2 * lanes, 2 * lanes + 1);
    let mut text = String::from("{\n.reg .pred tired;\n.reg .b32 both, low, high;\n");
    text += &format!("mov.b32 low, %{x};\nmov.b32 high, %{y};\nxor.b32 both, low, high;\n");
    text += "setp.lt.s32 tired, both, 0;\n@tired nanosleep.u32 1;\n";
    text + &format!("wgmma.wait_group.sync.aligned {pending};\n{}}}\n", moves(lanes, n / 2))
}

/// A block without operands.
#[cube]
pub(crate) fn run_block(#[comptime] text: &str) {
    gpu_asm!("{text}");
}

/// [`issue_values`] into named registers. `text` is [`named_value_text`]'s.
#[cube]
pub(crate) fn issue_named<P: Size>(a: Vector<u32, P>, b: u64, #[comptime] text: &str) {
    let a = value_of::<Vector<u32, P>>(a);
    let b = value_of::<u64>(b);
    gpu_asm!("{text}// {a} {b}\n", a = in(_) a, b = in(_) b);
}

/// What named registers hold. `text` is [`named_read_text`]'s.
#[cube]
pub(crate) fn read_named<N: Size>(#[comptime] text: &str) -> Accumulator<N> {
    let out: Accumulator<N>;
    gpu_asm!("{text}// {out}\n", out = out(_) out);
    out
}

/// A block that declares an accumulator of `n` columns as registers `name0`, `name1`, … of the kernel. Products
/// add to them in place: what goes into a block by value and comes out again may get other registers, and at more than
/// two accumulators it does.
pub(crate) fn named_text(name: &str, n: usize) -> String {
    format!(".reg .f32 {name}<{}>;\n", n / 2)
}

/// A block that zeroes named registers.
pub(crate) fn named_zero_text(name: &str, n: usize) -> String {
    (0..n / 2).map(|e| format!("mov.f32 {name}{e}, 0f00000000;\n")).collect()
}

/// The block of [`issue_named`], as [`value_text`].
pub(crate) fn named_value_text(name: &str, lanes_a: usize, n: usize, depth: usize, ty: &str) -> String {
    let names: Vec<String> = (0..n / 2).map(|e| format!("{name}{e}")).collect();
    register_text("", &format!("{{{}}}", names.join(", ")), 0, lanes_a, n, depth, ty)
}

/// The block of [`read_named`], with no product in flight.
pub(crate) fn named_read_text(name: &str, n: usize) -> String {
    (0..n / 2).map(|e| format!("mov.f32 %{e}, {name}{e};\n")).collect()
}
