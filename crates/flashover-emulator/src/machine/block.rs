//! What the warps of a block share: memory, barriers, and copies in flight.

use std::sync::Arc;

use super::code::SHARED_START;
use super::registers::LANES;
use crate::memory::region;
use crate::ptx::Error;
use crate::tensor_map::TensorMap;

/// Barriers that a block has by number.
const NAMED: usize = 16;

/// A barrier by number.
#[derive(Clone, Copy, Default)]
struct Named {
    arrived: u32,
    /// Threads that it waits for; 0: all.
    needs: u32,
}

/// A copy of the copy engine into shared memory.
pub(crate) enum Load {
    Row { to: u64, from: u64, bytes: usize },
    Box { map: Box<TensorMap>, coordinates: Vec<i32>, to: u64 },
}

/// What the warps of a block share.
pub(crate) struct Block {
    shared: Vec<u64>,
    bytes: usize,
    params: Arc<[u8]>,
    allocations: Arc<Vec<(u64, u64)>>,
    hit: (u64, u64),
    named: [Named; NAMED],
    /// Barriers by number that have just let their threads go, a bit each.
    pub released: u32,
    /// Threads that have not ended.
    pub threads: u32,
    /// Loads in flight, and the mbarriers that count them.
    pub loads: Vec<(Load, u64)>,
    random: u64,
}

impl Block {
    /// Shared memory of so many bytes behind its start, which nobody has written.
    pub(crate) fn new(
        shared: usize,
        params: Arc<[u8]>,
        allocations: Arc<Vec<(u64, u64)>>,
        threads: u32,
        seed: u64,
    ) -> Self {
        let bytes = SHARED_START as usize + shared;
        Block {
            // By address from 0 on: what the copy engine swizzles depends on addresses.
            shared: vec![u64::MAX; bytes.div_ceil(8)],
            bytes,
            params,
            allocations,
            hit: (0, 0),
            named: [Named::default(); NAMED],
            released: 0,
            threads,
            loads: Vec::new(),
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        }
    }

    /// A number by chance, the same in every run (xorshift, Marsaglia 2003).
    pub(crate) fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random >> 16
    }

    pub(crate) fn global(&mut self, at: u64, len: usize) -> Result<*mut u8, Error> {
        let end = at.wrapping_add(len as u64);
        if at < self.hit.0 || end > self.hit.1 {
            self.hit = region(&self.allocations, at, len as u64)
                .ok_or_else(|| format!("{len} bytes at {at:#x} of global memory are no allocation's"))?;
        }
        Ok(at as *mut u8)
    }

    pub(crate) fn shared(&mut self, at: u64, len: usize) -> Result<*mut u8, Error> {
        if at < SHARED_START || at.saturating_add(len as u64) > self.bytes as u64 {
            return Err(format!("{len} bytes at {at:#x} of shared memory, which ends at {:#x}", self.bytes));
        }
        Ok(self.shared.as_mut_ptr().cast::<u8>().wrapping_add(at as usize))
    }

    pub(crate) fn param(&mut self, at: u64, len: usize) -> Result<*mut u8, Error> {
        if at.saturating_add(len as u64) > self.params.len() as u64 {
            return Err(format!("{len} bytes at {at:#x} of the parameters, which are {} bytes", self.params.len()));
        }
        Ok(self.params.as_ptr().cast_mut().wrapping_add(at as usize))
    }

    /// Shared memory as bytes, by address.
    pub(crate) fn window(&mut self) -> &mut [u8] {
        // SAFETY: `shared` has at least that many bytes, and any bytes are `u8`.
        unsafe { std::slice::from_raw_parts_mut(self.shared.as_mut_ptr().cast(), self.bytes) }
    }

    /// Threads come to a barrier; whether it lets all go.
    pub(crate) fn arrive(&mut self, id: usize, count: u32, threads: u32) -> Result<bool, Error> {
        let named = self.named.get_mut(id).ok_or_else(|| format!("barrier {id} of {NAMED}"))?;
        if named.arrived > 0 && named.needs != count {
            return Err(format!("barrier {id} is waited for with {count} threads and with {}", named.needs));
        }
        if !count.is_multiple_of(LANES as u32) {
            return Err(format!("barrier {id} of {count} threads, which is no multiple of {LANES}"));
        }
        named.needs = count;
        named.arrived += threads;
        Ok(self.settle(id))
    }

    fn settle(&mut self, id: usize) -> bool {
        let named = &mut self.named[id];
        let all = if named.needs == 0 { self.threads } else { named.needs };
        let done = named.arrived >= all && named.arrived > 0;
        if done {
            *named = Named::default();
            self.released |= 1 << id;
        }
        done
    }

    /// Threads end; barriers of all wait for them no longer.
    pub(crate) fn end(&mut self, threads: u32) {
        self.threads -= threads;
        for id in 0..NAMED {
            if self.named[id].arrived > 0 && self.named[id].needs == 0 {
                self.settle(id);
            }
        }
    }

    /// What stands at barriers by number.
    pub(crate) fn waiting(&self) -> String {
        let all = self.named.iter().enumerate().filter(|(_, named)| named.arrived > 0);
        all.map(|(id, named)| format!("barrier {id}: {} of {} threads; ", named.arrived, named.needs)).collect()
    }

    /// Carries out loads in flight: some, by chance, or all. How many.
    pub(crate) fn load(&mut self, all: bool) -> Result<usize, Error> {
        let mut done = 0;
        let mut at = 0;
        while at < self.loads.len() {
            if !all && self.random() & 1 != 0 {
                at += 1;
                continue;
            }
            let (load, barrier) = self.loads.remove(at);
            let bytes = match load {
                Load::Row { to, from, bytes } => {
                    let from = self.global(from, bytes)?;
                    let to = self.shared(to, bytes)?;
                    // SAFETY: both were checked for so many bytes, and shared memory is no device allocation.
                    unsafe { std::ptr::copy_nonoverlapping(from, to, bytes) };
                    bytes as u32
                }
                Load::Box { map, coordinates, to } => {
                    map.read_box(&coordinates, to as u32, self.window())?;
                    map.box_bytes()
                }
            };
            self.mbarrier(barrier)?.complete(bytes)?;
            done += 1;
        }
        Ok(done)
    }

    pub(crate) fn mbarrier(&mut self, at: u64) -> Result<&mut Mbarrier, Error> {
        if !at.is_multiple_of(8) {
            return Err(format!("an mbarrier at {at:#x}"));
        }
        // SAFETY: eight bytes of shared memory, which any bits may fill.
        Ok(unsafe { &mut *self.shared(at, 8)?.cast::<Mbarrier>() })
    }
}

