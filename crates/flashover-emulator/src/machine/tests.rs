//! The machine by small kernels, and that it notices what it is there to notice.

use super::{Launch, Module, launch};

/// A kernel of this body, with one parameter, `%rd0`: where `out` lies.
fn kernel(shared: &str, body: &str) -> String {
    format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 k_0)\n{{\n\
         .reg .pred %p<8>;\n.reg .b32 %r<32>;\n.reg .f32 %f<16>;\n.reg .b64 %rd<16>;\n.shared .align 16 .b8 memory[{shared}];\n\
         ld.param.u64 %rd0, [k_0];\nmov.u32 %r0, %tid.x;\nmul.wide.u32 %rd1, %r0, 4;\nadd.s64 %rd2, %rd0, %rd1;\n\
         {body}\nst.global.u32 [%rd2], %r1;\nret;\n}}\n"
    )
}

/// What the kernel's threads write, a number each.
fn run(body: &str, blocks: u32, threads: u32) -> Result<Vec<u32>, String> {
    let module = Module::parse(&kernel("1024", body))?;
    let mut out = vec![u32::MAX; threads as usize];
    let start = out.as_mut_ptr() as u64;
    let regions = vec![(start, start + 4 * u64::from(threads))];
    let how = Launch {
        grid: [blocks, 1, 1],
        block: [threads, 1, 1],
        dynamic_shared: 0,
        params: start.to_le_bytes().to_vec(),
    };
    super::schedule::run(&module.function("k").expect("the kernel"), &how, regions.into())?;
    Ok(out)
}

fn error(body: &str, threads: u32) -> String {
    run(body, 1, threads).expect_err("an error")
}

#[test]
fn lanes_part_and_meet_again() {
    // Odd lanes count to their number, even ones do not; the shuffle needs all of them.
    let body = "mov.u32 %r1, 0;\nand.b32 %r2, %r0, 1;\nsetp.eq.u32 %p1, %r2, 0;\n@%p1 bra DONE;\n\
                LOOP:\nadd.u32 %r1, %r1, 1;\nsetp.lt.u32 %p2, %r1, %r0;\n@%p2 bra LOOP;\n\
                DONE:\nshfl.sync.bfly.b32 %r1, %r1, 1, 31, -1;";
    let expected: Vec<u32> = (0..64).map(|t| if t % 32 % 2 == 0 { t + 1 } else { 0 }).collect();
    assert_eq!(run(body, 1, 64), Ok(expected));
}

#[test]
fn numbers_are_those_of_the_hardware() {
    let one = |body: &str| run(body, 1, 32).expect("sound")[3];
    assert_eq!(one("mov.b32 %r2, 0x40490fdb;\ncvt.rzi.s32.f32 %r1, %r2;"), 3);
    assert_eq!(one("mov.f32 %f1, 0f7FC00000;\ncvt.rn.bf16x2.f32 %r1, %f1, 0f3F800000;"), 0x7fff_3f80);
    assert_eq!(one("lop3.b32 %r1, 12, 10, 6, 0xE8;"), 14, "the majority of three");
    assert_eq!(one("prmt.b32 %r1, 0x33221100, 0x77665544, 0x7531;"), 0x7755_3311);
    assert_eq!(one("bfe.s32 %r1, 0xF0, 4, 4;"), u32::MAX);
    assert_eq!(one("shf.l.wrap.b32 %r1, 0x80000000, 1, 1;"), 3);
    assert_eq!(one("mul.hi.s32 %r1, -2, 0x40000000;"), u32::MAX);
}

#[test]
fn warps_wait_for_one_another() {
    // The second warp reads what the first writes.
    let body = "mov.u32 %r2, memory;\nshl.b32 %r3, %r0, 2;\nadd.u32 %r4, %r2, %r3;\nst.shared.u32 [%r4], %r0;\n\
                bar.sync 0;\nxor.b32 %r5, %r3, 128;\nadd.u32 %r4, %r2, %r5;\nld.shared.u32 %r1, [%r4];";
    assert_eq!(run(body, 1, 64), Ok((0..64).map(|t| t ^ 32).collect()));
    let early = run(&body.replace("bar.sync 0;", ""), 1, 64).expect("no check sees it");
    assert!(early.contains(&u32::MAX), "what nobody wrote is all ones: {early:?}");
}

#[test]
fn additions_of_many_blocks_arrive() {
    let body = "atom.global.add.u32 %r2, [%rd0], 1;\nmov.u32 %r1, 0;\nret;";
    assert_eq!(run(body, 50, 32).expect("sound")[0], u32::MAX.wrapping_add(50 * 32));
}

#[test]
fn a_phase_ends_with_its_arrivals_and_its_bytes() {
    // A copy of 128 bytes from where the results lie, which hold all ones.
    let body = "mov.u32 %r2, memory;\nsetp.ne.u32 %p1, %r0, 0;\n@%p1 bra READY;\n\
                mbarrier.init.shared::cta.b64 [%r2], 1;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 128;\n\
                add.u32 %r3, %r2, 16;\n\
                cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%rd0], 128, [%r2];\n\
                READY:\nbar.sync 0;\n\
                AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0;\n@!%p2 bra AGAIN;\n\
                ld.shared.u32 %r1, [%r2+140];\nadd.u32 %r1, %r1, 8;";
    assert_eq!(run(body, 1, 64), Ok(vec![7; 64]));
    let more = error(&body.replace("_, [%r2], 128", "_, [%r2], 144"), 64);
    assert!(more.contains("all threads wait"), "{more}");
}

