//! The device, what it can, and its one context.

use std::cell::Cell;
use std::ffi::c_char;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::handle::{Handle, Out};
use super::status::Status::{InvalidContext, InvalidDevice, InvalidValue, NotInitialized, NotSupported};
use super::status::{Answer, alive, driver, refuse};
use crate::memory;

/// The version of CUDA whose driver this is.
const VERSION: i32 = 13000;
/// The only context.
const CONTEXT: Handle = 0xc0_0000_0010;

static INITIALIZED: AtomicBool = AtomicBool::new(false);
/// How often the context is retained, and its flags.
static RETAINED: AtomicU32 = AtomicU32::new(0);
static FLAGS: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static CURRENT: Cell<Handle> = const { Cell::new(0) };
}

/// What depends on the variables of the environment.
pub(super) struct Device {
    /// The compute capability times ten.
    pub capability: i32,
    multiprocessors: i32,
    /// Most bytes of shared memory that a block gets when it asks.
    pub shared: i32,
    l2: i32,
}

/// Most bytes of shared memory that a block gets without asking.
pub(super) const SHARED: i32 = 48 << 10;

/// The device as the environment asks for it.
pub(super) fn emulated() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let number = |name, default| match std::env::var(name).map(|text| text.parse()) {
            Ok(Ok(number)) if number > 0 => number,
            Ok(_) => panic!("expected a number in {name}"),
            Err(_) => default,
        };
        let multiprocessors = number("FLASHOVER_EMULATOR_SMS", 4);
        match number("FLASHOVER_EMULATOR_CC", 90) {
            90 => Device { capability: 90, multiprocessors, shared: 227 << 10, l2: 50 << 20 },
            80 => Device { capability: 80, multiprocessors, shared: 163 << 10, l2: 40 << 20 },
            other => panic!("expected 80 or 90 in FLASHOVER_EMULATOR_CC, got {other}"),
        }
    })
}

impl Device {
    /// `CUdevice_attribute`, the values of an H100 or an A100.
    pub fn attribute(&self, attribute: u32) -> Option<i32> {
        let hopper = (self.capability >= 90) as i32;
        Some(match attribute {
            1 => 1024,                      // MAX_THREADS_PER_BLOCK
            2 | 3 => 1024,                  // MAX_BLOCK_DIM_X and _Y
            4 => 64,                        // MAX_BLOCK_DIM_Z
            5 => i32::MAX,                  // MAX_GRID_DIM_X
            6 | 7 => 65535,                 // MAX_GRID_DIM_Y and _Z
            8 => SHARED,                    // MAX_SHARED_MEMORY_PER_BLOCK
            9 => 64 << 10,                  // TOTAL_CONSTANT_MEMORY
            10 => 32,                       // WARP_SIZE
            11 => i32::MAX,                 // MAX_PITCH
            12 | 82 => 65536,               // MAX_REGISTERS_PER_BLOCK and _PER_MULTIPROCESSOR
            13 => 1_980_000,                // CLOCK_RATE in kHz
            14 => memory::ALIGNMENT as i32, // TEXTURE_ALIGNMENT
            15 => 1,                        // GPU_OVERLAP
            16 => self.multiprocessors,     // MULTIPROCESSOR_COUNT
            17 | 18 => 0,                   // KERNEL_EXEC_TIMEOUT, INTEGRATED
            19 => 1,                        // CAN_MAP_HOST_MEMORY
            20 => 0,                        // COMPUTE_MODE: default
            31 | 32 => 1,                   // CONCURRENT_KERNELS, ECC_ENABLED
            33 => 1,                        // PCI_BUS_ID
            34 | 35 | 50 => 0,              // PCI_DEVICE_ID, TCC_DRIVER, PCI_DOMAIN_ID
            36 => 2_619_000,                // MEMORY_CLOCK_RATE in kHz
            37 => 5120,                     // GLOBAL_MEMORY_BUS_WIDTH in bits
            38 => self.l2,                  // L2_CACHE_SIZE
            39 => 2048,                     // MAX_THREADS_PER_MULTIPROCESSOR
            40 => 3,                        // ASYNC_ENGINE_COUNT
            41 => 1,                        // UNIFIED_ADDRESSING
            51 => 32,                       // TEXTURE_PITCH_ALIGNMENT
            75 => self.capability / 10,     // COMPUTE_CAPABILITY_MAJOR
            76 => self.capability % 10,     // COMPUTE_CAPABILITY_MINOR
            78..=80 => 1,                   // STREAM_PRIORITIES, GLOBAL_L1_CACHE, LOCAL_L1_CACHE
            81 => self.shared + RESERVED,   // MAX_SHARED_MEMORY_PER_MULTIPROCESSOR
            83..=86 => 0,                   // MANAGED_MEMORY, MULTI_GPU_BOARD, its group, HOST_NATIVE_ATOMIC
            87 => 2,                        // SINGLE_TO_DOUBLE_PRECISION_PERF_RATIO
            88..=91 => 0,                   // PAGEABLE_MEMORY_ACCESS and the like
            95 | 96 => 0,                   // COOPERATIVE_LAUNCH, also over devices
            97 => self.shared,              // MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            106 => 32,                      // MAX_BLOCKS_PER_MULTIPROCESSOR
            108 | 109 => 0,                 // MAX_PERSISTING_L2_CACHE_SIZE, MAX_ACCESS_POLICY_WINDOW_SIZE
            111 => RESERVED,                // RESERVED_SHARED_MEMORY_PER_BLOCK
            115 => 0,                       // MEMORY_POOLS
            120 => hopper,                  // CLUSTER_LAUNCH
            127 => hopper,                  // TENSOR_MAP_ACCESS
            _ => return None,
        })
    }
}