/// An mbarrier in its eight bytes. PTX ISA, "mbarrier".
#[repr(C)]
pub(crate) struct Mbarrier {
    /// Arrivals of a phase, and those that it still waits for.
    expected: u16,
    pending: u16,
    /// Bytes that it waits for, times two, and the phase's parity.
    bytes: i32,
}

impl Mbarrier {
    pub(crate) fn init(&mut self, count: u32) -> Result<(), Error> {
        let count = u16::try_from(count).ok().filter(|count| *count < u16::MAX && *count > 0);
        let count = count.ok_or("an mbarrier's count is out of range here")?;
        *self = Mbarrier { expected: count, pending: count, bytes: 0 };
        Ok(())
    }

    pub(crate) fn parity(&self) -> u32 {
        (self.bytes & 1) as u32
    }

    fn known(&self) -> Result<(), Error> {
        if self.expected == u16::MAX { Err("an mbarrier that nobody made".into()) } else { Ok(()) }
    }

    fn settle(&mut self) {
        if self.pending == 0 && self.bytes >> 1 == 0 {
            self.pending = self.expected;
            self.bytes ^= 1;
        }
    }

    pub(crate) fn expect(&mut self, bytes: u32) -> Result<(), Error> {
        self.known()?;
        self.bytes += 2 * bytes as i32;
        Ok(())
    }

    pub(crate) fn complete(&mut self, bytes: u32) -> Result<(), Error> {
        self.known()?;
        self.bytes -= 2 * bytes as i32;
        self.settle();
        Ok(())
    }

    pub(crate) fn arrive(&mut self, count: u32) -> Result<(), Error> {
        self.known()?;
        let left = u32::from(self.pending).checked_sub(count);
        self.pending = left.ok_or("more arrivals at an mbarrier than it waits for")? as u16;
        self.settle();
        Ok(())
    }

    /// Whether the phase of that parity is over.
    pub(crate) fn passed(&self, parity: u32) -> Result<bool, Error> {
        self.known()?;
        Ok(self.parity() != parity & 1)
    }
}