#[test]
fn products_are_read_when_they_are_waited_for() {
    // Both matrices are ones in f16, at addresses that are multiples of 1024; 64 rows times 8 columns over 16.
    let fill = "mov.u32 %r2, 2048;\nshl.b32 %r3, %r0, 4;\nadd.u32 %r2, %r2, %r3;\n\
                st.shared.v4.u32 [%r2], {0x3C003C00, 0x3C003C00, 0x3C003C00, 0x3C003C00};\nbar.sync 0;";
    let issue = "mov.u64 %rd3, 0x4000004000010080;\nsetp.ne.u32 %p1, 0, 0;\n\
                 mov.f32 %f0, 0f00000000;\nmov.f32 %f1, 0f00000000;\nmov.f32 %f2, 0f00000000;\nmov.f32 %f3, 0f00000000;\n\
                 wgmma.fence.sync.aligned;\n\
                 wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%f0, %f1, %f2, %f3}, %rd3, %rd3, %p1, 1, 1, 0, 0;\n\
                 wgmma.commit_group.sync.aligned;";
    let module = |body: &str| Module::parse(&kernel("9216", body));
    let wait = "wgmma.wait_group.sync.aligned 0;";
    let end = "mov.b32 %r1, %f2;";
    let result = |body: String| {
        let mut out = vec![u32::MAX; 128];
        let start = out.as_mut_ptr() as u64;
        let (params, block) = (start.to_le_bytes().to_vec(), [128, 1, 1]);
        let how = Launch { grid: [1; 3], block, dynamic_shared: 0, params };
        let function = module(&body).expect("sound").function("k").expect("the kernel");
        super::schedule::run(&function, &how, vec![(start, start + 512)].into()).expect("sound");
        out.into_iter().map(f32::from_bits).collect::<Vec<_>>()
    };
    // 128 threads fill 2 KB; the matrix has 64 rows of 128 bytes, of which 16 are filled.
    let filled = format!("{fill}\n{issue}\n{wait}\n{end}");
    assert!(result(filled).iter().take(32).all(|&x| x == 16.0));
    let not_waited = format!("{fill}\n{issue}\n{end}\n{wait}");
    assert!(result(not_waited).iter().take(32).all(|&x| x == 0.0));
    let cleared = format!("{fill}\n{issue}\nst.shared.v4.u32 [%r2], {{0, 0, 0, 0}};\nbar.sync 0;\n{wait}\n{end}");
    assert!(result(cleared).iter().take(32).all(|&x| x == 0.0));
}

#[test]
fn what_is_wrong_is_said() {
    for (body, threads, expected) in [
        ("mov.u32 %r1, 0;\nst.global.u32 [%rd2+128], %r1;", 32, "global memory"),
        ("mov.u32 %r1, 0;\nst.global.u32 [%rd2+2], %r1;", 32, "not a multiple of 4"),
        ("mov.u32 %r2, memory;\nld.shared.u32 %r1, [%r2+1024];", 32, "shared memory"),
        ("ld.shared.u32 %r1, [0];", 32, "shared memory"),
        ("mov.u64 %rd3, 0xFFFFFFFFFFFFFFFC;\nld.shared.u32 %r1, [%rd3];", 32, "shared memory"),
        ("mov.u32 %r1, 0;\nbar.sync 1, 96;", 64, "all threads wait"),
        ("mov.u32 %r1, 0;\nbar.sync 1, 40;", 64, "no multiple of 32"),
        (
            "setp.lt.u32 %p1, %r0, 16;\n@%p1 bra SOME;\nret;\nSOME:\nshfl.sync.idx.b32 %r1, %r0, 20, 31, 0xffff;",
            32,
            "lane 20",
        ),
        ("mov.u32 %r2, memory;\nmbarrier.arrive.shared::cta.b64 _, [%r2];\nmov.u32 %r1, 0;", 32, "nobody made"),
        ("trap;\nmov.u32 %r1, 0;", 32, "trapped"),
    ] {
        let error = error(body, threads);
        assert!(error.contains(expected) && error.contains("block [0, 0, 0]"), "{body}\n{error}");
    }
    for (body, expected) in [
        ("frobnicate.u32 %r1, %r0;", "frobnicate"),
        ("bra NOWHERE;", "NOWHERE"),
        ("add.u32 %r1, %r0, %rd1;", "expected 32 bits"),
        ("mov.u32 %r1, %unheard_of;", "%unheard_of"),
    ] {
        let error = error(body, 32);
        assert!(error.contains(expected) && error.contains("line"), "{body}\n{error}");
    }
}

#[test]
fn a_launch_takes_the_allocations_of_the_device() {
    let module = Module::parse(&kernel("16", "mov.u32 %r1, 0;")).expect("sound");
    let how = Launch { grid: [1; 3], block: [32, 1, 1], dynamic_shared: 0, params: 4096u64.to_le_bytes().to_vec() };
    let error = launch(&module.function("k").expect("the kernel"), &how).expect_err("nothing is allocated there");
    assert!(error.contains("global memory"), "{error}");
}