/// Bytes of shared memory that a block has and no kernel gets.
const RESERVED: i32 = 1 << 10;

fn check(device: i32) -> Answer {
    match (INITIALIZED.load(Ordering::Acquire), device) {
        (false, _) => Err(NotInitialized),
        (true, 0) => Ok(()),
        (true, _) => Err(InvalidDevice),
    }
}

/// Fails where the calling thread has no context, or it is lost.
pub(super) fn current() -> Answer {
    alive()?;
    if CURRENT.get() == CONTEXT { Ok(()) } else { Err(InvalidContext) }
}

fn uuid(out: Out<[u8; 16]>, device: i32) -> Answer {
    check(device).and_then(|()| out.put(*b"flashover-sm_90\0"))
}

driver! {
    fn cuInit(flags: u32) {
        if flags != 0 {
            return Err(InvalidValue);
        }
        emulated();
        INITIALIZED.store(true, Ordering::Release);
        Ok(())
    }

    /// NVRTC asks for tables of what NVIDIA does not document, to keep what it compiled, and does without if there are none.
    fn cuGetExportTable(_out: Out<Handle>, _table: Handle) {
        Err(NotSupported)
    }

    fn cuDriverGetVersion(out: Out<i32>) {
        out.put(VERSION)
    }

    fn cuDeviceGetCount(out: Out<i32>) {
        check(0)?;
        out.put(1)
    }

    fn cuDeviceGet(out: Out<i32>, ordinal: i32) {
        check(ordinal)?;
        out.put(ordinal)
    }

    fn cuDeviceGetName(out: Out<c_char>, len: i32, device: i32) {
        check(device)?;
        out.put_text(crate::DEVICE_NAME, len)
    }

    fn cuDeviceGetUuid(out: Out<[u8; 16]>, device: i32) {
        uuid(out, device)
    }

    fn cuDeviceGetUuid_v2(out: Out<[u8; 16]>, device: i32) {
        uuid(out, device)
    }

    /// Only Windows has it.
    fn cuDeviceGetLuid(_luid: Out<[u8; 8]>, _mask: Out<u32>, device: i32) {
        check(device)?;
        Err(NotSupported)
    }

    fn cuDeviceGetPCIBusId(out: Out<c_char>, len: i32, device: i32) {
        check(device)?;
        out.put_text("0000:01:00.0", len)
    }

    fn cuDeviceTotalMem_v2(out: Out<usize>, device: i32) {
        check(device)?;
        out.put(memory::TOTAL as usize)
    }

    fn cuDeviceGetAttribute(out: Out<i32>, attribute: u32, device: i32) {
        check(device)?;
        match emulated().attribute(attribute) {
            Some(value) => out.put(value),
            None => Err(refuse(InvalidValue, format_args!("unknown CUdevice_attribute {attribute}"))),
        }
    }

    fn cuDevicePrimaryCtxRetain(out: Out<Handle>, device: i32) {
        check(device)?;
        RETAINED.fetch_add(1, Ordering::AcqRel);
        out.put(CONTEXT)
    }

    /// The context stays: its memory is freed with the process.
    fn cuDevicePrimaryCtxRelease_v2(device: i32) {
        check(device)?;
        let released = RETAINED.fetch_update(Ordering::AcqRel, Ordering::Acquire, |count| count.checked_sub(1));
        released.map(|_| ()).map_err(|_| InvalidContext)
    }

    fn cuDevicePrimaryCtxGetState(device: i32, flags: Out<u32>, active: Out<i32>) {
        check(device)?;
        flags.put(FLAGS.load(Ordering::Acquire))?;
        active.put((RETAINED.load(Ordering::Acquire) > 0) as i32)
    }

    fn cuDevicePrimaryCtxSetFlags_v2(device: i32, flags: u32) {
        check(device)?;
        FLAGS.store(flags, Ordering::Release);
        Ok(())
    }

    fn cuCtxSetCurrent(context: Handle) {
        check(0)?;
        if context != 0 && context != CONTEXT {
            return Err(InvalidContext);
        }
        CURRENT.set(context);
        Ok(())
    }

    fn cuCtxGetCurrent(out: Out<Handle>) {
        check(0)?;
        out.put(CURRENT.get())
    }

    fn cuCtxGetDevice(out: Out<i32>) {
        current()?;
        out.put(0)
    }

    fn cuCtxSynchronize() {
        current()
    }

    /// The higher the priority, the lower its number.
    fn cuCtxGetStreamPriorityRange(least: Out<i32>, greatest: Out<i32>) {
        current()?;
        least.offer(0)?;
        greatest.offer(-5)
    }
}
